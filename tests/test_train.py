"""Training: it learns, it stops cleanly, and goes on bit for bit; evaluation counts everything once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, encoded

from model import checkpoint as checkpoints
from model.config import TrainConfig, TrainError
from model.data import Decoded
from model.evaluate import Probabilities, evaluate_predictor
from model.train import Trainer, start
from serving.contract import Crops
from serving.preprocess import Pixels, cut_crops

SMALL = dict(
    epochs=2, batch_size=8, resolutions=((1.0, 64),), precision="fp32", threads=1, validate_every=1,
    variant="owt", warmup=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that a network can tell apart: horizontal and vertical stripes of random colours."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 5)):
        for name in ("across", "down"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                stripes = rng.integers(0, 256, (12, 1, 3), np.uint8).repeat(12, axis=1)
                pixels = stripes if name == "across" else stripes.transpose(1, 0, 2)
                image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST)
                (root / split / name / f"{index}.png").write_bytes(encoded(image, "PNG"))
    return root


def config(data: Path, recipe: str = "modern", **changes: object) -> TrainConfig:
    return TrainConfig.of_recipe(recipe, data=str(data), **(SMALL | changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(run / "checkpoint.safetensors").net.state_dict()


def test_a_short_run_learns_and_leaves_a_checkpoint_without_batch_norm(data: Path, tmp_path: Path) -> None:
    path = start(config(data, epochs=4, learning_rate=0.01), tmp_path / "run", resume=False)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["crops"] == "ten"
    trained = checkpoints.load(path)
    assert trained.net.architecture.batch_norm is False
    assert [label.name for label in trained.labels] == ["across", "down"]
    assert trained.facts["training"]["batch_size"] == 8


def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    wanted = config(data, epochs=3)
    start(wanted, tmp_path / "straight", resume=False)
    code = (
        "import sys; from pathlib import Path;"
        "from model.config import TrainConfig; from model.train import start;"
        "start(TrainConfig.read(Path(sys.argv[1])), Path(sys.argv[2]), resume=sys.argv[3] == 'resume')"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "straight" / "config.json"),
        str(tmp_path / "broken"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "begin"], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while not (tmp_path / "broken" / "state.pt").exists():  # the end of the first epoch
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert b"Interrupted: saved at epoch" in said
    again = subprocess.run(
        [*command, "resume"], env=environment, capture_output=True, check=False, timeout=100
    )
    assert again.returncode == 0, again.stderr
    assert b"resumed at epoch" in again.stdout
    straight, broken = weights(tmp_path / "straight"), weights(tmp_path / "broken")
    for name, tensor in straight.items():
        assert torch.equal(tensor, broken[name]), name


def test_a_run_is_not_overwritten_and_nothing_is_not_resumed(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    with pytest.raises(TrainError, match="holds a run already; go on with --resume"):
        start(config(data, epochs=1), tmp_path, resume=False)
    with pytest.raises(TrainError, match="no run to resume"):
        start(config(data), tmp_path / "nothing", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="lower the learning rate"):
        start(config(data, learning_rate=1e25, batch_norm=False), tmp_path, resume=False)
    assert not (tmp_path / "state.pt").exists()
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_full_disk_stops_the_run_and_leaves_the_state_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(data, epochs=1), tmp_path)
    trainer._save_state()
    before = (tmp_path / "state.pt").stat()

    def full_disk(_state: object, beside: Path) -> None:
        beside.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(TrainError, match="the one before it stands"):
        trainer._save_state()
    assert (tmp_path / "state.pt").stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_state_of_another_network_is_refused(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    written = tmp_path / "config.json"
    written.write_text(written.read_text().replace('"owt"', '"2012"'))
    with pytest.raises(TrainError, match="2012"):
        start(config(data), tmp_path, resume=True)


def test_the_paper_recipe_is_the_paper_s() -> None:
    paper = TrainConfig.of_recipe("paper", data="anywhere")
    assert (paper.learning_rate, paper.momentum, paper.weight_decay) == (0.01, 0.9, 5e-4)
    assert (paper.batch_size, paper.epochs, paper.batch_norm, paper.mixup) == (128, 90, False, 0)
    assert [paper.rate_at(p, plateaus) for p, plateaus in ((0, 0), (0.5, 1), (0.9, 3))] == pytest.approx(
        [0.01, 0.001, 0.00001]
    )
    assert {paper.size_at(epoch) for epoch in range(90)} == {224}
    with pytest.raises(TrainError, match="there are modern and paper"):
        TrainConfig.of_recipe("secret", data="anywhere")


def test_the_paper_recipe_trains_and_decays_every_parameter(data: Path, tmp_path: Path) -> None:
    wanted = config(data, "paper", epochs=1, batch_norm=False, label_smoothing=0.0, crop_min=224)
    trainer = Trainer(wanted, tmp_path)
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 5e-4
    assert not group["nesterov"]
    trainer.train()
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_the_rate_is_divided_after_three_epochs_without_improvement(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(data, "paper"), tmp_path)
    for error in (0.5, 0.4, 0.4, 0.41, 0.45):
        trainer._note_plateau(error)
    assert trainer.at.plateaus == 1
    trainer._note_plateau(0.3)
    assert (trainer.at.plateaus, trainer.at.stale) == (1, 0)


def test_mixup_is_the_mixture_of_two_losses(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1, mixup=0.4), tmp_path, resume=False)
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_resolutions_grow_over_the_epochs() -> None:
    grown = replace(TrainConfig("x"), epochs=10, resolutions=((0.5, 128), (0.8, 160), (1.0, 224)))
    assert [grown.size_at(epoch) for epoch in range(10)] == [128] * 5 + [160] * 3 + [224] * 2


# --- evaluation ------------------------------------------------------------------------------------


def squares(count: int) -> Decoded:
    """Squares whose first pixel's red value is their number."""
    values = np.random.default_rng(3).integers(0, 256, (count, 256, 256, 3), np.uint8)
    values[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return Decoded(values, np.arange(count) % 7)


@pytest.mark.parametrize("count", [1, 3, 8, 17, 85])
@pytest.mark.parametrize("crops", [Crops.CENTER, Crops.TEN])
def test_every_image_is_counted_once(count: int, crops: Crops) -> None:
    rng = np.random.default_rng(count)
    table = rng.dirichlet(np.ones(7), count).astype(np.float32)
    seen: list[int] = []

    def predict(batch: Pixels) -> Probabilities:
        chosen: Probabilities = table[batch[:, 0, 0, 0]]
        return chosen

    data = squares(count)
    result = evaluate_predictor(predict, data, crops, seen.append)
    order = np.argsort(-table, axis=1)
    assert sum(seen) == count == result.images
    assert result.top1_error == pytest.approx((order[:, 0] != data.targets).mean())
    missed = [target not in row[:5] for row, target in zip(order, data.targets, strict=True)]
    assert result.top5_error == pytest.approx(np.mean(missed))


def test_ten_crops_are_averaged_before_the_decision() -> None:
    data = Decoded(
        np.random.default_rng(4).integers(0, 256, (5, 256, 256, 3), np.uint8), np.zeros(5, np.int64)
    )
    projection = np.random.default_rng(5).normal(size=(224 * 224 * 3, 3)) / 1000

    def predict(batch: Pixels) -> Probabilities:
        powers = np.exp((batch.reshape(len(batch), -1) - 127.5) @ projection)
        shares: Probabilities = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
        return shares

    wrong = sum(predict(cut_crops(square, Crops.TEN)).mean(0).argmax() != 0 for square in data.squares)
    assert evaluate_predictor(predict, data, Crops.TEN).top1_error == pytest.approx(wrong / 5)


def test_top_5_of_three_classes_is_never_wrong() -> None:
    data = Decoded(np.zeros((4, 256, 256, 3), np.uint8), np.array([0, 1, 2, 0]))
    result = evaluate_predictor(lambda batch: np.full((len(batch), 3), 1 / 3, np.float32), data, Crops.TEN)
    assert (result.top1_error, result.top5_error) == (0.5, 0.0)
