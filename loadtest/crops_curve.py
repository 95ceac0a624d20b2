"""What fewer crops cost in accuracy, and save: crops=auto at each margin, and each level of a brownout.

    python loadtest/crops_curve.py MODEL/VERSION DATA [--svg docs/crops.svg] [--seconds 8]

The probabilities of the ten crops of every photograph of DATA/val are computed once; each margin's
answers follow from them. Beside each level of service stand the images a second of the gateway's own
pipeline in this process (decoding, queue, engine), eight at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from figures import table
from machine import machine
from photographs import from_folder

from commands.photographs import decode
from export.auto import MARGINS, first_labels, ten_crops
from export.gate import onnx_predictor
from serving.backends import OnnxRuntimeBackend
from serving.brownout import Brownout
from serving.contract import CENTRE, CENTRE_MIRRORED, Crops
from serving.costs import LEVELS
from serving.decoders import Decoders
from serving.pipeline import DEFAULT_AUTO_MARGIN, Pipeline
from serving.repository import find_version
from serving.settings import Settings

AT_ONCE = 8
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 360, 64, 48, 24, 56


@dataclass(frozen=True)
class Point:
    """Accuracy in percent over all photographs, at a mean number of crops."""

    name: str
    crops: float
    top1: float
    changed: float
    """Percent of the first labels that ten crops would have given otherwise."""


class _Fixed(Brownout):
    """One level of service, whatever waits."""

    def update(self, wait_ms: Sequence[float]) -> int:
        return self.level


def points(each: np.ndarray, targets: np.ndarray, margin: float) -> tuple[list[Point], list[Point]]:
    """Of crops=auto at each margin, and of the levels of service.

    each float [N, 10, classes], targets int [N].
    """
    ten = each.mean(axis=1).argmax(axis=1)

    def point(name: str, crops: float, said: np.ndarray) -> Point:
        return Point(name, crops, 100 * float((said == targets).mean()), 100 * float((said != ten).mean()))

    two = each[:, [CENTRE, CENTRE_MIRRORED]].mean(axis=1)
    levels = [ten, two.argmax(axis=1), each[:, CENTRE].argmax(axis=1)]
    top = np.sort(two, axis=1)
    ahead = top[:, -1] - top[:, -2]
    curve = [
        point(f"auto, margin {at:.2f}{' *' if at == margin else ''}", np.where(ahead >= at, 2, 10).mean(),
              first_labels(each, at))
        for at in MARGINS
    ]  # fmt: skip
    names = ["1 crop" if count == 1 else f"{count} crops" for count in LEVELS]
    return curve, [point(*each) for each in zip(names, LEVELS, levels, strict=True)]


async def images_per_s(model: Path, crops: Crops, level: int, bodies: list[bytes], seconds: float) -> float:
    """Through the gateway's pipeline, AT_ONCE photographs at a time."""
    settings, brownout = Settings(), _Fixed(1)
    brownout.level = level
    backend = OnnxRuntimeBackend(model.parent.parent, model.parent.name, settings.infer_threads)
    await backend.start()
    pipeline = Pipeline(backend, Decoders(settings.decode_workers), brownout=brownout)
    done, began = 0, time.perf_counter()
    numbers = itertools.count()

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await pipeline.classify(bodies[next(numbers) % len(bodies)], crops)
            done += 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    took = time.perf_counter() - began
    pipeline.close()
    await backend.close()
    return done / took


def svg(curve: Sequence[Point], levels: Sequence[Point], chosen: Point) -> str:
    """Accuracy against the mean number of crops."""
    shown = [*curve, *levels]
    low, high = min(p.top1 for p in shown) - 0.1, max(p.top1 for p in shown) + 0.1

    def place(p: Point) -> tuple[float, float]:
        x = LEFT + (p.crops - 1) / 9 * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - p.top1) / (high - low) * (HEIGHT - TOP - BOTTOM)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, curve))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        "<title>Top-1 accuracy against the mean number of crops</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">Accuracy against crops: auto at '
        "each margin, brownout at each level</text>",
    ]
    for crops in range(1, 11):
        x, _ = place(Point("", crops, low, 0))
        parts.append(f'<text x="{x:.0f}" y="{HEIGHT - 34}" text-anchor="middle">{crops}</text>')
    for tick in np.arange(np.ceil(low * 5) / 5, high, 0.2):
        _, y = place(Point("", 1, float(tick), 0))
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>',
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>',
        ]
    parts += [
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">mean crops a photograph</text>',
        f'<text x="14" y="{TOP - 8}">top-1, %</text>',
        f'<polyline points="{line}" fill="none" stroke="#0b6e4f" stroke-width="2"/>',
    ]
    marked = [(p, "#9a3412", p.name) for p in levels]
    for p, colour, words in (*marked, (chosen, "#0b6e4f", "auto, as exported")):
        x, y = place(p)
        side, dx = ("end", -8) if p.crops > 6 else ("start", 8)
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>',
            f'<text x="{x + dx:.1f}" y="{y - 8:.1f}" text-anchor="{side}" fill="{colour}">{words}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="a version's folder, model_repository/alexnet/1 say")
    parser.add_argument("data", type=Path, help="photographs: DATA/val/<class>/*")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--seconds", type=float, default=8, help="of each speed")
    given = parser.parse_args()
    folder = given.model.resolve()
    version = find_version(folder.parent.parent, folder.parent.name, folder.name)
    margin = version.provenance.get("auto", {}).get("margin", DEFAULT_AUTO_MARGIN)
    decoded = decode(given.data, [label.wnid for label in version.labels])
    each = ten_crops(onnx_predictor(version.path), decoded)
    curve, levels = points(each, decoded.targets, margin)
    bodies = from_folder(given.data / "val" if (given.data / "val").is_dir() else given.data)
    asked = [(Crops.TEN, level) for level in range(len(LEVELS))] + [(Crops.AUTO, 0)]
    speeds = [asyncio.run(images_per_s(folder, crops, at, bodies, given.seconds)) for crops, at in asked]
    chosen = next((p for p in curve if p.name.endswith("*")), curve[-1])
    rates = {**dict(zip((p.name for p in levels), speeds[:-1], strict=True)), chosen.name: speeds[-1]}
    print(f"python {' '.join(sys.argv)}\n{machine()}")
    print(f"{len(each):,} photographs; * the margin that was exported")
    rows = [["", "mean crops", "top-1 %", "other label than ten %", "images/s"]]
    for p in (*levels, *curve):
        speed = f"{rates[p.name]:.1f}" if p.name in rates else ""
        rows.append([p.name, f"{p.crops:.2f}", f"{p.top1:.2f}", f"{p.changed:.2f}", speed])
    print("\n".join(table(rows)))
    if given.svg:
        given.svg.write_text(svg(curve, levels, chosen))


if __name__ == "__main__":
    main()
