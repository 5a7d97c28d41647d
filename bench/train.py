"""Time one training step - forward, margin, loss, backward, SGD - against the published way.

    python -m bench.train                                   # r50, 10,572 classes
    python -m bench.train --network mobilefacenet --batch 128

The published way is InsightFace's IR-50 in float32, contiguous (NCHW), with PyTorch's plain SGD;
ours is trainer.py's step as train.py runs it, without and with torch.compile, whose cost is a
number of its own.  Each runs in a process of its own, in turn.  It prints a table, the ratio, and
how far the bfloat16 step's loss and gradient are from float32's; the JSON goes to
bench/results/train-<device>-<network>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.common import (
    Row,
    arguments,
    clock,
    finish,
    in_turn,
    network_flops,
    peak_memory,
    ratio,
    synchronise,
)
from config import Config
from data_gen import Split
from models import ArcMarginModel, build_model
from training.run import Trainer
from utils import exit_on_user_error, has_bfloat16, keep_freed_memory, seed_everything

CLASSES = 10572


def make_batch(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised noise, channels_last, and classes."""
    torch.manual_seed(0)
    images = torch.rand(size, 3, 112, 112) * 2 - 1
    labels = torch.randint(0, CLASSES, (size,))
    return images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device)


def published(network: str, size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds of `steps` steps in float32, NCHW."""
    seed_everything(0)
    model, head = build_model(network).to(device), ArcMarginModel(512, CLASSES).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=False)
    images, labels = make_batch(size, device)
    images = images.contiguous()

    def step() -> None:
        loss = F.cross_entropy(head(model(images), labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return timed(step, device, steps)


def ours(
    network: str, size: int, device: torch.device, steps: int, compiled: str
) -> dict[str, Any]:
    """Seconds of `steps` steps as train.py makes them."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    trainer = make_trainer(network, size, device, compile=compiled)
    images, labels = make_batch(size, device)
    trainer.learner.train()
    return timed(lambda: trainer.train_step(images, labels, 0.01), device, steps)


def make_trainer(network: str, size: int, device: torch.device, **settings: Any) -> Trainer:
    """A Trainer of `CLASSES` identities without images."""
    seed_everything(0)
    everything = np.arange(size * 100)
    faces = Split(everything, everything % CLASSES, CLASSES, everything, everything[:0])
    reader = SimpleNamespace(keys=everything, path=Path(__file__))
    store = SimpleNamespace(device=device, reader=reader, indices=everything)
    store.good, store.labels = (lambda positions: positions), torch.from_numpy(faces.labels)
    store.width = lambda batch_size: batch_size
    return Trainer(Config(network=network, batch_size=size, **settings), store, faces)


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, Any]:
    """The first step's seconds and the median of the others'."""
    began = time.perf_counter()
    step()
    synchronise(device)
    first = time.perf_counter() - began
    seconds = clock(step, device, steps, warm_up=1)
    return {"first": first, "step": float(np.median(seconds)), "memory": peak_memory(device)}


def difference(network: str, device: torch.device) -> dict[str, float]:
    """Relative errors of a bfloat16 step against float32: the loss, and all gradients as one."""
    images, labels = make_batch(16, device)
    results = []
    for amp in (False, True):
        trainer = make_trainer(network, 16, device, amp=amp, compile="off")
        loss = trainer.learner.loss(images, labels, len(labels)).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.learner.parameters]
        results.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (loss_16, gradient_16) = results
    return {
        "loss, relative error in bfloat16": abs(loss_16 - loss) / loss,
        "gradient, relative error in bfloat16": float(
            (gradient_16 - gradient).norm() / gradient.norm()
        ),
    }


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time the steps in turn."""
    args = arguments("train", __doc__, argv, network="r50", batch=32, steps=3)
    network = args.network
    work = (network, args.batch, args.device, args.steps)
    variants = {
        "published: float32, NCHW": (published, *work),
        "ours": (ours, *work, "off"),
        "ours, compiled": (ours, *work, "on"),
    }
    found = in_turn(variants, args.repeats)
    flops = 3 * network_flops(network) + 6 * 512 * CLASSES
    rows = []
    for name, runs in found.items():
        row = Row(f"{network}, {name}", args.batch, [run["step"] for run in runs], flops)
        row.memory = max(run["memory"] for run in runs)
        if name.startswith("ours") and has_bfloat16(args.device):
            row.dtype = "bfloat16"
        row.note = f"first step {min(run['first'] for run in runs):.1f} s"
        rows.append(row)
    plain, eager, compiled = (row.seconds for row in rows)
    extra: dict[str, Any] = {
        "step, times the published one": ratio(plain, eager),
        "compiled step, times the published one": ratio(plain, compiled),
    }
    finish(args, rows, extra | difference(network, args.device))


if __name__ == "__main__":
    main(sys.argv[1:])
