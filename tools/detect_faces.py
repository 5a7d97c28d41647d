"""Print the face that would be aligned in each image.

    python -m tools.detect_faces image.jpg ...

It prints a line per image: file, status (ok, retried, no_face), score, box and the five points of
the face, in pixels, tab-separated.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import ClassVar

from config import Config, parse_args, setting
from utils import UserError, exit_on_user_error, get_device


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Detection"""

    SHARED: ClassVar[str] = "device"
    image: tuple[str, ...] = setting((), "image files", positional="+")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Print the face of each image."""
    # Imported here, so that --help answers at once.
    import cv2

    from preprocessing.detector import FaceDetector, find_face

    detector = FaceDetector(get_device(cfg.device))
    for path in cfg.image:
        image = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise UserError(f"{path} is not an image that OpenCV can read.")
        face = find_face(detector, image[None])[0]
        numbers = []
        if face.box is not None:
            numbers = [face.score, *face.box, *face.points.ravel()]
        print("\t".join([path, face.status, *(f"{number:.2f}" for number in numbers)]))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "detect_faces", Settings, __doc__))
