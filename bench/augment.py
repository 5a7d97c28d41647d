"""Time augment.py on whole batches, and what share of a training step its recipes take.

    python -m bench.augment                                 # beside r50's step of 32 images
    python -m bench.augment --network tiny --batch 128

A change by itself is timed on every image of a batch, a recipe as it comes: by chance. A slow
change counts little that falls on few. The JSON goes to
bench/results/augment-<device>-<network>.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch

from bench.common import Row, alone, arguments, clock, finish
from bench.train import ours
from tools.augment_grid import drawn_faces
from training.augment import AUGMENTATIONS, TRANSFORMS, AugmentPolicy, augment_batch
from utils import exit_on_user_error, keep_freed_memory


def changes(recipe: AugmentPolicy, size: int, device: torch.device, repeats: int) -> list[float]:
    """Seconds of augmenting a batch, with other numbers each time."""
    keep_freed_memory()
    faces = drawn_faces(16).repeat(-(-size // 16), 1, 1, 1)[:size].to(device)
    epochs = iter(range(10**9))

    def work() -> None:
        augment_batch(faces, np.arange(size), policy=recipe, seed=0, epoch=next(epochs))

    return clock(work, device, 10 * repeats, 3)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time changes, recipes and the step."""
    args = arguments("augment", __doc__, argv, network="r50", batch=32, steps=3)
    recipes = {f"{change}, every image": AugmentPolicy(**{change: 1.0}) for change in TRANSFORMS}
    recipes |= {f"recipe {name}": AUGMENTATIONS[name] for name in AUGMENTATIONS if name != "none"}
    rows = [
        Row(name, args.batch, alone(changes, recipe, args.batch, args.device, args.repeats))
        for name, recipe in recipes.items()
    ]
    step = alone(ours, args.network, args.batch, args.device, args.steps, "off")["step"]
    extra = {}
    for row in rows:
        if row.stage.startswith("recipe"):
            share = float(np.mean(row.seconds)) / step
            extra[f"{row.stage}, share of {args.network}'s step"] = f"{share:.2%}"
    rows.append(Row(f"{args.network}, a step without it", args.batch, [step]))
    finish(args, rows, extra)


if __name__ == "__main__":
    main(sys.argv[1:])
