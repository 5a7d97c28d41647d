"""Draw synthetic faces: a data set that needs no download, for the demo and the tests.

    python -m tools.synthetic --output demo/data      # 3,800 images, half a minute on 2 CPU cores

writes, always with the same bytes for the same seed and library versions,

    demo/data/CASIA-WebFace.zip   CASIA-WebFace/<7 digits>/<nnn>.jpg, identities to train on
    demo/data/lfw-funneled.tgz    lfw_funneled/<Name>/<Name>_<nnnn>.jpg, others to test on
    demo/data/pairs.txt           LFW's layout: ten folds of genuine and impostor pairs

and prints how many images of how many identities each archive holds. An identity is a set of
proportions and colours (`TRAITS`); pose, expression, light, clothes, background, sharpness, noise
and JPEG quality belong to the image, so that raw pixels do not tell identities apart.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import multiprocessing
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from config import Config, parse_args, setting
from tools.portrait import SIZE, draw_person

FOLDS = 10
PAIRS_PER_FOLD = 30  # genuine ones, and as many impostor ones; LFW has 300
LFW_IMAGES = (4, 8)  # a test identity has 4 to 7 images
SYLLABLES = (
    *("ba", "bel", "cor", "da", "eva", "fen", "go", "ira", "jo", "ka", "lin", "lo", "ma", "mi"),
    *("na", "nor", "o", "pe", "ra", "ri", "sa", "ta", "ti", "vo", "wen"),
)
SKIN = ["f3d3c0", "ecc4a6", "e0ae86", "cf9a70", "a9744d", "7e5236", "5c3b29"]
HAIR = ["17130f", "2b1d14", "4a2f1d", "6d4526", "8f3f1e", "a9773f", "d8b368", "b9b4ad", "e4e0da"]
IRIS = ["3a2416", "5d3a1c", "7a5a2c", "5c6b3a", "4f7a83", "4c6f9c", "7f8c94"]

# What makes an identity: name -> (lowest, highest), drawn uniformly. Lengths are in half heads:
# the chin is at y = 1, the crown at y = -1, x grows to the right, z towards the viewer.
TRAITS = {
    "width": (0.62, 0.75), "jaw": (0.68, 0.94), "chin": (0.24, 0.46), "cheek": (0.92, 1.03),
    "skin": (0.0, 5.2), "redness": (-9.0, 9.0), "hair": (0.0, 8.0), "iris": (0.0, 6.0),
    "eye_x": (0.28, 0.36), "eye_y": (-0.08, 0.06), "eye_w": (0.125, 0.175), "eye_h": (0.05, 0.095),
    "eye_tilt": (-0.22, 0.22), "eye_bags": (0.0, 0.5), "iris_r": (0.056, 0.074),
    "brow_gap": (0.115, 0.20), "brow_w": (0.15, 0.22), "brow_h": (0.016, 0.062),
    "brow_tilt": (-0.3, 0.3), "brow_arch": (0.0, 0.07), "brow_x": (-0.03, 0.03),
    "nose_y": (0.28, 0.44), "nose_w": (0.095, 0.19), "nose_tip": (0.05, 0.1),
    "bridge": (0.03, 0.07),
    "mouth_gap": (0.17, 0.29), "mouth_w": (0.20, 0.34), "upper_lip": (0.028, 0.085),
    "lower_lip": (0.045, 0.115), "bow": (0.0, 0.6), "lip_red": (0.3, 0.9), "cheek_red": (0.0, 0.35),
    "ear": (0.10, 0.17), "hairline": (-0.80, -0.48), "temple": (0.60, 0.92), "part": (-0.6, 0.6),
    "volume": (0.03, 0.20), "sides": (-0.35, 0.15), "length": (-1.0, 1.0), "curl": (-0.08, 0.05),
    "fringe": (-0.9, 0.32), "peak": (-0.06, 0.14), "bald": (0.0, 1.0), "beard": (0.0, 1.0),
    "moustache": (0.0, 1.0), "wrinkles": (-0.8, 0.6), "freckles": (0.0, 1.0), "mole": (-1.0, 1.0),
    "mole_x": (-0.5, 0.5), "mole_y": (-0.4, 0.8), "glasses": (0.0, 1.0), "frame_w": (0.19, 0.24),
    "frame_h": (0.11, 0.18),
}  # fmt: skip


def make_identity(seed: int, number: int) -> SimpleNamespace:
    """The traits of identity `number`, drawn at random: the same for all its images."""
    rng = np.random.default_rng([seed, 1, number])
    traits = {name: rng.uniform(low, high) for name, (low, high) in TRAITS.items()}
    person = SimpleNamespace(number=number, **traits)
    person.skin_rgb = pick_colour(SKIN, person.skin) + np.array([1, 0, -1]) * person.redness
    person.hair *= 1 - 0.25 * max(0, person.skin - 2.5)  # pale hair goes with pale skin
    person.hair_rgb = pick_colour(HAIR, person.hair)
    person.iris_rgb = pick_colour(IRIS, person.iris)
    if person.length > 0.2:  # long hair, no beard
        person.beard = person.moustache = 0
    return person


def make_shot(rng: np.random.Generator) -> SimpleNamespace:
    """What belongs to one image, drawn at random: pose (radians), expression, light, camera."""
    return SimpleNamespace(
        yaw=np.clip(rng.normal(0, 0.17), -0.4, 0.4), pitch=rng.normal(0, 0.10),
        roll=rng.normal(0, 0.10),
        scale=rng.uniform(62, 80), centre=rng.normal((125, 122), 5),
        smile=rng.uniform(-0.35, 1.0), mouth_open=max(0.0, rng.uniform(-0.12, 0.11)),
        eye_open=rng.uniform(0.75, 1.15), gaze=rng.normal(0, 0.014, 2),
        brow_up=rng.normal(0, 0.022), tousle=rng.normal(0, 0.025, 48),
        clothes=muted(rng), jacket=rng.random(), collar=rng.uniform(1.5, 1.75),
        glasses=rng.random(),
        light=np.array([rng.normal(0, 0.6), rng.normal(-0.45, 0.3), rng.uniform(0.5, 1.0)]),
        contrast=rng.uniform(0.4, 1.1), exposure=rng.uniform(0.75, 1.2),
        gamma=rng.uniform(0.8, 1.3),
        warmth=rng.normal(0, 0.08), tint=rng.normal(0, 0.03), noise=rng.uniform(1, 8),
        blur=max(0.0, rng.uniform(-0.5, 1.3)), quality=int(rng.integers(62, 96)),
    )  # fmt: skip


def muted(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) of clothes and rooms: seldom gaudy."""
    return np.clip(rng.uniform(30, 220) + rng.normal(0, 18, 3), 5, 250)


def pick_colour(palette: list[str], position: float) -> np.ndarray:
    """Interpolate between hexadecimal RGB colours: (3,) float64 in 0 … 255."""
    colours = np.array([list(bytes.fromhex(colour)) for colour in palette], np.float64)
    return np.array([np.interp(position, range(len(colours)), colours[:, c]) for c in range(3)])


def light_person(canvas: np.ndarray, person: SimpleNamespace, shot: SimpleNamespace) -> None:
    """Shade the head like an ellipsoid: Lambert's law, softened in the shadows."""
    y, x = np.mgrid[0:SIZE:5, 0:SIZE:5]
    nx = (x - shot.centre[0]) / (shot.scale * person.width * 1.25)
    ny = np.minimum((y - shot.centre[1]) / (shot.scale * 1.3), 0.6)
    bend = np.minimum(1, 0.95 / np.maximum(np.hypot(nx, ny), 1e-6))
    nx, ny = nx * bend, ny * bend
    lx, ly, lz = shot.light / np.linalg.norm(shot.light)
    gain = shot.contrast * (0.8 * (nx * lx + ny * ly + np.sqrt(1 - nx**2 - ny**2) * lz) - 0.52)
    gain = cv2.resize(gain.astype(np.float32), (SIZE, SIZE)) * canvas[:, :, 3] / 255 + 1
    cv2.multiply(canvas, cv2.merge([gain] * 4), dst=canvas)


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A blurred wall, room or garden: (SIZE, SIZE, 4) float32, the fourth for draw_person."""
    small = muted(rng) + rng.normal(0, 25, (4, 4, 1)) + rng.normal(0, 8, (4, 4, 3))
    image = cv2.resize(small.astype(np.float32), (125, 125), interpolation=cv2.INTER_CUBIC)
    for _ in range(rng.integers(0, 9)):
        (x, y), (w, h) = rng.integers(0, 125, 2), rng.integers(6, 50, 2)
        colour = muted(rng)
        if rng.random() < 0.5:
            cv2.rectangle(image, (int(x), int(y)), (int(x + w), int(y + 2 * h)), colour, -1)
        else:
            cv2.circle(image, (int(x), int(y)), int(w) // 2, colour, -1)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(1.5, 6))
    return cv2.cvtColor(cv2.resize(image, (SIZE, SIZE)), cv2.COLOR_RGB2RGBA)


@functools.cache
def noise_tile() -> np.ndarray:
    """Gaussian noise of standard deviation 1; every image takes a window of it."""
    return np.random.default_rng(0).standard_normal((2 * SIZE, 2 * SIZE, 3), np.float32)


def photograph(canvas: np.ndarray, shot: SimpleNamespace, rng: np.random.Generator) -> bytes:
    """What the camera does to the scene: blur, noise, white balance, exposure, gamma, JPEG."""
    image = cv2.cvtColor(canvas, cv2.COLOR_RGBA2BGR)
    if shot.blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), shot.blur)
    y, x = rng.integers(0, SIZE, 2)
    image = cv2.scaleAdd(noise_tile()[y : y + SIZE, x : x + SIZE].copy(), shot.noise, image)
    white = np.array([1 - shot.warmth, 1 + shot.tint, 1 + shot.warmth])  # blue, green, red
    levels = np.arange(256)[:, None] / 255 * shot.exposure * white
    table = np.clip(255 * np.clip(levels, 0, 1) ** shot.gamma, 0, 255).astype(np.uint8)
    image = cv2.LUT(cv2.convertScaleAbs(np.maximum(image, 0)), table[:, None])
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, shot.quality])[1].tobytes()


class Task(NamedTuple):
    """One image to draw; all that a worker process needs to know."""

    seed: int
    identity: int
    index: int
    kind: str = "portrait"  # or "empty": no face in it, "broken": the file is truncated


def draw_image(task: Task) -> bytes:
    """JPEG of one image; in one of sixteen a smaller face of someone else is beside it."""
    rng = np.random.default_rng([task.seed, 2, task.identity, task.index])
    canvas, shot = draw_background(rng), make_shot(rng)
    cast = [(make_identity(task.seed, task.identity), shot)]
    if rng.random() < 1 / 16:
        other, edge = make_shot(rng), rng.integers(2)
        other.scale, other.centre = rng.uniform(24, 32), np.array([(28, 222)[edge], 110.0])
        shot.centre[0] += (12, -12)[edge]
        cast.insert(0, (make_identity(task.seed, rng.integers(10**6, 2 * 10**6)), other))
    for person, pose in cast if task.kind != "empty" else ():
        draw_person(canvas, person, pose)
        light_person(canvas, person, pose)
    jpeg = photograph(canvas, shot, rng)
    return jpeg[: len(jpeg) // 3] if task.kind == "broken" else jpeg


def draw_images(tasks: Sequence[Task], workers: int) -> Iterator[bytes]:
    """Draw all tasks in order in `workers` processes, with a progress bar."""
    bar = functools.partial(tqdm, total=len(tasks), unit="image", disable=None)
    if workers == 1:
        yield from bar(map(draw_image, tasks))
        return
    context = multiprocessing.get_context("spawn")  # a fork after OpenCV made threads may hang
    with context.Pool(workers, cv2.setNumThreads, (1,)) as pool:
        yield from bar(pool.imap(draw_image, tasks, chunksize=16))


def make_names(seed: int, count: int) -> list[str]:
    """`count` different invented names, sorted, as LFW writes them: First_Last."""
    rng, names = np.random.default_rng([seed, 3]), set()
    while len(names) < count:
        first, last = ("".join(rng.choice(SYLLABLES, n)).title() for n in rng.integers(2, 4, 2))
        names.add(f"{first}_{last}")
    return sorted(names)


def write_casia_zip(path, seed: int, identities: int, images: int, workers: int = 1) -> int:
    """Write identities 0 … identities - 1 in CASIA-WebFace's layout; returns the image count.

    Folders have 7 digits. One image has no face and one is truncated, as in any real set.
    """
    from fileio.safe_files import atomic_write

    folders = 45 + np.random.default_rng([seed, 4]).integers(1, 90, identities).cumsum()
    tasks = [Task(seed, identity, i) for identity in range(identities) for i in range(images)]
    if images > 1:
        for identity, kind in zip(range(identities), ("empty", "broken"), strict=False):
            tasks[identity * images + images - 1] = Task(seed, identity, images - 1, kind)
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for task, jpeg in zip(tasks, draw_images(tasks, workers), strict=True):
            name = f"CASIA-WebFace/{folders[task.identity]:07d}/{task.index + 1:03d}.jpg"
            entry = zipfile.ZipInfo(name, (2014, 11, 28, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, jpeg)
    return len(tasks)


def write_lfw_tgz(path, seed: int, first: int, counts: dict[str, int], workers: int = 1) -> int:
    """Write identities first, first + 1, … in LFW's layout; returns the image count.

    counts: name -> number of images, in the order of the archive.
    """
    from fileio.safe_files import atomic_write

    tasks = {
        f"lfw_funneled/{name}/{name}_{i + 1:04d}.jpg": Task(seed, identity, i)
        for identity, (name, count) in enumerate(counts.items(), first)
        for i in range(count)
    }
    with (
        atomic_write(path) as file,
        gzip.GzipFile("", "wb", 1, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        images = draw_images(list(tasks.values()), workers)
        for name, jpeg in zip(tasks, images, strict=True):
            entry = tarfile.TarInfo(name)
            entry.size = len(jpeg)
            archive.addfile(entry, io.BytesIO(jpeg))
    return len(tasks)


def lfw_pairs_text(seed: int, counts: dict[str, int]) -> str:
    """The text of pairs.txt; counts: name -> number of images. Folds share no identity."""
    rng, names = np.random.default_rng([seed, 5]), list(counts)
    folds = []
    for fold in np.array_split(rng.permutation(len(names)), FOLDS):
        images = [(names[p], i + 1) for p in fold for i in range(counts[names[p]])]
        pairs = list(combinations(sorted(images), 2))
        folds.append([[p for p in pairs if (p[0][0] == p[1][0]) is same] for same in (True, False)])
    size = min(PAIRS_PER_FOLD, *(len(kind) for fold in folds for kind in fold))
    lines = [f"{FOLDS}\t{size}"]
    for fold in folds:
        for kind in fold:
            for k in sorted(rng.choice(len(kind), size, replace=False)):
                (a, i), (b, j) = kind[k]
                lines.append(f"{a}\t{i}\t{j}" if a == b else f"{a}\t{i}\t{b}\t{j}")
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Synthetic set"""

    SHARED: ClassVar[str] = "workers seed"
    output: str = setting("demo/data", "folder to write the two archives and pairs.txt to")
    identities: int = setting(200, "synthetic identities to train on", low=2)
    images_per_identity: int = setting(16, "images of each of them", low=1)
    lfw_identities: int = setting(100, "other identities, to test on", low=20)


def main(cfg: Settings) -> None:
    """Write the two archives and the pairs into `cfg.output`."""
    from fileio.safe_files import atomic_write, make_folder
    from utils import UserError, core_count

    if min(cfg.identities, cfg.images_per_identity) < 2 or cfg.lfw_identities < 2 * FOLDS:
        raise UserError(
            "A synthetic set needs at least --identities 2, --images-per-identity 2 and "
            f"--lfw-identities {2 * FOLDS}, two for each fold of the pairs."
        )
    output = Path(cfg.output)
    make_folder(output)
    workers = cfg.workers or core_count()

    path = output / "CASIA-WebFace.zip"
    count = write_casia_zip(path, cfg.seed, cfg.identities, cfg.images_per_identity, workers)
    print(f"{path}: {count:,} images of {cfg.identities:,} identities")

    sizes = np.random.default_rng([cfg.seed, 6]).integers(*LFW_IMAGES, cfg.lfw_identities)
    counts = dict(zip(make_names(cfg.seed, cfg.lfw_identities), sizes.tolist(), strict=True))
    path = output / "lfw-funneled.tgz"
    count = write_lfw_tgz(path, cfg.seed, cfg.identities, counts, workers)
    print(f"{path}: {count:,} images of {cfg.lfw_identities:,} other identities")

    pairs = lfw_pairs_text(cfg.seed, counts)
    with atomic_write(output / "pairs.txt", "w") as file:
        file.write(pairs)
    print(f"{output / 'pairs.txt'}: {pairs.count(chr(10)) - 1:,} pairs in {FOLDS} folds")


if __name__ == "__main__":
    from utils import exit_on_user_error

    exit_on_user_error(main)(parse_args(sys.argv[1:], "synthetic", Settings, __doc__))
