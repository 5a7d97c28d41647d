"""The loss scale without which float16 loses gradients (Micikevicius et al., 1710.03740).

    scaler = LossScaler(optimizer, device, enabled=True)
    scaler.scale(loss).backward()
    norm = scaler.unscale(norm, [])     # from here on gradients are those of the loss itself
    overflow = scaler.count(norm)
    scaler.step(optimizer)              # nothing where the norm is not finite
    scaler.update()

In float16 a gradient below 6e-8 is zero and one above 65,504 infinite. So the loss is multiplied by
a large number. A step whose gradient overflows is skipped, and the scale halved; after 2,000 steps
without an overflow it is doubled. In other formats nothing is scaled and no step skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class LossScaler(torch.amp.GradScaler):
    """PyTorch's, for a group of processes, with a count of the skipped steps.

    Which steps are skipped stays on the device: the host does not wait for it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, enabled: bool
    ) -> None:
        super().__init__(device.type, enabled=enabled)
        self.optimizer = optimizer
        self._skipped = torch.zeros((), device=device)
        if enabled:  # fused SGD leaves its memory uninitialised if it skips the first step
            create_momentum(optimizer)

    @property
    def loss_scale(self) -> float | None:
        """The scale, None if nothing is scaled; the host waits for it."""
        return self.get_scale() if self.is_enabled() else None

    @property
    def skipped_steps(self) -> int:
        """How many steps of the run have been skipped; the host waits for it."""
        return int(self._skipped) if self.is_enabled() else 0

    def unscale(self, norm: Tensor, others: Iterable[Tensor]) -> Tensor:
        """Divide the scale out of the optimiser's gradients and those of `others`.

        `norm` is that of all gradients of all processes, with the scale; returned without it.
        """
        if not self.is_enabled():
            return norm
        self.unscale_(self.optimizer)
        # PyTorch's scaler looks for overflows in the optimiser's gradients in this process, of
        # which class shards are a part only, and of which there are none where the head's centres
        # are sampled and the network is frozen. The norm is that of all, and all processes skip
        # the same steps.
        overflow = (~norm.isfinite()).float()
        self._found_inf_per_device(self.optimizer)[norm.device] = overflow
        inverse = 1 / self.scale(torch.ones_like(norm))
        for parameter in others:
            parameter.grad.mul_(inverse)
        return norm * inverse

    def count(self, norm: Tensor) -> Tensor | None:
        """1.0 if a gradient's norm has the step skipped, else 0.0; None in other formats."""
        if not self.is_enabled():
            return None
        overflow = (~norm.isfinite()).float()
        self._skipped += overflow
        return overflow

    def state_dict(self) -> dict[str, Any]:
        """The scale and the counts, for a checkpoint."""
        return super().state_dict() | {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned; how the scale changes is not taken from a file."""
        if not self.is_enabled():
            return
        saved = {name: state[name] for name in ("scale", "_growth_tracker")}
        super().load_state_dict(super().state_dict() | saved)
        self._skipped.fill_(state["skipped_steps"])


def create_momentum(optimizer: torch.optim.SGD) -> None:
    """Give parameters without momentum one of zero, which is what the first step makes of none."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
