"""The network against the paper's table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from model.net import (
    SMALLEST_SIDE,
    AlexNet,
    Architecture,
    ArchitectureError,
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
    torch.manual_seed(1)
    net = AlexNet(architecture)
    initialise_kaiming(net)
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


@pytest.mark.parametrize("side", [SMALLEST_SIDE, 64, 128, 160, 192])
@pytest.mark.parametrize("variant", ["2012", "owt"])
def test_smaller_squares_train_the_same_layers(variant: str, side: int) -> None:
    net = randomised(Architecture(variant, 3, low_rank=4))
    assert net.logits(torch.randn(2, 3, side, side)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="too small"):
        net.logits(torch.randn(2, 3, SMALLEST_SIDE - 1, SMALLEST_SIDE - 1))


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


def test_kaiming_s_initialisation_keeps_the_signal_s_size() -> None:
    torch.manual_seed(3)
    net = AlexNet(Architecture("2012", 50, low_rank=64, batch_norm=True))
    initialise_kaiming(net)
    for name, fan_in in (("conv1", 3 * 11 * 11), ("conv2", 48 * 5 * 5), ("conv3", 256 * 3 * 3)):
        weight, bias = net.get_parameter(f"{name}.weight"), net.get_parameter(f"{name}.bias")
        assert float(weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.02), name
        assert (bias == 0).all(), name
    assert float(net.fc8.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_dropout_acts_in_training_alone() -> None:
    net = randomised(Architecture("2012", 3, low_rank=4))
    x = net.normalise(images(1))
    assert torch.equal(net.logits(x), net.logits(x))
    net.train()
    assert not torch.equal(net.logits(x), net.logits(x))


def test_impossible_architectures_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="'vgg'; there are 2012, owt"):
        Architecture("vgg")
    with pytest.raises(ArchitectureError, match="at least 2 classes"):
        Architecture(classes=1)
    for rank in (0, 4097):
        with pytest.raises(ArchitectureError, match=f"ranks of 1 to 4096, not {rank}"):
            Architecture(low_rank=rank)
