"""What a million people and WebFace42M's 42 million images cost one process.

    python -m bench.large head --people 1000000         # the classifier: seconds and memory
    python -m bench.large set --images 42000000         # the data set: start, memory, images/s

`head` makes steps of Partial FC's loss, gradient and SGD on random embeddings, and prints the
table of its computed memory beside the memory that the process took. `set` makes a set of so many
images in files of 50,000: the record files are links to one file of synthetic faces; labels go
up to --people; their indexes are files of their own. So the start, the order and the index are
those of a set of that size, and decoding is real; reading comes from the page cache, not a disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.common import alone, describe_machine, peak_memory
from bench.synthetic_inputs import drawn_records
from fileio.recordio import RecordReader
from fileio.shards import INDEX_DTYPE, ShardReader, write_shards
from heads.partial_fc import CHUNK, PartialFC
from models import ArcMarginModel
from training.sharded_dataset import ShardOrder, ShardStore
from utils import exit_on_user_error, keep_freed_memory

PER_FILE = 50_000


def head_memory(people: int, emb_size: int, ranks: int, rate: float, batch: int) -> dict[str, int]:
    """Bytes of one process's shard, by what holds them.

    Below a rate of 1 the gradient, the sampled centres and their momentum are copies of the
    sampled rows; at 1 the gradient alone is as large as the shard.
    """
    shard = -(-people // ranks) * emb_size * 4
    sampled = int(3 * rate * shard) if rate < 1 else shard
    # Logits and what the margin makes of them, normalised centres and what their gradient takes.
    classes = min(CHUNK // max(batch, emb_size), int(-(-people // ranks) * rate))
    chunk = 4 * classes * (6 * batch + 5 * emb_size)
    return {"weight": shard, "momentum": shard, "gradient": sampled, "chunk": chunk}


def print_head_table(emb_size: int, batch: int) -> None:
    """GB a process for 1 M, 10 M and 100 M people."""
    print(f"GB a process, computed (float32, {emb_size} numbers, batch {batch}):")
    print(f"{'people':>12} {'processes':>9} {'rate':>5} {'weight':>8} {'momentum':>8} "
          f"{'gradient':>8} {'chunk':>6} {'all':>8}")  # fmt: skip
    for people in (10**6, 10**7, 10**8):
        for ranks in (1, 8, 64):
            for rate in (1.0, 0.1):
                found = head_memory(people, emb_size, ranks, rate, batch)
                numbers = [found[name] / 1e9 for name in ("weight", "momentum", "gradient")]
                line = f"{people:12,} {ranks:9} {rate:5} " + " ".join(f"{n:8.2f}" for n in numbers)
                print(f"{line} {found['chunk'] / 1e9:6.2f} {sum(found.values()) / 1e9:8.2f}")


def measure_head(people: int, emb_size: int, rate: float, batch: int, steps: int) -> dict:
    """Peak memory above what the process had before, and seconds a step."""
    keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    before = peak_memory(torch.device("cpu"))
    margin = ArcMarginModel(emb_size, 0).margin
    head = PartialFC(emb_size, people, margin, sample_rate=rate)
    optimizer = torch.optim.SGD([head.weight], lr=0.1, momentum=0.9, fused=True)
    momentum = torch.zeros_like(head.weight) if rate < 1 else None
    made, seconds = peak_memory(torch.device("cpu")), []
    for step in range(steps):
        embedding = torch.randn(batch, emb_size, requires_grad=True)
        label = torch.randint(0, people, (batch,))
        began = time.perf_counter()
        head.sample(label, step)
        head(embedding, label, nn.CrossEntropyLoss(), batch).loss.backward()
        if rate < 1:
            head.update(momentum, lr=0.1, decay=0.9, weight_decay=0.0)
        else:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = peak_memory(torch.device("cpu"))
    return {"weight": made - before, "peak": peak - before, "seconds": seconds}


def head(args: argparse.Namespace) -> None:
    """The table, and the measurement."""
    print_head_table(args.emb_size, args.batch)
    work = (args.people, args.emb_size, args.rate, args.batch, args.steps)
    found = alone(measure_head, *work)
    computed = head_memory(args.people, args.emb_size, 1, args.rate, args.batch)
    print(
        f"measured: {args.people:,} people, {args.emb_size} numbers, rate {args.rate}, batch "
        f"{args.batch}: peak {found['peak'] / 1e9:.2f} GB (computed "
        f"{sum(computed.values()) / 1e9:.2f}), {min(found['seconds']):.2f} s a step; all logits "
        f"at once would take {args.batch * args.people * 4 / 1e9:.2f} GB a copy"
    )


# ------------------------------------------------------------------------------ the set


def make_set(folder: Path, images: int, people: int) -> None:
    """Links to one file of synthetic faces, an index for each, and property."""
    files = -(-images // PER_FILE)
    with drawn_records(None, 2048) as drawn:
        reader = RecordReader(drawn)
        jpegs = [reader.encoded(i % len(reader)) for i in range(PER_FILE)]
    labels = np.linspace(0, people - 1, PER_FILE).astype(np.int64)
    write_shards(folder / "one", jpegs, labels, 1)
    record, index = (folder / "one" / f"train-00000.{kind}" for kind in ("rec", "npy"))
    for number in range(files):
        (folder / f"train-{number:05d}.rec").symlink_to(record)
        shutil.copyfile(index, folder / f"train-{number:05d}.npy")
    (folder / "property").write_text(f"{people},112,112")


def memory_now() -> dict[str, int]:
    """Bytes of this process: its own, and of files that it has mapped and touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":") for line in lines if line.startswith("Rss"))
    return {kind: int(values[f"Rss{kind}"].split()[0]) * 1024 for kind in ("Anon", "File")}


def measure_set(folder: Path, batch: int, steps: int, workers: int) -> dict:
    """Start-up, memory and speed of one process that has the whole set."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    torch.set_num_threads(1)
    before, began = memory_now(), time.perf_counter()
    reader = ShardReader(folder)
    order = ShardOrder(reader.starts, batch, seed=0, every=50)
    store = ShardStore(reader, order, torch.device("cpu"), workers)
    held_out = order.validation()
    found = {"images": len(reader), "start": time.perf_counter() - began, "held": len(held_out)}
    after = memory_now()
    found["memory"] = {kind: after[kind] - before[kind] for kind in after}
    lanes, seconds = slice(0, order.lanes), []
    for step in range(steps + 4):
        began = time.perf_counter()
        positions, mirrored = order.batch(0, step, lanes)
        store.fetch(positions, mirrored)
        store.labels_of(positions)
        if step >= 4:
            seconds.append(time.perf_counter() - began)
    later = memory_now()
    found["memory after"] = {kind: later[kind] - before[kind] for kind in later}
    return found | {"rate": batch * steps / sum(seconds)}


def data_set(args: argparse.Namespace) -> None:
    """Make the set, measure, delete it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        make_set(folder, args.images, args.people)
        made = time.perf_counter() - began
        index = sum(path.stat().st_size for path in folder.glob("*.npy"))
        found = alone(measure_set, folder, args.batch, args.steps, args.workers)
    images = found["images"]
    print(
        f"{images:,} images of {args.people:,} people in {-(-images // PER_FILE)} files, made in "
        f"{made:.1f} s; index {INDEX_DTYPE.itemsize} bytes per image, {index / 1e6:,.0f} MB\n"
        f"start: {found['start']:.2f} s, {found['held']:,} held out"
    )
    for when in ("memory", "memory after"):
        own, files = (found[when][kind] for kind in ("Anon", "File"))
        print(
            f"{when} {'' if when == 'memory' else f'{args.steps} batches '}of {args.batch}: "
            f"{own / 1e6:,.0f} MB of its own, {own / images:.2f} bytes an image; "
            f"{files / 1e6:,.0f} MB of mapped files"
        )
    print(f"{found['rate']:,.0f} images/s by {args.workers} core(s), order and labels included")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.large", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", choices=("head", "set"))
    parser.add_argument("--folder", default=None, help="where `set` writes some 800 MB")
    for flag, default in {"people": 10**6, "emb-size": 512, "batch": 512, "steps": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--images", type=int, default=42_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0)
    args = parser.parse_args(argv)
    print(", ".join(f"{k} {v}" for k, v in describe_machine(torch.device("cpu")).items()))
    (head if args.what == "head" else data_set)(args)


if __name__ == "__main__":
    main(sys.argv[1:])
