"""Log lines, for people as text or for machines as JSON; a record's `fields` are told one by one in both."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from typing import Any, Final, Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]
HEAD: Final = "%(asctime)s %(levelname)s %(message)s"
_PLAIN: Final = re.compile(r"[\w.:/+-]+", re.ASCII)


def configure(format_: Format, level: Level) -> None:
    """Everything that this process logs goes to the error stream; ours from `level`, others' warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if format_ == "json" else TextLines(HEAD))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("alexnet").setLevel(level.upper())


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """What was logged with `extra={"fields": {...}}`."""
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the fields, and the trace of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """ASCII without a line break, whatever the record says."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """The usual line, and the fields behind it as `name=value`; what could deceive a reader is quoted."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        pairs = (f"{name}={_told(value)}" for name, value in _flat(fields_of(record)))
        return " ".join((super().formatMessage(record), *pairs))


def _flat(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`{"ms": {"read": 1}}` -> `ms.read`."""
    pairs: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            pairs += [(f"{name}.{key}", one) for key, one in _flat(value)]
        else:
            pairs.append((name, value))
    return pairs


def _told(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    said = value if isinstance(value, str) else json.dumps(value, default=str)
    return said if _PLAIN.fullmatch(said) else json.dumps(said)
