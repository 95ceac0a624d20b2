"""What `alexnet export` is asked for, and how it becomes versions: one network, each precision in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from commands.low_rank import check_drop, factored, form_accuracy
from commands.options import REPOSITORY
from commands.photographs import crops_of, decode
from commands.terminal import progress
from export.auto import IMAGES as AUTO_IMAGES
from export.container import CONTAINERS, build_command
from export.forms import Form, Precision, WriteOnnx, fp16, fp32, int8, once
from export.gate import generated_crops
from export.publish import GATE_IMAGES, Validation, publish
from export.to_fp16 import write_checked
from export.to_onnx import ExportError, to_onnx
from export.to_tensorrt import NoTensorRTError, find_tensorrt
from model.checkpoint import Checkpoint, load
from model.fold import expand
from model.images import has_split

if TYPE_CHECKING:
    from model.data import Decoded
    from serving.preprocess import Pixels

CALIBRATION_IMAGES = 384
"""Two thirds observed, one third held out to choose the method."""


@dataclass(frozen=True)
class Order:
    """The command's arguments; raises ExportError where they contradict each other."""

    checkpoint: Path
    repository: Path = REPOSITORY
    name: str = "alexnet"
    precisions: tuple[Precision, ...] = (Precision.FP32,)
    data: Path | None = None
    low_rank: int | None = None
    full_width: bool = False
    half_storage: bool = False

    def __post_init__(self) -> None:
        if Precision.INT8 in self.precisions and self.data is None:
            raise ExportError("INT8 is calibrated on photographs: give their folder with --data")
        if self.low_rank and self.full_width:
            raise ExportError("--low-rank factors fc6 and fc7, --full-width multiplies factors out: give one")

    @property
    def fp16_file(self) -> Path:
        """Beside the checkpoint; of another width than its own: `.rank256`, `.full`."""
        width = f".rank{self.low_rank}" if self.low_rank else ".full" if self.full_width else ""
        return self.checkpoint.with_suffix(f"{width}.fp16.onnx")

    def fp16_arguments(self) -> list[str]:
        """This order again, for FP16 alone; what stands at its default is left out."""
        options = (
            ("--repository", self.repository, REPOSITORY),
            ("--name", self.name, "alexnet"),
            ("--data", self.data, None),
            ("--low-rank", self.low_rank, None),
        )
        changed = [(name, str(value)) for name, value, default in options if value != default]
        flags = ["--full-width"] if self.full_width else []
        given = [part for pair in changed for part in pair]
        return [str(self.checkpoint), "--precision", "fp16", *given, *flags]


@dataclass(frozen=True)
class Version:
    """Published: its folder, and what it is a form of."""

    folder: Path
    form: Form


@dataclass(frozen=True)
class Checked:
    """A file behind its gates that is no version: FP16's, which engines are built from."""

    file: Path
    facts: dict[str, Any]


def precisions_of(text: str) -> tuple[Precision, ...]:
    """`int8,fp32` -> each once, FP16 last: a machine that cannot build engines publishes the others."""
    try:
        wanted = {Precision(part.strip()) for part in text.split(",")}
    except ValueError as error:
        raise ExportError(f"{error}; --precision is one or more of {', '.join(Precision)}") from error
    return tuple(sorted(wanted, key=list(Precision).index))


def fulfil(order: Order, write: WriteOnnx = to_onnx) -> Iterator[Version | Checked]:
    """Publish each precision, each yielded as it is done; `write` is called once for a network.

    Raises ExportError: what was yielded before stands.
    """
    network = load(order.checkpoint)
    full = fp32(network.net, write=write)
    if order.low_rank:
        network = factored(network, order.data, order.low_rank)
    if order.full_width:
        network.net = expand(network.net)
    with tempfile.TemporaryDirectory() as folder:
        graph = once(
            fp32(network.net, half_storage=order.half_storage, write=write), Path(folder) / "fp32.onnx"
        )
        images = None if order.data is None else crops_of(order.data, "val", network, 256)
        training = _training(order, network)
        validation = _validation(order, network, graph)
        if order.low_rank and validation:
            check_drop(full, network, validation)
        del full  # a full network's weights, where it was factored
        for precision in order.precisions:
            if precision is Precision.FP16:
                checked = _fp16_file(order, network, images)
                yield checked
                form = _fp16(order, checked)
            else:
                form = graph if precision is Precision.FP32 else _int8(order, network)
            steps = 2 * len(validation.data.targets) if validation else 1
            with progress(f"{precision}: export, gate, publish", steps) as advance:
                version = publish(
                    network, order.checkpoint, order.repository, order.name, form=form, images=images,
                    validation=validation and replace(validation, advance=advance), training=training,
                )  # fmt: skip
            yield Version(version, form)


def _training(order: Order, network: Checkpoint) -> Decoded | None:
    """Photographs on which the margin of `crops=auto` is chosen, if there are any."""
    if order.data is None or not has_split(order.data, "train"):
        return None
    return decode(order.data, [label.wnid for label in network.labels], "train", AUTO_IMAGES)


def _validation(order: Order, network: Checkpoint, graph: Form) -> Validation | None:
    """The validation photographs, and the FP32 graph's accuracy on them, where anything is measured by it."""
    measured = Precision.INT8 in order.precisions or (Precision.FP16 in order.precisions and _has_tensorrt())
    if order.data is None or not (order.low_rank or measured):
        return None
    decoded = decode(order.data, [label.wnid for label in network.labels])
    unmeasured = Validation(decoded, {})
    return replace(unmeasured, reference=form_accuracy(graph, unmeasured, "fp32: accuracy"))


def _has_tensorrt() -> bool:
    try:
        find_tensorrt()
    except NoTensorRTError:
        return False
    return True


def _int8(order: Order, network: Checkpoint) -> Form:
    assert order.data is not None
    crops = crops_of(order.data, "train", network, CALIBRATION_IMAGES)
    held_out = crops[2::3]
    used = np.concatenate([crops[0::3], crops[1::3]])
    with progress("int8: calibration", len(used)) as advance:
        return int8(network.net, used, held_out, advance)


def _fp16_file(order: Order, network: Checkpoint, images: Pixels | None) -> Checked:
    """The FP16 ONNX beside the checkpoint, and what was measured of it."""
    crops = generated_crops(GATE_IMAGES) if images is None else images
    with progress("fp16: ONNX, two gates", 1):
        return Checked(order.fp16_file, write_checked(network.net, order.fp16_file, crops))


def _fp16(order: Order, checked: Checked) -> Form:
    """The engine's form; without TensorRT or a GPU the error says what is missing and how to go on."""
    try:
        trt, gpu = find_tensorrt()
    except NoTensorRTError as error:
        release, version = next(iter(CONTAINERS.items()))
        raise NoTensorRTError(
            f"{checked.file} is written and checked, but no engine was built and none published: {error}.\n"
            f"On a machine with an NVIDIA GPU and Docker, from this folder, for Triton {release} "
            f"(TensorRT {version}; use the release that will serve it):\n"
            f"{build_command(order.fp16_arguments())}"
        ) from error
    return fp16(checked.file, checked.facts, trt, gpu)
