"""`crops=auto`: the margin is chosen so that leaving eight crops out changes hardly any first label."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from export.auto import MARGINS, MAX_CHANGED, auto_curve, choose, first_labels, ten_crops
from model.data import Decoded
from model.evaluate import Predict, Probabilities
from serving.contract import CENTRE, CENTRE_MIRRORED
from serving.preprocess import Pixels


def random_rows(images: int, seed: int, spread: float) -> Probabilities:
    """float32 [images, 10, 5]: crops of one image agree more or less."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (images, 1, 5)) + rng.normal(0, spread, (images, 10, 5))
    powers = np.exp(logits - logits.max(axis=2, keepdims=True))
    rows: Probabilities = (powers / powers.sum(axis=2, keepdims=True)).astype(np.float32)
    return rows


def predictor_of(each: Probabilities) -> tuple[Predict, Decoded]:
    """A predictor that knows an image by its first pixels, and the images."""
    squares = np.zeros((len(each), 256, 256, 3), np.uint8)
    number = np.arange(len(each))[:, np.newaxis, np.newaxis]
    squares[..., 0], squares[..., 1] = number % 250, number // 250

    def predict(crops: Pixels) -> Probabilities:
        rows = crops[:, 0, 0, :2].astype(int) @ (1, 250)
        answers: Probabilities = each[rows, np.arange(len(crops)) % 10]
        return answers

    return predict, Decoded(squares, np.zeros(len(each), np.int64))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.1, 4))
def test_a_larger_margin_asks_for_more_crops_and_changes_less(seed: int, spread: float) -> None:
    each = random_rows(200, seed, spread)
    curve = auto_curve(each)
    assert [point.margin for point in curve] == list(MARGINS)
    crops, changed = [p.mean_crops for p in curve], [p.changed for p in curve]
    assert crops == sorted(crops) and changed == sorted(changed, reverse=True)
    assert crops[0] == 2.0 and crops[-1] <= 10
    ten = each.mean(axis=1).argmax(axis=1)
    for point in curve:
        assert abs((first_labels(each, point.margin) != ten).mean() - point.changed) < 1e-4
    two = each[:, [CENTRE, CENTRE_MIRRORED]].mean(axis=1).argmax(axis=1)
    assert (first_labels(each, 0) == two).all()


def test_the_least_margin_that_keeps_the_labels_is_chosen() -> None:
    for seed, spread in ((1, 0.3), (2, 1.0), (3, 2.5)):
        each = random_rows(600, seed, spread)
        predict, training = predictor_of(each)
        told: list[int] = []
        chosen = choose(predict, training, told.append)
        assert chosen.images == 600 == sum(told)
        assert chosen.changed <= MAX_CHANGED or chosen.margin == MARGINS[-1]
        smaller = [point for point in auto_curve(each) if point.margin < chosen.margin]
        assert all(point.changed > MAX_CHANGED for point in smaller)
        np.testing.assert_array_equal(ten_crops(predict, training), each)
