"""The resumable writer: cut back to the last complete block; after any kill the same bytes."""

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
from preprocessing.dataset_writer import (
    DatasetWriter,
    assign_labels,
    begin_output,
    publish_output,
)
from preprocessing.pipeline import AlignResult
from preprocessing.summary import read_summary, write_summary
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_faces import casia_files, image_without_face, write_zip
from utils import UserError

ENTRIES = [Entry(f"s/{i // 3}/{i}.jpg", str(i // 3), 1, None) for i in range(10)]
BLOCKS = [(0, 4), (4, 8), (8, 10)]
SET = ("train.rec", "train.idx", "property", "index.tsv")


def result(i: int) -> AlignResult:
    """Entry 2 and all of identity 1 have no face."""
    if i in (2, 3, 4, 5):
        return AlignResult(ENTRIES[i], "no_face")
    points = np.arange(10.0).reshape(5, 2) + i
    return AlignResult(ENTRIES[i], "ok", b"jpeg %d" % i * (i + 1), 0.5, np.arange(4.0), points)


def run(folder, blocks: int = 3, finish: bool = True):
    """Append what is missing of the first `blocks` blocks; returns how many it had already."""
    writer = DatasetWriter(folder, ENTRIES, BLOCKS)
    for start, stop in BLOCKS[writer.blocks_done : blocks]:
        writer.append([result(i) for i in range(start, stop)])
    if finish:
        writer.finish()
    writer.close()
    return writer.blocks_done


def contents(folder):
    return {name: (folder / name).read_bytes() for name in SET}


@pytest.fixture
def complete(tmp_path):
    folder = tmp_path / "complete"
    folder.mkdir()
    run(folder)
    return contents(folder)


def test_labels_are_contiguous_over_identities_with_an_image(complete, tmp_path):
    reader = RecordReader(tmp_path / "complete")
    assert reader.labels.tolist() == [0, 0, 1, 1, 1, 2]
    table = read_index(tmp_path / "complete", reader)
    assert table.identity == [entry.identity for entry in ENTRIES]
    assert table.record.tolist() == [1, 2, -1, -1, -1, -1, 3, 4, 5, 6]
    assert reader.encoded(2) == b"jpeg 6" * 7


@pytest.mark.parametrize(
    ("blocks", "finish"), [(0, False), (1, False), (2, False), (3, False), (3, True)]
)
def test_resuming_after_any_block(blocks, finish, complete, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    run(part, blocks, finish)
    assert run(part) == blocks
    assert contents(part) == complete


def test_files_cut_anywhere(complete, tmp_path):
    """Whatever is left of the two files, nothing wrong stays in them and the result is complete."""
    rng = np.random.default_rng(0)
    part = tmp_path / "part"
    part.mkdir()
    resumed = set()
    for _ in range(60):
        for name in ("train.rec", "index.tsv"):
            length = int(rng.integers(0, len(complete[name]) + 1))
            (part / name).write_bytes(complete[name][:length])
        resumed.add(run(part))
        assert contents(part) == complete
    assert resumed == {0, 1, 2}


def test_rows_of_another_source_are_not_trusted(complete, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "train.rec").write_bytes(complete["train.rec"])
    (part / "index.tsv").write_bytes(complete["index.tsv"].replace(b"s/1/4.jpg", b"s/1/x.jpg"))
    assert run(part) == 1
    assert contents(part) == complete


def test_rows_with_wrong_labels_are_not_trusted(complete, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    (part / "train.rec").write_bytes(complete["train.rec"])
    wrong = complete["index.tsv"].replace(b"\n3\t1\t2\t", b"\n3\t2\t2\t")
    assert wrong != complete["index.tsv"]
    (part / "index.tsv").write_bytes(wrong)
    assert run(part) == 1
    assert contents(part) == complete


def test_labels_number_the_identities_with_an_image():
    entries = [Entry(f"{name}/{i}.jpg", name, 1, None) for i, name in enumerate("aabbc")]
    kept = [True, True, False, False, True]
    assert assign_labels(entries, kept, -1, None) == [0, 0, None, None, 1]
    assert assign_labels(entries, kept, 6, "a") == [6, 6, None, None, 7]  # a has images before
    assert assign_labels(entries, kept, 6, "Z") == [7, 7, None, None, 8]
    assert assign_labels(entries[1:3], [False] * 2, 6, "a") == [None, None]


def test_other_settings_start_over_and_lose_nothing(tmp_path, capsys):
    part = tmp_path / "faces.part"
    part.mkdir()
    begin_output(part, {"source": "a", "source_bytes": 1, "settings": {"n": 1}})
    (part / "index.tsv").write_text("rows")
    begin_output(part, {"source": "moved", "source_bytes": 1, "settings": {"n": 1}})
    assert (part / "index.tsv").exists()
    for number in (1, 2):
        begin_output(part, {"source": "a", "source_bytes": 1, "settings": {"n": 1 + number}})
        aside = tmp_path / f"faces.{number}.part"
        assert str(aside) in capsys.readouterr().out
        assert (aside / "index.tsv").read_text() == "rows"
        assert not (part / "index.tsv").exists()
        (part / "index.tsv").write_text("rows")
    assert read_summary(part, finished=False)["settings"] == {"n": 3}


def test_summaries(tmp_path):
    assert read_summary(tmp_path) is None
    inputs = {"source": "张三.zip", "source_bytes": 3}
    write_summary(tmp_path, inputs)
    assert read_summary(tmp_path, finished=False) == inputs
    assert "张三" in (tmp_path / "report.json").read_text("utf-8")
    with pytest.raises(UserError, match="corrupt"):
        read_summary(tmp_path)  # of an unfinished data set
    write_summary(tmp_path, inputs | {"kept": 1, "identities": 1})
    assert read_summary(tmp_path)["kept"] == 1


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
def test_a_corrupt_summary_is_a_user_error(tmp_path, text):
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(UserError, match=r"report\.json is corrupt; move"):
        read_summary(tmp_path)


def test_publishing_gives_the_name(tmp_path):
    part = tmp_path / "x.part"
    part.mkdir()
    (part / "a").touch()
    publish_output(part, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_every_point_and_resumed(tmp_path):
    files = casia_files(3, 3) | {"CASIA-WebFace/0001001/900.jpg": image_without_face()}
    source = write_zip(tmp_path / "CASIA-WebFace.zip", files)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/kill_points.py", source, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert outcomes.pop("complete") == 0, done.stderr
    expected = contents(tmp_path / "complete")
    for name, outcome in outcomes.items():
        assert (name, outcome) == (name, [signal.SIGKILL.value, False, 0]), done.stderr
        assert contents(tmp_path / name) == expected, name
        for i in range(9):
            for kind in ("raw", "img"):
                pair = [tmp_path / f"{n}-images" / f"{i}_{kind}.jpg" for n in ("complete", name)]
                assert pair[0].read_bytes() == pair[1].read_bytes()
    resumed = json.loads((tmp_path / "in-finish" / "report.json").read_text())["resumed_at"]
    assert resumed == len(files)
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.rglob("*.tmp"))
