"""The facts of the contract, against each other and against the paper."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from serving import contract
from serving.contract import (
    CENTRE,
    CENTRE_MIRRORED,
    CHANNELS,
    CROP_COUNT,
    CROP_OFFSETS,
    CROP_SIZE,
    MAX_BATCH,
    MEAN,
    RESIZE_SIZE,
    STD,
    VIEWS,
    Crops,
)

ROOT = Path(__file__).resolve().parent.parent


def test_names_and_sizes_are_those_that_clients_and_models_were_built_with() -> None:
    assert (contract.INPUT_NAME, contract.OUTPUT_NAME) == ("images", "probabilities")
    assert (RESIZE_SIZE, CROP_SIZE, CHANNELS) == (256, 224, 3)
    assert [str(crops) for crops in Crops] == ["center", "ten", "auto"]


def test_the_windows_are_the_four_corners_and_the_centre() -> None:
    assert list(CROP_OFFSETS) == ["top left", "top right", "bottom left", "bottom right", "centre"]
    assert list(CROP_OFFSETS.values()) == [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    seen = np.zeros((RESIZE_SIZE, RESIZE_SIZE), bool)
    for row, column in CROP_OFFSETS.values():
        window = seen[row : row + CROP_SIZE, column : column + CROP_SIZE]
        assert window.shape == (CROP_SIZE, CROP_SIZE)
        window[:] = True
    assert seen.all()


def test_the_views_are_every_window_and_then_every_mirror_image() -> None:
    assert len(VIEWS) == CROP_COUNT[Crops.TEN] == CROP_COUNT[Crops.AUTO] == 10
    assert [name for name, _ in VIEWS] == list(CROP_OFFSETS) * 2
    assert [mirrored for _, mirrored in VIEWS] == [False] * 5 + [True] * 5
    assert (CENTRE, CENTRE_MIRRORED) == (4, 9)
    assert CROP_COUNT[Crops.CENTER] == 1 and set(CROP_COUNT) == set(Crops)


def test_a_full_batch_is_whole_photographs() -> None:
    assert MAX_BATCH % CROP_COUNT[Crops.TEN] == 0


def test_mean_and_deviation_are_the_usual_ones_in_pixel_units() -> None:
    np.testing.assert_allclose(MEAN, np.array([0.485, 0.456, 0.406]) * 255)
    np.testing.assert_allclose(STD, np.array([0.229, 0.224, 0.225]) * 255)


@pytest.mark.parametrize("number", [*MEAN, *STD])
def test_a_mean_or_deviation_is_written_once(number: float) -> None:
    """A second one is a defect, in whichever unit."""
    for package in ("serving", "model", "export", "commands"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "contract.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                    same = node.value in (number, round(number / 255, 3))
                    assert not same, f"{path.relative_to(ROOT)}:{node.lineno} repeats {number}"
