"""alexnet export: a checkpoint becomes served versions."""

from __future__ import annotations

import json
import statistics
import timeit
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from commands.hand_over import hand_over_to
from commands.low_rank import check_drop, factored, onnx_accuracy
from commands.options import REPOSITORY, Repository, TritonServers
from commands.photographs import crops_of, decode
from commands.terminal import out, progress

if TYPE_CHECKING:
    from export.forms import Form, Precision
    from export.publish import Validation
    from model.checkpoint import Checkpoint
    from serving.preprocess import Pixels

CALIBRATION_IMAGES = 384
"""Two thirds observed, one third held out to choose the method."""


def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or a run's folder")],
    repository: Repository = REPOSITORY,
    name: Annotated[str, typer.Option(help="the model's name in the repository")] = "alexnet",
    precision: Annotated[str, typer.Option(help="fp32, int8, fp16, or several with commas")] = "fp32",
    data: Annotated[
        Path | None, typer.Option(help="train/ to calibrate INT8 on, val/ to check on [default: generated]")
    ] = None,
    full_width: Annotated[bool, typer.Option(help="multiply low-rank factors out to 4096 x 9216")] = False,
    low_rank: Annotated[
        int | None, typer.Option(min=1, max=4096, help="factor fc6 and fc7 at this rank, on --data's train/")
    ] = None,
    half_storage: Annotated[
        bool, typer.Option(help="store FP32's weights as FP16; the arithmetic stays FP32")
    ] = False,
    triton: TritonServers = "",
) -> None:
    """Publish the next version of a model in each precision that answers as the network does."""
    from export.auto import IMAGES as AUTO_IMAGES
    from export.forms import Precision
    from export.publish import publish
    from export.to_onnx import ExportError
    from model.checkpoint import load
    from model.fold import expand
    from model.images import has_split

    try:
        wanted = sorted({Precision(part.strip()) for part in precision.split(",")}, key=list(Precision).index)
    except ValueError as error:
        raise ExportError(f"{error}; --precision is one or more of {', '.join(Precision)}") from error
    if Precision.INT8 in wanted and data is None:
        raise ExportError("INT8 is calibrated on photographs: give their folder with --data")
    hand_over = hand_over_to(triton)
    path = checkpoint / "checkpoint.safetensors" if checkpoint.is_dir() else checkpoint
    loaded = full = load(path)
    if low_rank and full_width:
        raise ExportError("--low-rank factors fc6 and fc7, --full-width multiplies factors out: give one")
    if low_rank:
        loaded = factored(full, data, low_rank)
    if full_width:
        loaded.net = expand(loaded.net)
    classes = [label.wnid for label in loaded.labels]
    images = None if data is None else crops_of(data, "val", loaded, 256)
    trained = data is not None and has_split(data, "train")
    training = decode(data, classes, "train", AUTO_IMAGES) if data and trained else None
    measures = low_rank or Precision.INT8 in wanted or (Precision.FP16 in wanted and _has_tensorrt())
    validation = _validation(data, loaded) if data is not None and measures else None
    if low_rank and validation:
        check_drop(full, loaded, validation)
    del full
    table = Table("MB", "ten crops ms", "max |dp|", "same top-1", "top-1 %", box=None)
    table.add_column("version", overflow="fold")
    served = True
    try:
        for each in wanted:  # FP16 is the last: a machine that cannot build engines publishes the others
            if each is Precision.FP16:
                file, facts = _fp16_file(loaded, path, images, _width(low_rank, full_width))
                table.add_row(*_checked(file, facts))
                again = {"--repository": repository, "--name": name, "--data": data}
                form = _fp16(file, facts, _export_arguments(path, again, low_rank, full_width))
            else:
                form = _form(each, data, loaded, half_storage)
            steps = 2 * len(validation.data.targets) if validation else 1
            with progress(f"{each}: export, gate, publish", steps) as advance:
                measured = validation and replace(validation, advance=advance)
                version = publish(
                    loaded, path, repository, name, form=form, images=images, validation=measured,
                    training=training,
                )
            table.add_row(*_exported(version, form))
            served &= hand_over(version)
    finally:
        if table.row_count:
            out.print(table)
    raise typer.Exit(0 if served else 1)


def _form(precision: Precision, data: Path | None, checkpoint: Checkpoint, half_storage: bool) -> Form:
    import numpy as np

    from export.forms import Precision, fp32, int8

    if precision is Precision.FP32 or data is None:
        return fp32(checkpoint.net, half_storage=half_storage)
    crops = crops_of(data, "train", checkpoint, CALIBRATION_IMAGES)
    held_out = crops[2::3]
    used = np.concatenate([crops[0::3], crops[1::3]])
    with progress("int8: calibration", len(used)) as advance:
        return int8(checkpoint.net, used, held_out, advance)


def _validation(data: Path, checkpoint: Checkpoint) -> Validation:
    """The validation photographs, and the FP32 network's accuracy on them."""
    from export.publish import Validation

    decoded = decode(data, [label.wnid for label in checkpoint.labels])
    unmeasured = Validation(decoded, {})
    return replace(unmeasured, reference=onnx_accuracy(checkpoint, unmeasured, "fp32: accuracy"))


def _has_tensorrt() -> bool:
    from export.to_tensorrt import NoTensorRTError, find_tensorrt

    try:
        find_tensorrt()
    except NoTensorRTError:
        return False
    return True


def _fp16_file(
    checkpoint: Checkpoint, path: Path, images: Pixels | None, width: str
) -> tuple[Path, dict[str, Any]]:
    """The FP16 ONNX beside the checkpoint, checked, and what was measured of it."""
    from export.gate import generated_crops
    from export.publish import GATE_IMAGES
    from export.to_fp16 import write_checked

    file = path.with_suffix(f"{width}.fp16.onnx")
    crops = generated_crops(GATE_IMAGES) if images is None else images
    with progress("fp16: ONNX, two gates", 1):
        return file, write_checked(checkpoint.net, file, crops)


def _fp16(file: Path, facts: dict[str, Any], arguments: list[str]) -> Form:
    """The engine's form; without TensorRT or a GPU the error says what is missing and how to go on."""
    from export.container import CONTAINERS, build_command
    from export.forms import fp16
    from export.to_tensorrt import NoTensorRTError, find_tensorrt

    try:
        trt, gpu = find_tensorrt()
    except NoTensorRTError as error:
        release, version = next(iter(CONTAINERS.items()))
        raise NoTensorRTError(
            f"{file} is written and checked, but no engine was built and none published: {error}.\n"
            f"On a machine with an NVIDIA GPU and Docker, from this folder, for Triton {release} "
            f"(TensorRT {version}; use the release that will serve it):\n{build_command(arguments)}"
        ) from error
    return fp16(file, facts, trt, gpu)


def _width(low_rank: int | None, full_width: bool) -> str:
    """What tells a file of another width from the checkpoint's own: `.rank256`, `.full`."""
    return f".rank{low_rank}" if low_rank else ".full" if full_width else ""


def _export_arguments(
    path: Path, options: dict[str, Any], low_rank: int | None, full_width: bool
) -> list[str]:
    """This call again, for FP16 alone; what stands at its default is left out."""
    given = {"--repository": REPOSITORY, "--name": "alexnet", "--data": None}
    changed = [(name, str(value)) for name, value in options.items() if value != given[name]]
    flags = ["--low-rank", str(low_rank)] if low_rank else ["--full-width"] if full_width else []
    return [str(path), "--precision", "fp16", *(part for pair in changed for part in pair), *flags]


def _checked(file: Path, facts: dict[str, Any]) -> tuple[str, ...]:
    """A row of export's table for a file that is no version; ONNX Runtime's time with it says nothing."""
    parity, reference = facts["onnx"]["parity"], facts["onnx"]["reference"]
    worst = max(parity["max_abs_difference"], reference["max_abs_difference"])
    size = f"{file.stat().st_size / 1e6:.1f}"
    return size, "", f"{worst:.1e}", f"{parity['top1_agreement']:.1%}", "", str(file)


def _exported(version: Path, form: Form) -> tuple[str, ...]:
    """A row of export's table; the time is the median of eleven inferences on this machine."""
    from export.gate import generated_crops

    provenance = json.loads((version / "provenance.json").read_text())
    parity, crops = provenance["parity"], generated_crops(10)
    predict = form.target.predictor(version / form.target.file)
    seconds = [timeit.timeit(lambda: predict(crops), number=1) for _ in range(12)]
    accuracy = provenance.get("accuracy", {}).get("top1_ten")
    return (
        f"{provenance['model']['bytes'] / 1e6:.1f}",
        f"{1000 * statistics.median(seconds[1:]):.1f}",
        f"{parity['max_abs_difference']:.1e}",
        f"{parity['top1_agreement']:.1%}",
        "" if accuracy is None else f"{100 * accuracy:.2f}",
        str(version),
    )
