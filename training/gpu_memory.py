"""How much GPU memory a training step takes: measured on small steps.

    cache = choose_training_cache("auto", store, build_engine, images=512)    # before training
    needs = measure_step_memory(engine)               # once a step has run out of memory
    needs.images                                      # how many at a time should fit
    advise_on_memory(needs, batch_size=512, accumulate=1, lr=0.1, checkpointing=False)

Dividing what was in use by the batch would not do: when memory runs out that is about all of the
GPU's memory, however much the batch needs. And a step that has run out of memory cannot be repeated
with a smaller cache: in a group the other processes are in the middle of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch

from data_gen import FACE_BYTES, ImageStore, choose_cache
from distributed.collectives import any_rank
from distributed.process_group import world_size
from training.engine import Engine
from utils import is_out_of_memory

# PyTorch's allocator holds up to a fifth more than tensors take (r50 at 512: 20.6 GB for 17.6).
USABLE = 0.8
TRIALS = (8, 16)  # images


class StepMemory(NamedTuple):
    """What a step takes of a GPU's memory, in bytes, and what there is."""

    fixed: float  # whatever the batch: a cache of images, weights, gradients, momentum
    per_image: float
    total: float  # that this process can have

    @property
    def images(self) -> int:
        """How many images a step should have memory for, 0 if none.

        16 GiB, 1.8 of them fixed and 1/32 for each image: (0.8 * 16 - 1.8) * 32 = 352.
        """
        return max(0, int((USABLE * self.total - self.fixed) / max(self.per_image, 1)))

    def left_by(self, images: int) -> float:
        """The bytes that a step on so many images leaves to others.

        40 GB, of which r100 at 512 images takes 27.7 GB: 40 - 27.7 / 0.8 = 5.4 GB.
        """
        return self.total - (self.fixed + images * self.per_image) / USABLE


def free_gpu_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that the driver has free, None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def measure_step_memory(engine: Engine) -> StepMemory | None:
    """Run small steps, and extrapolate; the engine's weights are of no use afterwards.

    Every process of a group must call it. None if it cannot be measured: without a GPU, or if not
    even the small steps fit.
    """
    if engine.device.type != "cuda":
        return None
    engine.optimizer.zero_grad()
    gc.collect()  # what the failed step has left in reference cycles
    torch.cuda.empty_cache()
    try:
        engine.trial_step(TRIALS[0])  # the momentum, which the first step of a run creates
        small, large = (_peak_of_step(engine, count) for count in TRIALS)
    except RuntimeError as error:
        if not is_out_of_memory(error) or world_size() > 1:
            raise  # in a group the others are in the middle of the step
        return None
    per_image = (large - small) / (TRIALS[1] - TRIALS[0])
    total = torch.cuda.mem_get_info(engine.device)[0] + torch.cuda.memory_reserved(engine.device)
    return StepMemory(small - TRIALS[0] * per_image, per_image, total)


def _peak_of_step(engine: Engine, count: int) -> int:
    """The most bytes that tensors take at one moment of a step on `count` images."""
    torch.cuda.reset_peak_memory_stats(engine.device)
    engine.trial_step(count)
    return torch.cuda.max_memory_allocated(engine.device)


def choose_training_cache(
    asked: str, store: ImageStore, build_engine: Callable[[], Engine], images: int
) -> str:
    """Where a run caches its images: where --cache says, or for "auto" where a step has room too.

    `images` is how many a process computes at a time. If the GPU could hold the set, small steps
    of an engine, built for them, tell what else it has to hold. Every process must call it.
    """
    if asked != "auto" or not store.can_cache:
        return asked
    size, room, device = len(store.indices) * FACE_BYTES, 0.0, store.device
    fits_alone = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0]
    if not any_rank(not fits_alone)[0]:
        needs = measure_step_memory(build_engine())
        gc.collect()  # an engine is part of reference cycles
        torch.cuda.empty_cache()
        room = needs.left_by(images) if needs is not None else 0.0
    cache = choose_cache(len(store.indices), device, room)
    if room and cache != "gpu":
        print(
            f"Beside a training step the GPU has {max(room, 0) / 2**30:.2f} GiB left, the images "
            f"take {size / 2**30:.2f} GiB; cache: {cache}."
        )
    return cache


def advise_on_memory(
    needs: StepMemory | None, *, batch_size: int, accumulate: int, lr: float, checkpointing: bool
) -> str:
    """Settings with which a step needs less memory, as a sentence; best first.

    `checkpointing` says that the run has --checkpoint-activations already.
    """
    if needs is not None and needs.images < 2:
        return "Not even two images would fit; take a smaller --network."
    measured, images = "", -(-batch_size // accumulate) // 2  # unless measured, half of what failed
    if needs is not None:
        images = min(needs.images, max(images * 2 - 1, 2))  # what failed is not proposed again
        measured = (
            f"A step takes {needs.fixed / 2**30:.2f} GiB and {needs.per_image / 2**20:.1f} MiB per "
            f"image, so {images} images at a time should fit. "
        )
    ways = []
    parts = -(-batch_size // max(images, 1))
    if images >= 2 and batch_size // parts >= 2:
        ways.append(f"--accumulate {parts}, which keeps the batch size and the learning rate")
    if not checkpointing:
        ways.append("--checkpoint-activations, with which the run can also be resumed")
    smaller = 1 << (images.bit_length() - 1) if images else 0  # a power of two
    if 2 <= smaller < batch_size:
        ways.append(f"--batch-size {smaller} with --lr {lr * smaller / batch_size:g}")
    ways = ways or ["a smaller --network"]
    return f"{measured}Take {', or '.join(ways)}."
