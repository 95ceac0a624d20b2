"""Image folders, augmentation, and batches that depend on the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import encoded, picture

from model.data import (
    PAPER_AUGMENTATION,
    PCA_EIGENVALUES,
    PCA_EIGENVECTORS,
    Augmentation,
    Batch,
    DataError,
    Decoded,
    ImageFolder,
    epoch_order,
    labels_of,
    prefetched,
    training_batch,
)
from serving.preprocess import decode_square


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.jpg").write_bytes(encoded(picture(10 * seed + index, 90, 80)))
    return root


def test_a_folder_s_classes_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "train", {"zebra": 2, "ant": 1, "n01440764": 3})
    (root / "ant" / "notes.txt").write_text("no image")
    folder = ImageFolder.scan(root)
    assert folder.classes == ("ant", "n01440764", "zebra")
    assert folder.targets == (0, 1, 1, 1, 2, 2)
    assert [label.name for label in labels_of(folder.classes)] == ["ant", "tench", "zebra"]


def test_a_folder_that_cannot_be_trained_on_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        ImageFolder.scan(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder.scan(tmp_path)
    make_folder(tmp_path, {"cat": 1, "dog": 0})
    with pytest.raises(DataError, match=r"dog: no images"):
        ImageFolder.scan(tmp_path)
    with pytest.raises(DataError, match="no class of the model: dog"):
        ImageFolder.scan(tmp_path, ("cat", "fish"))


def test_what_other_programs_leave_in_a_folder_is_no_class_and_no_image(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1, "b": 1, ".ipynb_checkpoints": 1})
    (tmp_path / "a" / "._0.jpg").write_bytes(b"a resource fork of macOS")
    (tmp_path / "a" / "more.jpg").mkdir()
    folder = ImageFolder.scan(tmp_path)
    assert folder.classes == ("a", "b")
    assert folder.paths == (tmp_path / "a" / "0.jpg", tmp_path / "b" / "0.jpg")


def test_a_given_order_of_classes_is_kept(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1, "b": 2})
    assert ImageFolder.scan(tmp_path, ("b", "a")).targets == (0, 0, 1)


def test_decoded_pixels_are_what_serving_decodes(tmp_path: Path) -> None:
    folder = ImageFolder.scan(make_folder(tmp_path, {"a": 3, "b": 2}))
    seen: list[None] = []
    data = Decoded.read(folder, 2, lambda: seen.append(None))
    assert len(seen) == 5
    for path, square in zip(folder.paths, data.squares, strict=True):
        np.testing.assert_array_equal(square, decode_square(path.read_bytes()))
    folder.paths[3].write_bytes(b"broken")
    with pytest.raises(DataError, match=str(folder.paths[3])):
        Decoded.read(folder, 2)
    folder.paths[3].unlink()
    with pytest.raises(DataError, match=f"{folder.paths[3]}: .*No such file"):
        Decoded.read(folder, 2)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=50)
def test_an_epoch_is_a_shuffle_without_repeats(count: int, size: int, seed: int, epoch: int) -> None:
    batches = epoch_order(count, size, seed, epoch)
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == len(rows)
    assert len(rows) == (count // size * size or min(count, size))
    assert [b.tolist() for b in batches] == [b.tolist() for b in epoch_order(count, size, seed, epoch)]


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = [np.concatenate(epoch_order(64, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order.tolist()) for order in [*orders, np.arange(64)]}) == 7


def random_data(count: int) -> Decoded:
    rng = np.random.default_rng(1)
    return Decoded(rng.integers(0, 256, (count, 256, 256, 3), np.uint8), np.arange(count))


def test_a_batch_depends_on_its_seed_alone() -> None:
    data, rows = random_data(6), np.array([4, 1, 3])
    one, same, other = (
        training_batch(data, Augmentation(), rows, 96, seed) for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3))
    )
    assert one.views.shape == (3, 96, 96, 3)
    assert one.targets.tolist() == [4, 1, 3]
    for a, b in ((one.views, same.views), (one.gain, same.gain), (one.offset, same.offset)):
        np.testing.assert_array_equal(a, b)
    assert (one.views != other.views).any()


def test_the_paper_s_view_is_a_window_or_its_mirror_image() -> None:
    square = random_data(1).squares[0]
    mirrored = 0
    for seed in range(200):
        view = PAPER_AUGMENTATION.windows(1, np.random.default_rng(seed)).view(square, 0, 224)
        windows = [(r, c) for r in range(33) for c in range(33) if (square[r, c] == view[0, 0]).all()]
        plain = any((square[r : r + 224, c : c + 224] == view).all() for r, c in windows)
        flipped = not plain
        if flipped:
            back = view[:, ::-1]
            assert any(
                (square[r : r + 224, c : c + 224] == back).all()
                for r in range(33) for c in range(33) if (square[r, c] == back[0, 0]).all()
            )  # fmt: skip
        mirrored += flipped
    assert 70 < mirrored < 130


@pytest.mark.parametrize(("size", "crop_min"), [(64, 128), (224, 128), (128, 256), (160, 40)])
def test_a_resized_view_is_an_upright_square_window_mirrored_half_the_time(size: int, crop_min: int) -> None:
    square = np.zeros((256, 256, 3), np.uint8)
    square[..., 0] = np.arange(256)[:, None]  # a pixel's red is its row, its green its column
    square[..., 1] = np.arange(256)[None, :]
    augmentation, mirrored, sides = Augmentation(crop_min), 0, []
    for seed in range(300):
        view = augmentation.windows(1, np.random.default_rng(seed)).view(square, 0, size).astype(int)
        assert view.shape == (size, size, 3)
        red, green = view[:, size // 2, 0], view[size // 2, :, 1]
        mirrored += green[0] > green[-1]
        assert (view[..., 0] == red[:, None]).all()
        assert (view[..., 1] == green[None, :]).all()
        assert (np.diff(red) >= 0).all()
        height, width = np.ptp(red), np.ptp(green)
        assert abs(height - width) <= 1
        sides.append(height * size / (size - 1))
    assert 110 < mirrored < 190
    assert crop_min - 4 <= min(sides) <= crop_min + 8
    assert 256 - 8 <= max(sides) <= 256 + 4


def test_every_image_of_a_batch_gets_its_own_brightness_and_colour() -> None:
    gain, offset = Augmentation(brightness=0.2).colour(5000, np.random.default_rng(8))
    assert (gain.shape, offset.shape) == ((5000, 1, 1, 1), (5000, 1, 1, 3))
    assert 0.8 <= gain.min() < 0.81
    assert 1.19 < gain.max() <= 1.2
    assert len(np.unique(offset)) > 14_000


def test_colour_noise_has_the_published_covariance() -> None:
    _, offset = PAPER_AUGMENTATION.colour(40_000, np.random.default_rng(2))
    measured = np.cov(offset.reshape(-1, 3).T / 255)
    expected = PCA_EIGENVECTORS @ np.diag((0.1 * PCA_EIGENVALUES) ** 2) @ PCA_EIGENVECTORS.T
    np.testing.assert_allclose(measured, expected, rtol=0.05, atol=2e-6)
    gain, _ = PAPER_AUGMENTATION.colour(5, np.random.default_rng(3))
    assert (gain == 1).all()


def test_prefetched_results_keep_their_order_and_their_errors() -> None:
    data = random_data(4)

    def job(number: int) -> Batch:
        if number == 13:
            raise DataError("thirteen")
        return training_batch(data, Augmentation(), np.array([number % 4]), 32, (number,))

    jobs = [lambda number=number: job(number) for number in range(10)]
    targets = [int(batch.targets[0]) for batch in prefetched(jobs, depth=3, workers=2)]
    assert targets == [number % 4 for number in range(10)]
    with pytest.raises(DataError, match="thirteen"):
        list(prefetched([lambda: job(13)], depth=3, workers=2))
