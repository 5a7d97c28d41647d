"""Print the face that would be aligned in each image.

    python -m tools.detect_faces image.jpg ...

prints a line per image: file, status (ok, retried, no_face), score, box and the five points of the
face, in pixels, tab-separated.
"""

from __future__ import annotations

import sys

import cv2

from preprocessing.detector import FaceDetector, find_face
from utils import UserError, exit_on_user_error, get_device


@exit_on_user_error
def main(paths: list[str]) -> None:
    """Print the faces of the images at `paths`."""
    if not paths:
        raise UserError("Name one or more images: python -m tools.detect_faces image.jpg ...")
    detector = FaceDetector(get_device())
    for path in paths:
        image = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise UserError(f"{path} is not an image that OpenCV can read.")
        face = find_face(detector, image[None])[0]
        numbers = []
        if face.box is not None:
            numbers = [face.score, *face.box, *face.points.ravel()]
        print("\t".join([path, face.status, *(f"{number:.2f}" for number in numbers)]))


if __name__ == "__main__":
    main(sys.argv[1:])
