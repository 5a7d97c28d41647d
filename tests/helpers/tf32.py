"""TensorFloat-32 switched on as a training run does, and what it is at some moment."""

import contextlib

import torch

BACKENDS = (torch.backends.cudnn, torch.backends.cuda.matmul)


def allowed_tf32():
    """Whether convolutions, and matrix products, may be rounded to TF32 now."""
    return [backend.allow_tf32 for backend in BACKENDS]


@contextlib.contextmanager
def tf32_on():
    """Allow both for the block; afterwards they are as before."""
    before = allowed_tf32()
    for backend in BACKENDS:
        backend.allow_tf32 = True
    try:
        yield
    finally:
        for backend, allowed in zip(BACKENDS, before, strict=True):
            backend.allow_tf32 = allowed
