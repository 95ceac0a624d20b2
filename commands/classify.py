"""alexnet classify: the gateway's pipeline in the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from commands.options import REPOSITORY, Repository
from commands.terminal import err, out
from commands.wiring import settings_of
from serving.contract import Crops
from serving.errors import ServingError

if TYPE_CHECKING:
    from serving.pipeline import Answer
    from serving.settings import Settings

def classify(
    images: Annotated[list[Path], typer.Argument(help="photographs")],
    top: Annotated[int, typer.Option(min=1, help="how many labels")] = 5,
    crops: Annotated[Crops, typer.Option(help="views of each photograph")] = Crops.TEN,
    repository: Repository = REPOSITORY,
    model: str = "alexnet",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """The gateway's pipeline in the terminal, without a server."""
    settings = settings_of(dict(model_repository=repository, model=model))
    report = _print_json if as_json else _print_table
    failed = asyncio.run(_classify(settings, images, top, crops, report))
    raise typer.Exit(1 if failed else 0)


async def _classify(
    settings: Settings, images: list[Path], top: int, crops: Crops, report: Callable[[Path, Any], None]
) -> int:
    from serving.backends import OnnxRuntimeBackend
    from serving.decoder import Bounds
    from serving.decoders import Decoders
    from serving.pipeline import Pipeline

    with closing(Decoders(1, Bounds(max_pixels=settings.max_pixels))) as decoders:
        decoders.start()  # while the model is loaded
        backend = OnnxRuntimeBackend(settings.model_repository, settings.model, settings.infer_threads)
        await backend.start()
        pipeline = Pipeline(
            backend,
            decoders,
            max_waiting_crops=settings.max_waiting_crops,
            auto_margin=settings.auto_margin,
        )
        failed = 0
        for image in images:
            try:
                report(image, await pipeline.classify(image.read_bytes(), crops, top))
            except (ServingError, OSError) as error:
                failed += 1
                report(image, error.strerror if isinstance(error, OSError) and error.strerror else error)
        pipeline.close()
        await backend.close()
    return failed


def _print_table(image: Path, result: Answer | object) -> None:
    from serving.pipeline import Answer

    if not isinstance(result, Answer):
        err.print(f"[red]{escape(str(image))}:[/] {escape(str(result))}", highlight=False, soft_wrap=True)
        return
    milliseconds = result.timing_ms["decode"] + result.timing_ms["infer"]
    table = Table(box=None, pad_edge=False)
    table.add_column("%", justify="right")
    table.add_column("label")
    table.add_column("wnid", style="dim")
    for p in result.predictions:
        table.add_row(f"{100 * p.probability:.1f}", p.label, p.wnid)
    out.print(f"[bold]{escape(str(image))}[/]", highlight=False, soft_wrap=True)
    out.print(table)
    out.print(f"[dim]{result.crops} crops, {milliseconds:.0f} ms[/]\n", highlight=False)


def _print_json(image: Path, result: Answer | object) -> None:
    from dataclasses import asdict

    from serving.pipeline import Answer

    if isinstance(result, Answer):
        entry = asdict(result)
        del entry["views"]
    else:
        entry = {"error": str(result)}
    sys.stdout.write(json.dumps({"image": str(image), **entry}) + "\n")
