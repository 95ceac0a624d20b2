"""Shards out of images: tars of JPEGs with the shorter side 256, and an index of where each begins.

    OUT/train/train-000000.tar   WebDataset: <key>.jpg and <key>.cls, a thousand images, shuffled
    OUT/train/train-000000.json  where each image lies in it, and what was wrong with those it lacks
    OUT/train/index.json         all shards of the split: what training reads
    OUT/problems.json            every file that is unreadable, CMYK, misnamed, mislabelled or leaked

A shard is written beside and renamed, its .json after it: one that has both is whole, so a run that
was stopped goes on with the first that has not. The same source gives the same bytes.

An RGB JPEG whose shorter side is at most 256 keeps its own bytes; the others are encoded anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import webdataset
from PIL import Image

from model.archives import Entry, Source
from model.checkpoint import replace_durably, sha256
from model.images import INDEX_FILE, INDEX_FORMAT, DataError
from serving.contract import RESIZE_SIZE
from serving.errors import RequestError
from serving.preprocess import decode_whole

PROBLEMS_FILE: Final = "problems.json"
PLAN_FILE: Final = "plan.json"
JPEG_QUALITY: Final = 90
SHARD_IMAGES: Final = 1000
_UPRIGHT: Final = (None, 1)
_ORIENTATION_TAG: Final = 0x0112
_SUFFIXES: Final = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "GIF": (".gif",),
                    "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "AVIF": (".avif",)}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something about one file that its owner wants to know; `left_out` where no shard has it."""

    split: str
    file: str
    kind: str
    """unreadable, cmyk, misnamed, mislabelled or leaked."""
    detail: str
    left_out: bool = False


@dataclass(frozen=True)
class Prepared:
    """What lies in the destination now."""

    images: dict[str, int]
    problems: list[Problem]


def prepare(
    source: Source,
    destination: Path,
    *,
    processes: int,
    shard_images: int = SHARD_IMAGES,
    quality: int = JPEG_QUALITY,
    begin: Callable[[int, int], None] = lambda total, done: None,
    advance: Callable[[int], None] = lambda images: None,
) -> Prepared:
    """Write the shards that are not there yet, then the indexes and the list of problems.

    `begin` is told how many images there are and how many were done before, `advance` of each
    shard's. Raises DataError where the destination holds shards of something else, or is full.
    """
    try:
        _agree_on_plan(source, destination, shard_images, quality)
        jobs = {split: _shards_of(entries, split, shard_images) for split, entries in source.splits.items()}
        missing = [
            partial(write_shard, destination / split, name, entries, source.classes, quality)
            for split, shards in jobs.items()
            for name, entries in shards.items()
            if not _record(destination / split, name).exists()
        ]
        total = sum(map(len, source.splits.values()))
        begin(total, total - sum(len(job.args[2]) for job in missing))
        _run(missing, processes, advance)
        return _finish(source, destination, {split: list(shards) for split, shards in jobs.items()}, quality)
    except OSError as error:
        raise DataError(f"{destination} cannot be written ({error}); run it again to go on") from error


def _agree_on_plan(source: Source, destination: Path, shard_images: int, quality: int) -> None:
    """What is prepared here, as one digest: another source or other settings do not go on with it."""
    digest = hashlib.sha256(f"{INDEX_FORMAT} {RESIZE_SIZE} {shard_images} {quality}".encode())
    for split, entries in source.splits.items():
        digest.update(json.dumps([split, *source.classes]).encode())
        for entry in entries:
            digest.update(f"{entry.name}\0{entry.target}\0{entry.offset}\0{entry.size}\n".encode())
    plan = {"digest": digest.hexdigest(), "quality": quality, "shard_images": shard_images}
    path = destination / PLAN_FILE
    if path.exists() and path.read_text() != json.dumps(plan):
        raise DataError(f"{destination} holds shards of other images or settings; choose another folder")
    if not path.exists():
        destination.mkdir(parents=True, exist_ok=True)
        _write(path, plan)


def _shards_of(entries: Sequence[Entry], split: str, shard_images: int) -> dict[str, list[Entry]]:
    """The images in an order of chance, the same each time, a thousand a shard."""
    order = np.random.default_rng(2012).permutation(len(entries))
    parts = [order[start : start + shard_images] for start in range(0, len(order), shard_images)]
    return {f"{split}-{number:06d}": [entries[row] for row in part] for number, part in enumerate(parts)}


def _run(jobs: Sequence[Callable[[], int]], processes: int, advance: Callable[[int], None]) -> None:
    if processes <= 1:
        for job in jobs:
            advance(job())
        return
    # Fresh interpreters: a fork of a process with torch's threads can hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for done in as_completed(running):
                advance(done.result())
        except BrokenProcessPool as error:
            raise DataError("a process died, perhaps for want of memory; run it again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)


def write_shard(
    folder: Path, name: str, entries: Sequence[Entry], classes: Sequence[str], quality: int
) -> int:
    """One tar and its record; how many images were looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    beside, tar = folder / f".{name}.tar.tmp", folder / f"{name}.tar"
    problems: list[Problem] = []
    targets: list[int] = []
    digests: list[str] = []
    with beside.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number, entry in enumerate(entries):
            data = entry.read()
            problems += _misplaced(folder.name, entry, classes)
            try:
                jpeg, found = to_jpeg(data, entry.name, quality)
            except RequestError as error:
                problems.append(Problem(folder.name, entry.name, "unreadable", str(error), left_out=True))
                continue
            problems += [Problem(folder.name, entry.name, kind, detail) for kind, detail in found]
            key = f"{name.rpartition('-')[2]}{number:04d}_{_plain(Path(entry.name).stem)}"
            writer.write({"__key__": key, "jpg": jpeg, "cls": str(entry.target).encode()})
            targets.append(entry.target)
            digests.append(hashlib.sha256(data).hexdigest()[:24] + f" {entry.name}")
    if not targets:
        raise DataError(f"{folder / name}: none of its {len(entries)} images can be read")
    with tarfile.open(beside) as written:
        members = [member for member in written if member.name.endswith(".jpg")]
    record = {
        "name": tar.name,
        "images": len(targets),
        "bytes": beside.stat().st_size,
        "sha256": sha256(beside),
        "targets": targets,
        "offsets": [member.offset_data for member in members],
        "sizes": [member.size for member in members],
        "problems": [asdict(problem) for problem in problems],
        "files": digests,
    }
    replace_durably(beside, tar)
    _write(_record(folder, name), record)
    return len(entries)


def to_jpeg(data: bytes, name: str, quality: int) -> tuple[bytes, list[tuple[str, str]]]:
    """An encoded image as a JPEG of shorter side 256 or less, and what was odd about it.

    Raises RequestError where it cannot be decoded.
    """
    pixels = decode_whole(data)  # every pixel, whether its bytes are kept or not
    with Image.open(io.BytesIO(data)) as image:
        found = []
        if image.mode == "CMYK":
            found.append(("cmyk", "converted to RGB"))
        kind = image.format or ""
        if Path(name).suffix.lower() not in _SUFFIXES.get(kind, ()):
            found.append(("misnamed", f"a {kind} by its bytes"))
        upright = image.getexif().get(_ORIENTATION_TAG) in _UPRIGHT
        if (kind, image.mode) == ("JPEG", "RGB") and upright and min(image.size) <= RESIZE_SIZE:
            return data, found
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue(), found


def _misplaced(split: str, entry: Entry, classes: Sequence[str]) -> list[Problem]:
    told, lies_in = entry.wnid, classes[entry.target]
    if told is None or told == lies_in or told not in classes:
        return []
    return [Problem(split, entry.name, "mislabelled", f"named as of {told}, but lies in {lies_in}")]


def _finish(source: Source, destination: Path, shards: dict[str, list[str]], quality: int) -> Prepared:
    """The indexes of the splits, and the problems of all files together."""
    problems: list[Problem] = []
    seen: dict[str, tuple[str, str, int]] = {}
    images = {}
    for split, names in shards.items():
        folder = destination / split
        records = [json.loads(_record(folder, name).read_text()) for name in names]
        for record in records:
            problems += [Problem(**problem) for problem in record.pop("problems")]
            problems += _seen_before(seen, split, record.pop("files"), record["targets"], source.classes)
        images[split] = sum(record["images"] for record in records)
        index = {
            "format": INDEX_FORMAT,
            "classes": source.classes,
            "images": images[split],
            "shorter_side": RESIZE_SIZE,
            "jpeg_quality": quality,
            "shards": records,
        }
        _write(folder / INDEX_FILE, index)
    problems.sort(key=lambda problem: (problem.kind, problem.split, problem.file))
    _write(destination / PROBLEMS_FILE, [asdict(problem) for problem in problems], indent=1)
    return Prepared(images, problems)


def _seen_before(
    seen: dict[str, tuple[str, str, int]],
    split: str,
    files: Sequence[str],
    targets: Sequence[int],
    classes: Sequence[str],
) -> Iterator[Problem]:
    """The same bytes under two classes, or in two splits."""
    for file, target in zip(files, targets, strict=True):
        digest, _, name = file.partition(" ")
        other_split, other, other_target = seen.setdefault(digest, (split, name, target))
        if other_target != target:
            yield Problem(split, name, "mislabelled", f"the same bytes as {other} of {classes[other_target]}")
        if other_split != split:
            yield Problem(split, name, "leaked", f"the same bytes as {other} of {other_split}")


def _plain(stem: str) -> str:
    """What WebDataset takes for a key: it cuts at the first dot; tar's own limit is 100 bytes."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]


def _record(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _write(path: Path, value: Any, indent: int | None = None) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=indent))
    replace_durably(beside, path)
