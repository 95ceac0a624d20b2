"""Versions listed, rolled back and pruned; a number is never used twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_alexnet, tiny_repository

from export.versions import VersionError, listed, next_number, prune, rollback
from serving.repository import latest_version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for version in (1, 2, 10):
        tiny_repository(tmp_path, version=version, seed=version)
    (tmp_path / "alexnet" / ".staging-11-5").mkdir()
    (tmp_path / "alexnet" / "011").mkdir()
    return tmp_path


def numbers(folder: Path) -> list[tuple[int, bool]]:
    return [(version.number, version.withdrawn) for version in listed(folder)]


def test_versions_are_listed_in_order_with_their_provenance(repository: Path) -> None:
    folder = repository / "alexnet"
    assert numbers(folder) == [(1, False), (2, False), (10, False)]
    assert listed(folder)[0].provenance["precision"] == "fp32"
    with pytest.raises(VersionError, match="no such model"):
        listed(repository / "absent")


def test_rollback_serves_the_one_before_and_keeps_the_number(repository: Path) -> None:
    folder = repository / "alexnet"
    assert next_number(folder) == 11
    assert rollback(folder) == 2
    assert latest_version(repository, "alexnet").number == "2"
    assert numbers(folder) == [(1, False), (2, False), (10, True)]
    assert next_number(folder) == 11
    assert rollback(folder) == 1
    with pytest.raises(VersionError, match="no earlier version"):
        rollback(folder)
    assert latest_version(repository, "alexnet").number == "1"


def test_rollback_to_a_named_version(repository: Path) -> None:
    folder = repository / "alexnet"
    with pytest.raises(VersionError, match=r"no version 7 \(there are 1, 2, 10\)"):
        rollback(folder, 7)
    assert rollback(folder, 1) == 1
    assert numbers(folder) == [(1, False), (2, True), (10, True)]


def test_prune_keeps_the_newest_and_deletes_the_withdrawn(repository: Path) -> None:
    folder = repository / "alexnet"
    rollback(folder)
    (folder / ".pruned-3").mkdir()
    with pytest.raises(VersionError, match="at least one"):
        prune(folder, 0)
    assert prune(folder, 1) == [1, 10]
    assert numbers(folder) == [(2, False)]
    assert not list(folder.glob(".pruned-*"))


def test_the_commands(repository: Path) -> None:
    shown = run_alexnet("versions", "alexnet", "--repository", repository)
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[0] for line in shown.stdout.splitlines()[-3:]] == ["1", "2", "10"]
    back = run_alexnet("rollback", "alexnet", "--repository", repository)
    assert "version 2" in back.stdout
    pruned = run_alexnet("prune", "alexnet", "--keep", "1", "--repository", repository)
    assert "1, 10" in pruned.stdout
    wrong = run_alexnet("rollback", "alexnet", "--repository", repository)
    assert wrong.returncode == 1
    assert "no earlier version" in wrong.stderr
