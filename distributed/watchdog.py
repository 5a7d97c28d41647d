"""A thread that ends this process if another of its group dies or fails.

The main thread notices by itself only while it waits in gloo. While it waits for a GPU, whose NCCL
kernel waits for the dead process, no exception reaches it and no signal handler runs. So a thread
of each process takes part in a small collective twice a second, in a gloo group of its own: if a
process dies its connections close, and the collective fails in the others.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

INTERVAL = 0.5  # seconds between two collectives
GRACE = 3.0  # seconds for the main thread to end by itself: it may know more
# A machine that vanishes closes no connection. A thread answers later only if its process is
# stopped, or if a library keeps Python's lock for so long.
SILENCE = datetime.timedelta(minutes=10)

RUNNING, FINISHED, FAILED = 0, 1, 2  # what the processes tell each other


class Watchdog:
    """Watches the other processes from its creation, which all processes take part in, to `leave`.

    `describe` makes the sentence that is printed from the error by which a loss was noticed.
    """

    def __init__(self, describe: Callable[[BaseException], str]) -> None:
        self.describe = describe
        self._group = dist.new_group(backend="gloo", timeout=SILENCE)
        self._state, self._agreed = RUNNING, False
        self._left, self._all_left = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def leave(self, *, failed: bool = False, agreed: bool = True) -> bool:
        """Stop watching; whether all processes have left, so that the group can be destroyed.

        A process that finished waits here for the others. One that failed tells them; it waits for
        them only if it is `agreed` that all end.
        """
        self._agreed = agreed
        self._state = FAILED if failed else FINISHED
        self._left.set()
        self._thread.join(2 * GRACE if failed else None)
        return self._all_left

    def _watch(self) -> None:
        while not self._all_left:
            told = self._state
            states = torch.tensor([told, -told])
            try:
                dist.all_reduce(states, dist.ReduceOp.MAX, group=self._group)
            except RuntimeError as error:
                self._end_unless_left(error)
                return
            most, least = int(states[0]), -int(states[1])
            self._all_left = least != RUNNING
            if told == FAILED and not self._agreed:
                return
            if told == RUNNING and most == FAILED:
                self._end_unless_left(RuntimeError("it reports an error"))
            self._left.wait(INTERVAL)

    def _end_unless_left(self, error: RuntimeError) -> None:
        if not self._left.wait(GRACE):
            end_process(self.describe(error))


def end_process(sentence: str) -> NoReturn:
    """Print a sentence and end at once with status 2, whatever the main thread waits for.

    For files that is as safe as a kill: each is complete or has its temporary name.
    """
    print(f"\n{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)
