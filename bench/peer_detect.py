"""Run another project's face detector in its own environment: imports nothing of this project.

    .venv-peers/bin/python bench/peer_detect.py mtcnn images.npy faces.npz 16

Reads (n, H, W, 3) uint8 RGB images, detects with the peer's own defaults in batches of the given
size, and writes two arrays: "rows" (k, 16), for every face its image, box, score, five x and five y
(mtcnn only; zeros otherwise); and "took", seconds and CPU seconds.
"""

import sys
import time

import numpy as np


def open_mtcnn():
    """The mtcnn package (ipazc/mtcnn) on TensorFlow."""
    from mtcnn import MTCNN

    detector = MTCNN()

    def detect(images):
        faces = detector.detect_faces(list(images), output_type="numpy", box_format="xyxy")
        return np.asarray(faces, dtype=np.float64).reshape(-1, 16)

    return detect


def open_facenet():
    """facenet-pytorch's MTCNN (timesler/facenet-pytorch)."""
    from facenet_pytorch import MTCNN

    detector = MTCNN(keep_all=True, device="cpu")

    def detect(images):
        boxes, scores = detector.detect(images)
        rows = [np.zeros((0, 16))]
        for i, (box, score) in enumerate(zip(boxes, scores, strict=True)):
            if box is not None:
                row = np.zeros((len(box), 16))
                row[:, 0], row[:, 1:5], row[:, 5] = i, box, score
                rows.append(row)
        return np.concatenate(rows)

    return detect


def main(name, images_file, result, batch):
    """Detect in all images, after two that are not timed: they load and compile."""
    images = np.load(images_file)
    detect = {"mtcnn": open_mtcnn, "facenet-pytorch": open_facenet}[name]()
    detect(images[:2])
    began = np.array([time.perf_counter(), time.process_time()])
    rows = []
    for start in range(0, len(images), batch):
        faces = detect(images[start : start + batch])
        faces[:, 0] += start  # the image's index in its batch becomes that in all images
        rows.append(faces)
    took = np.array([time.perf_counter(), time.process_time()]) - began
    np.savez(result, rows=np.concatenate(rows), took=took)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
