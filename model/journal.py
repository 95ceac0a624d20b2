"""What a run says while it goes: a line of JSON for each epoch, and TensorBoard's curves beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model.config import TrainError
from model.run import Run

STEPS_BETWEEN = 20
"""Steps from one point of TensorBoard's curves to the next."""


class Journal:
    """log.jsonl always; with `tensorboard` also the folder tensorboard/ of the run.

    Raises TrainError where the package is missing, before anything is trained.
    """

    def __init__(self, run: Run, *, tensorboard: bool = False) -> None:
        self._run, self._events = run, _writer(run) if tensorboard else None

    def epoch(self, entry: Mapping[str, Any], step: int) -> None:
        """The line of an epoch that ended at `step` of the whole run; its numbers are TensorBoard's, too."""
        self._run.note(dict(entry))
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "epoch":
                self._scalar(f"epoch/{name}", value, step)
        if self._events is not None:
            self._events.flush()

    def step(self, step: int, **values: float) -> None:
        """Every twentieth step of the whole run."""
        if step % STEPS_BETWEEN == 0:
            for name, value in values.items():
                self._scalar(f"step/{name}", value, step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        if self._events is not None and math.isfinite(value):
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        if self._events is not None:
            self._events.close()


def _writer(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainError(
            "--tensorboard needs a package that is not installed: pip install 'alexnet-serving[tensorboard]'"
        ) from error
    return SummaryWriter(str(run.folder / "tensorboard"))
