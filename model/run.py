"""A run's folder: what training leaves there and takes up again.

    config.json              what the run began with
    environment.json         and on which machine
    state.pt                 weights, momentum, random state and position: to resume
    log.jsonl                a line for each epoch
    checkpoint.safetensors   the network, batch norm folded: to evaluate and export
    tensorboard/             with --tensorboard: the curves, step by step

Every file but the log is written beside and renamed, so that a full disk or a kill at any moment
leaves the one before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import replace_durably
from model.config import TrainConfig, TrainError
from model.machine import environment


@dataclass(frozen=True)
class Run:
    """The folder of one run; every failure is a TrainError that names the file."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def state(self) -> Path:
        return self.folder / "state.pt"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def refuse_another(self) -> None:
        """A folder that holds a run is not begun anew."""
        if self.state.exists() or self.checkpoint.exists():
            raise TrainError(
                f"{self.folder} holds a run already; go on with --resume, or choose another --run"
            )

    def begin(self, config: TrainConfig, processes: int = 1) -> None:
        """Make the folder and write down what fixes the run."""
        text = json.dumps(asdict(config), indent=2) + "\n"
        _replace(self.config, lambda beside: beside.write_text(text))

        machine = json.dumps(environment(processes), indent=2) + "\n"
        _replace(self.folder / "environment.json", lambda beside: beside.write_text(machine))

    def environment(self) -> dict[str, str]:
        """What the run began on; empty for runs of before it was written down."""
        try:
            found: dict[str, str] = json.loads((self.folder / "environment.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def begun_with(self) -> TrainConfig:
        """The configuration of the run that can be resumed here."""
        if not (self.config.exists() and self.state.exists()):
            raise TrainError(
                f"{self.folder} holds no run to resume (config.json and state.pt); start without --resume"
            )
        return TrainConfig.read(self.config)

    def save_state(self, state: dict[str, Any]) -> None:
        """Plain values and tensors."""
        _replace(self.state, lambda beside: torch.save(state, beside))

    def load_state(self) -> dict[str, Any]:
        """What `save_state` wrote, every tensor on the CPU; runs no code from the file."""
        try:
            state: dict[str, Any] = torch.load(self.state, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise TrainError(f"{self.state}: no such file; there is nothing to resume") from error
        except Exception as error:  # on damaged bytes the unpickler raises whatever it trips over
            reason = str(error).partition("\n")[0]
            raise TrainError(f"{self.state} is damaged, the run cannot go on: {reason}") from error
        return state

    def note(self, entry: dict[str, Any]) -> None:
        """A line of the log."""
        try:
            with self.log.open("a") as log:
                log.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise TrainError(f"{self.log} cannot be written: {error}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(beside)
            replace_durably(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise TrainError(f"{path} cannot be written ({error}); the one before it stands") from error
