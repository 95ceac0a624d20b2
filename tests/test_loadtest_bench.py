"""What the benchmark concludes from its rounds, what it tries, and its picture: without a server."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from bench_page import page
from bench_plot import plot
from bench_results import (
    Ceiling,
    Measured,
    Results,
    Run,
    Tried,
    life_rows,
    setup_rows,
    speed_rows,
    targets,
    text,
)
from bench_rounds import keep_tried, load_tried, with_choice
from environments import COMMON, PEERS
from models import Models
from systems import DEFAULT, chosen, ours, peers

ROOT = Path(__file__).resolve().parent.parent
MADE = Models(Path("repository"), Path("stock.onnx"))


def measured(system: str, clients: int, rates: list[float], ms: float) -> list[Measured]:
    """A round for each rate; latencies around `ms`."""
    return [
        Measured(system, number, clients, rate, [ms - 1, ms, ms + 1], refused=0, degraded=0)
        for number, rate in enumerate(rates)
    ]


@pytest.fixture
def results() -> Results:
    found = [
        *measured("fastapi", 1, [7, 8, 9], 110), *measured("fastapi", 8, [8, 9, 10], 900),
        *measured("ray", 1, [5, 5, 5], 200), *measured("ray", 8, [10, 11, 10], 800),
        *measured("fp32", 1, [12, 13, 14], 75), *measured("fp32", 8, [18, 20, 19], 420),
    ]  # fmt: skip
    tried = [Tried("ray", "one copy", 9.0, 90.0), Tried("ray", "<two> copies", 10.5, 200.0, chosen=True)]
    return Results(
        found,
        [Run("fp32", number, 2.5 + number, 500, 600, 1) for number in range(3)],
        tried,
        [Ceiling("alexnet", number, 20.0) for number in range(3)],
        titles={"fastapi": "naive", "ray": "Ray & Serve", "fp32": "this gateway"},
        peers=["fastapi", "ray"],
        ceiling_of={"fp32": "alexnet"},
    )


def test_the_best_peer_is_the_one_with_the_highest_median(results: Results) -> None:
    assert results.best_peer(8) == ("ray", 10)
    assert results.best_peer(1) == ("fastapi", 8)


def test_rows_have_the_ratio_to_the_best_peer_under_the_same_load(results: Results) -> None:
    rows = {(row[0], row[1]): row for row in speed_rows(results)[1:]}
    assert rows["fp32", "8"][2:] == ["19.0 (18.0-20.0)", "420.0", "421.0", "421.0", "9", "0", "1.90"]
    assert rows["fastapi", "8"][-1] == "0.90"
    assert rows["ray", "8"][-1] == "1.00"


def test_latency_is_compared_with_the_quickest_set_up_of_any_peer_not_with_the_one_that_took_part(
    results: Results,
) -> None:
    assert results.quickest_peer_ms() == 90
    without = replace(results, tried=[])
    assert without.quickest_peer_ms() == 110


def test_targets_are_met_or_missed_by_what_was_found(results: Results) -> None:
    found = {each.says: each for each in targets(results)}
    assert found["fp32: images/s at 8 clients"].found == "1.90 x (19.0 against ray's 10.0)"
    assert found["fp32: images/s at 8 clients"].met
    assert found["fp32: of the engine's own loop"].met
    assert found["fp32: p99 of one client"].met
    assert found["fp32: start to first answer"].found == "3.5 s"
    assert found["fp32: start to first answer"].met is False
    assert found["fp32: resident after the loads"].met
    assert not any(says.startswith("int8") for says in found)


def test_a_slower_gateway_misses(results: Results) -> None:
    slow = [
        replace(each, images_per_s=15, latencies_ms=[95.0] * 3) if each.system == "fp32" else each
        for each in results.measured
    ]
    found = {each.says: each.met for each in targets(replace(results, measured=slow))}
    assert found["fp32: images/s at 8 clients"] is False
    assert found["fp32: of the engine's own loop"] is False
    assert found["fp32: p99 of one client"] is False


def test_without_peers_nothing_is_claimed_about_them(results: Results) -> None:
    alone = replace(results, peers=[], tried=[], measured=[m for m in results.measured if m.system == "fp32"])
    found = {each.says: each for each in targets(alone)}
    assert found["fp32: images/s at 8 clients"].met is None
    assert "fp32: p99 of one client" not in found
    assert all(row[-1] == "" for row in speed_rows(alone)[1:])


def test_start_and_memory_are_medians_over_rounds(results: Results) -> None:
    assert life_rows(results)[1:] == [["fp32", "3.5 (2.5-4.5)", "500", "600", "1"]]


def test_a_refusal_or_a_degraded_answer_is_told(results: Results) -> None:
    ray = [replace(each, refused=2, degraded=1) for each in results.measured if each.system == "ray"]
    found = [*(each for each in results.measured if each.system != "ray"), *ray]
    rows = {(row[0], row[1]): row for row in speed_rows(replace(results, measured=found))[1:]}
    assert rows["ray", "8"][-2] == "9" and rows["fp32", "8"][-2] == "0"


def test_the_fastest_set_up_is_chosen_and_the_simpler_of_two_that_are_alike() -> None:
    def chosen_of(*rates: float) -> int:
        tried = [Tried("ray", str(index), rate, 100.0) for index, rate in enumerate(rates)]
        return [each.chosen for each in with_choice(tried)].index(True)

    assert chosen_of(7.8, 8.5, 8.3) == 1
    assert chosen_of(7.6, 8.0, 8.1) == 1
    assert chosen_of(5.0, 6.0, 9.0) == 2


def test_set_ups_are_kept_for_the_same_machine_and_versions_alone(tmp_path: Path) -> None:
    tried = {"ray": [Tried("ray", "one", 7.0, 100.0, chosen=True)]}
    file = tmp_path / "setups.json"
    assert load_tried(file) == {}
    keep_tried(file, tried)
    assert load_tried(file) == tried
    file.write_text(file.read_text().replace("ray[serve]==", "ray[serve]==1"))
    assert load_tried(file) == {}


def test_every_set_up_tried_is_told_and_the_chosen_one_marked(results: Results) -> None:
    assert [row[-1] for row in setup_rows(results)[1:]] == ["", "*"]


def test_the_report_says_it_all(results: Results) -> None:
    told = "\n".join(text(results))
    for part in ("fp32", "<two> copies", "alexnet 20.0 (20.0-20.0)", "MISSED", "met"):
        assert part in told


def test_the_plot_is_well_formed_and_its_bars_are_as_long_as_the_rates(results: Results) -> None:
    root = ET.fromstring(plot(results))
    bars = [float(each.attrib["width"]) for each in root.iter() if each.attrib.get("rx")]
    assert len(bars) == 3
    assert bars[2] / bars[1] == pytest.approx(19 / 10, rel=1e-2)
    assert "Ray & Serve" in "".join(root.itertext())


def test_the_page_is_self_contained_and_escapes_what_it_shows(results: Results) -> None:
    html = page(results, ["python loadtest/bench.py", "a machine <2 cores>"])
    assert "<svg" in html and "&lt;two&gt; copies" in html and "&lt;2 cores&gt;" in html
    assert "<script" not in html and "src=" not in html and "href=" not in html


# --- who takes part --------------------------------------------------------------------------------


def test_by_default_every_peer_and_every_form_of_the_gateway_take_part() -> None:
    systems = chosen(",".join(DEFAULT), MADE)
    assert [s.name for s in systems if s.peer] == list(PEERS)
    assert {s.name for s in systems if not s.peer} == {"fp32", "int8", "auto", "triton"}


def test_an_unknown_server_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(SystemExit, match=r"torchserve.*litserve"):
        chosen("fp32,torchserve", MADE)


def test_every_peer_is_tried_in_several_ways_and_the_gateway_runs_as_it_comes() -> None:
    assert all(len(system.setups) > 1 for system in peers())
    assert all(len(system.setups) == 1 and not system.setups[0].environment for system in ours(MADE))


def test_peers_have_the_engine_and_the_decoder_of_the_constraints() -> None:
    """A peer with an older ONNX Runtime or Pillow would be slower than it need be."""
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    assert set(COMMON) <= pinned
    ours = {each for each in PEERS["fastapi"] if not each.startswith("uvloop")}  # the gateway has none
    assert ours and ours <= pinned
