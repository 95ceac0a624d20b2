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
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_page import page
from bench_plot import plot
from bench_results import AT, Ceiling, Measured, Results, Run, Tried, text
from closed_loop import closed_loop, multipart
from environments import FOLDER, PEERS, environment
from machine import machine
from models import Models, models
from photographs import MOST, from_folder, generated, given_folder, resized
from servers import ROOT, free_port, memory, started
from systems import DEFAULT, Setup, System, chosen

RESULTS = ROOT / "loadtest" / "results"
KEPT = FOLDER / "setups.json"
"""What each peer's set-ups reached on this machine."""
CHECKPOINT = Path("checkpoints/imagenette.safetensors")
SPARE_S = 10.0
"""Of the time allowed: for the report."""


@dataclass
class Bench:
    """One run's means and what it has found so far."""

    made: Models
    binaries: dict[str, Path]
    bodies: list[bytes]
    clients: list[int]
    seconds: float
    known: dict[str, list[Tried]] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    ceilings: list[Ceiling] = field(default_factory=list)

    def command(self, system: System, port: int, setup: Setup) -> tuple[list[str], dict[str, str]]:
        """What to start, and its environment."""
        peer = {"PEER_MODEL": str(self.made.stock), "PEER_PORT": str(port), "PYTHONPATH": "loadtest/peers"}
        binaries = self.binaries.get(system.name, Path(sys.executable).parent)
        return system.command(binaries, port, setup), setup.environment | (peer if system.peer else {})

    def try_setups(self, system: System) -> System:
        """The system with the fastest of its set-ups; a single one is not tried."""
        if len(system.setups) == 1:
            return system
        if known := self.known.get(system.name):
            self.tried += known
            best = next(index for index, each in enumerate(known) if each.chosen)
            return replace(system, setups=(system.setups[best],))
        found: list[Tried] = []
        for setup in system.setups:
            port = free_port()
            command, variables = self.command(system, port, setup)
            with started(command, port, self.bodies[0], variables, system.path) as server:
                one, some = (
                    closed_loop(server.url, system.path, self.bodies, clients, self.seconds / 2)
                    for clients in (1, AT)
                )
            alone = sorted(one.latencies_ms)[len(one.latencies_ms) // 2]
            found.append(Tried(system.name, setup.says, some.images_per_s, alone))
        best = max(range(len(found)), key=lambda index: found[index].images_per_s)
        found = [replace(each, chosen=index == best) for index, each in enumerate(found)]
        self.known[system.name] = found
        self.tried += found
        return replace(system, setups=(system.setups[best],))

    def run(self, system: System, number: int) -> None:
        """One server's life in one round."""
        port = free_port()
        command, variables = self.command(system, port, system.setups[0])
        with started(command, port, self.bodies[0], variables, system.path) as server:
            for clients in self.clients:
                load = closed_loop(server.url, system.path, self.bodies, clients, self.seconds)
                self.measured.append(Measured(system.name, number, **asdict(load)))
            weight = memory(server.pid)
        self.runs.append(
            Run(system.name, number, server.ready_s, weight.pss, weight.rss, weight.processes)
        )

    def ceiling(self, model: str, number: int) -> None:
        """The engine's own loop, in a process of its own."""
        command = [sys.executable, "loadtest/ceiling.py", str(self.made.repository), model]
        command += ["--seconds", str(self.seconds)]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        self.ceilings.append(Ceiling(model, number, json.loads(said)["images_per_s"]))


def tried_on() -> str:
    """What trying again would depend on: machine and versions."""
    return machine() + repr(PEERS)


def load_tried(file: Path) -> dict[str, list[Tried]]:
    """By peer; empty where nothing is kept, or of another machine or other versions."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("on") != tried_on():
        return {}
    return {name: [Tried(**each) for each in tried] for name, tried in kept["tried"].items()}


def keep_tried(file: Path, tried: dict[str, list[Tried]]) -> None:
    """For the next run."""
    told = {name: [asdict(each) for each in found] for name, found in tried.items()}
    file.write_text(json.dumps({"on": tried_on(), "tried": told}, indent=1) + "\n")


def rounds(
    bench: Bench, systems: list[System], most: int, until: float, say: Callable[[str], None]
) -> None:
    """As many as fit before `until`, on the clock of time.monotonic; at least one."""
    models = dict.fromkeys(system.ceiling for system in systems if system.ceiling)
    longest = 0.0
    for number in range(most):
        began = time.monotonic()
        if number and began + longest > until:
            say(f"no time for round {number + 1}; --minutes allows more")
            break
        say(f"round {number + 1}: {', '.join(system.name for system in systems)}, the engine alone")
        turn = number % len(systems)
        for system in systems[turn:] + systems[:turn]:
            bench.run(system, number)
        for model in models:
            bench.ceiling(model, number)
        longest = max(longest, time.monotonic() - began)


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
    systems = []
    for system in chosen(given.only, made):
        if len(system.setups) > 1:
            known = "tried before" if system.name in bench.known else "trying"
            say(f"{system.name}'s set-ups: {known}")
        systems.append(bench.try_setups(system))
    keep_tried(KEPT, bench.known)
    rounds(bench, systems, given.rounds, began + 60 * given.minutes - SPARE_S, say)
    done = 1 + max(run.round for run in bench.runs)
    results = Results(
        bench.measured, bench.runs, bench.tried, bench.ceilings,
        titles={system.name: system.says for system in systems},
        peers=[system.name for system in systems if system.peer],
        ceiling_of={system.name: system.ceiling for system in systems if system.ceiling},
    )  # fmt: skip
    facts = [
        "python " + " ".join(sys.argv),
        machine(),
        "; ".join(", ".join(PEERS[name]) for name in binaries),
        f"{photographs}, ten crops, full width; {done} rounds of {given.seconds:g} s a load",
        *([] if given.data or given.repository else [GENERATED]),
    ]
    print("\n".join([*facts, *text(results)]))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "bench.json").write_text(json.dumps({"facts": facts} | asdict(results)) + "\n")
    (given.out / "bench.svg").write_text(plot(results))
    (given.out / "bench.html").write_text(page(results, facts))
    say(f"written: {given.out}/bench.html, bench.svg, bench.json")


GENERATED = (
    "no --data: INT8 was calibrated on generated photographs, good for its speed alone; "
    "crops=auto depends on how sure the network is of real ones"
)


if __name__ == "__main__":
    main()
