"""What every test shares: the folder of real faces if there is one, and groups of processes."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.groups import Groups
from tests.helpers.ijb_benchmark import write_benchmark

# A shell without job control starts background commands with SIGINT ignored, and that is inherited:
# the tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def ijb_folder(tmp_path_factory):
    """A small IJB-C; tests must not change it."""
    return write_benchmark(tmp_path_factory.mktemp("ijb") / "IJBC")


@pytest.fixture
def edit_ijb(ijb_folder, tmp_path):
    """A function that replaces a text in one of the metadata files of a copy of `ijb_folder`."""
    folder = tmp_path / "IJBC"
    shutil.copytree(ijb_folder, folder)

    def edit(file, old, new):
        path = folder / "meta" / file
        path.write_text(path.read_text().replace(old, new, 1))
        return folder

    return edit
