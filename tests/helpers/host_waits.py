"""Operations that would make the host wait for a GPU, counted on a CPU.

    with HostWaits() as waits:
        engine.train_step(images, labels, lr=0.1, step=0)
    assert not waits.operations

On a GPU the host waits where a size depends on values (masks, nonzero, unique), where a value is
asked for (float, int, bool of a tensor) and where a tensor is made of Python numbers.
"""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::masked_select",
    "aten::_local_scalar_dense",
    "aten::lift_fresh",  # torch.tensor(numbers, device=...)
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class HostWaits(TorchDispatchMode):
    """Counts waiting operations in `operations` while the block runs."""

    def __init__(self):
        super().__init__()
        self.operations = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in INDEXING:
            tensors = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in tensors):
                self.operations[f"{name} by a mask"] += 1
        elif name in WAITING:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))
