"""Labelled images as they lie somewhere: a folder, or shards; a local path, or any URL that fsspec reads.

    ROOT/train/<class>/*              ROOT/val/<class>/*
    ROOT/train/index.json, *.tar      ROOT/val/index.json, *.tar     as `alexnet prepare` writes them
"""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

import fsspec
import numpy as np
import numpy.typing as npt

from serving.postprocess import Label

Integers = npt.NDArray[np.int64]

IMAGENET_CLASSES: Final = Path(__file__).with_name("imagenet1k.csv")
SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
INDEX_FILE: Final = "index.json"
INDEX_FORMAT: Final = "alexnet-shards-1"
_TAR_BLOCK: Final = 512
"""Bytes of the header before each file in a tar, which starts with the file's name in 100."""


class DataError(Exception):
    """The images cannot be trained on; the text names the folder and what it lacks."""


class Images(Protocol):
    """One split: encoded images by number, and the class of each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """WordNet ids, or the names of folders."""

    @property
    def targets(self) -> Sequence[int] | Integers:
        """For each image its place in `classes`."""

    def __len__(self) -> int: ...

    def encoded(self, rows: Integers) -> list[bytes]:
        """The files' bytes; DataError names one that cannot be read."""

    def name(self, row: int) -> str:
        """Where the image lies."""

    def only(self, rows: Integers) -> Self:
        """Some of the images, in this order."""


def open_split(root: str | Path, split: str, classes: Sequence[str] | None = None) -> Images:
    """`root`/`split`, or with an empty `split` `root` itself; with `classes`, in their order."""
    place = _join(root, split) if split else root
    fs, path = _filesystem(place)
    if fs.exists(posixpath.join(path, INDEX_FILE)):
        return Shards.open(place, classes)
    return ImageFolder.scan(place, classes)


def has_split(root: str | Path, split: str) -> bool:
    """Whether there is such a folder in `root`."""
    fs, path = _filesystem(_join(root, split))
    return bool(fs.isdir(path))


def labels_of(classes: Sequence[str]) -> list[Label]:
    """Folder names -> labels; WordNet ids of ILSVRC 2012 get their English name."""
    with IMAGENET_CLASSES.open(newline="", encoding="utf-8") as file:
        names = {row["wnid"]: row["name"] for row in csv.DictReader(file)}
    return [Label(name, names.get(name, name)) for name in classes]


@dataclass(frozen=True)
class ImageFolder:
    """The classes in the order of their folder names, and every image with its class."""

    classes: tuple[str, ...]
    paths: tuple[Any, ...]
    """Path of each local file; with `remote` its text within that."""
    targets: tuple[int, ...]
    remote: Any = None
    """The fsspec file system of a URL."""

    @classmethod
    def scan(cls, root: Path | str, classes: Sequence[str] | None = None) -> ImageFolder:
        """List `root`/<class>/*; with `classes`, in their order and refusing any other folder."""
        fs, path = _filesystem(root)
        if _is_url(root):
            return cls._checked(root, _listed_remotely(fs, path), classes, fs)
        return cls._checked(root, _listed(Path(root)), classes)

    @classmethod
    def _checked(
        cls,
        root: Path | str,
        found: dict[str, Callable[[], list[Any]]],
        classes: Sequence[str] | None,
        remote: Any = None,
    ) -> ImageFolder:
        if classes is None:
            classes = sorted(found)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise DataError(f"{root}: folders of no class of the model: {', '.join(unknown[:5])}")
        if not classes:
            raise DataError(f"{root}: no class folders in it; expected {root}/<class>/<images>")
        paths: list[Any] = []
        targets: list[int] = []
        for target, name in enumerate(classes):
            images = found[name]() if name in found else []
            if not images:
                raise DataError(f"{_join(root, name)}: no images in it")
            paths += images
            targets += [target] * len(images)
        return cls(tuple(classes), tuple(paths), tuple(targets), remote)

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, rows: Integers) -> list[bytes]:
        """The files' bytes, in this order."""
        paths = [self.paths[row] for row in rows]
        try:
            if self.remote is None:
                return [Path(path).read_bytes() for path in paths]
            found = self.remote.cat([str(path) for path in paths])  # several at once where that is quicker
        except OSError as error:
            raise DataError(f"{error.filename or paths[0]}: {error}") from error
        return [found] if isinstance(found, bytes) else [found[path] for path in paths]

    def name(self, row: int) -> str:
        """The file's path or URL."""
        path = self.paths[row]
        return str(path) if self.remote is None else str(self.remote.unstrip_protocol(path))

    def only(self, rows: Integers) -> ImageFolder:
        """Some of the images, in this order."""
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            targets=tuple(self.targets[row] for row in rows),
        )


@dataclass(frozen=True)
class Shards:
    """Images inside tar files; an index tells where each begins, so any can be read on its own.

    A shuffle of an epoch is then one of all images, the same for any number of processes.
    """

    classes: tuple[str, ...]
    targets: Integers
    files: tuple[str, ...]
    """Paths of the tars within `fs`."""
    file_of: Integers
    offsets: Integers
    sizes: Integers
    fs: Any

    @classmethod
    def open(cls, root: Path | str, classes: Sequence[str] | None = None) -> Shards:
        """Read the index of `root`; with `classes`, in their order."""
        fs, path = _filesystem(root)
        index = _read_index(fs, posixpath.join(path, INDEX_FILE))
        own = tuple(index["classes"])
        if classes is None:
            classes = own
        unknown = sorted(set(own) - set(classes))
        if unknown:
            raise DataError(f"{root}: images of no class of the model: {', '.join(unknown[:5])}")
        shards = index["shards"]
        place = np.array([list(classes).index(name) for name in own], np.int64)
        targets = place[np.concatenate([np.array(s["targets"], np.int64) for s in shards])]
        missing = set(range(len(classes))) - set(targets.tolist())
        if missing:
            raise DataError(f"{root}: no images of {', '.join(classes[row] for row in sorted(missing)[:5])}")
        for shard in shards:
            cls._check_size(fs, posixpath.join(path, shard["name"]), shard["bytes"])
        return cls(
            tuple(classes),
            targets,
            tuple(posixpath.join(path, shard["name"]) for shard in shards),
            np.repeat(np.arange(len(shards)), [shard["images"] for shard in shards]),
            np.concatenate([np.array(shard["offsets"], np.int64) for shard in shards]),
            np.concatenate([np.array(shard["sizes"], np.int64) for shard in shards]),
            fs,
        )

    @staticmethod
    def _check_size(fs: Any, file: str, size: int) -> None:
        try:
            actual = fs.size(file)
        except OSError as error:
            raise DataError(f"{file}: no such shard, though the index lists it") from error
        if actual not in (size, None):
            raise DataError(f"{file}: {actual} bytes, {size} by the index; prepare it again")

    def __len__(self) -> int:
        return len(self.targets)

    def encoded(self, rows: Integers) -> list[bytes]:
        """The images' bytes, in this order; many requests at once where the file system can."""
        files = [self.files[file] for file in self.file_of[rows]]
        starts = self.offsets[rows].tolist()
        ends = (self.offsets[rows] + self.sizes[rows]).tolist()
        try:
            found: list[bytes] = self.fs.cat_ranges(files, starts, ends, on_error="raise")
        except OSError as error:
            raise DataError(f"{files[0]}: {error}") from error
        return found

    def name(self, row: int) -> str:
        """The shard and the name in it, which stands in the tar's header before the image."""
        file, start = self.files[self.file_of[row]], int(self.offsets[row])
        header = self.fs.cat_file(file, start - _TAR_BLOCK, start)
        return f"{file}/{header[:100].rstrip(bytes(1)).decode(errors='replace')}"

    def only(self, rows: Integers) -> Shards:
        """Some of the images, in this order."""
        return replace(
            self,
            targets=self.targets[rows],
            file_of=self.file_of[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
        )


def _read_index(fs: Any, path: str) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(fs.cat_file(path))
        if index["format"] != INDEX_FORMAT or not index["shards"]:
            raise DataError(f"{path}: not an index of shards (format {index['format']!r})")
        lists = ("targets", "offsets", "sizes")
        if any(len(shard[name]) != shard["images"] for shard in index["shards"] for name in lists):
            raise DataError(f"{path}: its numbers contradict each other; prepare it again")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an index of shards: {error!r}") from error
    return index


def _listed(root: Path) -> dict[str, Callable[[], list[Path]]]:
    """The class folders of a local folder, each with what lists its images."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected {root}/<class>/<images>")

    def images(folder: Path) -> list[Path]:
        return sorted(path for path in folder.glob("*") if _is_image(path.name) and path.is_file())

    return {
        path.name: lambda path=path: images(path)  # type: ignore[misc]
        for path in root.iterdir()
        if path.is_dir() and not _hidden(path.name)
    }


def _listed_remotely(fs: Any, root: str) -> dict[str, Callable[[], list[str]]]:
    """The same at a URL, where one request may list everything."""
    try:
        files = sorted(fs.find(root))
    except OSError as error:
        raise DataError(f"{root}: cannot be listed: {error}") from error
    found: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file[len(root) :].strip("/").rpartition("/")
        if folder and "/" not in folder and _is_image(name) and not _hidden(folder):
            found.setdefault(folder, []).append(file)
    return {name: lambda paths=paths: paths for name, paths in found.items()}  # type: ignore[misc]


def _hidden(name: str) -> bool:
    """`.ipynb_checkpoints` is no class, and macOS's `._photo.jpg` no photograph."""
    return name.startswith(".")


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not _hidden(name)


def _is_url(root: Path | str) -> bool:
    return "://" in str(root)


def _join(root: Path | str, name: str) -> Path | str:
    return f"{str(root).rstrip('/')}/{name}" if _is_url(root) else Path(root) / name


def _filesystem(root: Path | str) -> tuple[Any, str]:
    """fsspec's file system and the path in it; DataError where the URL's kind needs a package."""
    try:
        fs, path = fsspec.core.url_to_fs(str(root))
    except (ImportError, ValueError) as error:
        raise DataError(f"{root}: {error}") from error
    return fs, path.rstrip("/")
