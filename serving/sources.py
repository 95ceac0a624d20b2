"""What is scored: a folder, a list of files, tar shards, or any URL that fsspec reads, in a stable order.

    photographs/            every file in it and below, hidden ones apart, sorted within each folder
    photographs.txt         one path or URL a line; relative ones are relative to the list
    shards/part-000.tar     its members (a folder's .tar files likewise), without labels beside them
    s3://bucket/folder      the same by URL: s3, gs, abfs, http, hf ... as far as their packages are installed
    'shards/part-*.tar'     a pattern

Listed lazily: memory holds the names of one folder at a time.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec

from serving.errors import MalformedRequest

_LABELS: Final = (".cls", ".json", ".txt")
"""What WebDataset keeps beside a sample's picture."""


@dataclass(frozen=True)
class Item:
    """One input file: its name in the table, and where its bytes are. `size` is a tar member's."""

    name: str
    location: str
    offset: int = 0
    size: int | None = None

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes; raises OSError where they cannot be read."""
        local = "://" not in self.location
        with Path(self.location).open("rb") if local else fsspec.open(self.location, "rb") as file:
            if self.size is not None:
                file.seek(self.offset)
                limit = min(limit, self.size)
            data: bytes = file.read(limit)
            return data


def list_items(source: str) -> Iterator[Item]:
    """The items in their order; raises MalformedRequest where the source is absent, empty or unreadable."""
    empty = True
    try:
        for item in _list(source):
            empty = False
            yield item
    except (OSError, ImportError, ValueError, tarfile.TarError) as error:
        raise MalformedRequest(f"{source}: cannot be listed: {_reason(error)}") from error
    if empty:
        raise MalformedRequest(f"{source}: there are no files in it")


def _list(source: str) -> Iterator[Item]:
    filesystem, path = fsspec.url_to_fs(source)
    if any(mark in source for mark in "*?[") and not filesystem.exists(path):
        for each in sorted(filesystem.glob(path)):
            yield from _file(filesystem, each, _base(each))
    elif filesystem.isdir(path):
        yield from _folder(filesystem, path)
    elif path.endswith(".txt"):
        yield from _lines(filesystem, path)
    elif filesystem.exists(path):
        yield from _file(filesystem, path, _base(path))
    else:
        raise FileNotFoundError("no such file or folder")


def _folder(filesystem: Any, root: str) -> Iterator[Item]:
    for folder, folders, files in filesystem.walk(root, on_error="raise"):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = f"{folder}/{name}"
            if not name.startswith("."):
                yield from _file(filesystem, path, path[len(root) :].lstrip("/"))


def _file(filesystem: Any, path: str, name: str) -> Iterator[Item]:
    if path.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{name} is compressed, so its members cannot be read one by one; unpack it to .tar")
    location = _location(filesystem, path)
    if not path.endswith(".tar"):
        yield Item(name, location)
        return
    with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if member.isfile() and not member.name.endswith(_LABELS):
                yield Item(f"{name}/{member.name}", location, member.offset_data, member.size)
            archive.members = []  # type: ignore[attr-defined]  # else it remembers every one


def _lines(filesystem: Any, path: str) -> Iterator[Item]:
    beside = Path(path).parent
    local = "file" in _protocols(filesystem)
    with filesystem.open(path, "r", encoding="utf-8") as lines:
        for line in lines:
            name = line.strip()
            if name and ("://" in name or not local):
                yield Item(name, name)
            elif name:
                yield Item(name, str(beside / name))


def _location(filesystem: Any, path: str) -> str:
    return path if "file" in _protocols(filesystem) else str(filesystem.unstrip_protocol(path))


def _protocols(filesystem: Any) -> tuple[str, ...]:
    given = filesystem.protocol
    return (given,) if isinstance(given, str) else tuple(given)


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
