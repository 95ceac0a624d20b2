"""Rows of the table: an engine in one precision at each batch, a training step; or why there is none."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import gpu_training
import numpy as np
import torch
from gpu_card import AbsentError, arithmetic
from gpu_engines import (
    Bind,
    Files,
    cuda_session,
    need_cuda_provider,
    session_engine,
    tensorrt_engine,
    torch_engine,
)
from gpu_events import Run, Stream, timed
from gpu_report import Row
from gpu_work import WIDTH, Layer, Rates, Work, achieved, inference, layers, training

from model.data import Batch
from model.evaluate import Probabilities, torch_predictor
from model.learner import Learner
from model.net import AlexNet, Architecture, initialise_kaiming
from serving.preprocess import Pixels

WRONG: Final = 0.02
"""Of a probability: rounding moves it less (measured, FP16 in ONNX Runtime on a CPU: 0.0011)."""
COMPARED: Final = 10
ENGINES: Final = (
    ("torch", "fp32"), ("torch", "tf32"), ("torch", "fp16"),
    ("onnxruntime", "fp32"), ("onnxruntime", "tf32"), ("onnxruntime", "fp16"),
    ("tensorrt", "fp32"), ("tensorrt", "fp16"),
)  # fmt: skip
UPLOAD: Final = "upload"
TRAIN: Final = "train"


class WrongAnswersError(Exception):
    """An engine does not compute the network: its speed means nothing."""


@dataclass(frozen=True)
class Job:
    """The network, what it is asked, and how long that may take."""

    net: AlexNet
    crops: Pixels
    """uint8 [largest batch, 224, 224, 3]"""
    stream: Stream
    rates: dict[str, Rates]
    absent: dict[str, str]
    """Precisions that the card does not have, and why."""
    folder: Path
    seconds: float
    """Of a row."""
    until: float = float("inf")
    """No row is begun after that, on `clock`."""
    clock: Callable[[], float] = time.monotonic

    def need(self, precision: str) -> None:
        """Raises AbsentError where a row cannot begin."""
        if precision in self.absent:
            raise AbsentError(self.absent[precision])
        if self.clock() >= self.until:
            raise AbsentError("the time for all rows was up; --limit gives more")

    @cached_property
    def layers(self) -> list[Layer]:
        """Of the network."""
        return layers(self.net.architecture)

    @cached_property
    def files(self) -> Files:
        """Exported when the first engine asks for them."""
        return Files.written(self.net, self.folder)

    @cached_property
    def reference(self) -> Probabilities:
        """What PyTorch says in FP32 on the CPU of the first crops."""
        return torch_predictor(self.net)(self.crops[:COMPARED])


def random_net(architecture: Architecture) -> AlexNet:
    """With weights that tell images apart, so that a wrong answer is seen."""
    torch.manual_seed(0)
    net = AlexNet(architecture).eval()
    initialise_kaiming(net)
    torch.nn.init.normal_(net.fc8.weight, std=0.1)
    return net


def opened(job: Job, engine: str, precision: str) -> Bind:
    """One of ENGINES; raises AbsentError where this machine lacks something."""
    if engine == "torch":
        return torch_engine(job.net, precision, job.stream.device)
    if engine == "onnxruntime":
        need_cuda_provider()
        path = job.files.fp16 if precision == "fp16" else job.files.fp32
        return session_engine(cuda_session(path, job.stream, precision))
    if precision != "fp16":
        raise AbsentError("the product builds TensorRT engines in FP16 alone")
    return tensorrt_engine(lambda: job.files.fp16, len(job.crops))


def engine_rows(job: Job, empty: Sequence[Row], open_: Callable[[], Bind]) -> Iterator[Row]:
    """Rows of one engine and precision, filled; what cannot be opened is the reason of each."""
    try:
        job.need(empty[0].precision)
        bind = open_()
    except Exception as error:  # noqa: BLE001  whatever a runtime raises is the row's reason
        yield from (without(row, error) for row in empty)
        return
    for row in empty:
        yield _filled(job, row, partial(_inference, job, row, bind))


def training_rows(job: Job, batch: int, kinds: Sequence[str] = gpu_training.KINDS) -> Iterator[Row]:
    """A step of each kind; before them the upload alone, which is a part of every step."""
    data = gpu_training.random_batch(batch, job.net.architecture.classes)

    def measured(row: Row, kind: str, run: Callable[[Learner, Batch], Run]) -> Row:
        of, device = job.net.architecture, job.stream.device
        if kind.endswith(gpu_training.COMPILED):
            gpu_training.need_triton()
        learner = gpu_training.learner(kind, of.classes, batch, device, of.low_rank)
        with arithmetic(_precision(kind)):
            return replace(row, times=timed(run(learner, data), job.stream, 2 * job.seconds))

    upload = Row(UPLOAD, "fp32", batch)
    yield _filled(job, upload, partial(measured, upload, "fp32", gpu_training.upload))
    for kind in kinds:
        row = Row(TRAIN, kind, batch)
        row = _filled(job, row, partial(measured, row, kind, gpu_training.step))
        yield _beside(job, row, training(job.layers, batch, WIDTH[_precision(kind)]))


def without(row: Row, error: Exception) -> Row:
    """The row with its reason: something that is lacking here, or a fault."""
    if isinstance(error, torch.OutOfMemoryError):
        return replace(row, reason="out of the card's memory")
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, AbsentError | ImportError):
        return replace(row, reason=told)
    return replace(row, reason=f"failed: {type(error).__name__}: {told}", failed=True)


def differing(answers: Probabilities, reference: Probabilities) -> float:
    """The largest difference of a probability; raises WrongAnswersError where it is no rounding."""
    count = min(len(answers), len(reference))
    difference = float(np.abs(answers[:count] - reference[:count]).max())
    if not (difference <= WRONG and np.isfinite(answers).all()):
        raise WrongAnswersError(f"probabilities differ by {difference:.3g} from PyTorch's in FP32")
    return difference


def _filled(job: Job, row: Row, measure: Callable[[], Row]) -> Row:
    try:
        job.need(_precision(row.precision))
        return measure()
    except Exception as error:  # noqa: BLE001
        return without(row, error)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _inference(job: Job, row: Row, bind: Bind) -> Row:
    device = job.stream.device
    images = torch.from_numpy(job.crops[: row.batch]).to(device)
    answers = torch.full((row.batch, job.net.architecture.classes), torch.nan, device=device)
    run = bind(images, answers)
    with arithmetic(row.precision, search=True):
        run()
        job.stream.wait()
        difference = differing(answers.cpu().numpy(), job.reference)
        times = timed(run, job.stream, job.seconds)
    measured = replace(row, times=times, difference=difference)
    return _beside(job, measured, inference(job.layers, row.batch, WIDTH[row.precision]))


def _beside(job: Job, row: Row, work: Sequence[Work]) -> Row:
    """With what the card could do in that time."""
    if row.times is None:
        return row
    return replace(row, achieved=achieved(work, job.rates[_precision(row.precision)], row.times.median_s))


def _precision(kind: str) -> str:
    return kind.removesuffix(gpu_training.COMPILED)
