"""Layers that look beyond one process's share of a batch: batch norm and dropout.

With them a batch spread over processes gives the gradients that it gives in one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.net import DROPOUT, AlexNet


class SharedDropout(nn.Module):
    """Dropout whose mask is drawn for the whole batch; each process applies the rows of its share."""

    rows: Tensor | None

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.count = p, 0
        self.register_buffer("rows", None, persistent=False)

    def share(self, rows: Tensor, count: int) -> None:
        """int64 [N]: where this process's images stand in the batch of `count`."""
        self.rows, self.count = (None if len(rows) == count else rows), count

    def forward(self, x: Tensor) -> Tensor:
        """float [N, features] -> the same shape."""
        if not self.training:
            return x
        count = len(x) if self.rows is None else self.count
        kept = torch.empty(count, x.shape[1], dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * (kept if self.rows is None else kept[self.rows]) * (1 / (1 - self.p))


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes, on any device.

    torch's SyncBatchNorm does so on GPUs alone. Statistics of each process's share instead would
    make the curve depend on the number of processes, and small shares noisy.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """[N, C] and [N, C, H, W] alike."""

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C] or [N, C, H, W] -> the same shape."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        wide = x.float()
        over = [0, *range(2, x.dim())]
        count = x.new_full((1,), x.numel() / x.shape[1], dtype=torch.float32)
        total = _sum_over_processes(torch.cat([wide.sum(over), count]))
        mean, count = total[:-1] / total[-1], total[-1]
        shape = (1, -1, *[1] * (x.dim() - 2))
        centred = wide - mean.view(shape)
        variance = _sum_over_processes(centred.square().sum(over)) / count  # of the mean's own pass: exact
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def share_layers(net: AlexNet, size: int) -> None:
    """Give `net` these layers in place; batch norm where more than one process runs."""
    net.dropout = SharedDropout(DROPOUT)  # type: ignore[assignment]
    if size == 1:
        return
    for name, norm in list(net.named_children()):
        if not isinstance(norm, _BatchNorm):
            continue
        wider = nn.SyncBatchNorm if norm.weight.is_cuda else GlobalBatchNorm
        shared = wider(norm.num_features, norm.eps, norm.momentum).to(norm.weight.device)
        shared.load_state_dict(norm.state_dict())
        net.add_module(name, shared)


class _SumOverProcesses(torch.autograd.Function):
    """The gradient of a sum over processes is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _sum_over_processes(x: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x)  # type: ignore[no-untyped-call]
    return total
