"""Drawings as SVG text: the page around them gives their colours, in light and in dark.

Classes name roles: `rule`, `axis`, `line-a`, `line-b`, `bar`, `right`, `wrong`. Text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

LEFT: Final = 46
RIGHT: Final = 64
"""Room for the name at a line's end."""
TOP: Final = 12
BOTTOM: Final = 34


@dataclass(frozen=True)
class Series:
    """One line: its name, its points, and the role of its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    role: str = "line-a"
    dots: bool = False


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover low..high from within."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Sequence[Series],
    x_name: str,
    say: Callable[[float], str] = "{:g}".format,
    *,
    width: int = 560,
    height: int = 270,
    square: bool = False,
) -> str:
    """Curves over a common x; y from 0, or with `square` both axes 0..1."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    x_low, x_high = (0.0, 1.0) if square else (min(x for x, _ in points), max(x for x, _ in points))
    y_high = 1.0 if square else max(y for _, y in points) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        return (
            LEFT + across * (width - LEFT - RIGHT),
            TOP + (1 - y / y_high) * (height - TOP - BOTTOM),
        )

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for y in ticks(0, y_high):
        left, at = place(x_low, y)
        parts.append(f'<line class="rule" x1="{left:.1f}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 8, at + 4, say(y), anchor="end"))
    for x in ticks(x_low, x_high, 7):
        at, bottom = place(x, 0)
        parts.append(_text(at, bottom + 16, f"{x:.1f}" if square else f"{x:g}", anchor="middle"))
    parts.append(_text((LEFT + width - RIGHT) / 2, height - 3, x_name, anchor="middle"))
    if square:
        (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
        parts.append(f'<line class="ideal" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for one in series:
        parts += _line(one, place, say)
    return "".join([*parts, *_names(series, place), "</svg>"])


def _names(series: Sequence[Series], place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """Each line's name at its end, none on another."""
    ends = sorted(((*place(*one.points[-1]), one) for one in series if one.points), key=lambda end: end[1])
    right = max(x for x, _, _ in ends) + 8
    parts, lowest = [], -math.inf
    for _, y, one in ends:
        lowest = max(y + 4, lowest + 15)
        parts.append(_text(right, lowest, one.name, role=f"name {one.role}"))
    return parts


def _line(
    one: Series, place: Callable[[float, float], tuple[float, float]], say: Callable[[float], str]
) -> list[str]:
    placed = [place(x, y) for x, y in one.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline class="{one.role}" points="{path}"/>']
    for (x, y), (left, top) in zip(one.points, placed, strict=True):
        look, radius = (one.role, 3.5) if one.dots else ("unseen", 7)  # unseen: something to point at
        title = f"<title>{escape(one.name)} {x:g}: {say(y)}</title>"
        at = f'cx="{left:.1f}" cy="{top:.1f}" r="{radius}"'
        parts.append(f'<circle class="dot {look}" {at}>{title}</circle>')
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", role: str = "axis") -> str:
    return f'<text class="{role}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A square a pair of classes: row the truth, column the answer, shaded by its share of the row."""
    size, left, top = 34, 150, 118
    edge = size * len(names)
    parts = [f'<svg viewBox="0 0 {left + edge + 8} {top + edge + 8}" role="img">']
    for index, name in enumerate(names):
        at = index * size + size / 2
        short = name if len(name) <= 20 else f"{name[:19]}…"
        parts.append(_text(left - 8, top + at + 4, short, anchor="end"))
        turn = f'transform="translate({left + at + 4} {top - 8}) rotate(-55)"'
        parts.append(f"<g {turn}>{_text(0, 0, short)}</g>")
    for row, line in enumerate(counts):
        total = sum(line) or 1
        for column, count in enumerate(line):
            role, share = ("right" if row == column else "wrong"), count / total
            # Mistakes are few: shaded by the root, so that one in a hundred is seen.
            shade = share if row == column else min(1.0, math.sqrt(share) * 1.6)
            x, y = left + column * size, top + row * size
            title = f"{names[row]} answered as {names[column]}: {count} of {sum(line)}"
            parts.append(
                f'<g><rect class="cell" x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" rx="3"/>'
                f'<rect class="{role}" x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" rx="3"'
                f' fill-opacity="{shade:.2f}"/><title>{escape(title)}</title>'
            )
            if count:
                look = "count strong" if shade > 0.6 else "count"
                centre = (x + size / 2 - 1, y + size / 2 + 3)
                parts.append(_text(*centre, str(count), anchor="middle", role=look))
            parts.append("</g>")
    return "".join([*parts, "</svg>"])
