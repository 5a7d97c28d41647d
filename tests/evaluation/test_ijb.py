"""ijb.py: alignment by the points of the metadata; the rest is in tools/test_ijb_eval.py."""

import cv2
import numpy as np

from evaluation.ijb import align_by_points
from evaluation.ijb_files import read_ijb


def test_faces_are_aligned_by_the_points_given(ijb_folder):
    ijb = read_ijb(ijb_folder)
    image = cv2.imread(str(ijb_folder / "loose_crop" / "4.jpg"))[..., ::-1]
    np.testing.assert_allclose(align_by_points(ijb, 3), image[12:124, 20:132], atol=2)
