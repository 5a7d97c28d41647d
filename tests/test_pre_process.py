"""pre_process.py: what it finds in data/, every bad input, the report, the images."""

import io
import json
import os
import re
import shutil
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
from fileio.archives import open_source
from fileio.images import decode_image, encode_jpeg
from fileio.index_tsv import read_index
from fileio.locks import lock_folder
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from pre_process import main
from preprocessing.dataset_writer import begin_output
from preprocessing.prepare import PrepareOptions, prepare_dataset
from preprocessing.sources import default_output, find_jobs, find_sources
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
    assert "another --missed, --min-face or --aligned" in stderr
    assert run(aligned=True)[0] == 2
    write_zip(source, casia_files(2, 3))
    status, _, stderr = run()
    assert status == 2
    assert f"prepared from CASIA-WebFace.zip, and {source} differs: 2 images added. " in stderr
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
    # a (with deep, which lies in it), 张三: sorted by code point
    assert [statuses[n][1] for n in ("s/a/00good.jpg", "s/a/deep/13folder.jpg")] == [0, 0]
    assert statuses["s/张三/14照片.jpg"] == ("ok", 1)
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
        ({"source": "missing.zip"}, "There is no missing.zip; --source names"),
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


# ------------------------------------------------------------------------------ what changes


def folder_of(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def prepared(run, tmp_path):
    """A folder of three identities of three images, prepared; returns the folder."""
    files = {f"{p}/{p}{i}.jpg": face(p, i) for p in range(3) for i in range(3)}
    source = folder_of(tmp_path / "photos", files)
    assert run(source=source)[0] == 0
    return source


def move(source):
    (source / "0/00.jpg").rename(source / "1/00.jpg")


def move_and_more(source):
    move(source)
    (source / "2/22.jpg").unlink()
    (source / "2/new.jpg").write_bytes(face(2, 7))
    (source / "2/newer.jpg").write_bytes(face(2, 8))


def exchange(source):
    """Another image of the same size, as two files exchange their names."""
    path = source / "0/00.jpg"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\0" + data[-1:])
    os.utime(path, (2e9, 2e9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (move, "differs: 1 image moved (0/00.jpg to 1/00.jpg). Move "),
        (move_and_more, "differs: 1 image moved, 2 added, 1 gone (0/00.jpg to 1/00.jpg). Move "),
        (lambda source: (source / "0").rename(source / "7"), "3 images moved (0/00.jpg to 7/00."),
        (exchange, "differs: 1 image of the same size was written since (0/00.jpg). Move "),
        (
            lambda source: (source / "0/00.jpg").write_bytes(face(0, 8)),
            "differs: images of the same names have other sizes. Move ",
        ),
    ],
)
def test_a_change_of_the_source_is_said(change, said, prepared, run, tmp_path):
    status, stdout, _ = run(source=prepared)
    assert (status, "is finished: 9 images of 3 identities" in stdout) == (0, True)
    change(prepared)
    status, stdout, stderr = run(source=prepared)
    assert status == 2, stdout
    assert said in stderr
    output = tmp_path / "data" / "faces_photos_112x112"
    assert f"Move {output} away to prepare it anew, or give another --output." in stderr


def test_an_image_exchanged_in_an_archive_is_noticed(run, tmp_path):
    files = casia_files(2, 2)
    source = write_zip(tmp_path / "mine.zip", files)
    assert run(source=source)[0] == 0
    name = next(iter(files))
    write_zip(source, files | {name: files[name][:-2] + b"\0" + files[name][-1:]})
    os.utime(source, (2e9, 2e9))
    status, _, stderr = run(source=source)
    assert status == 2
    assert "differs: images of the same names and sizes have other contents" in stderr


def test_what_is_no_change(prepared, run, tmp_path):
    """A copy, the archive that it becomes, and the same images under a root of its own."""
    files = {p.relative_to(prepared).as_posix(): p.read_bytes() for p in prepared.rglob("*.jpg")}
    copied = shutil.copytree(prepared, tmp_path / "copy" / "photos", copy_function=shutil.copyfile)
    for path in copied.rglob("*.jpg"):
        os.utime(path, (2e9, 2e9))
    rooted = {f"photos/{name}": data for name, data in files.items()}
    for source in (
        copied,
        write_zip(tmp_path / "zip" / "photos.zip", files),
        tgz(tmp_path / "photos.tgz", rooted),
    ):
        status, stdout, stderr = run(source=source)
        assert (status, "is finished: 9 images" in stdout) == (0, True), stderr


def test_a_set_of_an_early_version_is_finished_too(prepared, run, tmp_path):
    path = tmp_path / "data" / "faces_photos_112x112" / "report.json"
    report = json.loads(path.read_text())
    for key in ("fingerprint", "stamps", "begun", "image_bytes", "source_mtime"):
        report.pop(key)
    path.write_text(json.dumps(report))
    assert run(source=prepared)[0] == 0


def test_an_unfinished_set_of_other_images_is_not_resumed(run, tmp_path, capsys):
    """An image exchanged between the kill and the next start."""
    source = folder_of(tmp_path / "s", {"a/1.jpg": face(0), "a/2.jpg": face(1)})
    folder = tmp_path / "out.part"
    folder.mkdir()
    inputs = {"source": "s", "source_bytes": 1}
    with open_source(source) as opened:
        begin_output(folder, inputs, opened)
        (folder / "index.tsv").touch()
        assert begin_output(folder, inputs, opened)["stamps"] == opened.stamps()
    assert capsys.readouterr().out == ""
    os.utime(source / "a/1.jpg", (2e9, 2e9))
    with open_source(source) as opened:
        begin_output(folder, inputs, opened)
    said = "its images: 1 image of the same size was written since (a/1.jpg)"
    assert said in capsys.readouterr().out
    assert not (folder / "index.tsv").exists()


# ------------------------------------------------------------------------------ own photos


def test_outputs_are_named_after_their_source(tmp_path):
    data = tmp_path / "data"
    names = {
        "photos": "photos",
        "My photos (2).tar.gz": "My_photos_2_",
        "casia-webface.zip": "webface",
        "LFW-deepfunneled.tgz": "lfw",
        "a.b": "a.b",
        os.fsdecode("照片".encode("gbk")): "照片",
    }
    for source, name in names.items():
        assert default_output(tmp_path / source, data) == data / f"faces_{name}_112x112"
    assert default_output(tmp_path / "x" / "train.rec", data) == tmp_path / "x"


def test_nested_folders_become_their_identities(run, tmp_path):
    """train/ and val/ of the same people; --identity-level path keeps them apart."""
    numbers = [(part, p, i) for part in ("train", "val") for p in (0, 1) for i in (0, 1)]
    files = {f"{part}/{p}/{i}.jpg": face(p, i) for part, p, i in numbers}
    source = folder_of(tmp_path / "photos", files)
    status, stdout, _ = run(source=source)
    assert status == 0
    assert "photos: 2 identities; that of images in train/0/ is 0. Another choice: " in stdout
    folder = tmp_path / "data" / "faces_photos_112x112"
    table = read_index(folder, RecordReader(folder))
    assert table.label.tolist() == [0] * 4 + [1] * 4
    assert table.identity == ["0"] * 4 + ["1"] * 4
    status, _, stderr = run(source=source, identity_level="path")
    assert status == 2
    assert "differs: 8 images belong to other identities: 4 in place of 2 (--identity-lev" in stderr
    assert run(source=source, identity_level="path", output=tmp_path / "paths")[0] == 0
    assert read_results(tmp_path / "paths")[1]["identities"] == 4


@pytest.mark.parametrize("kind", ["folder", "zip", "tgz"])
def test_aligned_faces_are_packed_as_they_are(kind, run, tmp_path):
    rng = np.random.default_rng(0)
    faces = [cv2.resize(rng.integers(0, 256, (7, 7, 3), np.uint8), (112, 112)) for _ in range(5)]
    files = {f"s/{i // 2}/{i}.jpg": encode_jpeg(pixels, 80) for i, pixels in enumerate(faces)}
    files["s/2/4.jpg"] = png(faces[4])
    bad = files | {"s/2/5.jpg": b"not an image"}
    writers = {"folder": folder_of, "zip": write_zip, "tgz": tgz}
    source = writers[kind](tmp_path / (f"mine.{kind}" if kind != "folder" else "mine"), bad)
    status, stdout, stderr = run(source=source, aligned=True)
    assert (status, stderr.count("WARNING")) == (0, 0)
    folder = tmp_path / "data" / "faces_mine_112x112"
    reader = RecordReader(folder)
    assert [reader.encoded(i) for i in range(5)] == list(files.values())
    assert reader.labels.tolist() == [0, 0, 1, 1, 2]
    statuses, report = read_results(folder)
    assert statuses["s/2/5.jpg"] == ("not_an_image", None)
    assert report["settings"]["aligned"] is True
    assert f"train on it: python train.py --train-set {folder}" in stdout
    assert run(source=source, aligned=True)[0] == 0
    status, _, stderr = run(source=source)
    assert (status, "another --missed, --min-face or --aligned" in stderr) == (2, True)


def test_aligned_faces_of_another_size_are_refused(run, tmp_path):
    source = folder_of(tmp_path / "mine", {"a/1.jpg": face(0)})
    status, _, stderr = run(source=source, aligned=True)
    assert status == 2
    assert "a/1.jpg has 250x250 pixels, not an aligned face's 112x112; without --aligned" in stderr
    assert not (tmp_path / "data" / "faces_mine_112x112").exists()


def test_faces_that_look_aligned_are_warned_about(run, tmp_path):
    crops = {f"a/{i}.jpg": encode_jpeg(decode_image(face(i))[60:172, 70:182]) for i in range(3)}
    warning = "holds images of 112x112, as faces have that are aligned already."
    source = folder_of(tmp_path / "mine", crops)
    status, _, stderr = run(source=source, missed="crop")
    assert status == 0
    assert f"WARNING: {source} {warning} Aligned again they lose" in stderr
    folder_of(source, {"a/9.jpg": face(9)})
    assert warning not in run(source=source, missed="crop", output=tmp_path / "other")[2]


def test_an_encrypted_archive_says_so(run, tmp_path):
    source = write_zip(tmp_path / "mine.zip", casia_files(1, 2))
    entry = b"PK\x01\x02\x14\x03\x14\0"  # in the directory; flags follow
    source.write_bytes(source.read_bytes().replace(entry + b"\0", entry + b"\1"))
    status, _, stderr = run(source=source)
    assert status == 2
    assert "(skipped: encrypted 2): unpack it with its password." in stderr


def test_a_pack_of_any_name_in_data_is_the_training_set(run, tmp_path, capsys):
    """As Kaggle has them; a data set that this script has prepared there is none."""
    photos = folder_of(tmp_path / "photos", {"a/1.jpg": face(0)})
    assert run(source=photos)[0] == 0
    assert run()[0] == 2
    pack = tmp_path / "data" / "casia-webface-zip"
    jpegs = [encode_jpeg(np.full((112, 112, 3), i * 60, np.uint8)) for i in range(4)]
    pack.mkdir()
    write_dataset(pack, jpegs, [0, 0, 1, 1])
    status, stdout, stderr = run()
    assert status == 0, stderr
    assert f"kept 4 of 2 identities in {pack} (ok 4)" in stdout
    assert f"train on it: python train.py --train-set {pack}" in stdout
    assert (pack / "index.tsv").is_file()
    assert run()[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_names_that_are_not_utf_8_whatever_the_terminal_shows(encoding, tmp_path):
    """A folder as unzip leaves a Chinese Windows archive; the real script."""
    source = tmp_path / os.fsdecode("我的照片".encode("gbk"))
    folder_of(source, {os.fsdecode("王芳/照片.jpg".encode("gbk")): face(0)})
    done = subprocess.run(
        [sys.executable, ROOT / "pre_process.py", "--source", source, "--data-dir", "data"],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "faces_我的照片_112x112"
    statuses, report = read_results(folder)
    assert statuses == {"王芳/照片.jpg": ("ok", 0)}
    assert report["source"] == str(source)


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
