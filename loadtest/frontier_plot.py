"""The frontier as one picture: accuracy against latency, one crop and ten side by side; SVG by hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from typing import Protocol

from figures import Spread

PANEL, HEIGHT, TOP, BOTTOM, LEFT, GAP, RIGHT = 400, 380, 76, 52, 60, 60, 24
COLOURS = {"fp32": "#1d4ed8", "int8": "#0b6e4f"}
TICKS = 5


class Chosen(Protocol):
    """What is drawn of a choice; percent and milliseconds."""

    @property
    def rank(self) -> int | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def top1_one(self) -> float: ...
    @property
    def top1_ten(self) -> float: ...
    @property
    def one_ms(self) -> Spread: ...
    @property
    def ten_ms(self) -> Spread: ...


def plot(choices: Sequence[Chosen]) -> str:
    """A line a precision through its ranks, from the lowest to full; the same scale of accuracy in both."""
    width = LEFT + 2 * PANEL + GAP + RIGHT
    shown = [top1 for each in choices for top1 in (each.top1_one, each.top1_ten)]
    low, high = min(shown), max(shown)
    margin = max(0.1, 0.08 * (high - low))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        "<title>Accuracy against latency, full and low rank, FP32 and INT8</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">Accuracy against latency: '
        "full and low rank, FP32 and INT8</text>",
    ]
    for index, (precision, colour) in enumerate(COLOURS.items()):
        x = width - RIGHT - 130 + 65 * index
        parts += [f'<circle cx="{x}" cy="20" r="5" fill="{colour}"/>',
                  f'<text x="{x + 10}" y="24">{precision.upper()}</text>']  # fmt: skip
    for index, crops in enumerate((1, 10)):
        panel = _Panel(LEFT + index * (PANEL + GAP), low - margin, high + margin, crops, choices)
        parts += panel.frame() + [part for precision in COLOURS for part in panel.line(precision)]
    return "\n".join([*parts, "</svg>", ""])


class _Panel:
    """Milliseconds to the right from zero, percent upwards."""

    def __init__(self, left: float, low: float, high: float, crops: int, choices: Sequence[Chosen]) -> None:
        self.left, self.low, self.high, self.crops, self.choices = left, low, high, crops, choices
        self.most_ms = 1.1 * max(self._of(each)[0] for each in choices)

    def _of(self, each: Chosen) -> tuple[float, float]:
        ms, top1 = (each.one_ms, each.top1_one) if self.crops == 1 else (each.ten_ms, each.top1_ten)
        return ms.median, top1

    def _place(self, ms: float, top1: float) -> tuple[float, float]:
        up = (self.high - top1) / (self.high - self.low)
        return self.left + PANEL * ms / self.most_ms, TOP + up * (HEIGHT - TOP - BOTTOM)

    def frame(self) -> list[str]:
        """Axes, their ticks and words."""
        words = "one crop, a batch of one" if self.crops == 1 else "ten crops of a photograph"
        parts = [f'<text x="{self.left}" y="{TOP - 22}" font-weight="600">{words}</text>',
                 f'<text x="{self.left - 40}" y="{TOP - 6}">top-1, %</text>']  # fmt: skip
        step = _round_step((self.high - self.low) / TICKS)
        tick = step * (self.low // step + 1)
        while tick < self.high:
            _, y = self._place(0, tick)
            parts += [
                f'<path d="M{self.left} {y:.1f}h{PANEL}" stroke="#e3e6ea"/>',
                f'<text x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>',
            ]
            tick += step
        step, ms = _round_step(self.most_ms / TICKS), 0.0
        while ms < self.most_ms:
            x, _ = self._place(ms, self.low)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 32}" text-anchor="middle">{ms:g}</text>')
            ms += step
        middle = self.left + PANEL / 2
        return [*parts, f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">ms an inference</text>']

    def line(self, precision: str) -> list[str]:
        """One precision's choices, by rank."""
        colour = COLOURS[precision]
        chosen = [each for each in self.choices if each.precision == precision]
        chosen.sort(key=lambda each: float("inf") if each.rank is None else each.rank)
        points = [self._place(*self._of(each)) for each in chosen]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts = [f'<polyline points="{joined}" fill="none" stroke="{colour}" opacity="0.5"/>']
        for index, (each, (x, y)) in enumerate(zip(chosen, points, strict=True)):
            dx, dy, side = (-8, 4, "end") if index % 2 == 0 else (8, 4, "start")  # neighbours lie close
            name = str(each.rank)
            if each.rank is None:
                name, dx, dy, side = "full", 0, -9, "middle"
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>',
                f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" font-size="11" '
                f'text-anchor="{side}" fill="{colour}">{name}</text>',
            ]
        return parts


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, the least that is not below `step`."""
    power = 10.0 ** floor(log10(step))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= step)
