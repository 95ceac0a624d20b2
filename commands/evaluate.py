"""alexnet evaluate: a checkpoint, a graph, a gateway or a Triton on a folder of photographs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from commands.photographs import decode, images_of
from commands.terminal import out, progress
from commands.wiring import api_key, backend_of, settings_of
from serving.contract import Crops

if TYPE_CHECKING:
    from model.evaluate import Predict, Tally

TRITON_ANSWER_S = 120.0
"""For one batch of crops that is evaluated through a Triton server."""


def evaluate(
    model: Annotated[
        str, typer.Argument(help="a checkpoint, an .onnx, http://GATEWAY or grpc://HOST:PORT/MODEL")
    ],
    data: Annotated[str, typer.Argument(help="folder or URL: <class>/*, val/<class>/*, or shards")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Top-1 and top-5 error with 95 % intervals, calibration error and speed; one crop and ten.

    The classes are matched by name, whatever the order of the model's outputs. A gateway that wants a key
    is shown ALEXNET_API_KEY.
    """
    from dataclasses import asdict

    results = []
    with _tallying(model, data) as (count, tallied):
        for crops in (Crops.CENTER, Crops.TEN):
            with progress(f"{crops} crops", count) as advance:
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

        gateway = Gateway(model.rstrip("/"), api_key())
        images = images_of(data, gateway.classes(), "val")
        yield len(images), lambda crops, advance: remote_tally(gateway, images, crops, advance)
        return
    from model.evaluate import tally

    with _predictor(model) as (predict, classes):
        decoded = decode(data, classes)
        yield len(decoded.targets), lambda crops, advance: tally(predict, decoded, crops, advance)


@contextmanager
def _predictor(model: str) -> Iterator[tuple[Predict, list[str]]]:
    """A predictor and its classes' WordNet ids, in the order of its outputs."""
    if model.startswith("grpc://"):
        with triton_predictor(model.removeprefix("grpc://")) as found:
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
def triton_predictor(place: str) -> Iterator[tuple[Predict, list[str]]]:
    """`HOST:PORT/MODEL`, through the gateway's own backend; its loop runs while the block does."""
    from serving.loop_thread import LoopThread

    servers, _, name = place.partition("/")
    settings = settings_of({"triton": servers, "model": name or None})
    backend, loop = backend_of(settings), LoopThread()
    try:
        loop.wait(backend.start(), TRITON_ANSWER_S)
        classes = [label.wnid for label in backend.model.labels]
        yield lambda crops: loop.wait(backend.infer(crops), TRITON_ANSWER_S).probabilities, classes
    finally:
        loop.wait(backend.close(), TRITON_ANSWER_S)
        loop.close()
