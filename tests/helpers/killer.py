"""Sessions of train.py that end by SIGKILL at a chosen moment, each in a process of its own.

    python tests/helpers/killer.py

It imports everything once and then forks for each line of its standard input, a JSON object with
`argv` of train.py, the working folder `cwd`, and how to kill it: `seconds` after its start, or
`at` a function (`module:name.name`, killed on entry of call number `count`, or `after` it). It
answers each line with the wait status. That is the same as starting the script anew, for nothing
of a run has happened before the fork, without its seconds of imports.
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import train
from config import parse_args
from tests.helpers import preload  # noqa: F401
from training import run_report


def kill_at(target, count, after):
    """Make call number `count` of a function the last thing that this process does."""
    module, _, names = target.partition(":")
    *path, name = names.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    function = getattr(owner, name)
    calls = []

    @functools.wraps(function)
    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def session(order):
    """What the forked process does."""
    os.chdir(order["cwd"])
    output = os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if "at" in order:
        kill_at(order["at"], order["count"], order.get("after", False))
    run_report.plot_curves = lambda *_: None  # takes seconds and is not what is tested here
    train.main(parse_args(order["argv"], "train"))


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                session(order)
                code = 0
            except SystemExit as error:
                code = error.code
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(code)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(child, signal.SIGKILL)  # of one that has ended, too, until it is waited for
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
