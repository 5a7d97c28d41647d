"""Activation checkpointing of residual blocks: less memory for more arithmetic."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import Bottleneck, IRBlock


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Have the residual blocks keep only their input, and recompute the rest in the backward pass.

    It saves most of the activations' memory for a third more arithmetic (Chen et al., 1604.06174).
    The result has the same bits: the recomputation leaves batch normalisation's running statistics
    alone. Parameters and the names in the state dict stay as they are.
    """
    for block in model.modules():
        if isinstance(block, (IRBlock, Bottleneck)):
            block.forward = functools.partial(_checkpointed, block, block.forward)


def _checkpointed(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(N, C, H, W) to the block's output."""
    if not block.training:
        return forward(x)
    # A block draws no random numbers (dropout comes after the blocks): no RNG state to restore.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    # torch.compile updates the running statistics once by itself, and cannot trace these contexts:
    # one for the first computation and one for the second.
    if not torch.compiler.is_compiling():
        options["context_fn"] = lambda: (contextlib.nullcontext(), _frozen_statistics(block))
    return checkpoint(forward, x, **options)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Batch normalisation uses the batch's statistics and does not update the running ones."""
    layers = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        # running = 1 * running + 0 * batch. Evaluation mode would use the running statistics.
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)
