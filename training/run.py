"""A run of train.py: its epochs, step by step, with logging and last.pt on the way.

    run = Run(engine=engine, store=store, split=split, folder=folder, settings=settings, ...)
    loss, accuracy = run.train_one_epoch(log)

The state of the run, with its counters, its history and its checkpoints, is in run_state.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data_gen import Batch, train_batches, valid_batches
from distributed.collectives import any_rank, run_on_main
from distributed.process_group import is_main, world_size
from evaluation.embedders import in_batches_that_fit
from training.augment import build_augmentation
from training.checkpoints import save_last, torch_random_states
from training.engine import StepResult
from training.event_log import EventLog, fsync_events
from training.gpu_memory import advise_on_memory, free_gpu_memory, measure_step_memory
from training.run_state import RunState, StepRecord
from training.step_errors import TrainingError, bad_step, describe_out_of_memory, non_finite_error
from utils import is_out_of_memory


@dataclasses.dataclass(kw_only=True)
class Run(RunState):
    """What is trained, with which settings, and how far it is."""

    epochs: int
    learning_rate_at: Callable[[float], float]  # by epoch: 2.5 is the middle of the third
    flip: bool = True
    augment: str = "none"
    eval_batch: int = 256
    log_every: int = 20  # steps
    # (steps, minutes) between two last.pt; where both are 0, the end of epochs only
    checkpoint_every: tuple[int, float] = (0, 15.0)
    frozen_epochs: float = 0  # of them, at the beginning, train the head alone

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop_requested = False
        self.is_mid_step = False  # then a part of the state is ahead of the rest
        self.saved_at, self.saved_step = time.monotonic(), (-1, -1)

    def request_stop(self) -> None:
        """Have the run stop and save after the current step."""
        self.stop_requested = True

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step of the current epoch."""
        return self.learning_rate_at(self.epoch + step / self.steps)

    # -------------------------------------------------------------------------- an epoch

    def train_one_epoch(self, log: EventLog) -> tuple[float, float]:
        """Train to the end of the current epoch; returns the mean loss and accuracy of all of it.

        Losses stay on the device until a point is logged, so that the host does not wait for them.
        Raises KeyboardInterrupt after a finished step if a stop is requested, and TrainingError if
        a loss or a gradient is not finite or memory is full.
        """
        self.engine.freeze(self.epoch < self.frozen_epochs)
        self.engine.train()
        options = {"unit": "step", "leave": False, "disable": not is_main()}
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        bar = tqdm(total=self.steps, initial=self.step, desc=title, **options)
        with bar, contextlib.closing(self._batches()) as batches:
            start, first = time.perf_counter(), self.step
            for batch in batches:
                self._run_step(batch)
                bar.update()
                # All decide alike; and notice one that has ended, for which the device would wait.
                is_due = is_main() and self.checkpoint_is_due()
                stop, save = any_rank(self.stop_requested, is_due)
                if len(self.window) >= self.log_every or self.step == self.steps:
                    self.check_finite()
                    seconds = time.perf_counter() - start
                    self._log_point((self.step - first) * self.batch_size / seconds, log, bar)
                    start, first = time.perf_counter(), self.step
                if stop or save:
                    self.save_last(log)
                if stop:
                    raise KeyboardInterrupt
        points = np.array([point for point in self.history["train"] if point[0] == self.epoch])
        loss, accuracy = np.average(points[:, 2:4], axis=0, weights=points[:, 4])
        return float(loss), float(accuracy)

    def _batches(self) -> Iterator[Batch]:
        """The batches of the current epoch that are not done yet."""
        return train_batches(
            self.store,
            self.train_positions,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            first_step=self.step,
            flip=self.flip,
            augment=build_augmentation(self.augment, seed=self.seed, epoch=self.epoch),
        )

    def _run_step(self, batch: Batch) -> None:
        """One step, and its record."""
        random = torch_random_states(self.device)
        self.is_mid_step = True
        result, reason = None, ""
        try:
            lr = self.learning_rate(self.step)
            result = self.train_step(batch.images, batch.labels, lr)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = describe_out_of_memory(error, free_gpu_memory(self.device))
        if result is None:  # not in the except clause: the error keeps the step's tensors alive
            raise self._memory_error(reason)
        self.window.append(StepRecord(self.step, result, random))
        self.step += 1
        self.is_mid_step = False

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> StepResult:
        """One step of SGD on (n, 3, 112, 112) images and labels (n,); see Engine.train_step."""
        return self.engine.train_step(images, labels, lr, self.global_step)

    def _log_point(self, rate: float, log: EventLog, bar: tqdm) -> None:
        """Add the mean of the window to the history, TensorBoard and the progress bar."""
        loss, accuracy, _ = self.window_results().mean(0).tolist()
        lr = self.learning_rate(self.window[-1].number)
        self.history["train"].append((self.epoch, self.step, loss, accuracy, len(self.window)))
        self.window = []
        scalars = {"train/loss": loss, "train/accuracy": accuracy}
        scalars |= {"train/lr": lr, "perf/images_per_s": rate}
        if (scaler := self.engine.scaler).is_enabled():
            scalars["train/loss_scale"] = scaler.loss_scale
            scalars["train/skipped_steps"] = scaler.skipped_steps
        for tag, value in scalars.items():
            log.add_scalar(tag, value, self.global_step)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2%}, {rate:,.0f} images/s")

    def validate(self) -> tuple[float, float]:
        """Mean loss (with the margin) and accuracy (without) on the held-out images."""

        def evaluate(size: int) -> tuple[float, float]:
            batches = valid_batches(self.store, self.valid_positions, batch_size=size)
            with contextlib.closing(batches):
                return self.engine.evaluate(batches, -(-size // world_size()))

        if world_size() > 1:  # a smaller batch would have to be one for all
            return evaluate(self.eval_batch)
        return in_batches_that_fit(evaluate, self.eval_batch)

    # -------------------------------------------------------------------------- errors

    def check_finite(self) -> None:
        """Raise TrainingError if a step in the window ends the run: see bad_step.

        Its batch goes into bad_batch.pt; what it and later steps changed is in no checkpoint.
        """
        results = self.window_results().cpu()
        index = bad_step(results, self.engine.scaler.loss_scale)
        if index is not None:
            self.is_mid_step = True
            step, (loss, _, norm) = self.window[index], results[index].tolist()
            run_on_main(lambda: self._raise_non_finite(step, loss, norm))

    def _raise_non_finite(self, step: StepRecord, loss: float, gradient_norm: float) -> None:
        positions, mirrored = self.store.global_batch(
            self.train_positions, self.batch_size, self.seed, self.epoch, step.number
        )
        details = {"loss": loss, "gradient_norm": gradient_norm, "random": step.random}
        details |= {"lr": self.learning_rate(step.number), "scale": self.settings["margin_s"]}
        details |= {"epoch": self.epoch, "step": step.number, "steps": self.steps}
        details |= {"loss_scale": self.engine.scaler.loss_scale}
        augment = build_augmentation(self.augment, seed=self.seed, epoch=self.epoch)
        path = self.folder / "bad_batch.pt"
        mirrored = mirrored & self.flip
        raise non_finite_error(path, self.store, positions, mirrored, details, augment)

    def _memory_error(self, reason: str) -> TrainingError:
        """What to say of a step for which memory did not suffice."""
        advice = advise_on_memory(
            measure_step_memory(self.engine) if world_size() == 1 else None,
            batch_size=self.batch_size,
            accumulate=self.engine.accumulate,
            lr=self.settings["lr"],
            checkpointing=self.settings["checkpoint_activations"],
        )
        hint = " (--cache ram frees some)" if self.store.cache == "gpu" else ""
        return TrainingError(
            f"At epoch {self.epoch + 1}, step {self.step + 1} of {self.steps} {reason}. {advice} "
            f"Once memory has been freed{hint}, --resume continues from last.pt; another "
            "--accumulate or batch size is a new run."
        )

    # -------------------------------------------------------------------------- checkpoints

    def save_last(self, log: EventLog) -> None:
        """Write last.pt, once all that it has logged is on disk; no more than once per step."""
        if self.saved_step == (self.epoch, self.step):
            return
        self.check_finite()
        self.check_weights(self.folder / "last.pt")
        state = self.state_dict()

        def write() -> None:
            log.flush()
            fsync_events(self.folder)
            save_last(self.folder, state)

        run_on_main(write)
        self.saved_at = time.monotonic()
        self.saved_step = (self.epoch, self.step)

    def checkpoint_is_due(self) -> bool:
        """Whether --checkpoint-every asks for one after this step."""
        steps, minutes = self.checkpoint_every
        if steps:
            return self.global_step % steps == 0
        return 0 < minutes <= (time.monotonic() - self.saved_at) / 60
