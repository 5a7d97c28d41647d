"""What test_cases.py runs in a process that has fake GPUs; each case prints a line of JSON.

    python -m tests.cuda.cases FOLDER [CASE ...]      # in the environment of fake_cuda.launcher

Started by torchrun, every process runs the cases, as one of a group, and prints its lines.
FOLDER/set is the training set of tests/helpers/tiny.py. A case fails by raising.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from distributed.process_group import process_group
from tests.cuda import tool_cases, training_cases
from tests.helpers.fake_cuda.interpreter import fake_cuda

CASES = [*training_cases.CASES, *tool_cases.CASES]


def title(case: tuple) -> str:
    """The name of a case, with its flags."""
    return " ".join([case[0].__name__, *case[1:]])


def say(line: dict) -> None:
    """Print a line of JSON, from every process of a group: all but rank 0 print elsewhere."""
    print(json.dumps(line), file=sys.__stdout__, flush=True)


def main(folder: Path, wanted: list[str], cases: list[tuple] = CASES) -> None:
    """Run the cases one after the other."""
    from training import run_report

    run_report.plot_curves = lambda *_: None  # seconds that say nothing here
    with fake_cuda() as report, process_group("cuda"):
        for case in cases:
            if wanted and title(case) not in wanted:
                continue
            start = time.perf_counter()
            try:
                result = {"ok": True, **case[0](folder, report, *case[1:])}
            except Exception as error:
                result = {"ok": False, "why": f"{type(error).__name__}: {error}"[:1000]}
            seconds = round(time.perf_counter() - start, 1)
            say({"case": title(case), "seconds": seconds, **result})
        report.stop()
        differences = dict(report.differences)
        line = {"case": "the CPU's results have CUDA's shapes and types", "ok": not differences}
        say(line | {"why": str(differences)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], CASES)
