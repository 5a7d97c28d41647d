"""A run in memory: a Learner, its counters and history, epoch by epoch and on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from data_gen import (
    ImageStore,
    Split,
    steps_per_epoch,
    train_batches,
    valid_batches,
)
from distributed.collectives import all_gather_objects, any_rank, run_on_main
from distributed.data_parallel import broadcast_buffers
from distributed.process_group import is_main, rank, seed_per_rank, world_size
from fileio.checkpoint_file import save_checkpoint
from training.augment import build_augmentation
from training.checkpoints import (
    INCOMPATIBLE,
    random_states,
    save_last,
    set_random_states,
    set_torch_states,
    torch_states,
)
from training.engine import Learner
from training.event_log import EventLog, fsync_events
from training.resume import fingerprint
from training.schedule import learning_rate
from training.step_errors import (
    TrainingError,
    describe_out_of_memory,
    fixed_gpu_memory,
    gpu_memory,
    non_finite_error,
)
from utils import UserError, is_out_of_memory


class Step(NamedTuple):
    """What is kept of a step until it is logged; tensors stay on the device."""

    number: int  # in its epoch
    loss: Tensor
    accuracy: Tensor
    norm: Tensor  # of the gradient, before clipping
    random: dict[str, Any] | None  # the states before the step, None in a resumed run's old steps


class Trainer:
    """All that a run is - network, head, optimiser, counters, history - and its epochs."""

    def __init__(self, cfg: Config, store: ImageStore, faces: Split) -> None:
        self.cfg, self.store = cfg, store
        self.train_positions = store.good(faces.train)
        self.valid_positions = store.good(faces.valid)
        self.device = store.device
        self.learner = Learner(cfg, faces.num_classes, self.device)
        self.learner.width = store.width(cfg.batch_size)
        self.steps = steps_per_epoch(len(self.train_positions), cfg.batch_size)
        self.epoch = self.step = 0  # whole epochs done, and steps of the next one
        self.best: dict[str, float] = {}
        # train: (epoch, step, loss, accuracy, steps) a logged point; valid, lfw: one an epoch
        self.history: dict[str, list[tuple[float, ...]]] = {"train": [], "valid": [], "lfw": []}
        self.window: list[Step] = []  # steps since the last logged point
        self.fingerprint = fingerprint(store, self.train_positions, self.valid_positions)
        self.stop = False
        self.whole = True  # false within a step, where a part of the state is ahead of the rest
        self.saved_at, self.saved_step = time.monotonic(), (-1, -1)

    @property
    def global_step(self) -> int:
        """Steps since the beginning."""
        return self.epoch * self.steps + self.step

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, ...]:
        """One step of SGD; loss, accuracy and the gradient's norm, still on the device."""
        return self.learner.train_step(images, labels, lr, self.global_step)

    def train_one_epoch(self, writer: EventLog, run_dir: Path) -> tuple[float, float]:
        """The rest of the current epoch; returns the mean loss and accuracy of all of it.

        Losses stay on the device until a point is logged, so that the host does not wait for them.
        Raises KeyboardInterrupt after a whole step once `stop` is set, and TrainingError where a
        loss or a gradient is not finite or memory is full.
        """
        cfg = self.cfg
        self.learner.train()
        batches = train_batches(
            self.store,
            self.train_positions,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            epoch=self.epoch,
            first_step=self.step,
            flip=cfg.flip,
            augment=build_augmentation(cfg.augment, seed=cfg.seed, epoch=self.epoch),
        )
        title = f"epoch {self.epoch + 1}/{cfg.epochs}"
        fixed = fixed_gpu_memory(self.learner.optimizer, self.device)
        shown = {"desc": title, "unit": "step", "leave": False, "disable": not is_main()}
        with tqdm(total=self.steps, initial=self.step, **shown) as bar:
            began, first = time.perf_counter(), self.step
            for batch in batches:
                states, self.whole = torch_states(self.device), False
                try:
                    results = self.train_step(batch.images, batch.labels, self.learning_rate())
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise self.memory_error(error, fixed) from None
                self.window.append(Step(self.step, *results, states))
                self.step, self.whole = self.step + 1, True
                bar.update()
                if len(self.window) >= cfg.log_every or self.step == self.steps:
                    self.check_steps(run_dir)
                    seconds = time.perf_counter() - began
                    rate = (self.step - first) * cfg.batch_size / seconds
                    self.log(rate, writer, bar)
                    began, first = time.perf_counter(), self.step
                stop, due = any_rank(self.stop, is_main() and self.checkpoint_is_due())
                if stop or due:
                    self.save_last(run_dir, writer)
                if stop:
                    raise KeyboardInterrupt
        points = np.array([point for point in self.history["train"] if point[0] == self.epoch])
        loss, accuracy = np.average(points[:, 2:4], axis=0, weights=points[:, 4])
        return float(loss), float(accuracy)

    @contextlib.contextmanager
    def finishing_epoch(self, points: dict[str, list[tuple[float, ...]]]) -> Iterator[None]:
        """Go to the beginning of the next epoch; `points` are what this one adds to the history.

        If the block fails, the epoch is still open at its last step, to be finished again: a best
        epoch counts as one only once best.pt is written.
        """
        before = self.epoch, self.step, self.best, self.history
        names = {**self.history, **points}
        self.history = {n: self.history.get(n, []) + points.get(n, []) for n in names}
        self.epoch, self.step = self.epoch + 1, 0
        try:
            yield
        except BaseException:
            self.epoch, self.step, self.best, self.history = before
            raise

    def learning_rate(self, step: int | None = None) -> float:
        """The schedule's value for a step of this epoch, by default for the one at hand."""
        cfg = self.cfg
        return learning_rate(
            self.epoch + (self.step if step is None else step) / self.steps,
            lr=cfg.lr,
            epochs=cfg.epochs,
            schedule=cfg.schedule,
            milestones=cfg.milestones,
            poly_power=cfg.poly_power,
            warmup_epochs=cfg.warmup_epochs,
        )

    def log(self, rate: float, writer: EventLog, bar: tqdm) -> None:
        """Write one point for the last steps to the history, TensorBoard and the progress bar."""
        loss = float(torch.stack([step.loss for step in self.window]).mean())
        accuracy = float(torch.stack([step.accuracy for step in self.window]).mean())
        lr = self.learning_rate(self.window[-1].number)
        self.history["train"].append((self.epoch, self.step, loss, accuracy, len(self.window)))
        self.window = []
        scalars = {"train/loss": loss, "train/accuracy": accuracy}
        scalars |= {"train/lr": lr, "perf/images_per_s": rate}
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, self.global_step)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2%}, {rate:,.0f} images/s")

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss (with the margin) and accuracy (without) on the held-out images."""
        broadcast_buffers(self.learner.model)
        self.learner.train(False)
        total_loss = total_right = count = 0.0
        batch_size = self.cfg.eval_batch
        for batch in valid_batches(self.store, self.valid_positions, batch_size=batch_size):
            width = -(-batch_size // world_size())
            found = self.learner.loss(batch.images, batch.labels, width)
            total_loss += float(found.loss) * int(found.count)
            total_right += float(found.num_correct)
            count += int(found.count)  # without a cache, damaged images are left out only here
        return total_loss / max(count, 1), total_right / max(count, 1)

    # -------------------------------------------------------------------------- going wrong

    def check_steps(self, run_dir: Path) -> None:
        """Raise TrainingError at the first step since the last point that was not finite.

        Its batch goes into run_dir/bad_batch.pt; what it and later steps did is in no checkpoint.
        """
        if not self.window:
            return
        found = torch.stack([torch.stack([step.loss, step.norm]) for step in self.window]).cpu()
        bad = (~found.isfinite().all(1)).nonzero()
        if not len(bad):
            return
        self.whole = False
        step, (loss, norm) = self.window[int(bad[0])], found[int(bad[0])].tolist()
        run_on_main(lambda: self.refuse(step, loss, norm, run_dir / "bad_batch.pt"))

    def refuse(self, step: Step, loss: float, norm: float, path: Path) -> None:
        """Raise TrainingError for a step; its batch goes into `path`."""
        positions, flips = self.store.whole_batch(
            self.train_positions, self.cfg.batch_size, self.cfg.seed, self.epoch, step.number
        )
        raise non_finite_error(
            path,
            self.store,
            positions,
            flips & self.cfg.flip,
            {
                **{"loss": loss, "gradient_norm": norm, "lr": self.learning_rate(step.number)},
                **{"scale": self.cfg.margin_s, "epoch": self.epoch, "step": step.number},
                **{"steps": self.steps, "random": step.random},
            },
            build_augmentation(self.cfg.augment, seed=self.cfg.seed, epoch=self.epoch),
        )

    def memory_error(self, error: BaseException, fixed: int) -> TrainingError:
        """What to say of a step for which memory did not suffice."""
        why = describe_out_of_memory(
            error,
            batch=self.cfg.batch_size,
            flag="--batch-size",
            fixed=fixed,
            memory=gpu_memory(self.device),
        )
        on_gpu = self.store.images is not None and self.store.images.device.type == "cuda"
        free = "memory has been freed" + " (--cache ram frees some)" * on_gpu
        return TrainingError(
            f"At epoch {self.epoch + 1}, step {self.step + 1} of {self.steps} {why}. last.pt goes "
            f"on with --resume once {free}; another batch size is a new run."
        )

    # -------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All of it as a dict for save_checkpoint, in rank 0; every process must call it."""
        config = dataclasses.asdict(self.cfg)
        window = [torch.stack([s.loss, s.accuracy, s.norm]) for s in self.window]
        return {
            # How it was called is no part of the run.
            "config": {k: v for k, v in config.items() if k not in ("given", "resume")},
            "num_classes": self.learner.num_classes,
            "pictures": self.fingerprint,
            "precision": self.learner.precision,
            "processes": world_size(),
            **self.learner.state(),
            "epoch": self.epoch,
            "step": self.step,
            "steps": self.steps,
            "best": self.best,
            "history": self.history,
            "window": torch.stack(window) if window else torch.zeros(0, 3),
            "random": random_states(self.device),
            "random_of_others": all_gather_objects(torch_states(self.device))[1:],
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def load(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Go back to a saved state; raises UserError where it does not fit the training set."""
        if checkpoint["num_classes"] != self.learner.num_classes:
            raise UserError(
                f"{path} was trained on {checkpoint['num_classes']} identities, the training set "
                f"has {self.learner.num_classes}; give the set it was trained on (--train-set)."
            )
        if checkpoint["pictures"] != self.fingerprint:
            raise UserError(
                f"{path} was trained on other images than {self.store.reader.path} holds now "
                "(their ids, labels, split or the file's size differ); give the set it was "
                "trained on (--train-set), with the --cache it had if images are damaged."
            )
        try:
            self.learner.load(checkpoint, path)
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.best, self.history = checkpoint["best"], checkpoint["history"]
            if checkpoint["steps"] != self.steps:
                raise ValueError(f"{checkpoint['steps']} steps an epoch, not {self.steps}")
            window = checkpoint["window"].to(self.device).unbind()
            first = self.step - len(window)
            self.window = [Step(first + i, *row.unbind(), None) for i, row in enumerate(window)]
            set_random_states(checkpoint["random"], self.device)
            others = checkpoint.get("random_of_others", [])
            seed_per_rank(self.cfg.seed, self.global_step)
            if 0 < rank() <= len(others):
                set_torch_states(others[rank() - 1], self.device)
        except INCOMPATIBLE as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{path} is no state of this run ({reason}); give another.") from None
        processes = checkpoint.get("processes", 1)
        before = f"{checkpoint['precision']}" + f", {processes} processes" * (processes > 1)
        now = f"{self.learner.precision}" + f", {world_size()} processes" * (world_size() > 1)
        if before != now:
            print(
                f"{path} comes from a run in {before}; it goes on in {now}, so its numbers may "
                "differ in their last digits."
            )

    def check_weights(self, path: Path) -> None:
        """Raise TrainingError if the weights, or batch normalisation's means, are no numbers."""
        if not self.learner.is_finite():
            raise TrainingError(
                f"Weights are not finite at epoch {self.epoch}, step {self.step}; {path} stays "
                "as it is. Start a new run with a lower --lr, --warmup-epochs or --clip-norm."
            )

    def save(self, path: Path) -> None:
        """Write a checkpoint, unless the weights are no numbers any more (TrainingError)."""
        self.check_weights(path)
        state = self.state()
        run_on_main(lambda: save_checkpoint(path, state))

    def save_last(self, run_dir: Path, writer: EventLog) -> None:
        """Write last.pt, with all that it has logged on disk before it; once a step."""
        if self.saved_step == (self.epoch, self.step):
            return
        self.check_steps(run_dir)
        self.check_weights(run_dir / "last.pt")
        state = self.state()

        def write() -> None:
            writer.flush()
            fsync_events(run_dir)
            save_last(run_dir, state)

        run_on_main(write)
        self.saved_at = time.monotonic()
        self.saved_step = (self.epoch, self.step)

    def checkpoint_is_due(self) -> bool:
        """Whether --checkpoint-steps or --checkpoint-minutes asks for one after this step."""
        cfg = self.cfg
        if cfg.checkpoint_steps and self.global_step % cfg.checkpoint_steps == 0:
            return True
        minutes = (time.monotonic() - self.saved_at) / 60
        return 0 < cfg.checkpoint_minutes <= minutes
