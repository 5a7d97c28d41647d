"""GPU memory that fills, without a GPU: tests/cuda/memory_cases.py, and a group of two."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fileio.bin_sets import write_bin
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from tests.cuda.cases import title
from tests.cuda.memory_cases import CASES
from tests.helpers.fake_cuda.launcher import environment, reason_to_skip
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FLAGS

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The stand-in for libcuda, 2,000 images; and 150 of them, with 64 pairs of them as LFW."""
    folder = tmp_path_factory.mktemp("memory")
    environment(folder / "shim")
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 255, (4, 7, 7, 3))
    noise = rng.normal(0, 20, (2000, 7, 7, 3))
    small = np.clip(centres[np.arange(2000) // 500] + noise, 0, 255).astype(np.uint8)
    jpegs = [encode_jpeg(image.repeat(16, 0).repeat(16, 1)) for image in small]
    write_dataset(folder / "set", jpegs, [i // 500 for i in range(2000)])
    few = [*jpegs[:75], *jpegs[500:575]]
    write_dataset(folder / "small", few, [i // 75 for i in range(150)])
    # Faces 2 i and 2 i + 1 of the first 128 are a pair: of one identity but for the last 64 faces,
    # which are an image of each.
    faces = [*few[:64], *(few[i // 2 + 75 * (i % 2)] for i in range(64))]
    write_bin(folder / "small/lfw.bin", faces, [i < 32 for i in range(64)])
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """{case: its line}, of one process: importing PyTorch takes longest."""
    env = environment(folder / "shim") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cuda.memory_cases", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", [title(case) for case in CASES])
def test_case(name, results):
    assert name in results, f"the process ended before: {list(results)}"
    assert results[name]["ok"], results[name]["why"]


@pytest.mark.slow
@pytest.mark.parametrize(("gigabytes", "cache"), [(0.22, "ram"), (1, "gpu")])
def test_processes_of_a_group_choose_one_cache(folder, tmp_path, gigabytes, cache):
    """Each has its own GPU and 64 of the 128 images of a batch."""
    env = environment(folder / "shim", devices=2, gb=gigabytes) | {"OMP_NUM_THREADS": "1"}
    where = f"--train-set {folder}/set --data-dir {tmp_path} --images-dir {tmp_path} "
    where += f"--runs-dir {tmp_path}/runs --device cuda --batch-size 128 --eval-batch 64 "
    where += "--epochs 1 --valid-fraction 0.9 --compile off --augment none"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    command += ["tests.helpers.fake_cuda.launcher", "train.py", *FLAGS.split(), *where.split()]
    limits = {"timeout": 300, "check": False}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **limits)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    assert f"cache: {cache}" in printed
