"""Checkpoints: what goes in comes out, damage is named, the old file survives a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, CheckpointError, load, save
from model.net import AlexNet, Architecture
from serving.postprocess import Label

LABELS = [Label("n01440764", "tench"), Label("own class: yes", "own class: yes")]


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(Architecture("owt", 2, low_rank=4))


@pytest.fixture
def path(net: AlexNet, tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "net.safetensors"
    save(path, Checkpoint(net, LABELS, {"accuracy": {"top1_ten": 0.5}, "note": "ü"}))
    return path


def test_weights_labels_and_facts_survive(net: AlexNet, path: Path) -> None:
    read = load(path)
    assert read.net.architecture == net.architecture
    assert read.labels == LABELS
    assert read.facts == {"accuracy": {"top1_ten": 0.5}, "note": "ü"}
    assert not read.net.training
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(read.net.state_dict()[name], tensor, rtol=0, atol=0)


def test_half_precision_rounds_to_the_nearest_and_halves_the_file(net: AlexNet, path: Path) -> None:
    half = path.with_name("half.safetensors")
    save(half, Checkpoint(net, LABELS), torch.float16)
    assert half.stat().st_size < 0.55 * path.stat().st_size
    for name, tensor in load(half).net.state_dict().items():
        torch.testing.assert_close(tensor, net.state_dict()[name].half().float(), rtol=0, atol=0)


def test_missing_damaged_and_foreign_files_are_named(net: AlexNet, path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.safetensors: no such"):
        load(tmp_path / "absent.safetensors")
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1000], b"PK" + whole[2:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            load(path)
    save_file(net.state_dict(), path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load(path)


def test_weights_of_another_architecture_are_refused(net: AlexNet, path: Path) -> None:
    header, _ = checkpoints._read(path)
    save_file({"conv1.weight": torch.zeros(1)}, path, metadata=dict(header))
    with pytest.raises(CheckpointError, match="weights do not fit"):
        load(path)


def test_a_crash_while_writing_leaves_the_old_file(
    net: AlexNet, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(path, Checkpoint(net, LABELS))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
