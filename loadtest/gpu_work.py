"""What an inference and a training step must compute and move, and the least time that takes a card.

Counted is the network's own work, layer by layer: each convolution or product reads its input and its
weights once and writes what the next one reads; all between (ReLU, LRN, pooling) costs nothing, as if it
were fused. An engine that moves more, or computes LRN as a product, has that against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from model.net import AlexNet, Architecture
from serving.contract import CHANNELS, CROP_SIZE

WIDTH: Final = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
"""Bytes of a number in memory; TF32 is a way to multiply FP32."""

SINGLE: Final = 4
BYTE: Final = 1


@dataclass(frozen=True)
class Layer:
    """A convolution or product: operations of one image, numbers that it reads and writes for it."""

    name: str
    flop: int
    """A product and a sum are two; biases are not counted."""
    weights: int
    """With biases; of the whole batch."""
    inputs: int
    outputs: int
    """What the next layer reads: after pooling, where there is one between."""


@dataclass(frozen=True)
class Work:
    """One thing that the card does from memory to memory."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """Of one card in one precision, measured: a large product's, and a large copy's (read and written)."""

    flop_s: float
    bytes_s: float


@dataclass(frozen=True)
class Achieved:
    """What a time means beside the card's own rates, 0..1.

    `of_floor`: the least time of the work, layer after layer, as a part of the time that was taken. Above 1
    where weights or maps stay in the card's cache, which the floor does not know.
    """

    flop_s: float
    of_matrix: float
    of_bandwidth: float
    of_floor: float


def layers(architecture: Architecture) -> list[Layer]:
    """In order, by shapes alone: no weight is made."""
    seen: list[tuple[str, nn.Module, int, int]] = []
    with torch.device("meta"):
        net = AlexNet(architecture).eval()
        images = torch.zeros(1, CROP_SIZE, CROP_SIZE, CHANNELS, dtype=torch.uint8)
    names = {module: name for name, module in net.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((names[module], module, inputs[0].numel(), output.numel()))

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note)
    with torch.inference_mode():
        classes = net(images).numel()
    read_next = [inputs for _, _, inputs, _ in seen[1:]] + [classes]
    return [
        Layer(name, 2 * outputs * _met(module), sum(p.numel() for p in module.parameters()), inputs, written)
        for (name, module, inputs, outputs), written in zip(seen, read_next, strict=True)
    ]


def _met(module: nn.Module) -> int:
    """Weights that each element of a layer's output meets: one group's."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight[0].numel()


def inference(network: Sequence[Layer], batch: int, width: int) -> list[Work]:
    """Of a batch, pixels uint8 in and probabilities FP32 out; `width`: bytes of a number between."""
    last = len(network) - 1
    return [
        Work(
            batch * layer.flop,
            width * layer.weights
            + batch * layer.inputs * (width if index else BYTE)
            + batch * layer.outputs * (width if index < last else SINGLE),
        )
        for index, layer in enumerate(network)
    ]


def training(network: Sequence[Layer], batch: int, width: int) -> list[Work]:
    """Of a step: forward, gradients of weights (FP32) and of inputs (but the pixels'), SGD with momentum."""
    work = inference(network, batch, width)
    for index, layer in enumerate(network):
        read = batch * layer.inputs * (width if index else BYTE)
        back = batch * layer.outputs * width
        work.append(Work(batch * layer.flop, read + back + SINGLE * layer.weights))
        if index:
            work.append(Work(batch * layer.flop, read + back + width * layer.weights))
    weights = sum(layer.weights for layer in network)
    reads_and_writes = 3 + 2  # weight, momentum and gradient; weight and momentum
    return [*work, Work(0, SINGLE * weights * reads_and_writes)]


def floor_s(work: Iterable[Work], rates: Rates) -> float:
    """The least seconds, one after the other: each takes the longer of computing and moving."""
    return sum(max(each.flop / rates.flop_s, each.bytes / rates.bytes_s) for each in work)


def achieved(work: Sequence[Work], rates: Rates, seconds: float) -> Achieved:
    """Work that took so long."""
    flop_s = sum(each.flop for each in work) / seconds
    bytes_s = sum(each.bytes for each in work) / seconds
    return Achieved(
        flop_s, flop_s / rates.flop_s, bytes_s / rates.bytes_s, floor_s(work, rates) / seconds
    )
