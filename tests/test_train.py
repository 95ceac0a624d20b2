"""Training: it learns, it stops cleanly and goes on bit for bit, and it loses nothing it had."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import NARROW, ROOT, encoded
from torch.nn import functional

from model import checkpoint as checkpoints
from model.checkpoint import CheckpointError
from model.config import TrainConfig, TrainError
from model.data import PAPER_AUGMENTATION, Augmentation, Batch, Decoded, epoch_order, training_batch
from model.learner import cut_windows
from model.machine import faster_precision
from model.progress import Pace
from model.run import Run
from model.train import Progressed, Trainer, start
from serving.contract import Crops

pytestmark = pytest.mark.usefixtures("narrow")
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
                size = tuple(rng.integers(180, 400, 2).tolist())
                image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
                (root / split / name / f"{index}.png").write_bytes(encoded(image, "PNG"))
    return root


def config(data: Path, recipe: str = "modern", **changes: object) -> TrainConfig:
    return TrainConfig.of_recipe(recipe, data=str(data), **(SMALL | changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(run / "checkpoint.safetensors").net.state_dict()


def log_of(run: Path) -> list[dict[str, object]]:
    """The log without its speeds, which no two runs share."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    speeds = ("images_per_s", "loader_images_per_s", "waited")
    return [{name: value for name, value in e.items() if name not in speeds} for e in entries]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def full_disk(file_bytes: int) -> Iterator[None]:
    """No file can grow beyond `file_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- a run -----------------------------------------------------------------------------------------


def test_a_short_run_learns_and_leaves_a_checkpoint_without_batch_norm(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    path = start(
        config(data, epochs=8, learning_rate=0.1, validate_every=3, seed=3), tmp_path / "run", resume=False,
        say=said.append,
    )  # fmt: skip
    log = log_of(tmp_path / "run")
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [entry.get("crops") for entry in log] == [None, None, "center", None, None, "center", None, "ten"]
    assert len(said) == 8
    first, last = log[0]["loss"], log[-1]["loss"]
    assert isinstance(first, float)
    assert isinstance(last, float)
    assert last < 0.8 * first
    assert log[-1]["top1_error"] in (0.0, 0.1, 0.2)
    trained = checkpoints.load(path)
    assert trained.net.architecture.batch_norm is False
    assert [label.name for label in trained.labels] == ["across", "down"]
    assert trained.facts["training"]["batch_size"] == 8
    assert trained.facts["last_epoch"]["epoch"] == 8


def test_bfloat16_with_mixup_and_clipped_gradients_trains(data: Path, tmp_path: Path) -> None:
    wanted = config(data, variant="2012", epochs=1, precision="bf16", mixup=0.2, gradient_clip=1.0)
    start(wanted, tmp_path, resume=False)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())


def test_the_faster_precision_is_one_of_the_two_and_is_written_down(data: Path, tmp_path: Path) -> None:
    assert faster_precision() in ("bf16", "fp32")
    start(config(data, epochs=1, precision="auto"), tmp_path, resume=False)
    assert TrainConfig.read(tmp_path / "config.json").precision in ("bf16", "fp32")


def test_fewer_images_than_a_batch_are_one_batch(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1, batch_size=100), tmp_path, resume=False)
    assert log_of(tmp_path)[0]["epoch"] == 1


# --- stopped and resumed ---------------------------------------------------------------------------

CHILD = f"""
import os, signal, sys
from pathlib import Path
import torch
import model.net
from model.config import TrainConfig
from model.train import start

model.net.HIDDEN = {NARROW}
config, run, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def say(line):
    print(line, flush=True)
    if stop == "SIGTERM" and line.startswith("epoch=1 "):
        os.kill(os.getpid(), signal.SIGTERM)

def killed_while_writing(state, path):
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

if stop == "SIGKILL":
    torch.save = killed_while_writing
start(TrainConfig.read(config), run, resume=run.exists(), say=say)
"""


def run_child(*arguments: str | Path) -> tuple[int, str]:
    """The status of a training process, and all that it wrote on its terminal."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    written = b""
    try:
        while part := os.read(terminal, 4096):
            written += part
    except OSError:  # the last process that held the terminal is gone
        pass
    finally:
        os.close(terminal)
    return process.wait(60), written.decode()


@pytest.mark.parametrize("recipe", ["modern", "paper"])
def test_a_run_stopped_by_sigterm_and_by_sigkill_goes_on_bit_for_bit(
    data: Path, tmp_path: Path, recipe: str
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    start(config(data, recipe, epochs=3, variant="2012"), straight, resume=False)

    status, text = run_child(straight / "config.json", broken, "SIGTERM")
    assert status == 1
    assert "Interrupted: saved at epoch 2, step 1" in text
    assert "epoch 1/3 at 64" in text, "the bar of a real terminal"
    stopped = Run(broken).load_state()
    assert (stopped["at"]["epoch"], stopped["at"]["step"]) == (1, 1)

    if recipe == "modern":  # and once more, killed in the midst of writing the state of epoch 2
        status, text = run_child(straight / "config.json", broken, "SIGKILL")
        assert status == -signal.SIGKILL
        assert "resumed at epoch 2, step 2" in text
        assert Run(broken).load_state()["at"] == stopped["at"]

    said: list[str] = []
    start(config(data, epochs=99, seed=5), broken, resume=True, say=said.append)
    assert said[0] == "resumed at epoch 2, step 2"
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(broken)[name]), name
    assert log_of(broken) == log_of(straight)
    assert TrainConfig.read(broken / "config.json") == TrainConfig.read(straight / "config.json")


def test_a_finished_run_resumed_is_left_as_it_is(data: Path, tmp_path: Path) -> None:
    path = start(config(data, epochs=1), tmp_path, resume=False)
    before = contents(tmp_path)
    assert start(config(data), tmp_path, resume=True) == path
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kept", ["state.pt", "checkpoint.safetensors"])
def test_a_folder_that_holds_a_run_is_not_begun_anew(data: Path, tmp_path: Path, kept: str) -> None:
    (tmp_path / kept).write_bytes(b"precious")
    with pytest.raises(TrainError, match="holds a run already; go on with --resume, or choose another"):
        start(config(data), tmp_path, resume=False)
    assert contents(tmp_path) == {kept: b"precious"}


@pytest.mark.parametrize("missing", ["config.json", "state.pt"])
def test_what_is_not_there_is_not_resumed(data: Path, tmp_path: Path, missing: str) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    (tmp_path / missing).unlink()
    with pytest.raises(TrainError, match="no run to resume"):
        start(config(data), tmp_path, resume=True)
    with pytest.raises(TrainError, match="no run to resume"):
        start(config(data), tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_trainer_without_a_state_says_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"state\.pt: no such file; there is nothing to resume"):
        Trainer(config(data), tmp_path).resume()


def test_a_damaged_state_is_named_and_left_alone(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    whole = (tmp_path / "state.pt").read_bytes()
    for damaged in (b"", b"text" * 99, whole[:1000], whole[:-1000]):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(TrainError, match=r"state\.pt is damaged"):
            start(config(data), tmp_path, resume=True)
        assert (tmp_path / "state.pt").read_bytes() == damaged
    for foreign in ({}, [1], {"architecture": None}):
        torch.save(foreign, tmp_path / "state.pt")
        with pytest.raises(TrainError, match=r"state\.pt"):
            start(config(data), tmp_path, resume=True)


def test_a_state_of_another_network_recipe_or_other_classes_is_refused(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    with pytest.raises(TrainError, match=r"not Architecture\(variant='2012'"):
        Trainer(config(data, variant="2012"), tmp_path).resume()
    with pytest.raises(TrainError, match=r"not the state of this run: .*parameter group"):
        Trainer(config(data, "paper", batch_norm=True), tmp_path).resume()
    renamed = tmp_path / "renamed"
    for split in ("train", "val"):
        for old, new in (("across", "across"), ("down", "upright")):
            (renamed / split).mkdir(parents=True, exist_ok=True)
            (renamed / split / new).symlink_to(data / split / old)
    with pytest.raises(TrainError, match=r"knows the classes \['across', 'down'\], not \['across', 'upr"):
        Trainer(config(renamed), tmp_path).resume()


def test_the_state_of_an_earlier_version_is_taken_up(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    run = Run(tmp_path)
    state = run.load_state()
    del state["classes"], state["at"]["loss_sum"], state["at"]["images"]
    run.save_state(state)
    trainer = Trainer(config(data), tmp_path)
    trainer.resume()
    assert trainer.at == Progressed(epoch=1)


# --- what goes wrong -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_written(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="lower the learning rate; nothing was saved before"):
        start(config(data, learning_rate=1e25, batch_norm=False), tmp_path, resume=False)
    assert sorted(contents(tmp_path)) == ["config.json", "environment.json"]


def test_a_run_that_diverges_keeps_its_last_good_state(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    before = contents(tmp_path)
    trainer = Trainer(config(data), tmp_path)
    trainer.resume()
    trainer.net.fc8.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainError, match=r"the loss became nan in epoch 2, step 1; .*good state is .*state"):
        trainer.train()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_weights_that_diverge_in_the_last_step_are_not_saved(
    data: Path, tmp_path: Path, interrupted: bool
) -> None:
    """The loss is that of before the step: it can be finite where the weights no longer are."""
    start(config(data, epochs=1), tmp_path, resume=False)
    before = contents(tmp_path)
    trainer = Trainer(config(data, batch_size=40), tmp_path)
    trainer.resume()
    trainer.net.fc8.bias.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]
    trainer.stopping = interrupted
    with pytest.raises(TrainError, match="weights became infinite or NaN in epoch 2, step 1"):
        trainer.train()
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_state_and_the_checkpoint_before(data: Path, tmp_path: Path) -> None:
    start(config(data, epochs=1), tmp_path, resume=False)
    before = contents(tmp_path)
    trainer = Trainer(config(data), tmp_path)
    trainer.resume()
    with (
        pytest.raises(TrainError, match=r"state\.pt cannot be written .*; the one before it stands"),
        full_disk(len(before["state.pt"]) // 2),
    ):
        trainer._save_state()
    with (
        pytest.raises(CheckpointError, match=r"checkpoint\.safetensors cannot be written"),
        full_disk(len(before["checkpoint.safetensors"]) // 2),
    ):
        trainer.train()
    assert contents(tmp_path) == before


def test_a_run_folder_that_cannot_be_made_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"file/run/config\.json cannot be written"):
        start(config(data), tmp_path / "file" / "run", resume=False)


def test_a_single_class_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "down").symlink_to(data / "train" / "down")
    with pytest.raises(TrainError, match="train holds one class, down; it takes two"):
        start(config(tmp_path), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


# --- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(recipe="secret"), "no recipe 'secret'; there are modern, paper"),
        (dict(variant="vgg"), "no variant 'vgg'; there are 2012, owt"),
        (dict(precision="fp8"), "no precision 'fp8'"),
        (dict(epochs=0), "epochs: at least 1, not 0"),
        (dict(validate_every=0), "validate_every: at least 1"),
        (dict(batch_size=0, batch_norm=False), "batch_size: at least 1"),
        (dict(batch_size=1), "2 with batch norm, not 1"),
        (dict(learning_rate=float("nan")), "learning_rate: 0 or more, not nan"),
        (dict(learning_rate=-1.0), "learning_rate"),
        (dict(warmup=1.0), "warmup"),
        (dict(mixup=-0.1), "mixup"),
        (dict(crop_min=257), "crop_min: 1 to 256 pixels, not 257"),
        (dict(resolutions=((1.0, 30),)), "sides of at least 31 pixels"),
    ],
)
def test_a_configuration_that_cannot_train_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(TrainError, match=words):
        TrainConfig("anywhere", **changes)  # type: ignore[arg-type]


def test_a_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    for wanted in (TrainConfig("x"), TrainConfig.of_recipe("paper", data="y", seed=7, mixup=0.2)):
        Run(tmp_path).begin(wanted)
        assert TrainConfig.read(tmp_path / "config.json") == wanted
    assert sorted(contents(tmp_path)) == ["config.json", "environment.json"]


def test_a_configuration_of_an_earlier_or_later_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"data": "x", "epochs": 7, "unheard_of": 1}')
    assert TrainConfig.read(path) == TrainConfig("x", epochs=7)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": "x", "resolutions": 3}', "\x80", '{"epochs": 1}'])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(TrainError, match=r"config\.json: not the configuration of a run"):
        TrainConfig.read(tmp_path / "config.json")


def test_resolutions_grow_over_the_epochs() -> None:
    grown = replace(TrainConfig("x"), epochs=10, resolutions=((0.5, 128), (0.8, 160), (1.0, 224)))
    assert [grown.size_at(epoch) for epoch in range(10)] == [128] * 5 + [160] * 3 + [224] * 2


def test_the_modern_rate_warms_up_and_falls_along_a_cosine() -> None:
    modern = TrainConfig("x", learning_rate=0.04, warmup=0.2)
    rates = [modern.rate_at(progress, plateaus=0) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0.002, 0.021, 0.04, 0.02, 0.00004])


# --- the recipes -----------------------------------------------------------------------------------


def test_the_paper_recipe_is_the_paper_s() -> None:
    paper = TrainConfig.of_recipe("paper", data="anywhere")
    assert (paper.learning_rate, paper.momentum, paper.weight_decay) == (0.01, 0.9, 5e-4)
    assert (paper.batch_size, paper.epochs, paper.batch_norm, paper.mixup) == (128, 90, False, 0)
    assert (paper.label_smoothing, paper.gradient_clip, paper.variant) == (0, 0, "2012")
    assert [paper.rate_at(p, plateaus) for p, plateaus in ((0, 0), (0.5, 1), (0.9, 3))] == pytest.approx(
        [0.01, 0.001, 0.00001]
    )
    assert {paper.size_at(epoch) for epoch in range(90)} == {224}


def test_the_paper_recipe_starts_from_and_steps_as_the_paper(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(data, "paper", variant="2012"), tmp_path)
    (group,) = trainer.learner.optimizer.param_groups
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in trainer.net.parameters())
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (5e-4, 0.9, False)
    augmentation = trainer.augmentation
    assert (augmentation.crop_min, augmentation.crop_max, augmentation.brightness) == (224, 224, 0)
    assert augmentation.colour_noise == 0.1
    state = trainer.net.state_dict()
    assert float(state["conv3.weight"].std()) == pytest.approx(0.01, rel=0.01)
    ones = [name for name, tensor in state.items() if name.endswith("bias") and (tensor == 1).all()]
    assert ones == ["conv2.bias", "conv4.bias", "conv5.bias", "fc6.bias", "fc7.bias"]
    zeros = [name for name, tensor in state.items() if (tensor == 0).all()]
    assert zeros == ["conv1.bias", "conv3.bias", "fc8.bias"]


def test_the_modern_recipe_decays_weights_and_neither_biases_nor_batch_norm(
    data: Path, tmp_path: Path
) -> None:
    trainer = Trainer(config(data), tmp_path)
    decayed, free = trainer.learner.optimizer.param_groups
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in free["params"]} == {1}
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0)
    assert decayed["nesterov"]


def test_the_paper_recipe_validates_every_epoch_and_its_last_with_ten_crops(
    data: Path, tmp_path: Path
) -> None:
    start(config(data, "paper", epochs=3, validate_every=100), tmp_path / "three", resume=False)
    assert [e["crops"] for e in log_of(tmp_path / "three")] == [Crops.CENTER, Crops.CENTER, Crops.TEN]
    trainer = Trainer(config(data, "paper", epochs=1), tmp_path)
    trainer.train()
    assert trainer.at == Progressed(epoch=1), "ten crops' error is no measure of a plateau"


def test_the_rate_is_divided_after_three_epochs_without_improvement(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(data, "paper"), tmp_path)
    for error in (0.5, 0.4, 0.4, 0.41, 0.45):
        trainer._note_plateau(error)
    assert trainer.at.plateaus == 1
    trainer._note_plateau(0.3)
    assert (trainer.at.plateaus, trainer.at.stale) == (1, 0)


def see_input(seen: list[torch.Tensor]) -> Callable[..., None]:
    return lambda _layer, inputs: seen.append(inputs[0])


def test_mixup_is_the_mixture_of_two_images_and_of_their_losses(data: Path, tmp_path: Path) -> None:
    for recipe in ("modern", "paper"):
        trainer = Trainer(config(data, recipe, mixup=1.0), tmp_path)
        trainer.net.eval()  # no dropout
        seen: list[torch.Tensor] = []
        trainer.net.get_submodule("conv1").register_forward_pre_hook(see_input(seen))
        shares = []
        for step, rows in enumerate(epoch_order(40, 8, seed=0, epoch=0)):
            batch = training_batch(trainer.data, trainer.augmentation, rows, 64, (0, 0, step))
            x, targets = trainer.learner.to_device(batch), torch.from_numpy(batch.targets)
            with torch.no_grad():
                loss = trainer.learner.loss(x, targets, batch)
                mixed = seen.pop()
                share = float(((mixed - x.flip(0)) / (x - x.flip(0))).nanmedian())
                log_p = functional.log_softmax(trainer.net.logits(mixed), dim=1)
            smooth = trainer.config.label_smoothing
            aims = functional.one_hot(targets, 2) * (1 - smooth) + smooth / 2
            expected = -((share * aims + (1 - share) * aims.flip(0)) * log_p).sum(1).mean()
            torch.testing.assert_close(mixed, share * x + (1 - share) * x.flip(0), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
            shares.append(round(share, 3))
        assert len(set(shares)) == len(shares), "each batch has its own"


def test_a_batch_reaches_the_network_coloured_clipped_and_normalised(data: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(data), tmp_path)
    batch = training_batch(trainer.data, Augmentation(), np.array([3, 30, 7]), 64, (1, 2, 3))
    coloured = (batch.views.astype(np.float64) * batch.gain + batch.offset).clip(0, 255)
    back = trainer.learner.to_device(batch).double().permute(0, 2, 3, 1).numpy()
    std, mean = (np.array(values) for values in ((58.395, 57.12, 57.375), (123.675, 116.28, 103.53)))
    np.testing.assert_allclose(back * std + mean, coloured, atol=1e-3)


@pytest.mark.parametrize("size", [224, 96])
def test_windows_cut_on_the_device_are_those_cut_on_the_host(data: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    squares = np.stack([
        np.asarray(Image.fromarray(square).resize((256, 256), Image.Resampling.BICUBIC)) for square in coarse
    ])  # fmt: skip
    for augmentation in (Augmentation(crop_min=80), PAPER_AUGMENTATION):
        wanted = (Decoded(squares, np.arange(6)), augmentation, np.array([5, 0, 3, 2]), size, (4, 5))
        host, device = (training_batch(*wanted, np.array([1, 2, 3]), cut=cut) for cut in (True, False))
        assert device.windows is not None and device.views.shape == (3, 256, 256, 3)
        cut = cut_windows(torch.from_numpy(device.views), device.windows, size).numpy()
        assert np.abs(cut - host.views).mean() < 1, "rounded to whole numbers, and filtered at the rim"
        assert np.abs(cut - host.views).max() < 32
        if (augmentation, size) == (PAPER_AUGMENTATION, 224):
            np.testing.assert_allclose(cut, host.views, atol=0.05)


def test_images_of_one_process_are_augmented_as_among_those_of_all(data: Path, tmp_path: Path) -> None:
    trainer, rows = Trainer(config(data), tmp_path), np.array([9, 1, 33, 20, 5])
    whole = training_batch(trainer.data, Augmentation(), rows, 64, (1, 2))
    part = training_batch(trainer.data, Augmentation(), rows, 64, (1, 2), np.array([0, 4]))
    for name in ("views", "gain", "offset", "targets", "positions"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[[0, 4]])
    assert (part.count, part.seed) == (whole.count, whole.seed)


# --- what it says ----------------------------------------------------------------------------------


def test_tensorboard_gets_the_log_s_numbers_and_the_steps_between(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(config(data, epochs=3, batch_size=4), tmp_path, resume=False, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    log = log_of(tmp_path)
    assert [point.value for point in points["epoch/loss"]] == pytest.approx([e["loss"] for e in log])
    assert [p.value for p in points["epoch/top1_error"]] == pytest.approx([e["top1_error"] for e in log])
    assert [point.step for point in points["epoch/loss"]] == [10, 20, 30]
    assert [point.step for point in points["step/loss"]] == [20]
    assert 0 < points["step/learning_rate"][0].value < 0.03


def test_the_pace_foresees_that_larger_views_cost_more() -> None:
    now = [100.0]
    pace = Pace(10 * 100**2 + 10 * 200**2, lambda: now[0])
    for _ in range(5):
        now[0] += 1
        pace.add(2, 100)
    assert pace.images_per_s == 2
    assert pace.remaining.total_seconds() == 20, "ten images of four times the pixels"


def test_the_pace_tells_how_long_the_network_waited_and_what_the_loader_makes() -> None:
    now = [0.0]
    data = Decoded(np.zeros((4, 256, 256, 3), np.uint8), np.arange(4))

    def batches() -> Iterator[Batch]:
        for _ in range(3):
            now[0] += 2
            yield replace(training_batch(data, Augmentation(), np.arange(4), 32, (0,)), seconds=0.5)

    pace = Pace(1, lambda: now[0])
    for _ in pace.waiting(batches()):
        now[0] += 6
    assert pace.waited == 0.25
    assert pace.loader_images_per_s(threads=2) == 16


@pytest.mark.parametrize("recipe", ["modern", "paper"])
def test_shards_and_images_on_demand_train_the_same_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from model.archives import Source
    from model.prepare import prepare

    prepare(Source.scan(data), tmp_path / "shards", processes=1, shard_images=7)
    wanted = config(tmp_path / "shards", recipe, epochs=1)
    start(wanted, tmp_path / "kept", resume=False)
    monkeypatch.setattr("model.train.DATA_SHARE_OF_MEMORY", 0.0)
    start(wanted, tmp_path / "on demand", resume=False)
    for name, tensor in weights(tmp_path / "kept").items():
        assert torch.equal(tensor, weights(tmp_path / "on demand")[name]), name
    assert log_of(tmp_path / "kept") == log_of(tmp_path / "on demand")
