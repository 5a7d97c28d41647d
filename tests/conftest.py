"""What every test shares: the folder of real faces if there is one, and groups of processes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.groups import Groups


@pytest.fixture(scope="session")
def real_faces() -> Path:
    """The folder that the environment variable REAL_FACES names; the test is skipped without it."""
    folder = os.environ.get("REAL_FACES", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REAL_FACES names no folder with real faces")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    """Starts groups of processes, as torchrun does; see tests/helpers/parallel_cases.py."""
    groups = Groups()
    yield groups
    groups.close()
