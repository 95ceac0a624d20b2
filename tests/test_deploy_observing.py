"""The dashboard and the alerts ask for metrics and labels that the gateway has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT

from serving.admission import Admission, Limits
from serving.backends import ModelInfo
from serving.metrics import Metrics

DASHBOARD = ROOT / "deploy/grafana/dashboard.json"
RULES = ROOT / "deploy/prometheus/rules.yaml"
OF_PROMETHEUS = {"le", "job"}


def samples() -> dict[str, set[str]]:
    """Every sample's name of a gateway that has answered and refused, and its labels."""
    from prometheus_client import generate_latest

    metrics = Metrics(Admission(Limits()))
    info = ModelInfo("alexnet", "1", "fp32", "onnxruntime")
    for version in ("1", "2"):
        info = ModelInfo("alexnet", version, "fp32", "onnxruntime")
        stages = dict.fromkeys(("read", "decode", "queue", "infer", "post", "total"), 1.0)
        metrics.answered(info, 10, stages, 1000, degraded=True)
    metrics.refused(503, "Overloaded")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions(path: Path) -> list[str]:
    if path == DASHBOARD:
        panels = json.loads(path.read_text())["panels"]
        return [target["expr"] for panel in panels for target in panel["targets"]]
    groups: list[dict[str, Any]] = yaml.safe_load(path.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("path", [DASHBOARD, RULES], ids=lambda path: path.name)
def test_what_is_asked_for_exists_with_its_labels(path: Path) -> None:
    there = samples()
    asked = expressions(path)
    assert len(asked) >= 3
    for expression in asked:
        assert expression.count("(") == expression.count(")"), expression
        names = re.findall(r"alexnet_\w+", expression)
        assert names, expression
        for name in names:
            assert name in there, f"{name} in {expression}"
        known = OF_PROMETHEUS.union(*(there[name] for name in names))
        selectors = re.findall(r"\{([^}]*)\}", expression)
        labels = {label for inside in selectors for label in re.findall(r"(\w+)\s*(?:=|!)", inside)}
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        labels |= {label.strip() for by in grouped for label in by.split(",")}
        assert labels <= known, expression


def test_the_dashboard_shows_every_metric_and_its_panels_do_not_overlap() -> None:
    asked = " ".join(expressions(DASHBOARD))
    shown = {re.sub(r"_(bucket|total)$", "", name) for name in re.findall(r"alexnet_\w+", asked)}
    there = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in samples()}
    assert shown == there
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_a_stage_s_time_and_a_refusal_s_reason_are_told_apart() -> None:
    there = samples()
    assert there["alexnet_stage_seconds_bucket"] == {"stage", "model", "version", "crops", "le"}
    assert there["alexnet_refusals_total"] == {"status", "reason"}
    assert there["alexnet_version_changes_total"] == {"model"}
