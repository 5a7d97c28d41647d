"""Files that are complete on disk or not there, and errors of the disk as sentences.

with atomic_write("lfw.json", "w") as file:
    file.write(text)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from utils import ADVICE, UserError


@contextlib.contextmanager
def describe_write_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into a UserError: `path` cannot be written, why, what to do."""
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno, "fix that")
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): {advice} and start again; what "
            "was there before is kept."
        ) from None


def make_folder(folder: Path | str) -> None:
    """Make a folder, and those above it, where they are missing; UserError if that fails."""
    with describe_write_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


class _RawFile(io.FileIO):
    """A file for writing whose failures are UserErrors with the name that the user knows it by."""

    def __init__(self, file: Path | int, mode: str, shown: Path):
        self.shown = shown
        self.failure: UserError | None = None
        with describe_write_errors(shown):
            super().__init__(file, mode)

    def write(self, data: Any) -> int:
        """Write; the first failure is kept, for callers that make something else of it."""
        try:
            with describe_write_errors(self.shown):
                return os.write(self.fileno(), data)
        except UserError as error:
            self.failure = self.failure or error
            raise


def open_for_writing(path: Path | str | int, mode: str, shown: Path | None = None) -> Any:
    """Open a file, "wb", "w+b" or "r+b", each failed write to which is a UserError that names it.

    `path` may be a descriptor; `shown` is the name then.
    """
    buffered = io.BufferedRandom if "+" in mode else io.BufferedWriter
    return buffered(_RawFile(path, mode, shown or Path(path)))


def fsync_file(file: IO[Any], path: Path | str) -> None:
    """Bring all that was written to a file to the disk; UserError names `path` if that fails."""
    file.flush()
    with describe_write_errors(path):
        os.fsync(file.fileno())


def fsync_folder(folder: Path | str) -> None:
    """Bring a folder's list of names to the disk: else a power cut may undo a rename."""
    with describe_write_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
                raise
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_write(
    path: Path | str, mode: str = "wb", before_rename: Callable[[], None] = lambda: None
) -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when it is complete and on disk.

    Written under a temporary name in the same folder, flushed, synced and renamed; if the block
    raises, the old file stays as it was.  What the disk refuses is a UserError.
    """
    path = Path(path)
    remove_leftovers(path)
    temporary, file = None, None
    try:
        with describe_write_errors(path):
            descriptor, temporary = _own_temporary(path)
        file = raw = open_for_writing(descriptor, "w+b" if "+" in mode else "wb", path)
        if "b" not in mode:
            file = io.TextIOWrapper(raw, encoding="utf-8")
        yield file
        fsync_file(file, path)
        file.close()
        with describe_write_errors(path):
            # mkstemp's files are private; give this one the permissions any new file would have.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            before_rename()
            temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        _discard(file, temporary)
        failure = None if file is None else raw.raw.failure
        if failure is not None and failure is not error:  # torch.save raises one of its own
            raise failure from None
        raise


def _own_temporary(path: Path) -> tuple[int, Path]:
    """A new temporary file for `path`, locked as long as its writer lives, where locks exist."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:  # not taken for a leftover before it was locked
            return descriptor, Path(name)
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files of writers of `path` that were killed: nobody locks those."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*.tmp"):
        # what cannot be opened, locked or deleted stays: the writer's own error will say why
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _discard(file: IO[Any] | None, temporary: Path | None) -> None:
    """Close and delete what was begun; a failure here must not hide the one that led here."""
    with contextlib.suppress(OSError, UserError, ValueError):
        if file is not None:
            file.close()
    with contextlib.suppress(OSError):
        if temporary is not None:
            temporary.unlink(missing_ok=True)
