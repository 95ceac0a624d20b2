"""Local response normalisation against the paper's formula, and in the form that is exported."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.lrn import LocalResponseNorm


def formula(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Section 3.3 in float64, channel by channel: k=2, n=5, alpha=1e-4, beta=0.75."""
    wide = x.astype(np.float64)
    out = np.empty_like(wide)
    channels = x.shape[1]
    for i in range(channels):
        window = wide[:, max(0, i - 2) : min(channels - 1, i + 2) + 1]
        out[:, i] = wide[:, i] / (2 + 1e-4 * (window**2).sum(axis=1)) ** 0.75
    return out


@given(
    st.sampled_from([(1, 5, 1, 1), (2, 3, 2, 2), (2, 96, 9, 7), (3, 256, 13, 13), (1, 3, 70, 61)]),
    st.floats(0.1, 3000),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=30)
def test_both_forms_are_the_paper_s_formula_in_any_layout_and_range(
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
    np.testing.assert_array_equal(x.numpy(), values)  # the input is left alone


@pytest.mark.parametrize(("channel", "reached"), [(0, [0, 1, 2]), (1, [0, 1, 2, 3]), (7, [5, 6, 7])])
def test_a_channel_quiets_two_neighbours_a_side_and_none_across_the_edge(
    channel: int, reached: list[int]
) -> None:
    lrn = LocalResponseNorm(8)
    x = torch.rand(1, 8, 4, 4) + 1
    loud = x.clone()
    loud[:, channel] += 100
    for form in (lrn, lrn.as_convolution):
        changed = (form(loud) / loud - form(x) / x).abs().amax((0, 2, 3)) > 1e-4
        assert changed.nonzero().ravel().tolist() == reached


def test_it_is_torch_s_with_alpha_times_n() -> None:
    x = torch.randn(2, 96, 8, 8) * 40
    torch.testing.assert_close(LocalResponseNorm(96)(x), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_that_of_the_formula(memory_format: torch.memory_format) -> None:
    torch.manual_seed(4)
    lrn = LocalResponseNorm(9).double()
    x = torch.rand(2, 9, 2, 3, dtype=torch.float64) * 60 - 30
    assert torch.autograd.gradcheck(lrn, (x.to(memory_format=memory_format).requires_grad_(),))


def test_the_gradient_is_the_same_over_several_pieces() -> None:
    torch.manual_seed(5)
    x = (torch.randn(2, 6, 80, 60) * 50).requires_grad_()  # 9600 rows: two pieces of 4096 and a rest
    lrn = LocalResponseNorm(6)
    weights = torch.randn(2, 6, 80, 60)
    (mine,) = torch.autograd.grad((lrn(x) * weights).sum(), x)
    (other,) = torch.autograd.grad((lrn.as_convolution(x) * weights).sum(), x)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    x = torch.randn(2, 96, 13, 13) * 60
    lrn = LocalResponseNorm(96)
    half = lrn(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), lrn(x), rtol=0.03, atol=0.03)


def test_the_exported_form_is_a_convolution_two_roots_and_a_division() -> None:
    lrn, x = LocalResponseNorm(6).eval(), torch.randn(2, 6, 5, 5) * 80
    exported = torch.onnx.export(lrn, (x,), verbose=False)
    assert exported is not None
    operators = Counter(node.op_type for node in exported.model_proto.graph.node)
    assert operators == {"Mul": 2, "Conv": 1, "Sqrt": 2, "Div": 1}
    program = torch.export.export(lrn, (x,)).module()
    np.testing.assert_allclose(program(x).numpy(), formula(x.numpy()), rtol=2e-5, atol=1e-6)
