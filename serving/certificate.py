"""The TLS certificate: a renewed one is taken up by the running process."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from serving.errors import MalformedRequest

logger = logging.getLogger("alexnet.gateway")


class Certificate:
    """A chain and its key in PEM files. Raises MalformedRequest if they are of no use at the start."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain, self._key = chain, key
        self._seen = self._signature()
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except OSError as error:  # of which ssl.SSLError is one
            raise MalformedRequest(f"no TLS with {chain} and {key}: {_reason(error)}") from error

    def follow(self, context: ssl.SSLContext) -> None:
        """Take up what has changed, for connections to come; half a renewal leaves what was."""
        signature = self._signature()
        if signature == self._seen:
            return
        try:
            # Into another context first: one that refuses a key has taken the chain already.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(context)
        except OSError as error:
            logger.error("the TLS certificate stays as it was: %s", _reason(error))
        else:
            logger.info("TLS certificate read again")
        self._seen = signature

    def _load(self, context: ssl.SSLContext) -> None:
        # A password would be asked for on the terminal, and nobody sits there.
        context.load_cert_chain(self._chain, self._key, password=lambda: b"")

    def _signature(self) -> list[tuple[int, int, int] | None]:
        return [_facts(path) for path in (self._chain, self._key)]


def _facts(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or "they cannot be read"
