"""Several processes train as one does: the same curve, every image counted once, stopped together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import NARROW, ROOT, encoded

from model import checkpoint as checkpoints
from model.config import TrainConfig, TrainError
from model.distributed import World
from model.run import Run
from model.shared_layers import SharedDropout
from model.train import Trainer, start

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noisy colour; 7 images to validate on, which two processes cannot halve."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (11, 10)), ("val", (4, 3))):
        for name, colour, count in zip(("blue", "red"), ((60, 80, 200), (200, 80, 60)), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (np.array(colour) + rng.normal(0, 90, (60, 60, 3))).clip(0, 255).astype(np.uint8)
                (root / split / name / f"{index}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    return root


def config(data: Path, **changes: object) -> TrainConfig:
    small: dict[str, object] = dict(
        epochs=3, batch_size=7, resolutions=((1.0, 64),), precision="fp32", threads=1, validate_every=1,
        variant="owt", warmup=0.0, mixup=0.3, gradient_clip=1.0, learning_rate=0.02,
    )  # fmt: skip
    return TrainConfig.of_recipe("modern", data=str(data), **(small | changes))


CHILD = f"""
import sys
from pathlib import Path
import model.net
from model.config import TrainConfig
from model.train import Interrupted, start

model.net.HIDDEN = {NARROW}
run = Path(sys.argv[2])
say = lambda line: print(line, flush=True)
start(TrainConfig.read(Path(sys.argv[1])), run, resume="resume" in sys.argv, say=say)
"""


def torchrun(tmp_path: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Two processes on this machine, as torchrun starts them; gloo over the loopback."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
         *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_curve(one: Path, two: Path) -> None:
    assert [e["epoch"] for e in log_of(one)] == [e["epoch"] for e in log_of(two)]
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["top1_error"] == b["top1_error"]
    theirs = checkpoints.load(two / "checkpoint.safetensors").net.state_dict()
    for name, tensor in checkpoints.load(one / "checkpoint.safetensors").net.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_draw_the_curve_of_one_and_leave_its_weights(data: Path, tmp_path: Path) -> None:
    """With batch norm, dropout, mixup and a batch of 7 that does not halve."""
    start(config(data), tmp_path / "one", resume=False)
    done = torchrun(tmp_path, tmp_path / "one" / "config.json", tmp_path / "two")
    said, errors = done.communicate(timeout=100)
    assert done.returncode == 0, errors
    assert [line.split()[0] for line in said.splitlines()] == ["epoch=1", "epoch=2", "epoch=3"], "one speaks"
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert log_of(tmp_path / "one")[2]["loss"] < log_of(tmp_path / "one")[0]["loss"]


def test_sigterm_to_torchrun_saves_and_one_process_goes_on_with_the_run_of_two(
    data: Path, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start(config(data, epochs=4), straight, resume=False)
    (tmp_path / "long.json").write_text(
        (straight / "config.json").read_text().replace('"epochs": 4', '"epochs": 400')
    )
    process = torchrun(tmp_path, tmp_path / "long.json", broken)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch=1 ")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "Interrupted: saved at epoch" in errors
    at = Run(broken).load_state()["at"]
    assert at["epoch"] >= 1

    said: list[str] = []
    Run(broken).begin(config(data, epochs=at["epoch"] + 1))
    start(config(data), broken, resume=True, say=said.append)
    assert said[0] == f"resumed at epoch {at['epoch'] + 1}, step {at['step'] + 1}"
    assert [entry["epoch"] for entry in log_of(broken)] == list(range(1, at["epoch"] + 2))


@given(st.integers(1, 300), st.integers(1, 9))
@settings(max_examples=60)
def test_shares_are_a_partition_that_keeps_mixup_s_partners_together(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    for share in shares:
        assert share.tolist() == (count - 1 - share[::-1]).tolist()
    rows = [World(rank, size).rows(count) for rank in range(size)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_batch_too_small_for_the_processes_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="batches of 7 images are too small for 4 processes"):
        Trainer(config(data), tmp_path, world=World(0, 4))


def test_dropout_of_a_share_is_that_of_the_whole_batch() -> None:
    dropout, x, rows = SharedDropout(0.5), torch.randn(9, 33), torch.tensor([1, 4, 7])
    results = []
    for share in (torch.arange(9), rows):
        torch.manual_seed(3)
        dropout.share(share, 9)
        results.append(dropout(x[share]))
    assert torch.equal(results[0][rows], results[1])
    kept = results[0] != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(results[0][kept], 2 * x[kept])
    assert torch.equal(dropout.eval()(x), x)


def test_what_the_first_process_decides_alone_is_its_own() -> None:
    assert World().agreed(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        World().agreed(lambda: 1 // 0)
    assert World().sums([1, 2.5]).tolist() == [1, 2.5]
