"""What test_half.py runs in a process whose fake GPUs have no bfloat16 (FAKE_CUDA_CC=75: a T4).

    python -m tests.cuda.half_cases FOLDER [CASE ...]

Like cases.py, which has the rest.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import sys
from pathlib import Path

import torch
from torch import nn

from tests.cuda import cases
from tests.cuda.runs import open_run, run_main, settings
from tests.cuda.training_cases import nothing_waits
from tests.helpers.tiny import assert_same

TOO_LARGE = 2.0**40


def set_scale(engine, scale: float) -> None:
    """Give the loss a scale that has not been found by training."""
    state = {"scale": scale, "_growth_tracker": 0}
    engine.scaler.load_state_dict(state | {"skipped_steps": engine.scaler.skipped_steps})


@contextlib.contextmanager
def no_waits(report):
    """A block in which the host waits for nothing."""
    report.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not report.waits(), report.waits()


def losses_are_close_to_those_of_float32(folder: Path, report, *flags: str) -> dict:
    """Three steps from the same weights; convolutions compute in float16, the loss in float32."""
    losses, dtypes = [], set()
    for amp in ("--no-amp", ""):
        run = open_run(folder, f"--dropout 0 --seed 3 {amp} {' '.join(flags)}")
        for module in run.engine.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not amp:
                module.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
        set_scale(run.engine, 256.0)
        batches = run._batches()
        steps = [
            run.train_step(b.images, b.labels, 0.001)
            for b, _ in zip(batches, range(3), strict=False)
        ]
        losses.append([float(step.loss) for step in steps])
        assert run.engine.scaler.skipped_steps == 0
    assert run.engine.precision.startswith("float16 on cuda")
    assert dtypes == {torch.float16}
    assert steps[0].loss.dtype == torch.float32
    apart = max(abs(half / exact - 1) for exact, half in zip(*losses, strict=True))
    assert 0 < apart < 0.01, losses
    return {"losses": losses, "apart": apart}


def an_overflow_changes_nothing(folder: Path, report, *flags: str) -> dict:
    """The first step overflows, and a later one: counted, and the host does not wait for that.

    All operations are deterministic ones; PyTorch then fills uninitialised memory with nan.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        return _overflows(folder, report, *flags)
    finally:
        torch.use_deterministic_algorithms(False)


def _overflows(folder: Path, report, *flags: str) -> dict:
    run = open_run(folder, " ".join(flags))
    engine, (batch, *_) = run.engine, run._batches()
    for step in range(3):
        set_scale(engine, 16.0 if step == 1 else TOO_LARGE)
        before = _trained(engine)
        with no_waits(report):
            result = run.train_step(batch.images, batch.labels, 0.1)
        assert result.loss.isfinite()
        assert result.gradient_norm.isfinite() == (step == 1)
        same = [torch.equal(a, b) for a, b in zip(before, _trained(engine), strict=True)]
        assert not any(same) if step == 1 else all(same)
        if step != 1:
            assert engine.scaler.loss_scale == TOO_LARGE / 2
    assert engine.scaler.skipped_steps == 2
    assert engine.is_finite()
    return {}


def _trained(engine) -> list[torch.Tensor]:
    """Copies of weights and momentum."""
    state = engine.optimizer.state
    tensors = [*engine.parameters, *(state[p]["momentum_buffer"] for p in engine.parameters)]
    return [tensor.detach().clone() for tensor in tensors]


def resumes_with_its_scale(folder: Path, report) -> dict:
    """After a step that overflows and one that does not; all the weights to the last bit."""
    flags = "--dropout 0.3 --ema 0.9"
    straight, resumed = open_run(folder, flags), open_run(folder, flags)
    batches = list(itertools.islice(straight._batches(), 4))
    for number, batch in enumerate(batches):
        if number < 2:
            set_scale(straight.engine, (TOO_LARGE, 1024.0)[number])
        if number == 2:
            state = copy.deepcopy(straight.state_dict())
        straight._run_step(batch)
    resumed.load_state_dict(state, folder / "last.pt")
    for batch in batches[2:]:
        resumed._run_step(batch)
    ends = [run.state_dict() for run in (straight, resumed)]
    for part in ("model", "head", "ema"):
        for name, value in ends[0][part].items():
            assert torch.equal(value, ends[1][part][name]), name
    assert_same(ends[1]["window"].cpu(), ends[0]["window"].cpu(), "window")  # with nan in it
    assert_same(ends[1]["scaler"], ends[0]["scaler"], "scaler")
    scaler = ends[0]["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"], scaler["skipped_steps"]) == (1024, 3, 1), (
        scaler
    )
    return scaler


def a_loss_of_nan_is_no_overflow(folder: Path, report) -> dict:
    """It ends the run with a message that names the way out."""
    import train
    from training.run import Run

    step = Run.train_step

    def train_step(self, images, labels, lr):
        return step(self, images * math.inf if self.step == 2 else images, labels, lr)

    Run.train_step = train_step
    try:
        code, printed = run_main(train.main, settings(folder, "nan", ""))
    finally:
        Run.train_step = step
    assert code == 2, printed
    assert "on cuda:0, float16; " in printed, printed
    assert "The loss is nan at epoch 1, step 3 of 4" in printed, printed
    assert "--no-amp trains in float32" in printed, printed
    return {}


ALL_AT_ONCE = "--accumulate 2 --clip-norm 1 --ema 0.9 --checkpoint-activations --no-decay-bn"
CASES: list[tuple] = [
    (losses_are_close_to_those_of_float32, "--accumulate 2 --clip-norm 1"),
    (an_overflow_changes_nothing, ALL_AT_ONCE),
    (an_overflow_changes_nothing, "--sample-rate 0.5 --batch-size 2"),
    (resumes_with_its_scale,),
    (a_loss_of_nan_is_no_overflow,),
    (nothing_waits, "--margin adaface"),
]


if __name__ == "__main__":
    cases.main(Path(sys.argv[1]), sys.argv[2:], CASES)
