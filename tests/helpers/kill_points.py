"""Runs of pre_process.py that kill themselves at chosen points, each resumed afterwards.

    python tests/helpers/kill_points.py SOURCE FOLDER

Each run is a fork of this process, as importing takes longest. `FOLDER`/outcomes.json gets, for
each point, the signal that ended the run, whether its output existed, and the exit status of the
run after it; and for "complete" the exit status of a run that is not killed. Blocks are small, so
that there are several.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pre_process
from config import parse_args
from fileio import record_writer
from preprocessing import dataset_writer, example_images, prepare

BLOCK_IMAGES = 4


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner, name, calls):
    """Make the process die on entry of a function that it has called so often before."""
    real = getattr(owner, name)
    left = [calls]

    def wrapper(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            die()
        return real(*args, **kwargs)

    setattr(owner, name, wrapper)


def half_a_row(file, path):
    """In place of `fsync_file`: as if the process died while a row was being written."""
    file.flush()
    if str(path).endswith("index.tsv"):
        file.truncate(file.tell() - 30)
        die()


POINTS = {
    "second-block": (dataset_writer.DatasetWriter, "append", 1),
    "records-not-synced": (record_writer.RecordWriter, "flush", 1),
    "records-without-rows": (dataset_writer, "fsync_file", 1),
    "half-a-row": half_a_row,
    "in-finish": (record_writer, "atomic_write", 0),
    "property-without-idx": (record_writer, "atomic_write", 1),
    "in-examples": (example_images, "atomic_write", 5),
    "before-summary": (prepare, "write_summary", 0),
    "before-rename": (prepare, "publish_output", 0),
}


def run(source, folder, name, point=None):
    """A run in a fork; the signal that ended it, or its exit status, negated if it is not 0."""
    pid = os.fork()
    if pid == 0:
        prepare.BLOCK_IMAGES = BLOCK_IMAGES
        if point == half_a_row:
            dataset_writer.fsync_file = half_a_row
        elif point:
            kill_at_call(*point)
        output = str(folder / name)
        flags = ["--source", source, "--output", output, "--images-dir", f"{output}-images"]
        pre_process.main(parse_args([*flags, "--detect-batch", "4"], "pre_process"))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main(source, folder):
    outcomes = {"complete": run(source, folder, "complete")}
    for name, point in POINTS.items():
        killed = run(source, folder, name, point)
        finished = (folder / name).exists()
        # As a killed atomic_write leaves it.
        (folder / f"{name}.part" / ".report.json-x.tmp").touch()
        outcomes[name] = [killed, finished, run(source, folder, name)]
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
