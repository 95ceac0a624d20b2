"""Shards: from ILSVRC's archives or a folder, whole or not there, the same images in training."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import savemat
from support import encoded, picture, run_alexnet

from model.archives import DEVKIT, TRAIN, VAL, Source
from model.data import Decoded, OnDemand
from model.images import DataError, ImageFolder, Shards, has_split, open_split
from model.prepare import Prepared, prepare, to_jpeg
from serving.errors import UndecodableImage
from serving.preprocess import decode_square, decode_whole

WNIDS = ("n01440764", "n02119789", "n03888257")
NUMBERS = {"n02119789": 1, "n03888257": 2, "n01440764": 3}
"""ILSVRC's own numbers are not in the order of the WordNet ids."""


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def devkit(truth: list[int]) -> bytes:
    """The development kit's two files, meta.mat with a synset that is no class."""
    names = ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")
    synsets = np.zeros((4, 1), [(name, "O") for name in names])
    rows: list[tuple[object, ...]] = [(number, wnid, "a, b", 0, []) for wnid, number in NUMBERS.items()]
    rows.append((4, "n00001740", "x", 2, [1, 2]))
    for index, row in enumerate(rows):
        synsets[index, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets}, do_compression=True)
    lines = "".join(f"{number}\n" for number in truth).encode()
    kit = "ILSVRC2012_devkit_t12"
    return tar_of(
        {
            f"{kit}/readme.txt": b"", f"{kit}/data/meta.mat": meta.getvalue(),
            f"{kit}/data/ILSVRC2012_validation_ground_truth.txt": lines,
        },
        "w:gz",
    )  # fmt: skip


def train_files(per_class: int = 5) -> dict[str, dict[str, bytes]]:
    """wnid -> its images, among them a CMYK JPEG, a PNG named JPEG, one misplaced and one broken."""
    files: dict[str, dict[str, bytes]] = {wnid: {} for wnid in WNIDS}
    for place, wnid in enumerate(WNIDS):
        for number in range(per_class):
            photo = picture(100 * place + number, 300 + 7 * number, 280 + 5 * number, noise=5)
            files[wnid][f"{wnid}_{number}.JPEG"] = encoded(photo)
    first, second, third = WNIDS
    files[first][f"{first}_0.JPEG"] = encoded(picture(50, noise=5).convert("CMYK"))
    files[first][f"{first}_1.JPEG"] = encoded(picture(51, noise=5), "PNG")
    files[second][f"{third}_9.JPEG"] = encoded(picture(52, noise=5))
    files[third][f"{third}_3.JPEG"] = encoded(picture(53))[:700]
    files[third][f"{third}_4.JPEG"] = files[second][f"{second}_2.JPEG"]
    return files


@pytest.fixture(scope="module")
def ilsvrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ilsvrc")
    files = train_files()
    (root / TRAIN).write_bytes(tar_of({f"{wnid}.tar": tar_of(images) for wnid, images in files.items()}))
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": encoded(picture(200 + number)) for number in (2, 3, 1, 4)}
    val["ILSVRC2012_val_00000004.JPEG"] = files[WNIDS[0]][f"{WNIDS[0]}_2.JPEG"]
    (root / VAL).write_bytes(tar_of(val))
    (root / DEVKIT).write_bytes(devkit([1, 2, 3, 3]))
    return root


def make(root: Path, destination: Path, processes: int = 1) -> Prepared:
    return prepare(Source.scan(root), destination, processes=processes, shard_images=6)


@pytest.fixture(scope="module")
def shards(ilsvrc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archives prepared by two processes."""
    destination = tmp_path_factory.mktemp("shards")
    prepared = make(ilsvrc, destination, processes=2)
    assert prepared.images == {"train": 15, "val": 4}
    return destination


def test_the_archives_are_read_where_they_lie(ilsvrc: Path) -> None:
    source = Source.scan(ilsvrc)
    assert source.classes == WNIDS
    files = train_files()
    read = {entry.name: (entry.read(), WNIDS[entry.target]) for entry in source.splits["train"]}
    assert read == {
        f"{wnid}.tar/{name}": (data, wnid) for wnid, images in files.items() for name, data in images.items()
    }
    truth = {entry.name[-6]: WNIDS[entry.target] for entry in source.splits["val"]}
    assert truth == {"1": "n02119789", "2": "n03888257", "3": "n01440764", "4": "n01440764"}


def test_every_odd_file_is_listed_with_what_is_odd(shards: Path) -> None:
    problems = json.loads((shards / "problems.json").read_text())
    found = {(p["kind"], p["split"], p["file"].rpartition("/")[2], p["left_out"]) for p in problems}
    twins = (f"{WNIDS[1]}_2.JPEG", f"{WNIDS[2]}_4.JPEG")
    same = {("mislabelled", "train", name, False) for name in twins}
    assert found - same == {
        ("cmyk", "train", f"{WNIDS[0]}_0.JPEG", False),
        ("misnamed", "train", f"{WNIDS[0]}_1.JPEG", False),
        ("mislabelled", "train", f"{WNIDS[2]}_9.JPEG", False),
        ("unreadable", "train", f"{WNIDS[2]}_3.JPEG", True),
        ("leaked", "val", "ILSVRC2012_val_00000004.JPEG", False),
    }
    assert len(found & same) == 1, "one of the two that have the same bytes"


def test_shards_hold_the_pixels_of_their_sources_at_shorter_side_256(ilsvrc: Path, shards: Path) -> None:
    files = {Path(name).stem: data for images in train_files().values() for name, data in images.items()}
    split = Shards.open(shards / "train")
    assert split.classes == WNIDS
    for row, data in enumerate(split.encoded(np.arange(len(split)))):
        stem = split.name(row).rpartition("/")[2].split("_", 1)[1].removesuffix(".jpg")
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", 256)
            assert max(image.size) % 2 == 0
        difference = decode_square(data).astype(int) - decode_square(files[stem])
        assert np.abs(difference).mean() < 3, stem


def test_the_index_tells_counts_and_digests_and_webdataset_reads_the_shards(shards: Path) -> None:
    index = json.loads((shards / "train" / "index.json").read_text())
    assert [shard["images"] for shard in index["shards"]] == [len(s["targets"]) for s in index["shards"]]
    assert sum(shard["images"] for shard in index["shards"]) == index["images"] == 15
    for shard in index["shards"]:
        data = (shards / "train" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    urls = [str(shards / "train" / shard["name"]) for shard in index["shards"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own, about its defaults
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    split = Shards.open(shards / "train")
    assert [int(sample["cls"]) for sample in samples] == split.targets.tolist()
    assert [sample["jpg"] for sample in samples] == split.encoded(np.arange(15))


def test_a_stopped_run_goes_on_and_leaves_the_same_bytes(ilsvrc: Path, shards: Path, tmp_path: Path) -> None:
    """Stopped after its first shard, between a tar and its record, in the midst of a tar."""

    class Stopped(Exception):
        pass

    def stop(_: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        prepare(Source.scan(ilsvrc), tmp_path, processes=1, shard_images=6, advance=stop)
    (first,) = (tmp_path / "train").glob("*.json")
    before = first.stat().st_mtime_ns
    (tmp_path / "train" / "train-000001.tar").write_bytes(b"half")
    (tmp_path / "train" / ".train-000002.tar.tmp").write_bytes(b"half")
    begun: list[tuple[int, int]] = []
    prepare(
        Source.scan(ilsvrc), tmp_path, processes=1, shard_images=6,
        begin=lambda total, done: begun.append((total, done)),
    )  # fmt: skip
    assert begun == [(20, 6)]
    assert first.stat().st_mtime_ns == before
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()} == {
        p.relative_to(shards): p.read_bytes() for p in shards.rglob("*.*") if p.is_file()
    }


def test_another_source_or_other_settings_are_not_mixed_in(ilsvrc: Path, shards: Path) -> None:
    for shard_images, quality in ((5, 90), (6, 80)):
        with pytest.raises(DataError, match="shards of other images or settings; choose another folder"):
            prepare(
                Source.scan(ilsvrc), shards, processes=1, shard_images=shard_images, quality=quality
            )


def test_a_small_jpeg_keeps_its_bytes_and_other_images_are_encoded_upright() -> None:
    small, large = encoded(picture(1, 224, 224)), encoded(picture(2, 700, 500))
    assert to_jpeg(small, "a.jpg", 90) == (small, [])
    shrunk, found = to_jpeg(large, "a.JPEG", 90)
    assert found == []
    with Image.open(io.BytesIO(shrunk)) as image:
        assert image.size == (358, 256)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, _ = to_jpeg(encoded(picture(3, 240, 200), exif=exif), "a.jpg", 95)
    with Image.open(io.BytesIO(turned)) as image:
        assert image.size == (256, 308)
        assert 0x0112 not in image.getexif()
    with pytest.raises(UndecodableImage):
        to_jpeg(small[:900], "a.jpg", 90)


def test_a_whole_picture_s_centre_is_the_square_that_is_served() -> None:
    for size in ((300, 300), (640, 480), (333, 517)):
        data = encoded(picture(5, *size), "PNG")
        whole, square = decode_whole(data), decode_square(data)
        top, left = (edge // 2 - 128 for edge in whole.shape[:2])
        centre = whole[top : top + 256, left : left + 256].astype(int)
        assert min(whole.shape[:2]) == 256
        assert np.abs(centre - square).mean() < 6, size


# --- read again ------------------------------------------------------------------------------------


def test_shards_read_the_same_by_a_url(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in (shards / "train").iterdir():
        memory.pipe_file(f"/prepared/train/{path.name}", path.read_bytes())
    assert has_split("memory://prepared", "train")
    assert not has_split("memory://prepared", "val")
    remote, local = open_split("memory://prepared", "train"), open_split(shards, "train")
    rows = np.array([7, 0, 14, 7])
    assert remote.encoded(rows) == local.encoded(rows)
    assert remote.only(rows).encoded(np.array([1])) == local.encoded(np.array([0]))
    assert remote.name(3).rpartition("/")[2] == local.name(3).rpartition("/")[2]


def test_a_folder_reads_the_same_by_a_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a", ".hidden"):
        for number in range(2):
            data = encoded(picture(number, 60, 60))
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.jpg").write_bytes(data)
            memory.pipe_file(f"/folder/{name}/{number}.jpg", data)
    memory.pipe_file("/folder/a/._x.jpg", b"")
    memory.pipe_file("/folder/readme.txt", b"")
    local, remote = ImageFolder.scan(tmp_path), ImageFolder.scan("memory://folder")
    assert (remote.classes, remote.targets) == (local.classes, local.targets) == (("a", "b"), (0, 0, 1, 1))
    rows = np.array([3, 1])
    assert remote.encoded(rows) == local.encoded(rows)
    assert remote.name(3) == "memory:///folder/b/1.jpg"
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder.scan("memory://nowhere")
    with pytest.raises(DataError, match="gone"):
        open_split("gone://x", "train")


def test_images_on_demand_are_those_in_memory(shards: Path) -> None:
    images = open_split(shards, "train")
    kept = Decoded.read(images, 2)
    read = Decoded.read(images, 2, memory_bytes=15 * 256 * 256 * 3 - 1)
    assert kept.in_memory and not read.in_memory
    assert isinstance(read.squares, OnDemand)
    for key in (3, slice(2, 7), slice(12, 99), np.array([4, 4, 0])):
        np.testing.assert_array_equal(read.squares[key], kept.squares[key])
    np.testing.assert_array_equal(np.stack(list(read.squares)), kept.squares)


def test_classes_of_a_model_give_their_order_and_refuse_others(shards: Path) -> None:
    own, turned = Shards.open(shards / "train"), Shards.open(shards / "train", WNIDS[::-1])
    assert (2 - turned.targets).tolist() == own.targets.tolist()
    with pytest.raises(DataError, match="no class of the model: n01440764"):
        Shards.open(shards / "train", WNIDS[1:])
    with pytest.raises(DataError, match="no images of n09999999"):
        Shards.open(shards / "train", (*WNIDS, "n09999999"))


def test_a_cut_or_missing_shard_and_a_foreign_index_are_named(shards: Path, tmp_path: Path) -> None:
    for path in (shards / "train").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "train-000001.tar").read_bytes()
    (tmp_path / "train-000001.tar").write_bytes(whole[:-512])
    with pytest.raises(DataError, match=r"train-000001\.tar: \d+ bytes, \d+ by the index"):
        Shards.open(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: no such shard"):
        Shards.open(tmp_path)
    for text in ("", "[]", '{"format": "other", "shards": [1]}', '{"format": "alexnet-shards-1"}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index\.json: not an index of shards"):
            Shards.open(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / VAL).unlink(), f"{VAL}: missing"),
        (lambda root: (root / DEVKIT).write_bytes(devkit([1, 2])), "not among the ground truth's 2 images"),
        (lambda root: (root / DEVKIT).write_bytes(devkit([1, 2, 3, 1, 1])), "4 images, the ground truth 5"),
        (lambda root: (root / DEVKIT).write_bytes(b"junk"), "not ILSVRC 2012's development kit"),
        (lambda root: (root / TRAIN).write_bytes(tar_of({"n01440764.tar": tar_of({})})), "only in one of"),
        (lambda root: (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:70_000]), "not a whole tar"),
    ],
)
def test_archives_that_do_not_fit_together_are_told(
    ilsvrc: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    for path in ilsvrc.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    with pytest.raises(DataError, match=words):
        Source.scan(tmp_path)


def test_the_command_prepares_a_folder_and_tells_its_problems(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                data = encoded(picture(hash((split, name, number)) % 1000, 90, 80))
                (tmp_path / split / name / f"{number}.jpg").write_bytes(data)
    (tmp_path / "train" / "cats" / "9.jpg").write_text("no picture")
    done = run_alexnet("prepare", tmp_path, "--out", tmp_path / "shards", "--processes", "1")
    assert done.returncode == 0, done.stderr
    assert "train: 6 images" in done.stdout
    assert "unreadable: 1 (listed in" in done.stdout
    assert open_split(tmp_path / "shards", "val").classes == ("cats", "dogs")
