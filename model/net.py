"""AlexNet: the 2012 network and its 'one weird trick' variant of 2014.

    images uint8 [N, 224, 224, 3]  ->  probabilities float32 [N, classes]

Normalisation comes first and softmax last, inside the network, so that they are exported with
the weights. Krizhevsky, Sutskever, Hinton: ImageNet Classification with Deep Convolutional
Neural Networks (2012), section 3; Krizhevsky: One weird trick for parallelizing convolutional
neural networks (2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.lrn import LocalResponseNorm
from serving.contract import CHANNELS, CROP_SIZE, MEAN, STD

HIDDEN: Final = 4096
DROPOUT: Final = 0.5
POOLED: Final = 6
"""Side of the last pooled map: fc6 reads channels x 6 x 6."""
LAST_MAP: Final = 13
"""Side of conv5's map at 224 pixels, before the last pooling."""
SMALLEST_SIDE: Final = 31
"""Side of the smallest square that passes: conv1's map is 7x7, pooled 3x3, pooled 1x1."""


@dataclass(frozen=True)
class Convolution:
    """One convolution and what follows it; sizes as in the paper's figure 2."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    lrn: bool = False
    pool: bool = False
    bias_one: bool = False


VARIANTS: Final[dict[str, tuple[Convolution, ...]]] = {
    "2012": (
        Convolution(96, 11, stride=4, padding=2, lrn=True, pool=True),
        Convolution(256, 5, padding=2, groups=2, lrn=True, pool=True, bias_one=True),
        Convolution(384, 3, padding=1),
        Convolution(384, 3, padding=1, groups=2, bias_one=True),
        Convolution(256, 3, padding=1, groups=2, pool=True, bias_one=True),
    ),
    "owt": (
        Convolution(64, 11, stride=4, padding=2, pool=True),
        Convolution(192, 5, padding=2, pool=True, bias_one=True),
        Convolution(384, 3, padding=1),
        Convolution(256, 3, padding=1, bias_one=True),
        Convolution(256, 3, padding=1, pool=True, bias_one=True),
    ),
}


class ArchitectureError(ValueError):
    """No network has this shape."""


@dataclass(frozen=True)
class Architecture:
    """What fixes the shape of every weight: enough to rebuild the network from a checkpoint.

    `low_rank` replaces fc6 and fc7 by two factors of that rank each; `batch_norm` is a training
    aid that `fold_batch_norm` removes again (a folded network is the 2012 network).
    """

    variant: str = "2012"
    classes: int = 1000
    low_rank: int | None = None
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ArchitectureError(f"no variant {self.variant!r}; there are {', '.join(VARIANTS)}")
        if self.classes < 2:
            raise ArchitectureError(f"a classifier needs at least 2 classes, not {self.classes}")
        if self.low_rank is not None and not 1 <= self.low_rank <= HIDDEN:
            raise ArchitectureError(f"fc6 and fc7 have ranks of 1 to {HIDDEN}, not {self.low_rank}")


class AlexNet(nn.Module):
    """The network of `Architecture`; `forward` is the served contract, `logits` is for training."""

    mean: Tensor
    inverse_std: Tensor | None
    """None where `fold_input_scale` moved it into conv1."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        table = VARIANTS[architecture.variant]
        self.register_buffer("mean", torch.tensor(MEAN).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("inverse_std", 1 / torch.tensor(STD).reshape(-1, 1, 1), persistent=False)
        channels = CHANNELS
        for number, spec in enumerate(table, start=1):
            conv = nn.Conv2d(
                channels, spec.channels, spec.kernel, spec.stride, spec.padding,
                groups=spec.groups,
            )
            self.add_module(f"conv{number}", conv)
            if architecture.batch_norm:
                self.add_module(f"bn{number}", nn.BatchNorm2d(spec.channels))
            if spec.lrn:
                self.add_module(f"lrn{number}", LocalResponseNorm(spec.channels))
            channels = spec.channels
        self.fc6 = _linear(channels * POOLED * POOLED, HIDDEN, architecture.low_rank)
        self.fc7 = _linear(HIDDEN, HIDDEN, architecture.low_rank)
        self.fc8 = nn.Linear(HIDDEN, architecture.classes)
        if architecture.batch_norm:
            self.bn6, self.bn7 = nn.BatchNorm1d(HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 224, 224, 3] -> float32 [N, classes], each row summing to 1."""
        return functional.softmax(self.logits(self.normalise(images)), dim=1)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 or float NHWC in 0..255 -> float32 NCHW, mean 0 and standard deviation 1.

        Transposed first, as bytes: with the channels outermost the arithmetic runs over whole
        planes (measured in ONNX Runtime, ten crops: 7 ms less than on NHWC).
        """
        centred = images.permute(0, 3, 1, 2).float() - self.mean
        return centred if self.inverse_std is None else centred * self.inverse_std

    def logits(self, x: Tensor) -> Tensor:
        """Normalised float [N, 3, 224, 224] -> float [N, classes], before the softmax.

        Smaller squares are accepted in training: conv5's map is then interpolated to 13x13,
        so that fc6 sees its 6x6 grid (progressive resizing).
        """
        x = self.features(x)                            # [N, 256, 6, 6]
        x = torch.flatten(x, 1)                         # [N, 9216]
        x = self.dropout(self._fully_connected(6, x))   # [N, 4096]
        x = self.dropout(self._fully_connected(7, x))   # [N, 4096]
        logits: Tensor = self.fc8(x)                    # [N, classes]
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Normalised float [N, 3, S, S] -> float [N, 256, 6, 6]; in the 2012 network at S = 224:

        conv1 [N, 96, 55, 55], pooled 27; conv2 [N, 256, 27, 27], pooled 13;
        conv3 and conv4 [N, 384, 13, 13]; conv5 [N, 256, 13, 13], pooled 6.
        """
        smaller = x.shape[-1] != CROP_SIZE
        table = VARIANTS[self.architecture.variant]
        for number, spec in enumerate(table, start=1):
            x = self.get_submodule(f"conv{number}")(x)
            if self.architecture.batch_norm:
                x = self.get_submodule(f"bn{number}")(x)
            x = functional.relu(x, inplace=True)
            if spec.lrn:
                x = self.get_submodule(f"lrn{number}")(x)
            if smaller and number == len(table):
                x = functional.interpolate(x, (LAST_MAP, LAST_MAP), mode="bilinear")
            if spec.pool:
                x = functional.max_pool2d(x, kernel_size=3, stride=2)  # overlapping, section 3.4
        return x

    def _fully_connected(self, number: int, x: Tensor) -> Tensor:
        x = self.get_submodule(f"fc{number}")(x)
        if self.architecture.batch_norm:
            x = self.get_submodule(f"bn{number}")(x)
        return functional.relu(x)


def _linear(inputs: int, outputs: int, rank: int | None) -> nn.Module:
    if rank is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


def parameter_count(net: nn.Module) -> int:
    """Trainable numbers in `net`: 60,965,224 for the 2012 network with 1000 classes."""
    return sum(parameter.numel() for parameter in net.parameters())


def initialise_paper(net: AlexNet) -> None:
    """Section 5 of the paper: weights N(0, 0.01); biases 1 in conv2, conv4, conv5, fc6, fc7."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.constant_(module.bias, 1.0 if _starts_at_one(net, name) else 0.0)


def initialise_kaiming(net: AlexNet) -> None:
    """He et al. 2015: weights N(0, 2 / fan_in), biases 0; the last layer N(0, 0.01)."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name == "fc8":
            nn.init.normal_(module.weight, std=0.01)
        if name == "bn7":
            nn.init.constant_(module.weight, 0.2)  # |fc8's input|^2 of 4096 would make SGD diverge


def _starts_at_one(net: AlexNet, name: str) -> bool:
    layer = name.split(".")[0]
    if layer.startswith("conv"):
        table = VARIANTS[net.architecture.variant]
        return table[int(layer.removeprefix("conv")) - 1].bias_one
    return layer in ("fc6", "fc7")
