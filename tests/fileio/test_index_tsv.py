"""index.tsv: lines written by hand, awkward names, and indexes that do not fit their records."""

import math

import numpy as np
import pytest

from fileio import record_writer, recordio
from fileio.index_tsv import (
    INDEX_COLUMNS,
    INDEX_HEADER,
    IndexRow,
    format_index_row,
    parse_index_row,
    read_index,
)
from utils import UserError

POINTS = np.arange(10).reshape(5, 2) * 1.5
BOX = (1, 2.00004, 3.5, -4)
FOUND = IndexRow(1, 0, "0000045", "CASIA/0000045/001.jpg", "ok", 0.9912345678, BOX, POINTS)
MISSED = IndexRow(None, None, "0000045", "CASIA/0000045/002.jpg", "no_face")
CROPPED = IndexRow(2, 1, "0000099", "CASIA/0000099/001.jpg", "central_crop", None, None, POINTS)
FOUND_LINE = (
    "1\t0\t0000045\tCASIA/0000045/001.jpg\tok\t0.991235\t1.0000\t2.0000\t3.5000\t-4.0000\t"
    "0.0000\t1.5000\t3.0000\t4.5000\t6.0000\t7.5000\t9.0000\t10.5000\t12.0000\t13.5000\n"
)


def save(folder, rows):
    text = INDEX_HEADER + "".join(map(format_index_row, rows))
    (folder / "index.tsv").write_bytes(text.encode("utf-8"))


def test_lines_as_written_by_hand():
    assert len(INDEX_COLUMNS) == 20
    assert INDEX_COLUMNS[9:12] == ("y2", "left_eye_x", "left_eye_y")
    assert INDEX_COLUMNS[-1] == "right_mouth_y"
    assert format_index_row(FOUND) == FOUND_LINE
    missed = "\t\t0000045\tCASIA/0000045/002.jpg\tno_face" + "\t" * 15 + "\n"
    assert format_index_row(MISSED) == missed
    assert parse_index_row(missed) == MISSED
    row = parse_index_row(FOUND_LINE)
    assert row[:6] == (1, 0, "0000045", "CASIA/0000045/001.jpg", "ok", 0.991235)
    assert row.box == [1, 2, 3.5, -4] and row.points == POINTS.tolist()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "王小明/一.jpg",
            "a\tb\nc\\d\re",
            "\\t",
            "\\\\x80",
            "end\\",
            "",
            " blank ",
            "\u2028\x85\x0b",
        ),
        b"no \xff\x80 utf-8".decode("utf-8", "surrogateescape"),
        "\\xff\udcff",
    ],
)
def test_any_name_comes_back(tmp_path, name):
    row = MISSED._replace(identity=name, source=name)
    line = format_index_row(row)
    assert line.count("\n") == 1 and "\r" not in line and line.count("\t") == 19
    assert parse_index_row(line.encode("utf-8").decode("utf-8")) == row
    save(tmp_path, [row, FOUND])
    table = read_index(tmp_path)
    assert table.identity[0] == table.source[0] == name


def test_columns(tmp_path):
    save(tmp_path, [FOUND, MISSED, CROPPED])
    table = read_index(tmp_path)
    assert table.record.tolist() == [1, -1, 2] and table.label.tolist() == [0, -1, 1]
    assert table.status == ["ok", "no_face", "central_crop"]
    assert table.source[2] == "CASIA/0000099/001.jpg"
    assert table.score[0] == 0.991235 and math.isnan(table.score[1])
    assert table.box.shape == (3, 4) and table.box[0].tolist() == [1, 2, 3.5, -4]
    assert table.points.shape == (3, 5, 2) and np.array_equal(table.points[2], POINTS)
    assert np.isnan(table.box[1:]).all() and np.isnan(table.points[1]).all()
    save(tmp_path, [FOUND._replace(score=None), FOUND._replace(points=None)])
    table = read_index(tmp_path)
    assert np.isnan(table.score).tolist() == [True, False]
    assert np.isnan(table.points).any((1, 2)).tolist() == [False, True]
    assert table.box.tolist() == [[1, 2, 3.5, -4]] * 2
    save(tmp_path, [])
    assert read_index(tmp_path).points.shape == (0, 5, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "no header line"),
        (lambda text: text.replace("source", "file"), "no header line"),
        (lambda text: text[:-1], "cut short"),
        (lambda text: text.replace("1.5000", "one", 1), r"Line 2 .* cannot be read"),
        (lambda text: text.replace("ok\t", ""), r"Line 2 .*19 columns, not 20"),
        (lambda text: text + "\n", r"Line 5 .*1 columns, not 20"),
        (lambda text: text + "7\t0\tidentity\n", r"Line 5 .*3 columns, not 20"),
        (lambda text: text.replace("1\t0", "one\t0", 1), r"Line 2 .* cannot be read"),
        (lambda text: text.replace("0000045/002", "\\q"), r"Line 3 .* cannot be read"),
        (lambda text: text.replace("1\t0", "9" * 30 + "\t0", 1), r"Line 2 .* out of range"),
        (lambda text: text.replace("1\t0", "9" * 5000 + "\t0", 1), r"Line 2 .* cannot be read"),
        (lambda text: text.replace("1\t0", "-1\t0", 1), r"Line 2 .* out of range"),
        (lambda text: text.split("\n")[0] + "\n1\t0\n" * 2, r"Line 2 .*2 columns, not 20"),
    ],
)
def test_corruption_is_a_sentence(tmp_path, change, words):
    save(tmp_path, [FOUND, MISSED, CROPPED])
    path = tmp_path / "index.tsv"
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_index(tmp_path)
    assert str(path) in str(caught.value) and "pre_process.py" in str(caught.value)


def test_no_index_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*index\.tsv"):
        read_index(tmp_path)


def test_an_index_of_other_records_is_a_sentence(tmp_path):
    record_writer.write_dataset(tmp_path, [b"one", b"two"], [0, 1])
    reader = recordio.RecordReader(tmp_path)
    save(tmp_path, [FOUND, MISSED, CROPPED])
    assert len(read_index(tmp_path, reader).record) == 3
    save(tmp_path, [FOUND, MISSED])
    with pytest.raises(UserError, match="lists 1 records, there are 2"):
        read_index(tmp_path, reader)
    save(tmp_path, [FOUND, CROPPED._replace(record=3)])
    with pytest.raises(UserError, match=r"does not belong to .*train\.rec"):
        read_index(tmp_path, reader)
    save(tmp_path, [FOUND, CROPPED._replace(label=0)])
    with pytest.raises(UserError, match="record 2 has label 1, there it has 0"):
        read_index(tmp_path, reader)
