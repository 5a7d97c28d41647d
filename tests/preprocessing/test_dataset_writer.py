"""journal.py: cut back to the last whole block; killed anywhere, the bytes come out the same."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from fileio.archive_source import Entry
from fileio.index_tsv import read_index
from fileio.recordio import RecordReader
from preprocessing.dataset_writer import Journal, begin, complete, read_report, write_report
from preprocessing.pipeline import Aligned
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_faces import nobody, people, write_zip
from utils import UserError

ENTRIES = [Entry(f"s/{i // 3}/{i}.jpg", str(i // 3), 1, None) for i in range(10)]
BLOCKS = [(0, 4), (4, 8), (8, 10)]
SET = ("train.rec", "train.idx", "property", "index.tsv")


def result(i: int) -> Aligned:
    """Entry 2 and all of identity 1 have no face."""
    if i in (2, 3, 4, 5):
        return Aligned(ENTRIES[i], "no_face")
    points = np.arange(10.0).reshape(5, 2) + i
    return Aligned(ENTRIES[i], "ok", b"jpeg %d" % i * (i + 1), 0.5, np.arange(4.0), points)


def run(folder, blocks: int = 3, finish: bool = True):
    """Append what is left of the first `blocks` blocks; returns how many were there already."""
    journal = Journal(folder, ENTRIES, BLOCKS)
    for start, stop in BLOCKS[journal.done : blocks]:
        journal.append([result(i) for i in range(start, stop)])
    if finish:
        journal.finish()
    journal.close()
    return journal.done


def contents(folder):
    return {name: (folder / name).read_bytes() for name in SET}


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    folder.mkdir()
    run(folder)
    return contents(folder)


def test_labels_are_contiguous_over_identities_with_an_image(whole, tmp_path):
    reader = RecordReader(tmp_path / "whole")
    assert reader.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert reader.identities.tolist() == [[1, 3], [3, 6], [6, 7]]
    table = read_index(tmp_path / "whole", reader)
    assert table.identity == [entry.identity for entry in ENTRIES]
    assert table.record.tolist() == [1, 2, -1, -1, -1, -1, 3, 4, 5, 6]
    assert reader.encoded(2) == b"jpeg 6" * 7


@pytest.mark.parametrize(
    ("blocks", "finish"), [(0, False), (1, False), (2, False), (3, False), (3, True)]
)
def test_going_on_after_any_block(blocks, finish, whole, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    run(part, blocks, finish)
    assert run(part) == blocks
    assert contents(part) == whole


def test_files_cut_anywhere(whole, tmp_path):
    """Whatever is left of the two files, nothing wrong stays in them and the outcome is whole."""
    rng = np.random.default_rng(0)
    part = tmp_path / "part"
    part.mkdir()
    resumed = set()
    for _ in range(60):
        for name in ("train.rec", "index.tsv"):
            length = int(rng.integers(0, len(whole[name]) + 1))
            (part / name).write_bytes(whole[name][:length])
        resumed.add(run(part))
        assert contents(part) == whole
    assert resumed == {0, 1, 2}


def test_rows_of_another_source_are_not_believed(whole, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "train.rec").write_bytes(whole["train.rec"])
    (part / "index.tsv").write_bytes(whole["index.tsv"].replace(b"s/1/4.jpg", b"s/1/x.jpg"))
    assert run(part) == 1
    assert contents(part) == whole


def test_other_settings_begin_anew_and_lose_nothing(tmp_path, capsys):
    part = tmp_path / "faces.part"
    part.mkdir()
    begin(part, {"source": "a", "source_bytes": 1, "settings": {"n": 1}})
    (part / "index.tsv").write_text("rows")
    begin(part, {"source": "moved", "source_bytes": 1, "settings": {"n": 1}})
    assert (part / "index.tsv").exists()
    for number in (1, 2):
        begin(part, {"source": "a", "source_bytes": 1, "settings": {"n": 1 + number}})
        aside = tmp_path / f"faces.{number}.part"
        assert str(aside) in capsys.readouterr().out
        assert (aside / "index.tsv").read_text() == "rows"
        assert not (part / "index.tsv").exists()
        (part / "index.tsv").write_text("rows")
    assert read_report(part, finished=False)["settings"] == {"n": 3}


def test_reports(tmp_path):
    assert read_report(tmp_path) is None
    begun = {"source": "张三.zip", "source_bytes": 3}
    write_report(tmp_path, begun)
    assert read_report(tmp_path, finished=False) == begun
    assert "张三" in (tmp_path / "report.json").read_text("utf-8")
    with pytest.raises(UserError, match="damaged"):
        read_report(tmp_path)  # which is not finished
    write_report(tmp_path, begun | {"kept": 1, "identities": 1})
    assert read_report(tmp_path)["kept"] == 1


@pytest.mark.parametrize(
    "text",
    [
        b'{"source"',
        b"\xff\xfe",
        b"[]",
        b'"source source_bytes"',
        b"[" * 100_000,
        b'{"source": 1, "source_bytes": 3, "kept": 1, "identities": 1}',
        b'{"source": "a", "source_bytes": true, "kept": 1, "identities": 1}',
        b'{"source": "a", "source_bytes": 3, "kept": 1}',
        b'{"source": "a", "source_bytes": 3, "kept": 1, "identities": 1, "settings": []}',
    ],
)
def test_a_report_that_is_none_is_a_sentence(tmp_path, text):
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(UserError, match=r"report\.json is damaged; move"):
        read_report(tmp_path)


def test_complete_gives_the_name(tmp_path):
    part = tmp_path / "x.part"
    part.mkdir()
    (part / "a").touch()
    complete(part, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# Runs pre_process.py as forks of one process (importing takes longest), each of which kills itself
# at one place; then once more to the end.  Blocks are small so that there are several.
KILLER = """
import json, os, signal, sys
import pre_process
from preprocessing import prepare
from preprocessing import pipeline as align
from preprocessing import dataset_writer as journal
from preprocessing import summary as outcome
from fileio import record_writer
from config import parse_args

source, folder = sys.argv[1:]
prepare.BLOCK_IMAGES = 4

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, calls):
    real = getattr(owner, name)
    left = [calls]
    def wrapper(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            die()
        return real(*args, **kwargs)
    setattr(owner, name, wrapper)

def half_a_row(file, path):
    file.flush()
    if str(path).endswith("index.tsv"):
        file.truncate(file.tell() - 30)
        die()

def child(name, place):
    pid = os.fork()
    if pid == 0:
        if place == half_a_row:
            journal.sync = place
        elif place:
            before(*place)
        output = os.path.join(folder, name)
        pre_process.main(parse_args(["--source", source, "--output", output, "--images-dir",
                                     output + "-images", "--detect-batch", "4"], "pre_process"))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)

places = {
    "second-block": (journal.Journal, "append", 1),
    "records-not-synced": (record_writer.RecordWriter, "flush", 1),
    "records-without-rows": (journal, "sync", 1),
    "half-a-row": half_a_row,
    "in-finish": (record_writer, "atomic_write", 0),
    "property-without-idx": (record_writer, "atomic_write", 1),
    "in-pairs": (outcome, "atomic_write", 5),
    "before-report": (prepare, "write_report", 0),
    "before-rename": (prepare, "complete", 0),
}
outcomes = {"whole": child("whole", None)}
for name, place in places.items():
    killed = child(name, place)
    finished = os.path.exists(os.path.join(folder, name))
    # as a killed atomic_write leaves it
    open(os.path.join(folder, name + ".part", ".report.json-x.tmp"), "w").close()
    outcomes[name] = [killed, finished, child(name, None)]
with open(os.path.join(folder, "outcomes.json"), "w") as file:
    json.dump(outcomes, file)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_every_place_and_started_again(tmp_path):
    files = people(3, 3) | {"CASIA-WebFace/0001001/900.jpg": nobody()}
    source = write_zip(tmp_path / "CASIA-WebFace.zip", files)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert outcomes.pop("whole") == 0, done.stderr
    wanted = contents(tmp_path / "whole")
    for name, outcome in outcomes.items():
        assert (name, outcome) == (name, [signal.SIGKILL.value, False, 0]), done.stderr
        assert contents(tmp_path / name) == wanted, name
        for i in range(9):
            for kind in ("raw", "img"):
                pair = [tmp_path / f"{n}-images" / f"{i}_{kind}.jpg" for n in ("whole", name)]
                assert pair[0].read_bytes() == pair[1].read_bytes()
    resumed = json.loads((tmp_path / "in-finish" / "report.json").read_text())["resumed_at"]
    assert resumed == len(files)
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.rglob("*.tmp"))
