"""Checkpoints: what goes in comes out, damage is named, the old file survives a crash."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "alexnet-checkpoint-9"}, "not a checkpoint of this project"),
        ({"architecture": "{"}, "header is damaged"),
        ({"architecture": "[1]"}, "header is damaged"),
        ({"architecture": json.dumps({"variant": "vgg"})}, "header is damaged"),
        ({"architecture": json.dumps({"variant": "owt", "future": 1})}, "header is damaged"),
        ({"architecture": json.dumps({"variant": "owt", "classes": 10**9})}, "weights do not fit"),
        ({"architecture": json.dumps({"variant": "owt", "classes": 10**30})}, "header is damaged"),
        ({"architecture": json.dumps({"variant": "2012", "classes": 2})}, "weights do not fit"),
        ({"labels": "[]"}, "0 labels for 2 classes"),
        ({"labels": '[{"name": "tench"}]'}, "header is damaged"),
        ({"facts": "nothing"}, "header is damaged"),
    ],
)
def test_a_header_that_does_not_fit_is_named(
    net: AlexNet, path: Path, changes: dict[str, str], words: str
) -> None:
    save_file(net.state_dict(), path, metadata=header_of(path) | changes)
    with pytest.raises(CheckpointError, match=rf"net\.safetensors: .*{words}"):
        load(path)


def test_missing_and_misshapen_weights_are_named(net: AlexNet, path: Path) -> None:
    header, weights = header_of(path), net.state_dict()
    del weights["fc8.bias"]
    weights["conv2.weight"] = weights["conv2.weight"][:, :5].clone()
    weights["conv9.weight"] = torch.zeros(1)
    save_file(weights, path, metadata=header)
    with pytest.raises(CheckpointError, match=r"conv2\.weight, conv9\.weight, fc8\.bias"):
        load(path)


def test_batch_norm_s_counters_stay_whole_numbers_in_half_precision(tmp_path: Path) -> None:
    net = AlexNet(Architecture("owt", 2, low_rank=4, batch_norm=True))
    net.get_buffer("bn6.num_batches_tracked").fill_(1_234_567)
    save(tmp_path / "net", Checkpoint(net, LABELS), torch.float16)
    assert load(tmp_path / "net").net.get_buffer("bn6.num_batches_tracked") == 1_234_567


def test_a_disk_that_fills_while_writing_leaves_the_old_file(net: AlexNet, path: Path) -> None:
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(CheckpointError, match=r"net\.safetensors cannot be written \(.*too large"):
            save(path, Checkpoint(net, []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told(net: AlexNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/net cannot be written"):
        save(tmp_path / "file" / "net", Checkpoint(net, LABELS))
