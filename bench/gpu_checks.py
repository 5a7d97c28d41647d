"""Whether a GPU computes what a CPU does: the checks of bench.gpu.

Each takes a Context and returns numbers for the JSON; it raises AssertionError if it does not
hold, Skipped or ImportError if it cannot run here. Bounds are for full float32: rounding alone
moves cosines by 1e-6 and a gradient by 1e-4 of its length, TF32 by a hundred times that.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch

from bench.common import without_tf32
from bench.gpu_group import LR, group_losses
from bench.gpu_parts import (
    CPU,
    DETECTOR_PACKAGES,
    ROOT,
    TRAIN_PACKAGES,
    Context,
    Skipped,
    expect,
    free_memory,
    read_faces,
    require_packages,
    run_script,
)

LIMIT = 3e9  # bytes that out_of_memory may take


def _same_batch(context: Context, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    from bench.train import make_batch

    return make_batch(context.batch, device)


def _engine(context: Context, device: torch.device, **settings: Any) -> Any:
    """An engine in training mode; eager unless asked otherwise."""
    from bench.train import make_engine

    settings = {"compile": "off", **settings}
    engine = make_engine(context.network, context.batch, device, **settings)
    engine.train()
    return engine


def detections(context: Context) -> dict[str, Any]:
    """MTCNN on the GPU and on the CPU: the same statuses, points within 0.05 pixels."""
    require_packages(*DETECTOR_PACKAGES)
    import cv2

    from preprocessing.detector import FaceDetector, find_face

    paths = sorted((ROOT / "images/demo").glob("*_raw.jpg"))
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) for path in paths]
    images = [image for image in images if image.shape == images[0].shape]
    stack = np.stack(images[:2] if context.quick else images)
    results = [find_face(FaceDetector(device), stack) for device in (CPU, context.device)]
    pairs = list(zip(*results, strict=True))
    differ = sum(a.status != b.status for a, b in pairs)
    both = [(a, b) for a, b in pairs if a.points is not None and b.points is not None]
    distance = max((float(np.abs(a.points - b.points).max()) for a, b in both), default=0.0)
    result = {"images": len(stack), "statuses that differ": differ, "pixels apart": distance}
    return expect(differ == 0 and distance < 0.05 and bool(both), result)


def embeddings(context: Context) -> dict[str, Any]:
    """The scores of evaluation, float32: cosines of all pairs of faces within 1e-4."""
    from evaluation.embedders import torch_embedder

    engine = _engine(context, CPU)
    with torch.no_grad():  # running statistics that are not those of an untrained network
        engine.model(_same_batch(context, CPU)[0])
    faces, model = read_faces(context, context.batch), engine.model.eval()
    cpu = torch_embedder(copy.deepcopy(model), CPU)(faces)
    gpu = torch_embedder(model.to(context.device), context.device)(faces)
    difference = float((cpu @ cpu.T - gpu @ gpu.T).abs().max())
    return expect(difference < 1e-4, {"cosines apart": difference})


def gradients(context: Context) -> dict[str, Any]:
    """Loss and gradient of one float32 step: relative differences under 1e-4 and 1e-2."""
    results = []
    for device in (CPU, context.device):
        engine = _engine(context, device, amp=False, dropout=0.0)
        images, labels = _same_batch(context, device)
        with without_tf32():
            loss = engine.loss(images, labels, context.batch).loss
            loss.backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in engine.parameters])
        results.append((loss.item(), gradient))
    (loss, gradient), (gpu_loss, gpu_gradient) = results
    apart = {
        "loss": abs(gpu_loss - loss) / loss,
        "gradient": float((gpu_gradient - gradient).norm() / gradient.norm()),
    }
    return expect(apart["loss"] < 1e-4 and apart["gradient"] < 1e-2, apart)


def losses(context: Context) -> dict[str, Any]:
    """Losses of 20 float32 steps on one batch: within 2 % of the first one, and falling.

    The learning rate is low: with a high one any rounding grows from step to step.
    """
    curves = []
    for device in (CPU, context.device):
        engine = _engine(context, device, amp=False, dropout=0.0)
        images, labels = _same_batch(context, device)
        with without_tf32():
            steps = range(3 if context.quick else 20)
            curve = [engine.train_step(images, labels, LR / 10, i).loss for i in steps]
        curves.append([float(loss) for loss in curve])
    apart = max(abs(a - b) / curves[0][0] for a, b in zip(*curves, strict=True))
    result = {"cpu": curves[0], "gpu": curves[1], "apart": apart}
    return expect(apart < 0.02 and curves[1][-1] < curves[1][0], result)


def resume(context: Context) -> dict[str, Any]:
    """Two steps, a state that is loaded, two more: the weights of four steps in a row.

    Kernels that add in any order may differ in the last bits; the difference is then recorded.
    """
    settings = {"ema": 0.9, "dropout": 0.4}
    engine = _engine(context, context.device, **settings)
    images, labels = _same_batch(context, context.device)
    for step in range(2):
        engine.train_step(images, labels, LR, step)
    state, random = copy.deepcopy(engine.state_dict()), torch.cuda.get_rng_state(context.device)
    for step in range(2, 4):
        engine.train_step(images, labels, LR, step)
    again = _engine(context, context.device, **settings)
    again.load_state_dict(state, context.work / "last.pt")
    torch.cuda.set_rng_state(random, context.device)
    for step in range(2, 4):
        again.train_step(images, labels, LR, step)
    pairs = list(zip(engine.parameters, again.parameters, strict=True))
    difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return expect(difference < 1e-3, {"bit for bit": difference == 0, "difference": difference})


def _in_group(context: Context, processes: int, sample_rate: float = 1.0) -> dict[str, Any]:
    """Losses of three steps in one process and in a group that torchrun starts, and how far apart.

    Without NCCL, or with fewer GPUs than processes, it is skipped.
    """
    if not torch.distributed.is_nccl_available():
        raise Skipped("this PyTorch has no NCCL")
    if torch.cuda.device_count() < processes:
        raise Skipped("this machine has one GPU")
    settings = {"network": context.network, "images": context.batch, "sample_rate": sample_rate}
    path = context.work / "losses.json"
    single = group_losses(context.device, **settings)
    arguments = (str(path), context.network, str(context.batch), str(sample_rate))
    run_script(context, "-m", "bench.gpu_group", *arguments, timeout=600, processes=processes)
    group = json.loads(path.read_text())
    apart = max(abs(a - b) / single[0] for a, b in zip(single, group, strict=True))
    return expect(apart < 0.01, {"alone": single, "group": group, "apart": apart})


def partial_fc(context: Context) -> dict[str, Any]:
    """Class shards in a group of one process over NCCL: the losses of a process without a group.

    Half of the classes are sampled, without which one process has no class shards.
    """
    return _in_group(context, 1, sample_rate=0.5)


def two_processes(context: Context) -> dict[str, Any]:
    """Two processes, each with half the batch on a GPU of its own: the losses of one process."""
    return _in_group(context, 2)


def out_of_memory(context: Context) -> dict[str, Any]:
    """A step that does not fit in 3 GB: recognised, and what the sentence names does fit."""
    from bench.train import make_engine
    from training.gpu_memory import advise_on_memory, measure_step_memory
    from utils import is_out_of_memory

    size, network = (65536, "tiny") if context.quick else (4096, context.network)

    engine = make_engine(network, size, context.device, compile="off")
    engine.train()
    total = torch.cuda.mem_get_info(context.device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total), context.device)
    try:
        try:
            engine.trial_step(size)
            return expect(False, {"fits": size})
        except RuntimeError as error:
            result: dict[str, Any] = {"error": str(error)[:200], "type": type(error).__name__}
            recognised = is_out_of_memory(error)
        needs = measure_step_memory(engine)
        if needs is not None:  # it measures the whole GPU, not the limit set here
            needs = needs._replace(total=min(total, int(LIMIT)))
        result["advice"] = advise_on_memory(
            needs, batch_size=size, accumulate=1, lr=0.1, checkpointing=False
        )
        expect(recognised and needs is not None and needs.images >= 2, result)
        result["images that fit"] = min(needs.images, size)
        engine.trial_step(result["images that fit"])  # fails if the advice is wrong
        return result
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, context.device)
        del engine
        free_memory()


def no_waits(context: Context) -> dict[str, Any]:
    """Steps in which the host waits for the GPU, by PyTorch's own check: none."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "EMA, clipping, accumulation": {"ema": 0.9, "clip_norm": 5.0, "accumulate": 2},
        "sampled classes": {"sample_rate": 0.5},
    }
    waits = {}
    for name, settings in variants.items():
        engine = _engine(context, context.device, **settings)
        images, labels = _same_batch(context, context.device)
        engine.train_step(images, labels, LR, 0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.train_step(images, labels, LR, 1)
        except RuntimeError as error:
            waits[name] = str(error)[:200]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return expect(not waits, {"variants": len(variants), "waits": waits})


def scripts(context: Context) -> dict[str, Any]:
    """train.py for an epoch on the pack of faces, in a process of its own, on the GPU."""
    if context.launcher == "none":
        raise Skipped("--launcher none")
    require_packages(*TRAIN_PACKAGES)
    said = run_script(
        context,
        *("train.py", "--device", "cuda", "--train-set", str(context.faces), "--network", "tiny"),
        *("--epochs", "1", "--batch-size", "32", "--compile", "off"),
        *("--runs-dir", str(context.work / "runs"), "--images-dir", str(context.work / "images")),
        *("--data-dir", str(context.work / "data")),
        timeout=240,
    )
    return {"last line": said.strip().splitlines()[-1]}


CHECKS = (
    *(detections, embeddings, gradients, losses, resume, partial_fc, two_processes),
    *(out_of_memory, no_waits, scripts),
)
