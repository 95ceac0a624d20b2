"""The processes of one run, as torchrun started them; alone where it did not.

    torchrun --nproc-per-node 8 -m -- alexnet train DATA --run runs/mine

Without the `--` torchrun takes `--run` for an abbreviation of a flag of its own.

Every process draws the same random numbers for the whole batch and keeps those of its share, so
that one process and eight do the same steps up to the order of float additions. Process 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

Integers = npt.NDArray[np.int64]
T = TypeVar("T")


def _device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process's place among `size`."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """How many of them share this machine."""
    device: torch.device = field(default_factory=_device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> Integers:
        """This process's positions in a batch of `count`, ascending.

        Position i goes with its mirror image count-1-i, mixup's partner, to the same process.
        """
        positions = np.arange(count)
        mine: Integers = positions[np.minimum(positions, count - 1 - positions) % self.size == self.rank]
        return mine

    def rows(self, count: int) -> Integers:
        """This process's part of `count` images: over all processes each exactly once."""
        return np.arange(self.rank, count, self.size)

    def sums(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The sum over all processes, of each of `values`."""
        total = torch.tensor(np.asarray(values, np.float64))
        if self.size > 1:
            distributed.all_reduce(total)
        result: npt.NDArray[np.float64] = total.numpy()
        return result

    def agreed(self, decide: Callable[[], T]) -> T:
        """What process 0 decides; an Exception that it raises is raised in each."""
        if self.size == 1:
            return decide()
        decided: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.first:
            try:
                decided = [(decide(), None)]
            except Exception as error:  # noqa: BLE001 - raised again below, here and in the others
                decided = [(None, error)]
        distributed.broadcast_object_list(decided, src=0)
        ((answer, failure),) = decided
        if failure is not None:
            raise failure
        return answer  # type: ignore[return-value]


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun's variables describe, joined while the block runs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    device = _device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo carries the few numbers that live on the host, NCCL the gradients.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_WORLD_SIZE"]), device)
    finally:
        distributed.destroy_process_group()
