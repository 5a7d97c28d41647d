"""An exponential moving average (EMA) of a network's weights, evaluated beside them.

    ema = ModelEMA(model, 0.999)
    ema.update(step)        # after each optimiser step
    with ema.applied():     # the network has the averaged weights for the block
        ...

Averaged are the weights and batch normalisation's running statistics (Polyak and Juditsky 1992).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class ModelEMA:
    """a = d·a + (1 − d)·w after every step, d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d lets the average forget the random initial weights: with decay 0.999, d is 0.1
    at step 0, 0.5 at step 8, and 0.999 from step 8,990 on.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        # keep_vars: the tensors themselves, so that `live` follows the optimiser's updates.
        tensors = model.state_dict(keep_vars=True)
        # Not num_batches_tracked, an integer that cannot be averaged.
        self.live = {name: value for name, value in tensors.items() if value.is_floating_point()}
        self.average = {name: value.detach().clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after step number `step`, counted from 0."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        live = [value.detach() for value in self.live.values()]
        torch._foreach_lerp_(list(self.average.values()), live, rate)  # one kernel for all tensors

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights for the block, and its own back afterwards."""
        backup = {name: value.detach().clone() for name, value in self.live.items()}
        _copy_tensors(self.live, self.average)
        try:
            yield
        finally:
            _copy_tensors(self.live, backup)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises KeyError or RuntimeError if it belongs to another network.
        """
        _copy_tensors(self.average, state)


@torch.no_grad()
def _copy_tensors(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Copy the values in place: optimiser and network keep their tensors."""
    for name, value in target.items():
        value.copy_(source[name])
