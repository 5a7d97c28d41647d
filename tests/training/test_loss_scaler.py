"""float16 with a loss scale: overflows are skipped and counted, whatever the settings.

On a CPU, which computes in float16, too; tests/cuda/half_cases.py has the same on fake GPUs.
"""

import itertools
import math

import pytest
import torch
from torch import nn

import train
from config import parse_args
from fileio.checkpoint_file import load_checkpoint, save_checkpoint
from heads.registry import HEADS, build_head
from tests.helpers.host_waits import HostWaits
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set
from training.engine import Engine, build_optimizer
from training.step_errors import bad_step

CPU = torch.device("cpu")
TOO_LARGE = 2.0**40


class SmallNetwork(nn.Module):
    """(N, 3, 112, 112) to (N, 16) embeddings, in milliseconds."""

    def __init__(self):
        super().__init__()
        self.pool, self.fc = nn.AvgPool2d(16), nn.Linear(147, 16, bias=False)
        self.features = nn.BatchNorm1d(16)

    def forward(self, x):
        return self.features(self.fc(self.pool(x).flatten(1)).float())


def make_engine(
    amp=torch.float16, scale=2.0**16, margin="arcface", sample_rate=1.0, momentum=0.9, **settings
):
    torch.manual_seed(0)
    model = SmallNetwork()
    margin_m = 0.2 if HEADS[margin].has_margin else 0.0
    head = build_head(margin, 16, 12, margin_s=16, margin_m=margin_m, sample_rate=sample_rate)
    optimizer = build_optimizer(model, head, 0.1, momentum=momentum)
    options = {"device": CPU, "slice_size": 8, "amp": amp, **settings}
    engine = Engine(model, head, nn.CrossEntropyLoss(), optimizer, **options)
    set_scale(engine, scale)
    engine.train()
    return engine


def set_scale(engine, scale):
    skipped = engine.scaler.skipped_steps
    state = {"scale": scale, "_growth_tracker": 0, "skipped_steps": skipped}
    engine.scaler.load_state_dict(state)


def make_batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 112, 112, generator=generator), torch.arange(8) + step % 4


def train_step(engine, step=0, lr=0.1):
    return engine.train_step(*make_batch(step), lr, step)


def trained(engine):
    """Copies of all weights and their momentum."""
    state = engine.optimizer.state
    momentum = [state[p]["momentum_buffer"].clone() for p in engine.parameters if state[p]]
    return [p.detach().clone() for p in engine.parameters], momentum


# ------------------------------------------------------------------------------ a step


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "clip_norm": 0.5},
        {"sample_rate": 0.5},
        {"sample_rate": 0.5, "clip_norm": 0.5, "accumulate": 2},
        {"momentum": 0.0},
        {"ema_decay": 0.9},
        *[{"margin": name} for name in ("curricularface", "adaface", "unitsface", "softmax")],
    ],
)
def test_a_step_that_overflows_changes_no_weight_and_no_momentum(settings):
    torch.use_deterministic_algorithms(True)  # uninitialised memory is filled with nan
    try:
        engine = make_engine(scale=TOO_LARGE, **settings)
        initial = engine.optimizer.state_dict()["state"]
        assert all(not state["momentum_buffer"].any() for state in initial.values())
        for step in range(3):  # the first, which begins the momentum, and a later one
            if step == 1:
                set_scale(engine, 256.0)
            before = trained(engine)
            loss, _, norm = train_step(engine, step)
            assert loss.isfinite()
            assert norm.isfinite() == (step == 1)
            assert engine.scaler.loss_scale == [TOO_LARGE / 2, 256.0, TOO_LARGE / 2][step]
            changed = [
                not torch.equal(a, b)
                for part in zip(before, trained(engine), strict=True)
                for a, b in zip(*part, strict=True)
            ]
            assert all(changed) if step == 1 else not any(changed)
            assert engine.is_finite()
            set_scale(engine, TOO_LARGE)
        assert engine.scaler.skipped_steps == 2
        if engine.ema is not None:
            assert all(value.isfinite().all() for value in engine.ema.average.values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("settings", [{}, {"sample_rate": 0.5}])  # then the optimiser steps nothing
def test_a_frozen_network_has_its_head_trained_and_its_overflows_skipped(settings):
    too_large = 2.0**120  # the head computes in float32
    engine = make_engine(scale=too_large, **settings)
    engine.freeze(True)
    engine.train()
    before = trained(engine)
    assert not train_step(engine).gradient_norm.isfinite()
    assert (engine.scaler.skipped_steps, engine.scaler.loss_scale) == (1, too_large / 2)
    assert_same(trained(engine), before)
    set_scale(engine, 256.0)
    assert train_step(engine, 1).gradient_norm.isfinite()
    (*network, head), (*momentum, momentum_of_head) = trained(engine)
    assert_same(network, before[0][:-1])
    assert not any(buffer.any() for buffer in momentum)
    assert momentum_of_head.any() and not torch.equal(head, before[0][-1])


@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.5, "accumulate": 2}, {"sample_rate": 0.5, "clip_norm": 0.5}]
)
def test_the_scale_is_in_no_gradient_norm_and_no_weight(settings):
    """float16 against float32: what remains is rounding."""
    results = []
    for amp in (None, torch.float16):
        engine = make_engine(amp, scale=256.0 if amp else None, **settings)
        norms = [train_step(engine, step).gradient_norm for step in range(3)]
        results.append([torch.stack(norms), *trained(engine)[0]])
    assert engine.scaler.skipped_steps == 0
    for exact, half in zip(*results, strict=True):
        assert not torch.equal(exact, half)
        assert (half - exact).norm() < 0.01 * exact.norm()


def test_no_step_waits_for_the_device():
    for settings in ({"accumulate": 2, "clip_norm": 1.0}, {"sample_rate": 0.75, "ema_decay": 0.9}):
        engine = make_engine(scale=TOO_LARGE, **settings)
        train_step(engine)
        with HostWaits() as waits:
            train_step(engine, 1)
        assert not waits.operations


def test_only_float16_is_scaled():
    for amp, name in ((None, "float32"), (torch.bfloat16, "bfloat16")):
        engine = make_engine(amp)
        train_step(engine)
        assert engine.precision.startswith(f"{name} on cpu")
        assert engine.scaler.loss_scale is None
        assert engine.scaler.skipped_steps == 0
        assert "scaler" not in engine.state_dict()
    assert make_engine().precision.startswith("float16 on cpu")


def test_a_file_sets_the_scale_and_not_how_it_changes():
    engine = make_engine()
    saved = {"scale": 8.0, "_growth_tracker": 5, "skipped_steps": 7, "growth_factor": 1e9}
    engine.scaler.load_state_dict(saved | {"growth_interval": 1, "backoff_factor": 3.0})
    train_step(engine)
    assert engine.scaler.state_dict() == {
        "scale": 8.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 6,
        "skipped_steps": 7,
    }


def test_all_processes_skip_the_step_that_overflows_in_one(groups, tmp_path):
    """The gradient of class centres is each process's own: here rank 1's alone is infinite."""
    groups.run(tmp_path, 2, "float16_steps")
    ranks = [torch.load(tmp_path / f"steps-{rank}.pt") for rank in range(2)]
    for steps in ranks:
        assert [step["skipped"] for step in steps] == [0, 1, 1]
        assert [step["scale"] for step in steps] == [1024.0, 512.0, 512.0]
        changed = [not torch.equal(a["head"], b["head"]) for a, b in itertools.pairwise(steps)]
        assert changed == [False, True]
    for mine, other in zip(*ranks, strict=True):
        assert mine["norm"].isfinite() == other["norm"].isfinite()
        assert_same(mine["model"], other["model"])
        assert_same(mine["ema"], other["ema"])


# ------------------------------------------------------------------------------ the end of a run


def test_which_step_ends_a_run():
    fine, overflow, lost = [1.0, 0.5, 2.0], [1.0, 0.5, math.inf], [math.nan, 0.5, math.nan]
    for steps, scale, expected in (
        ([fine, fine], None, None),
        ([fine, overflow, lost], None, 1),
        ([fine, overflow, fine], 64.0, None),
        ([fine, overflow, lost, lost], 64.0, 2),
        ([overflow, fine, overflow, overflow], 1.0, None),
        ([overflow, fine, overflow, overflow], 0.5, 3),
        ([overflow, lost, overflow], 0.5, 1),
    ):
        assert bad_step(torch.tensor(steps), scale) == expected, (steps, scale)
    assert bad_step(torch.zeros(0, 3), 0.5) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """Run train.py in float16 on SmallNetwork; returns the run's folder and the exit status."""
    monkeypatch.setattr("utils.autocast_dtype", lambda device: torch.float16)
    monkeypatch.setattr("models.build_model", lambda *_, **__: SmallNetwork())
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
    monkeypatch.setattr("evaluation.shared_set.find_set", lambda *_: None)  # no LFW

    def run(more="", runs="runs"):
        argv = f"--resume {more} --runs-dir {tmp_path}/{runs}".split()
        if not list(tmp_path.glob(f"{runs}/*")):
            argv = f"{FLAGS} --train-set {folder} --images-dir {tmp_path} {more}".split()
            argv += ["--runs-dir", f"{tmp_path}/{runs}"]
        code = 0
        try:
            train.main(parse_args(argv, "train"))
        except SystemExit as error:
            code = error.code
        return next((tmp_path / runs).glob("[!.]*")), code

    return run


@pytest.fixture
def poisoned(monkeypatch):
    """Have change(engine, images) called on the images of each step from number `first` on."""

    def poison(first, change):
        step = Engine.train_step

        def changed(self, images, labels, lr, number):
            return step(
                self, change(self, images) if number >= first else images, labels, lr, number
            )

        monkeypatch.setattr(Engine, "train_step", changed)

    return poison


def spoil_gradient(engine, images):
    hook = engine.head.weight.register_hook(lambda grad: hook.remove() or grad * math.nan)
    return images


def test_skipped_steps_are_printed_and_a_resumed_run_is_the_same(start, capsys):
    whole, code = start()
    assert code == 0
    printed = capsys.readouterr().out
    assert "on cpu, float16; 4 steps per epoch" in printed
    state = load_checkpoint(whole / "last.pt")
    skipped = state["scaler"]["skipped_steps"]
    assert 0 < skipped < 8
    assert state["scaler"]["scale"] == 65536 / 2**skipped
    assert f"%  skipped steps {skipped}  valid loss" in printed
    halves, _ = start("--epochs 1 --schedule step", "halves")
    start("--epochs 2", "halves")
    whole, _ = start("--schedule step", "step")
    resumed, straight = (load_checkpoint(run / "last.pt") for run in (halves, whole))
    assert straight["scaler"]["skipped_steps"] > 0
    for state in (resumed, straight):
        for name in ("runs_dir", "epochs"):
            state["config"].pop(name)
    assert_same(resumed, straight)


def test_a_loss_that_is_not_finite_ends_the_run(start, capsys, poisoned):
    poisoned(5, lambda engine, images: images * math.inf)
    run, code = start()
    assert code == 2
    error = capsys.readouterr().err
    assert "The loss is nan at epoch 2, step 2 of 4 (loss nan, lr " in error
    assert "a --clip-norm. float16 ends at 65,504: --no-amp trains in float32." in error
    assert "loss scale" not in error
    state = load_checkpoint(run / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_gradient_that_no_scale_helps_ends_the_run(start, capsys, poisoned):
    poisoned(2, spoil_gradient)
    run, code = start("--epochs 6 --checkpoint-every 0")
    assert code == 2
    error = capsys.readouterr().err
    assert "The gradient's norm is nan, even with a loss scale of 0." in error
    assert "(loss nan" not in error
    assert "--no-amp trains in float32" in error
    bad = load_checkpoint(run / "bad_batch.pt")
    assert math.isfinite(bad["loss"])
    assert bad["loss_scale"] < 1
    # Every checkpoint before it is one of skipped steps, with the weights of the last good one.
    state = load_checkpoint(run / "last.pt")
    assert state["scaler"]["scale"] >= 1
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("first", ["float16", "float32"])
def test_a_run_can_be_resumed_in_another_number_format(start, capsys, monkeypatch, first):
    other = "float32" if first == "float16" else "float16"
    formats = {"float16": torch.float16, "float32": None}
    monkeypatch.setattr("utils.autocast_dtype", lambda device: formats[first])
    start("--epochs 1 --schedule step")
    monkeypatch.setattr("utils.autocast_dtype", lambda device: formats[other])
    run, code = start("--epochs 2")
    assert code == 0
    assert f"was computed in {first} on cpu" in capsys.readouterr().out
    state = load_checkpoint(run / "last.pt")
    assert ("scaler" in state) == (other == "float16")


def test_a_scale_that_no_run_writes_is_refused(start, capsys):
    run, _ = start("--epochs 1")
    state = load_checkpoint(run / "last.pt")
    valid = state["scaler"]
    wrong = [{"scale": math.nan}, {"scale": 0.5}, {"scale": "2"}, {"skipped_steps": None}]
    for scaler in (None, {}, *[valid | entry for entry in wrong]):
        save_checkpoint(run / "last.pt", state | {"scaler": scaler})
        assert start("--epochs 2")[1] == 2
        error = capsys.readouterr().err
        assert "is not a checkpoint of this train.py (see its scaler)" in error
