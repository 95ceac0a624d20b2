"""The `alexnet` command: the composition root. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from serving.contract import Crops
from serving.errors import MalformedRequest, ModelNotReady, ServingError

if TYPE_CHECKING:
    from export.forms import Form, Precision
    from export.publish import Validation
    from model.checkpoint import Checkpoint
    from model.config import TrainConfig
    from model.data import Decoded
    from model.evaluate import Predict, Tally
    from model.images import Images
    from serving.backends import Backend, Model
    from serving.pipeline import Answer
    from serving.preprocess import Pixels
    from serving.score import Job, Pace, Stages, Told
    from serving.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=("AlexNet (Krizhevsky, Sutskever, Hinton 2012): trained, exported and served."),
)
out, err = Console(), Console(stderr=True)

imports = typer.Typer(no_args_is_help=True, help="Make a checkpoint from somebody else's weights.")
app.add_typer(imports, name="import")

REPOSITORY = Path("model_repository")
TRITON_ANSWER_S = 120.0
"""For one batch of crops that is evaluated through a Triton server."""
CALIBRATION_IMAGES = 384
"""Two thirds observed, one third held out to choose the method."""
Repository = Annotated[Path, typer.Option("--repository", help="the model repository's folder")]
TritonServers = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT[,HOST:PORT...]",
        help="have these servers (gRPC; a name: all its addresses) load it and ask them its golden images",
    ),
]


def main() -> None:
    """Run the command; an error of the project's own ends it with one line and status 1."""
    try:
        app()
    except Exception as error:
        if not _is_ours(error):
            raise
        err.print(f"[red]alexnet:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    return isinstance(error, ServingError) or type(error).__module__.split(".")[0] in ("model", "export")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="[default: 8000; 0: any free one]")] = None,
    repository: Annotated[Path | None, typer.Option(help="[default: model_repository]")] = None,
    model: Annotated[str | None, typer.Option(help="[default: alexnet]")] = None,
    threads: Annotated[int | None, typer.Option(help="inference threads [default: one a core]")] = None,
    triton: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT[,HOST:PORT...]",
            help="Triton's gRPC answers, labels and all, in place of ONNX Runtime in this process",
        ),
    ] = None,
) -> None:
    """Serve POST /classify and the page. Every further knob is an ALEXNET_... variable."""
    from serving.server import serve as run

    given = dict(host=host, port=port, model_repository=repository, model=model, infer_threads=threads)
    settings = _settings({**given, "triton": triton})
    backend = _backend(settings)

    def ready(url: str) -> None:
        try:
            info = backend.model.info
            state = f"{info.name} version {info.version} ({info.precision}) ready on {url}"
        except ModelNotReady as error:
            state = f"on {url}, not ready: {error}"
        out.print(f"alexnet-serving: {state}", highlight=False, soft_wrap=True)

    _log_to_stderr()
    asyncio.run(run(settings, backend, ready))


def _backend(settings: Settings) -> Backend:
    from serving.backends import OnnxRuntimeBackend

    if settings.triton:
        return _triton_backend(settings)()
    return OnnxRuntimeBackend(
        settings.model_repository, settings.model, settings.infer_threads, settings.watch_s
    )


def _triton_backend(settings: Settings) -> Callable[[], Backend]:
    with _extra("triton"):
        from serving.triton_backend import TritonBackend
    return partial(
        TritonBackend,
        settings.triton,
        settings.model,
        concurrency=settings.triton_concurrency,
        keepalive_s=settings.triton_keepalive_s,
    )


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra a missing package belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise ModelNotReady(f"this needs the package {package}: pip install '.[{name}]'") from error


@app.command()
def triton(
    repository: Repository = REPOSITORY,
    models: Annotated[str, typer.Option(help="names with commas [default: all it can load]")] = "",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="8000 is the gateway's; 0: any free one")] = 8003,
    grpc_port: Annotated[int, typer.Option(help="0: any free one")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0: any free one")] = 8002,
    watch_s: Annotated[float, typer.Option(min=0.1, help="look for a new version so often")] = 2.0,
    log: Annotated[Path | None, typer.Option(help="file for everything the server says")] = None,
) -> None:
    """A local Triton server on the model repository, without Docker; follows what is published."""
    from serving.triton import LocalTriton

    _log_to_stderr()
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    server = LocalTriton(
        repository,
        [name.strip() for name in models.split(",") if name.strip()],
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        host=host,
        log=log,
        say=lambda text: err.print(text, highlight=False, soft_wrap=True),
    )
    with server:
        served = ", ".join(f"{entry['name']} version {entry['version']}" for entry in server.index())
        out.print(
            f"Triton: {served} ready on grpc://{server.grpc} and http://{server.http}, "
            f"metrics on http://{server.metrics}/metrics",
            highlight=False,
            soft_wrap=True,
        )
        server.follow(watch_s, stopped)


@app.command()
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
    with _extra("score"):
        import pyarrow  # noqa: F401

        from serving.score import Job, Pace
        from serving.score import score as run

    job = Job(source, crops, top)
    pace = Pace(workers or _settings({}).decode_threads, in_flight, wait_s)
    settings = _settings(dict(triton=triton, model=model))
    make_backend = _triton_backend(settings)
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
    out.print(f"{table}: {summary.rows} rows in {seconds:.1f} s, {failed} without an answer", highlight=False)
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
    with _extra("ray"):
        from serving.score_ray import RayStages, connect

    cpus = connect(address)
    return lambda model: RayStages(job, model, make_backend, pace, cpus)


@contextmanager
def _score_progress() -> Iterator[Told]:
    """A bar with files a second and the time left; without a terminal, a line for what is waited for."""
    from serving.score import Told

    columns = (*_columns(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
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


@app.command()
def classify(
    images: Annotated[list[Path], typer.Argument(help="photographs")],
    top: Annotated[int, typer.Option(min=1, help="how many labels")] = 5,
    crops: Annotated[Crops, typer.Option(help="views of each photograph")] = Crops.TEN,
    repository: Repository = REPOSITORY,
    model: str = "alexnet",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """The gateway's pipeline in the terminal, without a server."""
    settings = _settings(dict(model_repository=repository, model=model))
    report = _print_json if as_json else _print_table
    failed = asyncio.run(_classify(settings, images, top, crops, report))
    raise typer.Exit(1 if failed else 0)


async def _classify(
    settings: Settings, images: list[Path], top: int, crops: Crops, report: Callable[[Path, Any], None]
) -> int:
    from serving.backends import OnnxRuntimeBackend
    from serving.pipeline import Pipeline

    backend = OnnxRuntimeBackend(settings.model_repository, settings.model, settings.infer_threads)
    await backend.start()
    pipeline = Pipeline(
        backend,
        decode_threads=1,
        max_pixels=settings.max_pixels,
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


@app.command()
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

    with Progress(*_columns(), MofNCompleteColumn(), console=err, disable=not sys.stderr.isatty()) as bar:
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
        _say(f"{destination / split}: {images:,} images")
    for kind, count in sorted(Counter(problem.kind for problem in done.problems).items()):
        _say(f"{kind}: {count:,} (listed in {destination / PROBLEMS_FILE})")
    _say(f"next: alexnet train {destination}")


@app.command()
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
        wanted = _train_config(config, recipe, given)
        path = start(wanted, run, resume=resume, say=_say, tensorboard=tensorboard)
    except Interrupted as error:
        if _first_process():
            err.print(f"{error}; go on with: alexnet train {data} --run {run} --resume", highlight=False)
        raise typer.Exit(130) from error
    if _first_process():
        out.print(f"{path}\nnext: alexnet export {path}", highlight=False, soft_wrap=True)


def _train_config(file: Path | None, recipe: str | None, given: dict[str, Any]) -> TrainConfig:
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


def _say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)


def _first_process() -> bool:
    """Of those that torchrun started, the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="a checkpoint, an .onnx, http://GATEWAY or grpc://HOST:PORT/MODEL")
    ],
    data: Annotated[str, typer.Argument(help="folder or URL: <class>/*, val/<class>/*, or shards")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Top-1 and top-5 error with 95 % intervals, calibration error and speed; one crop and ten.

    The classes are matched by name, whatever the order of the model's outputs.
    """
    from dataclasses import asdict

    results = []
    with _tallying(model, data) as (count, tallied):
        for crops in (Crops.CENTER, Crops.TEN):
            with _progress(f"{crops} crops", count) as advance:
                started = time.perf_counter()
                result = tallied(crops, advance).evaluation(crops)
                results.append((result, count / (time.perf_counter() - started)))
    if as_json:
        entries = [asdict(result) | {"images_per_s": round(speed, 1)} for result, speed in results]
        sys.stdout.write(json.dumps(entries) + "\n")
        return
    table = Table("", *(str(result.crops) for result, _ in results), title=f"{model}, {count:,} images")
    for name, say in (
        ("top-1 error %", lambda r, _: _percent(r.top1_error, r.top1_interval)),
        ("top-5 error %", lambda r, _: _percent(r.top5_error, r.top5_interval)),
        ("top-1 accuracy %", lambda r, _: _percent(1 - r.top1_error)),
        ("calibration error %", lambda r, _: _percent(r.calibration_error)),
        ("images/s", lambda _, speed: f"{speed:.1f}"),
    ):
        table.add_row(name, *(say(result, speed) for result, speed in results))
    out.print(table)


def _percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """`12.03 (10.7 to 13.5)`."""
    between = "" if interval is None else " ({:.1f} to {:.1f})".format(*(100 * edge for edge in interval))
    return f"{100 * share:.2f}{between}"


@contextmanager
def _tallying(
    model: str, data: str
) -> Iterator[tuple[int, Callable[[Crops, Callable[[int], None]], Tally]]]:
    """How many images there are, and what counts the model's answers to them."""
    if model.startswith(("http://", "https://")):
        from model.remote import Gateway, remote_tally

        gateway = Gateway(model.rstrip("/"))
        images = _images(data, gateway.classes(), "val")
        yield len(images), lambda crops, advance: remote_tally(gateway, images, crops, advance)
        return
    from model.evaluate import tally

    with _predictor(model) as (predict, classes):
        decoded = _decode(data, classes)
        yield len(decoded.targets), lambda crops, advance: tally(predict, decoded, crops, advance)


@contextmanager
def _predictor(model: str) -> Iterator[tuple[Predict, list[str]]]:
    """A predictor and its classes' WordNet ids, in the order of its outputs."""
    if model.startswith("grpc://"):
        with _triton_predictor(model.removeprefix("grpc://")) as found:
            yield found
    elif model.endswith(".onnx"):
        from export.gate import onnx_predictor
        from serving.repository import labels_beside

        yield onnx_predictor(Path(model)), [label.wnid for label in labels_beside(Path(model))]
    else:
        from model.checkpoint import load
        from model.evaluate import torch_predictor

        checkpoint = load(Path(model))
        yield torch_predictor(checkpoint.net), [label.wnid for label in checkpoint.labels]


@contextmanager
def _triton_predictor(place: str) -> Iterator[tuple[Predict, list[str]]]:
    """`HOST:PORT/MODEL`, through the gateway's own backend; its loop runs while the block does."""
    from serving.loop_thread import LoopThread

    servers, _, name = place.partition("/")
    settings = _settings({"triton": servers, "model": name or None})
    backend, loop = _backend(settings), LoopThread()
    try:
        loop.wait(backend.start(), TRITON_ANSWER_S)
        classes = [label.wnid for label in backend.model.labels]
        yield lambda crops: loop.wait(backend.infer(crops), TRITON_ANSWER_S).probabilities, classes
    finally:
        loop.wait(backend.close(), TRITON_ANSWER_S)
        loop.close()


def _decode(data: Path | str, classes: list[str], split: str = "val") -> Decoded:
    from model.data import Decoded
    from model.machine import memory_bytes

    images = _images(data, classes, split)
    room = memory_bytes() / 2
    with _progress("decoding", len(images)) as advance:
        return Decoded.read(images, _settings({}).decode_threads, lambda: advance(1), room)


def _images(data: Path | str, classes: list[str], split: str) -> Images:
    """The split of `data`, or `data` itself where it has none."""
    from model.images import has_split, open_split

    return open_split(data, split if has_split(data, split) else "", classes)


@app.command()
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
    decoded = _decode(source, [label.wnid for label in trained.labels])
    with _progress("ten crops", len(decoded.targets)) as advance:
        findings = find(torch_predictor(trained.net), decoded, advance)
    page = Report(run.name, trained, read_log(folder.log), findings, decoded, folder.environment())
    path = destination or run / "report.html"
    path.write_text(page.html(), encoding="utf-8")
    out.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def compress(
    checkpoint: Annotated[Path, typer.Argument(help="a full-width checkpoint")],
    data: Annotated[Path, typer.Argument(help="folder with train/<class>/* and val/<class>/*")],
    destination: Annotated[Path, typer.Option("--out", help="the small checkpoint")],
    rank: Annotated[int, typer.Option(min=1, max=4096, help="rank of fc6 and fc7")] = 128,
) -> None:
    """Make fc6 and fc7 low rank, and every weight FP16; the accuracy left is measured and kept."""
    from model import checkpoint as checkpoints
    from model.compress import low_rank, output_components, round_to_half
    from model.evaluate import accuracy, torch_predictor

    full = checkpoints.load(checkpoint)
    classes = [label.wnid for label in full.labels]
    decoded = _decode(data, classes, "train")
    with _progress("principal components", len(decoded.targets)) as advance:
        components = output_components(full.net, decoded, advance)
    small = round_to_half(low_rank(full.net, components, rank))
    del decoded
    validation = _decode(data, classes)
    with _progress("accuracy", 2 * len(validation.targets)) as advance:
        left = accuracy(torch_predictor(small), validation, advance)
    facts = full.facts | {"accuracy": left}
    import torch

    checkpoints.save(
        destination, checkpoints.Checkpoint(small, full.labels, facts), dtype=torch.float16
    )
    out.print_json(data={f"rank {rank}, FP16": left, "full width": full.facts.get("last_epoch")})


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or a run's folder")],
    repository: Repository = REPOSITORY,
    name: Annotated[str, typer.Option(help="the model's name in the repository")] = "alexnet",
    precision: Annotated[str, typer.Option(help="fp32, int8, fp16, or several with commas")] = "fp32",
    data: Annotated[
        Path | None, typer.Option(help="train/ to calibrate INT8 on, val/ to check on [default: generated]")
    ] = None,
    full_width: Annotated[bool, typer.Option(help="multiply low-rank factors out to 4096 x 9216")] = False,
    half_storage: Annotated[
        bool, typer.Option(help="store FP32's weights as FP16; the arithmetic stays FP32")
    ] = False,
    triton: TritonServers = "",
) -> None:
    """Publish the next version of a model in each precision that answers as the network does."""
    from export.forms import Precision
    from export.publish import publish
    from export.to_onnx import ExportError
    from model.fold import expand

    try:
        wanted = sorted({Precision(part.strip()) for part in precision.split(",")}, key=list(Precision).index)
    except ValueError as error:
        raise ExportError(f"{error}; --precision is one or more of {', '.join(Precision)}") from error
    if Precision.INT8 in wanted and data is None:
        raise ExportError("INT8 is calibrated on photographs: give their folder with --data")
    hand_over = _hand_over(triton)
    path = checkpoint / "checkpoint.safetensors" if checkpoint.is_dir() else checkpoint
    loaded = _load_checkpoint(path)
    if full_width:
        loaded.net = expand(loaded.net)
    images = None if data is None else _crops_of(data, "val", loaded, 256)
    measures = Precision.INT8 in wanted or (Precision.FP16 in wanted and _has_tensorrt())
    validation = _validation(data, loaded) if data is not None and measures else None
    table = Table("MB", "ten crops ms", "max |dp|", "same top-1", "top-1 %", box=None)
    table.add_column("version", overflow="fold")
    served = True
    try:
        for each in wanted:  # FP16 is the last: a machine that cannot build engines publishes the others
            if each is Precision.FP16:
                file, facts = _fp16_file(loaded, path, images, full_width)
                table.add_row(*_checked(file, facts))
                again = {"--repository": repository, "--name": name, "--data": data}
                form = _fp16(file, facts, _export_arguments(path, again, full_width))
            else:
                form = _form(each, data, loaded, half_storage)
            steps = 2 * len(validation.data.targets) if validation else 1
            with _progress(f"{each}: export, gate, publish", steps) as advance:
                measured = validation and replace(validation, advance=advance)
                version = publish(
                    loaded, path, repository, name, form=form, images=images, validation=measured
                )
            table.add_row(*_exported(version, form))
            served &= hand_over(version)
    finally:
        if table.row_count:
            out.print(table)
    raise typer.Exit(0 if served else 1)


def _hand_over(triton: str) -> Callable[[Path], bool]:
    """What has the servers load a version's folder, and says whether all of them serve it."""
    if not triton:
        return lambda _: True
    with _extra("triton"):
        from serving.triton_load import load_everywhere
    from serving.triton_target import each_server

    try:
        servers = each_server(triton)
    except ValueError as error:
        raise MalformedRequest(f"--triton: {error}") from error
    key = _settings({}).triton_admin_key.get_secret_value()

    def hand_over(version: Path) -> bool:
        faults = asyncio.run(load_everywhere(servers, version, key))
        for fault in faults:
            said = escape(f"{version} is published, but not served everywhere. {fault}")
            err.print(f"[red]alexnet:[/] {said}", highlight=False, soft_wrap=True)
        if not faults:
            err.print(f"{version}: served by {triton}", highlight=False, soft_wrap=True)
        return not faults

    return hand_over


def _form(precision: Precision, data: Path | None, checkpoint: Checkpoint, half_storage: bool) -> Form:
    import numpy as np

    from export.forms import Precision, fp32, int8

    if precision is Precision.FP32 or data is None:
        return fp32(checkpoint.net, half_storage=half_storage)
    crops = _crops_of(data, "train", checkpoint, CALIBRATION_IMAGES)
    held_out = crops[2::3]
    used = np.concatenate([crops[0::3], crops[1::3]])
    with _progress("int8: calibration", len(used)) as advance:
        return int8(checkpoint.net, used, held_out, advance)


def _validation(data: Path, checkpoint: Checkpoint) -> Validation:
    """The validation photographs, and the FP32 network's accuracy on them."""
    from export.gate import onnx_predictor
    from export.publish import Validation
    from export.to_onnx import to_onnx
    from model.evaluate import accuracy

    decoded = _decode(data, [label.wnid for label in checkpoint.labels])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fp32.onnx"
        to_onnx(checkpoint.net, file)
        with _progress("fp32: accuracy", 2 * len(decoded.targets)) as advance:
            return Validation(decoded, accuracy(onnx_predictor(file), decoded, advance))


def _has_tensorrt() -> bool:
    from export.to_tensorrt import NoTensorRTError, find_tensorrt

    try:
        find_tensorrt()
    except NoTensorRTError:
        return False
    return True


def _fp16_file(
    checkpoint: Checkpoint, path: Path, images: Pixels | None, full_width: bool
) -> tuple[Path, dict[str, Any]]:
    """The FP16 ONNX beside the checkpoint, checked, and what was measured of it."""
    from export.gate import generated_crops
    from export.publish import GATE_IMAGES
    from export.to_fp16 import write_checked

    file = path.with_suffix(".full.fp16.onnx" if full_width else ".fp16.onnx")
    crops = generated_crops(GATE_IMAGES) if images is None else images
    with _progress("fp16: ONNX, two gates", 1):
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


def _export_arguments(path: Path, options: dict[str, Any], full_width: bool) -> list[str]:
    """This call again, for FP16 alone; what stands at its default is left out."""
    given = {"--repository": REPOSITORY, "--name": "alexnet", "--data": None}
    changed = [(name, str(value)) for name, value in options.items() if value != given[name]]
    flags = ["--full-width"] if full_width else []
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


@imports.command()
def torchvision(
    file: Annotated[Path | None, typer.Option(help="the published .pth [default: download it]")] = None,
    destination: Annotated[Path, typer.Option("--out", help="the checkpoint")] = Path(
        "runs/torchvision/checkpoint.safetensors"
    ),
) -> None:
    """torchvision's AlexNet: the owt variant, the 1000 classes of ILSVRC 2012."""
    from model.checkpoint import save
    from model.torchvision_weights import download, read_torchvision

    if file is None:
        with Progress(*_columns(), DownloadColumn(), console=err, transient=True) as bar:
            task = bar.add_task("download", total=None)
            file = download(
                destination.parent, lambda done, total: bar.update(task, completed=done, total=total or None)
            )
    save(destination, read_torchvision(file))
    out.print(f"{destination}\nnext: alexnet export {destination} --name alexnet_imagenet", highlight=False)


@app.command()
def versions(
    model: Annotated[str, typer.Argument()] = "alexnet", repository: Repository = REPOSITORY
) -> None:
    """List the versions of a model; the highest that is not withdrawn is served."""
    from export.versions import listed

    present = listed(repository / model)
    served = max((version.number for version in present if not version.withdrawn), default=None)
    table = Table("version", "state", "exported", "MB", "max |dp|", "top-1 %, ten crops", box=None)
    for version in present:
        provenance = version.provenance
        state = "withdrawn" if version.withdrawn else "served" if version.number == served else ""
        size = provenance.get("model", {}).get("bytes")
        difference = provenance.get("parity", {}).get("max_abs_difference")
        accuracy = provenance.get("accuracy", {}).get("top1_ten")
        table.add_row(
            str(version.number),
            state,
            provenance.get("exported_at", ""),
            "" if size is None else f"{size / 1e6:.1f}",
            "" if difference is None else f"{difference:.1e}",
            "" if accuracy is None else f"{100 * accuracy:.2f}",
        )
    out.print(table)


@app.command()
def rollback(
    model: Annotated[str, typer.Argument()] = "alexnet",
    to: Annotated[int | None, typer.Option(help="[default: the version before the newest]")] = None,
    repository: Repository = REPOSITORY,
    triton: TritonServers = "",
) -> None:
    """Serve an earlier version again; the later ones are withdrawn. Running gateways follow at once."""
    from export.versions import rollback as go_back

    hand_over = _hand_over(triton)
    number = go_back(repository / model, to)
    out.print(f"{model}: version {number} is the newest now")
    raise typer.Exit(0 if hand_over(repository / model / str(number)) else 1)


@app.command()
def prune(
    model: Annotated[str, typer.Argument()] = "alexnet",
    keep: Annotated[int, typer.Option(min=1, help="how many of the newest stay")] = 3,
    repository: Repository = REPOSITORY,
) -> None:
    """Delete old and withdrawn versions."""
    from export.versions import prune as delete

    gone = delete(repository / model, keep)
    out.print(f"{model}: deleted {', '.join(map(str, gone)) or 'nothing'}", highlight=False)


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT of a gateway, or grpc://HOST:PORT/MODEL")],
    repository: Repository = REPOSITORY,
) -> None:
    """Ask a running server whether it still answers as its version was exported."""
    from serving.verify import verify_backend, verify_gateway

    scheme, _, place = url.partition("://")
    if scheme in ("http", "https"):
        verdict = verify_gateway(url, repository)
    elif scheme == "grpc":
        servers, _, name = place.partition("/")
        backend = _triton_backend(_settings({"triton": servers, "model": name or None}))()
        verdict = asyncio.run(verify_backend(backend, repository))
    else:
        raise MalformedRequest(f"{url}: a server is http://HOST:PORT (a gateway) or grpc://HOST:PORT/MODEL")
    table = Table("golden image", "crops", "max |dp|", box=None)
    for each in verdict.differences:
        table.add_row(each.image, str(each.crops), f"{each.max_abs_difference:.1e}")
    out.print(table)
    said = f"{verdict.model} version {verdict.version}"
    if verdict.broken:
        raise ModelNotReady(f"{url}: {said} does not answer as when it was exported ({verdict.broken})")
    out.print(f"{said} answers as when it was exported (tolerance {verdict.tolerance:g})", highlight=False)


def _load_checkpoint(path: Path) -> Checkpoint:
    from model.checkpoint import load

    return load(path)


def _crops_of(data: Path, split: str, checkpoint: Checkpoint, count: int) -> Pixels:
    """The centre crops of `count` images spread over the split, uint8 [count, 224, 224, 3]."""
    import numpy as np

    from serving.preprocess import prepare

    images = _images(data, [label.wnid for label in checkpoint.labels], split)
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    return np.concatenate([prepare(encoded, Crops.CENTER) for encoded in images.encoded(chosen)])


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alexnet").setLevel(logging.INFO)


def _settings(given: dict[str, Any]) -> Settings:
    from pydantic import ValidationError

    from serving.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        raise MalformedRequest(faults) from error


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal's error stream; yields what moves it on."""
    columns = (*_columns(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


if __name__ == "__main__":
    main()
