"""A trained network made small: fc6 and fc7 as factors along their outputs' principal components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from model.data import Decoded
from model.fold import PrincipalComponents, factor
from model.net import HIDDEN, AlexNet, Architecture, ArchitectureError
from serving.contract import Crops
from serving.preprocess import cut_crops

IMAGES_AT_ONCE = 64


@torch.inference_mode()
def output_components(
    net: AlexNet, data: Decoded, advance: Callable[[int], None] = lambda _: None
) -> dict[str, PrincipalComponents]:
    """Principal components of fc6's and fc7's outputs over the centre crops of `data`."""
    components = {name: PrincipalComponents(HIDDEN) for name in ("fc6", "fc7")}
    hooks = [
        net.get_submodule(name).register_forward_hook(_collect(components[name]))
        for name in components
    ]
    net.eval()
    try:
        for start in range(0, len(data.targets), IMAGES_AT_ONCE):
            squares = data.squares[start : start + IMAGES_AT_ONCE]
            crops = torch.stack([torch.from_numpy(cut_crops(s, Crops.CENTER)[0]) for s in squares])
            net(crops)
            advance(len(crops))
    finally:
        for hook in hooks:
            hook.remove()
    return components


def check_rank(net: AlexNet, rank: int) -> Architecture:
    """The architecture at `rank`; raises ArchitectureError where `net` cannot be factored so."""
    if net.architecture.low_rank is not None:
        raise ArchitectureError(
            f"the network is already of rank {net.architecture.low_rank}; factor the full one it was made of"
        )
    return replace(net.architecture, low_rank=rank)


def low_rank(net: AlexNet, components: dict[str, PrincipalComponents], rank: int) -> AlexNet:
    """A copy of `net` whose fc6 and fc7 are products of rank `rank`; from more images than that.

    Raises ArchitectureError: N images span N - 1 components, and those beyond are arbitrary (all of
    them together are a change of basis, and exact).
    """
    architecture = check_rank(net, rank)
    images = min(of.count for of in components.values())
    if images <= rank < HIDDEN:
        raise ArchitectureError(f"rank {rank} needs more than {rank} photographs, and there are {images}")
    small = AlexNet(architecture)
    state = net.state_dict()
    for name, components_of in components.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        del state[f"{name}.weight"], state[f"{name}.bias"]
        factors = factor(layer, components_of, rank).state_dict()
        state |= {f"{name}.{key}": value for key, value in factors.items()}
    small.load_state_dict(state)
    return small.eval()


def round_to_half(net: AlexNet) -> AlexNet:
    """Every weight rounded to FP16's nearest, kept as FP32: what is stored is what is evaluated."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())
    return net


def _collect(components: PrincipalComponents) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        components.add(output.cpu())

    return hook
