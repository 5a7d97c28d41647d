"""Files that are complete and on disk or not there at all, and disk errors as sentences.

    with atomic_write("lfw.json", "w") as file:
        file.write(text)

A process may be killed, and the power may fail, at any line. So a file is written under a temporary
name, its bytes are brought to the disk (fsync), and only then does it get its name (rename, which
is atomic); the folder's list of names is brought to the disk last.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from utils import ADVICE, UserError

try:
    import fcntl
except ImportError:  # Windows, which deletes no open file: there no lock is needed
    fcntl = None


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
    """Create a folder, and its parents, if missing; UserError if that fails."""
    with describe_write_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


class _RawFile(io.FileIO):
    """A file for writing whose failures are UserErrors with the name that the user knows."""

    def __init__(self, file: Path | int, mode: str, shown: Path):
        self.shown = shown
        self.failure: UserError | None = None
        with describe_write_errors(shown):
            super().__init__(file, mode)

    def write(self, data: Any) -> int:
        """Write; the first failure is kept, since callers may replace it with one of their own."""
        try:
            with describe_write_errors(self.shown):
                return os.write(self.fileno(), data)
        except UserError as error:
            self.failure = self.failure or error
            raise


def open_for_writing(path: Path | str | int, mode: str, shown: Path | None = None) -> Any:
    """Open a file, "wb", "w+b" or "r+b"; a failed write raises a UserError that names the file.

    `path` may be a file descriptor; `shown` is the name in messages.
    """
    buffered = io.BufferedRandom if "+" in mode else io.BufferedWriter
    return buffered(_RawFile(path, mode, shown or Path(path)))


def fsync_file(file: IO[Any], path: Path | str) -> None:
    """Bring all that was written to a file to the disk; UserError names `path` if that fails."""
    file.flush()
    with describe_write_errors(path):
        os.fsync(file.fileno())


def fsync_folder(folder: Path | str) -> None:
    """Bring a folder's list of names to the disk; without it, a power cut may undo a rename."""
    if os.name == "nt":  # Windows opens no folders
        return
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
    """Open a file that gets its name only when it is complete and on disk.

    If the block raises, a file that was there before stays as it was. `before_rename` is called
    when the new one is complete. Disk errors raise UserError.
    """
    path = Path(path)
    _remove_leftovers(path)
    temporary, file = None, None
    try:
        with describe_write_errors(path):
            descriptor, temporary = _create_temporary(path)
        file = raw = open_for_writing(descriptor, "w+b" if "+" in mode else "wb", path)
        if "b" not in mode:
            file = io.TextIOWrapper(raw, encoding="utf-8")
        yield file
        fsync_file(file, path)
        file.close()
        with describe_write_errors(path):
            # mkstemp's files are private; give this one the permissions any new file would have.
            # The umask can only be read by setting it.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            before_rename()
            temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        _discard(file, temporary)
        # torch.save catches the failed write and raises a RuntimeError about its own zip writer,
        # which would tell the user nothing.
        failure = None if file is None else raw.raw.failure
        if failure is not None and failure is not error:
            raise failure from None
        raise


def _create_temporary(path: Path) -> tuple[int, Path]:
    """The descriptor and name of a new temporary file in the folder of `path`.

    It is locked as long as its writer lives, on file systems with locks: so another writer can tell
    a killed one's leftovers from a file that is being written.
    """
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            _lock(descriptor)
        # Between creation and lock, another writer may have taken it for a leftover and deleted it.
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary files of writers of `path` that were killed: those without a lock."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*.tmp"):
        # What cannot be opened, locked or deleted stays: the writer's own error will say why.
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            _lock(file.fileno())
            leftover.unlink()


def _lock(descriptor: int) -> None:
    """Lock an open file until it is closed; OSError if another process has locked it."""
    if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _discard(file: IO[Any] | None, temporary: Path | None) -> None:
    """Close and delete an incomplete file; a failure here must not hide the one that led here."""
    with contextlib.suppress(OSError, UserError, ValueError):
        if file is not None:
            file.close()
    with contextlib.suppress(OSError):
        if temporary is not None:
            temporary.unlink(missing_ok=True)
