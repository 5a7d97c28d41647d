"""pre_process.py killed at random moments, held to the kernel's limits, and started twice at once.

tests/helpers/random_kills.py does it, and says how.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.synthetic_faces import casia_files, image_without_face, write_zip

PROGRAM = ROOT / "tests" / "helpers" / "random_kills.py"
SET = ("train.rec", "train.idx", "property", "index.tsv")


def run(source, folder, kills, block):
    """Run them all; returns the outcomes."""
    done = subprocess.run(
        [sys.executable, PROGRAM, str(source), str(folder), str(kills), str(block)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outcomes.json").read_text())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in SET}


def check(source, folder, kills, block):
    outcomes = run(source, folder, kills, block)
    assert outcomes.pop("complete") == 0
    expected = contents(folder / "complete")
    killed = outcomes.pop("killed")
    assert len(killed) == kills
    second, message, first, third = outcomes.pop("twice")
    assert (second, third) == (2, 0)
    assert re.search(
        rf"twice\.part is in use by pre_process\.py, process {first} on \S+ since \d{{4}}-",
        message,
    )
    for name in [name for name in outcomes if name.startswith("limit-")]:
        status, printed, again = outcomes.pop(name)
        assert (status, again) == (2, 0), printed
        assert "cannot be written (File too large): lift the limit" in printed
        assert "Traceback" not in printed
        assert contents(folder / name) == expected
    assert set(outcomes.values()) <= {0}
    finished = {path for path in folder.glob("killed-*") if not path.suffix and path.is_dir()}
    finished -= set(folder.glob("*-images"))
    for path in [folder / "twice", *finished]:
        assert contents(path) == expected, path
        assert sorted(p.name for p in path.iterdir()) == sorted([*SET, "report.json"])
        images = [folder / f"{name}-images" for name in (path.name, "complete")]
        assert len({tuple(p.read_bytes() for p in sorted(f.iterdir())) for f in images}) == 1
    assert finished
    assert not list(folder.glob("*.part"))
    assert not list(folder.rglob("*.tmp"))
    compared = len(finished) * sum(map(len, expected.values()))
    print(
        f"{kills} kills, {len(finished)} sets of {sum(map(len, expected.values())):,} bytes equal "
        f"({compared:,} bytes); rows of index.tsv at each kill: {[rows for _, rows in killed]}"
    )


def test_a_few_kills_and_limits_and_two_at_once(tmp_path):
    files = casia_files(4, 5) | {"CASIA-WebFace/0001001/900.jpg": image_without_face()}
    check(write_zip(tmp_path / "CASIA-WebFace.zip", files), tmp_path, 4, 4)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    files = casia_files(20, 12) | {"CASIA-WebFace/0001001/900.jpg": image_without_face()}
    check(write_zip(tmp_path / "CASIA-WebFace.zip", files), tmp_path, 20, 16)


@pytest.mark.slow
def test_twenty_kills_on_real_faces(real_faces, tmp_path):
    source = shutil.copy(real_faces / "CASIA-WebFace.zip", tmp_path)
    check(source, tmp_path, 20, 32)
