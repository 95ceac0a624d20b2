"""Starting from somebody's weights: what is kept, what is new, and that it learns from there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import encoded, run_alexnet

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, CheckpointError
from model.config import TrainConfig, TrainError
from model.net import AlexNet, Architecture
from model.run import Run
from model.train import start
from model.transfer import rows_of, take_over
from serving.postprocess import Label

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of a stranger's, one of them known to the network under another spelling."""
    root = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in (("Golf_Ball", (220, 220, 230)), ("my dog", (120, 80, 40))):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (np.array(colour) + rng.normal(0, 30, (40, 50, 3))).clip(0, 255).astype(np.uint8)
                (root / split / name / f"IMG_{index}.JPG").write_bytes(encoded(Image.fromarray(pixels)))
    return root


LABELS = [Label("n02012849", "crane"), Label("n03445777", "golf ball"), Label("n03126707", "crane")]


def source(path: Path, **changes: object) -> Path:
    """A checkpoint of random weights; its fc6 and fc7 are factors."""
    torch.manual_seed(1)
    net = AlexNet(replace(Architecture("owt", 3, low_rank=8), **changes))  # type: ignore[arg-type]
    checkpoints.save(path, Checkpoint(net, LABELS))
    return path


def test_classes_are_found_by_their_id_then_by_an_unambiguous_name() -> None:
    wanted = [
        Label("n03445777", "anything"), Label("golf-ball", "golf-ball"), Label("crane", "crane"),
        Label("n03126707", "crane"), Label("zebra", "zebra"),
    ]  # fmt: skip
    assert rows_of(wanted, LABELS) == [1, 1, None, 2, None]


def test_every_layer_is_taken_over_and_of_fc8_the_rows_of_known_classes(tmp_path: Path) -> None:
    given = checkpoints.load(source(tmp_path / "s.safetensors"))
    net = AlexNet(Architecture("owt", 2, low_rank=8))
    fresh = net.fc8.weight[0].clone()
    assert take_over(net, [Label("zebra", "zebra"), LABELS[2]], given) == 1
    for name, tensor in given.net.state_dict().items():
        if not name.startswith("fc8"):
            assert torch.equal(net.state_dict()[name], tensor), name
    assert torch.equal(net.fc8.weight[0], fresh)
    assert torch.equal(net.fc8.weight[1], given.net.fc8.weight[2])
    assert torch.equal(net.fc8.bias[1], given.net.fc8.bias[2])


def tuned(data: Path, init: Path, **changes: object) -> TrainConfig:
    wanted = dict(
        epochs=1, batch_size=8, resolutions=((1.0, 64),), precision="fp32", threads=1, init=str(init)
    )
    return TrainConfig.of_recipe("finetune", data=str(data), **(wanted | changes))


def test_a_run_takes_the_checkpoint_s_shape_and_learns_other_classes(data: Path, tmp_path: Path) -> None:
    init = source(tmp_path / "secret-folder.safetensors")
    said: list[str] = []
    path = start(tuned(data, init, learning_rate=0.0), tmp_path / "run", resume=False, say=said.append)
    assert said[0] == f"started from {init}: 1 classes known, 1 new"
    begun, tuned_net = TrainConfig.read(tmp_path / "run" / "config.json"), checkpoints.load(path)
    assert (begun.variant, begun.low_rank, begun.batch_norm) == ("owt", 8, False)
    assert tuned_net.net.architecture == Architecture("owt", 2, low_rank=8)
    assert [label.name for label in tuned_net.labels] == ["Golf_Ball", "my dog"]
    given = checkpoints.load(init).net
    moved = tuned_net.net.state_dict()["conv1.weight"] - given.state_dict()["conv1.weight"]
    assert not moved.any(), "a rate of 0 moves nothing"
    assert torch.equal(tuned_net.net.fc8.weight[0], given.fc8.weight[1])
    assert tuned_net.facts["training"]["init"] == init.name, "no one's folders"

    init.unlink()  # a run that goes on needs it no longer
    assert start(tuned(data, init), tmp_path / "run", resume=True) == path


def test_a_new_last_layer_learns_faster_than_the_others(data: Path, tmp_path: Path) -> None:
    from model.train import Trainer

    config = tuned(data, source(tmp_path / "s.safetensors"))
    trainer = Trainer(config.starting_from(Architecture("owt", 3, low_rank=8)), tmp_path)
    rates = {
        name: group["rate"]
        for group in trainer.learner.optimizer.param_groups
        for name, parameter in trainer.net.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert rates.pop("fc8.weight") == rates.pop("fc8.bias") == 10
    assert set(rates.values()) == {1}


def test_fine_tuning_without_a_checkpoint_or_with_a_broken_one_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="finetune starts from a checkpoint: give it with --init"):
        TrainConfig.of_recipe("finetune", data=str(data))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(source(tmp_path / "s.safetensors").read_bytes()[:999])
    with pytest.raises(CheckpointError, match="broken"):
        start(tuned(data, broken), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_a_checkpoint_and_an_earlier_configuration(data: Path, tmp_path: Path) -> None:
    """`--config` gives a run's config.json back, the flags change it."""
    earlier = tuned(data, tmp_path / "absent.safetensors", epochs=7, label_smoothing=0.05)
    Run(tmp_path / "earlier").begin(earlier)
    file = tmp_path / "earlier" / "config.json"
    done = run_alexnet(
        "train", data, "--config", file, "--epochs", "3", "--init", tmp_path / "gone", "--run", tmp_path / "r"
    )
    assert done.returncode == 1
    assert "gone: no such checkpoint" in done.stderr
    both = run_alexnet("train", data, "--config", file, "--recipe", "paper", "--run", tmp_path / "r")
    assert both.returncode == 1
    assert "names its recipe already; leave --recipe away" in both.stderr


def test_flags_change_a_given_configuration_and_nothing_else(data: Path, tmp_path: Path) -> None:
    from commands.train import train_config

    earlier = tuned(data, tmp_path / "s", epochs=7, label_smoothing=0.05)
    Run(tmp_path).begin(earlier)
    given = dict(data="elsewhere", epochs=3, seed=None, compile=None)
    read = train_config(tmp_path / "config.json", None, given)
    assert read == replace(earlier, data="elsewhere", epochs=3)
    assert train_config(None, None, dict(data="x", init="c")).recipe == "finetune"
    assert train_config(None, None, dict(data="x")).recipe == "modern"
    assert json.loads((tmp_path / "config.json").read_text())["label_smoothing"] == 0.05
