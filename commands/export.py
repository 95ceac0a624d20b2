"""alexnet export: a checkpoint becomes served versions."""

from __future__ import annotations

import json
import statistics
import timeit
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from commands.hand_over import hand_over_to
from commands.options import REPOSITORY, Repository, TritonServers
from commands.terminal import out

if TYPE_CHECKING:
    from export.forms import Form


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
    from commands.order import Order, Version, fulfil, precisions_of

    path = checkpoint / "checkpoint.safetensors" if checkpoint.is_dir() else checkpoint
    order = Order(
        path, repository, name, precisions_of(precision), data, low_rank, full_width, half_storage
    )
    hand_over = hand_over_to(triton)
    table = Table("MB", "ten crops ms", "max |dp|", "same top-1", "top-1 %", box=None)
    table.add_column("version", overflow="fold")
    served = True
    try:
        for done in fulfil(order):
            if isinstance(done, Version):
                table.add_row(*_exported(done.folder, done.form))
                served &= hand_over(done.folder)
            else:
                table.add_row(*_checked(done.file, done.facts))
    finally:
        if table.row_count:
            out.print(table)
    raise typer.Exit(0 if served else 1)


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
