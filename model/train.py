"""Training: folder -> decode -> augment -> net -> checkpoint.

    alexnet train DATA --run runs/sample
    alexnet train DATA --run runs/sample --resume
    torchrun --nproc-per-node 8 -m -- alexnet train DATA --run runs/sample

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
from typing import Any, Final

import torch

from model import checkpoint
from model.checkpoint import Checkpoint
from model.config import TrainConfig, TrainError
from model.data import (
    PAPER_AUGMENTATION,
    Augmentation,
    Batch,
    Decoded,
    epoch_order,
    prefetched,
    training_batch,
)
from model.distributed import World, joined
from model.evaluate import tally, torch_predictor
from model.fold import fold_batch_norm
from model.images import Images, labels_of, open_split
from model.journal import Journal
from model.learner import Learner
from model.machine import faster_precision, memory_bytes
from model.net import AlexNet
from model.progress import Pace, bar
from model.run import Run
from model.transfer import take_over
from serving.contract import Crops
from serving.postprocess import Label

DATA_SHARE_OF_MEMORY: Final = 0.4
"""A split is decoded once and kept where it takes no more than this share of the memory: 196 kB an image."""


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

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        say: Callable[[str], None] = print,
        world: World | None = None,
        *,
        tensorboard: bool = False,
    ) -> None:
        self.config, self.run = config, Run(run)
        self.world = world or World()
        self.say: Callable[[str], None] = say if self.world.first else lambda _: None
        self.journal = Journal(self.run, tensorboard=tensorboard) if self.world.first else None
        if config.threads:
            torch.set_num_threads(config.threads)
        folder = open_split(config.data, "train")
        if len(folder.classes) < 2:
            raise TrainError(f"{config.data}/train holds one class, {folder.classes[0]}; it takes two")
        if min(config.batch_size, len(folder)) < 2 * self.world.size:
            raise TrainError(
                f"batches of {min(config.batch_size, len(folder))} images are too small for "
                f"{self.world.size} processes, which take two each at least"
            )
        validation = open_split(config.data, "val", folder.classes)
        self.labels: list[Label] = labels_of(folder.classes)
        self.data = self._decode(folder, "decoding train")
        self.validation = self._decode(validation.only(self.world.rows(len(validation))), "decoding val")
        self.learner = Learner(config, len(folder.classes), self.world)
        self.augmentation = PAPER_AUGMENTATION if config.recipe == "paper" else Augmentation(config.crop_min)
        self.at = Progressed()
        self.stopping = False

    @property
    def net(self) -> AlexNet:
        return self.learner.net

    def _decode(self, images: Images, title: str) -> Decoded:
        """In memory where a share of this machine's has room, else from its files each time."""
        room = DATA_SHARE_OF_MEMORY * memory_bytes() / self.world.local_size
        with bar(title, len(images), show=self.world.first) as advance:
            return Decoded.read(images, self._workers, lambda: advance(""), room)

    @property
    def _workers(self) -> int:
        """Threads that decode: this machine's cores, shared with its other processes."""
        return max(1, (os.cpu_count() or 1) // self.world.local_size)

    def train(self) -> Path:
        """Run to the last epoch; returns the path of the checkpoint."""
        try:
            with _signals(self._stop):
                while self.at.epoch < self.config.epochs:
                    self._finish_epoch(self._epoch())
        finally:
            if self.journal:
                self.journal.close()
        return self.run.checkpoint

    def _stop(self) -> None:
        self.stopping = True

    def _epoch(self) -> Pace:
        """The rest of the current epoch; how fast that went."""
        config, at = self.config, self.at
        self.net.train()
        batches = epoch_order(len(self.data.targets), config.batch_size, config.seed, at.epoch)
        size, pace = config.size_at(at.epoch), Pace(self._remaining_pixels(batches))
        jobs = [partial(self._batch, rows, size, step) for step, rows in enumerate(batches)][at.step :]
        title = f"epoch {at.epoch + 1}/{config.epochs} at {size}"
        with bar(title, len(batches), at.step, show=self.world.first) as advance:
            for batch in pace.waiting(prefetched(jobs, *self._ahead)):
                progress = (at.epoch + at.step / len(batches)) / config.epochs
                rate = config.rate_at(progress, at.plateaus)
                loss = self.learner.step(batch, rate)
                # One signal stops all, and after the same step.
                loss, stopping = self.world.sums([loss, self.stopping]).tolist()
                at.step += 1
                if not math.isfinite(loss):
                    raise self._diverged(f"the loss became {loss}")
                at.images, at.loss_sum = at.images + batch.count, at.loss_sum + loss
                pace.add(batch.count, size)
                advance(self._note(pace))
                if self.journal:
                    step = at.epoch * len(batches) + at.step
                    self.journal.step(step, loss=loss / batch.count, learning_rate=rate)
                if stopping:
                    self._check_weights()
                    self._save_state()
                    raise Interrupted(f"saved at epoch {at.epoch + 1}, step {at.step}")
        self._check_weights()
        return pace

    def _batch(self, rows: Any, size: int, step: int) -> Batch:
        seed = (self.config.seed, self.at.epoch, step)
        positions = self.world.share(len(rows))
        on_host = self.world.device.type == "cpu"
        started = time.perf_counter()
        batch = training_batch(self.data, self.augmentation, rows, size, seed, positions, cut=on_host)
        return replace(batch, seconds=time.perf_counter() - started)

    @property
    def _ahead(self) -> tuple[int, int]:
        """Batches made ahead, and threads that make them: cutting is little work, decoding is much."""
        return (4, 1) if self.data.in_memory else (2 + self._workers, self._workers)

    @property
    def _steps(self) -> int:
        """Of an epoch."""
        return len(epoch_order(len(self.data.targets), self.config.batch_size, 0, 0))

    def _remaining_pixels(self, batches: list[Any]) -> float:
        """Of all views from here to the end of the run."""
        config, at = self.config, self.at
        whole = sum(map(len, batches))
        done = sum(map(len, batches[: at.step])) * config.size_at(at.epoch) ** 2
        return whole * sum(config.size_at(epoch) ** 2 for epoch in range(at.epoch, config.epochs)) - done

    def _note(self, pace: Pace) -> str:
        """`loss 1.234  error 34.5 %  58 images/s  run ends in 1:23:45`."""
        at = self.at
        error = f"  error {100 * at.best_error:.1f} %" if at.best_error < 1 else ""
        loss = f"loss {at.loss_sum / at.images:.3f}"
        return f"{loss}{error}  {pace.images_per_s:.0f} images/s  run ends in {pace.remaining}"

    def _finish_epoch(self, pace: Pace) -> None:
        at, config = self.at, self.config
        loss = at.loss_sum / max(at.images, 1)
        at.epoch, at.step, at.loss_sum, at.images = at.epoch + 1, 0, 0.0, 0
        entry: dict[str, Any] = {
            "epoch": at.epoch,
            "loss": round(loss, 4),
            "images_per_s": round(pace.images_per_s, 1),
            "loader_images_per_s": round(pace.loader_images_per_s(self._ahead[1]) * self.world.size, 1),
            "waited": round(pace.waited, 4),
        }
        last = at.epoch == config.epochs
        if last or at.epoch % config.validate_every == 0 or config.recipe == "paper":
            entry |= self._validate(Crops.TEN if last else Crops.CENTER)
            if not last:  # ten crops' error is lower: no improvement to compare with
                self._note_plateau(entry["top1_error"])
            self._save_checkpoint(entry)
        self._save_state()
        if self.journal:
            self.journal.epoch(entry, at.epoch * self._steps)
        self.say(" ".join(f"{name}={value}" for name, value in entry.items()))

    def _validate(self, crops: Crops) -> dict[str, Any]:
        """Every image of the split once, whichever process has it."""
        counted = tally(torch_predictor(self.net), self.validation, crops)
        result = counted.over(self.world.sums).evaluation(crops)
        return {"crops": str(crops), "top1_error": round(result.top1_error, 4)}

    def _note_plateau(self, error: float) -> None:
        """The paper divides the rate by 10 when the validation error stops improving."""
        if error < self.at.best_error:
            self.at.best_error, self.at.stale = error, 0
            return
        self.at.stale += 1
        if self.at.stale >= 3:
            self.at.plateaus, self.at.stale = self.at.plateaus + 1, 0

    def _save_checkpoint(self, entry: dict[str, Any]) -> None:
        if not self.world.first:
            return
        names = {"data": Path(self.config.data).name, "init": Path(self.config.init).name}
        training = asdict(self.config) | names  # names no one's folders
        facts = {"training": training, "last_epoch": entry, "torch": torch.__version__}
        folded = fold_batch_norm(self.net.eval())
        checkpoint.save(self.run.checkpoint, Checkpoint(folded, self.labels, facts))

    def _save_state(self) -> None:
        if not self.world.first:
            return
        self.run.save_state(
            {
                "net": self.net.state_dict(),
                "optimizer": self.learner.optimizer.state_dict(),
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

    def start_from(self, source: Checkpoint) -> None:
        """Take the weights of another network, but for the classes that it does not know."""
        kept = take_over(self.net, self.labels, source)
        fresh = len(self.labels) - kept
        self.say(f"started from {self.config.init}: {kept} classes known, {fresh} new")

    def resume(self) -> None:
        """Take up the state of an earlier start of this run, by however many processes."""
        state, path = self.run.load_state(), self.run.state
        try:
            if state["architecture"] != asdict(self.net.architecture):
                raise TrainError(f"{path} holds {state['architecture']}, not {self.net.architecture}")
            if state.get("classes", self._classes) != self._classes:
                raise TrainError(f"{path} knows the classes {state['classes']}, not {self._classes}")
            self.net.load_state_dict(state["net"])
            self.learner.optimizer.load_state_dict(state["optimizer"])
            self.at = Progressed(**state["at"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TrainError(f"{path} is not the state of this run: {error!r}") from error
        self.say(f"resumed at epoch {self.at.epoch + 1}, step {self.at.step + 1}")


def start(
    config: TrainConfig,
    run: Path,
    *,
    resume: bool,
    say: Callable[[str], None] = print,
    tensorboard: bool = False,
) -> Path:
    """Begin a run in the folder `run`, or go on with it; returns the path of its checkpoint.

    A run that goes on does so with the configuration it began with. Raises TrainError where
    there is nothing to go on with, or where beginning would overwrite another run.
    """
    folder = Run(run)
    with joined() as world:
        if resume:
            trainer = Trainer(world.agreed(folder.begun_with), run, say, world, tensorboard=tensorboard)
            trainer.resume()
            return trainer.train()
        world.agreed(folder.refuse_another)
        source = checkpoint.load(Path(config.init)) if config.init else None
        if source is not None:
            config = config.starting_from(source.net.architecture)
        if config.precision == "auto":
            config = replace(config, precision=world.agreed(faster_precision))
        trainer = Trainer(config, run, say, world, tensorboard=tensorboard)
        if source is not None:
            trainer.start_from(source)
        del source
        world.agreed(partial(folder.begin, config, world.size))
        return trainer.train()


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
