"""alexnet score: files in batches through Triton."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from commands.terminal import columns, err, out
from commands.wiring import extra, settings_of, triton_backend
from serving.contract import Crops

if TYPE_CHECKING:
    from serving.backends import Backend, Model
    from serving.score import Job, Pace, Stages, Told

def score(
    source: Annotated[str, typer.Argument(help="a folder, a .txt list, .tar shards, a URL or a pattern")],
    table: Annotated[Path, typer.Option("--out", help="the table: .parquet, .csv or .jsonl")],
    triton: Annotated[str, typer.Option(metavar="HOST:PORT[,HOST:PORT...]")] = "127.0.0.1:8001",
    model: Annotated[str, typer.Option(help="the model's name there")] = "alexnet",
    crops: Annotated[Crops, typer.Option(help="views of each photograph: center or ten")] = Crops.TEN,
    top: Annotated[int, typer.Option(min=1, help="how many labels")] = 5,
    workers: Annotated[int, typer.Option(help="decoding processes; 0: one for each core")] = 0,
    in_flight: Annotated[int, typer.Option(min=1, help="batches under way; 2 suits one server")] = 2,
    wait_s: Annotated[float, typer.Option(min=0, help="for a server that is away")] = 300,
    on_ray: Annotated[
        str | None, typer.Option("--ray", metavar="HOST:PORT", help="decode on this Ray cluster, or: local")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a table that is there")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="forget what was begun")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="status 1 if any file has no answer")] = False,
) -> None:
    """Score files in batches through Triton; killed and repeated, it goes on where it stood."""
    with extra("score"):
        import pyarrow  # noqa: F401

        from serving.score import Job, Pace
        from serving.score import score as run

    job = Job(source, crops, top)
    pace = Pace(workers or settings_of({}).decode_workers, in_flight, wait_s)
    settings = settings_of(dict(triton=triton, model=model))
    make_backend = triton_backend(settings)
    backend = make_backend()
    stages = _ray_stages(on_ray, job, pace, make_backend) if on_ray else None
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with _score_progress() as told:
        try:
            summary = asyncio.run(
                run(job, table, backend, pace, force=force, restart=restart, told=told, stages=stages)
            )
        except KeyboardInterrupt:
            err.print("stopped; the same command goes on from here", highlight=False)
            raise typer.Exit(130) from None
    seconds = time.monotonic() - started
    failed = summary.reasons.total()
    said = f"{table}: {summary.rows} rows in {seconds:.1f} s, {failed} without an answer"
    out.print(said, highlight=False, soft_wrap=True)
    for kind, counts in (("label", summary.labels), ("reason", summary.reasons)):
        rows = Table(kind, "files", box=None)
        for name, count in counts.most_common(10):
            rows.add_row(escape(name), str(count))
        if counts:
            out.print(rows)
    raise typer.Exit(1 if strict and failed else 0)


def _ray_stages(
    address: str, job: Job, pace: Pace, make_backend: Callable[[], Backend]
) -> Callable[[Model], Stages]:
    with extra("ray"):
        from serving.score_ray import RayStages, connect

    cpus = connect(address)
    return lambda model: RayStages(job, model, make_backend, pace, cpus)


@contextmanager
def _score_progress() -> Iterator[Told]:
    """A bar with files a second and the time left; without a terminal, a line for what is waited for."""
    from serving.score import Told

    more = (MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns(), *more, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("score", total=None, speed="")
        first: list[tuple[float, int]] = []
        said: list[str | None] = [None]

        def progress(done: int, total: int) -> None:
            first.append((time.monotonic(), done))
            seconds, files = first[-1][0] - first[0][0], done - first[0][1]
            del first[1:]
            speed = f"{files / seconds:.1f}/s" if seconds and files else ""
            bar.update(task, completed=done, total=total, speed=speed)

        def waiting(reason: str | None) -> None:
            bar.update(task, description="score" if reason is None else "waiting")
            if reason not in (None, said[0]):
                err.print(f"waiting: {reason}", highlight=False, soft_wrap=True)
            said[0] = reason

        yield Told(progress, waiting)
