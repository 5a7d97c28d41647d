"""A grid of what training/augment.py does, on synthetic faces.

    python -m tools.augment_grid                              # images/demo/augment_grid.jpg
    python -m tools.augment_grid --output some/other/file.jpg

One column per face. The first row shows the faces as they are; below are each change by itself and
then both policies of train.py --augment as they come in an epoch.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from config import Config, parse_args, setting
from utils import FACE_SIZE, exit_on_user_error

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FACES = 8  # columns
SEED = 2


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Grid"""

    SHARED: ClassVar[str] = ""
    output: str = setting("images/demo/augment_grid.jpg", "JPEG file to write")


def synthetic_crops(count: int) -> Tensor:
    """The centres of synthetic images: (count, 112, 112, 3) uint8."""
    import numpy as np
    import torch

    from fileio.images import decode_image
    from tools.synthetic import Task, draw_image

    images = [decode_image(draw_image(Task(1, identity, 0))) for identity in range(count)]
    return torch.from_numpy(np.stack([image[69:181, 69:181] for image in images]))


def augmented_rows(faces: Tensor) -> dict[str, Tensor]:
    """The faces as they are, under each change by itself and under each policy, by its name."""
    import numpy as np

    from training.augment import AUGMENTATIONS, TRANSFORMS, AugmentPolicy, augment_batch

    policies = {change.replace("_", " "): AugmentPolicy(**{change: 1.0}) for change in TRANSFORMS}
    policies |= {name: policy for name, policy in AUGMENTATIONS.items() if name != "none"}
    positions = np.arange(len(faces))
    rows = {"as they are": faces}
    for name, policy in policies.items():
        rows[name] = augment_batch(faces, positions, policy=policy, seed=SEED, epoch=0)
    return rows


def titled_row(title: str, images: np.ndarray) -> np.ndarray:
    """One row of the grid, (116, 130 + 112 n, 3) uint8: its title, then (n, 112, 112, 3) images."""
    import cv2
    import numpy as np

    label = np.full((FACE_SIZE, 130, 3), 255, np.uint8)
    left_bottom = (6, FACE_SIZE // 2 + 5)
    cv2.putText(label, title, left_bottom, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    row = np.concatenate([label, *images], 1)
    return np.pad(row, ((2, 2), (0, 0), (0, 0)), constant_values=255)


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Draw the faces, augment them, and write the grid."""
    # Imported here, so that --help answers at once.
    import numpy as np

    from fileio.images import encode_jpeg
    from fileio.safe_files import atomic_write, make_folder

    rows = augmented_rows(synthetic_crops(FACES))
    grid = np.concatenate([titled_row(name, images.numpy()) for name, images in rows.items()])
    path = Path(cfg.output)
    make_folder(path.parent)
    with atomic_write(path) as file:
        file.write(encode_jpeg(np.ascontiguousarray(grid), 85))
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "augment_grid", Settings, __doc__))
