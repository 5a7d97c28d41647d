"""pre_process.py killed at random moments, held to the kernel's limits, and started twice at once.

Each run is a fork of one process, as importing takes longest.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.synthetic_faces import nobody, people, write_zip

SET = ("train.rec", "train.idx", "property", "index.tsv")

RUNS = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import pre_process
from preprocessing import prepare
from config import parse_args

source, folder, kills, block = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
prepare.BLOCK_IMAGES = block
random.seed(1)

def start(name, limit=None):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(stderr, 2)  # a pipe: a file would have the limit, too
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        pre_process.main(parse_args(["--source", source, "--output", str(folder / name),
                                     "--images-dir", str(folder / f"{name}-images"),
                                     "--detect-batch", str(min(block, 64))], "pre_process"))
    except SystemExit as ended:
        os._exit(ended.code)
    os._exit(0)

stdout, stderr = os.pipe()
os.set_blocking(stdout, False)

def complaint():
    try:
        return os.read(stdout, 1 << 20).decode()
    except BlockingIOError:
        return ""

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def rows(name):
    index = folder / f"{name}.part" / "index.tsv"
    return index.read_bytes().count(b"\\n") - 1 if index.exists() else None

began = time.monotonic()
outcomes = {"whole": finish(start("whole"))}
seconds = time.monotonic() - began

killed, runs = [], 0
while len(killed) < kills:
    name = f"killed-{runs}"
    pid = start(name)
    end = time.monotonic() + random.uniform(0, 0.95 * seconds)
    while time.monotonic() < end and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    complaint()  # or the pipe fills up
    try:
        os.kill(pid, signal.SIGKILL)
        finish(pid)
        killed.append([name, rows(name)])
    except (ProcessLookupError, ChildProcessError):  # it was quicker: on with the next
        runs += 1
last = f"killed-{runs}"
if not (folder / last).exists():
    outcomes[last] = finish(start(last))
outcomes["killed"] = killed

for limit in (10, 2_000, 20_000, 40_000):
    name = f"limit-{limit}"
    complaint()
    outcomes[name] = [finish(start(name, limit)), complaint(), finish(start(name))]

first = start("twice")
while not rows("twice"):
    time.sleep(0.002)
os.kill(first, signal.SIGSTOP)
complaint()
second = finish(start("twice"))
sentence = complaint()
os.kill(first, signal.SIGKILL)
finish(first)
outcomes["twice"] = [second, sentence, first, finish(start("twice"))]
(folder / "outcomes.json").write_text(json.dumps(outcomes))
"""


def run(source, folder, kills, block):
    """Run them all; returns the outcomes."""
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(source), str(folder), str(kills), str(block)],
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
    assert outcomes.pop("whole") == 0
    wanted = contents(folder / "whole")
    killed = outcomes.pop("killed")
    assert len(killed) == kills
    second, sentence, first, third = outcomes.pop("twice")
    assert (second, third) == (2, 0)
    assert re.search(
        rf"twice\.part is in use by pre_process\.py, process {first} on \S+ since \d{{4}}-",
        sentence,
    )
    for name in [name for name in outcomes if name.startswith("limit-")]:
        status, complaint, again = outcomes.pop(name)
        assert (status, again) == (2, 0), complaint
        assert "cannot be written (File too large): lift the limit" in complaint
        assert "Traceback" not in complaint
        assert contents(folder / name) == wanted
    assert set(outcomes.values()) <= {0}
    finished = {path for path in folder.glob("killed-*") if not path.suffix and path.is_dir()}
    finished -= set(folder.glob("*-images"))
    for path in [folder / "twice", *finished]:
        assert contents(path) == wanted, path
        assert sorted(p.name for p in path.iterdir()) == sorted([*SET, "report.json"])
        images = [folder / f"{name}-images" for name in (path.name, "whole")]
        assert len({tuple(p.read_bytes() for p in sorted(f.iterdir())) for f in images}) == 1
    assert finished
    assert not list(folder.glob("*.part"))
    assert not list(folder.rglob("*.tmp"))
    compared = len(finished) * sum(map(len, wanted.values()))
    print(
        f"{kills} kills, {len(finished)} sets of {sum(map(len, wanted.values())):,} bytes equal "
        f"({compared:,} bytes); rows of index.tsv at each kill: {[rows for _, rows in killed]}"
    )


def test_a_few_kills_and_limits_and_two_at_once(tmp_path):
    files = people(4, 5) | {"CASIA-WebFace/0001001/900.jpg": nobody()}
    check(write_zip(tmp_path / "CASIA-WebFace.zip", files), tmp_path, 4, 4)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    files = people(20, 12) | {"CASIA-WebFace/0001001/900.jpg": nobody()}
    check(write_zip(tmp_path / "CASIA-WebFace.zip", files), tmp_path, 20, 16)


@pytest.mark.slow
def test_twenty_kills_on_real_faces(real_faces, tmp_path):
    source = shutil.copy(real_faces / "CASIA-WebFace.zip", tmp_path)
    check(source, tmp_path, 20, 32)
