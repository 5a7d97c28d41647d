"""Time one training step - forward, margin, loss, backward, SGD - against the usual one.

    python -m bench.train                                   # r50, 10,572 classes
    python -m bench.train --network mobilefacenet --batch 128

The usual step is InsightFace's IR-50 in float32, contiguous (NCHW), with PyTorch's plain SGD. This
project's is the step of training/engine.py as train.py runs it, without and with torch.compile,
whose compilation time is given apart. Each runs in a fresh process, alternately. Prints a table,
the speedup, and the relative errors of the autocast step's loss and gradient against float32; the
JSON goes to bench/results/train-<device>-<network>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.common import (
    Row,
    alternate,
    network_flops,
    parse_arguments,
    peak_memory,
    print_and_save,
    speedup,
    synchronise,
    time_runs,
    use_training_backends,
)
from config import Config
from heads.softmax_margins import ArcFace
from models import build_model
from train import build_engine
from training.engine import Engine
from utils import (
    autocast_dtype,
    dtype_name,
    exit_on_user_error,
    keep_freed_memory,
    seed_everything,
)

CLASSES = 10572  # CASIA-WebFace


def make_batch(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise in [-1, 1], (size, 3, 112, 112) channels_last, and random classes (size,)."""
    torch.manual_seed(0)
    images = torch.rand(size, 3, 112, 112) * 2 - 1
    labels = torch.randint(0, CLASSES, (size,))
    return images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device)


def usual_step(network: str, size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """Times of the step in float32, NCHW; see time_steps."""
    seed_everything(0)
    model, head = build_model(network).to(device), ArcFace(512, CLASSES).to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=False)
    images, labels = make_batch(size, device)
    images = images.contiguous()

    def step() -> None:
        loss = F.cross_entropy(head(model(images), labels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return time_steps(step, device, steps)


def project_step(
    network: str, size: int, device: torch.device, steps: int, compiled: str
) -> dict[str, Any]:
    """Times of the step as train.py runs it; compiled is "on" or "off"; see time_steps."""
    keep_freed_memory()
    use_training_backends()
    engine = make_engine(network, size, device, compile=compiled)
    images, labels = make_batch(size, device)
    engine.train()
    return time_steps(lambda: engine.train_step(images, labels, 0.01, 0), device, steps)


def make_engine(network: str, size: int, device: torch.device, **settings: Any) -> Engine:
    """Network, head and optimiser for `CLASSES` identities and batches of `size` images."""
    seed_everything(0)
    return build_engine(Config(network=network, batch_size=size, **settings), CLASSES, device)


def time_steps(step: Callable[[], Any], device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds of the first step, which compiles, and the median of later ones; peak bytes."""
    began = time.perf_counter()
    step()
    synchronise(device)
    first = time.perf_counter() - began
    seconds = time_runs(step, device, steps, warm_up=1)
    return {"first": first, "step": float(np.median(seconds)), "memory": peak_memory(device)}


def autocast_errors(network: str, device: torch.device) -> dict[str, float]:
    """Relative errors of an autocast step against float32: the loss, and all gradients as one."""
    images, labels = make_batch(16, device)
    results = []
    for amp in (False, True):
        engine = make_engine(network, 16, device, amp=amp, compile="off")
        loss = engine.loss(images, labels, len(labels)).loss
        engine.scaler.scale(loss).backward()
        engine.clip_gradients()  # clips nothing, and divides the scale out
        gradients = [p.grad.flatten() for p in engine.parameters]
        results.append((loss.item(), torch.cat(gradients)))
    (loss, gradient), (loss_16, gradient_16) = results
    gradient_error = (gradient_16 - gradient).norm() / gradient.norm()
    return {
        f"loss, relative error in {engine.number_format}": abs(loss_16 - loss) / loss,
        f"gradient, relative error in {engine.number_format}": float(gradient_error),
    }


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time the three steps alternately."""
    args = parse_arguments("train", __doc__, argv, network="r50", batch=32, steps=3)
    work = (args.network, args.batch, args.device, args.steps)
    variants = {
        "usual: float32, NCHW": (usual_step, *work),
        "this project": (project_step, *work, "off"),
        "this project, compiled": (project_step, *work, "on"),
    }
    results = alternate(variants, args.repeats)
    # Forward and backward are three forward passes; 6 x 512 x CLASSES are those of the head.
    flops = 3 * network_flops(args.network) + 6 * 512 * CLASSES
    rows = []
    for name, runs in results.items():
        row = Row(f"{args.network}, {name}", args.batch, [run["step"] for run in runs], flops)
        row.memory = max(run["memory"] for run in runs)
        if name.startswith("this project"):
            row.dtype = dtype_name(autocast_dtype(args.device))
        row.note = f"first step {min(run['first'] for run in runs):.1f} s"
        rows.append(row)
    usual, eager, compiled = (row.seconds for row in rows)
    extra: dict[str, Any] = {
        "step, times the usual one": speedup(usual, eager),
        "compiled step, times the usual one": speedup(usual, compiled),
    }
    print_and_save(args, rows, extra | autocast_errors(args.network, args.device))


if __name__ == "__main__":
    main(sys.argv[1:])
