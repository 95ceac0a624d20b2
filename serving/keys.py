"""The file of API keys: hashed, read again when it changes, written in one step.

    {"keys": [{"name": "shop", "sha256": "9f86...", "created": "2026-11-23", "rate": 20, "burst": 40}]}

Why SHA-256 and no slow hash: bcrypt and its like make guessing dear, which passwords need because people
choose them. These keys are 256 random bits that `new_key` drew: there is nothing to guess from a hash, and a
slow one would let anybody keep the gateway busy with wrong keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serving.errors import MalformedRequest

PREFIX: Final = "alexnet_"
"""So that scanners for leaked secrets can tell what they found."""
MAX_KEY_BYTES: Final = 256
_MAX_FILE_BYTES: Final = 1_000_000
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"name", "sha256", "created", "rate", "burst"}
_OTHERS_MAY: Final = 0o027
"""Must be off: whoever may write the file makes keys. The group may read it, as of mounted secrets."""

logger = logging.getLogger("alexnet.gateway")


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept. `rate`: photographs a second, None: no limit; `burst`: at once after a rest."""

    name: str
    sha256: str
    created: str = ""
    rate: float | None = None
    burst: float | None = None

    @property
    def bucket_size(self) -> float:
        """What may come at once: the burst, by itself a second's worth and at least one."""
        return self.burst if self.burst is not None else max(1.0, self.rate or 1.0)


def new_key() -> str:
    """256 random bits as 43 characters that headers and shells carry, behind the prefix."""
    return PREFIX + secrets.token_urlsafe(32)


def hashed(key: bytes) -> str:
    """What is kept of a key, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()


def find(keys: Iterable[ApiKey], presented: bytes) -> ApiKey | None:
    """The key that was presented. Each is compared, in constant time: how long it takes tells nothing."""
    digest, found = hashed(presented[: MAX_KEY_BYTES + 1]), None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


# --- the file ------------------------------------------------------------------------------------


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Raises MalformedRequest where the file is missing, not ours alone to write, or no file of keys."""
    try:
        with path.open("rb") as file:
            _must_be_private(path, os.fstat(file.fileno()))
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise MalformedRequest(f"{path}: cannot be read ({error.strerror})") from error
    if len(text) > _MAX_FILE_BYTES:
        raise MalformedRequest(f"{path}: over {_MAX_FILE_BYTES:,} bytes is no file of keys")
    try:
        return _parsed(text)
    except (ValueError, TypeError, KeyError) as error:
        raise MalformedRequest(f"{path}: no file of keys ({_reason(error)})") from error


def _must_be_private(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise MalformedRequest(f"{path}: not a regular file")
    if facts.st_mode & _OTHERS_MAY:
        mode = stat.S_IMODE(facts.st_mode)
        raise MalformedRequest(f"{path}: others may use it (mode {mode:04o}): chmod 600, or 640")
    if facts.st_uid not in (0, os.geteuid()):
        raise MalformedRequest(f"{path}: it belongs to user {facts.st_uid}, neither to root nor to us")


def _parsed(text: bytes) -> tuple[ApiKey, ...]:
    document = json.loads(text)
    if not isinstance(document, dict) or set(document) != {"keys"} or not isinstance(document["keys"], list):
        raise ValueError('it is not {"keys": [...]}')
    keys = tuple(_key(entry) for entry in document["keys"])
    for kind, values in (("name", [key.name for key in keys]), ("hash", [key.sha256 for key in keys])):
        if len(set(values)) != len(values):
            raise ValueError(f"a {kind} stands there twice")
    return keys


def _key(entry: Any) -> ApiKey:
    if not isinstance(entry, dict) or not set(entry) <= _FIELDS:
        raise ValueError(f"an entry has other fields than {', '.join(sorted(_FIELDS))}")
    key = ApiKey(**entry)
    must_be_name(key.name)
    if not _DIGEST.fullmatch(key.sha256):  # TypeError if it is no text
        raise ValueError(f"{key.name}: sha256 is not 64 hexadecimal digits")
    must_be_limits(key.rate, key.burst)
    return key


def must_be_name(name: object) -> None:
    """Names go into logs and metrics, so they are plain; they begin with a letter, as no address does."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("a name is 1 to 64 letters, digits, '.', '_' or '-', a letter first")


def must_be_limits(rate: object, burst: object) -> None:
    """Raises ValueError unless both are numbers that can be kept: a bucket below one holds no photograph."""
    for name, value, least in (("rate", rate, 0.0), ("burst", burst, 1.0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is not a number")
        if value <= 0 or value < least:
            raise ValueError(f"{name} is {value:g}; it must be {'at least 1' if least else 'above 0'}")
    if burst is not None and rate is None:
        raise ValueError("a burst needs a rate")


def _reason(error: Exception) -> str:
    """Without what stands in the file: it may be anything, a key in plain text as well."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is not JSON"
    if isinstance(error, UnicodeDecodeError):
        return "not text"
    return str(error) if type(error) is ValueError else "an entry lacks a field"


def write_keys(path: Path, keys: Iterable[ApiKey]) -> None:
    """Replace the file in one step, for nobody else to read; an owner and a reading group are kept.

    The gateway may run as another user than whoever makes keys: were the owner not kept, it could not
    read them any more.
    """
    entries = [
        {name: value for name, value in vars(key).items() if value not in (None, "")} for key in keys
    ]
    text = json.dumps({"keys": entries}, indent=1) + "\n"
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            _as_before(path, file.fileno())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _as_before(path: Path, descriptor: int) -> None:
    try:
        before = path.stat()
    except FileNotFoundError:
        return
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(descriptor, before.st_uid, before.st_gid)
    os.chmod(descriptor, 0o600 | (before.st_mode & 0o040))


# --- in use --------------------------------------------------------------------------------------


class KeyFile:
    """The keys of a file that may change at any time; one that is broken leaves those that were.

    Raises MalformedRequest if the file cannot be used when it is first read: a gateway that should have
    doors does not start without.
    """

    def __init__(
        self, path: Path, look_s: float = 1.0, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._look_s, self._clock_s = path, look_s, clock_s
        self._seen = self._signature()
        self._keys = read_keys(path)
        self._looked_s = clock_s()
        if not self._keys:
            logger.warning("no API key is in the file: nobody is let in")

    def find(self, presented: bytes) -> ApiKey | None:
        """The key, as the file has it now, give or take `look_s`."""
        self._look()
        return find(self._keys, presented)

    def _look(self) -> None:
        if self._clock_s() - self._looked_s < self._look_s:
            return
        self._looked_s = self._clock_s()
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._keys = read_keys(self._path)
        except MalformedRequest as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("API keys read again: %s", ", ".join(key.name for key in self._keys) or "none")

    def _signature(self) -> tuple[int, ...] | None:
        try:
            facts = self._path.stat()
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_mode, facts.st_uid
