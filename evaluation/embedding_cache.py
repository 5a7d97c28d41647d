"""Embeddings that need not be computed twice, kept by the checksums of the model and the faces.

    from evaluation.embedding_cache import EmbeddingCache, model_checksum
    cache = EmbeddingCache(Path("runs/<run>/embeddings"), "best", model_checksum(checkpoint))
    views = cache.views(embed, test_set.name, test_set.images, flip=True)    # (2, n, d) float32

One file a set, model and view (the face, its mirror image), overwritten when its checksums no
longer match: the folder does not grow. What is in it is never unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.embedders import Embed
from fileio.onnx_file import check_onnx
from fileio.safe_files import atomic_write, make_folder


def model_checksum(checkpoint: Path | str, *settings: object) -> str:
    """SHA-256 of a model's files and of the settings that it is used with."""
    files = [Path(checkpoint)]
    if files[0].suffix.lower() == ".onnx":
        files += check_onnx(checkpoint)
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def faces_checksum(images: Tensor) -> str:
    """SHA-256 of decoded faces (n, 112, 112, 3) uint8, wherever they came from."""
    return hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()


class EmbeddingCache:
    """A folder of embeddings of one model, which is called `model` in file names."""

    def __init__(self, folder: Path, model: str, checksum: str):
        self.folder, self.model, self.checksum = folder, model, checksum
        self.computed = 0  # faces and mirror images that had to go through the network

    def views(self, embed: Embed, name: str, images: Tensor, flip: bool) -> np.ndarray:
        """Embeddings (views, n, d) float32 of faces and, with flip, of their mirror images.

        embed takes faces (n, 112, 112, 3) to embeddings (n, d) in the length that the network gives
        them. A damaged file is said so, and computed again.
        """
        key = f"{self.checksum} {faces_checksum(images)}"
        views = []
        for mirrored in (False, True)[: 1 + flip]:
            path = self.folder / f"{name}-{self.model}{'-mirrored' * mirrored}.npz"
            found = load_embeddings(path, key, len(images))
            if found is None:
                found = embed(images.flip(2) if mirrored else images).float().cpu().numpy()
                self.computed += len(images)
                save_embeddings(path, key, found)
            views.append(found)
        return np.stack(views)


def save_embeddings(path: Path, key: str, embeddings: np.ndarray) -> None:
    """Write embeddings (n, d) float32 with the key that they are valid for."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        np.savez(file, key=np.array(key), embeddings=embeddings)


def load_embeddings(path: Path, key: str, count: int) -> np.ndarray | None:
    """The embeddings of a file that were saved under this key, (count, d) float32, else None.

    Prints a sentence where the file is damaged: a checksum in it (zip's CRC) does not match, or it
    holds something else.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            found = stored["embeddings"]
        if found.dtype != np.float32 or found.ndim != 2 or len(found) != count:
            raise ValueError(f"{found.dtype} numbers in the shape {found.shape}")
        if not np.isfinite(found).all():
            raise ValueError("numbers that are not finite")
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error,
            NotImplementedError, SyntaxError, AttributeError, TypeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:100]
        print(f"{path} is damaged ({reason}); embedding again.")
        return None
    return found


# ------------------------------------------------------------------------------ memory-mapped


def save_features(path: Path, key: str, features: np.ndarray) -> None:
    """Write features (n, d) float32 too many for memory, and beside them key and checksum."""
    make_folder(path.parent)
    beside = path.with_suffix(".key")
    beside.unlink(missing_ok=True)  # it would call the new file the old one
    with atomic_write(path) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(features, np.float32))
    with atomic_write(beside, "w") as file:
        file.write(f"{key} {_file_checksum(path)}\n")


def open_features(path: Path, key: str, count: int) -> np.ndarray | None:
    """The features saved under this key as a memory map (count, d) float32, else None.

    Prints a sentence where the file is damaged.
    """
    beside = path.with_suffix(".key")
    if not (path.is_file() and beside.is_file()):
        return None
    *known, checksum = beside.read_text("utf-8", errors="replace").split() or [""]
    if " ".join(known) != key:
        return None
    try:
        if checksum != _file_checksum(path):
            raise ValueError("its checksum does not match")
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.dtype != np.float32 or found.ndim != 2 or len(found) != count:
            raise ValueError(f"{found.dtype} numbers in the shape {found.shape}")
    except (OSError, ValueError) as error:
        print(f"{path} is damaged ({error}); embedding again.")
        return None
    return found


def _file_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
