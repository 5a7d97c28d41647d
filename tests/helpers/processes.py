"""Groups of processes, as torchrun starts them, without its seconds of imports.

    python tests/helpers/processes.py

It imports everything once and then, for each line of its standard input, forks the processes of a
group: a JSON object with `ranks` (0: one process that knows of no group), a working folder `cwd`,
`case`, a function of parallel_cases.py, and its `arguments`; `kill`, a rank to send SIGKILL
after `seconds`. It answers with the list of wait statuses. What rank r prints is in
`cwd`/printed-r.txt.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.helpers import parallel_cases


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def member(order, rank, port):
    """What a forked process does."""
    os.chdir(order["cwd"])
    output = os.open(f"printed-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if order["ranks"]:
        ranks = str(order["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks}
        os.environ |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port)}
    getattr(parallel_cases, order["case"])(*order["arguments"])


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        port, children = free_port(), []
        for rank in range(max(1, order["ranks"])):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    member(order, rank, port)
                    code = 0
                except SystemExit as error:
                    code = error.code
                except BaseException:
                    traceback.print_exc()
                finally:
                    with contextlib.suppress(OSError):
                        sys.stdout.flush()
                        sys.stderr.flush()
                    os._exit(code if isinstance(code, int) else 1)
            children.append(child)
        if "kill" in order:
            time.sleep(order["seconds"])
            os.kill(children[order["kill"]], signal.SIGKILL)  # a child of ours until waited for
        print(json.dumps([os.waitpid(child, 0)[1] for child in children]), flush=True)


if __name__ == "__main__":
    main()
