"""The cost of a million identities, and of WebFace42M's 42 million images, in one process.

    python -m bench.large head --identities 1000000     # the classifier: seconds and memory
    python -m bench.large set --images 42000000         # the data set: start-up, memory, images/s

`head` runs steps of Partial FC - loss, gradient, SGD - on random embeddings, and prints a table of
its computed memory beside the memory that the process took. `set` makes a sharded set of so many
images, 50,000 per shard, with labels up to --identities: all shards are links to one file of
synthetic faces, but each has its own index. So start-up, shuffling and the index are those of a set
of that size, and decoding is real; only reading is not, since it comes from the page cache.
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

from bench.common import describe_machine, in_fresh_process, peak_memory
from bench.synthetic_inputs import records_or_synthetic
from fileio.recordio import RecordReader
from fileio.shards import INDEX_DTYPE, ShardReader, write_shards
from heads.partial_fc import CHUNK, PartialFC
from heads.softmax_margins import ArcFace
from training.sharded_dataset import ShardOrder, ShardStore
from utils import exit_on_user_error, keep_freed_memory

IMAGES_PER_SHARD = 50_000


def head_memory(
    identities: int, emb_size: int, ranks: int, rate: float, batch: int
) -> dict[str, int]:
    """Bytes of one process's class shard by use: weight, momentum, gradient, chunk of logits.

    Below a rate of 1 the sampled centres, their gradient and their momentum are copies of the
    sampled rows; at 1 there is the gradient only, as large as the class shard.

    Example: 1,000,000 identities of dimension 512 are 2.05 GB of float32; at a rate of 1 weight,
    momentum and gradient together are 6.1 GB, at 0.1 they are 4.1 + 3 x 0.2 = 4.7 GB.
    """
    shard = -(-identities // ranks) * emb_size * 4
    sampled = int(3 * rate * shard) if rate < 1 else shard
    # Six arrays of logits (margin, softmax, gradients) and five of centres (normalised, gradients).
    classes = min(CHUNK // max(batch, emb_size), int(-(-identities // ranks) * rate))
    chunk = 4 * classes * (6 * batch + 5 * emb_size)
    return {"weight": shard, "momentum": shard, "gradient": sampled, "chunk": chunk}


def print_head_table(emb_size: int, batch: int) -> None:
    """GB per process for 1, 10 and 100 million identities."""
    print(f"GB per process, computed (float32, embedding dimension {emb_size}, batch {batch}):")
    print(f"{'identities':>12} {'processes':>9} {'rate':>5} {'weight':>8} {'momentum':>8} "
          f"{'gradient':>8} {'chunk':>6} {'all':>8}")  # fmt: skip
    for identities in (10**6, 10**7, 10**8):
        for ranks in (1, 8, 64):
            for rate in (1.0, 0.1):
                memory = head_memory(identities, emb_size, ranks, rate, batch)
                numbers = [memory[name] / 1e9 for name in ("weight", "momentum", "gradient")]
                line = f"{identities:12,} {ranks:9} {rate:5} " + " ".join(
                    f"{n:8.2f}" for n in numbers
                )
                print(f"{line} {memory['chunk'] / 1e9:6.2f} {sum(memory.values()) / 1e9:8.2f}")


def measure_head(identities: int, emb_size: int, rate: float, batch: int, steps: int) -> dict:
    """Peak memory above that of the process before, and seconds per step."""
    keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    before = peak_memory(torch.device("cpu"))
    margin = ArcFace(emb_size, 0).margin
    head = PartialFC(emb_size, identities, margin, sample_rate=rate)
    optimizer = torch.optim.SGD([head.weight], lr=0.1, momentum=0.9, fused=True)
    made, seconds = peak_memory(torch.device("cpu")), []
    for step in range(steps):
        embedding = torch.randn(batch, emb_size, requires_grad=True)
        label = torch.randint(0, identities, (batch,))
        began = time.perf_counter()
        optimizer.zero_grad()
        head.sample(label, batch, step)
        head.loss(embedding, label, nn.CrossEntropyLoss(), batch).loss.backward()
        optimizer.step()
        head.update(optimizer)
        seconds.append(time.perf_counter() - began)
    peak = peak_memory(torch.device("cpu"))
    return {"weight": made - before, "peak": peak - before, "seconds": seconds}


def run_head(args: argparse.Namespace) -> None:
    """Print the table of computed memory, and one measurement."""
    print_head_table(args.emb_size, args.batch)
    work = (args.identities, args.emb_size, args.rate, args.batch, args.steps)
    measured = in_fresh_process(measure_head, *work)
    computed = head_memory(args.identities, args.emb_size, 1, args.rate, args.batch)
    print(
        f"measured: {args.identities:,} identities, embedding dimension {args.emb_size}, rate "
        f"{args.rate}, batch {args.batch}: peak {measured['peak'] / 1e9:.2f} GB (computed "
        f"{sum(computed.values()) / 1e9:.2f}), {min(measured['seconds']):.2f} s per step; all "
        f"logits at once would take {args.batch * args.identities * 4 / 1e9:.2f} GB per copy"
    )


# ------------------------------------------------------------------------------ the data set


def make_sharded_set(folder: Path, images: int, identities: int) -> None:
    """Shards that are links to one file of synthetic faces, an index for each, and property."""
    shards = -(-images // IMAGES_PER_SHARD)
    with records_or_synthetic(None, 2048) as synthetic:
        reader = RecordReader(synthetic)
        jpegs = [reader.encoded(i % len(reader)) for i in range(IMAGES_PER_SHARD)]
    labels = np.linspace(0, identities - 1, IMAGES_PER_SHARD).astype(np.int64)
    write_shards(folder / "one", jpegs, labels, 1)
    record, index = (folder / "one" / f"train-00000.{kind}" for kind in ("rec", "npy"))
    for number in range(shards):
        (folder / f"train-{number:05d}.rec").symlink_to(record)
        shutil.copyfile(index, folder / f"train-{number:05d}.npy")
    (folder / "property").write_text(f"{identities},112,112")


def resident_memory() -> dict[str, int]:
    """Resident bytes of this process: its own ("Anon"), and of mapped files ("File")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":") for line in lines if line.startswith("Rss"))
    return {kind: int(values[f"Rss{kind}"].split()[0]) * 1024 for kind in ("Anon", "File")}


def measure_set(folder: Path, batch: int, steps: int, workers: int) -> dict:
    """Start-up, memory and speed of one process that reads the whole set."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    torch.set_num_threads(1)
    before, began = resident_memory(), time.perf_counter()
    reader = ShardReader(folder)
    order = ShardOrder(reader.starts, batch, seed=0, valid_every=50)
    store = ShardStore(reader, order, torch.device("cpu"), workers)
    held_out = order.validation()
    start = time.perf_counter() - began
    opened = resident_memory()
    lanes, seconds = slice(0, order.lanes), []
    for step in range(steps + 4):
        began = time.perf_counter()
        positions, mirrored = order.batch(0, step, lanes)
        store.fetch(positions, mirrored)
        store.labels_of(positions)
        if step >= 4:  # the first ones open files and fill queues
            seconds.append(time.perf_counter() - began)
    fed = resident_memory()
    return {
        "images": len(reader),
        "held_out": len(held_out),
        "start": start,
        "memory": {kind: opened[kind] - before[kind] for kind in before},
        "memory_after": {kind: fed[kind] - before[kind] for kind in before},
        "rate": batch * steps / sum(seconds),
    }


def run_data_set(args: argparse.Namespace) -> None:
    """Make the set, measure, print, delete it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        make_sharded_set(folder, args.images, args.identities)
        made = time.perf_counter() - began
        index = sum(path.stat().st_size for path in folder.glob("*.npy"))
        measured = in_fresh_process(measure_set, folder, args.batch, args.steps, args.workers)
    images = measured["images"]
    print(
        f"{images:,} images of {args.identities:,} identities in {-(-images // IMAGES_PER_SHARD)} "
        f"shards, made in {made:.1f} s; index {INDEX_DTYPE.itemsize} bytes per image, "
        f"{index / 1e6:,.0f} MB\n"
        f"start-up: {measured['start']:.2f} s, {measured['held_out']:,} images held out"
    )
    moments = {
        "memory after start-up": measured["memory"],
        f"memory after {args.steps} batches of {args.batch}": measured["memory_after"],
    }
    for moment, memory in moments.items():
        print(
            f"{moment}: {memory['Anon'] / 1e6:,.0f} MB of its own, "
            f"{memory['Anon'] / images:.2f} bytes per image; {memory['File'] / 1e6:,.0f} MB of "
            "mapped files"
        )
    rate = measured["rate"]
    print(f"{rate:,.0f} images/s on {args.workers} core(s), shuffling and labels included")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Measure the head or the data set."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.large", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", choices=("head", "set"), help="what is measured")
    parser.add_argument("--folder", help="where `set` writes some 800 MB (default: temporary)")
    for flag, default, meaning in (
        ("identities", 10**6, "classes"),
        ("emb-size", 512, "embedding dimension"),
        ("batch", 512, "batch size"),
        ("steps", 3, "steps measured"),
        ("images", 42_000_000, "images of the set"),
        ("workers", 1, "threads that decode, and cores"),
    ):
        parser.add_argument(
            f"--{flag}", type=int, default=default, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--rate", type=float, default=1.0, help="fraction of centres sampled (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    print(", ".join(f"{k} {v}" for k, v in describe_machine(torch.device("cpu")).items()))
    if args.what == "head":
        run_head(args)
    else:
        run_data_set(args)


if __name__ == "__main__":
    main(sys.argv[1:])
