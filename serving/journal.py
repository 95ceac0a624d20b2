"""What a scoring run has done so far, so that one that was killed goes on where it stood.

    <out>.journal/job.json        what the run was asked to do; another may not go on with it
    <out>.journal/items.jsonl     every input, in order, listed once
    <out>.journal/rows.jsonl      append only: a checksum and a group of rows a line, in order

A line that was cut short, or damaged, ends what counts; it and what follows is done again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from serving.errors import MalformedRequest
from serving.sources import Item
from serving.tables import Row

_JOB, _ITEMS, _ROWS = "job.json", "items.jsonl", "rows.jsonl"


class Journal:
    """The journal of one table. Opened by one process at a time."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.journal")
        self._rows: Any = None
        self.groups = 0
        self.scored = 0
        self.total = 0

    @property
    def job(self) -> dict[str, Any] | None:
        """What the run that was begun was asked to do; None where there is none."""
        try:
            job: dict[str, Any] = json.loads((self.folder / _JOB).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return job

    def begin(self, job: dict[str, Any], items: Iterable[Item]) -> None:
        """List the inputs, or find the run that is to go on; raises MalformedRequest where it is another.

        The job is written last: without it nothing was begun.
        """
        begun = self.job
        if begun is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            try:
                _write(self.folder / _ITEMS, (json.dumps(asdict(item)) + "\n" for item in items))
                self._rows.truncate(0)
                _write(self.folder / _JOB, [json.dumps(job, indent=2) + "\n"])
            except BaseException:
                self.remove()
                raise
        elif differing := sorted(key for key in job if begun.get(key) != job[key]):
            told = "; ".join(f"{key}: {begun.get(key)} then, {job[key]} now" for key in differing)
            raise MalformedRequest(
                f"{self.folder} is of a run with other settings ({told}); repeat those, or begin anew "
                "with --restart"
            )
        else:
            self._lock()
        self._recover()
        with (self.folder / _ITEMS).open("rb") as lines:
            self.total = sum(1 for _ in lines)

    def items(self) -> Iterator[Item]:
        """Those not yet scored, in order."""
        with (self.folder / _ITEMS).open(encoding="utf-8") as lines:
            for line in islice(lines, self.scored, None):
                yield Item(**json.loads(line))

    def append(self, rows: list[Row]) -> None:
        """The next group's rows; they count once they are on the disk."""
        left = memoryview(_line(rows))
        while left:  # unbuffered: on a full disk a part is written, then the next write raises
            left = left[self._rows.write(left) :]
        os.fsync(self._rows.fileno())
        self.groups += 1
        self.scored += len(rows)

    def rows(self) -> Iterator[list[Row]]:
        """Every group's rows, in order."""
        with (self.folder / _ROWS).open("rb") as lines:
            for line in lines:
                rows = _parse(line)
                assert rows is not None, "checked when the journal was opened"
                yield rows

    def close(self) -> None:
        """Keep it for a run that goes on."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def discard(self) -> None:
        """Forget what was begun; raises MalformedRequest where another process is at it."""
        if self.folder.exists():
            self._lock()
            self.remove()

    def remove(self) -> None:
        """Its table is whole: out of sight in one step, then deleted."""
        self.close()
        gone = self.folder.with_name(f".{self.folder.name}.gone-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _lock(self) -> None:
        """Held until the file is closed, so also no longer than the process lives."""
        self._rows = (self.folder / _ROWS).open("ab", buffering=0)
        try:
            fcntl.flock(self._rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise MalformedRequest(f"{self.folder}: another process is writing it") from error

    def _recover(self) -> None:
        """Count what is whole, and cut off the rest."""
        end = 0
        with (self.folder / _ROWS).open("rb") as lines:
            for line in lines:
                rows = _parse(line)
                if rows is None:
                    break
                end += len(line)
                self.groups += 1
                self.scored += len(rows)
        self._rows.truncate(end)


def _line(rows: list[Row]) -> bytes:
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> list[Row] | None:
    checksum, _, text = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    rows: list[Row] = json.loads(text)
    return rows


def _write(path: Path, lines: Iterable[str]) -> None:
    beside = path.with_name(f".{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
