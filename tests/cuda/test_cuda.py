"""The CUDA path without a GPU: tests/cuda/cases.py in a process with fake GPUs.

What these tests cannot see is in tests/helpers/fake_cuda/__init__.py; `make gpu` is for real ones.
"""

import json
import subprocess
import sys

import pytest

from tests.cuda.cases import CASES, title
from tests.helpers.fake_cuda.launcher import environment, reason_to_skip
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FLAGS

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible")


@pytest.fixture(scope="module")
def results(stand_in):
    """{case: its line}, of one process: importing PyTorch takes longest."""
    env = environment(stand_in / "shim") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cuda.cases", str(stand_in)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", [title(case) for case in CASES])
def test_case(name, results):
    assert name in results, f"the process ended before: {list(results)}"
    assert results[name]["ok"], results[name]["why"]


def test_values_are_put_into_results_of_the_same_shape_and_type(results):
    (line,) = [line for case, line in results.items() if case.startswith("the CPU's results")]
    assert line["ok"], line["why"]


def run_train(stand_in, tmp_path, start=(), device="auto", more="", **fake):
    """train.py on fake GPUs, as a command; its status and all that it printed."""
    env = environment(stand_in / "shim", **fake) | {"OMP_NUM_THREADS": "1"}
    where = f"--train-set {stand_in}/set --data-dir {tmp_path} --images-dir {tmp_path} "
    where += f"--runs-dir {tmp_path}/runs"
    flags = FLAGS.replace("--device cpu", f"--device {device}").split()
    launcher = ["-m", "tests.helpers.fake_cuda.launcher", "train.py"]
    command = [sys.executable, *start, *launcher, *flags, *where.split(), "--epochs", "1"]
    command += ["--compile", "off", *more.split()]
    limits = {"timeout": 300, "check": False}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **limits)
    return done.returncode, done.stdout + done.stderr


def test_a_card_that_the_wheel_does_not_support_is_left_alone_by_auto(stand_in, tmp_path):
    code, printed = run_train(stand_in, tmp_path, cc=70)
    assert code == 0, printed
    assert "on cpu" in printed
    assert "compute capability 7.0" in printed
    assert "Traceback" not in printed


def test_a_card_that_the_wheel_does_not_support_is_refused_if_asked_for(stand_in, tmp_path):
    code, printed = run_train(stand_in, tmp_path, device="cuda", cc=70)
    assert code == 2, printed
    assert "compute capability 7.0" in printed
    assert "Traceback" not in printed


def test_a_driver_that_is_too_old_is_said(stand_in, tmp_path):
    code, printed = run_train(stand_in, tmp_path, error=35)
    assert code == 0, printed
    assert "cannot be used" in printed
    assert "on cpu" in printed


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("processes", [1, 2])
def test_groups_train_each_process_on_its_own_device(processes, device, stand_in, tmp_path):
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]  # a free port
    code, printed = run_train(stand_in, tmp_path, start, device, devices=2)
    assert code == 0, printed[-3000:]
    for rank in range(processes):
        assert f"rank {rank}: contexts on devices [{rank}]" in printed, printed[-3000:]
