"""Groups of processes on fake GPUs, whose collectives wait for a dead process as NCCL's do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fileio.checkpoint_file import load_checkpoint
from tests.helpers.fake_cuda.launcher import environment, reason_to_skip
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FLAGS

pytestmark = [
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible"),
    pytest.mark.slow,
]
SCRIPT = str(Path(__file__).with_name("train_with_fault.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
FAKE = ["-m", "tests.helpers.fake_cuda.launcher"]
WITHOUT_DEVICE = FLAGS.replace("--device cpu", "").split()


def run(stand_in, tmp_path, fault, flags, start=TORCHRUN, devices=2):
    """train_with_fault.py under torchrun on fake GPUs; its status and all that it printed."""
    env = environment(stand_in / "shim", devices=devices) | {"OMP_NUM_THREADS": "1"}
    where = ["--runs-dir", f"{tmp_path}/runs", "--images-dir", str(tmp_path)]
    where += ["--data-dir", str(tmp_path)]
    command = [sys.executable, *start, *FAKE, SCRIPT, *fault.split(), *flags, *where]
    limits = {"timeout": 600, "check": False, "capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=env, **limits)
    return done.returncode, done.stdout + done.stderr


def new_run(stand_in, more=""):
    set_flags = ["--train-set", f"{stand_in}/set", "--compile", "off"]
    return [*WITHOUT_DEVICE, *set_flags, *more.split()]


def newest(tmp_path):
    return load_checkpoint(next(tmp_path.glob("runs/*/last.pt")))


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_is_killed_ends_the_one_that_waits_for_its_gpu(dying, stand_in, tmp_path):
    code, printed = run(stand_in, tmp_path, f"kill {dying} 5", new_run(stand_in))
    assert code == 1, printed
    # In torchrun's report: without the watchdog both end by SIGKILL, the other by torchrun's.
    assert sorted(re.findall(r"exitcode  : (\S+)", printed)) == ["-9", "2"], printed
    assert "At epoch 2, step 1 of 4: Another of the 2 processes has ended" in printed, printed
    assert f"this one (rank {1 - dying}) ends too" in printed
    assert re.search(r"resume, with any number of processes, with: torchrun .+--resume", printed)
    assert '/training/run.py", line' not in printed, printed  # torchrun has a traceback of its own
    before = newest(tmp_path)
    assert (before["epoch"], before["step"]) == (1, 0)


def test_memory_that_fills_in_one_process_ends_both_with_a_sentence(stand_in, tmp_path):
    code, printed = run(stand_in, tmp_path, "memory 1 3", new_run(stand_in))
    assert code == 1, printed
    assert "At epoch 1, step 3 of 4 the GPU's memory is full" in printed, printed
    assert "Another of the 2 processes has ended or cannot be reached (it reports an err" in printed
    assert "SIGKILL" not in printed
    assert '/training/run.py", line' not in printed, printed


def test_a_run_of_a_cpu_resumes_in_two_processes_beside_one_gpu(stand_in, tmp_path):
    on_cpu = new_run(stand_in, "--device cpu --epochs 1")
    code, printed = run(stand_in, tmp_path, "none 0 0", on_cpu, start=(), devices=1)
    assert code == 0, printed
    flags = ["--resume", "--epochs", "2"]
    code, printed = run(stand_in, tmp_path, "none 0 0", flags, devices=1)
    assert code == 0, printed
    assert "on cpu" in printed
    assert newest(tmp_path)["epoch"] == 2
    code, printed = run(stand_in, tmp_path, "none 0 0", new_run(stand_in), devices=1)
    assert "torchrun started 2 processes on a machine with 1 GPUs" in printed
    assert printed.count("use --nproc-per-node=1") == 1
