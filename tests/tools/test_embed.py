"""tools.embed: what is in the gallery, kills, changed folders, aligned faces, bad input."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import pre_process
from config import parse_args
from evaluation import photo_gallery
from evaluation.embedders import load_embedder
from evaluation.photo_gallery import FACE_ARRAYS, SKIPPED_ARRAYS, open_gallery
from fileio.images import decode_image
from fileio.index_tsv import read_index
from fileio.recordio import RecordReader
from preprocessing import pipeline
from tests.helpers.onnx_files import write_onnx
from tests.helpers.paths import ROOT
from tests.helpers.photos import large_png, run_tool, turned, write_model, write_people
from tests.helpers.synthetic_faces import face, image_without_face, write_zip
from tools import embed


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of photos of all kinds and a model; blocks have as many photos as --detect-batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "BLOCK_IMAGES", 4)
    photos = write_people(tmp_path / "photos")
    (photos / "p0" / "deep" / "er").mkdir(parents=True)
    (photos / "p0" / "deep" / "er" / "turned.jpeg").write_bytes(turned(face(0, 1)))
    (photos / "large.png").write_bytes(large_png(face(1, 2)))
    (photos / "p1" / "none.jpg").write_bytes(image_without_face())
    (photos / "p1" / "cut.jpg").write_bytes(face(1)[:4000])
    (photos / "p1" / "text.jpg").write_text("no image")
    (photos / "p1" / "notes.txt").write_text("not tried")
    write_model(tmp_path / "model.onnx")
    return tmp_path


@pytest.fixture
def run(world, capsys):
    def run(*argv):
        return run_tool(embed, [*argv, "--checkpoint", "model.onnx"], capsys)

    return run


def embed_faces(jpegs):
    model, _ = load_embedder("model.onnx", device=torch.device("cpu"))
    return model(torch.from_numpy(np.stack([decode_image(jpeg) for jpeg in jpegs]))).numpy()


def assert_equal(path, other):
    a, b = open_gallery(path), open_gallery(other)
    for name in (*FACE_ARRAYS, *SKIPPED_ARRAYS):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_a_gallery_holds_what_pre_process_finds(run, world):
    status, out, _ = run("photos")
    assert status == 0
    assert "photos: 20 photos, 20 of them new" in out
    assert "kept 17 faces, 8 numbers each" in out
    assert "skipped 3 (" in out
    assert "not photos: not_a_picture 1" in out
    assert not list(world.glob("photos.npz.part"))
    gallery = open_gallery(world / "photos.npz")
    skipped = dict(zip(gallery.skipped_names, gallery.skipped_statuses, strict=True))
    assert skipped == {
        "p1/cut.jpg": "truncated",
        "p1/none.jpg": "no_face",
        "p1/text.jpg": "not_an_image",
    }
    assert gallery.embeddings.dtype == np.float32
    assert np.linalg.norm(gallery.embeddings, axis=1) == pytest.approx(np.ones(17))
    assert gallery.made["checkpoint"] == str(world / "model.onnx")
    # pre_process.py wants folders of people; all else in the same blocks gives the same bytes.
    (world / "photos" / "large.png").unlink()
    run("photos", "--output", "same.npz")
    gallery = open_gallery(world / "same.npz")
    flags = ["--source", "photos", "--output", "packed", "--images-dir", "im", "--device", "cpu"]
    pre_process.main(parse_args(flags, "pre_process"))
    reader = RecordReader(world / "packed")
    table = read_index(world / "packed", reader)
    rows = {table.source[row]: row for row in range(len(table.source)) if table.record[row] >= 0}
    assert set(gallery.names) == set(rows)
    position = {int(key): i for i, key in enumerate(reader.keys)}
    for i, name in enumerate(gallery.names):
        row = rows[name]
        jpeg = bytes(reader.encoded(position[int(table.record[row])]))
        assert gallery.embeddings[i] == pytest.approx(embed_faces([jpeg])[0], abs=1e-6)
        assert gallery.statuses[i] == table.status[row]
        assert gallery.boxes[i] == pytest.approx(table.box[row], abs=0.01)
        assert gallery.points[i] == pytest.approx(table.points[row], abs=0.01)


def test_an_archive_gives_the_same_gallery(run, world):
    run("photos")
    files = {
        path.relative_to(world / "photos").as_posix(): path.read_bytes()
        for path in (world / "photos").rglob("*")
        if path.is_file()
    }
    write_zip(world / "photos.zip", files)
    assert run("photos.zip", "--output", "zip.npz")[0] == 0
    assert_equal(world / "photos.npz", world / "zip.npz")


@pytest.mark.parametrize("count", [1, 4, 6])  # 20 photos are five blocks; then the gallery
def test_a_killed_run_resumes_to_the_same_bytes(count, run, world):
    run("photos", "--detect-batch", 4)
    expected = (world / "photos.npz").read_bytes()
    (world / "photos.npz").unlink()
    program = ROOT / "tests" / "helpers" / "kill_embed.py"
    flags = ["photos", "--checkpoint", "model.onnx", "--device", "cpu", "--detect-batch", "4"]
    done = subprocess.run(
        [sys.executable, program, str(count), *flags], cwd=world, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    assert not (world / "photos.npz").exists()
    assert len(list((world / "photos.npz.part").glob("*.npz"))) == count - 1
    status, out, _ = run("photos", "--detect-batch", 4)
    assert status == 0
    assert ("Resuming after" in out) == (count > 1)
    assert (world / "photos.npz").read_bytes() == expected
    assert not (world / "photos.npz.part").exists()


def test_only_what_changed_is_embedded_again(run, world, monkeypatch):
    run("photos")
    before = open_gallery(world / "photos.npz")
    embedded = []
    original = embed.embed_crops
    monkeypatch.setattr(
        embed,
        "embed_crops",
        lambda model, jpegs: embedded.append(len(jpegs)) or original(model, jpegs),
    )
    photos = world / "photos"
    assert "20 photos, 0 of them new" in run("photos")[1]
    assert embedded == []
    assert_equal(world / "photos.npz", world / "photos.npz")
    (photos / "p4" / "0.jpg").unlink()  # deleted
    (photos / "p3" / "1.jpg").rename(photos / "p2" / "moved.jpg")
    shutil.copy(photos / "p2" / "0.jpg", photos / "p2" / "copy.jpg")
    (photos / "p2" / "1.jpg").write_bytes(face(9))  # changed
    (photos / "p9").mkdir()
    (photos / "p9" / "new.jpg").write_bytes(face(10))
    (photos / "p1" / "text.jpg").write_bytes(face(8))  # was no image
    status, out, _ = run("photos")
    assert status == 0
    assert "21 photos, 3 of them new" in out
    assert embedded == [3]
    after = open_gallery(world / "photos.npz")
    old, new = (dict(zip(g.names, g.embeddings, strict=True)) for g in (before, after))
    assert set(new) - set(old) == {"p2/moved.jpg", "p2/copy.jpg", "p9/new.jpg", "p1/text.jpg"}
    assert set(old) - set(new) == {"p4/0.jpg", "p3/1.jpg"}
    assert np.array_equal(new["p2/moved.jpg"], old["p3/1.jpg"])
    assert np.array_equal(new["p2/copy.jpg"], old["p2/0.jpg"])
    assert not np.array_equal(new["p2/1.jpg"], old["p2/1.jpg"])
    # As embedded from nothing, up to rounding: batches differ.
    run("photos", "--output", "fresh.npz")
    fresh = open_gallery(world / "fresh.npz")
    assert fresh.names.tolist() == after.names.tolist()
    assert np.abs(np.sum(fresh.embeddings * after.embeddings, 1) - 1).max() < 1e-3


def test_aligned_faces_are_embedded_as_they_are(run, world):
    folder = world / "crops"
    folder.mkdir()
    crops = [np.full((112, 112, 3), value, np.uint8) for value in (60, 120, 200)]
    crops = [pipeline.encode_jpeg(crop) for crop in crops]
    for i, crop in enumerate(crops):
        (folder / f"{i}.jpg").write_bytes(crop)
    (folder / "photo.jpg").write_bytes(face(0))
    (folder / "cut.jpg").write_bytes(crops[0][:300])
    status, out, _ = run("crops", "--aligned")
    assert status == 0
    assert "kept 3 faces, 8 numbers each (aligned 3)" in out
    gallery = open_gallery(world / "crops.npz")
    assert gallery.names.tolist() == ["0.jpg", "1.jpg", "2.jpg"]
    assert np.array_equal(gallery.embeddings, embed_faces(crops))
    assert np.isnan(gallery.boxes).all()
    assert dict(zip(gallery.skipped_names, gallery.skipped_statuses, strict=True)) == {
        "photo.jpg": "not_112x112",
        "cut.jpg": "truncated",
    }
    status, _, err = run("crops")  # these are no photos of faces to be found, and not --aligned
    assert status == 2
    assert "crops.npz was made by" in err


def test_bad_input_is_a_sentence_and_nothing_is_written(run, world):
    (world / "empty" / "sub").mkdir(parents=True)
    (world / "faceless").mkdir()
    (world / "faceless" / "a.jpg").write_bytes(image_without_face())
    (world / "other.npz").write_text("mine")
    before = sorted(world.rglob("*"))
    for argv, sentence in (
        (["empty"], r"empty holds no images\."),
        (["nowhere"], r"nowhere cannot be opened \(No such file"),
        (["model.onnx"], r"model\.onnx is neither a folder nor a \.zip"),
        (["faceless"], r"No face was found in any of the photos in faceless\."),
        (["photos", "--output", "other.npz"], r"other\.npz is not a gallery"),
        (["photos", "--output", "other.txt"], r"other\.txt should end in \.npz"),
        ([], "required: FOLDER"),
    ):
        status, _, err = run(*argv)
        assert status == 2, argv
        assert re.search(sentence, err), err
        assert sorted(world.rglob("*")) == before, argv
    assert (world / "other.npz").read_text() == "mine"


def test_a_gallery_of_another_model_is_not_mixed_with_this_one(run, world):
    run("photos")
    kernel, matrix = write_onnx(world / "model.onnx", "n")
    write_onnx(world / "model.onnx", "n", weights=(kernel * 2, matrix))
    before = (world / "photos.npz").read_bytes()
    status, _, err = run("photos")
    assert status == 2
    assert "photos.npz was made by" in err
    assert (world / "photos.npz").read_bytes() == before


def test_a_failed_write_keeps_the_old_gallery(run, world, monkeypatch):
    run("photos")
    before = (world / "photos.npz").read_bytes()
    (world / "photos" / "new.jpg").write_bytes(face(9))

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(photo_gallery.np, "savez", fail)
    status, _, err = run("photos")
    assert status == 2
    assert "No space left on device" in err
    assert (world / "photos.npz").read_bytes() == before
