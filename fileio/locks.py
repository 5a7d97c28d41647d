"""One writer a folder: a lock that names its owner and ends with it, however it ends."""

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
_held: set[IO[bytes]] = set()


@contextlib.contextmanager
def lock_folder(folder: Path | str, what: str) -> Iterator[None]:
    """Hold `folder` (which exists) for this process; `what` says in a word who holds it.

    Raises UserError naming the process that has it, or where the folder cannot be written. The
    kernel drops the lock when its owner ends, by SIGKILL too, so there is nothing to clean up: the
    file stays, and says who came last.
    """
    path = Path(folder) / LOCK_FILE
    with describe_write_errors(folder):
        file = path.open("ab+", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # not taken: no locks there at all
                raise UserError(
                    f"The file system of {folder} has no locks ({error.strerror}), so two runs "
                    "could not be kept apart; use a folder on another one."
                ) from None
            time.sleep(0.2)  # it may have the lock and not have signed yet
            file.seek(0)
            owner = file.read(500).decode("utf-8", "replace").strip() or "another process"
            raise UserError(
                f"{folder} is in use by {owner}; wait until it has ended, or stop it."
            ) from None
        command = " ".join(shlex.join(sys.argv).split())
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        host = socket.gethostname()
        owner = f"{what}, process {os.getpid()} on {host} since {began} ({command[:300]})\n"
        with describe_write_errors(folder):
            file.truncate(0)
            file.write(owner.encode("utf-8", "replace"))
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)


def _let_go_in_child() -> None:
    # A forked child shares the lock; if it outlived its parent, so would the lock.
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go_in_child)
