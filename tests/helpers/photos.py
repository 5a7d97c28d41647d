"""A model, photos of synthetic people and a test set, for the tools that are handed photos."""

import io

import cv2
import numpy as np
from PIL import Image

from config import parse_args
from fileio.bin_sets import write_bin
from fileio.images import decode_image
from preprocessing.detector import FaceDetector
from tests.helpers.onnx_files import write_onnx
from tests.helpers.synthetic_faces import face
from tools.photo_faces import read_photo

PEOPLE, EACH = 5, 3


def run_tool(tool, argv, capsys):
    """(exit status, stdout, stderr) of a tool's main with these arguments."""
    script = tool.__name__.rpartition(".")[2]
    capsys.readouterr()
    try:
        cfg = parse_args([*map(str, argv), "--device", "cpu"], script, tool.Settings)
        status = tool.main(cfg) or 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def two_faces(large, small):
    """JPEG of a large face in the centre and a small one in the corner."""
    canvas = np.full((420, 600, 3), 90, np.uint8)
    canvas[85:335, 175:425] = decode_image(large)
    canvas[:120, :120] = cv2.resize(decode_image(small), (120, 120), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", canvas[..., ::-1])[1].tobytes()


def turned(jpeg):
    """The same photo as a camera held on its side stores it: EXIF says how to turn it."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image = Image.open(io.BytesIO(jpeg)).transpose(Image.Transpose.ROTATE_90)
    image.save(out, "JPEG", quality=97, exif=exif)
    return out.getvalue()


def large_png(jpeg):
    """The same photo with 2,000 pixels a side, as PNG."""
    image = cv2.resize(decode_image(jpeg), (2000, 2000), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def write_people(folder):
    """PEOPLE folders of EACH photos in `folder`."""
    for person in range(PEOPLE):
        (folder / f"p{person}").mkdir(parents=True)
        for i in range(EACH):
            (folder / f"p{person}" / f"{i}.jpg").write_bytes(face(person, i))
    return folder


def write_model(path):
    """An ONNX model, whose embeddings say little of a person but much of a photo."""
    write_onnx(path, "n")
    return path


def write_test_set(folder, path):
    """Pairs of the photos in `folder`, aligned, as a .bin: for lfw_eval.py."""
    detector = FaceDetector("cpu")
    crops = [
        [read_photo(str(folder / f"p{p}" / f"{i}.jpg"), detector).face.jpeg for i in range(EACH)]
        for p in range(PEOPLE)
    ]
    pairs, same = [], []
    for fold in range(10):
        a, b = fold % PEOPLE, (fold + 1 + fold // PEOPLE) % PEOPLE
        pairs += [crops[a][0], crops[a][1], crops[a][1], crops[b][2]]
        same += [True, False]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bin(path, pairs, same)
