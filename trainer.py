"""What a training step changes - network, head, optimiser, counters, history - and the step."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import Config
from data_gen import ImageStore, Split, steps_per_epoch, train_batches, valid_batches
from focal_loss import FocalLoss
from models import ArcMarginModel, build_model
from utils import UserError, has_bfloat16, save_checkpoint


def learning_rate(
    epoch: float,
    *,
    lr: float,
    epochs: int,
    schedule: str = "step",
    milestones: tuple[int, ...] = (),
    poly_power: float = 2.0,
    warmup_epochs: float = 0.0,
) -> float:
    """The learning rate at a moment of training, in epochs (2.5: the middle of the third).

    It rises from zero over `warmup_epochs`; then "step" divides it by ten at each milestone,
    "cosine" and "poly" take it to zero at the end.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "step":
        return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    rest = 1 - (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    rest = min(max(rest, 0.0), 1.0)
    if schedule == "cosine":
        return lr * (1 - math.cos(math.pi * rest)) / 2
    return lr * rest**poly_power


class TrainingError(UserError):
    """Training went wrong in a way that going on would not mend."""


class Trainer:
    """All that a step changes - network, head, optimiser, counters, history - and the steps."""

    def __init__(self, cfg: Config, store: ImageStore, faces: Split) -> None:
        self.cfg, self.store = cfg, store
        self.train_positions = store.good(faces.train)
        self.valid_positions = store.good(faces.valid)
        self.device = store.device
        try:
            model = build_model(cfg.network, cfg.emb_size, cfg.dropout, cfg.use_se)
        except ValueError as error:  # a combination of knobs that no network has
            raise UserError(str(error)) from None
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.head = ArcMarginModel(
            cfg.emb_size, faces.num_classes, cfg.margin_s, cfg.margin_m, cfg.easy_margin
        ).to(self.device)
        self.forward = torch.compile(self.model) if cfg.compile == "on" else self.model
        self.criterion = FocalLoss(cfg.gamma) if cfg.focal_loss else nn.CrossEntropyLoss()
        modules = (self.model, self.head)
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=cfg.lr,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.amp = cfg.amp and has_bfloat16(self.device)
        self.steps = steps_per_epoch(len(self.train_positions), cfg.batch_size)
        self.epoch = self.step = 0  # whole epochs done, and steps of the next one
        self.best: dict[str, float] = {}
        # train: (epoch, step, loss, accuracy, steps) a logged point; valid, lfw: one an epoch
        self.history: dict[str, list[tuple[float, ...]]] = {"train": [], "valid": [], "lfw": []}
        self.stop = False

    @property
    def global_step(self) -> int:
        """Steps since the beginning."""
        return self.epoch * self.steps + self.step

    def logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits with the margin (n, num_classes), and who is right without it (n,) bool."""
        # Batches of validation vary in size, and each size would be compiled anew.
        forward = self.forward if self.model.training else self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            embedding = forward(images)
        cosine = self.head.cosine(embedding)
        right = cosine.detach().argmax(1) == labels
        return self.head.margin(cosine, labels), right

    def train_step(self, images: Tensor, labels: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One step of SGD; the loss and the accuracy, still on the device."""
        logits, right = self.logits(images, labels)
        loss = self.criterion(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.cfg.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.detach(), right.float().mean()

    def train_one_epoch(self, writer: SummaryWriter) -> tuple[float, float]:
        """The rest of the current epoch; returns the mean loss and accuracy of all of it.

        Losses stay on the device until a point is logged, so that the host does not wait for them.
        Raises KeyboardInterrupt after a whole step once `stop` is set, TrainingError where a loss
        is not finite.
        """
        cfg = self.cfg
        self.model.train()
        batches = train_batches(
            self.store,
            self.train_positions,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            epoch=self.epoch,
            first_step=self.step,
            flip=cfg.flip,
        )
        title = f"epoch {self.epoch + 1}/{cfg.epochs}"
        with tqdm(total=self.steps, initial=self.step, desc=title, unit="step", leave=False) as bar:
            window: list[tuple[int, Tensor, Tensor, np.ndarray]] = []
            began = time.perf_counter()
            for batch in batches:
                lr = self.learning_rate()
                loss, accuracy = self.train_step(batch.images, batch.labels, lr)
                window.append((self.step, loss, accuracy, batch.positions))
                self.step += 1
                bar.update()
                if len(window) == cfg.log_every or self.step == self.steps or self.stop:
                    self.log(window, lr, began, writer, bar)
                    window, began = [], time.perf_counter()
                if self.stop:
                    raise KeyboardInterrupt
        points = np.array([point for point in self.history["train"] if point[0] == self.epoch])
        self.epoch, self.step = self.epoch + 1, 0
        loss, accuracy = np.average(points[:, 2:4], axis=0, weights=points[:, 4])
        return float(loss), float(accuracy)

    def learning_rate(self) -> float:
        """The schedule's value for the step at hand."""
        cfg = self.cfg
        return learning_rate(
            self.epoch + self.step / self.steps,
            lr=cfg.lr,
            epochs=cfg.epochs,
            schedule=cfg.schedule,
            milestones=cfg.milestones,
            poly_power=cfg.poly_power,
            warmup_epochs=cfg.warmup_epochs,
        )

    def log(
        self,
        window: list[tuple[int, Tensor, Tensor, np.ndarray]],
        lr: float,
        began: float,
        writer: SummaryWriter,
        bar: tqdm,
    ) -> None:
        """Write one point for the last steps to the history, TensorBoard and the progress bar."""
        losses = torch.stack([loss for _, loss, _, _ in window]).cpu()
        accuracy = float(torch.stack([accuracy for _, _, accuracy, _ in window]).mean())
        rate = sum(len(positions) for *_, positions in window) / (time.perf_counter() - began)
        if not losses.isfinite().all():
            step, loss, _, positions = window[int((~losses.isfinite()).int().argmax())]
            raise TrainingError(
                f"The loss is {loss.item()} at epoch {self.epoch + 1}, step {step + 1} of "
                f"{self.steps} (lr {lr:g}), on records {self.store.names(positions)}; the last "
                "good state stays in last.pt. Try a lower --lr, --warmup-epochs or --clip-norm."
            )
        loss = float(losses.mean())
        self.history["train"].append((self.epoch, self.step, loss, accuracy, len(window)))
        scalars = {"train/loss": loss, "train/accuracy": accuracy}
        scalars |= {"train/lr": lr, "perf/images_per_s": rate}
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, self.global_step)
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2%}, {rate:,.0f} images/s")

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss (with the margin) and accuracy (without) on the held-out images."""
        self.model.eval()
        total_loss = total_right = 0.0
        for batch in valid_batches(
            self.store, self.valid_positions, batch_size=self.cfg.eval_batch
        ):
            logits, right = self.logits(batch.images, batch.labels)
            total_loss += float(self.criterion(logits, batch.labels)) * len(right)
            total_right += float(right.sum())
        count = len(self.valid_positions)
        return total_loss / count, total_right / count

    def state(self) -> dict[str, Any]:
        """All of it as a dict for save_checkpoint."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "config": dataclasses.asdict(self.cfg),
            "num_classes": self.head.weight.shape[0],
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def load(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Go back to a saved state; raises UserError where it does not fit the training set."""
        if checkpoint["num_classes"] != self.head.weight.shape[0]:
            raise UserError(
                f"{path} was trained on {checkpoint['num_classes']} identities, the training set "
                f"has {self.head.weight.shape[0]}; give the set it was trained on (--train-set)."
            )
        self.model.load_state_dict(checkpoint["model"])
        self.head.load_state_dict(checkpoint["head"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        self.best, self.history = checkpoint["best"], checkpoint["history"]
        torch.set_rng_state(checkpoint["random"]["cpu"].cpu())
        if self.device.type == "cuda" and checkpoint["random"]["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["random"]["cuda"]])

    def save(self, path: Path) -> None:
        """Write a checkpoint, unless the weights are no numbers any more (TrainingError)."""
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise TrainingError(
                f"Weights are not finite after epoch {self.epoch}, step {self.step}; {path} stays "
                "as it was. Try a lower --lr, --warmup-epochs or --clip-norm."
            )
        save_checkpoint(path, self.state())
