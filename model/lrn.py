"""Local response normalisation (section 3.3 of the paper), in the two forms that are fast.

    y_c = x_c / (k + alpha * sum of x^2 over the n channels around c) ^ beta

`torch.nn.LocalResponseNorm` divides alpha by n and decomposes on export into a padded average
pooling over a fifth axis; measured, half of the network's time on a CPU. Here the sum over
channels is a product with a banded matrix of ones, and b^0.75 = sqrt(b) * sqrt(sqrt(b)).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

K: Final = 2.0
SIZE: Final = 5
ALPHA: Final = 1e-4
BETA: Final = 0.75

_ROWS: Final = 4096
"""Pixels normalised at a time on a CPU: 4096 x 96 channels x 4 bytes stay in the L2 cache."""


class LocalResponseNorm(nn.Module):
    """float [N, C, H, W] -> the same shape; no parameters."""

    band: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        index = torch.arange(channels)
        near = (index[:, None] - index[None, :]).abs() <= SIZE // 2
        self.register_buffer("band", near.float() * ALPHA, persistent=False)  # [C, C]

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self.as_convolution(x)
        y: Tensor = _Normalise.apply(x, self.band)  # type: ignore[no-untyped-call]
        return y

    def as_convolution(self, x: Tensor) -> Tensor:
        """The form that is exported: the sum over channels as a 1x1 convolution."""
        k = x.new_full(self.band.shape[:1], K)
        b = functional.conv2d(x * x, self.band[:, :, None, None], k)
        root = torch.sqrt(b)
        return x / (root * torch.sqrt(root))


class _Normalise(torch.autograd.Function):
    """The form for training: forward and backward by hand, in cache-sized pieces.

    With s = k + band x^2 and r = s^-0.5:   y = x r^1.5,
    dx = g r^1.5 - 1.5 x band (g x r^3.5).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(-1, c)  # [N*H*W, C], a view in channels_last
        band = band.to(x.dtype)
        k = torch.full((1, c), K, dtype=x.dtype, device=x.device)
        y, r = torch.empty_like(flat), torch.empty_like(flat)
        for rows in _pieces(flat):
            squares = flat[rows].square()
            r_rows = torch.addmm(k, squares, band, out=r[rows]).rsqrt_()
            torch.sqrt(r_rows, out=squares).mul_(r_rows)
            torch.mul(flat[rows], squares, out=y[rows])
        ctx.save_for_backward(flat, r, band)
        return y.view(n, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        flat, r, band = ctx.saved_tensors
        n, c, h, w = gradients[0].shape
        g = gradients[0].permute(0, 2, 3, 1).reshape(-1, c)
        dx = torch.empty_like(flat)
        for rows in _pieces(flat):
            direct = r[rows].sqrt().mul_(r[rows])  # r^1.5
            inner = direct * r[rows]
            inner.mul_(r[rows]).mul_(g[rows]).mul_(flat[rows])  # g x r^3.5
            through_sum = (inner @ band).mul_(flat[rows])
            torch.add(direct.mul_(g[rows]), through_sum, alpha=-2 * BETA, out=dx[rows])
        return dx.view(n, h, w, c).permute(0, 3, 1, 2), None


def _pieces(flat: Tensor) -> list[slice]:
    size = _ROWS if flat.device.type == "cpu" else max(1, len(flat))
    return [slice(start, start + size) for start in range(0, len(flat), size)]
