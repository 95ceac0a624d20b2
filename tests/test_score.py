"""Batch scoring: one row a file whatever happens, and a killed run ends as an undisturbed one."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_triton import FakeTriton, fake_triton, full_queue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from support import ALEXNET, LABELS, QUIET, ROOT, FakeBackend, encoded, picture, run_alexnet

from serving.contract import MAX_BATCH, Crops
from serving.errors import EngineFailed, MalformedRequest, ModelNotReady
from serving.journal import Journal
from serving.postprocess import average
from serving.preprocess import prepare
from serving.score import Job, Pace, Summary, Told, score
from serving.sources import Item, list_items
from serving.tables import COLUMNS, Row, kind_of

PACE = Pace(workers=1, wait_s=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures in two folders, and one of each kind of bad file among them."""
    root = tmp_path_factory.mktemp("photographs")
    for index in range(20):
        place = root / f"{index % 2}" / f"{index:02}.jpg"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(picture(index, 60, 50)))
    (root / "0" / "04b.jpg").write_bytes(b"")
    (root / "0" / "06b.jpg").write_bytes(b"no picture at all")
    (root / "1" / "05b.jpg").write_bytes(encoded(picture(5, 60, 50))[:300])
    (root / "1" / "07b.jpg").symlink_to(root / "nowhere.jpg")
    (root / "1" / "09b.png").write_bytes(bomb())
    (root / ".hidden").write_text("not listed")
    return root


BAD = {
    "0/04b.jpg": "empty",
    "0/06b.jpg": "not_an_image",
    "1/05b.jpg": "undecodable",
    "1/07b.jpg": "unreadable",
    "1/09b.png": "too_many_pixels",
}


def bomb() -> bytes:
    """A small file whose header announces 30,000 x 30,000 pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def run(
    source: Path | str, out: Path, backend: Any = None, *, crops: Crops = Crops.TEN, **options: Any
) -> Summary:
    job = Job(str(source), crops, options.pop("top", 3))
    pace = options.pop("pace", PACE)
    return asyncio.run(score(job, out, backend or FakeBackend(), pace, **options))


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [Crops.TEN, Crops.CENTER])
def test_every_file_has_its_row_in_the_source_s_order(folder: Path, tmp_path: Path, crops: Crops) -> None:
    backend = FakeBackend()
    summary = run(folder, tmp_path / "t.jsonl", backend, crops=crops)
    rows = rows_of(tmp_path / "t.jsonl")
    names = [row["path"] for row in rows]
    assert names == sorted(names) and len(names) == 25
    assert {row["path"]: row["reason"] for row in rows if row["reason"]} == BAD
    assert (summary.rows, summary.reasons.total(), summary.labels.total()) == (25, 5, 20)
    for row in rows:
        assert list(row) == list(COLUMNS)
        if row["reason"] is None:
            mean = average(backend.probabilities(prepare((folder / row["path"]).read_bytes(), crops)))
            best = np.argsort(-mean)[:3]
            assert row["index"] == best[0]
            assert row["top_labels"] == [LABELS[index].name for index in best]
            assert row["top_probabilities"] == pytest.approx(mean[best], abs=1e-6)
            assert row["probability"] == row["top_probabilities"][0]
        else:
            assert row["label"] is None and row["detail"]


def test_every_request_is_a_full_batch_so_that_no_row_depends_on_its_neighbours(
    folder: Path, tmp_path: Path
) -> None:
    backend = FakeBackend()
    run(folder, tmp_path / "t.jsonl", backend)
    assert {len(batch) for batch in backend.batches} == {MAX_BATCH}
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "1" / "03.jpg", alone)
    run(alone, tmp_path / "alone.jsonl")
    (row,) = rows_of(tmp_path / "alone.jsonl")
    (same,) = (r for r in rows_of(tmp_path / "t.jsonl") if r["path"] == "1/03.jpg")
    assert row | {"path": ""} == same | {"path": ""}


def test_parquet_csv_and_json_lines_hold_the_same(folder: Path, tmp_path: Path) -> None:
    for ending in ("parquet", "csv", "jsonl"):
        run(folder, tmp_path / f"t.{ending}")
    rows = rows_of(tmp_path / "t.jsonl")
    table = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert [list(row) for row in table] == [list(COLUMNS)] * len(rows)
    for row, other in zip(rows, table, strict=True):
        for column in COLUMNS:
            if isinstance(row[column], float | list) and "label" not in column:
                assert other[column] == pytest.approx(row[column], abs=1e-7)
            else:
                assert other[column] == row[column]
    with (tmp_path / "t.csv").open(newline="") as file:
        for row, other in zip(rows, csv.DictReader(file), strict=True):
            assert other["path"] == row["path"] and other["label"] == (row["label"] or "")
            assert json.loads(other["top_probabilities"] or "null") == row["top_probabilities"]


def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        run(folder, tmp_path / name)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


# --- what is asked for wrongly --------------------------------------------------------------------------


def test_bad_orders_are_told_before_anything_is_done(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "t.csv"
    for source, table, text in (
        (folder, tmp_path / "t.xlsx", r".parquet, .csv, .jsonl"),
        (folder, tmp_path / "absent" / "t.csv", "no such folder for the table"),
        (tmp_path / "empty", out, "there are no files in it"),
        (tmp_path / "nowhere", out, "no such file or folder"),
    ):
        with pytest.raises(MalformedRequest, match=text):
            run(source, table)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"], "nothing is left lying about"
    with pytest.raises(MalformedRequest, match="center or ten"):
        Job("x", Crops.AUTO)


def test_a_table_that_is_there_is_kept_unless_forced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    out.write_text("precious")
    with pytest.raises(MalformedRequest, match="--force"):
        run(folder, out)
    assert out.read_text() == "precious"
    run(folder, out, force=True)
    assert len(rows_of(out)) == 25


def test_a_full_disk_is_told_and_the_journal_kept(folder: Path, tmp_path: Path) -> None:
    """A file size limit stands for it: the journal's writes fail in the middle of the run."""
    with fake_triton() as server:
        command = [*ALEXNET, "score", str(folder), "--out", str(tmp_path / "t.csv")]
        limited = f"ulimit -f 8; trap '' XFSZ; exec {' '.join(command)} --triton {server.address}"
        done = subprocess.run(
            ["bash", "-c", limited], cwd=ROOT, env=QUIET, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "File too large" in done.stderr and "what is done stays in" in done.stderr
        assert done.stderr.count("\n") == 1
        again = run_alexnet("score", folder, "--out", tmp_path / "t.csv", "--triton", server.address)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "t.csv").read_text().count("\n") == 26


# --- sources --------------------------------------------------------------------------------------------


def test_lists_tars_patterns_and_urls_name_the_same_files(folder: Path, tmp_path: Path) -> None:
    files = sorted(path for path in folder.rglob("*.jpg") if path.is_file())
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join([*(str(path) for path in files), "", "absent.jpg"]) + "\n")
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        for path in files:
            archive.add(path, path.name)
            label = tarfile.TarInfo(path.stem + ".cls")
            archive.addfile(label, io.BytesIO())
    whole = [path.read_bytes() for path in files]
    listed = list(list_items(str(listing)))
    assert [item.name for item in listed] == [*map(str, files), "absent.jpg"]
    assert [item.read(10**9) for item in listed[:-1]] == whole
    assert listed[-1].location == str(tmp_path / "absent.jpg")
    for source in (str(shard), f"{tmp_path}/*.tar", f"file://{shard}"):
        members = list(list_items(source))
        assert [item.name for item in members] == [f"shard.tar/{path.name}" for path in files]
        assert [item.read(10**9) for item in members] == whole
    assert [item.name for item in list_items(f"file://{folder}")] == [i.name for i in list_items(str(folder))]
    assert list(list_items(str(files[0]))) == [Item(files[0].name, str(files[0]))]


def test_a_compressed_or_damaged_archive_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(MalformedRequest, match="unpack it"):
        list(list_items(str(tmp_path / "a.tar.gz")))
    (tmp_path / "b.tar").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(MalformedRequest, match="cannot be listed"):
        list(list_items(str(tmp_path / "b.tar")))


# --- the journal ----------------------------------------------------------------------------------------

GROUPS = [
    [{"path": f"{group}-{row}", "label": "é" * row} for row in range(1 + group % 3)] for group in range(7)
]


def filled(place: Path) -> Journal:
    journal = Journal(place / "t.csv")
    journal.begin({"top": 3}, [Item(row["path"], "x") for group in GROUPS for row in group])
    for group in GROUPS[journal.groups :]:
        journal.append(group)
    return journal


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_journal_cut_or_damaged_anywhere_is_taken_up_again(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    journal = filled(tmp_path)
    journal.close()
    path = journal.folder / "rows.jsonl"
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(whole[:place])
    else:
        damaged = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
        path.write_bytes(whole[:place] + damaged + whole[place + 1 :])
    again = Journal(tmp_path / "t.csv")
    again.begin({"top": 3}, iter(()))
    assert again.groups < len(GROUPS)
    assert next(again.items()).name == GROUPS[again.groups][0]["path"]
    for group in GROUPS[again.groups :]:
        again.append(group)
    assert list(again.rows()) == GROUPS
    again.close()
    assert path.read_bytes() == whole


def test_another_job_does_not_go_on_with_a_journal(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with pytest.raises(MalformedRequest, match=r"top: 3 then, 4 now.*--restart"):
        Journal(tmp_path / "t.csv").begin({"top": 4}, iter(()))


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    other = Journal(tmp_path / "t.csv")
    with pytest.raises(MalformedRequest, match="another process is writing it"):
        other.begin({"top": 3}, iter(()))
    with pytest.raises(MalformedRequest, match="another process is writing it"):
        other.discard()
    journal.close()


# --- servers that come and go ---------------------------------------------------------------------------


class Flaky(FakeBackend):
    """Fails at chosen inferences."""

    def __init__(self, faults: dict[int, Exception]) -> None:
        self.calls = 0

        def before() -> None:
            self.calls += 1
            if self.calls in faults:
                raise faults[self.calls]

        super().__init__(before=before)


def test_a_server_that_is_away_for_a_while_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.score._PAUSE_S", 0.01)
    waited: list[str | None] = []
    away = ModelNotReady("no Triton server can be reached")
    run(folder, tmp_path / "calm.jsonl")
    backend = Flaky({1: away, 2: away, 4: EngineFailed("it failed")})
    run(folder, tmp_path / "rough.jsonl", backend, told=Told(waiting=waited.append))
    assert (tmp_path / "rough.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
    assert str(away) in waited and waited[-1] is None


def test_a_server_that_stays_away_ends_the_run_and_keeps_what_is_done(folder: Path, tmp_path: Path) -> None:
    away = ModelNotReady("no Triton server can be reached")
    out = tmp_path / "t.jsonl"
    with pytest.raises(ModelNotReady):
        run(folder, out, Flaky(dict.fromkeys(range(3, 99), away)), pace=Pace(1, in_flight=1, wait_s=0))
    assert not out.exists()
    backend = FakeBackend()
    run(folder, out, backend)
    assert len(backend.batches) == 2, "two of four groups were done before"
    assert len(rows_of(out)) == 25


def test_a_version_that_changes_midway_is_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    backend = FakeBackend()
    backend._before = lambda: backend.reload("8", 1) if len(backend.batches) == 2 else None
    with pytest.raises(ModelNotReady, match="version 8 answers where version 7 did"):
        run(folder, tmp_path / "t.jsonl", backend, pace=Pace(1, in_flight=1))
    with pytest.raises(MalformedRequest, match="version: 7 then, 8 now"):
        run(folder, tmp_path / "t.jsonl", backend)
    run(folder, tmp_path / "t.jsonl", backend, restart=True)
    assert {row["version"] for row in rows_of(tmp_path / "t.jsonl")} == {"8"}


# --- the command, killed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[FakeTriton]:
    with fake_triton() as running:
        yield running


def test_the_command_tells_what_it_did(folder: Path, tmp_path: Path, server: FakeTriton) -> None:
    out = tmp_path / "t.parquet"
    arguments = ("score", folder, "--out", out, "--triton", server.address, "--top", "2")
    done = run_alexnet(*arguments)
    assert done.returncode == 0, done.stderr
    assert "25 rows" in done.stdout and "5 without an answer" in done.stdout
    assert "not_an_image" in done.stdout
    assert parquet.read_metadata(out).num_rows == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.parquet"]
    assert run_alexnet(*arguments, "--force", "--strict").returncode == 1
    refused = run_alexnet(*arguments)
    assert refused.returncode == 1 and "--force replaces it" in refused.stderr


def test_a_full_queue_is_waited_out(folder: Path, tmp_path: Path) -> None:
    refusals = iter([full_queue] * 3)

    def before(context: Any) -> None:
        next(refusals, lambda _: None)(context)

    with fake_triton(before=before) as busy:
        done = run_alexnet("score", folder, "--out", tmp_path / "t.csv", "--triton", busy.address)
    assert done.returncode == 0, done.stderr
    assert "waiting: the model server's queue is full" in done.stderr


def slowly(seconds: float) -> Callable[[object], None]:
    return lambda _: time.sleep(seconds)


def test_killed_five_times_at_random_it_ends_as_an_undisturbed_run(folder: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    for copy in range(8):
        shutil.copytree(folder, many / str(copy), symlinks=True)
    outs = [tmp_path / "calm.parquet", tmp_path / "killed.parquet"]
    with fake_triton(before=slowly(0.05)) as running:
        commands = [
            [*ALEXNET, "score", str(many), "--out", str(out), "--triton", running.address, "--workers", "1"]
            for out in outs
        ]
        subprocess.run(commands[0], cwd=ROOT, env=QUIET, check=True, capture_output=True)
        rows = tmp_path / "killed.parquet.journal" / "rows.jsonl"
        moments, reached = random.Random(4), 0
        for _ in range(5):
            process = subprocess.Popen(commands[1], cwd=ROOT, env=QUIET, stdout=subprocess.PIPE)
            until = time.monotonic() + 30
            while (rows.stat().st_size if rows.exists() else 0) <= reached and process.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            process.kill()
            process.communicate()
            with suppress(FileNotFoundError):
                reached = rows.stat().st_size
        subprocess.run(commands[1], cwd=ROOT, env=QUIET, check=True, capture_output=True)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert parquet.read_metadata(outs[1]).num_rows == 8 * 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm.parquet", "killed.parquet", "many"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(folder: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "t.csv"
    with fake_triton(before=slowly(0.3)) as running:
        command = [*ALEXNET, "score", str(folder), "--out", str(out), "--triton", running.address]
        process = subprocess.Popen(command, cwd=ROOT, env=QUIET, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "t.csv.journal" / "rows.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "the same command goes on from here" in err
    assert not out.exists()


def test_the_kind_of_table_goes_by_the_ending() -> None:
    assert {kind_of(Path(f"x{ending}")).__name__ for ending in (".parquet", ".csv", ".jsonl")} == {
        "Parquet",
        "Csv",
        "JsonLines",
    }
