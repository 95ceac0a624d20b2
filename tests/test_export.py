"""Export and publish: what becomes visible is complete and answers as the network does."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support import ROOT, tiny_repository
from tritonclient.grpc import model_config_pb2

from export.config import check_config, check_file, config_text, parse_config
from export.forms import fp32
from export.gate import check_parity, generated_crops
from export.golden import SIZES
from export.publish import _sweep, publish
from export.to_onnx import ExportError, check_readable, to_onnx
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, sha256
from model.compress import round_to_half
from model.net import AlexNet, Architecture, initialise_kaiming
from serving.contract import INPUT_NAME, OUTPUT_NAME
from serving.golden import Golden
from serving.postprocess import Label, read_labels
from serving.repository import latest_version

LABELS = [Label("n01440764", "tench"), Label("own", "own"), Label("n03028079", "church: building")]


@pytest.fixture(scope="module")
def net() -> AlexNet:
    """The 2012 network with three classes and thin fully connected layers, random FP16 weights."""
    torch.manual_seed(5)
    net = AlexNet(Architecture("2012", 3, low_rank=16))
    initialise_kaiming(net)
    torch.nn.init.normal_(net.fc8.weight, std=0.2)  # probabilities that differ between images
    return round_to_half(net).eval()


@pytest.fixture(scope="module")
def source(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    checkpoints.save(path, Checkpoint(net, LABELS, {"accuracy": {"top1_ten": 0.25}}), torch.float16)
    return path


@pytest.fixture(scope="module")
def published(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of version 1 of a model published from `source`."""
    repository = tmp_path_factory.mktemp("repository")
    loaded = checkpoints.load(source)
    form = fp32(loaded.net, half_storage=True)
    return publish(loaded, source, repository, "alexnet", form=form)


@pytest.fixture(scope="module")
def file(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(net, path)
    return path


def test_a_published_version_is_complete(published: Path, source: Path) -> None:
    assert published.name == "1"
    assert sorted(path.name for path in published.iterdir()) == [
        "golden",
        "model.onnx",
        "provenance.json",
        "square.onnx",
    ]
    assert sorted(path.name for path in published.parent.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert list(read_labels(published.parent / "labels.txt")) == LABELS
    provenance = json.loads((published / "provenance.json").read_text())
    assert provenance["checkpoint"]["sha256"] == sha256(source)
    assert provenance["model"]["sha256"] == sha256(published / "model.onnx")
    assert provenance["accuracy"] == {"top1_ten": 0.25}
    assert provenance["parity"]["max_abs_difference"] <= 1e-5
    assert provenance["classes"] == 3
    version = latest_version(published.parent.parent, "alexnet")
    assert (version.number, version.labels, version.precision) == ("1", tuple(LABELS), "fp32")


def test_the_file_answers_as_the_network_in_any_batch(published: Path, net: AlexNet) -> None:
    session = onnxruntime.InferenceSession(str(published / "model.onnx"))
    for count in (1, 2, 7, 10, 33):
        crops = np.random.default_rng(count).integers(0, 256, (count, 224, 224, 3), np.uint8)
        got = session.run([OUTPUT_NAME], {INPUT_NAME: crops})[0]
        with torch.inference_mode():
            expected = net(torch.from_numpy(crops)).numpy()
        assert np.abs(got - expected).max() <= 1e-5
        np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)


def test_the_graph_keeps_the_contract_and_names_no_path(file: Path) -> None:
    model = onnx.load(file)
    (images,), (probabilities,) = model.graph.input, model.graph.output
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in images.type.tensor_type.shape.dim][1:] == [224, 224, 3]
    assert images.type.tensor_type.shape.dim[0].dim_param
    assert probabilities.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    kinds = {node.op_type for node in model.graph.node}
    assert "AveragePool" not in kinds
    assert "Pow" not in kinds, "LRN in the form that is slow on a CPU"
    assert str(ROOT).encode() not in file.read_bytes()
    assert b".py" not in file.read_bytes()


def test_a_graph_too_new_for_a_server_is_refused(file: Path) -> None:
    model = onnx.load(file)
    check_readable(model)
    model.ir_version = 11
    with pytest.raises(ExportError, match=r"ONNX Runtime 1\.18 reads opset 21 and IR version 10"):
        check_readable(model)
    model.ir_version, model.opset_import[0].version = 10, 21
    with pytest.raises(ExportError, match="TensorRT 10 reads opset 20"):
        check_readable(model)


def test_half_storage_halves_the_file_and_changes_no_bit(net: AlexNet, file: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    to_onnx(net, half, half_storage=True)
    assert half.stat().st_size < 0.6 * file.stat().st_size
    crops = generated_crops(4, seed=9)
    answers = [
        onnxruntime.InferenceSession(str(path)).run(None, {INPUT_NAME: crops})[0] for path in (file, half)
    ]
    np.testing.assert_array_equal(*answers)


def test_half_storage_of_weights_that_fp16_cannot_hold_is_refused(net: AlexNet, tmp_path: Path) -> None:
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.conv3.weight.mul_(1.0001)  # type: ignore[union-attr, operator]
    with pytest.raises(ExportError, match="not exact in FP16"):
        to_onnx(other, tmp_path / "model.onnx", half_storage=True)


def _bgr(net: AlexNet) -> None:
    net.conv1.weight.copy_(net.conv1.weight.flip(1))  # type: ignore[union-attr, operator]


def _no_normalisation(net: AlexNet) -> None:
    net.mean.zero_()
    assert net.inverse_std is not None
    net.inverse_std.fill_(1)


def _swapped_labels(net: AlexNet) -> None:
    net.fc8.weight.copy_(net.fc8.weight[[1, 0, 2]])


def _one_corrupted_weight(net: AlexNet) -> None:
    net.conv4.weight[17, 3, 1, 1] += 8  # type: ignore[union-attr, index, operator]


def _not_finite(net: AlexNet) -> None:
    net.fc8.bias[1] = float("nan")


@pytest.mark.parametrize(
    "spoil", [_bgr, _no_normalisation, _swapped_labels, _one_corrupted_weight, _not_finite]
)
def test_the_gate_refuses_a_wrong_export(net: AlexNet, tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    wrong = copy.deepcopy(net)
    with torch.no_grad():
        spoil(wrong)
    to_onnx(wrong, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"max \|dp\||not finite"):
        check_parity(net, tmp_path / "model.onnx", generated_crops(16))


def test_the_gate_refuses_a_fixed_batch_and_another_width(net: AlexNet, file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    fixed = tmp_path / "fixed.onnx"
    onnx.save(model, fixed)
    with pytest.raises(ExportError):
        check_parity(net, fixed, generated_crops(4))
    wider = AlexNet(Architecture("2012", 4, low_rank=16))
    with pytest.raises(ExportError, match="batch 1: the file gives"):
        check_parity(wider, file, generated_crops(4))


def test_a_failed_gate_publishes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ExportError("parity gate: no")

    monkeypatch.setattr("export.publish.check_parity", refuse)
    with pytest.raises(ExportError, match="parity gate"):
        publish(checkpoints.load(source), source, tmp_path, "alexnet")
    assert list((tmp_path / "alexnet").iterdir()) == []


def test_other_labels_need_another_name(source: Path, published: Path) -> None:
    changed = checkpoints.load(source)
    changed.labels.reverse()
    with pytest.raises(ExportError, match="--name"):
        publish(changed, source, published.parent.parent, "alexnet")
    changed.labels.pop()
    with pytest.raises(ExportError, match="3 outputs, but 2 labels"):
        publish(changed, source, published.parent.parent, "other")
    assert sorted(p.name for p in published.parent.iterdir()) == ["1", "config.pbtxt", "labels.txt"]


def test_the_configuration_is_triton_s_own_and_checked(tmp_path: Path) -> None:
    text = config_text("alexnet", 1000)
    config = parse_config(text)
    assert (config.name, config.backend) == ("alexnet", "onnxruntime")
    check_config(text, 1000)
    with pytest.raises(ExportError, match="declares"):
        check_config(text, 999)
    with pytest.raises(ExportError, match=r"\d+:1 : .*inputs"):
        parse_config(text.replace("input {", "inputs {"))
    with pytest.raises(ExportError, match="max_batch_size"):
        check_config(text.replace("max_batch_size: 80", "max_batch_size: -1"), 1000)
    with pytest.raises(ExportError, match=r"batches of \[90\] are not in 1..80"):
        check_config(text.replace("preferred_batch_size: 40", "preferred_batch_size: 90"), 1000)
    twice = 'parameters { key: "precision" value { string_value: "int8" } }'
    with pytest.raises(ExportError, match="one key of a map twice"):
        check_config(text + twice, 1000)


def test_the_configuration_is_one_that_a_triton_engineer_would_write() -> None:
    config = parse_config(config_text("alexnet", 1000, "int8"))
    batching = config.dynamic_batching
    assert all(size % 10 == 0 for size in batching.preferred_batch_size)
    assert max(batching.preferred_batch_size) == config.max_batch_size
    policy = batching.default_queue_policy
    assert policy.max_queue_size > 32 and policy.default_timeout_microseconds > 0
    assert policy.allow_timeout_override
    assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_AUTO]
    assert [warm.batch_size for warm in config.model_warmup] == [1, 10, config.max_batch_size]
    assert config.version_policy.latest.num_versions == 2
    assert config.input[0].format == model_config_pb2.ModelInput.FORMAT_NHWC
    assert config.output[0].label_filename == "labels.txt"
    assert config.parameters["precision"].string_value == "int8"


def test_a_configuration_that_disagrees_with_the_file_is_refused(file: Path, tmp_path: Path) -> None:
    text = config_text("alexnet", 3)
    check_file(text, file)
    for wrong in (
        text.replace('"probabilities"', '"scores"'),
        text.replace("dims: 3\n  label", "dims: 4\n  label"),
        text.replace("TYPE_UINT8", "TYPE_FP32"),
    ):
        assert wrong != text
        with pytest.raises(ExportError, match="declares"):
            check_file(wrong, file)
    model = onnx.load(file)
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(ExportError, match="batch dimension is fixed at 1"):
        check_file(text, tmp_path / "fixed.onnx")


def test_the_committed_sample_s_configuration_is_what_export_writes() -> None:
    folder = ROOT / "model_repository" / "alexnet"
    assert (folder / "config.pbtxt").read_text() == config_text("alexnet", 10, "fp32")


PUBLISHER = """
import io, os, sys
from pathlib import Path
import export.publish as p
from export.forms import Form, Precision
from export.gate import FP32_BOUNDS, Parity
from model.checkpoint import load
model, source, repository = map(Path, sys.argv[1:])
whole = model.read_bytes()
def write(path):
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(whole), 4096):
            file.write(whole[start : start + 4096])
form = Form(Precision.FP32, write, FP32_BOUNDS)
p.check_parity = lambda *_: Parity(1, (1,), 0.0, 0.0, 1.0, FP32_BOUNDS)
loaded = load(source)
images = p.generated_crops(1)
for _ in sys.stdin:
    publisher = os.fork()
    if publisher == 0:
        while True:
            p.publish(loaded, source, repository, "alexnet", form=form, images=images)
    print(publisher, flush=True)
    os.waitpid(publisher, 0)
    print("gone", flush=True)
"""


def test_kill_9_while_publishing_leaves_no_incomplete_version(source: Path, tmp_path: Path) -> None:
    """Fifty publishers, killed at random moments. They are forked by a process that has loaded what
    they need; what they skip is the parity gate, so that most of their time is spent writing."""
    model = tiny_repository(tmp_path / "tiny", classes=len(LABELS)) / "alexnet" / "1" / "model.onnx"
    repository = tmp_path / "repository"
    folder = repository / "alexnet"
    forker = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(model), str(source), str(repository)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert forker.stdin is not None and forker.stdout is not None
    rng = np.random.default_rng(3)
    cut_short, published, one_takes_s = 0, 0, 0.0
    for kill in range(50):
        forker.stdin.write("\n")
        forker.stdin.flush()
        publisher = int(forker.stdout.readline())
        started = time.monotonic()
        if kill % 2 == 0:  # every other one is killed in its second version, so that some are published
            while not (folder / str(published + 1)).exists():
                time.sleep(0.005)
            one_takes_s = time.monotonic() - started
        time.sleep(rng.uniform(0, one_takes_s))
        os.kill(publisher, signal.SIGKILL)
        assert forker.stdout.readline() == "gone\n"
        cut_short += any(folder.glob(".staging-*"))
        versions = sorted(folder.glob("[1-9]*"), key=lambda version: int(version.name))
        published = int(versions[-1].name)
        for version in versions[-3:]:
            assert (version / "model.onnx").read_bytes() == model.read_bytes()
            assert json.loads((version / "provenance.json").read_text())["precision"] == "fp32"
            golden = Golden.read(version)
            assert golden is not None and len(golden.images) == len(SIZES)
    forker.communicate(timeout=20)
    assert cut_short > 10, "the moments were not spread over the writing"
    assert latest_version(repository, "alexnet").labels == tuple(LABELS)
    (folder / ".staging-7-999999999").mkdir()
    _sweep(folder)
    assert not list(folder.glob(".staging-*")), "what the killed ones left is swept"
