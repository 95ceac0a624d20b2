"""Training: folder -> decode -> augment -> net -> checkpoint.

    alexnet train DATA --run runs/sample
    alexnet train DATA --run runs/sample --resume

SIGTERM and Ctrl-C save the state first; `model.run` says what a run's folder holds.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
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
from model.run import Run
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
    loss_sum: float = 0.0
    images: int = 0
    """Of the current epoch, over every start of the run."""


class Trainer:
    """One run: `train()` goes from where it stands to the last epoch."""

    def __init__(self, config: TrainConfig, run: Path, say: Callable[[str], None] = print) -> None:
        self.config, self.run, self.say = config, Run(run), say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        folder = ImageFolder.scan(Path(config.data) / "train")
        if len(folder.classes) < 2:
            raise TrainError(f"{config.data}/train holds one class, {folder.classes[0]}; it takes two")
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
            task = bar.add_task(title, total=len(folder), note="")
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
                count = self._epoch()
                self._finish_epoch(count / (time.perf_counter() - started))
        return self.run.checkpoint

    def _stop(self) -> None:
        self.stopping = True

    def _epoch(self) -> int:
        """The rest of the current epoch; how many images that were."""
        config, at = self.config, self.at
        self.net.train()
        batches = epoch_order(len(self.data.targets), config.batch_size, config.seed, at.epoch)
        size = config.size_at(at.epoch)
        jobs = [
            partial(training_batch, self.data, self.augmentation, rows, size, (config.seed, at.epoch, step))
            for step, rows in enumerate(batches)
        ][at.step :]
        count = 0
        with _progress() as bar:
            title = f"epoch {at.epoch + 1}/{config.epochs} at {size}"
            task = bar.add_task(title, total=len(batches), completed=at.step, note="")
            for batch in prefetched(jobs, depth=4, workers=1):
                progress = (at.epoch + at.step / len(batches)) / config.epochs
                loss = self._step(batch, config.rate_at(progress, at.plateaus))
                at.step += 1
                if not math.isfinite(loss):
                    raise self._diverged(f"the loss became {loss}")
                count, at.images = count + len(batch.targets), at.images + len(batch.targets)
                at.loss_sum += loss * len(batch.targets)
                bar.update(task, advance=1, note=f"loss {at.loss_sum / at.images:.3f}")
                if self.stopping:
                    self._check_weights()
                    self._save_state()
                    raise Interrupted(f"saved at epoch {at.epoch + 1}, step {at.step}")
        self._check_weights()
        return count

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
        seed = int(batch.offset.view(np.uint32).ravel()[0])
        share = np.random.default_rng(seed).beta(self.config.mixup, self.config.mixup)
        logits = self.net.logits(share * x + (1 - share) * x.flip(0))
        losses = [
            functional.cross_entropy(logits, t, label_smoothing=smoothing) for t in (targets, targets.flip(0))
        ]
        loss: Tensor = share * losses[0] + (1 - share) * losses[1]
        return loss

    def _finish_epoch(self, images_per_s: float) -> None:
        at, config = self.at, self.config
        loss = at.loss_sum / max(at.images, 1)
        at.epoch, at.step, at.loss_sum, at.images = at.epoch + 1, 0, 0.0, 0
        entry: dict[str, Any] = {
            "epoch": at.epoch,
            "loss": round(loss, 4),
            "images_per_s": round(images_per_s, 1),
        }
        last = at.epoch == config.epochs
        if last or at.epoch % config.validate_every == 0 or config.recipe == "paper":
            result = evaluate(self.net, self.validation, Crops.TEN if last else Crops.CENTER)
            entry |= {"crops": str(result.crops), "top1_error": round(result.top1_error, 4)}
            if not last:  # ten crops' error is lower: no improvement to compare with
                self._note_plateau(result.top1_error)
            self._save_checkpoint(entry)
        self._save_state()
        self.run.note(entry)
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
        training = asdict(self.config) | {"data": Path(self.config.data).name}  # names no one's folders
        facts = {"training": training, "last_epoch": entry, "torch": torch.__version__}
        folded = fold_batch_norm(self.net.eval())
        checkpoint.save(self.run.checkpoint, Checkpoint(folded, self.labels, facts))

    def _save_state(self) -> None:
        self.run.save_state(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "at": asdict(self.at),
                "architecture": asdict(self.net.architecture),
                "classes": self._classes,
            }
        )

    @property
    def _classes(self) -> list[str]:
        return [label.wnid for label in self.labels]

    def _check_weights(self) -> None:
        """A finite loss can have a gradient that is not; such weights must not replace good ones."""
        if not all(bool(tensor.isfinite().all()) for tensor in self.net.state_dict().values()):
            raise self._diverged("weights became infinite or NaN")

    def _diverged(self, what: str) -> TrainError:
        state = self.run.state
        left = f"the last good state is {state}" if state.exists() else "nothing was saved before"
        where = f"epoch {self.at.epoch + 1}, step {self.at.step}"
        return TrainError(f"{what} in {where}; lower the learning rate; {left}")

    def resume(self) -> None:
        """Take up the state of an earlier start of this run."""
        state, path = self.run.load_state(), self.run.state
        try:
            if state["architecture"] != asdict(self.net.architecture):
                raise TrainError(f"{path} holds {state['architecture']}, not {self.net.architecture}")
            if state.get("classes", self._classes) != self._classes:
                raise TrainError(f"{path} knows the classes {state['classes']}, not {self._classes}")
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            self.at = Progressed(**state["at"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainError(f"{path} is not the state of this run: {error!r}") from error
        self.say(f"resumed at epoch {self.at.epoch + 1}, step {self.at.step + 1}")


def start(config: TrainConfig, run: Path, *, resume: bool, say: Callable[[str], None] = print) -> Path:
    """Begin a run in the folder `run`, or go on with it; returns the path of its checkpoint.

    A run that goes on does so with the configuration it began with. Raises TrainError where
    there is nothing to go on with, or where beginning would overwrite another run.
    """
    folder = Run(run)
    if resume:
        trainer = Trainer(folder.begun_with(), run, say)
        trainer.resume()
        return trainer.train()
    folder.refuse_another()
    if config.precision == "auto":
        config = replace(config, precision=faster_precision())
    trainer = Trainer(config, run, say)
    folder.begin(config)
    return trainer.train()


def _progress() -> Progress:
    """A bar on the terminal's error stream; its tasks carry a `note`."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
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
