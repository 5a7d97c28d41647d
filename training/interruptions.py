"""What ends a run before its last epoch: signals, errors, lost processes.

    with stop_on_signals(run), saved_on_exit(run, log):
        ...    # train

Between two steps, last.pt is written, and a message says how to resume.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from distributed.process_group import (
    LostPeerError,
    describe_lost_peer,
    is_lost_peer,
    is_main,
    losses_described_by,
    world_size,
)
from training.event_log import EventLog
from training.gpu_memory import free_gpu_memory
from training.run import Run
from training.step_errors import TrainingError, describe_out_of_memory
from utils import UserError, describe_os_error, is_out_of_memory


@contextlib.contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """For the block, Ctrl-C, SIGTERM or a closed terminal stop the run after the current step.

    A second signal stops at once. What nohup or a background job ignores stays ignored. Afterwards
    the handlers are those from before: Ctrl-C in a notebook works as usual.
    """

    def handle(number: int, frame: object) -> None:
        # At once means perhaps in mid-step, where the state cannot be saved. In a group a second
        # signal says nothing: torchrun passes on what the terminal has sent to all processes.
        if run.stop_requested and world_size() == 1:
            print("\nStopped at once; last.pt is as it was written last.", file=sys.stderr)
            raise SystemExit(130)
        run.request_stop()

    before = {}
    terminal_closed = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    for number in {signal.SIGINT, signal.SIGTERM, terminal_closed}:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed from Python, and cannot be from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def saved_on_exit(run: Run, log: EventLog) -> Iterator[None]:
    """If the block ends early between two steps, write last.pt; say how to resume.

    A stop becomes SystemExit with status 130, an error that the user can fix a UserError. In
    mid-step the state is inconsistent and is not saved: the checkpoint before it stays.
    """
    try:
        with losses_described_by(lambda error: _lost_peer_message(run, error)):
            yield
    except KeyboardInterrupt:
        if is_main():
            at = f"epoch {run.epoch + 1}, step {run.step}"
            print(f"\nStopped at {at}; resume with: {resume_command(run.folder)}", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if is_lost_peer(error):
            raise LostPeerError(_lost_peer_message(run, error)) from None
        if isinstance(error, TrainingError) or run.is_mid_step:
            raise
        if world_size() == 1:  # the other processes would have to take part in saving
            run.save_last(log)
        if is_out_of_memory(error):
            reason = _memory_message(run, error)
        elif isinstance(error, OSError):
            reason = describe_os_error(error)
        elif isinstance(error, UserError):
            reason = str(error)
        else:
            raise
        saved = "All steps are saved" if world_size() == 1 else "last.pt is as it was written last"
        raise UserError(f"{reason} {saved}; resume with: {resume_command(run.folder)}") from None


def resume_command(folder: Path) -> str:
    """The command that resumes the run of a folder."""
    start = "python" if world_size() == 1 else f"torchrun --nproc-per-node={world_size()}"
    return f"{start} train.py --resume {folder}"


def _memory_message(run: Run, error: BaseException) -> str:
    """Memory that did not suffice between two steps: for evaluating, or for loading a batch."""
    what, flag, batch = "Loading a batch", "--batch-size", run.batch_size
    if run.step == run.steps:
        what, flag, batch = "Evaluating", "--eval-batch", run.eval_batch
    reason = describe_out_of_memory(error, free_gpu_memory(run.device))
    return f"{what}, {reason}; a smaller batch, say {flag} {max(batch // 2, 2)}, takes less."


def _lost_peer_message(run: Run, error: BaseException) -> str:
    return (
        f"At epoch {run.epoch + 1}, step {run.step + 1} of {run.steps}: "
        f"{describe_lost_peer(error)} last.pt is as it was written last; resume, with any number "
        f"of processes, with: {resume_command(run.folder)}"
    )
