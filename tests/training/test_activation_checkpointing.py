import copy

import numpy as np
import pytest
import torch

from models import build_model
from training.activation_checkpointing import enable_activation_checkpointing


@pytest.mark.parametrize("network", ["tiny", "mobilefacenet"])
def test_activation_checkpointing_changes_no_bit(network):
    torch.manual_seed(0)
    plain = build_model(network, 16, dropout=0.4)
    checkpointed = copy.deepcopy(plain)
    enable_activation_checkpointing(checkpointed)
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 112, 112)
    for model in (plain, checkpointed):
        for _ in range(2):
            torch.manual_seed(5)
            model(images).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    # Running statistics included: the recomputation does not update them.
    for name, value in plain.state_dict().items():
        assert torch.equal(value, checkpointed.state_dict()[name]), name
    momenta = [m.momentum for m in checkpointed.modules() if hasattr(m, "momentum")]
    assert set(momenta) == {0.1}


def test_far_fewer_activations_are_saved():
    saved = []
    for checkpointed in (False, True):
        model = build_model("r18", 16)
        if checkpointed:
            enable_activation_checkpointing(model)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.randn(2, 3, 112, 112))
        parameters = {p.data_ptr() for p in model.parameters()}
        saved.append(sum(size for pointer, size in sizes.items() if pointer not in parameters))
        del out
    print(np.array(saved) / 2**20, "MiB")
    assert saved[1] < saved[0] / 2
