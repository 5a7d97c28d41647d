import contextlib
import os
import signal

import pytest

from fileio.locks import lock_files, lock_folder
from utils import UserError


@contextlib.contextmanager
def in_another_process(folder, grandchild=False):
    """A process that holds the lock; yields its id and that of a child that it forked, or 0."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with lock_folder(folder, "holder.py"):
            child = os.fork() if grandchild else 0
            if child or not grandchild:
                os.write(writing, f"{child}\n".encode())
            signal.pause()
        os._exit(0)
    with os.fdopen(reading) as answers:
        child = int(answers.readline())
        try:
            yield holder, child
        finally:
            for process in (holder, child):
                if process:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(holder, 0)
            os.close(writing)


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
    with lock_folder(tmp_path, "pre_process.py"):
        with pytest.raises(UserError) as refused, lock_folder(tmp_path, "train.py"):
            pass
        assert f"in use by pre_process.py, process {os.getpid()} on " in str(refused.value)
        assert " since 2" in str(refused.value)
    with lock_folder(tmp_path, "train.py"):  # given back
        assert lock_files(tmp_path)[1].read_text().startswith("train.py, process ")
    assert not any(file.exists() for file in lock_files(tmp_path))
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path, "train.py"):
        raise ZeroDivisionError
    with lock_folder(tmp_path, "train.py"):
        pass


def test_the_lock_dies_with_its_owner(tmp_path):
    with in_another_process(tmp_path) as (holder, _):
        for _ in range(2):
            with pytest.raises(UserError, match=f"holder.py, process {holder} on"):
                lock_folder(tmp_path, "train.py").__enter__()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with lock_folder(tmp_path, "train.py"):
            pass


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    with in_another_process(tmp_path, grandchild=True) as (holder, child):
        with pytest.raises(UserError, match=f"process {holder} on"):
            lock_folder(tmp_path, "train.py").__enter__()  # the child's letting go freed nothing
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(child, 0)  # still there
        with lock_folder(tmp_path, "train.py"):
            pass


def test_a_locked_folder_can_be_renamed(tmp_path):
    (tmp_path / "set.part").mkdir()
    with lock_folder(tmp_path / "set.part", "pre_process.py"):
        (tmp_path / "set.part").rename(tmp_path / "set")
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_waiting_for_a_lock(tmp_path):
    """Two processes that add to a file in turn: no line is lost."""
    folder, log = tmp_path / "images", tmp_path / "log"
    folder.mkdir()
    log.write_text("")
    children = []
    for number in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            for _ in range(20):
                with lock_folder(folder, "a.py", wait=True):
                    before = log.read_text()
                    log.write_text(f"{before}{number}\n")
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert sorted(log.read_text().split()) == ["0"] * 20 + ["1"] * 20
