"""train.py as a command on machines with other fake GPUs: unsupported ones, and several."""

import pytest

from tests.helpers.fake_cuda.launcher import reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible")


def torchrun(processes):
    """The beginning of a command that torchrun would run; at a free port."""
    return ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]


def test_a_card_that_the_wheel_does_not_support_is_left_alone_by_auto(run_train):
    code, printed = run_train(cc=70)
    assert code == 0, printed
    assert "on cpu" in printed
    assert "compute capability 7.0" in printed
    assert "Traceback" not in printed


def test_a_card_that_the_wheel_does_not_support_is_refused_if_asked_for(run_train):
    code, printed = run_train(device="cuda", cc=70)
    assert code == 2, printed
    assert "compute capability 7.0" in printed
    assert "Traceback" not in printed


def test_a_driver_that_is_too_old_is_said(run_train):
    code, printed = run_train(error=35)
    assert code == 0, printed
    assert "cannot be used" in printed
    assert "on cpu" in printed


def test_the_second_gpu_alone_is_used_if_it_is_asked_for(run_train):
    code, printed = run_train(device="cuda:1", devices=2)
    assert code == 0, printed
    assert "contexts on devices [1]" in printed


def test_no_process_of_a_group_waits_for_its_gpu(run_cases):
    lines = run_cases("nothing_waits --margin arcface", start=torchrun(2), devices=2)
    steps = [line for line in lines if line["case"].startswith("nothing_waits")]
    assert len(steps) == 2  # both processes
    assert all(line["ok"] for line in steps), steps


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("processes", [1, 2])
def test_groups_train_each_process_on_its_own_device(processes, device, run_train):
    code, printed = run_train(torchrun(processes), device, devices=2)
    assert code == 0, printed[-3000:]
    for rank in range(processes):
        assert f"rank {rank}: contexts on devices [{rank}]" in printed, printed[-3000:]
