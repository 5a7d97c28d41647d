"""pre_process.py: what it finds in data/, every bad input, the report, the images."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from config import Config
from fileio.images import decode_image
from fileio.index_tsv import read_index
from fileio.locks import lock_folder
from fileio.recordio import RecordReader
from pre_process import main
from preprocessing.prepare import PrepareOptions, prepare_dataset
from preprocessing.sources import find_jobs, find_sources
from tests.helpers.paths import ROOT
from tests.helpers.synthetic_faces import (
    casia_files,
    face,
    image_without_face,
    same_pixels,
    write_zip,
)
from utils import TEMPLATE, UserError, similarity_transform


@pytest.fixture
def run(tmp_path, capsys):
    """Run main on data/ in tmp_path with some settings; returns (status, stdout, stderr)."""

    def run(**settings):
        try:
            settings = {k: str(v) if isinstance(v, os.PathLike) else v for k, v in settings.items()}
            main(
                Config(data_dir=str(tmp_path / "data"), images_dir=str(tmp_path / "im"), **settings)
            )
            status = 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    (tmp_path / "data").mkdir()
    return run


def read_results(folder):
    """{source name: (status, label or None)} and the summary."""
    table = read_index(folder, RecordReader(folder))
    rows = zip(table.source, table.status, table.label.tolist(), strict=True)
    statuses = {name: (status, None if label < 0 else label) for name, status, label in rows}
    return statuses, json.loads((folder / "report.json").read_text("utf-8"))


def tgz(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def lfw(count=2):
    return {f"lfw/P_{p}/P_{p}_000{i}.jpg": face(50 + p, i) for p in range(count) for i in (1, 2)}


# ------------------------------------------------------------------------------ the usual way


def test_both_sets_with_no_flag_at_all(run, tmp_path):
    data = tmp_path / "data"
    write_zip(data / "CASIA-WebFace.zip", casia_files(3, 3))
    tgz(data / "lfw-funneled.tgz", lfw() | {"lfw/P_0/P_0_0003.jpg": image_without_face()})
    status, stdout, stderr = run()
    assert status == 0, stderr
    statuses, report = read_results(data / "faces_webface_112x112")
    assert statuses == {name: ("ok", i // 3) for i, name in enumerate(casia_files(3, 3))}
    assert (report["kept"], report["identities"], report["images"]) == (9, 3, 9)
    assert report["source"] == str(data / "CASIA-WebFace.zip")
    statuses, report = read_results(data / "faces_lfw_112x112")
    assert statuses["lfw/P_0/P_0_0003.jpg"] == ("central_crop", 0)
    assert report["missed"] == {"central_crop": {"count": 1, "names": ["lfw/P_0/P_0_0003.jpg"]}}
    assert report["kept"] == 5
    assert "CASIA-WebFace.zip: 9 images" in stdout
    assert "kept 9 of 3 identities" in stdout
    assert "(central_crop 1, ok 4)" in stdout
    names = {p.name for p in (data / "faces_lfw_112x112").iterdir()}
    assert names == {"train.rec", "train.idx", "property", "index.tsv", "report.json"}
    assert len(list((tmp_path / "im").iterdir())) == 18  # of the nine training images alone


def test_eyes_and_mouth_lie_on_the_template(run, tmp_path):
    """The index's points, taken by the best similarity, are ArcFace's to a few pixels."""
    write_zip(tmp_path / "data" / "CASIA-WebFace.zip", casia_files(4, 2))
    assert run()[0] == 0
    table = read_index(tmp_path / "data" / "faces_webface_112x112")
    matrix = similarity_transform(table.points)
    placed = np.einsum("nij,nkj->nki", matrix[:, :, :2], table.points) + matrix[:, None, :, 2]
    assert np.abs(placed - TEMPLATE).mean() < 3
    assert (table.points[:, 0, 0] < table.points[:, 1, 0]).all()  # left in the image comes first


def test_finished_outputs_are_left_alone(run, tmp_path):
    source = write_zip(tmp_path / "data" / "CASIA-WebFace.zip", casia_files(2, 2))
    run()
    folder = tmp_path / "data" / "faces_webface_112x112"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    status, stdout, _ = run()
    assert status == 0
    assert "is finished: 4 images of 2 identities" in stdout
    status, _, stderr = run(min_face=40)
    assert status == 2
    assert "another --missed or --min-face" in stderr
    write_zip(source, casia_files(2, 3))
    status, _, stderr = run()
    assert status == 2
    assert "prepared from another CASIA-WebFace.zip" in stderr
    source.unlink()
    status, stdout, _ = run()
    assert status == 0
    assert "is finished" in stdout
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_folders_and_other_names(run, tmp_path):
    for name, content in casia_files(2, 2).items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    (tmp_path / "data" / "CASIA-WebFace" / "0009999").mkdir()
    source = tgz(tmp_path / "LFW-mine.tar.gz", lfw(1) | {"lfw/P_0/x.jpg": image_without_face()})
    assert run()[0] == 0
    statuses, report = read_results(tmp_path / "data" / "faces_webface_112x112")
    assert [label for _, label in statuses.values()] == [0, 0, 1, 1]
    assert report["not_pictures"] == {"empty_folder": {"count": 1, "names": ["0009999"]}}
    assert run(source=source)[0] == 0
    statuses, _ = read_results(tmp_path / "data" / "faces_lfw_112x112")
    assert statuses["lfw/P_0/x.jpg"] == ("central_crop", 0)
    assert run(source=source, output=tmp_path / "skipped", missed="skip")[0] == 0
    assert read_results(tmp_path / "skipped")[0]["lfw/P_0/x.jpg"] == ("no_face", None)


def test_images_before_and_after(run, tmp_path):
    files = casia_files(3, 5)
    write_zip(tmp_path / "data" / "CASIA-WebFace.zip", files)
    run()
    reader = RecordReader(tmp_path / "data" / "faces_webface_112x112")
    positions = np.linspace(0, 14, 10).round().astype(int)
    for i, position in enumerate(positions):
        assert (tmp_path / "im" / f"{i}_raw.jpg").read_bytes() == list(files.values())[position]
        assert (tmp_path / "im" / f"{i}_img.jpg").read_bytes() == reader.encoded(position)
    few = write_zip(tmp_path / "few.zip", casia_files(1, 3))
    assert run(source=few, output=tmp_path / "few")[0] == 0
    assert len(list((tmp_path / "im").iterdir())) == 6  # no stale ones


def test_identities_without_a_face_take_no_label(run, tmp_path):
    files = casia_files(3, 2)
    names = list(files)
    files[names[2]] = files[names[3]] = image_without_face()
    write_zip(tmp_path / "data" / "CASIA-WebFace.zip", files)
    run()
    statuses, report = read_results(tmp_path / "data" / "faces_webface_112x112")
    assert [label for _, label in statuses.values()] == [0, 0, None, None, 1, 1]
    assert (report["identities"], report["identities_in_source"]) == (2, 3)


# ------------------------------------------------------------------------------ bad input


def png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def cmyk(data):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("CMYK").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def rotated(data):
    """The image lying on its side, with the EXIF tag that sets it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).rotate(90).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def huge(data):
    frame = data.find(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", 20_000, 20_000) + data[frame + 9 :]


def bad_files():
    pixels = decode_image(face(0, 1))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return {
        "s/a/00good.jpg": (face(0), "ok"),
        "s/a/01grey.png": (png(grey), "ok"),
        "s/a/02grey16.png": (png(grey.astype(np.uint16) * 257), "ok"),
        "s/a/03colour16.png": (png(pixels[..., ::-1].astype(np.uint16) * 257), "ok"),
        "s/a/04cmyk.jpg": (cmyk(face(0, 1)), "ok"),
        "s/a/05rotated.jpg": (rotated(face(0, 1)), "ok"),
        "s/a/06truncated.jpg": (face(0, 1)[:-3000], "truncated"),
        "s/a/07zero.jpg": (b"", "empty_file"),
        "s/a/08text.jpg": (b"not an image", "not_an_image"),
        "s/a/09pixel.png": (png(np.zeros((1, 1, 3), np.uint8)), "too_small"),
        "s/a/10huge.jpg": (huge(face(0, 1)), "too_large"),
        "s/a/11wide.png": (png(np.zeros((40, 20_000, 3), np.uint8)), "no_face"),
        "s/a/12corrupt.png": (png(pixels)[:-9999], "truncated"),  # cut short, too
        "s/a/deep/13folder.jpg": (face(1), "ok"),
        "s/张三/14照片.jpg": (face(2), "ok"),
    }


@pytest.mark.parametrize("kind", ["zip", "tgz", "folder"])
def test_bad_input_is_right_or_counted(kind, run, tmp_path):
    expected = bad_files()
    files = {name: data for name, (data, _) in expected.items()}
    source = tmp_path / f"set.{kind}"
    if kind == "folder":
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    else:
        (write_zip if kind == "zip" else tgz)(source, files)
    status, stdout, stderr = run(source=source, output=tmp_path / "out")
    assert status == 0, stderr
    statuses, report = read_results(tmp_path / "out")
    assert {name: status for name, (status, _) in statuses.items()} == {
        name: status for name, (_, status) in expected.items()
    }
    # a, deep, 张三: sorted by code point
    assert [statuses[n][1] for n in ("s/a/00good.jpg", "s/a/deep/13folder.jpg")] == [0, 1]
    assert statuses["s/张三/14照片.jpg"] == ("ok", 2)
    cut = ["s/a/06truncated.jpg", "s/a/12corrupt.png"]
    assert report["missed"]["truncated"]["names"] == cut
    assert "skipped 7" in stdout
    reader = RecordReader(tmp_path / "out")
    crops = {i: reader.image(i) for i in range(6)}
    for i in (3, 4, 5):  # colour, CMYK and the one on its side are one image
        assert same_pixels(crops[i], crops[3], 6)
    assert same_pixels(crops[1], crops[2], 1)
    assert np.ptp(crops[1].astype(int), axis=2).max() <= 1  # grey


def test_lfw_keeps_every_readable_image(run, tmp_path):
    expected = bad_files()
    source = write_zip(tmp_path / "lfw-bad.zip", {n: data for n, (data, _) in expected.items()})
    assert run(source=source, output=tmp_path / "out")[0] == 0
    statuses, _ = read_results(tmp_path / "out")
    for name, (_, status) in expected.items():
        cropped = "central_crop" if status in ("no_face", "too_small") else status
        assert statuses[name][0] == cropped


def test_hostile_and_corrupt_archives_write_nothing_outside(run, tmp_path):
    files = casia_files(1, 2)
    evil = {"../../evil/1.jpg": face(3), "/abs/evil/1.jpg": face(3)}
    path = write_zip(tmp_path / "data" / "CASIA-WebFace.zip", files | evil)
    content = bytearray(path.read_bytes())
    content[content.find(face(0, 1)) + 4000] ^= 255  # stored, so found; its CRC is wrong now
    path.write_bytes(content)
    assert run()[0] == 0
    statuses, report = read_results(tmp_path / "data" / "faces_webface_112x112")
    assert sorted(statuses.values(), key=str) == [("ok", 0), ("unreadable", None)]
    assert report["not_pictures"]["unsafe_name"]["count"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"data", "im"}
    assert {p.name for p in (tmp_path / "data").iterdir()} == {path.name, "faces_webface_112x112"}


def test_truncated_tgz_is_used_as_far_as_it_goes(run, tmp_path):
    path = tgz(tmp_path / "data" / "CASIA-WebFace.tgz", casia_files(2, 4))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status, stdout, stderr = run()
    assert status == 0
    assert "WARNING" in stdout
    assert "cut short" in stderr
    _, report = read_results(tmp_path / "data" / "faces_webface_112x112")
    assert 3 <= report["kept"] <= 4
    assert report["damage"]


def test_one_broken_archive_does_not_stop_the_other(run, tmp_path):
    path = write_zip(tmp_path / "data" / "CASIA-WebFace.zip", casia_files(1, 1))
    path.write_bytes(path.read_bytes()[:-50])
    tgz(tmp_path / "data" / "lfw.tgz", lfw(1))
    status, stdout, stderr = run()
    assert status == 2
    assert "CASIA-WebFace.zip is cut short" in stderr
    assert "lfw.tgz: 2 images" in stdout
    assert (tmp_path / "data" / "faces_lfw_112x112" / "train.rec").is_file()


def test_nothing_there(tmp_path):
    """The real script: one message, status 2, no traceback."""
    done = subprocess.run(
        [sys.executable, ROOT / "pre_process.py", "--data-dir", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for word in ("CASIA-WebFace.zip", "lfw-funneled.tgz", "make demo", "README"):
        assert word in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "missing.zip"}, "missing.zip cannot be opened"),
        ({"source": "empty"}, "holds no images"),
        ({"source": "nobody.zip"}, "no face was found in any of the 2 images in"),
        ({"source": "good.zip", "output": "taken"}, "not a finished output"),
        ({"source": "good.zip", "output": "good.zip/x"}, "good.zip"),
        ({"source": "good.zip", "device": "cuda:77"}, "cannot be used"),
    ],
)
def test_user_errors(settings, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("keep me")
    write_zip(tmp_path / "nobody.zip", {"s/a/1.jpg": image_without_face(), "s/a/2.jpg": b""})
    write_zip(tmp_path / "good.zip", casia_files(1, 1))
    status, _, stderr = run(**({"output": "out"} | settings))
    assert status == 2
    assert re.search(message, stderr)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "keep me"


def test_output_for_two_sets_is_refused(run, tmp_path):
    write_zip(tmp_path / "data" / "CASIA-WebFace.zip", casia_files(1, 1))
    tgz(tmp_path / "data" / "lfw.tgz", lfw(1))
    assert run(output=tmp_path / "out")[0] == 2


def test_two_at_once_on_one_output(run, tmp_path):
    write_zip(tmp_path / "data" / "CASIA-WebFace.zip", casia_files(1, 1))
    part = tmp_path / "data" / "faces_webface_112x112.part"
    part.mkdir()
    with lock_folder(part, "pre_process.py"):
        status, _, stderr = run()
    assert status == 2
    assert f"{part} is in use by pre_process.py, process {os.getpid()} on " in stderr
    assert run()[0] == 0


def test_which_sources_are_used(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("CASIA-Webface.tar", "lfw.tgz", "lfw-deepfunneled.tgz", "lfw-Funneled.tgz"):
        (data / name).touch()
    for name in ("lfw.bin", "lfw_home", "faces_lfw_112x112.part", "LFW-a.zip"):
        (data / name).mkdir()
    (data / "lfw_home" / "lfw_funneled").mkdir()
    sources = [path.name for path in find_sources(data, True)]
    expected = ["lfw-Funneled.tgz", "lfw-deepfunneled.tgz", "lfw.tgz", "LFW-a.zip", "lfw_funneled"]
    assert sources == expected
    jobs = find_jobs(data)
    assert [job.source.name for job in jobs] == ["CASIA-Webface.tar", "lfw-Funneled.tgz"]
    assert [job.crop_missed for job in jobs] == [False, True]
    assert [job.save_examples for job in jobs] == [True, False]
    assert "is ignored" in capsys.readouterr().out
    with pytest.raises(UserError):
        prepare_dataset(jobs[0], PrepareOptions(), lambda: pytest.fail("nothing to detect"))


# ------------------------------------------------------------------------------ real faces


def test_real_faces(real_faces, run, tmp_path):
    """40 images of 4 identities from the real archive: all found, eyes where they belong."""
    with zipfile.ZipFile(real_faces / "CASIA-WebFace.zip") as archive:
        names = sorted(archive.namelist())
        files = {name: archive.read(name) for name in names[: 4 * 20 : 2]}
    source = write_zip(tmp_path / "real.zip", files)
    assert run(source=source, output=tmp_path / "out")[0] == 0
    _, report = read_results(tmp_path / "out")
    assert report["kept"] >= len(files) - 1
    table = read_index(tmp_path / "out")
    points = table.points[table.record >= 0]
    matrix = similarity_transform(points)
    placed = np.einsum("nij,nkj->nki", matrix[:, :, :2], points) + matrix[:, None, :, 2]
    eyes = np.linalg.norm(placed[:, :2] - TEMPLATE[:2], axis=2)
    assert np.median(eyes) < 3
