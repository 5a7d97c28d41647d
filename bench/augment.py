"""Time augmentation of batches on the device, and the fraction of a training step that it takes.

    python -m bench.augment                                 # beside r50's step of 32 images
    python -m bench.augment --network tiny --batch 128

A single transform is timed on every image of a batch; a policy applies its transforms at random, as
in training, so that a slow transform of few images costs little. The JSON goes to
bench/results/augment-<device>-<network>.json.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np
import torch

from bench.common import Row, in_fresh_process, parse_arguments, print_and_save, time_runs
from bench.train import project_step
from tools.augment_grid import synthetic_crops
from training.augment import AUGMENTATIONS, TRANSFORMS, AugmentPolicy, augment_batch
from utils import exit_on_user_error, keep_freed_memory


def augmentation_seconds(
    policy: AugmentPolicy, size: int, device: torch.device, repeats: int
) -> list[float]:
    """Seconds of augmenting a batch of `size` images, with new random numbers each time."""
    keep_freed_memory()
    copies = -(-size // 16)
    faces = synthetic_crops(16).repeat(copies, 1, 1, 1)[:size].to(device)
    epochs = itertools.count()

    def work() -> None:
        augment_batch(faces, np.arange(size), policy=policy, seed=0, epoch=next(epochs))

    return time_runs(work, device, 10 * repeats, 3)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time each transform, each policy and the training step."""
    args = parse_arguments("augment", __doc__, argv, network="r50", batch=32, steps=3)
    policies = {f"{name}, every image": AugmentPolicy(**{name: 1.0}) for name in TRANSFORMS}
    policies |= {f"policy {name}": AUGMENTATIONS[name] for name in AUGMENTATIONS if name != "none"}
    rows = []
    for name, policy in policies.items():
        work = (augmentation_seconds, policy, args.batch, args.device, args.repeats)
        rows.append(Row(name, args.batch, in_fresh_process(*work)))
    work = (project_step, args.network, args.batch, args.device, args.steps, "off")
    step = in_fresh_process(*work)["step"]
    extra = {}
    for row in rows:
        if row.stage.startswith("policy"):
            fraction = float(np.mean(row.seconds)) / step
            extra[f"{row.stage}, fraction of {args.network}'s step"] = f"{fraction:.2%}"
    rows.append(Row(f"{args.network}, a step without augmentation", args.batch, [step]))
    print_and_save(args, rows, extra)


if __name__ == "__main__":
    main(sys.argv[1:])
