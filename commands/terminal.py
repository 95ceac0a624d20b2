"""What the commands write to the terminal: results on its output, progress and notes on its error stream."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

out, err = Console(), Console(stderr=True)


def columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal's error stream; yields what moves it on."""
    more = (*columns(), MofNCompleteColumn())
    with Progress(*more, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)


def log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alexnet").setLevel(logging.INFO)
