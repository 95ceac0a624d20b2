"""The ten crops of a square share their first layers, and nobody can tell from the answers."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import support
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper
from support import encoded, picture, tiny_repository

from export.calibration import observe
from export.gate import generated_crops, onnx_predictor
from export.publish import publish
from export.square import MAX_DIFFERENCE, NotShareable, Window, check_square, write_square
from export.to_int8 import int8_graph
from export.to_onnx import ExportError, to_onnx
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, sha256
from model.net import VARIANTS, AlexNet
from serving.backends import OnnxRuntimeBackend
from serving.contract import MODEL_FILE, SQUARE_FILE, VIEWS, Crops
from serving.errors import ModelNotReady
from serving.postprocess import Label, Probabilities
from serving.preprocess import Pixels, cut_crops, decode_square

CLASSES = 7

random_net = partial(support.random_net, classes=CLASSES, conv1=0.1, spread=2)


@pytest.fixture(scope="module")
def net() -> AlexNet:
    return random_net()


@pytest.fixture(scope="module")
def square() -> Pixels:
    """A random picture with structure at all scales, noise included."""
    return decode_square(encoded(picture(3, 300, 270), "PNG"))


@pytest.fixture(scope="module")
def version(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published version."""
    folder = tmp_path_factory.mktemp("square")
    labels = [Label(f"n{number:08}", f"class {number}") for number in range(CLASSES)]
    source = folder / "net.safetensors"
    checkpoints.save(source, Checkpoint(net, labels, {}))
    return publish(checkpoints.load(source), source, folder / "repository", "alexnet")


def both(folder: Path, square: Pixels) -> tuple[Probabilities, Probabilities]:
    """What model.onnx says of the ten crops, and square.onnx of the square."""
    ten = onnx_predictor(folder / MODEL_FILE)(cut_crops(square, Crops.TEN))
    return ten, onnx_predictor(folder / SQUARE_FILE)(square[None])


@pytest.mark.parametrize("low_rank", [24, None])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_square_is_answered_as_its_ten_crops_one_by_one(
    precision: str,
    variant: str,
    low_rank: int | None,
    square: Pixels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("model.net.HIDDEN", 256)
    net = random_net(variant, low_rank)
    if precision == "fp32":
        to_onnx(net, tmp_path / MODEL_FILE)
    else:
        calibration = observe(net, generated_crops(16, seed=1)).calibrate("max")
        onnx.save(int8_graph(net, calibration), tmp_path / MODEL_FILE)
    write_square(tmp_path / MODEL_FILE, tmp_path / SQUARE_FILE)
    ten, shared = both(tmp_path, square)
    assert np.abs(ten - ten[::-1]).max() > 0.01, "the crops' answers differ"
    np.testing.assert_allclose(shared, ten, rtol=0, atol=MAX_DIFFERENCE)


def test_it_takes_crops_as_the_model_s_own_file_does(version: Path) -> None:
    crops = generated_crops(3, seed=5)
    for count in (1, 2, 3):
        expected = onnx_predictor(version / MODEL_FILE)(crops[:count])
        got = onnx_predictor(version / SQUARE_FILE)(crops[:count])
        np.testing.assert_allclose(got, expected, rtol=0, atol=MAX_DIFFERENCE)


def test_the_weights_are_not_written_twice(version: Path) -> None:
    assert (version / SQUARE_FILE).stat().st_size < 100_000 < (version / MODEL_FILE).stat().st_size


def test_a_published_version_tells_how_far_a_square_s_answers_are_from_its_crops(version: Path) -> None:
    told = json.loads((version / "provenance.json").read_text())["square"]
    assert told["sha256"] == sha256(version / SQUARE_FILE)
    assert told["images"] == 16 and told["max_abs_difference"] <= MAX_DIFFERENCE


def test_a_graph_that_answers_otherwise_is_refused(version: Path, tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes((version / MODEL_FILE).read_bytes())
    write_square(tmp_path / MODEL_FILE, tmp_path / SQUARE_FILE)
    graph = onnx.load(tmp_path / SQUARE_FILE, load_external_data=False)
    (choice,) = (node for node in graph.graph.node if node.op_type == "If")
    branch = next(a.g for a in choice.attribute if a.name == "then_branch")
    joins = [node for node in branch.node if node.op_type == "Concat"]
    joins[-1].input[:] = list(joins[-1].input)[::-1]  # the crops in another order
    onnx.save(graph, tmp_path / SQUARE_FILE)
    with pytest.raises(ExportError, match="between a square and its ten crops"):
        check_square(tmp_path / MODEL_FILE, tmp_path / SQUARE_FILE, generated_crops(2))


def test_a_network_that_does_not_begin_with_convolutions_shares_nothing(tmp_path: Path) -> None:
    file = tiny_repository(tmp_path) / "alexnet" / "1" / MODEL_FILE
    with pytest.raises(NotShareable, match="two convolutions"):
        write_square(file, tmp_path / SQUARE_FILE)
    assert not (tmp_path / SQUARE_FILE).exists()


def test_crops_that_lie_in_between_the_steps_share_nothing(version: Path, tmp_path: Path) -> None:
    model = onnx.load(version / MODEL_FILE)
    conv1 = next(node for node in model.graph.node if node.op_type == "Conv")
    for attribute in conv1.attribute:
        if attribute.name == "strides":
            attribute.ints[:] = [5, 5]
    onnx.save(model, tmp_path / MODEL_FILE)
    with pytest.raises(NotShareable, match="multiple of 10 pixels"):
        write_square(tmp_path / MODEL_FILE, tmp_path / SQUARE_FILE)


def test_the_engine_answers_a_square_the_same_with_and_without_the_graph(
    version: Path, square: Pixels, tmp_path: Path
) -> None:
    with_graph = ask(version.parent.parent, square)
    bare = tmp_path / "alexnet" / "1"
    bare.mkdir(parents=True)
    (bare / MODEL_FILE).write_bytes((version / MODEL_FILE).read_bytes())
    (tmp_path / "alexnet" / "labels.txt").write_text((version.parent / "labels.txt").read_text())
    without = ask(tmp_path, square)
    assert with_graph.shape == (len(VIEWS), CLASSES)
    np.testing.assert_allclose(with_graph, without, rtol=0, atol=MAX_DIFFERENCE)


def test_a_damaged_graph_is_named_and_its_version_not_served(version: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alexnet" / "1"
    folder.mkdir(parents=True)
    (tmp_path / "alexnet" / "labels.txt").write_text((version.parent / "labels.txt").read_text())
    (folder / MODEL_FILE).write_bytes((version / MODEL_FILE).read_bytes())
    (folder / SQUARE_FILE).write_bytes((version / SQUARE_FILE).read_bytes()[:-1000])
    with pytest.raises(ModelNotReady, match=SQUARE_FILE):
        ask(tmp_path, np.zeros((256, 256, 3), np.uint8))


def ask(repository: Path, square: Pixels) -> Probabilities:
    """The embedded engine's answer to a square."""
    async def answer() -> Probabilities:
        backend = OnnxRuntimeBackend(repository, "alexnet", 1)
        await backend.start()
        try:
            return (await backend.infer(square[None])).probabilities
        finally:
            await backend.close()

    return asyncio.run(answer())


def node(kind: str, size: int, stride: int, pad: int) -> NodeProto:
    return helper.make_node(
        kind, ["x"], ["y"], kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4
    )


@settings(max_examples=60, deadline=None)
@given(
    conv=st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 3)),
    pool=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    inputs=st.integers(20, 40),
    spoilt=st.integers(0, 4),
)
def test_a_window_tells_which_outputs_depend_on_what_lies_at_the_edges(
    conv: tuple[int, int, int], pool: tuple[int, int], inputs: int, spoilt: int
) -> None:
    """Against torch: which outputs change with the padding's place and the spoilt inputs."""
    size, stride, pad = conv
    assume(pad < size)
    window = Window.of([node("Conv", size, stride, pad), node("MaxPool", *pool, 0)])
    assume(window.near(spoilt) + window.far(spoilt, inputs) < window.outputs(inputs))

    def through(values: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(values[None, None], (pad, pad), value=-1e6)
        convolved = torch.nn.functional.conv1d(padded, torch.ones(1, 1, size), stride=stride)
        return torch.nn.functional.max_pool1d(convolved.neg(), *pool)[0, 0]  # -1e6 wins once negated

    values = torch.rand(inputs)
    values[:spoilt] = values[inputs - spoilt :] = -1e6
    touched = through(values) > 1e5
    assert len(touched) == window.outputs(inputs)
    clean = (~touched).nonzero().flatten()
    assert clean[0] == window.near(spoilt)
    assert len(touched) - 1 - clean[-1] == window.far(spoilt, inputs)


def test_a_stage_that_pads_in_its_middle_is_refused() -> None:
    with pytest.raises(NotShareable, match="padding in between"):
        Window.of([node("Conv", 3, 1, 1), node("Conv", 3, 1, 1)])
