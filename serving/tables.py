"""The table of scores, one row a file: Parquet, CSV or JSON lines, by the name's ending.

Written beside and renamed: a table that can be seen is whole.
"""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from serving.errors import MalformedRequest

Row = dict[str, Any]

COLUMNS: Final = (
    "path",  # as the source names it
    "reason",  # null, or why there is no answer
    "detail",
    "index",  # the first label's
    "wnid",
    "label",
    "probability",
    "top_labels",  # the first --top, likeliest first
    "top_probabilities",
    "crops",
    "model",
    "version",
)
_ROWS_A_GROUP: Final = 8192


class Table(ABC):
    """Rows go into a file that nobody sees yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Rows with COLUMNS as their keys."""

    @abstractmethod
    def close(self) -> None:
        """What was written is on its way to the disk."""


class JsonLines(Table):
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path.open("w", encoding="utf-8")

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class Csv(Table):
    """Lists are JSON in their cell; what is null is empty."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._writer.writerow({column: _cell(value) for column, value in row.items()})

    def close(self) -> None:
        self._file.close()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


class Parquet(Table):
    """Through pyarrow, in row groups of a fixed size, so that the same rows are the same bytes."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        super().__init__(path)
        text, number = pyarrow.string(), pyarrow.float32()
        types = dict.fromkeys(COLUMNS, text) | {
            "index": pyarrow.int32(),
            "probability": number,
            "top_labels": pyarrow.list_(text),
            "top_probabilities": pyarrow.list_(number),
            "crops": pyarrow.int16(),
        }
        self._schema = pyarrow.schema(types)
        self._from_rows = pyarrow.Table.from_pylist
        self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self._rows += rows
        while len(self._rows) >= _ROWS_A_GROUP:
            self._flush()

    def close(self) -> None:
        while self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        group, self._rows = self._rows[:_ROWS_A_GROUP], self._rows[_ROWS_A_GROUP:]
        self._writer.write_table(self._from_rows(group, self._schema))


KINDS: Final[dict[str, type[Table]]] = {".parquet": Parquet, ".csv": Csv, ".jsonl": JsonLines}


def kind_of(path: Path) -> type[Table]:
    """By the name's ending; raises MalformedRequest with those there are."""
    if path.suffix not in KINDS:
        raise MalformedRequest(f"{path}: the table is one of {', '.join(KINDS)}, by its name's ending")
    return KINDS[path.suffix]


def write_table(path: Path, rows: Iterable[Sequence[Row]]) -> None:
    """All rows, then the name; raises OSError where the disk does not take them, and nothing is seen."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table = kind_of(path)(beside)
        try:
            for some in rows:
                table.write(some)
        finally:
            table.close()
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
