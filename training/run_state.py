"""The state of a run: its counters, its history, and what a checkpoint of it holds.

Between two steps the state is complete: a run that loads it comes to exactly the same numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_gen import ImageStore, Split, steps_per_epoch
from distributed.collectives import all_gather_objects, run_on_main
from distributed.process_group import rank, seed_per_rank, world_size
from fileio.checkpoint_file import save_checkpoint
from training.checkpoints import (
    INCOMPATIBLE,
    random_states,
    set_random_states,
    set_torch_random_states,
    torch_random_states,
)
from training.engine import Engine, StepResult
from training.step_errors import TrainingError
from utils import UserError

# Points of the history: (epoch, number, ...) each; resume.POINTS has how many numbers.
Points = list[tuple[float, ...]]


class StepRecord(NamedTuple):
    """A step that is not logged yet; tensors stay on the device."""

    number: int  # within its epoch
    result: StepResult
    random: dict[str, Any] | None  # the random states before it; None if loaded from a checkpoint


@dataclasses.dataclass(kw_only=True)
class RunState:
    """How far a run is, and what it has become."""

    engine: Engine
    store: ImageStore
    split: Split
    folder: Path
    settings: dict[str, Any]  # those of train.py, stored in checkpoints
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.device = self.engine.device
        self.train_positions = self.store.readable(self.split.train)
        self.valid_positions = self.store.readable(self.split.valid)
        self.steps = steps_per_epoch(len(self.train_positions), self.batch_size)
        self.fingerprint = self.store.fingerprint(self.train_positions, self.valid_positions)
        self.epoch = self.step = 0  # finished epochs, and finished steps of the current one
        self.best: dict[str, float] = {}  # epoch, accuracy and loss of best.pt
        # train: (epoch, step, loss, accuracy, steps) per logged point; valid, lfw: one per epoch
        self.history: dict[str, Points] = {"train": [], "valid": [], "lfw": []}
        self.window: list[StepRecord] = []  # steps since the last logged point

    @property
    def global_step(self) -> int:
        """Finished steps since the beginning."""
        return self.epoch * self.steps + self.step

    def window_results(self) -> Tensor:
        """(steps, 3): loss, accuracy and gradient norm of the steps that are not logged yet."""
        rows = [torch.stack(step.result) for step in self.window]
        return torch.stack(rows) if rows else torch.zeros(0, 3)

    @contextlib.contextmanager
    def finishing_epoch(self, points: dict[str, Points]) -> Iterator[None]:
        """Go to the beginning of the next epoch; `points` are added to the history.

        If the block fails, the epoch is open again, at its last step: an epoch counts as finished,
        and as the best, only once the block has written best.pt.
        """
        before = self.epoch, self.step, self.best, self.history
        keys = {**self.history, **points}
        self.history = {k: self.history.get(k, []) + points.get(k, []) for k in keys}
        self.epoch, self.step = self.epoch + 1, 0
        try:
            yield
        except BaseException:
            self.epoch, self.step, self.best, self.history = before
            raise

    def update_best(self, loss: float, accuracy: float) -> bool:
        """Whether the epoch just finished is the best so far; if so, it is noted as such."""
        best = self.best
        if best and (accuracy, -loss) <= (best["accuracy"], -best["loss"]):
            return False
        self.best = {"epoch": self.epoch, "accuracy": accuracy, "loss": loss}
        return True

    # -------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The whole run for save_checkpoint, complete in rank 0; every process must call it."""
        return {
            "config": self.settings,
            "num_classes": self.split.num_classes,
            "pictures": self.fingerprint,  # the name that the first version gave it
            "precision": self.engine.precision,
            "processes": world_size(),
            **self.engine.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "best": self.best,
            "history": self.history,
            "window": self.window_results(),
            "random": random_states(self.device),
            "random_of_others": all_gather_objects(torch_random_states(self.device))[1:],
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def load_state_dict(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Go back to a saved state; UserError if it does not fit the training set or this run."""
        self._check_training_set(checkpoint, path)
        try:
            self.engine.load_state_dict(checkpoint, path)
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.best, self.history = checkpoint["best"], checkpoint["history"]
            if checkpoint["steps"] != self.steps:
                raise ValueError(f"{checkpoint['steps']} steps per epoch, not {self.steps}")
            first = self.step - len(checkpoint["window"])
            rows = enumerate(checkpoint["window"].to(self.device), first)
            self.window = [StepRecord(n, StepResult(*row.unbind()), None) for n, row in rows]
            self._load_random_states(checkpoint)
        except INCOMPATIBLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{path} is not a state of this run ({reason}); give another."
            ) from None
        before = _describe_precision(checkpoint["precision"], checkpoint.get("processes", 1))
        now = _describe_precision(self.engine.precision, world_size())
        if before != now:
            print(
                f"{path} was computed in {before}; the run continues in {now}, so its numbers may "
                "differ in their last digits."
            )

    def _check_training_set(self, checkpoint: dict[str, Any], path: Path) -> None:
        num_classes = self.split.num_classes
        if checkpoint["num_classes"] != num_classes:
            raise UserError(
                f"{path} was trained on {checkpoint['num_classes']} identities, the training set "
                f"has {num_classes}; give the set it was trained on (--train-set)."
            )
        if checkpoint["pictures"] != self.fingerprint:
            raise UserError(
                f"{path} was trained on other images than {self.store.reader.path} holds now "
                "(their ids, labels, split or the file's size differ); give the set it was "
                "trained on (--train-set), with the --cache it had if images are corrupt."
            )

    def _load_random_states(self, checkpoint: dict[str, Any]) -> None:
        """Rank 0's states, then each other rank's own; new ranks start from the seed."""
        set_random_states(checkpoint["random"], self.device)
        seed_per_rank(self.seed, self.global_step)
        others = checkpoint.get("random_of_others", [])
        if 0 < rank() <= len(others):
            set_torch_random_states(others[rank() - 1], self.device)

    def check_weights(self, path: Path) -> None:
        """Raise TrainingError if weights or batch normalisation's statistics are not finite."""
        if not self.engine.is_finite():
            raise TrainingError(
                f"Weights are not finite at epoch {self.epoch}, step {self.step}; {path} stays "
                "as it is. Start a new run with a lower --lr, --warmup-epochs or --clip-norm."
            )

    def save(self, name: str) -> None:
        """Write a checkpoint into the run's folder; TrainingError if weights are not finite."""
        path = self.folder / name
        self.check_weights(path)
        state = self.state_dict()
        run_on_main(lambda: save_checkpoint(path, state))


def _describe_precision(precision: str, processes: int) -> str:
    return precision if processes == 1 else f"{precision}, {processes} processes"
