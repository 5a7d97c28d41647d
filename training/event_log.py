"""TensorBoard's event files of a run: flushed to disk, and truncated when the run is resumed."""

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
    """A SummaryWriter that raises a UserError with the file's path when the disk is full.

    SummaryWriter writes in a thread. An error there is raised by the next `flush` or `close`, but
    the thread also prints its own traceback, which this class suppresses.
    """

    def __init__(self, run_dir: Path, purge_step: int):
        self.events_path = run_dir / "events.out.tfevents"  # for messages; the real name is longer
        self._excepthook = threading.excepthook
        threading.excepthook = self._hide_os_errors
        with describe_write_errors(self.events_path):
            super().__init__(run_dir, purge_step=purge_step)

    def _hide_os_errors(self, thread: Any) -> None:
        if not issubclass(thread.exc_type, OSError):
            self._excepthook(thread)

    def flush(self) -> None:
        """Write all points to the file."""
        with describe_write_errors(self.events_path):
            super().flush()

    def close(self) -> None:
        """Flush, and end the writer's thread."""
        threading.excepthook = self._excepthook
        with describe_write_errors(self.events_path):
            super().close()

    def __exit__(self, exc_type: type[BaseException] | None, *_: Any) -> None:
        try:
            self.close()
        except UserError:
            # An error of the run itself is on its way, and matters more than this one.
            if exc_type is None:
                raise


class NullEventLog:
    """The EventLog of the processes that write nothing: all but rank 0."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write nothing."""

    def add_text(self, tag: str, text: str) -> None:
        """Write nothing."""

    def flush(self) -> None:
        """Do nothing."""


def truncate_events(run_dir: Path, step: int, epoch_is_open: bool) -> None:
    """Remove from the event files what was logged after the checkpoint at global step `step`.

    The resumed run logs it again, and no point is there twice. With 100 steps per epoch and a
    checkpoint at step 200, the training points of step 200 stay. Validation's and LFW's of that
    step stay if the checkpoint was written after them; with `epoch_is_open` it was written before,
    and the resumed run evaluates again. A record that a kill left incomplete is removed, too.
    """
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        kept = [
            record
            for record, event in read_event_frames(data)
            if _is_before(event, step, epoch_is_open)
        ]
        if sum(map(len, kept)) < len(data):
            with atomic_write(path) as file:
                file.writelines(kept)


def _is_before(event: Event, step: int, epoch_is_open: bool) -> bool:
    """Whether an event was logged before the checkpoint."""
    if event.step != step or not epoch_is_open:
        return event.step <= step
    return not any(value.tag.startswith(("valid/", "lfw/")) for value in event.summary.value)


def read_event_frames(data: bytes) -> list[tuple[bytes, Event]]:
    """The complete records of an event file: the bytes of each, and the Event in it.

    A TFRecord: length (uint64, little-endian), its CRC (4 bytes), the Event, its CRC (4 bytes).
    Reading ends at the first record that is incomplete or no Event.
    """
    frames, start = [], 0
    while start + 16 <= len(data):
        length = struct.unpack_from("<Q", data, start)[0]
        end = start + 16 + length
        if not length or end > len(data):  # a power cut can leave zeros
            break
        try:
            frames.append((data[start:end], Event.FromString(data[start + 12 : end - 4])))
        except DecodeError:
            break
        start = end
    return frames


def fsync_events(run_dir: Path) -> None:
    """Force the newest event file to disk, before a checkpoint that relies on its points."""
    paths = sorted(run_dir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    for path in paths[-1:]:
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
