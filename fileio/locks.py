"""Single-writer lock per folder: it names its owner, and ends with it, however it ends.

    with lock_folder("runs/20250101-120000-r50-s0", "train.py"):
        ...  # a second process gets a UserError that names this one

The lock is the kernel's (flock on the file .lock), which drops it when the owner ends, by SIGKILL
as well: a lock that is a file's existence would have to be removed by hand. The file's text is only
for the message to the second process; it stays when the lock is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fileio.safe_files import describe_write_errors
from utils import UserError

LOCK_FILE = ".lock"
_held: set[IO[bytes]] = set()  # the open lock files of this process


@contextlib.contextmanager
def lock_folder(folder: Path | str, owner: str) -> Iterator[None]:
    """Hold the lock of `folder` (which exists) in this process; `owner` is the script's name.

    Raises UserError naming the process that holds it, or if the folder cannot be written.
    """
    path = Path(folder) / LOCK_FILE
    with describe_write_errors(folder):
        # Neither "w", which would erase the holder's name before we know that there is one, nor
        # "r+", which fails if the file is missing.
        file = path.open("ab+", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # no locks at all, not a held one
                raise UserError(
                    f"The file system of {folder} has no locks ({error.strerror}), so two runs "
                    "could write to one folder; use a folder on another one."
                ) from None
            time.sleep(0.2)  # the holder may have the lock and not have written its name yet
            file.seek(0)
            holder = file.read(500).decode("utf-8", "replace").strip() or "another process"
            raise UserError(
                f"{folder} is in use by {holder}; wait until it has ended, or stop it."
            ) from None
        with describe_write_errors(folder):
            file.truncate(0)
            file.write(_describe_this_process(owner).encode("utf-8", "replace"))
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)


def _describe_this_process(owner: str) -> str:
    command = " ".join(shlex.join(sys.argv).split())  # on one line, whatever the arguments hold
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    host = socket.gethostname()
    return f"{owner}, process {os.getpid()} on {host} since {since} ({command[:300]})\n"


def _close_in_child() -> None:
    """Close a forked child's copies of the lock files.

    A flock belongs to the open file, which parent and child share: it would last until both have
    closed it, and a worker that outlives a killed run would keep the folder locked. Closing one
    copy releases nothing.
    """
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_close_in_child)
