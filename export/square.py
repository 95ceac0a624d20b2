"""The ten crops of one photograph share what they have in common: conv1 and conv2 are computed once.

The ten windows lie 16 or 32 pixels apart in the 256x256 square, a whole number of the steps in which conv1
and pool1 walk over it (4 and 8 pixels). So what a layer answers inside a crop is what it answers on the
whole square, except near an edge of the crop that is no edge of the square: there it sees padding in place of
the pixels beyond. Those strips are computed for each crop, everything else once for the square and once
for its mirror image. The answers are those of the ten crops, for a fifth less time.

Sources: Krizhevsky et al. 2012, section 4.1, for the ten crops; Sermanet et al. 2014, "OverFeat", section
3.5, for convolutions that overlapping windows share, which is made exact here.

The graph stands in `square.onnx` beside `model.onnx`, out of which it reads the weights. It takes both:

    images  uint8 [N, 224, 224, 3]  ->  probabilities  float32 [N, classes]
    images  uint8 [1, 256, 256, 3]  ->  probabilities  float32 [10, classes], in the order of `contract.VIEWS`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, shape_inference

from export.gate import onnx_predictor
from export.to_onnx import ExportError
from export.writer import COLUMNS, END, ROWS, Constants, Writer
from serving.contract import CROP_OFFSETS, CROP_SIZE, INPUT_NAME, RESIZE_SIZE, VIEWS, Crops
from serving.preprocess import Pixels, cut_crops

_INSIDE_BYTES: Final = 1024
"""Tensors smaller than this are written into the graph; larger ones are read out of model.onnx."""

MAX_DIFFERENCE: Final = 1e-6
"""Of any probability between a square's answers and its crops': the same sums, in the same order mostly."""


def write_square(model_file: Path, path: Path) -> None:
    """Write the graph to `path`, in the folder of `model_file`.

    Raises NotShareable for a network that does not begin with convolution, pool, convolution, pool, or
    whose steps do not fit in between the crops.
    """
    model = onnx.load(model_file)
    parts = _Parts.of(model)
    constants = Constants.of(model.graph, INPUT_NAME)
    crops = Writer("crops", constants, [parts.turn, *parts.first, *parts.second])
    square = Writer("square", constants)
    features = _shared(square, parts)
    branches: dict[str, Any] = {
        "then_branch": square.graph("square", [], [parts.features(features)]),
        "else_branch": crops.graph("crops", [], [parts.features(parts.output)]),
    }
    main = Writer("main", constants)
    rows = main.add("Shape", [INPUT_NAME], start=1, end=2)
    is_square = main.add("Squeeze", [main.add("Equal", [rows, main.integers(RESIZE_SIZE)])])
    main.nodes.append(helper.make_node("If", [is_square], [parts.output], **branches))
    main.nodes.extend(parts.rest)
    given, answer = model.graph.input[0], model.graph.output[0]
    for dimension, name in zip(given.type.tensor_type.shape.dim, ("images", "rows", "columns"), strict=False):
        dimension.dim_param = name
    answer.type.tensor_type.shape.dim[0].dim_param = "crops"
    model.graph.CopyFrom(main.graph(model.graph.name, [given], [answer]))
    _write_beside(model, model_file, path)


@dataclass(frozen=True)
class Sameness:
    """How far the ten answers to a square were from those to its ten crops, in any probability."""

    images: int
    max_abs_difference: float


def check_square(model_file: Path, square_file: Path, crops: Pixels) -> Sameness:
    """Ask both files; raises ExportError where the graph does not answer a square as its crops.

    `crops`: uint8 [N, 224, 224, 3], which become squares by repeating what is near their edges.
    """
    margin = (RESIZE_SIZE - CROP_SIZE) // 2
    of_crops, of_square = onnx_predictor(model_file), onnx_predictor(square_file)
    worst = 0.0
    for crop in crops:
        square = np.pad(crop, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
        ten = cut_crops(square, Crops.TEN)
        expected = of_crops(ten)
        for got in (of_square(square[None]), of_square(ten)):
            worst = max(worst, float(np.abs(got - expected).max()))
    if not worst <= MAX_DIFFERENCE:
        raise ExportError(
            f"{square_file.name}: max |dp| {worst:.2e} between a square and its ten crops is over the bound "
            f"{MAX_DIFFERENCE:.0e}; nothing was published"
        )
    return Sameness(len(crops), worst)


class NotShareable(ExportError):
    """The network's first layers cannot be shared by the crops of a square."""


@dataclass(frozen=True)
class Window:
    """What an output sees along an axis: `size` inputs, from `stride * output - pad` on."""

    size: int = 1
    stride: int = 1
    pad: int = 0

    @classmethod
    def of(cls, nodes: Sequence[NodeProto]) -> Window:
        """Of nodes in a row; raises NotShareable where another than the first pads."""
        window = cls()
        for node in nodes:
            window = window._then(node)
        return window

    def _then(self, node: NodeProto) -> Window:
        if node.op_type not in ("Conv", "MaxPool"):
            return self
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        sizes, strides, pads = (
            {int(number) for number in given.get(name, [default])}
            for name, default in (("kernel_shape", 1), ("strides", 1), ("pads", 0))
        )
        if max(map(len, (sizes, strides, pads))) > 1 or (pads != {0} and self != Window()):
            raise NotShareable(f"{node.name or node.output[0]}: not a square window, or padding in between")
        (size,), (stride,), (pad,) = sizes, strides, pads
        return Window(self.size + (size - 1) * self.stride, self.stride * stride, self.pad + pad)

    def outputs(self, inputs: int) -> int:
        """How many there are of so many inputs."""
        return (inputs + 2 * self.pad - self.size) // self.stride + 1

    def near(self, spoilt: int) -> int:
        """How many outputs at the near edge see padding, or one of the first `spoilt` inputs."""
        return -(-(spoilt + self.pad) // self.stride)

    def far(self, spoilt: int, inputs: int) -> int:
        """The same at the far edge of so many inputs."""
        return self.outputs(inputs) - 1 - (inputs - spoilt - self.size + self.pad) // self.stride


@dataclass(frozen=True)
class _Parts:
    """A network's nodes, in order: pixels into maps, two stages that end with a pool each, all the rest."""

    turn: NodeProto
    first: Sequence[NodeProto]
    second: Sequence[NodeProto]
    rest: Sequence[NodeProto]
    _features: onnx.ValueInfoProto

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Parts:
        constant = Constants.of(model.graph, INPUT_NAME).nodes
        nodes = [node for node in model.graph.node if node.output[0] not in constant]
        pools = [i + 1 for i, node in enumerate(nodes) if node.op_type == "MaxPool"][:2]
        if len(pools) < 2 or nodes[0].op_type != "Transpose":
            raise NotShareable("the network does not begin with two convolutions and pools")
        one, two = pools
        types = shape_inference.infer_shapes(model).graph.value_info
        features = next(value for value in types if value.name == nodes[two - 1].output[0])
        return cls(nodes[0], nodes[1:one], nodes[one:two], nodes[two:], features)

    @property
    def output(self) -> str:
        """Of the second stage."""
        return str(self.second[-1].output[0])

    def features(self, name: str) -> onnx.ValueInfoProto:
        """The second stage's output, under a name."""
        value = onnx.ValueInfoProto()
        value.CopyFrom(self._features)
        value.name = name
        value.type.tensor_type.shape.dim[0].dim_param = "crops"
        return value


@dataclass(frozen=True)
class _Place:
    """Where a crop's map lies in the whole's, and which of its edges lie inside the square."""

    side: int  # 0: the square, 1: its mirror image
    row: int
    column: int
    inside: frozenset[str]  # of top, bottom, left, right


def _places(step: int) -> list[_Place]:
    """Of `contract.VIEWS`, in a layer that takes one step in so many pixels."""
    edge = RESIZE_SIZE - CROP_SIZE
    places = []
    for position, mirrored in VIEWS:
        row, column = CROP_OFFSETS[position]
        column = edge - column if mirrored else column
        if row % step or column % step:
            raise NotShareable(f"the crops do not lie a multiple of {step} pixels apart")
        inner = {"top": row > 0, "bottom": row < edge, "left": column > 0, "right": column < edge}
        inside = frozenset(name for name, is_inside in inner.items() if is_inside)
        places.append(_Place(int(mirrored), row // step, column // step, inside))
    return places


def _shared(writer: Writer, parts: _Parts) -> str:
    """The second pool's output for the ten crops of a square."""
    square = writer.copy([parts.turn], INPUT_NAME)
    sides = writer.join([square, writer.mirrored(square)], 0)
    crops = [
        writer.cut(
            sides,
            batch=(place.side, place.side + 1),
            rows=(place.row, place.row + CROP_SIZE),
            columns=(place.column, place.column + CROP_SIZE),
        )
        for place in _places(1)
    ]
    maps = _Maps(sides, crops)
    for stage in (parts.first, parts.second):
        maps = maps.through(stage, writer)
    return writer.join(maps.crops, 0)


@dataclass(frozen=True)
class _Maps:
    """A layer's maps: of the square and its mirror image, [2, C, H, W], and of each crop, [1, C, n, n].

    `size`: n. `step`: of how many pixels a step in them is. `near`, `far`: how many rows or columns at an
    edge inside the square differ from those of the whole.
    """

    whole: str
    crops: Sequence[str]
    size: int = CROP_SIZE
    step: int = 1
    near: int = 0
    far: int = 0

    def through(self, stage: Sequence[NodeProto], writer: Writer) -> _Maps:
        """Those behind a stage: the whole's once, and each crop's as a part of it within its own strips."""
        window = Window.of(stage)
        size = window.outputs(self.size)
        behind = _Maps(
            writer.copy(stage, self.whole),
            [],
            size,
            self.step * window.stride,
            window.near(self.near),
            window.far(self.far, self.size),
        )
        strips = self._strips(stage, behind, writer)
        crops = [
            behind._assembled(place, {name: strips[name, i] for name in place.inside}, writer)
            for i, place in enumerate(_places(behind.step))
        ]
        return _Maps(behind.whole, crops, size, behind.step, behind.near, behind.far)

    def _strips(
        self, stage: Sequence[NodeProto], behind: _Maps, writer: Writer
    ) -> dict[tuple[str, int], str]:
        """By edge and crop, the rows or columns behind the stage that differ from the whole's."""
        window = Window.of(stage)
        pad = window.pad
        near = (0, (behind.near - 1) * window.stride - pad + window.size)
        far = ((behind.size - behind.far) * window.stride - pad, END)
        edges = {
            "top": ("rows", near, [pad, pad, 0, pad]),
            "bottom": ("rows", far, [0, pad, pad, pad]),
            "left": ("columns", near, [pad, pad, pad, 0]),
            "right": ("columns", far, [pad, 0, pad, pad]),
        }
        strips = {}
        for edge, (axis, part, pads) in edges.items():
            crops = [i for i, place in enumerate(_places(self.step)) if edge in place.inside]
            given = writer.join([writer.cut(self.crops[i], **{axis: part}) for i in crops], 0)
            made = writer.copy(stage, given, pads)
            strips.update({(edge, i): writer.cut(made, batch=(k, k + 1)) for k, i in enumerate(crops)})
        return strips

    def _assembled(self, place: _Place, strips: dict[str, str], writer: Writer) -> str:
        """One crop's map: a part of the whole between its own columns, and those between its own rows."""
        top, left = (self.near * (edge in strips) for edge in ("top", "left"))
        bottom, right = (self.size - self.far * (edge in strips) for edge in ("bottom", "right"))
        middle = writer.cut(
            self.whole,
            batch=(place.side, place.side + 1),
            rows=(place.row + top, place.row + bottom),
            columns=(place.column + left, place.column + right),
        )
        left_strip, right_strip = (
            [writer.cut(strips[edge], rows=(top, bottom))] if edge in strips else []
            for edge in ("left", "right")
        )
        level = writer.join([*left_strip, middle, *right_strip], COLUMNS)
        top_strip, bottom_strip = ([strips[edge]] if edge in strips else [] for edge in ("top", "bottom"))
        return writer.join([*top_strip, level, *bottom_strip], ROWS)


def _write_beside(model: onnx.ModelProto, model_file: Path, path: Path) -> None:
    """Write a graph whose large tensors are read out of `model_file`, where they stand."""
    data = model_file.read_bytes()
    graphs = [model.graph]
    for node in model.graph.node:
        graphs.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))
    for tensor in (tensor for graph in graphs for tensor in graph.initializer):
        _refer(tensor, model_file.name, data)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path, full_check=True)


def _refer(tensor: TensorProto, file: str, data: bytes) -> None:
    raw = tensor.raw_data
    if len(raw) < _INSIDE_BYTES:
        return
    offset = data.find(raw)
    if offset < 0:
        raise ExportError(f"{tensor.name} does not stand in {file} as it is")
    onnx.external_data_helper.set_external_data(tensor, file, offset, len(raw))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
