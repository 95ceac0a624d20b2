"""Evaluation: every image counted once, ten crops averaged, nothing flattered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.data import Decoded
from model.evaluate import Probabilities, Tally, evaluate, evaluate_predictor, wilson
from model.net import AlexNet, Architecture, initialise_kaiming
from serving.contract import Crops
from serving.preprocess import Pixels, cut_crops


def squares(count: int) -> Decoded:
    """Squares whose first pixel's red value is their number."""
    values = np.random.default_rng(3).integers(0, 256, (count, 256, 256, 3), np.uint8)
    values[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return Decoded(values, np.arange(count) % 7)


@pytest.mark.parametrize("count", [1, 3, 8, 17, 85])
@pytest.mark.parametrize("crops", [Crops.CENTER, Crops.TEN])
def test_every_image_is_counted_once(count: int, crops: Crops) -> None:
    rng = np.random.default_rng(count)
    table = rng.dirichlet(np.ones(7), count).astype(np.float32)
    seen: list[int] = []

    def predict(batch: Pixels) -> Probabilities:
        chosen: Probabilities = table[batch[:, 0, 0, 0]]
        return chosen

    data = squares(count)
    result = evaluate_predictor(predict, data, crops, seen.append)
    order = np.argsort(-table, axis=1)
    assert sum(seen) == count == result.images
    assert result.top1_error == pytest.approx((order[:, 0] != data.targets).mean())
    missed = [target not in row[:5] for row, target in zip(order, data.targets, strict=True)]
    assert result.top5_error == pytest.approx(np.mean(missed))


def test_ten_crops_are_averaged_before_the_decision() -> None:
    data = Decoded(
        np.random.default_rng(4).integers(0, 256, (5, 256, 256, 3), np.uint8), np.zeros(5, np.int64)
    )
    projection = np.random.default_rng(5).normal(size=(224 * 224 * 3, 3)) / 1000

    def predict(batch: Pixels) -> Probabilities:
        powers = np.exp((batch.reshape(len(batch), -1) - 127.5) @ projection)
        shares: Probabilities = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
        return shares

    wrong = sum(predict(cut_crops(square, Crops.TEN)).mean(0).argmax() != 0 for square in data.squares)
    assert evaluate_predictor(predict, data, Crops.TEN).top1_error == pytest.approx(wrong / 5)


def test_top_5_of_three_classes_is_never_wrong() -> None:
    data = Decoded(np.zeros((4, 256, 256, 3), np.uint8), np.array([0, 1, 2, 0]))
    result = evaluate_predictor(lambda batch: np.full((len(batch), 3), 1 / 3, np.float32), data, Crops.TEN)
    assert (result.top1_error, result.top5_error) == (0.5, 0.0)


def test_an_answer_that_is_not_a_number_is_wrong() -> None:
    table = np.full((4, 6), 1 / 6, np.float32)
    table[1], table[2, 5] = np.nan, np.inf
    data = Decoded(squares(4).squares, np.zeros(4, np.int64))
    result = evaluate_predictor(lambda batch: table[batch[:, 0, 0, 0]], data, Crops.CENTER)
    assert (result.top1_error, result.top5_error) == (0.5, 0.5)


def test_the_network_is_evaluated_without_dropout_on_the_served_crops() -> None:
    torch.manual_seed(0)
    net = AlexNet(Architecture("2012", 6, low_rank=8))
    initialise_kaiming(net)
    net.train()
    rng = np.random.default_rng(6)
    data = Decoded(rng.integers(0, 256, (9, 256, 256, 3), np.uint8), rng.integers(0, 6, 9))
    results = [evaluate(net, data, Crops.TEN) for _ in range(2)]
    assert results[0] == results[1]
    assert not net.training
    with torch.inference_mode():
        means = [net(torch.from_numpy(cut_crops(s, Crops.TEN))).mean(0).numpy() for s in data.squares]
    ranks = [int((mean > mean[target]).sum()) for mean, target in zip(means, data.targets, strict=True)]
    assert results[0].top1_error == pytest.approx(np.mean([rank >= 1 for rank in ranks]))
    assert results[0].top5_error == pytest.approx(np.mean([rank >= 5 for rank in ranks]))


def test_wilson_s_interval_holds_the_share_and_is_sound_at_the_edges() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # Wilson 1927, not the 0 +- 0 of Wald
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert wilson(239, 1987) == pytest.approx((0.1067, 0.1353), abs=1e-4)
    rng = np.random.default_rng(0)
    held = [low <= 0.2 <= high for low, high in (wilson(x, 150) for x in rng.binomial(150, 0.2, 4000))]
    assert 0.93 < np.mean(held) < 0.97


def test_the_calibration_error_is_how_far_probabilities_are_from_what_is_right() -> None:
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1, 40_000)
    table = np.stack([sure, 1 - sure], axis=1).astype(np.float32)
    honest = (rng.random(40_000) > sure).astype(np.int64)  # class 0 as often as it is said
    boastful = (rng.random(40_000) > sure - 0.2).astype(np.int64)
    errors = [Tally.of(table, t).evaluation(Crops.CENTER).calibration_error for t in (honest, boastful)]
    assert errors == pytest.approx([0, 0.2], abs=0.01)


def test_tallies_of_uneven_parts_add_up_to_that_of_all() -> None:
    rng = np.random.default_rng(2)
    table, targets = rng.dirichlet(np.ones(9), 101).astype(np.float32), rng.integers(0, 9, 101)
    parts = [Tally.of(table[rank::3], targets[rank::3]) for rank in range(3)] + [Tally()]
    total = sum(parts, Tally())
    assert total.evaluation(Crops.TEN) == Tally.of(table, targets).evaluation(Crops.TEN)
    assert parts[0].over(lambda values: 2 * np.asarray(values)).images == 68
