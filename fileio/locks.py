"""Single-writer lock per folder: it names its owner, and ends with it, however it ends.

    with lock_folder("runs/20250101-120000-r50-s0", "train.py"):
        ...  # a second process gets a UserError that names this one

The lock is the kernel's, on the file .<folder>.lock beside the folder (so that the folder can be
renamed, on Windows too): it is dropped when the owner ends, by SIGKILL as well, and a forked child
does not keep it. The text in .<folder>.owner is only for the message to the second process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fileio.safe_files import describe_write_errors
from utils import UserError


def lock_files(folder: Path | str) -> tuple[Path, Path]:
    """Paths of the lock of a folder and of its owner's name."""
    folder = Path(folder).resolve()  # "." has no name
    return folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.owner")


@contextlib.contextmanager
def lock_folder(folder: Path | str, owner: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder` in this process; `owner` is the script's name.

    With `wait`, until another process has released it; else a UserError names that process. Raises
    UserError, too, if the folder around `folder` cannot be written.
    """
    path, name = lock_files(folder)
    lock = FileLock(path)
    with describe_write_errors(folder):
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            time.sleep(0.2)  # the holder may have the lock and not have written its name yet
            holder = ""
            with contextlib.suppress(OSError):
                holder = name.read_text("utf-8", "replace").strip()
            raise UserError(
                f"{folder} is in use by {holder or 'another process'}; wait until it has ended, or "
                "stop it."
            ) from None
    try:
        with describe_write_errors(folder):
            name.write_text(_describe_this_process(owner), "utf-8", "replace")
        yield
    finally:
        # While they are locked: who waits for the lock notices that, and creates the file anew. On
        # Windows an open file stays.
        for file in (name, path):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        lock.release()


def _describe_this_process(owner: str) -> str:
    command = " ".join(shlex.join(sys.argv).split())  # on one line, whatever the arguments hold
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    host = socket.gethostname()
    return f"{owner}, process {os.getpid()} on {host} since {since} ({command[:300]})\n"
