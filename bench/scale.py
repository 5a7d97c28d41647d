"""Predict a training step on many GPUs, and compare the model with processes on this machine.

    python -m bench.scale                                   # 1, 2 and 4 processes here
    python -m bench.scale --images-per-s 760 --logits-per-s 2e10 --bandwidth 12.5 --latency 20

A step on G devices with a batch of B images and C identities takes

    compute    B / G images through the network, forward and backward
    exposed    the part of the gradients' all-reduce that does not overlap with the backward pass
               (two thirds of the compute); a ring sends 2 (G - 1) / G of the bytes, with
               2 (G - 1) latencies
    gather     (G - 1) / G of the batch's embeddings, and the same again for their gradients
    softmax    B rows against C / G classes (times the sampling rate), forward and backward
    statistics six small all-reduces, log2 G latencies each

What one device does (images/s, logits/s, parameters) and what connects devices (GB/s per device,
latency) are measured for processes on this machine, over gloo, where all processes share the cores;
for the table of GPUs they are given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from bench.common import RESULTS, describe_machine
from bench.large import head_memory
from config import Config
from distributed.process_group import process_group, world_size
from heads.partial_fc import PartialFC
from heads.softmax_margins import ArcFace
from train import build_engine
from utils import core_count, exit_on_user_error, keep_freed_memory

CPU = torch.device("cpu")
EMB = 512


class Device(NamedTuple):
    """The speed of one device, and of the link between devices."""

    images_per_s: float  # through the network, forward and backward
    logits_per_s: float  # rows x classes, forward and backward
    parameters: float  # of the network
    bandwidth: float  # bytes/s per device
    latency: float  # seconds


def step_seconds(
    device: Device, gpus: int, batch: int, identities: int, rate: float = 1.0, cores: int = 0
) -> dict[str, float]:
    """Predicted seconds of a step, by part; `batch` is the global batch size.

    With `cores`, `gpus` are processes that share them: 4 processes on 2 cores take turns, and each
    part takes twice as long.

    Example: 8 GPUs with 128 images each and 760 images/s per GPU have a compute part of
    128 / 760 = 168 ms. The gradients of r50 are 174 MB; at 12.5 GB/s the ring needs
    2 x 7 / 8 x 174 MB / 12.5 GB/s = 24 ms, which hide behind the 112 ms of the backward pass.
    """
    crowd = max(1.0, gpus / cores) if cores else 1.0
    compute = crowd * batch / gpus / device.images_per_s
    ring = crowd * 2 * (gpus - 1) / gpus * 4 * device.parameters / device.bandwidth
    ring += 2 * (gpus - 1) * device.latency
    # On shared cores nothing is sent while others compute: there is no overlap.
    exposed = ring if cores else max(0.0, ring - 2 / 3 * compute)
    gather = crowd * 2 * (gpus - 1) / gpus * 4 * EMB * batch / device.bandwidth
    softmax = crowd * batch * math.ceil(identities / gpus) * rate / device.logits_per_s
    rounds = 6 * math.ceil(math.log2(gpus)) if gpus > 1 else 0
    parts = {"compute": compute, "exposed": exposed, "gather": gather, "softmax": softmax}
    return parts | {"statistics": rounds * device.latency}


# ------------------------------------------------------------------------------ measurements


def group_member(
    rank: int, ranks: int, port: int, results: Any, work: Callable, arguments: tuple
) -> None:
    """One process of a group; rank 0 puts its result into the queue."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    keep_freed_memory()
    with process_group("cpu"):
        result = work(*arguments)
        if rank == 0:
            results.put(result)


def run_in_group(ranks: int, work: Callable, *arguments: Any) -> Any:
    """The result of `work` in rank 0 of a new process group of `ranks` processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    group = [
        context.Process(target=group_member, args=(rank, ranks, port, results, work, arguments))
        for rank in range(ranks)
    ]
    for process in group:
        process.start()
    result = results.get(timeout=600)
    for process in group:
        process.join()
    return result


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `repeats` runs, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def training_step_seconds(network: str, batch: int, identities: int, repeats: int) -> float:
    """Seconds of train.py's step on this process's slice of a global batch."""
    torch.manual_seed(0)
    cfg = Config(network=network, batch_size=batch)
    engine = build_engine(cfg, identities, CPU)
    engine.train()
    images = torch.randn(batch // world_size(), 3, 112, 112)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, identities, (len(images),))
    step = itertools.count()
    return median_seconds(lambda: engine.train_step(images, labels, 0.01, next(step)), repeats)


def network_throughput(network: str, size: int, repeats: int) -> tuple[float, int]:
    """Images/s of the network with SGD in batches of `size`, and its number of parameters."""
    # Two classes: the head costs nothing.
    engine = build_engine(Config(network=network, batch_size=size), 2, CPU)
    engine.train()
    images = torch.randn(size, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (size,))
    seconds = median_seconds(lambda: engine.train_step(images, labels, 0.01, 0), repeats)
    return size / seconds, sum(p.numel() for p in engine.model.parameters())


def head_throughput(rows: int, identities: int, repeats: int) -> float:
    """Logits/s of the sharded softmax, forward and backward, with SGD."""
    head = PartialFC(EMB, identities, ArcFace(EMB, 0).margin)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, fused=True)
    embedding, labels = torch.randn(rows, EMB), torch.randint(0, identities, (rows,))

    def step() -> None:
        optimizer.zero_grad()
        inputs = embedding.clone().requires_grad_()
        head.loss(inputs, labels, nn.CrossEntropyLoss(), rows).loss.backward()
        optimizer.step()

    return rows * identities / median_seconds(step, repeats)


def all_reduce_link() -> tuple[float, float]:
    """Bytes/s and latency in seconds of an all-reduce between two processes."""
    small, large = torch.zeros(1), torch.zeros(1 << 23)
    latency = median_seconds(lambda: dist.all_reduce(small), 50) / 2
    seconds = median_seconds(lambda: dist.all_reduce(large), 5)
    return large.nbytes / max(seconds - 2 * latency, 1e-9), latency


# ------------------------------------------------------------------------------ the tables


def predict_and_measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Predict and measure a step in 1, 2 and 4 processes on this machine; print both."""
    logits_per_s = run_in_group(1, head_throughput, args.batch, args.identities, args.repeats)
    bandwidth, latency = run_in_group(2, all_reduce_link)
    print(
        f"one process, one core: {logits_per_s / 1e6:,.1f} M logits/s; between two: "
        f"{bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us"
    )
    print(f"batch {args.batch}, {args.identities:,} identities, {core_count()} cores")
    names = {"processes": 9, "alone/s": 8, "predicted ms": 12, "measured ms": 12, "error": 7}
    print(" ".join(f"{name:>{width}}" for name, width in names.items()), " images/s")
    rows = []
    for ranks in (1, 2, 4):
        # Measured with a slice of this size: small batches are slower per image.
        speed = run_in_group(1, network_throughput, args.network, args.batch // ranks, args.repeats)
        device = Device(speed[0], logits_per_s, speed[1], bandwidth, latency)
        parts = step_seconds(device, ranks, args.batch, args.identities, cores=core_count())
        work = (args.network, args.batch, args.identities, args.repeats)
        measured, predicted = run_in_group(ranks, training_step_seconds, *work), sum(parts.values())
        print(
            f"{ranks:9} {device.images_per_s:8.1f} {predicted * 1000:12.1f} "
            f"{measured * 1000:12.1f} {predicted / measured - 1:7.0%} {args.batch / measured:9.1f}"
        )
        rows.append({"processes": ranks, "predicted": parts, "measured": measured})
    return rows


def print_gpu_table(device: Device, each: int, memory: float) -> list[dict[str, Any]]:
    """Predicted steps on 1 to 1,024 GPUs with 100 thousand to 100 million identities.

    `each` is the batch size per GPU, `memory` the GB of one that the head may take.
    """
    print(f"\n{each} images per device; ms: {', '.join(device._fields)} = {tuple(device)}")
    names = ("identities", "rate", "GPUs", "compute", "exposed", "gather", "softmax", "step")
    widths = (12, 5, 7, 8, 8, 8, 9, 9)
    line = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    print(f"{line} {'images/s':>10} {'of ideal':>8} {'head GB':>8}")
    rows = []
    for identities in (10**5, 10**6, 10**7, 10**8):
        for rate in (1.0, 0.1):
            for gpus in (1, 8, 64, 256, 1024):
                parts = step_seconds(device, gpus, each * gpus, identities, rate)
                seconds = sum(parts.values())
                rate_of_all = each * gpus / seconds
                ideal = gpus * device.images_per_s
                head = sum(head_memory(identities, EMB, gpus, rate, each * gpus).values()) / 1e9
                shown = [1000 * parts[k] for k in ("compute", "exposed", "gather")]
                print(
                    f"{identities:12,} {rate:5} {gpus:7,} "
                    + " ".join(f"{n:8.1f}" for n in shown)
                    + f" {1000 * parts['softmax']:9.1f} {1000 * seconds:9.1f} "
                    f"{rate_of_all:10,.0f} {rate_of_all / ideal:8.0%} {head:8.2f}"
                    + (" does not fit" if head > memory else "")
                )
                row = {"identities": identities, "rate": rate, "gpus": gpus, "seconds": parts}
                rows.append(row | {"head_gb": head})
    return rows


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Print both tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--network", default="tiny", help="of the processes here (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="of the processes here (default: %(default)s)"
    )
    parser.add_argument(
        "--identities", type=int, default=10000, help="likewise (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="steps measured (default: %(default)s)"
    )
    parser.add_argument("--no-processes", action="store_true", help="print the table of GPUs only")
    parser.add_argument("--batch-per-gpu", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--images-per-s", type=float, help="of one GPU, as bench.train measures it")
    parser.add_argument("--logits-per-s", type=float, help="of one GPU, forward and backward")
    parser.add_argument(
        "--parameters", type=float, default=43.6e6, help="of its network (default: r50's)"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=12.5, help="GB/s per GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--latency", type=float, default=20.0, help="microseconds (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", type=float, default=40.0, help="GB per GPU for the head (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    results: dict[str, Any] = {"machine": describe_machine(CPU)}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    if not args.no_processes:
        results["processes"] = predict_and_measure(args)
    if args.images_per_s and args.logits_per_s:
        numbers = (args.images_per_s, args.logits_per_s, args.parameters)
        device = Device(*numbers, args.bandwidth * 1e9, args.latency / 1e6)
        results["table"] = print_gpu_table(device, args.batch_per_gpu, args.memory)
    else:
        print("For the table of GPUs give --images-per-s and --logits-per-s of one GPU.")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote {RESULTS / 'scale-cpu.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
