"""Memory does not grow with the images, only with what is held of each: in pre_process.py its name,
in train.py without a cache its label and position.

The detector and the network are stubs, all else is real. Measured is the process's anonymous
memory: the kernel can drop the mapped pages of train.rec at any time.
"""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from tests.helpers.paths import ROOT

MEGABYTES = """
def megabytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
"""

PREPARE = """
import os, sys, threading, time
import numpy as np
import pre_process
from preprocessing import pipeline
from config import parse_args
from preprocessing import detector
from preprocessing.detector import Detection

points = np.array([[8.0, 9], [16, 9], [12, 13], [9, 17], [15, 17]])
detection = Detection("ok", 0.9, np.array([2.0, 2, 22, 22]), points)
pipeline.find_face = lambda detector, images: [detection] * len(images)
detector.FaceDetector = lambda *_, **__: object()
os.fsync = lambda handle: None  # disks are slow, and this is about memory

before = peak = megabytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, megabytes())

watcher = threading.Thread(target=watch)
watcher.start()
source, output = sys.argv[1:]
pre_process.main(parse_args(["--source", source, "--output", output, "--images-dir",
                             output + "-images", "--workers", "2"], "pre_process"))
done.set()
watcher.join()
print("megabytes", peak - before)
"""

TRAIN = """
import sys
import train
import models
from training.run import Run
from config import parse_args
from torch import nn

layers = nn.AvgPool2d(16), nn.Flatten(), nn.Linear(147, 8)
models.build_model = lambda *_, **__: nn.Sequential(*layers)
before, sizes, log = megabytes(), [], Run._log_point

def log_and_look(self, *args):
    log(self, *args)
    sizes.append(megabytes() - before)

Run._log_point = log_and_look
source, output = sys.argv[1:]
flags = f"--cache none --train-set {source} --data-dir {output} --runs-dir {output}/runs --epochs 1"
flags += f" --images-dir {output}/images --device cpu --workers 2 --checkpoint-every 0.02m"
flags += " --emb-size 8 --lr 0.01 --batch-size 100 --valid-fraction 0 --margin-s 1 --log-every 5"
train.main(parse_args(flags.split(), "train"))
quarter = len(sizes) // 4
print("megabytes", max(sizes[:quarter]), max(sizes[quarter:]))
"""


def write_many(path: Path, count: int) -> Path:
    """`count` images of 24x24 pixels, 20 identities, as a .zip or a .tgz."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 3, 3), np.uint8)
    jpeg = encode_jpeg(cv2.resize(colours, (24, 24)))
    names = [f"set/{i * 20 // count:07d}/{i:07d}.jpg" for i in range(count)]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, jpeg)
        return path
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(jpeg)
            archive.addfile(info, io.BytesIO(jpeg))
    return path


def write_set(folder: Path, count: int) -> None:
    """A training set of `count` images of 100 identities."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 7, 7, 3), np.uint8)
    jpegs = [encode_jpeg(cv2.resize(image, (112, 112))) for image in noise]
    labels = [i * 100 // count for i in range(count)]
    write_dataset(folder, (jpegs[i % 50] for i in range(count)), labels)


def measure(script: str, source: Path, output: Path) -> list[float]:
    """The megabytes that a script prints last: what it used beyond its imports."""
    done = subprocess.run(
        [sys.executable, "-c", MEGABYTES + script, str(source), str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.rpartition("megabytes")[2].split()]


def peak_memory(folder: Path, kind: str, count: int) -> float:
    """Megabytes that preparing so many images takes at the most."""
    source = write_many(folder / f"{count}.{kind}", count)
    output = folder / f"{count}-{kind}"
    (peak,) = measure(PREPARE, source, output)
    assert json.loads((output / "report.json").read_text())["kept"] == count
    return peak


def growth(folder: Path, kind: str, few: int, many: int) -> float:
    """Bytes that each further image takes."""
    few_mb, many_mb = (peak_memory(folder, kind, count) for count in (few, many))
    each = (many_mb - few_mb) * (1 << 20) / (many - few)
    print(f".{kind}: {few:,} images {few_mb:.1f} MB, {many:,} {many_mb:.1f}: {each:.0f} bytes each")
    return each


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

# A name, its identity and where it lies take 600 bytes in a .tgz; Python's own list of a .zip's
# members takes 600 more. An image of 112x112 pixels would take 37,632, its JPEG some 5,000.


def test_memory_is_flat(tmp_path):
    assert growth(tmp_path, "tgz", 2_000, 8_000) < 1_500


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("tgz", 1_000), ("zip", 1_500)])
def test_memory_is_flat_over_100_000_images(kind, most, tmp_path):
    assert growth(tmp_path, kind, 10_000, 100_000) < most


@pytest.mark.slow
def test_training_without_a_cache_is_flat_over_100_000_images(tmp_path):
    """As decoded images, what comes after the first quarter would be 2.7 GB."""
    most = {}
    for count in (10_000, 100_000):
        write_set(tmp_path / f"{count}", count)
        early, late = measure(TRAIN, tmp_path / f"{count}", tmp_path / f"trained-{count}")
        most[count] = max(early, late)
        print(f"{count:,} images: {early:.1f} MB in the first quarter, then at most {late:.1f}")
    assert late - early < 10
    assert most[100_000] - most[10_000] < 100  # the allocator's arenas come and go by the dozen
