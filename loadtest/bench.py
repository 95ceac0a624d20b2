"""This gateway beside what else might be used, in one run: speed, latency, start, memory.

    python loadtest/bench.py [CHECKPOINT] [--data DATA | --images FOLDER] [--only fastapi,fp32,int8]

FastAPI as tutorials have it, LitServe, BentoML and Ray Serve, each in an environment of its own
under .bench/, answer the same ten-crop job with the same weights (full width, stock export) for the same
photographs as this gateway does in FP32, INT8, with crops=auto and over Triton.

First everything is prepared (environments, models) and each peer's set-ups are tried, so that the
best of each takes part; both are kept for the next run. Then rounds: every server is started, loaded
with 1, 8 and 32 clients, weighed and stopped, one after the other, in an order that turns. Everything
is done within --minutes. Tables are printed; JSON, a plot and a page go to loadtest/results/. Loopback only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_page import page
from bench_plot import plot
from bench_results import Results, text
from bench_rounds import Bench, keep_tried, load_tried, rounds
from closed_loop import multipart
from environments import FOLDER, PEERS, environment
from machine import machine
from models import Models, models
from photographs import MOST, from_folder, generated, given_folder, resized
from servers import ROOT
from systems import DEFAULT, chosen

RESULTS = ROOT / "loadtest" / "results"
KEPT = FOLDER / "setups.json"
"""What each peer's set-ups reached on this machine."""
CHECKPOINT = Path("checkpoints/imagenette.safetensors")
SPARE_S = 10.0
"""Of the time allowed: for the report."""
GENERATED = (
    "no --data: INT8 was calibrated on generated photographs, good for its speed alone; "
    "crops=auto depends on how sure the network is of real ones"
)


def bodies(given: argparse.Namespace) -> tuple[list[bytes], str]:
    """Request bodies, and what is in them."""
    folder = given_folder(given.images) or (given.data / "val" if given.data else None)
    files = generated() if folder is None else from_folder(folder, MOST)
    of = "generated" if folder is None else f"of {folder}"
    if given.size and folder is not None:
        width, _, height = given.size.partition("x")
        files = resized(files, (int(width), int(height)))
        of += f", brought to {given.size}"
    mean = sum(map(len, files)) / len(files) / 1000
    return [multipart(file) for file in files], f"{len(files)} photographs {of}, {mean:.0f} kB each"


def prepared(given: argparse.Namespace, say: Callable[[str], None]) -> tuple[Models, dict[str, Path]]:
    """Environments and models side by side: neither keeps both cores busy."""
    FOLDER.mkdir(exist_ok=True)
    if "triton" in given.only:
        from serving.triton_environment import environment as triton_environment

        triton_environment(say)
    names = [name for name in PEERS if name in given.only.split(",")]
    with ThreadPoolExecutor(2) as pool:
        exported = pool.submit(
            models, given.checkpoint.resolve(), FOLDER, given.data, given.repository, say
        )
        binaries = {name: pool.submit(environment, name, say) for name in names}
        made = exported.result()
        return made, {name: each.result() for name, each in binaries.items()}


def arguments() -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--data", type=Path, help="train/ calibrates INT8, val/ is sent [default: generated]")
    parser.add_argument("--images", type=Path, help="photographs to send [default: DATA/val, ALEXNET_IMAGES]")
    parser.add_argument("--size", help="bring them to this size, as 500x375 [default: as they are]")
    parser.add_argument("--repository", type=Path, help="has alexnet and alexnet_int8, full width")
    parser.add_argument("--only", default=",".join(DEFAULT), help="servers [default: %(default)s]")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each load, once its queue stands")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything, preparations included")
    parser.add_argument("--again", action="store_true", help="try the peers' set-ups again")
    parser.add_argument("--prepare", action="store_true", help="environments and models alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    given, began = arguments(), time.monotonic()

    def say(told: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {told}", file=sys.stderr, flush=True)

    say("preparing (environments and models are kept in .bench/ for the next run)")
    made, binaries = prepared(given, say)
    say("prepared")
    if given.prepare:
        return
    sent, photographs = bodies(given)
    bench = Bench(made, binaries, sent, [int(each) for each in given.clients.split(",")], given.seconds)
    bench.known = {} if given.again else load_tried(KEPT)
    systems = [bench.try_setups(system, say) for system in chosen(given.only, made)]
    keep_tried(KEPT, bench.known)
    rounds(bench, systems, given.rounds, began + 60 * given.minutes - SPARE_S, say)
    results = bench.results(systems)
    facts = [
        "python " + " ".join(sys.argv),
        machine(),
        "; ".join(", ".join(PEERS[name]) for name in binaries),
        f"{photographs}, ten crops, full width; {results.rounds} rounds of {given.seconds:g} s a load",
        *([] if given.data or given.repository else [GENERATED]),
    ]
    print("\n".join([*facts, *text(results)]))
    write(results, facts, given.out)
    say(f"written: {given.out}/bench.html, bench.svg, bench.json")


def write(results: Results, facts: Sequence[str], folder: Path) -> None:
    """As data, as a picture, as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"facts": facts} | asdict(results)) + "\n")
    (folder / "bench.svg").write_text(plot(results))
    (folder / "bench.html").write_text(page(results, facts))


if __name__ == "__main__":
    main()
