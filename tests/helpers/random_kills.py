"""Runs of pre_process.py that are killed at random moments, limited by the kernel, or doubled.

    python tests/helpers/random_kills.py SOURCE FOLDER KILLS BLOCK_IMAGES

Each run is a fork of this process, as importing takes longest. `FOLDER`/outcomes.json gets
"complete", the exit status of a run that nothing happens to; "killed", for each kill the output's
name and the rows that index.tsv had; "limit-N", for a limit of N bytes on the size of a file, the
exit status, what was printed, and the exit status of a run without the limit; "twice", for two runs
on one output, the status and message of the second, the process id of the first, and the status of
a third run, after both.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pre_process
from config import parse_args
from preprocessing import prepare

FILE_SIZE_LIMITS = (10, 2_000, 20_000, 40_000)  # bytes


class Runs:
    """Starts runs; what they print on stderr comes back by a pipe (a limit applies to files)."""

    def __init__(self, source: str, folder: Path, block: int):
        self.source, self.folder, self.block = source, folder, block
        prepare.BLOCK_IMAGES = block
        self.reading_end, self.writing_end = os.pipe()
        os.set_blocking(self.reading_end, False)

    def start(self, name, limit=None):
        """The process id of a new run that writes the output `name`."""
        pid = os.fork()
        if pid:
            return pid
        os.dup2(self.writing_end, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        output = str(self.folder / name)
        flags = ["--source", self.source, "--output", output, "--images-dir", f"{output}-images"]
        flags += ["--detect-batch", str(min(self.block, 64))]
        try:
            pre_process.main(parse_args(flags, "pre_process"))
        except SystemExit as ended:
            os._exit(ended.code)
        os._exit(0)

    def printed(self):
        """What was printed on stderr since the last call."""
        try:
            return os.read(self.reading_end, 1 << 20).decode()
        except BlockingIOError:
            return ""

    def rows(self, name):
        """The rows of an unfinished output's index.tsv, None if there is none."""
        index = self.folder / f"{name}.part" / "index.tsv"
        return index.read_bytes().count(b"\n") - 1 if index.exists() else None


def finish(pid):
    """Wait for a run; its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_random(runs, kills, seconds):
    """Start and kill runs until so many were killed, each output being resumed until it is done."""
    outcomes, killed, finished = {}, [], 0
    while len(killed) < kills:
        name = f"killed-{finished}"
        pid = runs.start(name)
        end = time.monotonic() + random.uniform(0, 0.95 * seconds)
        while time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        runs.printed()  # or the pipe fills up
        try:
            os.kill(pid, signal.SIGKILL)
            finish(pid)
            killed.append([name, runs.rows(name)])
        except (ProcessLookupError, ChildProcessError):  # it ended before: the next output
            finished += 1
    last = f"killed-{finished}"
    if not (runs.folder / last).exists():
        outcomes[last] = finish(runs.start(last))
    return outcomes | {"killed": killed}


def run_twice(runs):
    """Start a second run while the first, which is stopped, holds the output's lock."""
    first = runs.start("twice")
    while not runs.rows("twice"):
        time.sleep(0.002)
    os.kill(first, signal.SIGSTOP)
    runs.printed()
    second = finish(runs.start("twice"))
    message = runs.printed()
    os.kill(first, signal.SIGKILL)
    finish(first)
    return [second, message, first, finish(runs.start("twice"))]


def main(source, folder, kills, block):
    random.seed(1)
    runs = Runs(source, folder, block)
    began = time.monotonic()
    outcomes = {"complete": finish(runs.start("complete"))}
    seconds = time.monotonic() - began
    outcomes |= kill_at_random(runs, kills, seconds)
    for limit in FILE_SIZE_LIMITS:
        name = f"limit-{limit}"
        runs.printed()
        outcomes[name] = [
            finish(runs.start(name, limit)),
            runs.printed(),
            finish(runs.start(name)),
        ]
    outcomes["twice"] = run_twice(runs)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
