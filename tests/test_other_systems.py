"""The scripts without what Windows lacks: those modules and functions are taken away.

But for os.register_at_fork, which PyTorch itself calls on Linux; no code of ours does.
"""

import subprocess
import sys

from tests.helpers.paths import ROOT

WITHOUT = """
import os, runpy, signal, sys
for module in ("fcntl", "resource", "termios"):
    sys.modules[module] = None
for name in ("sysconf", "sched_getaffinity"):
    delattr(os, name)
del signal.SIGHUP
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


DRAWN = "--identities 4 --images-per-identity 4 --lfw-identities 20"
SMALL = "--network tiny --emb-size 16 --batch-size 4 --epochs 1 --dropout 0 --device cpu"


def test_from_archive_to_number_without_fcntl(tmp_path):
    run("-m", "tools.synthetic", "--output", str(tmp_path / "data"), *DRAWN.split())
    folders = ["--data-dir", str(tmp_path / "data"), "--images-dir", str(tmp_path / "images")]
    runs = ["--runs-dir", str(tmp_path / "runs")]
    assert "kept " in run("-c", WITHOUT, "pre_process.py", *folders)
    run("-c", WITHOUT, "train.py", *folders, *runs, *SMALL.split())
    assert "accuracy, " in run("-c", WITHOUT, "lfw_eval.py", *folders, *runs)
    assert not list(tmp_path.rglob(".*"))  # neither locks nor temporary files
