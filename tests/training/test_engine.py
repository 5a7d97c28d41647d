"""The step of SGD: what is promised of it besides its numbers."""

import pytest
import torch

from config import Config
from heads.registry import HEADS
from tests.helpers.host_waits import HostWaits
from train import build_engine

CPU = torch.device("cpu")
OPTIONS = [
    {"focal_loss": 2.0, "ema": 0.9, "clip_norm": 1.0, "decay_bn": False},
    {"accumulate": 2, "checkpoint_activations": True},
    {"sample_rate": 0.5},
]


def make_engine(num_classes=5, **settings):
    torch.manual_seed(0)
    settings = {"margin_s": 16.0, "amp": False, **settings}
    return build_engine(
        Config(network="tiny", emb_size=16, batch_size=8, **settings), num_classes, CPU
    )


def make_batch(num_classes=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 112, 112, generator=generator), torch.arange(8) % num_classes


# ------------------------------------------------------------------------------ waiting


def margin_settings(name):
    settings = {"margin": name} if HEADS[name].has_margin else {"margin": name, "margin_m": 0.0}
    return settings | ({"margin_s": 1.0} if name == "softmax" else {})


@pytest.mark.parametrize("settings", [*map(margin_settings, HEADS), *OPTIONS])
def test_a_step_never_waits_for_a_gpu(settings):
    """Counted on a CPU, by the operations that would wait."""
    engine = make_engine(64, **settings)
    engine.train()
    engine.train_step(*make_batch(64), 0.01, 0)
    with HostWaits() as waits:
        engine.train_step(*make_batch(64), 0.01, 1)
    assert not waits.operations
    engine.freeze(True)
    engine.train()
    with HostWaits() as waits:
        engine.train_step(*make_batch(64), 0.01, 2)
    assert not waits.operations
