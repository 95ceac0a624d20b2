"""A run on one page: an HTML file that needs nothing from elsewhere.

    alexnet report runs/mine          writes runs/mine/report.html
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from model.charts import Series, confusion, lines
from model.checkpoint import Checkpoint
from model.config import TrainError
from model.data import Decoded
from model.evaluate import Evaluation
from model.findings import Findings
from model.net import parameter_count
from serving.contract import Crops
from serving.preprocess import Pixels

TEMPLATE: Final = Path(__file__).with_name("report.html")
MISTAKES: Final = 24
LARGEST_MATRIX: Final = 40
"""More classes than this are told as a list of the pairs that are confused most."""
THUMBNAIL: Final = 192


@dataclass(frozen=True)
class Report:
    """All that the page tells. `log` has an entry an epoch, as log.jsonl."""

    name: str
    checkpoint: Checkpoint
    log: Sequence[dict[str, Any]]
    findings: Findings
    validation: Decoded
    environment: dict[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """The whole file."""
        sections = [
            *self._curves(), self._filters(), self._crops(), self._classes(), self._calibration(),
            self._confusion(), self._mistakes(), *self._facts(),
        ]  # fmt: skip
        return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=escape(self.name),
            subtitle=escape(self._subtitle()),
            figures="".join(
                f'<div class="figure"><b>{number}</b><span>{text}</span></div>'
                for number, text in self._figures()
            ),
            sections="\n".join(section for section in sections if section),
            footer="Intervals are 95 % (Wilson). Errors are of the validation split; ten crops: four corners "
            "and the centre, and their mirror images, their probabilities averaged.",
        )

    def _subtitle(self) -> str:
        training = self.checkpoint.facts.get("training", {})
        classes, images = len(self.checkpoint.labels), len(self.findings.targets)
        known = [f"{classes} classes", f"{images:,} validation images"]
        if training:
            known = [f"recipe {training.get('recipe')}", f"{training.get('epochs')} epochs", *known]
        return f"AlexNet {self.checkpoint.net.architecture.variant}: {', '.join(known)}"

    def _figures(self) -> list[tuple[str, str]]:
        ten = self.findings.evaluations[Crops.TEN]
        half = 50 * (ten.top1_interval[1] - ten.top1_interval[0])
        return [
            (f"{100 * (1 - ten.top1_error):.1f} %", f"± {half:.1f}: right first, ten crops"),
            (f"{100 * (1 - ten.top5_error):.1f} %", "among the first five"),
            (f"{100 * ten.calibration_error:.1f} %", "calibration error"),
            (f"{parameter_count(self.checkpoint.net) / 1e6:.1f} M", "parameters"),
            (f"{_median_rate(self.log):.0f}", "images a second in training (median epoch)"),
        ]

    def _curves(self) -> list[str]:
        loss = [(entry["epoch"], entry["loss"]) for entry in self.log]
        # The last validation has ten crops: no point of the curve of one.
        errors = [(e["epoch"], e["top1_error"]) for e in self.log if e.get("crops") == Crops.CENTER]
        last = [(e["epoch"], e["top1_error"]) for e in self.log if e.get("crops") == Crops.TEN]
        series = [Series("one crop", errors, dots=True), Series("ten crops", last, "line-b", dots=True)]
        if not loss:
            return []
        charts = [_section("Training loss", lines([Series("", loss)], "epoch"))]
        if errors or last:
            shown = [one for one in series if one.points]
            charts.append(_section("Top-1 error in validation", lines(shown, "epoch", "{:.0%}".format)))
        return charts

    def _filters(self) -> str:
        weights = self.checkpoint.net.state_dict()["conv1.weight"]
        count, side = len(weights), weights.shape[-1]
        note = f"{count} kernels of {side} x {side} x 3 as colours, each at its own range; as figure 3"
        image = f'<img class="filters" alt="the kernels" src="{_png(filter_sheet(weights))}">'
        return _section("What the first layer learned", image, f"{note} of the paper")

    def _crops(self) -> str:
        rows = [("", "one crop", "ten crops")]
        one, ten = (self.findings.evaluations[crops] for crops in (Crops.CENTER, Crops.TEN))
        for name, say in (
            ("top-1 error", _top1),
            ("top-5 error", _top5),
            ("calibration error", lambda e: f"{100 * e.calibration_error:.2f} %"),
        ):
            rows.append((name, say(one), say(ten)))
        fixed, broken = self.findings.changed_by_ten()
        rows += [("right with ten alone", "", f"{fixed}"), ("right with one alone", f"{broken}", "")]
        return _section("One crop against ten", _table(rows, numbers=True))

    def _classes(self) -> str:
        one, ten = (self.findings.class_accuracy(crops) for crops in (Crops.CENTER, Crops.TEN))
        order = np.argsort(ten, kind="stable")
        note = "bar: ten crops; mark: one crop; worst first"
        if len(order) > 2 * LARGEST_MATRIX:
            order, note = np.concatenate([order[:20], order[-20:]]), f"{note}; the 20 worst and the 20 best"
        counts = np.bincount(self.findings.targets, minlength=len(ten))
        rows = "".join(
            f"<tr><th>{escape(self.checkpoint.labels[row].name)}</th>"
            f'<td><div class="track"><i style="width:{100 * ten[row]:.1f}%"></i>'
            f'<s style="left:{100 * one[row]:.1f}%"></s></div></td>'
            f'<td class="number" title="{counts[row]} images">{100 * ten[row]:.1f} %</td></tr>'
            for row in order
        )
        return _section("Accuracy by class", f'<table class="bars">{rows}</table>', note)

    def _calibration(self) -> str:
        series = []
        for crops, name, role in ((Crops.CENTER, "one", "line-a"), (Crops.TEN, "ten", "line-b")):
            counts, sure, right = self.findings.tallies[crops].bins
            full = counts > 0
            across, up = ((sums[full] / counts[full]).tolist() for sums in (sure, right))
            series.append(Series(name, list(zip(across, up, strict=True)), role, dots=True))
        chart = lines(series, "probability of the answer", "{:.0%}".format, square=True)
        note = "share of answers that are right; on the dashed line the network is as sure as it should be"
        return _section("Is it as sure as it is right?", chart, note)

    def _confusion(self) -> str:
        counts = self.findings.confusion(Crops.TEN)
        names = [label.name for label in self.checkpoint.labels]
        if len(names) <= LARGEST_MATRIX:
            drawn = f'<div class="matrix">{confusion(counts.tolist(), names)}</div>'
            return _section("Confusion", drawn, "row: the truth; column: the answer of ten crops", wide=True)
        off = counts - np.diag(counts.diagonal())
        pairs = np.argsort(-off, axis=None, kind="stable")[:30]
        rows: list[tuple[str, ...]] = [("truth", "answer", "images")]
        for pair in pairs:
            truth, answer = divmod(int(pair), len(names))
            if off[truth, answer]:
                rows.append((names[truth], names[answer], f"{off[truth, answer]} of {counts[truth].sum()}"))
        return _section("Confused most", _table(rows, numbers=True), wide=True)

    def _mistakes(self) -> str:
        found, labels = self.findings, self.checkpoint.labels
        items = []
        for row in found.surest_mistakes(MISTAKES):
            said, truth = labels[found.answers[Crops.TEN][row]].name, labels[found.targets[row]].name
            items.append(
                f'<li><img alt="{escape(truth)}" src="{_jpeg(self.validation.squares[row])}">'
                f'<p class="small"><span class="said">{escape(said)}</span> '
                f"{100 * found.sureness[Crops.TEN][row]:.0f} %<br>"
                f'is <span class="truth">{escape(truth)}</span></p></li>'
            )
        if not items:
            return _section("Mistakes", "<p>None: every validation image is answered right.</p>", wide=True)
        note = "wrong answers of ten crops with the highest probability; some labels are at fault themselves"
        return _section("The surest mistakes", f'<ul class="mistakes">{"".join(items)}</ul>', note, wide=True)

    def _facts(self) -> list[str]:
        training = {name: _plain(value) for name, value in self.checkpoint.facts.get("training", {}).items()}
        sections = [_section("Configuration", _table(training.items()))] if training else []
        trained_with = {"torch": str(self.checkpoint.facts.get("torch", "unknown"))}
        environment = self.environment or trained_with
        return [*sections, _section("Environment", _table(environment.items()))]


def read_log(path: Path) -> list[dict[str, Any]]:
    """log.jsonl; an epoch that was trained again after a stop counts as it was the last time."""
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [entry for _, entry in sorted({entry["epoch"]: entry for entry in entries}.items())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainError(f"{path}: not the log of a run: {error!r}") from error


def filter_sheet(weights: torch.Tensor, gap: int = 1, scale: int = 4) -> Pixels:
    """conv1's weights float [96, 3, 11, 11] -> uint8 [H, W, 3], sixteen in a row as in the paper's figure."""
    kernels = weights.float().permute(0, 2, 3, 1).numpy()
    low, high = (edge(kernels, axis=(1, 2, 3), keepdims=True) for edge in (np.min, np.max))
    shown = (255 * (kernels - low) / np.maximum(high - low, 1e-12)).round().astype(np.uint8)
    count, side = len(shown), shown.shape[1]
    columns = min(16, count)
    rows = -(-count // columns)
    cell = side + gap
    sheet = np.full((rows * cell - gap, columns * cell - gap, 3), 128, np.uint8)
    for index, kernel in enumerate(shown):
        top, left = (index // columns) * cell, (index % columns) * cell
        sheet[top : top + side, left : left + side] = kernel
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def _median_rate(log: Sequence[dict[str, Any]]) -> float:
    rates = [entry["images_per_s"] for entry in log if "images_per_s" in entry]
    return float(np.median(rates)) if rates else 0.0


def _top1(e: Evaluation) -> str:
    low, high = e.top1_interval
    return f"{100 * e.top1_error:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def _top5(e: Evaluation) -> str:
    low, high = e.top5_interval
    return f"{100 * e.top5_error:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        nested = any(isinstance(each, list | tuple) for each in value)
        return ("; " if nested else ": ").join(_plain(each) for each in value)
    return "" if value is None else str(value)


def _section(title: str, body: str, note: str = "", *, wide: bool = False) -> str:
    told = f'<p class="quiet small">{escape(note)}</p>' if note else ""
    look = ' class="wide"' if wide else ""
    return f"<section{look}><h2>{escape(title)}</h2>{told}{body}</section>"


def _table(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    look = ' class="number"' if numbers else ""
    lines_of = (
        f"<tr><th>{escape(first)}</th>{''.join(f'<td{look}>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table>{''.join(lines_of)}</table>"


def _png(pixels: Pixels) -> str:
    return _data_url(pixels, "PNG", optimize=True)


def _jpeg(square: Pixels) -> str:
    small = Image.fromarray(square).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _data_url(np.asarray(small), "JPEG", quality=82)


def _data_url(pixels: Pixels, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
