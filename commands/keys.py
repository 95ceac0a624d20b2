"""alexnet key: API keys made, listed and taken back; a running gateway follows within a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from commands.terminal import err, out
from commands.wiring import settings_of
from serving.errors import MalformedRequest

if TYPE_CHECKING:
    from serving.keys import ApiKey

keys = typer.Typer(no_args_is_help=True, help="API keys of the gateway: make, list, revoke.")
Name = Annotated[str, typer.Argument(help="who the key is for; logs and fairness go by it")]
File = Annotated[
    Path | None, typer.Option("--file", help="the file of keys [default: ALEXNET_API_KEYS_FILE]")
]


@keys.command()
def new(
    name: Name,
    rate: Annotated[float | None, typer.Option(help="photographs a second [default: no limit]")] = None,
    burst: Annotated[float | None, typer.Option(help="at once after a rest [default: the rate]")] = None,
    file: File = None,
) -> None:
    """Make a key and show it, once: only its hash is kept."""
    from serving.keys import ApiKey, hashed, must_be_limits, must_be_name, new_key, write_keys

    try:
        must_be_name(name)
        must_be_limits(rate, burst)
    except ValueError as error:
        raise MalformedRequest(str(error)) from error
    with _alone_with(file) as (path, there):
        if any(key.name == name for key in there):
            raise MalformedRequest(f"{path}: there is a key {name!r}; revoke it, or choose another name")
        key = new_key()
        today = datetime.now(UTC).date().isoformat()
        write_keys(path, [*there, ApiKey(name, hashed(key.encode()), today, rate, burst)])
    err.print(f"{path}: key {name!r} added. It is shown this once:", highlight=False, soft_wrap=True)
    out.print(key, highlight=False, soft_wrap=True)


@keys.command("list")
def list_keys(file: File = None) -> None:
    """Who has a key, since when, and how often it may ask."""
    from serving.keys import read_keys

    table = Table("name", "created", "photographs/s", "burst", "SHA-256 begins", box=None)
    for key in read_keys(_path(file)):
        rate = "no limit" if key.rate is None else f"{key.rate:g}"
        burst = "" if key.rate is None else f"{key.bucket_size:g}"
        table.add_row(key.name, key.created, rate, burst, key.sha256[:8])
    out.print(table)


@keys.command()
def revoke(name: Name, file: File = None) -> None:
    """Take a key back: a running gateway refuses it within a second."""
    from serving.keys import write_keys

    with _alone_with(file) as (path, there):
        kept = [key for key in there if key.name != name]
        if len(kept) == len(there):
            raise MalformedRequest(f"{path}: there is no key {name!r}")
        write_keys(path, kept)
    err.print(f"{path}: key {name!r} is no longer accepted", highlight=False, soft_wrap=True)


def _path(file: Path | None) -> Path:
    path = settings_of({"api_keys_file": file}).api_keys_file
    if path is None:
        raise MalformedRequest("which file of keys? give --file, or set ALEXNET_API_KEYS_FILE")
    return path


@contextmanager
def _alone_with(file: Path | None) -> Iterator[tuple[Path, tuple[ApiKey, ...]]]:
    """The file and its keys, locked against another `alexnet key` until they are written back.

    The folder is locked and not the file, which is replaced meanwhile.
    """
    import fcntl

    from serving.keys import read_keys

    path = _path(file)
    path = path.resolve() if path.is_symlink() else path
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise MalformedRequest(f"{path.parent}: no folder for a file of keys ({error.strerror})") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield path, read_keys(path) if path.exists() else ()
    finally:
        os.close(folder)
