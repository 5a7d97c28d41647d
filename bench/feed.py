"""Time data_gen.py - records to batches on the device - against a usual DataLoader.

    python -m bench.feed --data data/faces_webface_112x112

Decodes into the cache on one core and on all, then makes batches from the cache: gathered,
mirrored and normalised. The baseline is a Dataset that decodes, mirrors and normalises one image at
a time, in a DataLoader with one worker per core. The JSON goes to bench/results/feed-<device>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.common import (
    Row,
    alternate,
    in_fresh_process,
    parse_arguments,
    peak_memory,
    print_and_save,
    speedup,
    synchronise,
    time_runs,
)
from bench.synthetic_inputs import records_or_synthetic
from data_gen import FACE_BYTES, ImageStore, Split, make_split, normalise, train_batches
from fileio.image_loader import load_images
from fileio.images import decode_image
from fileio.recordio import RecordReader
from utils import core_count, exit_on_user_error, keep_freed_memory

TRAIN_BATCH = 512
LOADER_BATCH = 128
MAX_IMAGES = 8192  # decoded in one run
CACHED = 16384  # images in the cache that batches are gathered from: 600 MB, more than CPUs cache


class SingleImages(Dataset):
    """One image at a time: decode, mirror at random, normalise, to a (3, 112, 112) tensor."""

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


def data_loader_rate(folder: Path, device: torch.device) -> float:
    """Images per second of a DataLoader."""
    count, began = 0, 0.0
    loader = DataLoader(
        SingleImages(folder),
        batch_size=LOADER_BATCH,
        shuffle=True,
        num_workers=core_count(),
        multiprocessing_context="fork",  # the file stays mapped
    )
    for images, _ in loader:
        images.to(device)
        if count == 0:  # starting the workers is not timed
            began = time.perf_counter()
        count += len(images)
        if count > MAX_IMAGES:
            break
    synchronise(device)
    return (count - LOADER_BATCH) / (time.perf_counter() - began)


def train_batches_rate(folder: Path, device: torch.device, cache: str) -> tuple[float, int]:
    """Images per second of train_batches after a first epoch, and peak bytes."""
    keep_freed_memory()
    reader = RecordReader(folder)
    faces = make_split(reader.labels, valid_fraction=0)
    store = ImageStore(reader, faces, device, cache=cache)
    batch_size = min(TRAIN_BATCH, len(faces.train))
    began, count = 0.0, 0
    for epoch in range(3 if cache != "none" else 2):
        if epoch == 1:
            synchronise(device)
            began = time.perf_counter()
        batches = train_batches(store, faces.train, batch_size=batch_size, seed=0, epoch=epoch)
        for batch in batches:
            count += len(batch.labels) if epoch else 0
    synchronise(device)
    return count / (time.perf_counter() - began), peak_memory(device)


def decoding_seconds(
    folder: Path, repeats: int
) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of decoding by OpenCV alone, by load_images on one core and on all; images."""
    cv2.setNumThreads(1)
    reader, cpu = RecordReader(folder), torch.device("cpu")
    count = min(len(reader), MAX_IMAGES)
    index = np.random.default_rng(0).permutation(len(reader))[:count]
    jpegs = [reader.encoded(int(i)) for i in index]
    plain = time_runs(lambda: [decode_image(jpeg) for jpeg in jpegs], cpu, repeats)
    one_core = time_runs(lambda: load_images(reader, index, workers=1), cpu, repeats)
    return plain, one_core, time_runs(lambda: load_images(reader, index), cpu, repeats), count


def batch_seconds(
    folder: Path, device: torch.device, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of gathering one batch with mirror images, and of normalising it."""
    keep_freed_memory()
    rng = np.random.default_rng(0)
    reader = RecordReader(folder)
    indices = np.arange(CACHED) % len(reader)  # a small set fills the cache several times over
    everything = Split(indices, reader.labels[indices], 1, np.arange(CACHED), np.arange(0))
    store = ImageStore(reader, everything, device, cache="gpu")  # on a CPU: in main memory
    positions, mirrored = rng.integers(0, CACHED, TRAIN_BATCH), rng.random(TRAIN_BATCH) < 0.5
    batch = store.fetch(positions, mirrored)
    gather = time_runs(lambda: store.fetch(positions, mirrored), device, 20 * repeats, 3)
    return gather, time_runs(lambda: normalise(batch), device, 20 * repeats, 3)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time the stages, then the loaders alternately."""
    args = parse_arguments("feed", __doc__, argv)
    with records_or_synthetic(args.data, 4096) as folder:
        plain, one_core, all_cores, count = in_fresh_process(decoding_seconds, folder, args.repeats)
        gather, norm = in_fresh_process(batch_seconds, folder, args.device, args.repeats)
        results = alternate(
            {
                "loader": (data_loader_rate, folder, args.device),
                "none": (train_batches_rate, folder, args.device, "none"),
                "auto": (train_batches_rate, folder, args.device, "auto"),
            },
            args.repeats,
        )
    loader = [1 / rate for rate in results["loader"]]  # seconds per image
    uncached = [1 / rate for rate, _ in results["none"]]
    cached = [1 / rate for rate, _ in results["auto"]]
    memory = max(peak for _, peak in results["auto"])
    read, written = FACE_BYTES, 4 * FACE_BYTES  # uint8 in, float32 out
    traffic = 3 * read + written
    rows = [
        Row("decode, OpenCV alone, one core", count, plain, cores=1),
        Row("decode into the cache, one core", count, one_core, cores=1),
        Row("decode into the cache, all cores", count, all_cores),
        Row("gather and mirror", TRAIN_BATCH, gather, bytes=2 * read),
        Row("normalise", TRAIN_BATCH, norm, bytes=read + written),
        Row("DataLoader, one image at a time", 1, loader),
        Row("train_batches, no cache", 1, uncached),
        Row("train_batches, from the cache", 1, cached, bytes=traffic, memory=memory),
    ]
    extra = {
        "from the cache, times the DataLoader": speedup(loader, cached),
        "without a cache, times the DataLoader": speedup(loader, uncached),
    }
    print_and_save(args, rows, extra)


if __name__ == "__main__":
    main(sys.argv[1:])
