"""A training set of many record files on its way to a GPU."""

from types import SimpleNamespace

import numpy as np
import torch

from training.sharded_dataset import ShardOrder, ShardStore


def test_labels_are_copied_without_waiting_for_the_step(monkeypatch):
    """The copy of a step's labels is queued behind the step before, which is still running."""
    starts = np.array([0, 40, 64])
    reader = SimpleNamespace(num_classes=9, labels_of=lambda positions: positions % 9)
    store = ShardStore(reader, ShardOrder(starts, 16, seed=0), torch.device("cpu"), workers=1)
    copies, to = [], torch.Tensor.to

    def watched(self, *arguments, **options):
        copies.append(options)
        return to(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    labels = store.labels_of(np.array([3, 10, 63]))
    assert labels.tolist() == [3, 1, 0]
    assert copies == [{"non_blocking": True}]
