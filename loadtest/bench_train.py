"""A training step's time: with shards beside data that is there already, fast beside plain. One run.

    python loadtest/bench_train.py [SHARDS] [--batch 64] [--size 224] [--rounds 7] [--steps 2]

    plain       FP32, eager, torch's nn.LocalResponseNorm, NCHW; the batch is there already
    synthetic   as `alexnet train` does it (the faster precision, channels_last, banded LRN); the same
    shards      the same with the loader: read, decode, cut, mirror, on the same cores

Rounds alternate, so that a change in the machine's speed hits all three; medians are printed with the
command, the machine and the versions. SHARDS is what `alexnet prepare` wrote; without, pictures of
500x375 are generated and prepared first. The network is the paper's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from photographs import photographs
from torch import nn

from model import lrn
from model.archives import Source
from model.config import TrainConfig
from model.data import Augmentation, Batch, Decoded, prefetched, training_batch
from model.distributed import World
from model.images import open_split
from model.learner import Learner
from model.machine import environment, faster_precision, keep_freed_memory
from model.net import AlexNet
from model.prepare import prepare

CLASSES = 10


def generated_shards(folder: Path) -> Path:
    """Shards of 240 generated photographs in ten classes."""
    for index, data in enumerate(photographs(None) * 10):
        place = folder / "pictures" / "train" / f"class {index % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.jpg").write_bytes(data)
    prepare(Source.scan(folder / "pictures"), folder / "shards", processes=1)
    return folder / "shards"


def plain_learner(config: TrainConfig) -> Learner:
    """The same network as a first reading of the paper writes it down."""
    learner = Learner(replace(config, precision="fp32"), CLASSES, World())
    learner.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for name, layer in list(learner.net.named_children()):
        if isinstance(layer, lrn.LocalResponseNorm):
            theirs = nn.LocalResponseNorm(lrn.SIZE, alpha=lrn.SIZE * lrn.ALPHA, beta=lrn.BETA, k=lrn.K)
            learner.net.add_module(name, theirs)

    def normalise(images: torch.Tensor) -> torch.Tensor:
        return AlexNet.normalise(learner.net, images).contiguous()

    learner.net.normalise = normalise  # type: ignore[method-assign]
    return learner


def batches(data: Decoded, batch: int, size: int, threads: int) -> Iterator[Batch]:
    """The loader as training runs it, without end."""
    order = np.random.default_rng(0)

    def jobs() -> Iterator[Callable[[], Batch]]:
        step = 0
        while True:
            rows = order.integers(0, len(data.targets), batch)
            yield partial(training_batch, data, Augmentation(crop_min=128), rows, size, (step,))
            step += 1

    return prefetched(jobs(), 2 + threads, threads)


def seconds_a_step(learner: Learner, source: Iterator[Batch], steps: int) -> float:
    """After one step in which the loader gets ahead as far as it goes in training."""
    learner.step(next(source), 0.001)
    started = time.perf_counter()
    for _ in range(steps):
        learner.step(next(source), 0.001)
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path)
    for name, default in (("batch", 64), ("size", 224), ("rounds", 7), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args()
    keep_freed_memory()  # for all three, though only `alexnet train` asks for it
    precision = faster_precision()
    config = TrainConfig.of_recipe("paper", data="", precision=precision, batch_size=wanted.batch)
    threads = os.cpu_count() or 1
    with ExitStack() as stack:
        root = wanted.shards or generated_shards(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        images = open_split(root, "train")
        data = Decoded.read(images, threads, memory_bytes=0)
        ready = next(batches(data, wanted.batch, wanted.size, threads))
        ready = replace(ready, targets=ready.targets % CLASSES)
        plain, fast = plain_learner(config), Learner(config, CLASSES, World())

        def measured(kind: str) -> float:
            if kind != "shards":
                learner = plain if kind == "plain" else fast
                return seconds_a_step(learner, iter([ready] * (wanted.steps + 1)), wanted.steps)
            loader = batches(data, wanted.batch, wanted.size, threads)
            with closing(loader):  # type: ignore[type-var]
                return seconds_a_step(fast, map(_few_classes, loader), wanted.steps)

        kinds = ("plain", "synthetic", "shards")
        rounds = [{kind: measured(kind) for kind in kinds} for _ in range(wanted.rounds + 1)][1:]
    print(f"python {' '.join(sys.argv)}")
    print("; ".join(f"{name} {value}" for name, value in environment().items()))
    print(f"batch {wanted.batch}, views of {wanted.size}, {precision}, {len(images):,} images in shards")
    print(f"medians of {wanted.rounds} rounds of {wanted.steps} steps")
    print(f"{'':12}{'ms a step':>10}{'min-max':>16}{'images/s':>10}")
    for kind in kinds:
        times = [1000 * each[kind] for each in rounds]
        middle = statistics.median(times)
        span = f"{min(times):.0f}-{max(times):.0f}"
        print(f"{kind:12}{middle:10.0f}{span:>16}{1000 * wanted.batch / middle:10.1f}")
    faster = statistics.median(each["plain"] / each["synthetic"] for each in rounds)
    loading = statistics.median(1 - each["synthetic"] / each["shards"] for each in rounds)
    print(f"medians:  {faster:.2f} times plain; the loader's part of a step {100 * loading:.1f} %")
    # On a machine that others load as well the least disturbed rounds tell more than the middle ones.
    least = {kind: min(each[kind] for each in rounds) for kind in kinds}
    faster, loading = least["plain"] / least["synthetic"], 1 - least["synthetic"] / least["shards"]
    print(f"quickest: {faster:.2f} times plain; the loader's part of a step {100 * loading:.1f} %")


def _few_classes(batch: Batch) -> Batch:
    """Shards of a thousand classes serve a network of ten as well."""
    return replace(batch, targets=batch.targets % CLASSES)


if __name__ == "__main__":
    main()
