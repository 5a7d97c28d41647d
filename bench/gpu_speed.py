"""How fast a GPU is: the speeds of bench.gpu.

Each takes a Context and the roofline, and yields rows: {"stage", "images_per_s", "floor" (images/s
that arithmetic allows at best, 0 where it is not counted), "peak_gb", "note"}.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.common import network_flops, time_runs, use_training_backends
from bench.gpu_parts import (
    DETECTOR_PACKAGES,
    ROOT,
    Context,
    Skipped,
    free_memory,
    read_faces,
    require_packages,
)
from data_gen import normalise
from utils import autocast_dtype, dtype_name, exact_float32, is_out_of_memory

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
ROWS_OF_TRAINING = 10
COMPILED = ("r50", "mobilefacenet")


def row(
    stage: str, images: int, seconds: list[float], floor: float = 0.0, note: str = ""
) -> dict[str, Any]:
    """A measured stage: `seconds` of runs of `images` images."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    rate = images / statistics.median(seconds)
    return {"stage": stage, "images_per_s": rate, "floor": floor, "peak_gb": peak, "note": note}


def align(context: Context, roofline: Roofline) -> Rows:
    """Detection by batch size; its floor depends on how many proposals there are."""
    require_packages(*DETECTOR_PACKAGES)
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
    """Eager steps of each network, in its usual precision."""
    networks = {"tiny": (8,)} if context.quick else TRAINED
    for network, sizes in networks.items():
        for size in sizes:
            measured = _step(context, network, size, "off", roofline)
            yield measured
            if not measured["images_per_s"]:
                break  # larger ones do not fit either


def train_compiled(context: Context, roofline: Roofline) -> Rows:
    """Compiled steps at the default batch size; last, because compiling takes minutes."""
    if context.quick:
        raise Skipped("--quick compiles nothing")
    failed = []  # a network that cannot be compiled does not stop the others
    for network in COMPILED:
        try:
            yield _step(context, network, 512, "on", roofline)
        except Exception as error:  # whatever the compiler raises
            failed.append(f"{network}: {error}"[:400])
    if failed:
        raise RuntimeError("; ".join(failed))


def _step_floor(context: Context, network: str, roofline: Roofline) -> float:
    """Images/s at which a training step could run at best."""
    peak = roofline[dtype_name(autocast_dtype(context.device))]
    return peak / (3 * network_flops(network) + CLASSES_FLOPS)


def _step(
    context: Context, network: str, size: int, compiled: str, roofline: Roofline
) -> dict[str, Any]:
    """A row of a training step; its rate is 0 if it does not fit into memory."""
    from bench.train import make_batch, make_engine

    free_memory()
    floor = _step_floor(context, network, roofline)
    stage = f"train {network}, batch {size}" + (", compiled" if compiled == "on" else "")
    use_training_backends()
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
    """Embeddings in float32 with mirror images, floor: two forward passes per face; both layouts.

    utils.conv_layout takes the contiguous one on a GPU, by what others have measured.
    """
    from evaluation.embedders import fold_batch_norm, torch_embedder
    from models import build_model

    count = 16 if context.quick else 2048
    faces = read_faces(context, count)
    for network in ("tiny",) if context.quick else ("r50", "mobilefacenet"):
        free_memory()
        model = build_model(network).to(context.device)
        embed = torch_embedder(model, context.device)
        seconds = time_runs(lambda embed=embed: embed(faces), context.device, 3)
        floor = roofline["float32"] / (2 * network_flops(network))
        yield row(f"evaluate {network}", count, seconds, floor)
        folded, images = fold_batch_norm(model), normalise(faces[:256].to(context.device))
        for layout in (torch.contiguous_format, torch.channels_last):
            folded.to(memory_format=layout)
            laid_out = images.contiguous(memory_format=layout)
            with torch.inference_mode(), exact_float32():
                seconds = time_runs(lambda f=folded, x=laid_out: f(x), context.device, 3)
            stage = f"forward {network}, float32, {layout}".replace("torch.", "")
            yield row(stage, len(images), seconds, 2 * floor)


def real_training(context: Context, roofline: Roofline, end: float) -> Rows:
    """The default recipe's first epochs on the faces until `end`; a row now and then.

    Not train.py itself, whose logs and plots need packages that such a machine may lack.
    """
    from config import Config
    from data_gen import steps_per_epoch, train_batches
    from train import build_engine, open_data
    from training.dataset import cache_images
    from training.engine import choose_compile
    from utils import seed_everything

    free_memory()
    seed_everything(0)
    use_training_backends()
    batch_size = 8 if context.quick else 512
    cfg = Config(network=context.network, batch_size=batch_size, train_set=str(context.faces))
    store, split = open_data(cfg, context.device)
    cache_images(store, split.train, "auto")
    steps = steps_per_epoch(len(split.train), batch_size)
    compiled = choose_compile("off" if context.quick else "auto", context.device, 32 * steps)
    engine = build_engine(replace(cfg, compile=compiled), split.num_classes, context.device)
    engine.train()
    floor = _step_floor(context, context.network, roofline)
    pause = max((end - time.perf_counter()) / ROWS_OF_TRAINING, 0)
    step, losses, began = 0, [], time.perf_counter()
    for epoch in itertools.count():
        batches = train_batches(store, split.train, batch_size=batch_size, seed=0, epoch=epoch)
        with contextlib.closing(batches):
            for batch in batches:
                losses.append(engine.train_step(batch.images, batch.labels, cfg.lr, step).loss)
                step += 1
                if time.perf_counter() < began + pause:
                    continue
                loss = float(torch.stack(losses).mean())  # waits for the GPU: the time is whole
                now = time.perf_counter()
                images, stage = len(losses) * batch_size, f"train on the faces, step {step}"
                yield row(stage, images, [now - began], floor, f"loss {loss:.3f}")
                losses, began = [], now
                if now > end - pause:
                    return


SPEEDS = (align, feed, train, evaluation, train_compiled)
