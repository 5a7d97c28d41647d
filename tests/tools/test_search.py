"""tools.search: the nearest, nobody, rates, clusters, sheets, and galleries that do not fit."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from evaluation.photo_gallery import open_gallery, save_gallery
from fileio.images import decode_image
from tests.helpers.onnx_files import write_onnx
from tests.helpers.photos import run_tool, write_model, write_people
from tests.helpers.synthetic_faces import face, image_without_face
from tools import embed, search


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """photos/, model.onnx and photos.npz."""
    folder = tmp_path_factory.mktemp("embedded")
    write_people(folder / "photos")
    write_model(folder / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["photos", "--checkpoint", "model.onnx", "--input-std", "0.25", "0.25", "0.25"]
        embed.main(embed.parse_args([*argv, "--device", "cpu"], "embed", embed.Settings))
    return folder


@pytest.fixture
def world(embedded, tmp_path, monkeypatch):
    """A copy of it, with photos to search for; the gallery's own paths are the original's."""
    shutil.copytree(embedded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.jpg").write_bytes(face(9))
    return tmp_path


@pytest.fixture
def run(world, capsys):
    return lambda *argv: run_tool(search, argv, capsys)


def colour_count(path, colour):
    return int((np.abs(decode_image(path.read_bytes()).astype(int) - colour).max(2) < 30).sum())


def test_the_nearest_are_found_with_the_gallery_s_own_model(run, world):
    status, out, _ = run(
        "photos.npz", "photos/p1/2.jpg", "unknown.jpg", "--top", 3, "--threshold", 0.99999,
        "--picture", world / "sheet.png",
    )  # fmt: skip
    assert status == 1
    assert "Gallery: 15 faces" in out
    assert "Threshold: 1.0000 (as given by --threshold)" in out
    known, unknown = re.findall(r"^\S+: .*(?:\n  .*)+", out, re.MULTILINE)
    assert known.startswith("photos/p1/2.jpg: found\n")
    lines = known.splitlines()[2:]
    assert len(lines) == 3
    assert re.match(r"    1\.0000     0\.\d\d +p1/2\.jpg$", lines[0])
    gallery = open_gallery(world / "photos.npz")
    query = gallery.embeddings[gallery.names.tolist().index("p1/2.jpg")]
    order = np.argsort(-(gallery.embeddings @ query))[:3]
    assert [line.split()[-1] for line in lines] == gallery.names[order].tolist()
    assert unknown.startswith("unknown.jpg: nobody in the gallery\n")
    assert colour_count(world / "sheet.png", (0, 114, 178)) > 300  # one frame
    assert run("photos.npz", "photos/p1/2.jpg", "--threshold", 0.5)[0] == 0


def test_without_an_evaluation_the_nearest_are_shown_and_nothing_is_decided(run, world):
    status, out, _ = run("photos.npz", "unknown.jpg", "--top", 100)
    assert status == 0
    assert "Somebody or nobody is not decided without a threshold. This model has no eval" in out
    assert "lfw_eval.py --checkpoint" in out
    assert "--input-std 0.25 0.25 0.25` evaluates it" in out
    assert "unknown.jpg: the nearest" in out
    assert len(re.findall(r"  p\d/\d\.jpg$", out, re.MULTILINE)) == 15


def with_embeddings(world, rows, names):
    gallery = open_gallery(world / "photos.npz")
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    save_gallery(
        world / "made.npz", dataclasses.replace(gallery, embeddings=rows, names=np.array(names))
    )


def test_rates_and_clusters_of_known_embeddings(run, world):
    """Four people of three photos and three seen once, well apart but for one photo."""
    rng = np.random.default_rng(0)
    people = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6]
    rows = np.eye(8)[people] + rng.normal(0, 0.02, (15, 8))
    rows[11] = rows[0] + rng.normal(0, 0.1, 8)  # a photo of person 0 in the folder of person 3
    with_embeddings(world, rows, [f"p{p}/{i}.jpg" for i, p in enumerate(people)])
    status, out, _ = run("made.npz", "--evaluate")
    assert status == 0
    assert "15 faces in 7 folders, each searched among the others; 12 have another" in out
    assert re.search(r"^rank-1 +91\.67 %  95 % \[\d+\.\d\d, 100\.00\]$", out, re.MULTILINE)
    assert re.search(r"^TPIR at FPIR 0\.1 .* threshold 0\.\d{4}$", out, re.MULTILINE)
    status, out, _ = run("made.npz", "--cluster", "--threshold", 0.5, "--picture", world / "c.png")
    assert status == 0
    clusters = {}
    for number, name in re.findall(r"^(\d+)\t(.*)$", out, re.MULTILINE):
        clusters.setdefault(int(number), set()).add(name)
    assert list(clusters) == list(range(1, 8))
    assert clusters[1] == {"p0/0.jpg", "p0/1.jpg", "p0/2.jpg", "p3/11.jpg"}
    assert {"p3/9.jpg", "p3/10.jpg"} in clusters.values()
    assert "15 faces of 7 people, 3 of them seen once; mean cosine above 0.5000" in out
    assert decode_image((world / "c.png").read_bytes()).shape[0] > 1000


def test_photos_that_are_gone_are_left_blank(run, world, embedded):
    gallery = open_gallery(world / "photos.npz")
    save_gallery(
        world / "moved.npz",
        dataclasses.replace(gallery, made=gallery.made | {"source": str(world / "nowhere")}),
    )
    argv = ["unknown.jpg", "--threshold", 0.5, "--picture", world / "s.png"]
    status, out, _ = run("moved.npz", *argv)
    assert status in (0, 1)
    assert re.search(r"The photos of the gallery cannot be drawn\. .*nowhere cannot be opened", out)
    assert (world / "s.png").exists()


def test_bad_input_is_a_sentence_and_nothing_is_written(run, world):
    (world / "text.npz").write_text("mine")
    (world / "none.jpg").write_bytes(image_without_face())
    gallery = open_gallery(world / "photos.npz")
    for name, made in {
        "bad": {"input_std": ["x", 1.0, 1.0]},
        "gone": {"checkpoint": str(world / "gone.onnx")},
        "flip": {"flip": "yes"},
    }.items():
        save_gallery(world / f"{name}.npz", dataclasses.replace(gallery, made=gallery.made | made))
    kernel, matrix = write_onnx(world / "other.onnx", "n")
    write_onnx(world / "other.onnx", "n", weights=(kernel * 2, matrix))
    with_embeddings(world, np.eye(15), [f"{i}.jpg" for i in range(15)])
    drawn = ["--picture", world / "s.png"]
    before = sorted(world.rglob("*"))
    for argv, sentence in (
        (["photos.npz"], "Name photos to search for, or --evaluate, or --cluster: one of"),
        (["photos.npz", "unknown.jpg", "--cluster"], "one of the three"),
        (["nowhere.npz", "unknown.jpg"], r"There is no gallery nowhere\.npz"),
        (["text.npz", "unknown.jpg"], r"text\.npz is not a gallery, or is corrupt"),
        (["unknown.jpg", "photos.npz"], r"unknown\.jpg is not a gallery, or is corrupt"),
        (["photos.npz", "none.jpg"], r"No face was found in none\.jpg"),
        (["photos.npz", "gone.jpg"], r"There is no photo gone\.jpg"),
        (["photos.npz", "unknown.jpg", "--checkpoint", "other.onnx"], "made by another model"),
        (["gone.npz", "unknown.jpg"], r"made by \S+/gone\.onnx, which is not there"),
        (["bad.npz", "unknown.jpg"], r"bad\.npz is corrupt: it does not say which model"),
        (["flip.npz", "unknown.jpg"], r"flip\.npz is corrupt: it does not say which model"),
        (["photos.npz", "--cluster"], "--cluster needs a threshold, say --threshold 0.3"),
        (["made.npz", "--evaluate"], r"in made\.npz all faces are of one folder"),
        (["photos.npz", "unknown.jpg", "--picture", "s.txt"], r"s\.txt should end in one of"),
    ):
        status, _, err = run(*argv, *([] if "--picture" in argv else drawn))
        assert status == 2, argv
        assert re.search(sentence, err), (argv, err)
        assert sorted(world.rglob("*")) == before, argv
