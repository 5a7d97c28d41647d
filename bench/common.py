"""Shared by the benchmarks: timing, the machine's roofline, the table of results and its JSON.

The roofline is what the machine can do at best: arithmetic by the fastest large matrix product or
convolution that it runs, bytes by the fastest large copy, both measured in the same run. Variants
that are compared run alternately, each in a fresh process, so that their ratio is that of one
machine in one state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fileio.safe_files import atomic_write, make_folder
from models import NETWORKS, build_model
from utils import autocast_dtype, core_count, dtype_name, get_device, keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One measured stage: seconds per run of `images` images, its arithmetic and its traffic."""

    stage: str
    images: int
    seconds: list[float]
    flops: float = 0.0  # per image; a multiply-add counts two
    bytes: float = 0.0  # per image, to and from main memory
    dtype: str = "float32"
    cores: int = 0  # 0: all
    memory: int = 0  # peak bytes
    note: str = ""
    numbers: dict[str, float] = field(default_factory=dict)  # further ones, for the JSON only

    @property
    def rate(self) -> float:
        """Images per second of the median run."""
        return self.images / statistics.median(self.seconds)


def parse_arguments(
    name: str, doc: str, argv: Sequence[str], network: str = "", **numbers: int
) -> argparse.Namespace:
    """The command line of a benchmark; `numbers` are further integer flags and their defaults.

    `network` is the default of --network; without it there is no such flag.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=doc.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="real images (default: synthetic ones)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--repeats", type=int, default=5, help="runs (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, help="file for the results (default: bench/results/...)"
    )
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


# ------------------------------------------------------------------------------ timing


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all work queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(
    work: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 1
) -> list[float]:
    """Seconds of each of `repeats` runs, after `warm_up` runs that are not counted."""
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
    """Peak bytes of this process; on a GPU, of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kilobytes


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a new process, which inherits no memory, threads or settings."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def alternate(variants: dict[str, tuple], repeats: int) -> dict[str, list[Any]]:
    """The results of `repeats` rounds, each of which runs every variant in a fresh process.

    variants are (function, *arguments) by name. A machine that slows down slows all of them.
    """
    results: dict[str, list[Any]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (work, *rest) in variants.items():
            results[name].append(in_fresh_process(work, *rest))
    return results


def network_flops(network: str) -> float:
    """Floating-point operations of a network's forward pass, per image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(network).eval()(torch.zeros(1, 3, 112, 112))
    return counter.get_total_flops()


def speedup(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times faster, round by round: [median, lowest, highest]."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


# ------------------------------------------------------------------------------ the machine


def roofline_sizes(device: torch.device) -> tuple[int, int]:
    """The side of the matrices and the bytes of the copy that a roofline is measured with.

    On a GPU they follow its free memory: 16,384 and 4 GiB with 16 GiB, 8,192 and 1 GiB with 4 GiB.
    """
    if device.type == "cpu":
        return 4096, 2**28
    free = torch.cuda.mem_get_info(device)[0]
    size = 16384
    # Two operands, the product, and a float32 operand while it is converted: 4 bytes each.
    while 4 * 4 * size**2 > free // 2 and size > 1024:
        size //= 2
    return size, min(2**32, free // 4)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute in full float32 within the block: TF32 has float16's 10 bits of mantissa."""
    products = torch.backends.cuda.matmul.allow_tf32
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


def use_training_backends() -> None:
    """Set cuDNN and TF32 as train.py does."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def measure_roofline(device: torch.device, quick: bool = False) -> dict[str, float]:
    """Peak FLOP/s by dtype, and bytes/s of main memory (on a GPU: of its own).

    `quick` is for dry runs: sizes that are too small for a peak.
    """
    keep_freed_memory()
    roofline = {}
    size, copied = (256, 2**22) if quick else roofline_sizes(device)
    for dtype in (torch.float32, autocast_dtype(device) or torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        x = torch.randn(64, 256, 14, 14, device=device).to(dtype)
        w = torch.randn(256, 256, 3, 3, device=device).to(dtype)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        with torch.inference_mode(), without_tf32():
            product = min(time_runs(lambda a=a, b=b: a @ b, device, 5))
            convolution = min(
                time_runs(lambda x=x, w=w: F.conv2d(x, w, padding=1), device, 1 if quick else 20)
            )
        flops = 2 * 64 * 256 * 256 * 9 * 14 * 14
        roofline[dtype_name(dtype)] = max(2 * size**3 / product, flops / convolution)
        del a, b, x, w  # two dtypes at once would need half as much memory again
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    roofline["bytes"] = 2 * source.nbytes / min(time_runs(lambda: target.copy_(source), device, 10))
    return roofline


def roofline_rate(row: Row, roofline: dict[str, float]) -> float:
    """Images per second that arithmetic and traffic allow at best; 0 if neither is counted.

    Example: 12.6 GFLOP per image at 247 GFLOP/s allow 19.6 images/s.
    """
    share = row.cores / core_count() if row.cores else 1.0
    seconds = max(row.flops / (roofline[row.dtype] * share), row.bytes / roofline["bytes"])
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


def print_and_save(
    args: argparse.Namespace, rows: Sequence[Row], extra: dict[str, Any] | None = None
) -> None:
    """Print the rows beside the roofline, and write them and `extra` to args.json.

    The JSON says "floors" and "floor" for the roofline, as results measured earlier do.
    """
    machine = describe_machine(args.device)
    results = {"machine": machine, "floors": {}, "data": args.data.name if args.data else ""}
    results["rows"] = [asdict(row) | {"images_per_s": row.rate} for row in rows]
    # Before the roofline: if that fails, what was measured is kept.
    make_folder(args.json.parent)
    _write_json(args.json, results | (extra or {}))
    roofline = in_fresh_process(measure_roofline, args.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    speeds = [f"{v / 1e9:,.0f} GFLOP/s in {k}" for k, v in roofline.items() if k != "bytes"]
    print(f"roofline: {', '.join(speeds)}, {roofline['bytes'] / 1e9:.1f} GB/s\n")
    width = max(len(row.stage) for row in rows)
    print(
        f"{'stage':{width}} {'images/s':>10} {'lowest':>9} {'highest':>9} {'ms/image':>9} "
        f"{'roofline':>9} {'of it':>6} {'peak MB':>8}"
    )
    for row in rows:
        low, high = row.images / max(row.seconds), row.images / min(row.seconds)
        line = f"{row.stage:{width}} {row.rate:10,.1f} {low:9,.1f} {high:9,.1f} "
        line += f"{1000 / row.rate:9.3f} "
        best = roofline_rate(row, roofline)
        line += f"{best:9,.0f} {row.rate / best:6.0%} " if best else f"{'':9} {'':6} "
        line += f"{row.memory / 2**20:8,.0f}" if row.memory else f"{'':8}"
        print((line + (f"  {row.note}" if row.note else "")).rstrip())
    for name, value in (extra or {}).items():
        if isinstance(value, list):
            print(f"{name}: {value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})")
        else:
            print(f"{name}: {value}")
    results["floors"] = roofline
    for row, entry in zip(rows, results["rows"], strict=True):
        entry["floor"] = roofline_rate(row, roofline)
    _write_json(args.json, results | (extra or {}))
    print(f"Wrote {args.json}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
