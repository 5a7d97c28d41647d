"""How fast a GPU is: the speeds of bench.gpu.

Each takes a Context and the roofline, and yields rows: {"stage", "images_per_s", "floor" (images/s
that arithmetic allows at best, 0 where it is not counted), "peak_gb", "note"}.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.common import network_flops, time_runs
from bench.gpu_parts import ROOT, Context, free_memory, read_faces, require_packages
from utils import autocast_dtype, dtype_name, is_out_of_memory

Rows = Iterator[dict[str, Any]]
Roofline = dict[str, float]
CLASSES_FLOPS = 6 * 512 * 10572  # of the head, forward and backward, per image

# Networks and batch sizes, largest last: a size that does not fit ends its network.
TRAINED = {
    "r18": (512,),
    "r50": (64, 128, 256, 512, 1024),
    "r100": (128, 512),
    "mobilefacenet": (512,),
}


def row(
    stage: str, images: int, seconds: list[float], floor: float = 0.0, note: str = ""
) -> dict[str, Any]:
    """A measured stage: `seconds` of runs of `images` images."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    rate = images / statistics.median(seconds)
    return {"stage": stage, "images_per_s": rate, "floor": floor, "peak_gb": peak, "note": note}


def align(context: Context, roofline: Roofline) -> Rows:
    """Detection by batch size; its floor depends on how many proposals there are."""
    require_packages("mtcnn", "joblib", "lz4")
    import cv2

    from preprocessing.detector import FaceDetector, find_face

    path = sorted((ROOT / "images/demo").glob("*_raw.jpg"))[0]
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    detector = FaceDetector(context.device)
    for size in (2,) if context.quick else (64, 256):
        free_memory()
        images = np.repeat(image[None], size, 0)
        seconds = time_runs(lambda images=images: find_face(detector, images), context.device, 3)
        yield row(f"detection, batch {size}", size, seconds)


def feed(context: Context, roofline: Roofline) -> Rows:
    """Batches of the faces from both caches; floor of the GPU's: the bytes that a batch moves."""
    from bench.feed import train_batches_rate

    bytes_per_image = 7 * 112 * 112 * 3  # read, gathered and read again; written as float32
    for cache in ("gpu", "ram"):
        free_memory()
        rate, _ = train_batches_rate(context.faces, context.device, cache)
        floor = roofline["bytes"] / bytes_per_image if cache == "gpu" else 0.0
        yield row(f"feed, cache {cache}", 1, [1 / rate], floor)


def train(context: Context, roofline: Roofline) -> Rows:
    """Steps of each network, eager and compiled, in its usual precision."""
    peak = roofline[dtype_name(autocast_dtype(context.device))]
    failed = []  # one configuration that fails does not stop the others
    networks = {"tiny": (8,)} if context.quick else TRAINED
    for network, sizes in networks.items():
        floor = peak / (3 * network_flops(network) + CLASSES_FLOPS)
        for size in sizes:
            measured = _step(context, network, size, "off", floor)
            yield measured
            if not measured["images_per_s"]:
                break  # larger ones do not fit either
            # Compiling takes minutes, so only the default batch size is compiled.
            if size == 512 and network in ("r50", "mobilefacenet"):
                try:
                    yield _step(context, network, size, "on", floor)
                except Exception as error:  # whatever the compiler raises
                    failed.append(f"{network}, batch {size}, compiled: {error}"[:400])
    if failed:
        raise RuntimeError("; ".join(failed))


def _step(context: Context, network: str, size: int, compiled: str, floor: float) -> dict[str, Any]:
    """A row of a training step; its rate is 0 if it does not fit into memory."""
    from bench.train import make_batch, make_engine

    free_memory()
    stage = f"train {network}, batch {size}" + (", compiled" if compiled == "on" else "")
    torch.backends.cudnn.benchmark = True
    try:
        engine = make_engine(network, size, context.device, compile=compiled)
        engine.train()
        images, labels = make_batch(size, context.device)
        began = time.perf_counter()
        engine.train_step(images, labels, 0.01, 0)
        torch.cuda.synchronize()
        note = f"first step {time.perf_counter() - began:.1f} s"
        seconds = time_runs(
            lambda: engine.train_step(images, labels, 0.01, 1),
            context.device,
            1 if context.quick else 10,
            warm_up=0 if context.quick else 3,
        )
        return row(stage, size, seconds, floor, note)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return row(stage, 0, [1.0], floor, "does not fit")


def evaluation(context: Context, roofline: Roofline) -> Rows:
    """Embeddings in float32 with mirror images; floor: two forward passes per face."""
    from evaluation.embedders import torch_embedder
    from models import build_model

    count = 16 if context.quick else 2048
    faces = read_faces(context, count)
    for network in ("tiny",) if context.quick else ("r50", "mobilefacenet"):
        free_memory()
        model = build_model(network).to(context.device, memory_format=torch.channels_last)
        embed = torch_embedder(model, context.device)
        seconds = time_runs(lambda embed=embed: embed(faces), context.device, 3)
        floor = roofline["float32"] / (2 * network_flops(network))
        yield row(f"evaluate {network}", count, seconds, floor)


SPEEDS = (align, feed, train, evaluation)
