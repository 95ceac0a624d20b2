"""A load test of one gateway: how much it can answer, and how long people wait for less than that.

    make loadtest                                            a gateway of its own, generated photographs
    make loadtest ARGS='--images FOLDER --with-triton'       real ones, and Triton's users beside it
    make loadtest ARGS='--url http://10.0.0.1:8000'          a gateway that runs already

First Locust's users, step by step, until more of them bring no more answers (a closed loop). Then an
open loop at shares of what was found: arrivals at random, latency from the intended moment. A page,
Locust's own report and JSON go to loadtest/results/. Under five minutes; ends by itself, and so does
what it started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_page import STYLE, html_table
from closed_loop import multipart
from figures import percentiles, table
from machine import machine
from open_loop import Answers, answer_rows, mixed_urls, open_loops, stage_rows
from photographs import from_folder, given_folder, mixed
from ramp import STEPS, Ramp, Step
from servers import ROOT, free_port, started

RESULTS = ROOT / "loadtest" / "results"
SHARES = (0.5, 0.8, 0.95, 1.2)
"""Of the answers a second that the ramp found: a quiet hour, a busy one, the edge, and beyond it."""


def gateway(given: argparse.Namespace, stack: ExitStack, photograph: bytes) -> str:
    """Its address: the one that is given, or of one that is started here and stopped with the stack."""
    if given.url:
        return str(given.url).rstrip("/")
    port = free_port()
    command = [sys.executable, "alexnet.py", "serve", "--port", str(port), "--model", given.model]
    command += ["--repository", str(given.repository)]
    return stack.enter_context(started(command, port, multipart(photograph), {})).url


def triton(given: argparse.Namespace, stack: ExitStack) -> str:
    """HOST:PORT of Triton's gRPC, started here with --with-triton; empty without Triton."""
    if not given.with_triton:
        return str(given.triton)
    from serving.triton import LocalTriton

    server = LocalTriton(given.repository, [given.model], say=lambda told: print(told, file=sys.stderr))
    return stack.enter_context(server).grpc


def locust(given: argparse.Namespace, url: str, grpc: str) -> tuple[Ramp, dict[str, list[float]]]:
    """Run Locust headless; the ramp's steps, and each stage's milliseconds in every answer."""
    found = given.out / "locust.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--only-summary"]
    command += ["--host", url, "--html", str(given.out / "locust.html"), "--ramp-json", str(found)]
    command += ["--steps", given.steps, "--step-s", str(given.step_s), "--exit-code-on-error", "0"]
    command += ["--images", str(given.images or ""), "--triton", grpc, "--triton-model", given.model]
    command += ["--csv", str(given.out / "locust"), "--stop-timeout", "10", "--loglevel", "WARNING"]
    with (given.out / "locust.txt").open("w") as said:
        ended = subprocess.run(command, check=False, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
    if ended.returncode or not found.exists():
        raise RuntimeError(f"Locust failed; it said:\n{(given.out / 'locust.txt').read_text()[-2000:]}")
    told: dict[str, Any] = json.loads(found.read_text())
    steps = [Step(s["users"], s["seconds"], tuple(s["latencies_ms"]), s["failed"]) for s in told["steps"]]
    return Ramp([int(each) for each in given.steps.split(",")], steps), told["stages_ms"]


def stage_percentiles(stages: dict[str, list[float]]) -> list[list[str]]:
    """After the headings, a row a stage of the whole ramp."""
    taken = {name: percentiles(values) for name, values in stages.items()}
    figures = [(name, (each.p50, each.p95, each.p99)) for name, each in taken.items()]
    return [
        ["stage ms, all steps", "p50", "p95", "p99"],
        *([name, *(f"{ms:.1f}" for ms in found)] for name, found in figures),
    ]


def page(facts: Sequence[str], verdict: str, tables: Sequence[tuple[str, list[list[str]]]]) -> str:
    """Self-contained HTML."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>alexnet-serving: load test</title>',
        f"<style>{STYLE}</style><h1>Load test</h1><pre>{escape(chr(10).join(facts))}</pre>",
        f"<p><strong>{escape(verdict)}</strong></p>",
        *(f"<h2>{escape(title)}</h2>{html_table(rows)}" for title, rows in tables),
        '<p><a href="locust.html">Locust: every request, its charts, its failures</a></p></html>',
    ]
    return "\n".join([*parts, ""])


def arguments() -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--url", default="", help="a running gateway [default: one of its own]")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--images", type=Path, help="a folder [default: ALEXNET_IMAGES, or generated]")
    parser.add_argument("--triton", default="", help="HOST:PORT of a Triton's gRPC, for users of its own")
    parser.add_argument("--with-triton", action="store_true", help="start a local Triton for them")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="users [default: %(default)s]")
    parser.add_argument("--step-s", type=float, default=12, help="seconds of a step [default: %(default)s]")
    parser.add_argument("--open-s", type=float, default=25, help="seconds at each arrival rate")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    given, began = arguments(), time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    folder = given_folder(given.images)
    files = from_folder(folder) if folder else mixed()
    with ExitStack() as stack:
        grpc, url = triton(given, stack), gateway(given, stack, files[0])
        ramp, stages = locust(given, url, grpc)
        most = ramp.best.per_s if ramp.best else 1.0
        rates = [round(share * most, 1) for share in SHARES]
        bodies = [multipart(file) for file in files]
        opened = asyncio.run(open_loops(mixed_urls(url), bodies, rates, given.open_s))
    report(given, ramp, stages, opened, began)


def report(
    given: argparse.Namespace, ramp: Ramp, stages: dict[str, list[float]], opened: list[Answers], began: float
) -> None:
    """Print it, and write the page and the JSON."""
    source = given_folder(given.images) or "generated, of the sizes that people upload"
    facts = [
        "python " + " ".join(sys.argv),
        machine(("onnxruntime", "locust", "httpx", "numpy", "fastapi", "uvicorn")),
        f"model {given.model}; photographs: {source}",
        f"{time.monotonic() - began:.0f} s",
    ]
    closed = "Closed loop (Locust): users who send the next photograph when they have their answer"
    opened_title = "Open loop: arrivals at random, latency from the intended moment"
    tables = [
        (closed, ramp.rows()),
        ("Where the time goes (closed loop)", stage_percentiles(stages)),
        (opened_title, answer_rows(opened)),
        ("Where the time goes (open loop)", stage_rows(opened)),
    ]
    lines = [*facts, "", ramp.verdict()]
    for title, rows in tables:
        lines += ["", title, *table(rows)]
    print("\n".join(lines))
    (given.out / "loadtest.html").write_text(page(facts, ramp.verdict(), tables))
    found = {"ramp": asdict(ramp), "stages_ms": stages, "open_loop": [asdict(each) for each in opened]}
    (given.out / "loadtest.json").write_text(json.dumps({"facts": facts} | found) + "\n")
    print(f"\nwritten: {given.out}/loadtest.html, locust.html, loadtest.json", file=sys.stderr)


if __name__ == "__main__":
    main()
