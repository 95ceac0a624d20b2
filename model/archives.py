"""Where images lie before they are prepared: a class folder, or ILSVRC 2012's archives as published.

    ILSVRC2012_img_train.tar          1000 tars <wnid>.tar of <wnid>_<number>.JPEG
    ILSVRC2012_img_val.tar            ILSVRC2012_val_<8 digits>.JPEG
    ILSVRC2012_devkit_t12.tar.gz      data/meta.mat: the number of each class;
                                      data/ILSVRC2012_validation_ground_truth.txt: a number an image

The archives are not unpacked: a tar inside a tar is a range of bytes of a file.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from model.images import DataError, ImageFolder

TRAIN: Final = "ILSVRC2012_img_train.tar"
VAL: Final = "ILSVRC2012_img_val.tar"
DEVKIT: Final = "ILSVRC2012_devkit_t12.tar.gz"
_WNID: Final = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Entry:
    """One encoded image: `size` bytes of `file` from `offset` on, and its class."""

    name: str
    target: int
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes."""
        with Path(self.file).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    @property
    def wnid(self) -> str | None:
        """The class that the file's own name tells, as ILSVRC's training images do."""
        match = _WNID.match(Path(self.name).name)
        return match[0] if match else None


@dataclass(frozen=True)
class Source:
    """The splits of what is to be prepared: classes in their order, and every image."""

    classes: tuple[str, ...]
    splits: dict[str, list[Entry]]

    @classmethod
    def scan(cls, root: Path) -> Source:
        """ILSVRC's archives where `root` holds them, else its folders train/ and val/."""
        if (root / TRAIN).exists() or (root / VAL).exists():
            return _archives(root)
        return _folder(root)


def _folder(root: Path) -> Source:
    train = ImageFolder.scan(root / "train")
    folders = {"train": train}
    if (root / "val").is_dir():
        folders["val"] = ImageFolder.scan(root / "val", train.classes)
    splits = {
        split: [
            Entry(str(path.relative_to(root)), target, str(path), 0, path.stat().st_size)
            for path, target in zip(folder.paths, folder.targets, strict=True)
        ]
        for split, folder in folders.items()
    }
    return Source(train.classes, splits)


def _archives(root: Path) -> Source:
    for name in (TRAIN, VAL, DEVKIT):
        if not (root / name).is_file():
            raise DataError(f"{root / name}: missing; ILSVRC 2012 takes {TRAIN}, {VAL} and {DEVKIT}")
    numbers, truth = _devkit(root / DEVKIT)
    with (root / TRAIN).open("rb") as file:
        train, classes = _train(root / TRAIN, file)
    unknown = set(numbers.values()) ^ set(classes)
    if unknown:
        raise DataError(
            f"{root / TRAIN} holds {len(classes)} classes and {DEVKIT} {len(numbers)}; "
            f"only in one of them: {', '.join(sorted(unknown)[:5])}"
        )
    place = {wnid: target for target, wnid in enumerate(classes)}
    val = list(_val(root / VAL, [place[numbers[number]] for number in truth]))
    if len(val) != len(truth):
        raise DataError(f"{root / VAL} holds {len(val)} images, the ground truth {len(truth)}")
    return Source(classes, {"train": train, "val": val})


def _train(path: Path, file: IO[bytes]) -> tuple[list[Entry], tuple[str, ...]]:
    """Every image of every class's tar, the classes in the order of their WordNet ids."""
    inner = sorted(_members(path, file), key=lambda member: member.name)
    classes = tuple(Path(member.name).stem for member in inner)
    if not classes or not all(_WNID.fullmatch(name) for name in classes):
        raise DataError(f"{path}: expected a tar a class, named by its WordNet id; found {classes[:3]}")
    entries = []
    for target, member in enumerate(inner):
        window = _Window(file, member.offset_data, member.size)
        for image in _members(f"{path}/{member.name}", window):
            offset = member.offset_data + image.offset_data
            entries.append(Entry(f"{member.name}/{image.name}", target, str(path), offset, image.size))
    return entries, classes


def _val(path: Path, truth: list[int]) -> Iterator[Entry]:
    with path.open("rb") as file:
        for member in _members(path, file):
            match = re.search(r"_(\d{8})\.", member.name)
            number = int(match[1]) if match else 0
            if not 1 <= number <= len(truth):
                raise DataError(f"{path}: {member.name} is not among the ground truth's {len(truth)} images")
            yield Entry(member.name, truth[number - 1], str(path), member.offset_data, member.size)


def _members(path: Path | str, file: Any) -> list[tarfile.TarInfo]:
    """The files of an uncompressed tar, by reading its headers only."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return [member for member in archive if member.isfile()]
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a whole tar: {error}; download it again") from error


def _devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """ILSVRC's number of each of the classes -> its WordNet id; the numbers of the validation images."""
    try:
        with tarfile.open(path) as archive:
            files = {
                Path(member.name).name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.isfile() and Path(member.name).parent.name == "data"
            }
        truth = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
        return _numbers(files["meta.mat"]), truth
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not ILSVRC 2012's development kit: {error!r}") from error


def _numbers(meta: bytes) -> dict[int, str]:
    """meta.mat: a table of synsets, of which those without children are the classes."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            "the development kit's meta.mat is MATLAB's: pip install 'alexnet-serving[ilsvrc]'"
        ) from error
    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {
        int(synset["ILSVRC2012_ID"]): str(synset["WNID"])
        for synset in synsets
        if int(synset["num_children"]) == 0
    }


class _Window(io.RawIOBase):
    """A range of a file as a file of its own, which `tarfile` can seek in."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        part = self._file.read(size)
        self._at += len(part)
        return part
