"""An exponential moving average of a network's weights, evaluated beside them.

    average = ModelEMA(model, 0.999)
    average.update(step)        # after each step of the optimiser
    with average.applied():    # the network has the averaged weights for the block
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

    The second bound lets the first steps, taken from random weights, be forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        every = model.state_dict(keep_vars=True)
        self.live = {k: v for k, v in every.items() if v.is_floating_point()}
        self.average = {k: v.detach().clone() for k, v in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 0."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        live = [value.detach() for value in self.live.values()]
        torch._foreach_lerp_(list(self.average.values()), live, rate)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Have the network use the averaged weights, and put its own back afterwards."""
        own = {k: v.detach().clone() for k, v in self.live.items()}
        self._fill(self.live, self.average)
        try:
            yield
        finally:
            self._fill(self.live, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, for a checkpoint."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go back to what `state_dict` returned; KeyError or RuntimeError where it is another's."""
        self._fill(self.average, state)

    @staticmethod
    @torch.no_grad()
    def _fill(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
        for name, value in target.items():
            value.copy_(source[name])
