"""Writing ONNX graphs node by node: slices, joins, and a part of another graph on another input."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

AXES: Final = ("batch", "channels", "rows", "columns")  # NCHW
ROWS, COLUMNS = AXES.index("rows"), AXES.index("columns")
END: Final = 2**31 - 1

Range = tuple[int, int]


@dataclass(frozen=True)
class Constants:
    """What a graph knows without its input: tensors, and nodes that compute on them alone, by name."""

    tensors: dict[str, TensorProto]
    nodes: dict[str, NodeProto]

    @classmethod
    def of(cls, graph: GraphProto, given: str) -> Constants:
        """All that does not depend on the input `given`."""
        varying = {given}
        constant: dict[str, NodeProto] = {}
        for node in graph.node:
            if varying & set(node.input):
                varying |= set(node.output)
            else:
                constant.update(dict.fromkeys(node.output, node))
        return cls({tensor.name: tensor for tensor in graph.initializer}, constant)


@dataclass
class Writer:
    """A graph that is being written; its own names begin with `prefix`, constants come as they are used."""

    prefix: str
    constants: Constants
    nodes: list[NodeProto] = field(default_factory=list)
    _integers: dict[tuple[int, ...], TensorProto] = field(default_factory=dict)

    def add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        name = f"{self.prefix}.{kind.lower()}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def integers(self, *values: int) -> str:
        """A constant, int64 [values]."""
        if values not in self._integers:
            name = f"{self.prefix}.integers.{len(self._integers)}"
            self._integers[values] = numpy_helper.from_array(np.array(values, np.int64), name)
        return self._integers[values].name

    def cut(self, of: str, **ranges: Range) -> str:
        """From and up to where along each axis that is named: batch, rows or columns."""
        starts, ends = zip(*ranges.values(), strict=True)
        axes = [AXES.index(name) for name in ranges]
        return self.add("Slice", [of, self.integers(*starts), self.integers(*ends), self.integers(*axes)])

    def mirrored(self, of: str) -> str:
        """Columns from right to left."""
        backwards = [self.integers(number) for number in (END, -END, COLUMNS, -1)]
        return self.add("Slice", [of, *backwards])

    def join(self, parts: Sequence[str], axis: int) -> str:
        """One behind the other along an axis."""
        return parts[0] if len(parts) == 1 else self.add("Concat", parts, axis=axis)

    def copy(self, nodes: Sequence[NodeProto], given: str, pads: Sequence[int] | None = None) -> str:
        """Nodes again that stand in a row, on another input; returns the last one's output.

        `pads` [top, left, bottom, right] replaces those of nodes that pad.
        """
        tag = f"{self.prefix}.copy.{len(self.nodes)}"
        names = {nodes[0].input[0]: given}
        for node in nodes:
            twin = deepcopy(node)
            twin.name = f"{tag}.{node.name or node.output[0]}"
            twin.input[:] = [names.get(name, name) for name in node.input]
            names.update({name: f"{tag}.{name}" for name in node.output})
            twin.output[:] = [names[name] for name in node.output]
            for attribute in twin.attribute:
                if attribute.name == "pads" and pads is not None and any(attribute.ints):
                    attribute.ints[:] = pads
            self.nodes.append(twin)
        return names[nodes[-1].output[0]]

    def graph(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> GraphProto:
        """All that was written, with the constants that it uses."""
        tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in self._integers.values()}
        nodes: dict[str, NodeProto] = {}
        for node in self.nodes:
            self._collect(node, nodes, tensors)
        return helper.make_graph(list(nodes.values()), name, inputs, outputs, list(tensors.values()))

    def _collect(self, node: NodeProto, nodes: dict[str, NodeProto], tensors: dict[str, TensorProto]) -> None:
        """A node behind the constants that it needs."""
        for name in node.input:
            if name in self.constants.nodes:
                self._collect(self.constants.nodes[name], nodes, tensors)
            elif name in self.constants.tensors:
                tensors[name] = self.constants.tensors[name]
        nodes[node.output[0]] = node
