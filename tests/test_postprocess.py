"""Probabilities to labels: the mean, the order, the label file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.postprocess import Label, average, read_labels, top_predictions

LABELS = tuple(Label(f"n{index:08d}", f"class {index}") for index in range(40))


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_top_predictions_are_the_largest_means_in_order(
    crops: int, classes: int, seed: int, count: int
) -> None:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(classes), crops).astype(np.float32)
    mean = average(probabilities)
    top = top_predictions(mean, LABELS[:classes], count)
    assert len(top) == min(count, classes)
    values = [p.probability for p in top]
    assert values == sorted(values, reverse=True)
    assert (
        values
        == sorted((float(p) for p in probabilities.astype(float).mean(0).astype(np.float32)), reverse=True)[
            :count
        ]
    )
    assert all((p.label, p.wnid) == (LABELS[p.index].name, LABELS[p.index].wnid) for p in top)


def test_equal_probabilities_stand_in_class_order() -> None:
    mean = np.array([0.1, 0.3, 0.3, 0.2, 0.1], np.float32)
    assert [p.index for p in top_predictions(mean, LABELS, 5)] == [1, 2, 3, 0, 4]


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1))
def test_a_label_of_ones_own_survives_its_line(name: str) -> None:
    label = Label(name, name)
    parsed = Label.parse(label.line())
    assert parsed.line() == label.line()


def test_wordnet_labels_may_hold_colons_spaces_and_commas(tmp_path: Path) -> None:
    labels = [
        Label("n01440764", "tench, Tinca tinca"),
        Label("n03028079", "church: a building"),
        Label("cat", "cat"),
    ]
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"{label.line()}\n" for label in labels) + "\n", encoding="utf-8")
    assert read_labels(path) == tuple(labels)
