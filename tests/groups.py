"""The fixture that starts groups of processes (tests/processes.py)."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT


class Groups:
    """Runs cases of tests/parallel_cases.py in groups of processes."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "processes.py")],
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


@pytest.fixture(scope="session")
def groups():
    """One process that forks them all."""
    groups = Groups()
    yield groups
    groups.process.stdin.close()
    groups.process.wait()
