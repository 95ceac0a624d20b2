"""The same weights exported the stock way: nn.LocalResponseNorm, NCHW float input, logits out."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from model.lrn import ALPHA, BETA, SIZE, K
from model.net import VARIANTS, AlexNet


class StockAlexNet(nn.Module):
    """float32 [N, 3, 224, 224], already normalised -> logits [N, classes], textbook layers."""

    def __init__(self, net: AlexNet) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, spec in enumerate(VARIANTS[net.architecture.variant], start=1):
            layers += [net.get_submodule(f"conv{number}"), nn.ReLU()]
            if spec.lrn:
                layers.append(nn.LocalResponseNorm(SIZE, ALPHA * SIZE, BETA, K))
            if spec.pool:
                layers.append(nn.MaxPool2d(3, 2))
        self.layers = nn.Sequential(*layers, nn.Flatten(), net.fc6, nn.ReLU(), net.fc7, nn.ReLU(), net.fc8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


def export_stock(net: AlexNet, path: Path) -> None:
    """What `torch.onnx.export` gives by default, with a dynamic batch."""
    example = torch.zeros(2, 3, 224, 224)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            StockAlexNet(net).eval(),
            (example,),
            dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=640)}},
        )
    assert program is not None
    program.save(str(path), external_data=False)
