"""The network as it learns: a batch goes in, the weights have made a step.

    uint8 [N, S, S, 3] -> device -> colour, normalisation -> loss -> gradients of all processes -> SGD
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from model.config import TrainConfig
from model.data import Batch, Windows
from model.distributed import World
from model.net import AlexNet, Architecture, initialise_kaiming, initialise_paper
from model.shared_layers import SharedDropout, share_layers
from serving.contract import RESIZE_SIZE


class Learner:
    """Network and optimizer; `step` is one update over all processes."""

    def __init__(self, config: TrainConfig, classes: int, world: World) -> None:
        self.config, self.world, self.device = config, world, world.device
        torch.manual_seed(config.seed)
        net = AlexNet(
            Architecture(config.variant, classes, low_rank=config.low_rank, batch_norm=config.batch_norm)
        )
        (initialise_paper if config.recipe == "paper" else initialise_kaiming)(net)
        self.net: AlexNet = net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        share_layers(self.net, world.size)
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.recipe != "paper",
            fused=True,
        )
        self.logits = self._wrapped()

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weights decay; biases and batch norm do so only in the paper's recipe. `rate` scales each."""
        config = self.config
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.net.named_parameters():
            decays = parameter.dim() > 1 or config.recipe == "paper"
            rate = config.new_layer_rate if name.startswith("fc8") else 1.0
            groups.setdefault((config.weight_decay if decays else 0.0, rate), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": decay, "rate": rate}
            for (decay, rate), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]

    def _wrapped(self) -> Callable[[Tensor], Tensor]:
        """The logits of this process's share; compiled where asked, gradients averaged over processes."""
        logits: nn.Module = _Logits(self.net)
        if self.config.compile:
            logits.compile()
        if self.world.size > 1:
            # Batch norm's buffers are the same everywhere already.
            logits = DistributedDataParallel(logits, broadcast_buffers=False, gradient_as_bucket_view=True)
        return logits

    def step(self, batch: Batch, rate: float) -> float:
        """One update with the learning rate `rate`; the sum of the losses of this share's images."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        torch.manual_seed(_number(batch.seed))  # dropout: no state to save, whatever the device
        assert isinstance(self.net.dropout, SharedDropout)
        self.net.dropout.share(torch.from_numpy(batch.positions).to(self.device), batch.count)
        x = self.to_device(batch)
        targets = torch.from_numpy(batch.targets).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.loss(x, targets, batch)
        self.optimizer.zero_grad(set_to_none=False)
        # Gradients are averaged over processes: the mean over the batch, whatever each one's share.
        (loss * (len(x) * self.world.size / batch.count)).backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return loss.item() * len(x)

    def to_device(self, batch: Batch) -> Tensor:
        """uint8 [N, S, S, 3] -> normalised float [N, 3, S, S], with the batch's colour noise."""
        views, gain, offset = (
            torch.from_numpy(array).to(self.device) for array in (batch.views, batch.gain, batch.offset)
        )
        if batch.windows is not None:
            views = cut_windows(views, batch.windows, batch.size)
        coloured: Tensor = (views.float() * gain + offset).clamp_(0, 255)
        return self.net.normalise(coloured)

    def loss(self, x: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy; with mixup (Zhang et al. 2018) against the batch in reverse order."""
        smoothing = self.config.label_smoothing
        if not self.config.mixup:
            return functional.cross_entropy(self.logits(x), targets, label_smoothing=smoothing)
        share = np.random.default_rng(_number(batch.seed)).beta(self.config.mixup, self.config.mixup)
        logits = self.logits(share * x + (1 - share) * x.flip(0))
        losses = [
            functional.cross_entropy(logits, t, label_smoothing=smoothing) for t in (targets, targets.flip(0))
        ]
        loss: Tensor = share * losses[0] + (1 - share) * losses[1]
        return loss


class _Logits(nn.Module):
    """`AlexNet.logits` as a module's forward, which is what can be compiled and distributed."""

    def __init__(self, net: AlexNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Normalised float [N, 3, S, S] -> float [N, classes]."""
        return self.net.logits(x)


def cut_windows(squares: Tensor, windows: Windows, size: int) -> Tensor:
    """uint8 [N, 256, 256, 3] -> float [N, size, size, 3]: `Windows.view` for a batch, on its device.

    Bilinear between the four nearest pixels; Pillow, on the host, widens the filter where it shrinks.
    """
    sides, tops, lefts = (
        torch.from_numpy(field).to(squares.device, torch.float32)
        for field in (windows.side, windows.top, windows.left)
    )
    mirrored = torch.from_numpy(windows.mirrored).to(squares.device)
    scale = sides / RESIZE_SIZE
    theta = torch.zeros(len(squares), 2, 3, device=squares.device)
    theta[:, 0, 0] = torch.where(mirrored, -scale, scale)
    theta[:, 1, 1] = scale
    theta[:, 0, 2] = (2 * lefts + sides) / RESIZE_SIZE - 1
    theta[:, 1, 2] = (2 * tops + sides) / RESIZE_SIZE - 1
    planes = squares.permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(theta, [len(squares), planes.shape[1], size, size], align_corners=False)
    views = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return views.permute(0, 2, 3, 1)


def _number(seed: tuple[int, ...]) -> int:
    """One seed for torch out of several numbers."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
