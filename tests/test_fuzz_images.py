"""The fuzz of the image path: it can be repeated, reaches the decoders, and finds what there is to find."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from fuzz_images import Cost, Measured, Report, answer_of, fuzz, main
from mutations import Case, case, good_files

from serving.decoder import Bounds, Failure, Upload, decoded
from serving.pictures import ACCEPTED_FORMATS
from serving.preprocess import decode_square


def test_it_starts_from_good_files_of_every_accepted_format() -> None:
    files = good_files()
    assert {image_format for image_format, _ in files} == set(ACCEPTED_FORMATS)
    for _, data in files:
        assert decode_square(data).shape == (256, 256, 3)


def test_a_case_can_be_made_again_from_its_two_numbers() -> None:
    assert [case(1, n).data for n in range(30)] == [case(1, n).data for n in range(30)]
    assert len({case(seed, n).data for n in range(30) for seed in (1, 2)}) > 50


def test_damage_gets_past_the_first_check_of_each_format() -> None:
    """Not all is refused as no image: of each format some is decoded, and some fails while it is."""
    said: Counter[tuple[str, str]] = Counter()
    for number in range(700):
        one = case(3, number)
        square = decoded(Upload(one.data))
        said[one.format, square.reason if isinstance(square, Failure) else "answered"] += 1
    for image_format in ACCEPTED_FORMATS:
        assert said[image_format, "answered"] >= 3 and said[image_format, "undecodable"] >= 5, said
        assert said[image_format, "not_an_image"] < 0.4 * sum(
            count for (named, _), count in said.items() if named == image_format
        )


@pytest.mark.parametrize(
    ("answer", "seconds", "found"),
    [
        ("answered", 0.1, False),
        ("undecodable", 0.1, False),
        ("decoder_crashed: its decoder died with status -11", 0.1, True),
        ("answered", 3.0, True),
    ],
)
def test_only_a_documented_answer_in_time_is_no_finding(answer: str, seconds: float, found: bool) -> None:
    report = Report()
    report.add(Cost(1, "PNG", 100, seconds, 40.0, answer))
    assert bool(report.found) is found
    assert answer_of(Failure("undecodable", "x")) == "undecodable"
    assert answer_of(Failure("out_of_memory", "x")) == "out_of_memory: x"


def test_a_run_counts_its_files_and_names_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--seed", "5", "--count", "60", "--keep", str(tmp_path)]) == 0
    assert re.search(r"seed 5: 60 files in \d+ s, 0 found", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


class Breaking(Measured):
    """Says of one case that it broke its decoder."""

    def cost(self, one: Case) -> Cost:
        answer = "decoder_crashed: its decoder died with status -11" if one.number == 7 else "answered"
        return Cost(one.number, one.format, len(one.data), 0.1, 40.0, answer)


def test_what_is_found_is_kept_and_can_be_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, until_s = Report(), time.monotonic() + 60
    fuzz(5, iter(range(10)), Breaking(Bounds()), report, threading.Lock(), until_s, tmp_path / "found")
    assert [cost.number for cost in report.found] == [7] and sum(report.kinds.values()) == 10
    assert "died with status -11" in capsys.readouterr().out
    (file,) = (tmp_path / "found").iterdir()
    assert main(["--seed", "5", "--only", "7", "--keep", str(tmp_path / "again")]) == 0
    assert "1 files" in capsys.readouterr().out
    assert file.read_bytes() == case(5, 7).data == (tmp_path / "again" / file.name).read_bytes()
