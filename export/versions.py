"""The versions of one model: listed, withdrawn, pruned. Needs no torch, so a server can go back too.

model_repository/<model>/3/              can be served; the highest number is
model_repository/<model>/.withdrawn-4/   was rolled back; no server sees it, its number stays taken
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from serving.contract import PROVENANCE_FILE

WITHDRAWN: Final = ".withdrawn-"
PRUNED: Final = ".pruned-"


class VersionError(Exception):
    """There is no such version, or none to go back to; nothing was changed."""


@dataclass(frozen=True)
class ListedVersion:
    """One version as `alexnet versions` shows it."""

    number: int
    withdrawn: bool
    provenance: dict[str, Any]


def listed(folder: Path) -> list[ListedVersion]:
    """Every version of the model in `folder`, ascending; raises VersionError if there is no such model."""
    if not folder.is_dir():
        raise VersionError(f"{folder}: no such model")
    found = []
    for path in folder.iterdir():
        name = path.name.removeprefix(WITHDRAWN)
        if path.is_dir() and name.isdecimal() and not name.startswith("0"):
            found.append(ListedVersion(int(name), name != path.name, _provenance(path / PROVENANCE_FILE)))
    return sorted(found, key=lambda version: version.number)


def next_number(folder: Path) -> int:
    """One more than the highest version, withdrawn ones included: a number is never used twice."""
    return 1 + max((version.number for version in listed(folder)), default=0)


def rollback(folder: Path, to: int | None = None) -> int:
    """Withdraw every version above `to` (default: the one before the newest); returns what is served now.

    From the highest down, one rename each: whenever it is interrupted, a whole version is the highest.
    """
    numbers = [version.number for version in listed(folder) if not version.withdrawn]
    if to is None:
        if len(numbers) < 2:
            raise VersionError(f"{folder}: no earlier version to go back to (there is {numbers or 'none'})")
        to = numbers[-2]
    if to not in numbers:
        raise VersionError(f"{folder}: no version {to} (there are {', '.join(map(str, numbers)) or 'none'})")
    for number in reversed(numbers):
        if number > to:
            (folder / str(number)).rename(folder / f"{WITHDRAWN}{number}")
    return to


def prune(folder: Path, keep: int) -> list[int]:
    """Delete withdrawn versions and all but the newest `keep` of the others; returns their numbers."""
    if keep < 1:
        raise VersionError("at least one version is kept")
    present = listed(folder)
    kept = [version.number for version in present if not version.withdrawn][-keep:]
    gone = []
    for version in present:
        if version.number in kept:
            continue
        name = f"{WITHDRAWN}{version.number}" if version.withdrawn else str(version.number)
        aside = folder / f"{PRUNED}{version.number}"
        (folder / name).rename(aside)  # out of sight in one step, then deleted
        shutil.rmtree(aside)
        gone.append(version.number)
    for aside in folder.glob(f"{PRUNED}*"):
        shutil.rmtree(aside)  # what a killed prune left
    return gone


def _provenance(path: Path) -> dict[str, Any]:
    try:
        provenance: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return provenance
