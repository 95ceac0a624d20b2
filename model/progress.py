"""How far a run is: the line on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.data import Batch


@contextmanager
def bar(title: str, total: int, done: int = 0, *, show: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal's error stream; what it yields moves it one on, with a note."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    ) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def advance(note: str) -> None:
            progress.update(task, advance=1, note=note)

        yield advance


class Pace:
    """Images a second since it was made, the loader's beside them, and how long the rest of a run takes.

    A view's cost grows with its pixels, so a run whose views grow is not promised too early.
    """

    def __init__(self, remaining_pixels: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.images, self.pixels, self._remaining = 0, 0.0, remaining_pixels
        self._loaded, self._loading, self._waited = 0, 0.0, 0.0
        self._clock, self._started = clock, clock()

    def add(self, images: int, side: int) -> None:
        """`images` views of `side` pixels squared were learned from."""
        self.images += images
        self.pixels += images * side**2

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, the time until each is there noted."""
        source = iter(batches)
        while True:
            started = self._clock()
            batch = next(source, None)
            if batch is None:
                return
            self._waited += self._clock() - started
            self._loaded, self._loading = self._loaded + len(batch.targets), self._loading + batch.seconds
            yield batch

    @property
    def waited(self) -> float:
        """Share of the time, 0..1, in which the network had no batch."""
        return self._waited / max(self._clock() - self._started, 1e-9)

    def loader_images_per_s(self, threads: int) -> float:
        """What so many threads of the loader make, beside the training that they share cores with."""
        return threads * self._loaded / max(self._loading, 1e-9)

    @property
    def images_per_s(self) -> float:
        return self.images / max(self._clock() - self._started, 1e-9)

    @property
    def remaining(self) -> timedelta:
        """To the run's last step, validations apart."""
        elapsed = self._clock() - self._started
        left = max(0.0, self._remaining - self.pixels)
        return timedelta(seconds=round(elapsed * left / max(self.pixels, 1.0)))
