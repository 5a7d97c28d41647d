"""Batches in parts, and activations computed twice: the plain step, where mathematics says so."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from config import Config
from models import build_model
from train import build_engine
from training.activation_checkpointing import enable_activation_checkpointing

CPU = torch.device("cpu")


def make_engine(**settings):
    torch.manual_seed(0)
    cfg = Config(network="tiny", emb_size=16, batch_size=12, margin_s=16.0, amp=False, **settings)
    return build_engine(cfg, 5, CPU)


def make_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 112, 112, generator=generator), torch.arange(12) % 5


def steps(engine, count=3, evaluation=True):
    """Losses and the weights after some steps."""
    losses = []
    for number in range(count):
        engine.train()
        for module in engine.model.modules():
            if evaluation and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        losses.append(engine.train_step(*make_batch(), 0.001, number))
    weights = [v.flatten().double() for v in engine.model.state_dict().values()]
    weights.append(engine.head.weight.detach().flatten().double())
    return torch.tensor(losses), torch.cat(weights)


@pytest.mark.parametrize("more", [{}, {"sample_rate": 0.999}, {"focal_loss": 2.0}])
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_of_a_batch_make_the_same_step(parts, more):
    # Without batch statistics, which a part has of its own, and dropout.
    more = {"dropout": 0.0, "clip_norm": 2.0, **more}
    plain, weights = steps(make_engine(**more))
    actual, actual_weights = steps(make_engine(accumulate=parts, **more))
    torch.testing.assert_close(actual, plain, rtol=1e-5, atol=0)
    assert (actual_weights - weights).norm() / weights.norm() < 1e-6
    start = torch.cat([p.detach().flatten().double() for p in make_engine(**more).parameters])
    assert not torch.equal(start[-80:], weights[-80:])


@pytest.mark.parametrize("network", ["tiny", "mobilefacenet"])
def test_activations_computed_twice_change_no_bit(network):
    torch.manual_seed(0)
    plain = build_model(network, 16, dropout=0.4)
    twice = copy.deepcopy(plain)
    enable_activation_checkpointing(twice)
    assert list(twice.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 112, 112)
    for model in (plain, twice):
        for _ in range(2):
            torch.manual_seed(5)
            model(images).square().sum().backward()
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    # Running statistics included: the second time they are left alone.
    for name, value in plain.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name
    momenta = [m.momentum for m in twice.modules() if hasattr(m, "momentum")]
    assert set(momenta) == {0.1}


def test_far_fewer_activations_are_kept():
    saved = []
    for twice in (False, True):
        model = build_model("r18", 16)
        if twice:
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
