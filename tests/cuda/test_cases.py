"""The CUDA path without a GPU: tests/cuda/cases.py in a process with fake GPUs.

What these tests cannot see is in tests/helpers/fake_cuda/__init__.py; `make gpu` is for real ones.
"""

import pytest

from tests.cuda.cases import CASES, title
from tests.helpers.fake_cuda.launcher import reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "possible")


@pytest.fixture(scope="module")
def results(run_cases):
    """{case: its line}, of one process: importing PyTorch takes longest."""
    return {line["case"]: line for line in run_cases()}


@pytest.mark.parametrize("name", [title(case) for case in CASES])
def test_case(name, results):
    assert name in results, f"the process ended before: {list(results)}"
    assert results[name]["ok"], results[name]["why"]


def test_values_are_put_into_results_of_the_same_shape_and_type(results):
    (line,) = [line for case, line in results.items() if case.startswith("the CPU's results")]
    assert line["ok"], line["why"]
