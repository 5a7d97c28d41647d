"""What several scripts need: errors as sentences, devices, seeds, face alignment."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import os
import platform
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

FACE_SIZE = 112

# ArcFace's template for 112x112: left eye, right eye, nose, left and right mouth corner as they
# appear in the image, (x, y) in pixels (deepinsight/insightface, utils/face_align.py).
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class UserError(Exception):
    """An error that the user can fix; its message is a sentence that says how."""


def exit_on_user_error(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a script's `main`: an error that the user can fix becomes one sentence, status 2.

    These are UserError, OSError and running out of memory, the GPU's or the machine's. Ctrl-C ends
    with status 130, as shells expect, and without a traceback, too.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        script = Path(sys.argv[0]).name
        for stream in (sys.stdout, sys.stderr):
            # A name that the terminal cannot show must not end a run.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"{script}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except OSError as error:
            print(f"{script}: {describe_os_error(error)}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise  # a bug keeps its traceback
            memory = "GPU memory" if is_out_of_gpu_memory(error) else "memory"
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(
                f"{script}: out of {memory} ({reason}); what was written is kept. Free some, or "
                "take fewer --workers, a smaller --batch-size, --eval-batch or --detect-batch, or "
                "another --cache, as far as the script has them.",
                file=sys.stderr,
            )
            raise SystemExit(2) from None

    return wrapped


# What libraries say when a GPU's memory is full, and where they say it.
_GPU_MEMORY_TEXTS = (
    "CUDA out of memory",  # PyTorch's allocator
    "CUDA ran out of memory outside PyTorch's allocator",  # kernels compiled at run time
    "CUDA error: out of memory",  # the runtime (torch.AcceleratorError): contexts, pinned memory
    "CUDA driver error: out of memory",  # the driver: the allocator's expandable segments
    "CUDNN_STATUS_ALLOC_FAILED",  # cuDNN 8
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",  # cuDNN 9
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",  # cuDNN 9
    # PyTorch, when no algorithm's workspace fits ("FIND" with cudnn.benchmark, "GET" without).
    "unable to find an engine to execute this computation",
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cublasCreate, mostly for want of memory for its workspace
    "Cuda failure 2 'out of memory'",  # NCCL's buffers
    "Cuda failure 'out of memory'",  # likewise
    "MPS backend out of memory",  # Apple's GPUs
)
_MEMORY_TEXTS = (
    *_GPU_MEMORY_TEXTS,
    "allocate memory",  # PyTorch's CPU allocator ("can't"), and the system's ENOMEM ("Cannot")
    "Failed to allocate",  # OpenCV
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that GPU memory, or main memory, is full."""
    if isinstance(error, MemoryError) or _is_from("torch", "OutOfMemoryError", error):
        return True
    if not isinstance(error, RuntimeError) and not _is_from("cv2", "error", error):
        return False
    return any(text in str(error) for text in _MEMORY_TEXTS)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether an error says that GPU memory is full."""
    if _is_from("torch", "OutOfMemoryError", error):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error) for t in _GPU_MEMORY_TEXTS)


def _is_from(module: str, name: str, error: BaseException) -> bool:
    """Whether an error is of a library's class; without importing the library for it."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(error, getattr(loaded, name))


# PyTorch and OpenCV are imported where they are used: scripts import this module before they parse
# their flags, and --help is to answer at once.


def get_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is a GPU if one can be used, else the CPU.

    A GPU has an index from the start: under torchrun that of the process, so that no process
    touches another one's. Raises UserError if the name means nothing or the device cannot be used.
    """
    import torch

    if name == "auto":
        if cuda_is_available():
            index = _own_gpu()
            problem = _unsupported_gpu(index)
            if not problem:
                return torch.device("cuda", index)
            print(f"{problem} Using the CPU.")
        elif torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and cuda_is_available():
            device = torch.device("cuda", _own_gpu() if device.index is None else device.index)
            if device.index < torch.cuda.device_count() and _unsupported_gpu(device.index):
                raise UserError(_unsupported_gpu(device.index))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu.") from None
    return device


def cuda_is_available() -> bool:
    """Whether CUDA works; says so if there is a GPU that its driver does not let us use."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if caught and not available:
        reason = str(caught[0].message).split(" (Triggered")[0].splitlines()[0]
        print(f"There is a GPU, but it cannot be used: {reason}")
    return available


def _own_gpu() -> int:
    """The index of this process's GPU on its machine: torchrun numbers the processes."""
    import torch

    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', index + 1)} processes on a "
            f"machine with {count} GPUs; use --nproc-per-node={count}."
        )
    return index


def _unsupported_gpu(index: int) -> str:
    """Why this PyTorch has no kernels for a GPU, as a sentence; empty if it has.

    Code for sm_80 runs on capabilities 8.0 to 8.9, PTX (compute_80) on 8.0 and all later ones (CUDA
    C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    for arch in built_for:
        kind, _, number = arch.rstrip("af").partition("_")  # sm_90a: also with its extensions
        least = divmod(int(number), 10)
        if least <= (major, minor) and (kind == "compute" or least[0] == major):
            return ""
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, which this "
        f"PyTorch was not built for ({' '.join(built_for)}); install a build of PyTorch for older "
        "GPUs (pytorch.org, Previous PyTorch Versions)."
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The number format in which a device trains fastest: bfloat16, float16, None for float32.

    On GPUs that is what their tensor cores multiply: float16 from Volta on (V100, T4, RTX 20),
    bfloat16, too, from Ampere on. Apple's GPUs stay in float32.
    """
    import torch

    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else None
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return None


def dtype_name(dtype: torch.dtype | None) -> str:
    """bfloat16 for torch.bfloat16; float32 for None, which autocast_dtype returns for it."""
    return str(dtype or "float32").removeprefix("torch.")


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """For the block, float32 convolutions and matrix products on a GPU are not rounded to TF32.

    TF32 has float16's 10 bits of mantissa. With it, cosines change in their third digit, and one
    landmark in twelve moves by over 0.1 pixel. Settings are the process's, not a thread's.
    """
    import torch

    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def conv_layout(device: torch.device, tensor_cores: bool = False) -> torch.memory_format:
    """The memory format of network and images in which a device's convolutions are fastest.

    On GPUs tensor cores, which compute bfloat16, float16 and TF32, want channels_last. Exact
    float32 does not use them, and there cuDNN is slower with it (pytorch#44943: a V100, 1.68 s and
    2.76 s). Not measured here; bench.gpu measures both.
    """
    import torch

    is_slower = device.type == "cuda" and not tensor_cores
    return torch.contiguous_format if is_slower else torch.channels_last


def seed_everything(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and PyTorch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """A hash of each number, uint64: the mixing function of Steele et al., OOPSLA 2014."""
    x = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def core_count() -> int:
    """How many CPU cores this process may use; in a container, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Keep freed memory in the process, for the next tensors (glibc only; see mallopt(3)).

    By default glibc returns large blocks to the system and asks for new ones: on a CPU, fetching
    and zeroing those pages then takes longer than most layers.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # <malloc.h>
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never
        libc.mallopt(m_top_pad, 64 << 20)


# What to do about an OSError, by its errno.
ADVICE = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room, or have your quota raised",
    errno.EFBIG: "lift the limit on a file's size (ulimit -f), or take another disk",
    errno.EROFS: "mount the disk for writing, or take another folder",
    errno.EACCES: "change the rights, or take another folder",
    errno.EPERM: "change the rights, or take another folder",
    errno.EIO: "check the disk or the network behind it (dmesg says more)",
    errno.ENOENT: "check that its folder is there and the disk mounted",
    **dict.fromkeys(
        (errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EHOSTDOWN, errno.ETIMEDOUT),
        "mount the disk again",
    ),
}


def describe_os_error(error: OSError) -> str:
    """An OSError as a sentence: the file, if known, what is wrong, and what to do."""
    where = "" if error.filename is None else f"{error.filename}: "
    advice = f"; {ADVICE[error.errno]}." if error.errno in ADVICE else ""
    return f"{where}{error.strerror or error}{advice}"


def newest_run(runs_dir: Path | str, file: str) -> Path:
    """The newest `runs_dir/<run>/file`, by the time in the run's name and then by the file's age.

    Raises UserError if no run has such a file.
    """
    found = [p for p in Path(runs_dir).glob(f"*/{file}") if p.is_file()]
    if not found:
        raise UserError(
            f"No run in {runs_dir}/ has a {file} yet; train first (python train.py), name a file, "
            "or try everything on synthetic faces (make demo)."
        )
    return max(found, key=lambda p: (p.parent.name[:15], p.stat().st_mtime))


def similarity_transform(points: np.ndarray, template: np.ndarray = TEMPLATE) -> np.ndarray:
    """The least-squares similarity (rotation, scale, translation) that takes points to a template.

    `points` (..., k, 2) in pixels, `template` (k, 2); returns (..., 2, 3) float64 matrices that
    take image coordinates to template coordinates, never with a reflection. In two dimensions
    there is a closed form of Umeyama's solution ("Least-squares estimation of transformation
    parameters between two point patterns", 1991). Points that all coincide have no scale; they give
    a matrix of zeros.
    """
    points = np.asarray(points, dtype=np.float64)
    template = np.asarray(template, dtype=np.float64)
    centre = points.mean(-2, keepdims=True)
    target = template.mean(-2, keepdims=True)
    x, y = np.moveaxis(points - centre, -1, 0)
    u, v = np.moveaxis(template - target, -1, 0)
    spread = (x * x + y * y).sum(-1)
    spread = np.where(spread > 0, spread, np.inf)
    a = (x * u + y * v).sum(-1) / spread  # scale * cos(angle)
    b = (x * v - y * u).sum(-1) / spread  # scale * sin(angle)
    linear = np.stack([np.stack([a, -b], -1), np.stack([b, a], -1)], -2)
    shift = target[..., 0, :] - (linear @ centre[..., 0, :, None])[..., 0]
    shift = np.where(np.isfinite(spread)[..., None], shift, 0.0)
    return np.concatenate([linear, shift[..., None]], -1)


def warp_face(image: np.ndarray, matrix: np.ndarray, size: int = FACE_SIZE) -> np.ndarray:
    """Warp an (H, W, 3) uint8 image to a (size, size, 3) face: bilinear, zeros outside."""
    import cv2

    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)
