"""Groups of processes for tests; conftest.py has the fixture."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SERVER = Path(__file__).with_name("processes.py")


class Groups:
    """Runs cases of tests/helpers/parallel_cases.py in groups of processes."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, cwd, ranks, case, *arguments, fails=False, **how):
        """One group in the folder `cwd`; what each process printed, by rank."""
        cwd.mkdir(exist_ok=True)
        order = {"cwd": str(cwd), "ranks": ranks, "case": case, "arguments": arguments, **how}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        statuses = json.loads(self.process.stdout.readline())
        printed = [(cwd / f"printed-{r}.txt").read_text() for r in range(max(1, ranks))]
        if not fails:
            assert statuses == [0] * len(statuses), "\n".join(printed)
            return printed
        codes = [
            -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            for status in statuses
        ]
        assert all(code in (0, 2, 130, -signal.SIGKILL) for code in codes), (codes, printed)
        return printed, codes

    def close(self):
        """End the server."""
        self.process.stdin.close()
        self.process.wait()
