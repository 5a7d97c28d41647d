"""TensorBoard's event files of a run: write errors as sentences, truncated when it is resumed."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from distributed.process_group import is_main
from fileio.safe_files import atomic_write, describe_write_errors
from utils import UserError


class EventLog(SummaryWriter):
    """A SummaryWriter for which a full disk is a UserError that names its folder.

    SummaryWriter's thread reports a failed write at the next flush, and prints a traceback as well:
    that is suppressed.
    """

    def __init__(self, run_dir: Path, purge_step: int):
        self.shown = run_dir / "events.out.tfevents"
        self._excepthook = threading.excepthook
        threading.excepthook = self._hide_os_errors
        with describe_write_errors(self.shown):
            super().__init__(run_dir, purge_step=purge_step)

    def _hide_os_errors(self, thread: Any) -> None:
        if not issubclass(thread.exc_type, OSError):
            self._excepthook(thread)

    def flush(self) -> None:
        """Write all points to the file."""
        with describe_write_errors(self.shown):
            super().flush()

    def close(self) -> None:
        """Flush, and end the writer's thread."""
        threading.excepthook = self._excepthook
        with describe_write_errors(self.shown):
            super().close()

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.close()
        except UserError:
            if kind is None:  # else what ended the run matters more than this failure
                raise


class NullEventLog:
    """The log of processes that do not write: it ignores everything."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write nothing."""

    def add_text(self, tag: str, text: str) -> None:
        """Write nothing."""

    def flush(self) -> None:
        """Do nothing."""


def truncate_events(run_dir: Path, step: int, epoch_is_open: bool) -> None:
    """Take out of TensorBoard's files what was logged after the checkpoint at global step `step`.

    The run logs it again. At `step` itself, training's points stay, and those of validation and
    LFW stay unless the epoch is still open. A point that a kill cut in two goes as well.
    """
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        kept = [
            frame
            for frame, event in read_event_frames(data)
            if _is_before(event, step, epoch_is_open)
        ]
        if sum(map(len, kept)) < len(data):
            with atomic_write(path) as file:
                file.writelines(kept)


def _is_before(event: Event, step: int, epoch_is_open: bool) -> bool:
    if event.step != step or not epoch_is_open:
        return event.step <= step
    return not any(value.tag.startswith(("valid/", "lfw/")) for value in event.summary.value)


def read_event_frames(data: bytes) -> list[tuple[bytes, Event]]:
    """The whole records of a TFRecord file: (size, its CRC, an Event, its CRC) each."""
    found, start = [], 0
    while start + 16 <= len(data):
        size = struct.unpack_from("<Q", data, start)[0]
        end = start + 16 + size
        if not size or end > len(data):  # a power cut can leave zeros
            break
        try:
            found.append((data[start:end], Event.FromString(data[start + 12 : end - 4])))
        except DecodeError:
            break
        start = end
    return found


def fsync_events(run_dir: Path) -> None:
    """Have TensorBoard's newest file on disk, so that no checkpoint knows more than it."""
    files = sorted(run_dir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    for path in files[-1:]:
        with describe_write_errors(path), path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def open_log(run_dir: Path, step: int, epoch_is_open: bool) -> Iterator[EventLog | NullEventLog]:
    """The log of a run at global step `step`; rank 0 alone writes it.

    What was logged after that step is removed first, see `truncate_events`.
    """
    if not is_main():
        yield NullEventLog()
        return
    truncate_events(run_dir, step, epoch_is_open)
    # purge_step: a TensorBoard that is open forgets those points, too.
    with EventLog(run_dir, purge_step=step + 1) as log:
        yield log
