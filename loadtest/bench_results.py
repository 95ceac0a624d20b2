"""What the rounds of a benchmark found, and what it means: rows, ratios, targets. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from figures import Percentiles, Spread, percentiles, spread, table

NAIVE = "fastapi"
AT = 8
"""Clients at which speeds are compared."""


@dataclass(frozen=True)
class Measured:
    """One server under one load in one round."""

    system: str
    round: int
    clients: int
    images_per_s: float
    latencies_ms: list[float]
    refused: int
    degraded: int


@dataclass(frozen=True)
class Run:
    """One server's life in one round: from start to its first answer, and its memory after the loads."""

    system: str
    round: int
    ready_s: float
    pss_mb: float
    rss_mb: float
    processes: int


@dataclass(frozen=True)
class Tried:
    """One set-up of a peer, tried before the rounds."""

    system: str
    setup: str
    images_per_s: float
    p50_alone_ms: float
    chosen: bool = False


@dataclass(frozen=True)
class Ceiling:
    """The engine's own loop on decoded crops in one round."""

    model: str
    round: int
    images_per_s: float


@dataclass(frozen=True)
class Results:
    """Everything that was measured in one run."""

    measured: list[Measured]
    runs: list[Run]
    tried: list[Tried]
    ceilings: list[Ceiling]
    titles: dict[str, str]
    peers: list[str]
    ceiling_of: dict[str, str]

    @property
    def rounds(self) -> int:
        """Those that were finished."""
        return 1 + max((run.round for run in self.runs), default=-1)

    def rate(self, system: str, clients: int = AT) -> Spread | None:
        """Images a second over rounds; None where it did not take part."""
        rates = [m.images_per_s for m in self.measured if (m.system, m.clients) == (system, clients)]
        return spread(rates) if rates else None

    def latency(self, system: str, clients: int) -> Percentiles | None:
        """Over the answers of all rounds together."""
        found = [m.latencies_ms for m in self.measured if (m.system, m.clients) == (system, clients)]
        values = [ms for each in found for ms in each]
        return percentiles(values) if values else None

    def failed(self, system: str, clients: int) -> int:
        """Requests that were refused, or answered with fewer crops than asked for."""
        loads = [m for m in self.measured if (m.system, m.clients) == (system, clients)]
        return sum(load.refused + load.degraded for load in loads)

    def ceiling(self, system: str) -> Spread | None:
        """Of the model behind it."""
        model = self.ceiling_of.get(system)
        rates = [c.images_per_s for c in self.ceilings if c.model == model]
        return spread(rates) if rates else None

    def best_peer(self, clients: int = AT) -> tuple[str, float] | None:
        """The peer with the highest median rate, and that rate."""
        rates = {peer: found.median for peer in self.peers if (found := self.rate(peer, clients))}
        return max(rates.items(), key=lambda item: item[1]) if rates else None

    def quickest_peer_ms(self) -> float | None:
        """The lowest median latency of one client that any peer reached, in any set-up that was tried."""
        alone = [found.p50 for peer in self.peers if (found := self.latency(peer, 1))]
        return min([*alone, *(each.p50_alone_ms for each in self.tried)], default=None)


@dataclass(frozen=True)
class Target:
    """A figure that was promised. `met` is None where this run cannot tell."""

    says: str
    wanted: str
    found: str
    met: bool | None


def speed_rows(results: Results) -> list[list[str]]:
    """A line for each server and load, after the headings."""
    counts = ["answers", "failed", "x best peer"]
    rows = [["server", "clients", "images/s (min-max)", "p50 ms", "p95", "p99", *counts]]
    loads = sorted({m.clients for m in results.measured})
    for clients in loads:
        best = results.best_peer(clients)
        for system in results.titles:
            rate, latency = results.rate(system, clients), results.latency(system, clients)
            if rate is None or latency is None:
                continue
            times = [f"{ms:.1f}" for ms in (latency.p50, latency.p95, latency.p99)]
            ratio = f"{rate.median / best[1]:.2f}" if best else ""
            counts = [str(latency.count), str(results.failed(system, clients))]
            rows.append([system, str(clients), str(rate), *times, *counts, ratio])
    return rows


def life_rows(results: Results) -> list[list[str]]:
    """Start and memory of each server, after the headings."""
    rows = [["server", "start to first answer s", "memory MB (PSS)", "RSS", "processes"]]
    for system in results.titles:
        runs = [run for run in results.runs if run.system == system]
        if runs:
            ready, pss = spread(run.ready_s for run in runs), spread(run.pss_mb for run in runs)
            rss = spread(run.rss_mb for run in runs)
            many = str(max(run.processes for run in runs))
            rows.append([system, str(ready), f"{pss.median:.0f}", f"{rss.median:.0f}", many])
    return rows


def setup_rows(results: Results) -> list[list[str]]:
    """Each peer's set-ups with what they reached; * took part."""
    rows = [["peer", "set-up", "images/s at 8", "p50 ms alone", ""]]
    for each in results.tried:
        figures = [f"{each.images_per_s:.1f}", f"{each.p50_alone_ms:.0f}"]
        rows.append([each.system, each.setup, *figures, "*" if each.chosen else ""])
    return rows


SPEED_TARGETS = (("fp32", 1.8), ("int8", 3.3), ("auto", 6.0))
CEILING_TARGETS = (("fp32", 0.92), ("int8", 0.92))
READY_TARGETS = (("fp32", 3.0), ("int8", 1.5))
MEMORY_TARGETS = (("fp32", 650), ("int8", 350))


def targets(results: Results) -> list[Target]:
    """What the product promises, beside what this run found."""
    found = [_speed(results, system, wanted) for system, wanted in SPEED_TARGETS]
    found += [_ceiling(results, system, wanted) for system, wanted in CEILING_TARGETS]
    found += [_latency(results, system) for system in ("fp32", "int8", "auto")]
    for system, wanted in READY_TARGETS:
        ready = [run.ready_s for run in results.runs if run.system == system]
        found.append(_at_most(f"{system}: start to first answer", wanted, " s", ready, ".1f"))
    for system, most in MEMORY_TARGETS:
        rss = [run.rss_mb for run in results.runs if run.system == system]
        found.append(_at_most(f"{system}: resident after the loads", most, " MB", rss, ".0f"))
    return [each for each in found if each is not None]


def _speed(results: Results, system: str, wanted: float) -> Target | None:
    rate, best = results.rate(system), results.best_peer()
    if rate is None:
        return None
    says = f"{system}: images/s at {AT} clients"
    if best is None:
        return Target(says, f">= {wanted} x the best peer", f"{rate.median:.1f}, no peer took part", None)
    ratio = rate.median / best[1]
    told = f"{ratio:.2f} x ({rate.median:.1f} against {best[0]}'s {best[1]:.1f})"
    return Target(says, f">= {wanted} x the best peer", told, ratio >= wanted)


def _ceiling(results: Results, system: str, wanted: float) -> Target | None:
    rate, most = results.rate(system), results.ceiling(system)
    if rate is None or most is None:
        return None
    share = rate.median / most.median
    told = f"{share:.2f} ({rate.median:.1f} of {most.median:.1f})"
    return Target(f"{system}: of the engine's own loop", f">= {wanted}", told, share >= wanted)


def _latency(results: Results, system: str) -> Target | None:
    own, peer = results.latency(system, 1), results.quickest_peer_ms()
    if own is None or peer is None:
        return None
    told = f"{own.p99:.1f} ms against {peer:.1f} ms"
    return Target(f"{system}: p99 of one client", "below the best peer's p50", told, own.p99 < peer)


def _at_most(says: str, wanted: float, unit: str, values: Iterable[float], form: str) -> Target | None:
    taken = list(values)
    if not taken:
        return None
    found = spread(taken).median
    return Target(says, f"<= {wanted:g}{unit}", f"{found:{form}}{unit}", found <= wanted)


def target_rows(found: Sequence[Target]) -> list[list[str]]:
    """After the headings."""
    words = {True: "met", False: "MISSED", None: "-"}
    return [
        ["target", "wanted", "found", ""],
        *([each.says, each.wanted, each.found, words[each.met]] for each in found),
    ]


def text(results: Results) -> list[str]:
    """The whole report as lines for a terminal."""
    ceilings = {results.ceiling_of[system]: results.ceiling(system) for system in results.ceiling_of}
    lines = ["", *table(speed_rows(results)), "", *table(life_rows(results))]
    if ceilings:
        told = ", ".join(f"{model} {each}" for model, each in ceilings.items())
        lines += ["", f"the engine's own loop on decoded crops, images/s: {told}"]
    if results.tried:
        lines += ["", *table(setup_rows(results), left=2)]
    return [*lines, "", *table(target_rows(targets(results)), left=3)]
