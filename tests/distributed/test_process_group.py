"""train.py in groups of processes, as torchrun starts them, against one process."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fileio.checkpoint_file import load_checkpoint
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FLAGS, write_tiny_set

# Gentle enough that a rounding error does not grow: the control, one process with each batch
# backwards, says how much of a difference is rounding.
GENTLE = "--network tiny --emb-size 64 --margin-s 8 --batch-size 8 --epochs 1 --valid-fraction 0 "
GENTLE += "--lr 0.00001 --log-every 1 --dropout 0 --no-amp --device cpu"


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """408 images of noise, 102 classes: 51 steps of 8 in which there is nothing to learn fast."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(1)
    faces = rng.integers(0, 255, (408, 7, 7, 3))
    jpegs = [encode_jpeg(np.kron(face, np.ones((16, 16, 1))).astype(np.uint8)) for face in faces]
    write_dataset(folder, jpegs, [i // 4 for i in range(408)])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


def newest(cwd, name="last.pt"):
    (run,) = cwd.glob("runs/[!.]*")
    return load_checkpoint(run / name)


def losses(checkpoint):
    return torch.tensor([point[2] for point in checkpoint["history"]["train"]]).double()


def weights(checkpoint):
    tensors = [*checkpoint["model"].values(), *checkpoint["head"].values()]
    return torch.cat([t.double().flatten() for t in tensors])


def difference(actual, expected):
    """Largest relative error of a loss, and of all weights and running statistics as one vector."""
    a, b = losses(actual), losses(expected)
    assert len(a) == len(b)
    loss = ((a - b).abs() / b.abs()).max()
    a, b = weights(actual), weights(expected)
    return float(loss), float((a - b).norm() / b.norm())


def compare(groups, tmp_path, argv, ranks, frozen):
    """The differences of groups from one process, printed beside those of a control."""
    groups.run(tmp_path / "one", 0, "run_train", argv, frozen)
    groups.run(tmp_path / "control", 0, "run_train", argv, frozen, True)
    one = newest(tmp_path / "one")
    control = difference(newest(tmp_path / "control"), one)
    moved = weights(one) - weights(newest(tmp_path / "one", "last-1.pt"))
    moved = float(moved.norm() / weights(one).norm())
    print(f"\n{len(losses(one))} steps moved the weights by {moved}; the control: {control}")
    assert moved > 1e-4  # a wrong gradient would show
    differences = []
    for number in ranks:
        groups.run(tmp_path / str(number), number, "run_train", argv, frozen)
        differences.append(difference(newest(tmp_path / str(number)), one))
        print(f"{number} processes: {differences[-1]}")
    return differences


def test_two_processes_train_like_one(groups, noise, tmp_path):
    # 21 images to a step: slices of 10 and 11.
    argv = [*GENTLE.split(), "--train-set", str(noise), "--batch-size", "21", "--clip-norm", "1"]
    argv += ["--sync-bn", "--max-classes", "16"]
    (differences,) = compare(groups, tmp_path, argv, [2], False)
    assert max(differences) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["evaluation", "synchronised"])
def test_fifty_steps_of_two_and_four_processes_equal_those_of_one(
    groups,
    noise,
    tmp_path,
    statistics,
):
    argv = [*GENTLE.split(), "--train-set", str(noise)]
    if statistics == "synchronised":  # which makes more of a rounding error
        argv += ["--sync-bn", "--lr", "0.000001", "--batch-size", "16", "--epochs", "2"]
    differences = compare(groups, tmp_path, argv, [2, 4], statistics == "evaluation")
    assert np.max(differences) < 1e-6


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(folder), "--no-amp", "--dropout", "0", "--sync-bn"]
    flags += ["--lr", "0.000001"]
    groups.run(tmp_path / "one", 0, "run_train", flags)
    cwd = tmp_path / "resumed"
    # Five of the eight steps by three processes, the rest by two; one schedule over both.
    printed, codes = groups.run(cwd, 3, "train_until", flags, 5, fails=True)
    assert codes == [130, 130, 130]
    assert "Stopped at epoch 2, step 1; resume with: torchrun --nproc-per-node=3" in printed[0]
    assert newest(cwd)["processes"] == 3
    printed = groups.run(cwd, 2, "run_train", ["--resume"])
    both = r"in (float32 on cpu, .+), 3 processes; the run continues in \1, 2 processes, so its num"
    assert re.search(both, printed[0])
    assert "train.py" not in printed[1]
    assert max(difference(newest(cwd), newest(tmp_path / "one"))) < 1e-4
    printed = groups.run(cwd, 0, "run_train", ["--resume", "--epochs", "3"])
    assert newest(cwd)["processes"] == 1
    assert newest(cwd)["epoch"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])  # 3: sums depend on their order
def test_a_resumed_group_writes_the_same_bytes(ranks, groups, folder, tmp_path):
    # With dropout, statistics per process, and sampled classes.
    flags = [*FLAGS.split(), "--train-set", str(folder), "--sample-rate", "0.5"]
    groups.run(tmp_path / "straight", ranks, "run_train", flags)
    groups.run(tmp_path / "cut", ranks, "train_until", flags, 3, fails=True)
    groups.run(tmp_path / "cut", ranks, "run_train", ["--resume"])
    (straight,), (cut,) = (list(tmp_path.glob(f"{name}/runs/*")) for name in ("straight", "cut"))
    for name in ("last.pt", "best.pt"):
        assert (straight / name).read_bytes() == (cut / name).read_bytes()
    states = newest(tmp_path / "cut")
    assert len(states["random_of_others"]) == ranks - 1
    assert not torch.equal(states["random"]["cpu"], states["random_of_others"][0]["cpu"])


def test_an_error_of_all_processes_is_printed_once(groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(tmp_path / "nowhere")]
    printed, codes = groups.run(tmp_path / "a", 2, "run_train", flags, fails=True)
    assert codes == [2, 2]
    assert "There is no training set at" in printed[0]
    assert printed[1] == ""
    flags = [*FLAGS.split(), "--train-set", str(folder), "--batch-size", "3"]
    printed, _ = groups.run(tmp_path / "b", 2, "run_train", flags, fails=True)
    assert "leaves fewer than two images to each of 2 processes" in printed[0]


def test_a_process_that_dies_ends_the_run_and_last_pt_resumes(groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(folder)]
    printed, codes = groups.run(tmp_path, 2, "train_and_die", flags, 5, 1, fails=True)
    assert codes == [2, -signal.SIGKILL]
    assert "Another of the 2 processes has ended or cannot be reached" in printed[0]
    assert "At epoch 2, step 2 of 4: Another of the 2 processes" in printed[0]
    assert "(rank 0) ends too" in printed[0]
    assert "Traceback" not in printed[0]
    before = newest(tmp_path)
    assert (before["epoch"], before["step"]) == (1, 0)
    groups.run(tmp_path, 2, "run_train", ["--resume"])
    assert newest(tmp_path)["epoch"] == 2


@pytest.mark.parametrize("fault", ["kill", "error"])
def test_a_process_that_waits_in_c_is_ended_by_the_watchdog(fault, groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(folder)]
    printed, codes = groups.run(tmp_path, 2, "train_and_wait", flags, 5, fault, fails=True)
    assert codes == [2, -signal.SIGKILL if fault == "kill" else 2]
    assert "At epoch 2, step 2 of 4: Another of the 2 processes has ended" in printed[0]
    assert "last.pt is as it was written last; resume, with any number" in printed[0]
    assert ("it reports an error" in printed[0]) == (fault == "error")
    assert ("It failed." in printed[1]) == (fault == "error")
    assert newest(tmp_path)["epoch"] == 1


def test_a_busy_process_is_waited_for(groups, tmp_path):
    printed = groups.run(tmp_path, 2, "busy_and_finished")
    assert printed == ["initialized: False\n"] * 2


def test_one_process_downloads(groups, tmp_path):
    printed, codes = groups.run(tmp_path, 2, "download_in_group", [], fails=True)
    assert codes == [2, 2]
    assert (tmp_path / "downloads.txt").read_text() == "rank 0\n"
    assert "The host cannot be reached." in printed[0]
    assert printed[1] == ""


def test_a_stop_of_all_processes_destroys_the_group(groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(folder)]
    printed, codes = groups.run(tmp_path, 2, "stop_together", flags, fails=True)
    assert codes == [130, 130]
    assert "Stopped at epoch 1, step 3; resume with:" in printed[0]
    assert all("initialized: False" in text for text in printed)


def test_processes_agree_on_the_cache(groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(folder), "--epochs", "1"]
    printed = groups.run(tmp_path / "little", 2, "train_with_little_memory", flags, 1)
    assert "cache: none" in printed[0]
    printed = groups.run(tmp_path / "enough", 2, "train_with_little_memory", flags, 2)
    assert "cache: ram" in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_kills_at_random_moments(groups, folder, tmp_path, ranks):
    flags = [*FLAGS.split(), "--train-set", str(folder), "--checkpoint-every", "1"]
    groups.run(tmp_path / "straight", ranks, "run_train", flags)
    rng = np.random.default_rng(ranks)
    for number in range(5):
        cwd, argv, killed = tmp_path / str(number), flags, 0
        while killed < 3:
            kill = {"kill": int(rng.integers(ranks)), "seconds": float(rng.uniform(0.5, 4))}
            printed, codes = groups.run(cwd, ranks, "run_train", argv, fails=True, **kill)
            assert not any("Traceback" in text for text in printed), printed
            killed += codes != [0] * ranks
            for run in cwd.glob("runs/[!.]*"):
                if not (run / "last.pt").exists():  # it had done nothing that could be lost
                    shutil.rmtree(run)
            argv = ["--resume"] if list(cwd.glob("runs/[!.]*")) else flags
            if codes == [0] * ranks:
                break
        groups.run(cwd, ranks, "run_train", argv)
        print(f"{ranks} processes, {killed} kills")
        straight = newest(tmp_path / "straight")
        assert torch.equal(weights(newest(cwd)), weights(straight))


@pytest.mark.slow
def test_torchrun_itself(folder, tmp_path):
    """The command as a user gives it."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node=2", ROOT / "train.py", *FLAGS.split()]
    command += ["--train-set", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "; 2 processes" in done.stdout
    assert "find_unused_parameters" not in done.stderr
    assert done.stdout.count("epoch 2/2 ") == 1
