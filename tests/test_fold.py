"""The same function with other weights: batch norm folded, fc6 and fc7 as factors and back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from model.compress import low_rank, output_components, round_to_half
from model.data import Decoded
from model.fold import PrincipalComponents, expand, factor, fold_batch_norm, fold_input_scale
from model.net import VARIANTS, AlexNet, Architecture, ArchitectureError, initialise_kaiming


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """fc6 and fc7 of 96 instead of 4096: the same code in a hundredth of the time."""
    monkeypatch.setattr("model.net.HIDDEN", 96)
    monkeypatch.setattr("model.compress.HIDDEN", 96)


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
            module.running_var[::7] = 1e-5  # as small as batch norm's epsilon
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.2)
    return net.eval()


def inputs(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def plain(architecture: Architecture) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in AlexNet(architecture).state_dict().items()}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_folding_batch_norm_changes_no_answer_and_leaves_the_plain_network(
    variant: str, rank: int | None
) -> None:
    net = randomised(Architecture(variant, 5, low_rank=rank, batch_norm=True))
    before = copy.deepcopy(net.state_dict())
    folded = fold_batch_norm(net)
    assert {name: t.shape for name, t in folded.state_dict().items()} == plain(
        Architecture(variant, 5, low_rank=rank)
    )
    with torch.inference_mode():
        x = inputs(3, seed=5)
        expected = net.double().logits(x.double())
        size = float(expected.std())
        torch.testing.assert_close(folded.logits(x).double(), expected, rtol=1e-5, atol=1e-5 * size)
        assert size > 0.01, "the answers differ, so the comparison says something"
    assert not folded.training
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor.to(before[name].dtype), before[name], rtol=0, atol=0)


@pytest.mark.usefixtures("narrow")
def test_a_network_without_batch_norm_or_factors_is_left_as_it_is() -> None:
    net = AlexNet(Architecture("owt", 3))
    assert fold_batch_norm(net) is net
    assert expand(net) is net


@pytest.mark.usefixtures("narrow")
def test_the_input_s_scale_moves_into_conv1_and_the_answers_stay() -> None:
    net = randomised(Architecture("2012", 5, low_rank=7))
    before = copy.deepcopy(net.state_dict())
    folded = fold_input_scale(net)
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randint(0, 256, (3, 224, 224, 3), generator=generator).to(torch.uint8)
    with torch.inference_mode():
        expected = net(pixels)
        assert folded.inverse_std is None
        torch.testing.assert_close(folded(pixels), expected, rtol=1e-4, atol=1e-6)
        assert float(expected.std(dim=0).max()) > 1e-3, "the answers differ, so the comparison says something"
    assert fold_input_scale(folded) is folded
    assert folded.fc7 is net.fc7, "the large layers are shared, not copied"
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def correlated(count: int, width: int, rank: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, rank) @ torch.randn(rank, width) + torch.randn(width)


def components_of(layer: nn.Linear, x: torch.Tensor) -> PrincipalComponents:
    components = PrincipalComponents(layer.out_features)
    with torch.no_grad():
        for part in torch.split(x, 50):
            components.add(layer(part))
    return components


def test_principal_components_are_those_of_the_covariance() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(330, 9)) @ rng.normal(size=(9, 9)) + 3
    components = PrincipalComponents(9)
    for part in torch.split(torch.from_numpy(y), 100):
        components.add(part)
    mean, basis = components.top(4)
    np.testing.assert_allclose(mean, y.mean(0))
    _, _, rows = np.linalg.svd(y - y.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(rows[:4] @ basis.numpy()), np.eye(4), atol=1e-6)


def test_factors_of_full_rank_are_the_layer_itself() -> None:
    torch.manual_seed(3)
    layer, x = nn.Linear(30, 12), torch.randn(200, 30)
    factors = factor(layer, components_of(layer, x), rank=12)
    torch.testing.assert_close(factors(x), layer(x), rtol=1e-4, atol=1e-5)


def test_outputs_of_low_rank_are_kept_though_the_weights_are_of_full_rank() -> None:
    x = correlated(300, 40, rank=4, seed=6)
    layer = nn.Linear(40, 25)
    components = components_of(layer, x)
    kept = factor(layer, components, rank=4)
    torch.testing.assert_close(kept(x), layer(x), rtol=1e-3, atol=1e-3)
    lost = factor(layer, components, rank=3)
    assert (lost(x) - layer(x)).abs().max() > 0.05


@pytest.mark.usefixtures("narrow")
def test_a_compressed_network_answers_as_at_full_rank_and_as_expanded() -> None:
    net = randomised(Architecture("2012", 4))
    rng = np.random.default_rng(7)
    data = Decoded(rng.integers(0, 256, (70, 256, 256, 3), np.uint8), np.zeros(70, np.int64))
    seen: list[int] = []
    components = output_components(net, data, seen.append)
    assert sum(seen) == 70
    assert not net.fc6._forward_hooks, "the hooks are taken off again"
    with torch.inference_mode():
        x = inputs(3, seed=8)
        whole = low_rank(net, components, rank=96)
        torch.testing.assert_close(whole.logits(x), net.logits(x), rtol=1e-3, atol=1e-3)
        small = round_to_half(low_rank(net, components, rank=16))
        assert small.architecture == Architecture("2012", 4, low_rank=16)
        assert all(torch.equal(p, p.half().float()) for p in small.parameters())
        full = expand(copy.deepcopy(small))
        assert full.architecture == Architecture("2012", 4)
        torch.testing.assert_close(full.logits(x), small.logits(x), rtol=1e-3, atol=1e-3)
        assert (full.logits(x) - net.logits(x)).abs().max() > 1e-3, "rank 16 is an approximation"
    with pytest.raises(ArchitectureError, match="already of rank 16"):
        low_rank(small, {}, 8)


@pytest.mark.usefixtures("narrow")
def test_a_rank_that_the_photographs_do_not_span_is_refused() -> None:
    net = randomised(Architecture("2012", 4))
    data = Decoded(
        np.random.default_rng(3).integers(0, 256, (9, 256, 256, 3), np.uint8), np.zeros(9, np.int64)
    )
    components = output_components(net, data)
    with pytest.raises(ArchitectureError, match="rank 9 needs more than 9 photographs, and there are 9"):
        low_rank(net, components, 9)
    assert low_rank(net, components, 8).architecture.low_rank == 8
    with pytest.raises(ArchitectureError, match="ranks of 1 to 96, not 97"):
        low_rank(net, components, 97)
