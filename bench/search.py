"""Time a search and measure its memory in a generated gallery of many faces.

python -m bench.search                     # 100,000 faces of 512 numbers, two threads
python -m bench.search --faces 1000000     # a gallery of 2 GB, memory-mapped
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from evaluation.photo_gallery import PhotoGallery, open_gallery, save_gallery
from evaluation.photo_search import nearest


def make_gallery(faces: int, dimension: int) -> PhotoGallery:
    """Random unit vectors, names of 40 characters."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((faces, dimension), np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    names = np.array([f"{i // 10:020d}/{i:015d}.jpg" for i in range(faces)], dtype=str)
    empty = np.zeros(0, "U1")
    return PhotoGallery(
        {},
        names,
        np.full(faces, "ok"),
        np.zeros((faces, 16), np.uint8),
        np.zeros((faces, 4), np.float32),
        np.zeros((faces, 5, 2), np.float32),
        embeddings,
        empty,
        empty,
        np.zeros((0, 16), np.uint8),
    )


def memory() -> dict[str, float]:
    """GB that this process holds: of its own, and of files in the page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {name: int(size) / 1e6 for name, size in sizes.items()}


def main() -> None:
    """Make a gallery, search in it, print times and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--path", default="", help="a gallery made before; else one is made")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(options.threads):
        path = Path(options.path or Path(folder, "gallery.npz"))
        if not path.exists():
            save_gallery(path, make_gallery(options.faces, options.dimension))
        start = time.perf_counter()
        gallery = open_gallery(path)
        print(f"opened and checked {len(gallery):,} faces in {time.perf_counter() - start:.2f} s")
        rng = np.random.default_rng(1)
        times = []
        for row in rng.integers(0, len(gallery), 20):
            query = np.array(gallery.embeddings[row : row + 1])
            start = time.perf_counter()
            indices, _ = nearest(gallery.embeddings, query, 5)
            times.append(1000 * (time.perf_counter() - start))
            assert indices[0, 0] == row
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"a search takes {np.median(times):.1f} ms (median of {len(times)}, {min(times):.1f} "
            f"to {max(times):.1f}) on {options.threads} threads"
        )
        print(f"memory: peak {peak:.2f} GB, now {memory()}")


if __name__ == "__main__":
    main()
