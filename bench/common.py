"""What the benchmarks share: clocks, the machine's floors, the table and its JSON.

A floor is what the machine can do at best: arithmetic by the fastest large product or convolution
that it runs, bytes by the fastest large copy, both measured in the same run.  Variants that are
compared run in turn, each in a process of its own, so that a ratio sees the same machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import NETWORKS, build_model
from utils import core_count, get_device, keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One measured stage: seconds a run of `images` images, and what it must compute and move."""

    stage: str
    images: int
    seconds: list[float]
    flops: float = 0.0  # an image; a multiply-add counts two
    bytes: float = 0.0  # an image, to and from main memory
    dtype: str = "float32"
    cores: int = 0  # 0: all
    memory: int = 0  # peak bytes
    note: str = ""
    numbers: dict[str, float] = field(default_factory=dict)  # for the JSON

    @property
    def rate(self) -> float:
        """Images/s at the median."""
        return self.images / statistics.median(self.seconds)


def arguments(
    name: str, doc: str, argv: Sequence[str], network: str = "", **numbers: int
) -> argparse.Namespace:
    """The command line that all benchmarks share, with `numbers` as further flags.

    `network` is the default of --network, which benchmarks without a network do not have.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=doc.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="real images (default: drawn ones)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--repeats", type=int, default=5, help="runs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="result (default: bench/results/...)")
    for flag, default in numbers.items():
        parser.add_argument(
            f"--{flag.replace('_', '-')}", type=int, default=default, help="default: %(default)s"
        )
    if network:
        parser.add_argument(
            "--network", choices=NETWORKS, default=network, help="default: %(default)s"
        )
    args = parser.parse_args(argv)
    args.device = get_device(args.device)
    suffix = f"-{args.network}" if network else ""
    args.json = args.json or RESULTS / f"{name}-{args.device.type}{suffix}.json"
    return args


# ------------------------------------------------------------------------------ clocks


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(
    work: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 1
) -> list[float]:
    """Seconds of each of `repeats` runs, after `warm_up` runs that do not count."""
    for _ in range(warm_up):
        work()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def peak_memory(device: torch.device) -> int:
    """Bytes that this process (on a GPU: its tensors there) held at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a fresh process: no memory, threads or settings of another one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def in_turn(variants: dict[str, tuple], repeats: int) -> dict[str, list[Any]]:
    """Run every variant (function, arguments ...) alone, one after the other, `repeats` times."""
    results: dict[str, list[Any]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (work, *rest) in variants.items():
            results[name].append(alone(work, *rest))
    return results


def network_flops(network: str) -> float:
    """Arithmetic of a network's forward pass, an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(network).eval()(torch.zeros(1, 3, 112, 112))
    return counter.get_total_flops()


def ratio(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times faster, run by run: [median, lowest, highest]."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


# ------------------------------------------------------------------------------ the machine


def measure_floors(device: torch.device) -> dict[str, float]:
    """FLOP/s by type, and bytes/s of main (on a GPU: its own) memory."""
    keep_freed_memory()
    floors = {}
    size = 4096 if device.type == "cpu" else 16384
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        x = torch.randn(64, 256, 14, 14, device=device).to(dtype)
        w = torch.randn(256, 256, 3, 3, device=device).to(dtype)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        with torch.inference_mode():
            product = min(clock(lambda a=a, b=b: a @ b, device, 5))
            convolution = min(clock(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, 20))
        flops = 2 * 64 * 256 * 256 * 9 * 14 * 14
        floors[str(dtype).removeprefix("torch.")] = max(2 * size**3 / product, flops / convolution)
    source = torch.zeros(2**28 if device.type == "cpu" else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    floors["bytes"] = 2 * source.nbytes / min(clock(lambda: target.copy_(source), device, 10))
    return floors


def floor_rate(row: Row, floors: dict[str, float]) -> float:
    """Images/s that arithmetic and bytes allow at best; 0 where neither is counted."""
    share = row.cores / core_count() if row.cores else 1.0
    seconds = max(row.flops / (floors[row.dtype] * share), row.bytes / floors["bytes"])
    return 1 / seconds if seconds else 0.0


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {"date": time.strftime("%Y-%m-%d"), "cpu": model, "cores": core_count()}
    machine |= {"memory_gb": round(memory / 2**30), "python": platform.python_version()}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    packages = ("torch", "torchvision", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    return machine | versions


# ------------------------------------------------------------------------------ the table


def finish(
    args: argparse.Namespace, rows: Sequence[Row], extra: dict[str, Any] | None = None
) -> None:
    """Print the rows with their floors as a table, and write them with `extra` as JSON."""
    machine, floors = describe_machine(args.device), alone(measure_floors, args.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"floors: {floors['float32'] / 1e9:,.0f} GFLOP/s in float32, "
        f"{floors['bfloat16'] / 1e9:,.0f} in bfloat16, {floors['bytes'] / 1e9:.1f} GB/s\n"
    )
    width = max(len(row.stage) for row in rows)
    print(
        f"{'stage':{width}} {'images/s':>10} {'lowest':>9} {'highest':>9} {'ms/image':>9} "
        f"{'floor':>9} {'of it':>6} {'peak MB':>8}"
    )
    for row in rows:
        low, high = row.images / max(row.seconds), row.images / min(row.seconds)
        line = f"{row.stage:{width}} {row.rate:10,.1f} {low:9,.1f} {high:9,.1f} "
        line += f"{1000 / row.rate:9.3f} "
        best = floor_rate(row, floors)
        line += f"{best:9,.0f} {row.rate / best:6.0%} " if best else f"{'':9} {'':6} "
        line += f"{row.memory / 2**20:8,.0f}" if row.memory else f"{'':8}"
        print((line + (f"  {row.note}" if row.note else "")).rstrip())
    for name, value in (extra or {}).items():
        if isinstance(value, list):
            print(f"{name}: {value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})")
        else:
            print(f"{name}: {value}")
    report = {"machine": machine, "floors": floors, "data": args.data.name if args.data else ""}
    report["rows"] = [
        asdict(row) | {"images_per_s": row.rate, "floor": floor_rate(row, floors)} for row in rows
    ]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report | (extra or {}), indent=1) + "\n")
    print(f"Wrote {args.json}")
