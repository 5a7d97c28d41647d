"""Training in float16 on a GPU without bfloat16: tests/cuda/half_cases.py on a fake T4."""

import json
import subprocess
import sys

import pytest

from tests.cuda.cases import title
from tests.cuda.half_cases import CASES
from tests.helpers.fake_cuda.launcher import environment, reason_to_skip
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible")


@pytest.fixture(scope="module")
def results(stand_in):
    """{case: its line}, of one process."""
    env = environment(stand_in / "shim", cc=75) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cuda.half_cases", str(stand_in)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", [title(case) for case in CASES])
def test_case(name, results):
    assert name in results, f"the process ended before: {list(results)}"
    assert results[name]["ok"], results[name]["why"]


@pytest.mark.slow
def test_two_gpus_skip_the_same_steps(run_train):
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    code, printed = run_train(start, devices=2, cc=75)
    assert code == 0, printed[-3000:]
    assert ", float16; " in printed
    assert "  skipped steps " in printed, printed[-3000:]
