"""Ready packs: train.rec files that other tools made."""

import json

import cv2
import numpy as np
import pytest

from config import Config
from fileio.images import encode_jpeg
from fileio.index_tsv import INDEX_HEADER, read_index
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from pre_process import main
from tests.helpers.synthetic_faces import face

LABELS = [0, 0, 1, 2, 2, 2]


def crop(i, size=112):
    pixels = np.random.default_rng(i).integers(0, 256, (7, 7, 3), np.uint8)
    return encode_jpeg(cv2.resize(pixels, (size, size)))


def pack(folder, jpegs):
    write_dataset(folder, jpegs, LABELS)
    return folder


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_ready_pack_is_checked_and_indexed_where_it_lies(tmp_path, capsys):
    folder = pack(tmp_path / "faces_webface_112x112", [crop(i) for i in range(6)])
    before = (folder / "train.rec").read_bytes()
    main(Config(data_dir=str(tmp_path)))
    assert (folder / "train.rec").read_bytes() == before
    table = read_index(folder, RecordReader(folder))
    assert table.status == ["ok"] * 6
    assert table.label.tolist() == LABELS
    report = report_of(folder)
    assert (report["images"], report["kept"], report["identities"]) == (6, 6, 3)
    assert "kept 6 of 3 identities" in capsys.readouterr().out
    index = (folder / "index.tsv").stat().st_mtime_ns
    main(Config(data_dir=str(tmp_path)))
    assert "is checked and indexed" in capsys.readouterr().out
    assert (folder / "index.tsv").stat().st_mtime_ns == index


def test_bad_records_are_named(tmp_path):
    jpegs = [crop(0), b"", crop(2, 96), face(0), crop(4)[:200], crop(5)]
    source = pack(tmp_path / "theirs", jpegs)
    main(Config(source=str(source), output=str(tmp_path / "mine")))
    assert {p.name for p in source.iterdir()} == {"train.rec", "train.idx", "property"}
    table = read_index(tmp_path / "mine", RecordReader(source))
    assert table.status == ["ok", "unreadable", "wrong_size", "wrong_size", "unreadable", "ok"]
    report = report_of(tmp_path / "mine")
    assert report["kept"] == 2
    assert report["missed"]["unreadable"]["count"] == 2


def test_an_alignments_index_is_not_overwritten(tmp_path, capsys):
    folder = pack(tmp_path / "x", [crop(i) for i in range(6)])
    (folder / "index.tsv").write_text(INDEX_HEADER + "1\t0\ta\ts/a/1.jpg\tok" + "\t" * 15 + "\n")
    with pytest.raises(SystemExit):
        main(Config(source=str(folder)))
    assert "move it away" in capsys.readouterr().err
    assert "s/a/1.jpg" in (folder / "index.tsv").read_text()


def test_a_ready_pack_goes_before_an_archive(tmp_path, capsys):
    pack(tmp_path / "faces_webface_112x112", [crop(i) for i in range(6)])
    (tmp_path / "CASIA-WebFace.zip").touch()
    main(Config(data_dir=str(tmp_path)))
    assert "CASIA-WebFace.zip is ignored" in capsys.readouterr().out


def test_a_class_without_an_image_is_counted(tmp_path):
    folder = pack(tmp_path / "x", [crop(i) for i in range(6)])
    (folder / "property").write_text("5,112,112")
    main(Config(source=str(folder / "train.rec")))
    assert report_of(folder)["classes_without_image"] == 2


def test_packs_that_cannot_be_used_are_user_errors(tmp_path, capsys):
    folder = pack(tmp_path / "x", [crop(i) for i in range(6)])
    (folder / "property").write_text("3,96,112")
    with pytest.raises(SystemExit) as error:
        main(Config(source=str(folder)))
    assert error.value.code == 2
    assert "not 112x112" in capsys.readouterr().err
    (folder / "property").write_text("3,112,112")
    (folder / "train.rec").write_bytes((folder / "train.rec").read_bytes()[:-700])
    with pytest.raises(SystemExit) as error:
        main(Config(source=str(folder)))
    assert error.value.code == 2
    assert "train.rec" in capsys.readouterr().err
    assert not (folder / "report.json").exists()


def test_a_real_pack_of_other_code(real_faces, tmp_path):
    from fileio import recordio

    reader = recordio.RecordReader(real_faces / "faces_mixed_112x112")
    some = range(0, len(reader), len(reader) // 300)
    jpegs = [reader.encoded(i) for i in some]
    write_dataset(tmp_path / "x", jpegs, sorted(i // 30 for i in range(len(jpegs))))
    main(Config(source=str(tmp_path / "x")))
    assert report_of(tmp_path / "x")["kept"] == len(jpegs)
