"""The `alexnet` command as a user types it: real processes, real exit statuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support import ALEXNET, QUIET, ROOT, encoded, picture, run_alexnet, tiny_repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(picture(1)))
    return path


def test_classify_prints_a_table_for_each_image(repository: Path, photo: Path) -> None:
    done = run_alexnet("classify", photo, photo, "--repository", repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(photo)) == 2
    assert done.stdout.count("10 crops") == 2
    percentages = [float(number) for number in re.findall(r"^ *(\d+\.\d) ", done.stdout, re.MULTILINE)]
    assert len(percentages) == 10
    assert percentages[:5] == sorted(percentages[:5], reverse=True)


def test_a_bad_image_among_good_ones_is_told_and_fails_the_command(
    repository: Path, photo: Path, tmp_path: Path
) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    done = run_alexnet(
        "classify", text, tmp_path / "absent.jpg", photo, "--json", "--top", "2", "--repository", repository
    )
    assert done.returncode == 1
    bad, absent, good = (json.loads(line) for line in done.stdout.splitlines())
    assert bad["image"] == str(text)
    assert "accepted format" in bad["error"]
    assert "No such file" in absent["error"]
    assert len(good["predictions"]) == 2
    assert good["crops"] == 10


def test_a_missing_model_ends_serve_and_classify_with_one_line(tmp_path: Path, photo: Path) -> None:
    for command in (["serve", "--port", "0"], ["classify", str(photo)]):
        done = run_alexnet(*command, "--repository", tmp_path / "nowhere")
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert str(tmp_path / "nowhere" / "alexnet") in line
        assert "alexnet export CHECKPOINT" in line


def test_a_damaged_model_file_ends_the_start_with_one_line(tmp_path: Path) -> None:
    tiny_repository(tmp_path)
    model = tmp_path / "alexnet" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes()[:100])
    done = run_alexnet("serve", "--port", "0", "--repository", tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(model) in line


@contextmanager
def served(*arguments: str | Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = subprocess.Popen(
        [*ALEXNET, "serve", "--port", "0", *map(str, arguments)],
        cwd=ROOT,
        env=QUIET | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, line
        yield match[0], process
    finally:
        process.kill()
        process.communicate()


def test_serve_says_its_address_answers_and_ends_on_sigterm(repository: Path, photo: Path) -> None:
    with served("--repository", repository) as (url, process):
        assert httpx.get(f"{url}/readyz").status_code == 200
        answer = httpx.post(f"{url}/classify", files={"file": photo.read_bytes()}).json()
        assert answer["model"]["backend"] == "onnxruntime"
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0


def test_serve_and_classify_give_the_same_answer(repository: Path, photo: Path) -> None:
    (line,) = run_alexnet("classify", photo, "--json", "--repository", repository).stdout.splitlines()
    with served("--repository", repository) as (url, _):
        answer = httpx.post(f"{url}/classify", files={"file": photo.read_bytes()}).json()
    assert json.loads(line)["predictions"] == answer["predictions"]


def test_a_taken_port_is_an_error(repository: Path) -> None:
    with served("--repository", repository) as (url, _):
        done = run_alexnet("serve", "--port", url.rsplit(":", 1)[1], "--repository", repository)
        assert done.returncode != 0
        assert "address already in use" in done.stderr.lower()


def test_unusable_settings_name_the_setting(photo: Path) -> None:
    done = run_alexnet("classify", photo, ALEXNET_MAX_PIXELS="-3")
    assert done.returncode == 1
    assert "max_pixels" in done.stderr


def test_the_committed_sample_answers_ten_classes_without_torch(photo: Path) -> None:
    code = (
        "import sys, alexnet; sys.argv = ['alexnet', 'classify', '--json', sys.argv[1]];\n"
        "try: alexnet.main()\n"
        "finally: assert not {'torch', 'onnx', 'tritonclient'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(photo)],
        cwd=ROOT,
        env=QUIET | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["predictions"]) == 5
    assert answer["model"]["name"] == "alexnet"


def test_an_unknown_precision_and_int8_without_photographs_are_told() -> None:
    checkpoint = str(ROOT / "checkpoints" / "imagenette.safetensors")
    unknown = run_alexnet("export", checkpoint, "--precision", "fp32,int4")
    assert unknown.returncode == 1
    assert "'int4'" in unknown.stderr
    assert "fp32, int8" in unknown.stderr
    without = run_alexnet("export", checkpoint, "--precision", "int8")
    assert without.returncode == 1
    assert "--data" in without.stderr
