"""A cache of embeddings, keyed by the checksums of the model and of the faces.

    from evaluation.embedding_cache import EmbeddingCache, model_checksum
    cache = EmbeddingCache(Path("runs/<run>/embeddings"), "best", model_checksum(checkpoint))
    views = cache.views(embed, test_set.name, test_set.images, flip=True)  # (2, n, d) float32

There is one file per set, model and view (face or mirror image). It is overwritten when its
checksums no longer match, so that the folder does not grow. Files are never unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.embedders import Embed
from fileio.locks import lock_folder
from fileio.safe_files import (
    atomic_write,
    describe_write_errors,
    fsync_file,
    make_folder,
    open_for_writing,
)

# What np.load and the archive that it opens lazily raise for files with wrong bytes in them.
CORRUPT_NPZ = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    SyntaxError,
    AttributeError,
    TypeError,
)


def model_checksum(checkpoint: Path | str, *settings: object) -> str:
    """SHA-256 of a model's files and of the settings that it is used with.

    Without settings it is that of sha256sum, but for ONNX models with weights in other files.
    """
    paths = [Path(checkpoint)]
    if paths[0].suffix.lower() == ".onnx":
        from fileio.onnx_file import read_onnx  # onnx takes 0.2 s

        paths += read_onnx(checkpoint)[1]  # weights in files of their own
    digest = hashlib.sha256(repr(settings).encode() if settings else b"")
    for path in paths:
        _update_with_file(digest, path)
    return digest.hexdigest()


def faces_checksum(images: Tensor) -> str:
    """SHA-256 of decoded faces (n, 112, 112, 3) uint8, whichever file they came from."""
    return hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()


class EmbeddingCache:
    """A folder of cached embeddings of one model, whose files begin "<set>-<model>"."""

    def __init__(self, folder: Path, model: str, checksum: str):
        self.folder, self.model, self.checksum = folder, model, checksum
        self.computed = 0  # faces and mirror images that had to be embedded

    def views(self, embed: Embed, name: str, images: Tensor, flip: bool) -> np.ndarray:
        """Embeddings (views, n, d) float32 of faces and, with flip, of their mirror images.

        embed takes faces (n, 112, 112, 3) to unnormalised embeddings (n, d). A corrupt file is
        reported, and its embeddings are computed again.
        """
        key = f"{self.checksum} {faces_checksum(images)}"
        views = [self._load_or_embed(f"{name}-{self.model}.npz", key, embed, images)]
        if flip:
            path = f"{name}-{self.model}-mirrored.npz"
            views.append(self._load_or_embed(path, key, embed, images.flip(2)))
        return np.stack(views)

    def _load_or_embed(self, file: str, key: str, embed: Embed, images: Tensor) -> np.ndarray:
        embeddings = load_embeddings(self.folder / file, key, len(images))
        if embeddings is None:
            embeddings = embed(images).float().cpu().numpy()
            self.computed += len(images)
            save_embeddings(self.folder / file, key, embeddings)
        return embeddings


def save_embeddings(path: Path, key: str, embeddings: np.ndarray) -> None:
    """Write embeddings (n, d) float32 and the key that they are valid for."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        np.savez(file, key=np.array(key), embeddings=embeddings)


def load_embeddings(path: Path, key: str, count: int) -> np.ndarray | None:
    """The embeddings saved in a file under this key, (count, d) float32; None if there are none.

    Prints a line where the file is corrupt: a checksum in it (zip's CRC) does not match, or it
    holds something else.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            embeddings = stored["embeddings"]
        _check_embeddings(embeddings, count)
        if not np.isfinite(embeddings).all():
            raise ValueError("numbers that are not finite")
    except CORRUPT_NPZ as error:
        reason = " ".join(str(error).split())[:100]
        print(f"{path} is corrupt ({reason}); embedding again.")
        return None
    return embeddings


# ------------------------------------------------------------------------------ memory-mapped


def save_features(
    path: Path, key: str, count: int, embed_from: Callable[[int], Iterator[np.ndarray]]
) -> None:
    """Write features (count, d) float32 to a file that can be memory-mapped, the key to <name>.key.

    `embed_from(start)` yields them in blocks (n, d) from row `start` on. They are appended to
    <name>.part as they come, so that a process that was killed is resumed: <name>.part.key holds
    the key, and after a block its end. Only one process writes to the folder.
    """
    make_folder(path.parent)
    part, part_key = path.with_suffix(".part"), path.with_suffix(".part.key")
    with lock_folder(path.parent, "ijb_eval.py"):
        done, offset = _saved_part(part, part_key, key)
        if done:
            print(f"{part}: resuming after {done:,} of {count:,} images.")
        with open_for_writing(part, "r+b" if done else "wb") as file:
            with describe_write_errors(part):
                file.truncate(offset)
            file.seek(offset)
            for block in embed_from(done):
                if not done:  # only now the embedding dimension is known
                    header = {"descr": "<f4", "fortran_order": False}
                    header["shape"] = (count, block.shape[1])
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(block, np.float32).data)
                fsync_file(file, part)
                done += len(block)
                with atomic_write(part_key, "w") as key_file:
                    key_file.write(f"{key} {done} {file.tell()}\n")
        # The part stays a complete one until both files have their names.
        with atomic_write(path.with_suffix(".key"), "w") as key_file:
            key_file.write(f"{key} {file_checksum(part)}\n")
        with describe_write_errors(path):
            part.replace(path)
            part_key.unlink()


def _saved_part(part: Path, part_key: Path, key: str) -> tuple[int, int]:
    """The rows in an unfinished file of this key, and the byte where they end."""
    try:
        *stored_key, done, offset = part_key.read_text("utf-8", errors="replace").split()
        if " ".join(stored_key) == key and 0 < int(offset) <= part.stat().st_size:
            return int(done), int(offset)
    except (OSError, ValueError):  # none, or not by this code
        pass
    return 0, 0


def open_features(path: Path, key: str, count: int) -> np.ndarray | None:
    """The features saved under this key as a memory map (count, d) float32, None if there are none.

    Prints a line where the file is corrupt.
    """
    key_path = path.with_suffix(".key")
    if not (path.is_file() and key_path.is_file()):
        return None
    *stored_key, checksum = key_path.read_text("utf-8", errors="replace").split() or [""]
    if " ".join(stored_key) != key:
        return None
    try:
        if checksum != file_checksum(path):
            raise ValueError("its checksum does not match")
        features = np.load(path, mmap_mode="r", allow_pickle=False)
        _check_embeddings(features, count)
    except (OSError, ValueError) as error:
        print(f"{path} is corrupt ({error}); embedding again.")
        return None
    return features


def _check_embeddings(array: np.ndarray, count: int) -> None:
    if array.dtype != np.float32 or array.ndim != 2 or len(array) != count:
        raise ValueError(f"{array.dtype} numbers of shape {array.shape}")


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, which may be larger than memory, in hexadecimal digits."""
    digest = hashlib.sha256()
    _update_with_file(digest, path)
    return digest.hexdigest()


def _update_with_file(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # 1 MB: files may be larger than memory
            digest.update(block)
