"""Ten seconds of Atheris for every kind of untrusted file, where it is installed."""

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "tests" / "helpers" / "guided.py"
KINDS = ("zip", "tar", "image", "bin", "index.tsv", "pairs", "onnx")
KINDS += ("train.rec", "train.idx", "train-00000.npy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_seconds_of_a_fuzzer_that_sees_what_it_reaches(kind, tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    done = subprocess.run(
        [sys.executable, SCRIPT, kind, "-max_total_time=10", "-timeout=20", "-rss_limit_mb=4000"],
        cwd=tmp_path,  # where it leaves an input that breaks something
        capture_output=True,
        text=True,
        check=False,
    )
    assert not list(tmp_path.iterdir()), done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    print(kind, re.search(r"Done \d+ runs", done.stderr)[0])
