"""Networks that compute the same with other weights: batch norm folded, fc6 and fc7 factored."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.net import AlexNet


@torch.no_grad()
def fold_batch_norm(net: AlexNet) -> AlexNet:
    """The same function in evaluation mode without batch norm layers: the 2012 network itself.

    gamma (w x + b - mean) / sqrt(var + eps) + beta is again a convolution (or a linear layer):
    its scale goes into the weights, the rest into the biases.
    """
    if not net.architecture.batch_norm:
        return net
    folded = AlexNet(replace(net.architecture, batch_norm=False)).to(net.mean.device)
    state = net.state_dict()
    folded.load_state_dict({name: state[name] for name in folded.state_dict()})
    for name, norm in net.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        layer = _normalised_layer(folded, name.removeprefix("bn"))
        assert norm.running_mean is not None and norm.running_var is not None and layer.bias is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
    return folded.train(net.training)


def _normalised_layer(net: AlexNet, number: str) -> nn.Conv2d | nn.Linear:
    """The layer whose output batch norm `number` normalises: of two factors, the outer one."""
    layer = net.get_submodule(f"conv{number}" if hasattr(net, f"conv{number}") else f"fc{number}")
    if isinstance(layer, nn.Sequential):
        layer = layer[-1]
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer


@torch.no_grad()
def fold_input_scale(net: AlexNet) -> AlexNet:
    """The same function with 1 / std inside conv1's weights: one pass over the pixels less.

    Shares every other layer with `net`. The mean stays: conv1 pads with zeros, which are the mean
    of a centred picture and not of a raw one.
    """
    if net.inverse_std is None:
        return net
    folded = copy.copy(net)
    folded._modules, folded._buffers = dict(net._modules), dict(net._buffers)
    conv1 = copy.deepcopy(net.conv1)
    assert isinstance(conv1, nn.Conv2d)
    conv1.weight.mul_(net.inverse_std)  # [C, 3, k, k] * [3, 1, 1]
    folded.conv1, folded.inverse_std = conv1, None
    return folded


class PrincipalComponents:
    """Running mean and covariance of a layer's output, in float64: [outputs], [outputs, outputs]."""

    def __init__(self, outputs: int) -> None:
        self.count = 0
        self.sum = torch.zeros(outputs, dtype=torch.float64)
        self.products = torch.zeros(outputs, outputs, dtype=torch.float64)

    def add(self, y: Tensor) -> None:
        """y: float [N, outputs], the layer's output before its ReLU."""
        self.count += len(y)
        self.sum += y.sum(0, dtype=torch.float64)
        self.products += (y.T @ y).double()

    def top(self, rank: int) -> tuple[Tensor, Tensor]:
        """Mean [outputs] and the `rank` leading components as columns [outputs, rank]."""
        mean = self.sum / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)  # ascending
        return mean, vectors[:, -rank:].flip(1)


@torch.no_grad()
def factor(layer: nn.Linear, components: PrincipalComponents, rank: int) -> nn.Sequential:
    """y = W x + b projected on its own principal components: U (U' W) x + (m + U U' (b - m)).

    The components are those of the outputs over real images; the singular vectors of W itself
    keep directions that no image ever excites (measured: ten points worse at rank 256).
    """
    mean, basis = components.top(rank)
    weight, bias = layer.weight.double(), layer.bias.double()
    inner = nn.Linear(layer.in_features, rank, bias=False)
    outer = nn.Linear(rank, layer.out_features)
    inner.weight.copy_(basis.T @ weight)
    outer.weight.copy_(basis)
    outer.bias.copy_(mean + basis @ (basis.T @ (bias - mean)))
    return nn.Sequential(inner, outer)


@torch.no_grad()
def expand(net: AlexNet) -> AlexNet:
    """A low-rank network at full width again: each pair of factors multiplied out."""
    if net.architecture.low_rank is None:
        return net
    full = AlexNet(replace(net.architecture, low_rank=None))
    state = net.state_dict()
    for name in ("fc6", "fc7"):
        inner, outer = state.pop(f"{name}.0.weight"), state.pop(f"{name}.1.weight")
        state[f"{name}.weight"] = (outer.double() @ inner.double()).float()
        state[f"{name}.bias"] = state.pop(f"{name}.1.bias")
    full.load_state_dict(state)
    return full.train(net.training)
