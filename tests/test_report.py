"""The report: one file, nothing loaded from elsewhere, its numbers those of the run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from support import run_alexnet

from model import checkpoint as checkpoints
from model.charts import Series, confusion, lines, ticks
from model.checkpoint import Checkpoint
from model.config import TrainConfig, TrainError
from model.data import Decoded
from model.evaluate import Probabilities, evaluate_predictor
from model.findings import Findings, find
from model.net import AlexNet, Architecture
from model.report import Report, filter_sheet, read_log
from model.run import Run
from serving.contract import Crops
from serving.postprocess import Label
from serving.preprocess import Pixels

LABELS = [Label("n1", "tench"), Label("n2", "<b>loud</b>"), Label("n3", "gas pump")]
LOG: list[dict[str, Any]] = [
    {"epoch": 1, "loss": 1.5, "images_per_s": 50.0},
    {"epoch": 2, "loss": 1.1, "images_per_s": 60.0, "crops": "center", "top1_error": 0.4},
    {"epoch": 3, "loss": 0.9, "images_per_s": 70.0, "crops": "ten", "top1_error": 0.31},
]


@pytest.fixture
def validation() -> Decoded:
    rng = np.random.default_rng(0)
    return Decoded(rng.integers(0, 256, (31, 256, 256, 3), np.uint8), rng.integers(0, 3, 31))


def guess(crops: Pixels) -> Probabilities:
    """Probabilities that depend on a few pixels of each crop."""
    logits = crops[:, 100:103, 100, 0].astype(np.float32) / 60
    powers = np.exp(logits)
    result: Probabilities = powers / powers.sum(axis=1, keepdims=True)
    return result


@pytest.fixture
def findings(validation: Decoded) -> Findings:
    return find(guess, validation)


def test_one_pass_finds_what_two_evaluations_find(validation: Decoded, findings: Findings) -> None:
    for crops in (Crops.CENTER, Crops.TEN):
        assert findings.evaluations[crops] == evaluate_predictor(guess, validation, crops)
        counts = findings.confusion(crops)
        assert counts.sum() == 31
        assert 1 - counts.trace() / 31 == pytest.approx(findings.evaluations[crops].top1_error)
        per_class = [(findings.answers[crops][validation.targets == c] == c).mean() for c in range(3)]
        np.testing.assert_allclose(findings.class_accuracy(crops), per_class)
    right = {crops: findings.answers[crops] == validation.targets for crops in findings.answers}
    fixed, broken = findings.changed_by_ten()
    assert fixed - broken == right[Crops.TEN].sum() - right[Crops.CENTER].sum()


def test_the_surest_mistakes_are_mistakes_surest_first(validation: Decoded, findings: Findings) -> None:
    rows = findings.surest_mistakes(5)
    assert len(rows) == 5
    sure, wrong = findings.sureness[Crops.TEN], findings.answers[Crops.TEN] != validation.targets
    assert [sure[row] for row in rows] == sorted(sure[wrong])[:-6:-1]


class Loads(HTMLParser):
    """Everything that a browser would load, and the page's text."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(findings: Findings, validation: Decoded, labels: list[Label] = LABELS) -> str:
    torch.manual_seed(0)
    net = AlexNet(Architecture("2012", len(labels), low_rank=2))
    facts = {"training": {"recipe": "modern", "epochs": 3, "init": "", "resolutions": [[1.0, 224]]}}
    report = Report("my <run>", Checkpoint(net, labels, facts), LOG, findings, validation, {"torch": "9.9"})
    return report.html()


def test_the_page_loads_nothing_and_escapes_names(findings: Findings, validation: Decoded) -> None:
    html = page(findings, validation)
    parsed = Loads()
    parsed.feed(html)
    assert parsed.sources
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert not re.search(r"url\(|@import|<script|<link|https?://", html)
    assert "<b>loud</b>" not in html and "my <run>" not in html
    assert "$" not in html
    ten = findings.evaluations[Crops.TEN]
    for words in (
        f"{100 * (1 - ten.top1_error):.1f} %", "1.0: 224", "9.9", "Configuration",
        "tench answered as gas pump", "3 classes, 31 validation images", "The surest mistakes",
    ):  # fmt: skip
        assert words in parsed.text, words
    wrong = int((findings.answers[Crops.TEN] != validation.targets).sum())
    assert parsed.tags.count("li") == min(24, wrong)


def test_a_thousand_classes_are_told_as_the_pairs_confused_most(validation: Decoded) -> None:
    def predict(crops: Pixels) -> Probabilities:
        share: Probabilities = np.eye(100, dtype=np.float32)[crops[:, 0, 0, 0] % 100]
        return share

    labels = [Label(f"n{i}", f"class {i}") for i in range(100)]
    html = page(find(predict, validation), validation, labels)
    assert "Confused most" in html
    assert html.count('<rect class="cell"') == 0


def test_every_drawing_is_well_formed(findings: Findings) -> None:
    drawn = [
        lines([Series("a & b", [(1, 0.5), (2, 0.25)]), Series("<c>", [(2, 0.1)], dots=True)], "epoch"),
        lines([Series("", [(3, 0.0)])], "one point, at zero"),
        lines([Series("x", [(0.1, 0.2)])], "p", square=True),
        confusion(findings.confusion(Crops.TEN).tolist(), [label.name for label in LABELS]),
    ]
    for svg in drawn:
        assert ElementTree.fromstring(svg).tag == "svg"
    assert lines([], "nothing") == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 2.26, [0, 0.5, 1, 1.5, 2]),
        (1, 34, [10, 20, 30]),
        (0, 0.003, [0, 0.001, 0.002, 0.003]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_filters_are_sixteen_in_a_row_each_at_its_own_range() -> None:
    weights = torch.randn(96, 3, 11, 11) * torch.rand(96, 1, 1, 1)
    sheet = filter_sheet(weights, gap=1, scale=1)
    assert sheet.shape == (6 * 12 - 1, 16 * 12 - 1, 3)
    kernel = sheet[12 : 12 + 11, 24 : 24 + 11].astype(int)  # second row, third column
    assert (kernel.min(), kernel.max()) == (0, 255)
    original = weights[16 + 2].permute(1, 2, 0).numpy()
    assert np.corrcoef(kernel.ravel(), original.ravel())[0, 1] > 0.999


def test_a_log_counts_an_epoch_once_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"epoch": 1, "loss": 9}\n{"epoch": 2, "loss": 8}\n{"epoch": 2, "loss": 7}\n')
    assert [entry["loss"] for entry in read_log(path)] == [9, 7]
    path.write_text("{}\n")
    with pytest.raises(TrainError, match=r"log\.jsonl: not the log"):
        read_log(path)


def test_the_command_writes_the_page_into_the_run(tmp_path: Path) -> None:
    from support import encoded, picture

    run, net = Run(tmp_path / "run"), AlexNet(Architecture("owt", 2, low_rank=2))
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.jpg").write_bytes(encoded(picture(ord(name))))
    run.begin(TrainConfig("nowhere any more"))
    checkpoints.save(run.checkpoint, Checkpoint(net, [Label("a", "a"), Label("b", "b")]))
    run.log.write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    done = run_alexnet("report", run.folder, "--data", tmp_path)
    assert done.returncode == 0, done.stderr
    html = (run.folder / "report.html").read_text()
    assert "<h1>run</h1>" in html
    assert "processor" in html
    gone = run_alexnet("report", run.folder)
    assert gone.returncode == 1
    assert "nowhere any more" in gone.stderr
