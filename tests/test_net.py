"""The network against the paper's table, and LRN against the paper's formula."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.compress import low_rank, output_components, round_to_half
from model.data import Decoded
from model.fold import PrincipalComponents, expand, factor, fold_batch_norm
from model.lrn import LocalResponseNorm
from model.net import (
    VARIANTS,
    AlexNet,
    Architecture,
    initialise_kaiming,
    initialise_paper,
    parameter_count,
)
from serving.contract import MEAN, STD

SHAPES = {
    "2012": {
        "conv1": (96, 55, 55), "lrn1": (96, 55, 55), "conv2": (256, 27, 27), "lrn2": (256, 27, 27),
        "conv3": (384, 13, 13), "conv4": (384, 13, 13), "conv5": (256, 13, 13),
        "fc6": (4096,), "fc7": (4096,), "fc8": (7,),
    },
    "owt": {
        "conv1": (64, 55, 55), "conv2": (192, 27, 27), "conv3": (384, 13, 13), "conv4": (256, 13, 13),
        "conv5": (256, 13, 13), "fc6": (4096,), "fc7": (4096,), "fc8": (7,),
    },
}  # fmt: skip


def randomised(architecture: Architecture) -> AlexNet:
    """Random weights, and random running statistics where there is batch norm."""
    torch.manual_seed(1)
    net = AlexNet(architecture)
    initialise_kaiming(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.4, 3)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), np.uint8))


@pytest.mark.parametrize(("variant", "parameters"), [("2012", 60_965_224), ("owt", 61_100_840)])
def test_the_parameters_are_counted_as_published(variant: str, parameters: int) -> None:
    with torch.device("meta"):
        assert parameter_count(AlexNet(Architecture(variant))) == parameters


@pytest.mark.parametrize("variant", ["2012", "owt"])
def test_every_layer_has_the_table_s_output_size(variant: str) -> None:
    net = randomised(Architecture(variant, 7, low_rank=8))
    seen: dict[str, tuple[int, ...]] = {}
    for name in SHAPES[variant]:
        net.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    pooled = net.features(net.normalise(images(2)))
    probabilities = net(images(2))
    assert seen == SHAPES[variant]
    assert pooled.shape == (2, 256, 6, 6)
    assert probabilities.shape == (2, 7)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))


def test_the_2012_network_has_two_towers_where_the_paper_has() -> None:
    with torch.device("meta"):
        net = AlexNet(Architecture("2012"))
    groups = [net.get_submodule(f"conv{n}").groups for n in range(1, 6)]
    assert groups == [1, 2, 1, 2, 2]


def test_normalisation_is_inside_and_in_pixel_units() -> None:
    net = randomised(Architecture("2012", 3, low_rank=4))
    pixels = images(2, seed=3)
    expected = (pixels.numpy().astype(np.float64) - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(net.normalise(pixels).numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)
    with torch.inference_mode():
        by_hand = torch.softmax(net.logits(torch.from_numpy(expected.transpose(0, 3, 1, 2)).float()), 1)
        torch.testing.assert_close(net(pixels), by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [64, 128, 160, 192])
def test_smaller_squares_train_the_same_layers(side: int) -> None:
    net = randomised(Architecture("2012", 3, low_rank=4))
    assert net.logits(torch.randn(2, 3, side, side)).shape == (2, 3)


def test_the_paper_s_initialisation() -> None:
    torch.manual_seed(2)
    net = AlexNet(Architecture("2012", 50, low_rank=64))
    initialise_paper(net)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05), name
            if layer.bias is not None:
                one = name.split(".")[0] in ("conv2", "conv4", "conv5", "fc6", "fc7")
                assert (layer.bias == float(one)).all(), name


def test_impossible_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="'vgg'; there are 2012, owt"):
        Architecture("vgg")
    with pytest.raises(ValueError, match="at least 2 classes"):
        Architecture(classes=1)


# --- local response normalisation ------------------------------------------------------------------


def formula(x: np.ndarray) -> np.ndarray:
    """Section 3.3 in float64, channel by channel: k=2, n=5, alpha=1e-4, beta=0.75."""
    x = x.astype(np.float64)
    out = np.empty_like(x)
    channels = x.shape[1]
    for i in range(channels):
        window = x[:, max(0, i - 2) : min(channels - 1, i + 2) + 1]
        out[:, i] = x[:, i] / (2 + 1e-4 * (window**2).sum(axis=1)) ** 0.75
    return out


@given(
    st.sampled_from([(1, 5, 1, 1), (2, 96, 9, 7), (3, 256, 13, 13), (1, 3, 70, 61)]),
    st.floats(0.1, 3000),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=25)
def test_lrn_is_the_paper_s_formula_in_both_forms(
    shape: tuple[int, ...], scale: float, channels_last: bool, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    x = torch.from_numpy(values)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    lrn = LocalResponseNorm(shape[1])
    expected = formula(values)
    for form in (lrn, lrn.as_convolution):
        np.testing.assert_allclose(form(x).numpy(), expected, rtol=2e-5, atol=1e-6)


def test_lrn_matches_torch_s_with_alpha_times_n() -> None:
    x = torch.randn(2, 96, 8, 8) * 40
    torch.testing.assert_close(LocalResponseNorm(96)(x), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)(x))


def test_lrn_s_gradient_is_right() -> None:
    torch.manual_seed(4)
    lrn = LocalResponseNorm(9).double()
    x = (torch.rand(2, 9, 2, 3, dtype=torch.float64) * 60 - 30).requires_grad_()
    assert torch.autograd.gradcheck(lrn, (x,))


def test_lrn_s_gradient_is_the_same_over_several_pieces() -> None:
    x = (torch.randn(2, 6, 80, 60) * 50).requires_grad_()
    lrn = LocalResponseNorm(6)
    weights = torch.randn(2, 6, 80, 60)
    (mine,) = torch.autograd.grad((lrn(x) * weights).sum(), x)
    (other,) = torch.autograd.grad((lrn.as_convolution(x) * weights).sum(), x)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


# --- batch norm folded, layers factored ------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_folding_batch_norm_changes_no_answer_and_leaves_the_plain_network(variant: str) -> None:
    net = randomised(Architecture(variant, 5, batch_norm=True))
    folded = fold_batch_norm(net)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())
    with torch.inference_mode():
        x = net.normalise(images(3, seed=5))
        torch.testing.assert_close(folded.logits(x), net.logits(x), rtol=1e-3, atol=1e-3)
    with torch.device("meta"):
        plain = AlexNet(Architecture(variant, 5))
    assert parameter_count(folded) == parameter_count(plain)


def correlated(count: int, width: int, rank: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, rank) @ torch.randn(rank, width) + torch.randn(width)


def components_of(layer: nn.Linear, x: torch.Tensor) -> PrincipalComponents:
    components = PrincipalComponents(layer.out_features)
    with torch.no_grad():
        for part in torch.split(x, 50):
            components.add(layer(part))
    return components


def test_factors_of_full_rank_are_the_layer_itself() -> None:
    layer, x = nn.Linear(30, 12), torch.randn(200, 30)
    factors = factor(layer, components_of(layer, x), rank=12)
    torch.testing.assert_close(factors(x), layer(x), rtol=1e-4, atol=1e-5)


def test_outputs_of_low_rank_are_kept_exactly_though_the_weights_are_of_full_rank() -> None:
    layer, x = nn.Linear(40, 25), correlated(300, 40, rank=4, seed=6)
    components = components_of(layer, x)
    kept = factor(layer, components, rank=4)
    torch.testing.assert_close(kept(x), layer(x), rtol=1e-3, atol=1e-3)
    lost = factor(layer, components, rank=3)
    assert (lost(x) - layer(x)).abs().max() > 0.05


def test_a_compressed_network_and_its_full_width_give_the_same_answers() -> None:
    net = randomised(Architecture("2012", 4))
    rng = np.random.default_rng(7)
    data = Decoded(rng.integers(0, 256, (24, 256, 256, 3), np.uint8), np.zeros(24, np.int64))
    seen: list[int] = []
    small = low_rank(net, output_components(net, data, seen.append), rank=16)
    assert sum(seen) == 24
    assert small.architecture.low_rank == 16
    round_to_half(small)
    assert all(torch.equal(p, p.half().float()) for p in small.parameters())
    full = expand(copy.deepcopy(small))
    assert full.architecture.low_rank is None
    with torch.inference_mode():
        x = net.normalise(images(3, seed=8))
        torch.testing.assert_close(full.logits(x), small.logits(x), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="already of rank 16"):
        low_rank(small, {}, 8)
