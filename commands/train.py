"""alexnet prepare, train and report."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, Progress

from commands.photographs import decode
from commands.terminal import columns, err, out, progress, say

if TYPE_CHECKING:
    from model.config import TrainConfig

def prepare(
    source: Annotated[
        Path, typer.Argument(help="folder with train/<class>/* and val/<class>/*, or ILSVRC2012's archives")
    ],
    destination: Annotated[Path, typer.Option("--out", help="folder for the shards")],
    processes: Annotated[int | None, typer.Option(min=1, help="[default: one a core]")] = None,
    shard_images: Annotated[int, typer.Option(min=1, help="images in a shard")] = 1000,
    quality: Annotated[int, typer.Option(min=1, max=100, help="of the JPEGs that are encoded anew")] = 90,
) -> None:
    """Shards at shorter side 256 for large trainings; stopped, it goes on where it was."""
    from collections import Counter

    from model.archives import Source
    from model.prepare import PROBLEMS_FILE
    from model.prepare import prepare as run

    with Progress(*columns(), MofNCompleteColumn(), console=err, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("listing", total=None)
        done = run(
            Source.scan(source), destination, processes=processes or os.cpu_count() or 1,
            shard_images=shard_images, quality=quality,
            begin=lambda total, before: bar.update(
                task, description="images", total=total, completed=before
            ),
            advance=lambda images: bar.advance(task, images),
        )  # fmt: skip
    for split, images in done.images.items():
        say(f"{destination / split}: {images:,} images")
    for kind, count in sorted(Counter(problem.kind for problem in done.problems).items()):
        say(f"{kind}: {count:,} (listed in {destination / PROBLEMS_FILE})")
    say(f"next: alexnet train {destination}")


def train(
    data: Annotated[str, typer.Argument(help="folder or URL: train/<class>/*, val/<class>/*, or shards")],
    run: Annotated[Path, typer.Option(help="folder for checkpoint, state and log")] = Path("runs/alexnet"),
    config: Annotated[
        Path | None, typer.Option(help="an earlier run's config.json; the other flags change it")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="modern, paper or finetune [default: modern; with --init finetune]")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="a checkpoint to start from; its classes may be others")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="over all processes")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0)] = None,
    variant: Annotated[str | None, typer.Option(help="2012 or owt [default: 2012]")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16 [default: auto]")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    threads: Annotated[int | None, typer.Option(help="[default: one a core]")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile [default: no]")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write its curves, too")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run stopped")] = False,
) -> None:
    """Train AlexNet on an image folder; under torchrun with several processes."""
    from model.machine import keep_freed_memory
    from model.train import Interrupted, start

    keep_freed_memory()
    given = dict(
        data=_place(data), init=None if init is None else str(init.resolve()), epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate, variant=variant, precision=precision,
        seed=seed, threads=threads, compile=compiled,
    )  # fmt: skip
    try:
        wanted = train_config(config, recipe, given)
        path = start(wanted, run, resume=resume, say=say, tensorboard=tensorboard)
    except Interrupted as error:
        if _first_process():
            err.print(f"{error}; go on with: alexnet train {data} --run {run} --resume", highlight=False)
        raise typer.Exit(130) from error
    if _first_process():
        out.print(f"{path}\nnext: alexnet export {path}", highlight=False, soft_wrap=True)


def train_config(file: Path | None, recipe: str | None, given: dict[str, Any]) -> TrainConfig:
    """An earlier run's configuration, or a recipe's, changed by what is not None in `given`."""
    from model.config import TrainConfig, TrainError

    changes = {name: value for name, value in given.items() if value is not None}
    if file is None:
        return TrainConfig.of_recipe(recipe or ("finetune" if "init" in changes else "modern"), **changes)
    if recipe is not None:
        raise TrainError(f"--config {file} names its recipe already; leave --recipe away")
    return replace(TrainConfig.read(file), **changes)


def _place(data: str) -> str:
    """A path that holds wherever the command runs next; a URL as it is."""
    return data if "://" in data else str(Path(data).resolve())


def _first_process() -> bool:
    """Of those that torchrun started, the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def report(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    data: Annotated[Path | None, typer.Option(help="[default: what the run was trained on]")] = None,
    destination: Annotated[Path | None, typer.Option("--out", help="[default: report.html in it]")] = None,
) -> None:
    """One HTML page about a run: curves, filters, confusion, its surest mistakes."""
    from model.checkpoint import load
    from model.config import TrainConfig
    from model.evaluate import torch_predictor
    from model.findings import find
    from model.report import Report, read_log
    from model.run import Run

    folder = Run(run)
    trained = load(folder.checkpoint)
    source = data or TrainConfig.read(folder.config).data
    decoded = decode(source, [label.wnid for label in trained.labels])
    with progress("ten crops", len(decoded.targets)) as advance:
        findings = find(torch_predictor(trained.net), decoded, advance)
    page = Report(run.name, trained, read_log(folder.log), findings, decoded, folder.environment())
    path = destination or run / "report.html"
    path.write_text(page.html(), encoding="utf-8")
    out.print(str(path), highlight=False, soft_wrap=True)
