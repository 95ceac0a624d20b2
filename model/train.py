"""Training: folder -> decode -> augment -> net -> checkpoint.

    alexnet train DATA --run runs/sample
    alexnet train DATA --run runs/sample --resume

A run folder holds config.json, log.jsonl, state.pt (to resume) and checkpoint.safetensors (to
evaluate and export). SIGTERM and Ctrl-C save the state first.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from model import checkpoint
from model.checkpoint import Checkpoint
from model.config import TrainConfig, TrainError
from model.data import (
    PAPER_AUGMENTATION,
    Augmentation,
    Batch,
    Decoded,
    ImageFolder,
    epoch_order,
    labels_of,
    prefetched,
    training_batch,
)
from model.evaluate import evaluate
from model.fold import fold_batch_norm
from model.machine import faster_precision
from model.net import AlexNet, Architecture, initialise_kaiming, initialise_paper
from serving.contract import Crops
from serving.postprocess import Label


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; the state was saved."""


@dataclass
class Progressed:
    """Where a run stands: what a resumed run needs besides weights and momentum."""

    epoch: int = 0
    step: int = 0
    plateaus: int = 0
    best_error: float = 1.0
    stale: int = 0


class Trainer:
    """One run: `train()` goes from where it stands to the last epoch."""

    def __init__(self, config: TrainConfig, run: Path, say: Callable[[str], None] = print) -> None:
        self.config, self.run, self.say = config, run, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        folder = ImageFolder.scan(Path(config.data) / "train")
        validation = ImageFolder.scan(Path(config.data) / "val", folder.classes)
        self.labels: list[Label] = labels_of(folder.classes)
        self.data = self._decode(folder, "decoding train")
        self.validation = self._decode(validation, "decoding val")
        architecture = Architecture(config.variant, len(folder.classes), batch_norm=config.batch_norm)
        net = AlexNet(architecture)
        (initialise_paper if config.recipe == "paper" else initialise_kaiming)(net)
        self.net: AlexNet = net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self._parameter_groups(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.recipe != "paper",
            fused=True,
        )
        self.augmentation = PAPER_AUGMENTATION if config.recipe == "paper" else Augmentation(config.crop_min)
        self.at = Progressed()
        self.stopping = False

    def _decode(self, folder: ImageFolder, title: str) -> Decoded:
        with _progress() as bar:
            task = bar.add_task(title, total=len(folder))
            return Decoded.read(folder, os.cpu_count() or 1, lambda: bar.advance(task))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Weights decay; biases and batch norm do so only in the paper's recipe."""
        decayed: list[Tensor] = []
        free: list[Tensor] = []
        for parameter in self.net.parameters():
            everything = self.config.recipe == "paper"
            (decayed if parameter.dim() > 1 or everything else free).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": self.config.weight_decay}]
        return [*groups, {"params": free, "weight_decay": 0.0}] if free else groups

    def train(self) -> Path:
        """Run to the last epoch; returns the path of the checkpoint."""
        with _signals(self._stop):
            while self.at.epoch < self.config.epochs:
                started = time.perf_counter()
                loss, count = self._epoch()
                seconds = time.perf_counter() - started
                self._finish_epoch(loss, count / seconds)
        return self.run / "checkpoint.safetensors"

    def _stop(self) -> None:
        self.stopping = True

    def _epoch(self) -> tuple[float, int]:
        """The rest of the current epoch; mean loss and images seen."""
        config, at = self.config, self.at
        self.net.train()
        batches = epoch_order(len(self.data.targets), config.batch_size, config.seed, at.epoch)
        size = config.size_at(at.epoch)
        jobs = [
            partial(training_batch, self.data, self.augmentation, rows, size, (config.seed, at.epoch, step))
            for step, rows in enumerate(batches)
        ][at.step :]
        total, count = 0.0, 0
        with _progress() as bar:
            task = bar.add_task(f"epoch {at.epoch + 1}/{config.epochs} at {size}", total=len(batches))
            bar.advance(task, at.step)
            for batch in prefetched(jobs, depth=4, workers=1):
                progress = (at.epoch + at.step / len(batches)) / config.epochs
                loss = self._step(batch, config.rate_at(progress, at.plateaus))
                if not math.isfinite(loss):
                    raise TrainError(
                        f"the loss became {loss} in epoch {at.epoch + 1}, step {at.step + 1}; "
                        f"lower the learning rate; the last good state is {self.run / 'state.pt'}"
                    )
                at.step += 1
                total, count = total + loss * len(batch.targets), count + len(batch.targets)
                bar.update(task, advance=1, note=f"loss {total / count:.3f}")
                if self.stopping:
                    self._save_state()
                    raise Interrupted(f"saved at epoch {at.epoch + 1}, step {at.step}")
        at.epoch, at.step = at.epoch + 1, 0
        return total / max(count, 1), count

    def _step(self, batch: Batch, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x = self._to_device(batch)
        targets = torch.from_numpy(batch.targets).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self._loss(x, targets, batch)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return loss.item()

    def _to_device(self, batch: Batch) -> Tensor:
        """uint8 [N, S, S, 3] -> normalised float [N, 3, S, S], with the batch's colour noise."""
        views, gain, offset = (
            torch.from_numpy(array).to(self.device) for array in (batch.views, batch.gain, batch.offset)
        )
        coloured: Tensor = (views.float() * gain + offset).clamp_(0, 255)
        return self.net.normalise(coloured)

    def _loss(self, x: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Cross entropy; with mixup (Zhang et al. 2018) against the batch in reverse order."""
        smoothing = self.config.label_smoothing
        if not self.config.mixup:
            return functional.cross_entropy(self.net.logits(x), targets, label_smoothing=smoothing)
        seed = int(batch.gain.view(np.uint32).ravel()[0])
        share = np.random.default_rng(seed).beta(self.config.mixup, self.config.mixup)
        logits = self.net.logits(share * x + (1 - share) * x.flip(0))
        losses = [
            functional.cross_entropy(logits, t, label_smoothing=smoothing) for t in (targets, targets.flip(0))
        ]
        loss: Tensor = share * losses[0] + (1 - share) * losses[1]
        return loss

    def _finish_epoch(self, loss: float, images_per_s: float) -> None:
        at, config = self.at, self.config
        entry: dict[str, Any] = {
            "epoch": at.epoch,
            "loss": round(loss, 4),
            "images_per_s": round(images_per_s, 1),
        }
        last = at.epoch == config.epochs
        if last or at.epoch % config.validate_every == 0 or config.recipe == "paper":
            result = evaluate(self.net, self.validation, Crops.TEN if last else Crops.CENTER)
            entry |= {"crops": str(result.crops), "top1_error": round(result.top1_error, 4)}
            self._note_plateau(result.top1_error)
            self._save_checkpoint(entry)
        self._save_state()
        with (self.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")
        self.say(" ".join(f"{name}={value}" for name, value in entry.items()))

    def _note_plateau(self, error: float) -> None:
        """The paper divides the rate by 10 when the validation error stops improving."""
        if error < self.at.best_error:
            self.at.best_error, self.at.stale = error, 0
            return
        self.at.stale += 1
        if self.at.stale >= 3:
            self.at.plateaus, self.at.stale = self.at.plateaus + 1, 0

    def _save_checkpoint(self, entry: dict[str, Any]) -> None:
        facts = {"training": asdict(self.config), "last_epoch": entry, "torch": torch.__version__}
        folded = fold_batch_norm(self.net.eval())
        checkpoint.save(self.run / "checkpoint.safetensors", Checkpoint(folded, self.labels, facts))

    def _save_state(self) -> None:
        path, beside = self.run / "state.pt", self.run / "state.pt.tmp"
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "at": asdict(self.at),
            "architecture": asdict(self.net.architecture),
        }
        try:
            torch.save(state, beside)
            checkpoint.replace_durably(beside, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            beside.unlink(missing_ok=True)
            raise TrainError(f"{path} cannot be written ({error}); the one before it stands") from error

    def resume(self) -> None:
        """Take up the state of an earlier start of this run."""
        path = self.run / "state.pt"
        state = torch.load(path, weights_only=True)
        if state["architecture"] != asdict(self.net.architecture):
            raise TrainError(f"{path} holds {state['architecture']}, not {self.net.architecture}")
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.at = Progressed(**state["at"])
        self.say(f"resumed at epoch {self.at.epoch + 1}, step {self.at.step + 1}")


def start(config: TrainConfig, run: Path, *, resume: bool, say: Callable[[str], None] = print) -> Path:
    """Begin a run in the folder `run`, or go on with it; returns the path of its checkpoint.

    A run that goes on does so with the configuration it began with. Raises TrainError where
    there is nothing to go on with, or where beginning would overwrite another run.
    """
    written = run / "config.json"
    if resume:
        if not (written.exists() and (run / "state.pt").exists()):
            raise TrainError(
                f"{run} holds no run to resume (config.json and state.pt); start without --resume"
            )
        config = TrainConfig.read(written)
    elif (run / "state.pt").exists():
        raise TrainError(f"{run} holds a run already; go on with --resume, or choose another --run")
    elif config.precision == "auto":
        config = replace(config, precision=faster_precision())
    trainer = Trainer(config, run, say)
    if resume:
        trainer.resume()
    else:
        run.mkdir(parents=True, exist_ok=True)
        beside = run / ".config.json.tmp"
        beside.write_text(json.dumps(asdict(config), indent=2) + "\n")
        checkpoint.replace_durably(beside, written)
    return trainer.train()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C call `stop` while the block runs."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: stop()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
