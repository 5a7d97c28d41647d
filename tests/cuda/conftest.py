"""What all tests on fake GPUs need."""

import pytest

from tests.helpers.fake_cuda.launcher import environment
from tests.helpers.tiny import write_tiny_set


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """A folder with a compiled stand-in for libcuda and a tiny training set."""
    folder = tmp_path_factory.mktemp("cuda")
    write_tiny_set(folder / "set")
    environment(folder / "shim")
    return folder
