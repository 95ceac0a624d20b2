"""What deploy/gateway.Dockerfile's image weighs, by package, without building it.

    .venv-dev/bin/python deploy/image_size.py            the gateway
    .venv-dev/bin/python deploy/image_size.py train export

The packages are those that the extras need, in the versions installed here (constraints.txt's); their
sizes are the bytes of their installed files, compiled modules included, as pip recorded them. The base
image cannot be weighed here: its figure is an assumption.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "alexnet-serving"
BASE_MB = 125
"""python:3.11-slim-bookworm, uncompressed: an assumption, neither measured nor looked up."""


def closure(extras: frozenset[str]) -> dict[str, Distribution]:
    """Every distribution that the project with `extras` installs, by name, itself left out."""
    found: dict[str, Distribution] = {}
    waiting, seen = [(PROJECT, extras)], set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        package = distribution(name)
        if name != PROJECT:
            found[name] = package
        for line in package.requires or []:
            needed = Requirement(line)
            if _applies(needed, wanted):
                waiting.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return found


def _applies(needed: Requirement, extras: frozenset[str]) -> bool:
    return needed.marker is None or any(
        needed.marker.evaluate({"extra": extra}) for extra in (extras or {""})
    )


def installed_bytes(package: Distribution) -> int:
    """What its files occupy; the commands it puts beside them are counted too."""
    paths = {Path(str(file.locate())) for file in package.files or []}
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    extras = frozenset(sys.argv[1:] or ["triton"])
    try:
        sizes = {name: installed_bytes(package) for name, package in closure(extras).items()}
    except PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed here: run this in .venv-dev")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.1f} MB  {name}")
    total = sum(sizes.values()) / 1e6
    print(f"{total:8.1f} MB  {len(sizes)} packages")
    print(f"{total + BASE_MB:8.0f} MB  with the base image ({BASE_MB} MB assumed, not measured)")


if __name__ == "__main__":
    main()
