"""Ranges of activations, observed on photographs: what INT8 needs to know beyond the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.lrn import K, LocalResponseNorm
from model.net import AlexNet
from serving.preprocess import Pixels

Floats = npt.NDArray[np.float32]

METHODS: Final = ("max", "p99.999", "p99.99", "mse")
"""How a range is cut: nothing, at a percentile of the observed values, or where the squared error
of rounding is least. Which is best depends on the network, so `export.to_int8.calibrate` measures."""

LEVELS: Final = 255
_IMAGES_AT_ONCE: Final = 32
_KEPT_PER_BATCH: Final = 100_000
_MSE_FRACTIONS: Final = np.linspace(0.3, 1, 36)


@dataclass(frozen=True)
class Range:
    """Real values from `low` <= 0 to `high` > 0 that uint8 0..255 stands for."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        return (self.high - self.low) / LEVELS

    @property
    def zero_point(self) -> int:
        return round(-self.low / self.scale)


@dataclass(frozen=True)
class Calibration:
    """A range for each point where the graph is quantised; see `observe` for the points."""

    method: str
    ranges: dict[str, Range]
    responses: dict[str, float]
    """For each LRN: the largest alpha * sum of x^2 / k seen."""


class Observed:
    """Samples and extremes of the activations at each point."""

    def __init__(self) -> None:
        self._samples: dict[str, list[Floats]] = {}
        self._extremes: dict[str, tuple[float, float]] = {}
        self._responses: dict[str, float] = {}

    def add(self, point: str, values: Tensor) -> None:
        """Some values of `point`, of any shape."""
        low, high = self._extremes.get(point, (0.0, 0.0))
        self._extremes[point] = (min(low, float(values.min())), max(high, float(values.max())))
        flat = values.flatten()
        step = -(-flat.numel() // _KEPT_PER_BATCH)
        self._samples.setdefault(point, []).append(flat[::step].numpy().astype(np.float32))

    def add_response(self, point: str, response: float) -> None:
        self._responses[point] = max(self._responses.get(point, 0.0), response)

    def calibrate(self, method: str) -> Calibration:
        """The ranges by one of METHODS."""
        ranges = {
            point: _cut(method, np.concatenate(samples), *self._extremes[point])
            for point, samples in self._samples.items()
        }
        return Calibration(method, ranges, self._responses)


@torch.inference_mode()
def observe(net: AlexNet, crops: Pixels, advance: Callable[[int], None] = lambda _: None) -> Observed:
    """Run `net` on crops uint8 [N, 224, 224, 3] and note each point's activations.

    Points: conv1 to conv5, fc6 and fc7 after their ReLU; lrn1 and lrn2; of low-rank layers also
    the inner product, fc6.0 and fc7.0.
    """
    observed = Observed()
    with _hooks(net.eval(), observed):
        for start in range(0, len(crops), _IMAGES_AT_ONCE):
            batch = crops[start : start + _IMAGES_AT_ONCE]
            net(torch.from_numpy(batch))
            advance(len(batch))
    return observed


@contextmanager
def _hooks(net: AlexNet, observed: Observed) -> Iterator[None]:
    handles = []
    for name, module in net.named_modules():
        if name.endswith(".0"):
            handles.append(module.register_forward_hook(_note(observed, name)))
        elif isinstance(module, LocalResponseNorm):
            handles.append(module.register_forward_hook(_note_lrn(observed, name, module)))
        elif name.startswith(("conv", "fc")) and "." not in name and name != "fc8":
            handles.append(module.register_forward_hook(_note(observed, name, relu=True)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(observed: Observed, point: str, *, relu: bool = False) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        observed.add(point, output.clamp(min=0) if relu else output)

    return hook


def _note_lrn(observed: Observed, point: str, lrn: LocalResponseNorm) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        squares = inputs[0].square().flatten(2)  # [N, C, H * W]
        observed.add_response(point, float((lrn.band @ squares).max()) / K)
        observed.add(point, output)

    return hook


def _cut(method: str, samples: Floats, low: float, high: float) -> Range:
    if high <= low:
        return Range(0.0, 1.0)  # a layer that is dead on these images
    if method == "max":
        return Range(low, high)
    if method == "mse":
        errors = [_squared_error(samples, Range(f * low, f * high)) for f in _MSE_FRACTIONS]
        best = float(_MSE_FRACTIONS[int(np.argmin(errors))])
        return Range(best * low, best * high)
    percent = float(method.removeprefix("p"))
    top = float(np.percentile(samples, percent))
    bottom = min(0.0, float(np.percentile(samples, 100 - percent)))
    return Range(bottom, top) if top > bottom else Range(low, high)


def _squared_error(samples: Floats, range_: Range) -> float:
    levels = np.round(samples / range_.scale) + range_.zero_point
    rounded = (levels.clip(0, LEVELS) - range_.zero_point) * range_.scale
    return float(np.square(rounded - samples).mean())
