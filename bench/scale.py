"""Predict a training step on many GPUs, and hold the prediction against processes here.

    python -m bench.scale                                   # this machine's processes
    python -m bench.scale --images-per-s 760 --logits-per-s 2e10 --bandwidth 12.5 --latency 20

A step on G devices with a batch of B and C people takes

    compute    B / G images through the network, forward and backward
    exposed    the all-reduce of the network's gradients (a ring: 2 (G - 1) / G of its bytes, and
               2 (G - 1) latencies), as far as it does not hide behind the backward pass, which is
               two thirds of the compute
    gather     (G - 1) / G of the batch's embeddings, and back for their gradients
    softmax    B rows against C / G classes (of which a rate is sampled), both passes
    statistics six small all-reduces along the way, log2 G latencies each

What one device does (images/s, logits/s, parameters) is measured, or given; the network between
them (GB/s of one device's link, microseconds) is measured for this machine's processes over gloo,
and given for the table. On this machine, processes share its cores.
"""

from __future__ import annotations

import argparse
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
from models import ArcMarginModel
from training.engine import Learner
from utils import core_count, exit_on_user_error, keep_freed_memory

CPU = torch.device("cpu")
EMB = 512


class Device(NamedTuple):
    """What one device does, and what joins them."""

    images_per_s: float  # through the network, forward and backward
    logits_per_s: float  # rows times classes, forward and backward
    parameters: float  # of the network
    bandwidth: float  # bytes/s of one device's link
    latency: float  # seconds


def step_seconds(
    device: Device, gpus: int, batch: int, people: int, rate: float = 1.0, cores: int = 0
) -> dict[str, float]:
    """Seconds of a step by part; with `cores`, processes beyond them wait for each other."""
    crowd = max(1.0, gpus / cores) if cores else 1.0
    compute = crowd * batch / gpus / device.images_per_s
    ring = crowd * 2 * (gpus - 1) / gpus * 4 * device.parameters / device.bandwidth
    ring += 2 * (gpus - 1) * device.latency
    # On shared cores there is nobody free to send while others compute.
    exposed = ring if cores else max(0.0, ring - 2 / 3 * compute)
    gather = crowd * 2 * (gpus - 1) / gpus * 4 * EMB * batch / device.bandwidth
    softmax = crowd * batch * math.ceil(people / gpus) * rate / device.logits_per_s
    rounds = 6 * math.ceil(math.log2(gpus)) if gpus > 1 else 0
    parts = {"compute": compute, "exposed": exposed, "gather": gather, "softmax": softmax}
    return parts | {"statistics": rounds * device.latency}


# ------------------------------------------------------------------------------ measured here


def member(
    rank: int, ranks: int, port: int, results: Any, work: Callable, arguments: tuple
) -> None:
    """One process of a group; rank 0 hands its result on."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    keep_freed_memory()
    with process_group("cpu"):
        found = work(*arguments)
        if rank == 0:
            results.put(found)


def in_group(ranks: int, work: Callable, *arguments: Any) -> Any:
    """The result of `work` in the first of so many processes that form a group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    group = [
        context.Process(target=member, args=(rank, ranks, port, results, work, arguments))
        for rank in range(ranks)
    ]
    for process in group:
        process.start()
    found = results.get(timeout=600)
    for process in group:
        process.join()
    return found


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of some runs after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def whole_step(network: str, batch: int, people: int, repeats: int) -> float:
    """Seconds of train.py's step on this process's slice of a batch."""
    torch.manual_seed(0)
    cfg = Config(network=network, batch_size=batch)
    learner = Learner(cfg, people, CPU)
    learner.train()
    images = torch.randn(batch // world_size(), 3, 112, 112)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, people, (len(images),))
    step = iter(range(1000))
    return median_seconds(lambda: learner.train_step(images, labels, 0.01, next(step)), repeats)


def network_alone(network: str, size: int, repeats: int) -> tuple[float, int]:
    """Images/s of the network by itself with SGD, and its parameters."""
    learner = Learner(Config(network=network, batch_size=size), 2, CPU)
    learner.train()
    images = torch.randn(size, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 2, (size,))
    seconds = median_seconds(lambda: learner.train_step(images, labels, 0.01, 0), repeats)
    return size / seconds, sum(p.numel() for p in learner.model.parameters())


def head_alone(rows: int, people: int, repeats: int) -> float:
    """Logits/s of the sharded softmax, forward and backward, with SGD."""
    head = PartialFC(EMB, people, ArcMarginModel(EMB, 0).margin)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, fused=True)
    embedding, labels = torch.randn(rows, EMB), torch.randint(0, people, (rows,))

    def step() -> None:
        optimizer.zero_grad()
        inputs = embedding.clone().requires_grad_()
        head(inputs, labels, nn.CrossEntropyLoss(), rows).loss.backward()
        optimizer.step()

    return rows * people / median_seconds(step, repeats)


def link() -> tuple[float, float]:
    """Bytes/s and seconds of latency of an all-reduce between two processes here."""
    small, large = torch.zeros(1), torch.zeros(1 << 23)
    latency = median_seconds(lambda: dist.all_reduce(small), 50) / 2
    seconds = median_seconds(lambda: dist.all_reduce(large), 5)
    return large.nbytes / max(seconds - 2 * latency, 1e-9), latency


# ------------------------------------------------------------------------------ the tables


def hold_against(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Predict and measure 1, 2 and 4 processes of this machine; print both."""
    logits_per_s = in_group(1, head_alone, args.batch, args.people, args.repeats)
    bandwidth, latency = in_group(2, link)
    print(
        f"one process, one core: {logits_per_s / 1e6:,.1f} M logits/s; between two: "
        f"{bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us"
    )
    print(f"batch {args.batch}, {args.people:,} people, {core_count()} cores")
    names = {"processes": 9, "alone/s": 8, "predicted ms": 12, "measured ms": 12, "error": 7}
    print(" ".join(f"{name:>{width}}" for name, width in names.items()), " images/s")
    rows = []
    for ranks in (1, 2, 4):
        # What one process does by itself with a slice of this size: small ones are slower.
        alone = in_group(1, network_alone, args.network, args.batch // ranks, args.repeats)
        device = Device(alone[0], logits_per_s, alone[1], bandwidth, latency)
        parts = step_seconds(device, ranks, args.batch, args.people, cores=core_count())
        work = (args.network, args.batch, args.people, args.repeats)
        measured, predicted = in_group(ranks, whole_step, *work), sum(parts.values())
        print(
            f"{ranks:9} {device.images_per_s:8.1f} {predicted * 1000:12.1f} "
            f"{measured * 1000:12.1f} {predicted / measured - 1:7.0%} {args.batch / measured:9.1f}"
        )
        rows.append({"processes": ranks, "predicted": parts, "measured": measured})
    return rows


def print_table(device: Device, each: int, memory: float) -> list[dict[str, Any]]:
    """Step times from 1 to 1,024 devices and 100 k to 100 M people, `each` images a device."""
    print(f"\n{each} images a device; ms: {', '.join(device._fields)} = {tuple(device)}")
    names = ("people", "rate", "GPUs", "compute", "exposed", "gather", "softmax", "step")
    widths = (12, 5, 7, 8, 8, 8, 9, 9)
    line = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    print(f"{line} {'images/s':>10} {'of ideal':>8} {'head GB':>8}")
    rows = []
    for people in (10**5, 10**6, 10**7, 10**8):
        for rate in (1.0, 0.1):
            for gpus in (1, 8, 64, 256, 1024):
                parts = step_seconds(device, gpus, each * gpus, people, rate)
                seconds = sum(parts.values())
                rate_of_all = each * gpus / seconds
                ideal = gpus * device.images_per_s
                head = sum(head_memory(people, EMB, gpus, rate, each * gpus).values()) / 1e9
                shown = [1000 * parts[k] for k in ("compute", "exposed", "gather")]
                print(
                    f"{people:12,} {rate:5} {gpus:7,} "
                    + " ".join(f"{n:8.1f}" for n in shown)
                    + f" {1000 * parts['softmax']:9.1f} {1000 * seconds:9.1f} "
                    f"{rate_of_all:10,.0f} {rate_of_all / ideal:8.0%} {head:8.2f}"
                    + (" does not fit" if head > memory else "")
                )
                row = {"people": people, "rate": rate, "gpus": gpus, "seconds": parts}
                rows.append(row | {"head_gb": head})
    return rows


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Print both tables and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--network", default="tiny", help="of the processes here (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="of the processes here (%(default)s)")
    parser.add_argument("--people", type=int, default=10000, help="likewise (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="steps measured (%(default)s)")
    parser.add_argument("--no-processes", action="store_true", help="the table alone")
    parser.add_argument("--each", type=int, default=128, help="images a GPU (%(default)s)")
    parser.add_argument("--images-per-s", type=float, help="of one GPU: bench.train measures it")
    parser.add_argument("--logits-per-s", type=float, help="of one GPU, both passes")
    parser.add_argument("--parameters", type=float, default=43.6e6, help="of its network (r50)")
    parser.add_argument("--bandwidth", type=float, default=12.5, help="GB/s a GPU (%(default)s)")
    parser.add_argument("--latency", type=float, default=20.0, help="us (%(default)s)")
    parser.add_argument("--memory", type=float, default=40.0, help="GB for the head (%(default)s)")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": describe_machine(CPU)}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    if not args.no_processes:
        report["processes"] = hold_against(args)
    if args.images_per_s and args.logits_per_s:
        numbers = (args.images_per_s, args.logits_per_s, args.parameters)
        device = Device(*numbers, args.bandwidth * 1e9, args.latency / 1e6)
        report["table"] = print_table(device, args.each, args.memory)
    else:
        print("For the table of GPUs give --images-per-s and --logits-per-s of one.")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale-cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Wrote {RESULTS / 'scale-cpu.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
