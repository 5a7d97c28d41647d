"""The settings that a step which has run out of memory is told to take: they have to fit."""

import types

import pytest
import torch

import data_gen
from tests.training.test_engine import make_batch, make_engine
from training import gpu_memory
from training.gpu_memory import (
    StepMemory,
    advise_on_memory,
    choose_training_cache,
    measure_step_memory,
)

GIB = 2**30
GPU = torch.device("cuda", 0)


def advise(needs, batch_size=512, accumulate=1, checkpointing=False):
    options = {"accumulate": accumulate, "checkpointing": checkpointing}
    return advise_on_memory(needs, batch_size=batch_size, lr=0.1, **options)


def test_what_fits_is_extrapolated_from_two_small_steps(monkeypatch):
    """r50 at 512 in bfloat16 on 8 GiB: 0.6 GiB and 33.2 MiB per image (17.6 GB in all)."""
    engine = make_engine()
    peaks = {8: 0.6 * GIB + 8 * 34e6, 16: 0.6 * GIB + 16 * 34e6}
    monkeypatch.setattr(gpu_memory, "_peak_of_step", lambda engine, count: peaks[count])
    assert measure_step_memory(engine) is None  # on a CPU there is nothing to measure
    engine.device = GPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    first = []  # a step that creates the momentum, which the two that count would differ by
    monkeypatch.setattr(engine, "trial_step", first.append)
    needs = measure_step_memory(engine)
    assert needs.fixed == pytest.approx(0.6 * GIB)
    assert needs.per_image == pytest.approx(34e6)
    assert needs.total == 8 * GIB
    assert first == [8]
    assert needs.images == int((0.8 * 8 - 0.6) * GIB / 34e6)  # 183

    def full(engine, count):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu_memory, "_peak_of_step", full)
    assert measure_step_memory(engine) is None


def test_accumulating_is_named_first_and_the_rate_is_scaled():
    needs = StepMemory(fixed=0.6 * GIB, per_image=34e6, total=8 * GIB)
    text = advise(needs)
    assert "0.60 GiB and 32.4 MiB per image, so 183 images at a time should fit." in text
    ways = text.split("Take ")[1].split(", or ")
    assert ways[0] == "--accumulate 3, which keeps the batch size and the learning rate"
    assert ways[1].startswith("--checkpoint-activations")
    assert ways[2] == "--batch-size 128 with --lr 0.025."
    assert "--checkpoint" not in advise(needs, checkpointing=True)
    # What failed is not proposed again, however much seems to fit.
    roomy = StepMemory(fixed=0, per_image=1e6, total=80 * GIB)
    assert "511 images at a time" in advise(roomy)
    assert "Take --accumulate 2," in advise(roomy)
    assert "Take --accumulate 3," in advise(roomy, accumulate=2)


def test_without_a_measurement_nothing_is_promised():
    text = advise(None, accumulate=2)
    assert text.startswith("Take --accumulate 4,")
    assert "should fit" not in text
    assert "--batch-size 128 with --lr 0.025." in text


def test_too_little_for_two_images():
    tiny = StepMemory(fixed=7 * GIB, per_image=34e6, total=8 * GIB)
    assert advise(tiny) == "Not even two images would fit; take a smaller --network."
    assert advise(None, batch_size=2, checkpointing=True) == "Take a smaller --network."


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"sample_rate": 0.5}])
def test_a_trial_step_is_a_step_on_so_many_images(settings, monkeypatch):
    engine = make_engine(**settings)
    engine.train()
    engine.train_step(*make_batch(), 0.1, 0)
    shapes = []
    hook = engine.model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    for count in gpu_memory.TRIALS:
        engine.trial_step(count)
    hook.remove()
    assert shapes == [(count, 3, 112, 112) for count in gpu_memory.TRIALS]


def test_the_cache_is_where_a_step_has_room_too(monkeypatch, capsys):
    """A 40 GB GPU, whose driver leaves 39.4, and CASIA-WebFace: r50 and r100 at 512, r50 at 128."""
    store = types.SimpleNamespace(can_cache=True, indices=range(490_623), device=GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (39.4e9, 40e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(data_gen, "available_memory", lambda: 100e9)
    engines = {"r50": (0.6e9, 33.2e6), "r100": (1e9, 52.1e6)}  # bytes, and bytes per image
    monkeypatch.setattr(
        gpu_memory, "measure_step_memory", lambda name: StepMemory(*engines[name], 39.4e9)
    )

    def choose(name, images, asked="auto"):
        return choose_training_cache(asked, store, lambda: name, images)

    assert choose("r100", 512) == "ram"  # 27.7 GB and 18.5 GB are more than 39.4 GB
    printed = capsys.readouterr().out
    assert "Beside a training step the GPU has 4.48 GiB left, the images take 17.20 GiB" in printed
    assert choose("r50", 512) == "ram"  # 17.6 GB would fit, but not with what the allocator holds
    assert choose("r50", 128) == "gpu"
    assert choose("r100", 512, "gpu") == "gpu"
    assert choose("none", 512, "none") == "none"  # and nothing is measured
    monkeypatch.setattr(data_gen, "available_memory", lambda: 10e9)
    assert choose("r100", 512) == "none"
    store.can_cache = False
    assert choose("none", 512) == "auto"
