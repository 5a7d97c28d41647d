"""Gradient accumulation: the step is that of the batch in one piece."""

import pytest
import torch
from torch import nn

from config import Config
from train import build_engine

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
