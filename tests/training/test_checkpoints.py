import errno
import os
import random
import re

import numpy as np
import pytest
import torch

from fileio.checkpoint_file import CorruptCheckpointError, load_checkpoint, save_checkpoint
from training import checkpoints
from training.checkpoints import INCOMPATIBLE, clean_up, load_last, load_momentum, save_last
from utils import UserError

# ------------------------------------------------------------------------------ the last few


def numbers(folder):
    """{name: the number in it} of the checkpoints in a folder."""
    return {path.name: load_checkpoint(path)["n"] for path in folder.glob("*.pt")}


def test_the_last_few_are_kept(tmp_path):
    for n in range(5):
        save_last(tmp_path, {"n": n}, keep=3)
    assert numbers(tmp_path) == {"last.pt": 4, "last-1.pt": 3, "last-2.pt": 2}
    save_last(tmp_path, {"n": 5}, keep=2)  # fewer from now on
    assert numbers(tmp_path) == {"last.pt": 5, "last-1.pt": 4}
    save_last(tmp_path, {"n": 6}, keep=1)
    assert numbers(tmp_path) == {"last.pt": 6}
    assert not list(tmp_path.glob(".*"))


def test_a_corrupt_newest_falls_back_to_the_one_before(tmp_path):
    for n in range(3):
        save_last(tmp_path, {"n": n}, keep=3)
    for name, n in (("last.pt", 1), ("last-1.pt", 0)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
        checkpoint, path, wrong = load_last(tmp_path)
        assert checkpoint["n"] == n
        assert path.name == f"last-{2 - n}.pt"
        assert all("is corrupt" in why for why in wrong.values())
    (tmp_path / ".last.pt-x.tmp").touch()
    clean_up(tmp_path, wrong)
    assert not list(tmp_path.glob(".*"))
    save_last(tmp_path, {"n": 3}, keep=3)  # nothing corrupt is rotated
    assert (tmp_path / "damaged-last.pt").exists()
    assert load_checkpoint(tmp_path / "last.pt")["n"] == 3
    assert load_checkpoint(tmp_path / "last-2.pt")["n"] == 0
    for path in tmp_path.glob("last*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"last\.pt is corrupt"):
        load_last(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
    ],
)
def test_what_cannot_be_read_for_now_is_not_corrupt(tmp_path, monkeypatch, error):
    """Or the newest would be put aside, and hours lost, for want of memory or of a mount."""

    def fail(*args, **kwargs):
        raise error

    for n in range(2):
        save_last(tmp_path, {"n": n})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(
            UserError, match=r"last\.pt (does not fit into|cannot be read)"
        ) as raised:
            load_last(tmp_path)
    assert not isinstance(raised.value, CorruptCheckpointError)
    assert load_last(tmp_path)[0]["n"] == 1


@pytest.mark.parametrize("links", [True, False])
def test_at_every_moment_of_a_rotation_the_newest_can_be_read(tmp_path, monkeypatch, links):
    """A failure at each call that touches the folder in turn; without hard links as well."""
    calls = []

    def limited(function, owner):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == limit:
                raise OSError(errno.EIO, "made up")
            if owner is os and not links:
                raise OSError(errno.EPERM, "no hard links here")
            return function(*args, **kwargs)

        return call

    for n in range(3):
        save_last(tmp_path, {"n": n}, keep=3)
    failures = 0
    for limit in range(1, 30):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "replace", limited(type(tmp_path).replace, None))
            patch.setattr(os, "link", limited(os.link, os))
            patch.setattr(os, "fsync", limited(os.fsync, None))
            newest = load_last(tmp_path)[0]["n"]
            try:
                save_last(tmp_path, {"n": newest + 1}, keep=3)
            except UserError as error:
                failures += 1
                assert re.search(r"(last\.pt|rota\w+) cannot be written \(made up", str(error))
        assert not list(tmp_path.glob(".*"))
        assert load_last(tmp_path)[0]["n"] in (newest, newest + 1)
        if len(calls) < limit:
            break
    assert failures >= 4
    save_last(tmp_path, {"n": 98}, keep=3)
    save_last(tmp_path, {"n": 99}, keep=3)
    assert list(numbers(tmp_path).values()).count(99) == 1
    assert len(numbers(tmp_path)) == 3


# ------------------------------------------------------------------------------ states


@pytest.mark.parametrize(
    ("momentum", "text"),
    [
        (torch.zeros(2), r"momentum 0 is \(2,\)"),
        (torch.zeros(4, 3, 3, 9), "momentum 0 is"),
        (torch.zeros(1).expand(4, 3, 3, 3), "fewer numbers in the file"),
        (torch.full((4, 3, 3, 3), torch.nan), "not finite"),
        (None, "is no tensor"),
    ],
)
def test_a_momentum_of_another_parameter_is_refused(momentum, text):
    """Fused SGD would write beyond its end, and bring the interpreter down."""
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    expected = state["state"][0]["momentum_buffer"].clone()
    load_momentum(optimizer, state, "x.pt")
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], expected)
    state["state"][0] = {"momentum_buffer": momentum}
    with pytest.raises((UserError, ValueError), match=text):
        load_momentum(optimizer, state, "x.pt")


def test_an_optimizers_settings_are_the_configurations(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.SGD([parameter], lr=0.7, momentum=0.1, nesterov=True)
    ours = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    load_momentum(ours, theirs.state_dict(), tmp_path)
    (group,) = ours.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.7, 0.9, False)


def test_random_states_go_into_a_file_and_back(tmp_path):
    device = torch.device("cpu")

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            (torch.rand(3).tolist()),
        )

    draw()  # leaves half a pair of normal numbers behind
    save_checkpoint(tmp_path / "a.pt", checkpoints.random_states(device))
    expected = draw()
    assert draw() != expected
    checkpoints.set_random_states(load_checkpoint(tmp_path / "a.pt"), device)
    assert draw() == expected


def test_settings_of_an_untrusted_state_do_not_stay_when_it_is_refused(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=5e-4)
    state = optimizer.state_dict()
    state["param_groups"][0] |= {"weight_decay": [1, 2], "lr": "fast"}
    with pytest.raises(INCOMPATIBLE):
        load_momentum(optimizer, state, tmp_path / "last.pt")
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4
