"""Shared by the tests of the CUDA path: a stand-in for libcuda, and commands that run on it."""

import json
import subprocess
import sys

import pytest

from tests.helpers.fake_cuda.launcher import environment
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FLAGS, write_tiny_set

LAUNCHER = ["-m", "tests.helpers.fake_cuda.launcher"]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A folder with a compiled stand-in for libcuda and a tiny training set."""
    folder = tmp_path_factory.mktemp("cuda")
    write_tiny_set(folder / "set")
    environment(folder / "shim")
    return folder


@pytest.fixture(scope="session")
def on_fake_gpus(stand_in):
    """A function that runs Python with fake GPUs: its status and all that it printed."""

    def run(*arguments, **settings):
        env = environment(stand_in / "shim", **settings) | {"OMP_NUM_THREADS": "1"}
        limits = {"capture_output": True, "text": True, "timeout": 600, "check": False}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, **limits)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def run_cases(stand_in, on_fake_gpus):
    """A function that runs cases (none named: all): their lines, of every process of a group."""

    def run(*names, start=(), **settings):
        code, printed = on_fake_gpus(
            *start, "-m", "tests.cuda.cases", str(stand_in), *names, **settings
        )
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"case"')]
        assert code == 0 and lines, printed[-2000:]
        return lines

    return run


@pytest.fixture
def run_train(stand_in, on_fake_gpus, tmp_path):
    """A function that runs train.py for an epoch: its status and all that it printed."""

    def run(start=(), device="auto", **settings):
        where = f"--train-set {stand_in}/set --data-dir {tmp_path} --images-dir {tmp_path} "
        where += f"--runs-dir {tmp_path}/runs --epochs 1 --compile off"
        flags = FLAGS.replace("--device cpu", f"--device {device}")
        arguments = [*LAUNCHER, "train.py", *flags.split(), *where.split()]
        return on_fake_gpus(*start, *arguments, **settings)

    return run
