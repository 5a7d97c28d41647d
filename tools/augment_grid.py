"""An image of what augment.py does, on synthetic faces.

    python -m tools.augment_grid                          # images/demo/augment_grid.jpg
    python -m tools.augment_grid some/other/file.jpg

A column a face; under the faces as they are, every change by itself, then both recipes as they
come in an epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from fileio.images import decode_image, encode_jpeg
from fileio.safe_files import atomic_write, make_folder
from tools.synthetic import Task, draw_image
from training.augment import AUGMENTATIONS, TRANSFORMS, AugmentPolicy, augment_batch
from utils import FACE_SIZE, exit_on_user_error

FACES = 8
SEED = 2


def drawn_faces(count: int) -> Tensor:
    """The middles of synthetic images: (count, 112, 112, 3) uint8."""
    images = [decode_image(draw_image(Task(1, person, 0))) for person in range(count)]
    return torch.from_numpy(np.stack([image[69:181, 69:181] for image in images]))


def rows(faces: Tensor) -> dict[str, Tensor]:
    """The faces as they are, under each change by itself, and under each recipe, by name."""
    recipes = {change.replace("_", " "): AugmentPolicy(**{change: 1.0}) for change in TRANSFORMS}
    recipes |= {name: recipe for name, recipe in AUGMENTATIONS.items() if name != "none"}
    found = {"as they are": faces}
    for name, recipe in recipes.items():
        found[name] = augment_batch(faces, np.arange(len(faces)), policy=recipe, seed=SEED, epoch=0)
    return found


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Draw the faces, change them, and write one JPEG."""
    path = Path(argv[0] if argv else "images/demo/augment_grid.jpg")
    lines = []
    for name, images in rows(drawn_faces(FACES)).items():
        title = np.full((FACE_SIZE, 130, 3), 255, np.uint8)
        at, style = (6, FACE_SIZE // 2 + 5), (cv2.FONT_HERSHEY_SIMPLEX, 0.5)
        cv2.putText(title, name, at, *style, (0, 0, 0), 1, cv2.LINE_AA)
        line = np.concatenate([title, *images.numpy()], 1)
        lines.append(np.pad(line, ((2, 2), (0, 0), (0, 0)), constant_values=255))
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(encode_jpeg(np.ascontiguousarray(np.concatenate(lines)), 85))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main(sys.argv[1:])
