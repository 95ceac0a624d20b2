"""What a benchmark does: try the peers' set-ups, run the rounds, keep what was found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench_results import AT, Ceiling, Measured, Results, Run, Tried
from closed_loop import closed_loop
from environments import PEERS
from machine import machine
from models import Models
from servers import ROOT, free_port, memory, started
from systems import Setup, System

ALIKE = 0.95
"""Rates nearer than this differ by chance; of such set-ups the simplest, which comes first, is chosen.

It matters: BentoML's adaptive batching was as fast as its workers with 8 clients, half as fast with 32."""


def with_choice(tried: Sequence[Tried]) -> list[Tried]:
    """The same, one of them marked."""
    most = max(each.images_per_s for each in tried)
    first = next(index for index, each in enumerate(tried) if each.images_per_s >= ALIKE * most)
    return [replace(each, chosen=index == first) for index, each in enumerate(tried)]


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

    def try_setups(self, system: System, say: Callable[[str], None]) -> System:
        """The system with the best of its set-ups; a single one is not tried, nor one that is known."""
        if len(system.setups) == 1:
            return system
        if system.name not in self.known:
            say(f"trying {system.name}'s set-ups")
            self.known[system.name] = self.tried_setups(system)
        found = self.known[system.name]
        self.tried += found
        best = next(index for index, each in enumerate(found) if each.chosen)
        return replace(system, setups=(system.setups[best],))

    def tried_setups(self, system: System) -> list[Tried]:
        """What each reaches with one client and with AT; one is chosen."""
        found: list[Tried] = []
        for setup in system.setups:
            port = free_port()
            command, variables = self.command(system, port, setup)
            with started(command, port, self.bodies[0], variables, system.path) as server:
                one = closed_loop(server.url, system.path, self.bodies, 1, self.seconds / 2)
                some = closed_loop(server.url, system.path, self.bodies, AT, self.seconds)
            alone = sorted(one.latencies_ms)[len(one.latencies_ms) // 2]
            found.append(Tried(system.name, setup.says, some.images_per_s, alone))
        return with_choice(found)

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

    def results(self, systems: list[System]) -> Results:
        """What was found."""
        return Results(
            self.measured, self.runs, self.tried, self.ceilings,
            titles={system.name: system.says for system in systems},
            peers=[system.name for system in systems if system.peer],
            ceiling_of={system.name: system.ceiling for system in systems if system.ceiling},
        )  # fmt: skip


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
