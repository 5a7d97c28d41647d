"""Time data_gen.py - records to device batches - against a straightforward DataLoader.

    python -m bench.feed --data data/faces_webface_112x112

decodes into the cache on one core and on all, then makes batches from it: gathered, mirrored, and
normalised.  The straightforward loader is a Dataset that decodes, mirrors and normalises an image
at a time, under a DataLoader with one worker a core.  The JSON goes to
bench/results/feed-<device>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.common import (
    Row,
    alone,
    arguments,
    clock,
    finish,
    in_turn,
    peak_memory,
    ratio,
    synchronise,
)
from bench.synthetic_inputs import drawn_records
from data_gen import FACE_BYTES, ImageStore, load_images, normalise, split, train_batches
from fileio.images import decode_image
from fileio.recordio import RecordReader
from utils import core_count, exit_on_user_error, keep_freed_memory

BATCH = 512


class Straightforward(Dataset):
    """An image at a time: decode, mirror by chance, normalise, to a (3, 112, 112) tensor."""

    def __init__(self, folder: Path) -> None:
        self.reader = RecordReader(folder)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = cv2.imdecode(np.frombuffer(self.reader.encoded(i), np.uint8), 1)[:, :, ::-1]
        if np.random.random() < 0.5:
            image = image[:, ::-1]
        image = (image.transpose(2, 0, 1).astype(np.float32) - 127.5) / 127.5
        return torch.from_numpy(image), int(self.reader.labels[i])


def straightforward(folder: Path, device: torch.device) -> float:
    """Images/s of a DataLoader over at most 8,192 images."""
    count, began = 0, 0.0
    workers = core_count()
    loader = DataLoader(
        Straightforward(folder),
        batch_size=128,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="fork",  # the file stays mapped
    )
    for images, _ in loader:
        images.to(device)
        if count == 0:  # starting the workers does not count
            began = time.perf_counter()
        count += len(images)
        if count > 8192:
            break
    synchronise(device)
    return (count - 128) / (time.perf_counter() - began)


def ours(folder: Path, device: torch.device, cache: str) -> tuple[float, int]:
    """Images/s of two epochs of train_batches after a first, and peak bytes."""
    keep_freed_memory()
    reader = RecordReader(folder)
    faces = split(reader.labels, valid_fraction=0)
    store = ImageStore(reader, faces, device, cache=cache)
    batch = min(BATCH, len(faces.train))
    began, count = 0.0, 0
    for epoch in range(3 if cache != "none" else 2):
        if epoch == 1:
            synchronise(device)
            began = time.perf_counter()
        batches = train_batches(store, faces.train, batch_size=batch, seed=0, epoch=epoch)
        for made in batches:
            count += len(made.labels) if epoch else 0
    synchronise(device)
    return count / (time.perf_counter() - began), peak_memory(device)


def decoding(folder: Path, repeats: int) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of decoding: by OpenCV alone, by load_images on one core, and on all; images."""
    cv2.setNumThreads(1)
    reader, cpu = RecordReader(folder), torch.device("cpu")
    count = min(len(reader), 8192)
    index = np.random.default_rng(0).permutation(len(reader))[:count]
    jpegs = [reader.encoded(int(i)) for i in index]
    plain = clock(lambda: [decode_image(jpeg) for jpeg in jpegs], cpu, repeats)
    one = clock(lambda: load_images(reader, index, workers=1), cpu, repeats)
    return plain, one, clock(lambda: load_images(reader, index), cpu, repeats), count


def steps(device: torch.device, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of gathering one batch with mirror images, and of normalising it."""
    keep_freed_memory()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16384, 112, 112, 3), dtype=np.uint8)
    store = object.__new__(ImageStore)
    store.device, store.images = device, torch.from_numpy(images).to(device)
    store.workers = core_count()
    store.pool = ThreadPoolExecutor(store.workers)
    positions, mirrored = rng.integers(0, 16384, BATCH), rng.random(BATCH) < 0.5
    batch = store.fetch(positions, mirrored)
    gather = clock(lambda: store.fetch(positions, mirrored), device, 20 * repeats, 3)
    return gather, clock(lambda: normalise(batch), device, 20 * repeats, 3)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time the stages and the loaders in turn."""
    args = arguments("feed", __doc__, argv)
    with drawn_records(args.data, 4096) as folder:
        plain, one, every, count = alone(decoding, folder, args.repeats)
        gather, norm = alone(steps, args.device, args.repeats)
        found = in_turn(
            {
                "loader": (straightforward, folder, args.device),
                "none": (ours, folder, args.device, "none"),
                "auto": (ours, folder, args.device, "auto"),
            },
            args.repeats,
        )
    read, written = FACE_BYTES, 4 * FACE_BYTES
    loops = {name: [1 / rate for rate in found[name]] for name in ("loader",)}
    loops |= {name: [1 / rate for rate, _ in found[name]] for name in ("none", "auto")}
    memory = max(bytes for _, bytes in found["auto"])
    rows = [
        Row("decode, OpenCV alone, one core", count, plain, cores=1),
        Row("decode into the cache, one core", count, one, cores=1),
        Row("decode into the cache, all cores", count, every),
        Row("gather and mirror", BATCH, gather, bytes=2 * read),
        Row("normalise", BATCH, norm, bytes=read + written),
        Row("DataLoader, straightforward", 1, loops["loader"]),
        Row("train_batches, no cache", 1, loops["none"]),
        Row("train_batches, from the cache", 1, loops["auto"], bytes=3 * read + written),
    ]
    rows[-1].memory = memory
    finish(
        args,
        rows,
        {
            "from the cache, times the DataLoader": ratio(loops["loader"], loops["auto"]),
            "without a cache, times the DataLoader": ratio(loops["loader"], loops["none"]),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
