"""tools.compare: verdicts and statuses, the crops of pre_process.py, the evaluation, bad input."""

import contextlib
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import lfw_eval
import pre_process
from config import parse_args
from fileio.images import decode_image
from fileio.recordio import RecordReader
from preprocessing.detector import FaceDetector
from tests.helpers.onnx_files import write_onnx
from tests.helpers.paths import ROOT
from tests.helpers.photos import (
    large_png,
    run_tool,
    turned,
    two_faces,
    write_model,
    write_people,
    write_test_set,
)
from tests.helpers.synthetic_faces import face, image_without_face
from tools import compare
from tools.photo_faces import read_photo

INPUT = ["--input-std", "0.25", "0.25", "0.25"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, photos of people, and a test set."""
    folder = tmp_path_factory.mktemp("world")
    write_people(folder / "people")
    write_model(folder / "model.onnx")
    write_test_set(folder / "people", folder / "data" / "lfw.bin")
    (folder / "none.jpg").write_bytes(image_without_face())
    (folder / "two.png").write_bytes(two_faces(face(0), face(3)))
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.jpg").write_bytes(face(0)[:4000])
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """Run the tool in the world's folder with its model, and runs in tmp_path or its own."""
    monkeypatch.chdir(world)

    def run(*argv, runs=tmp_path / "runs", flags=INPUT):
        return run_tool(
            compare, [*argv, "--checkpoint", "model.onnx", "--runs-dir", runs, *flags], capsys
        )

    return run


@pytest.fixture(scope="module")
def metrics(world, tmp_path_factory):
    """lfw.json of the model, made by the very command that the tool names where there is none."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(world)
        argv = ["people/p0/0.jpg", "people/p0/1.jpg", "--checkpoint", "model.onnx", *INPUT]
        argv += ["--runs-dir", "my runs", "--device", "cpu", "--threshold", "0.5"]
        compare.main(parse_args(argv, "compare", compare.Settings))
        command = shlex.split(re.search(r"`(.*)` evaluates it", out.getvalue())[1])
        assert command[:2] == ["python", "lfw_eval.py"]
        images = ["--images-dir", str(tmp_path_factory.mktemp("images"))]
        lfw_eval.main(parse_args([*command[2:], *images], "lfw_eval"))
    return json.loads(next(world.glob("my runs/model-*/lfw.json")).read_text())


def test_without_an_evaluation_there_is_no_verdict(run):
    status, out, err = run("people/p0/0.jpg", "people/p0/1.jpg")
    assert status == 2
    assert re.search(r"^cosine -?0\.\d{4}, \d+\.\d\d degrees$", out, re.MULTILINE)
    assert "Verdict: none" in out
    assert "name a threshold, say --threshold 0.3" in err
    status, _, err = run("people/p0/0.jpg", "people/p0/1.jpg", "--far", "1e-2")
    assert status == 2
    assert "--far needs the model's evaluation. This model has no evaluation" in err


def test_verdict_status_and_probability(run, metrics):
    status, out, _ = run("people/p1/0.jpg", "people/p1/0.jpg", runs="my runs")
    assert status == 0
    assert "cosine 1.0000, 0.0" in out
    assert f"Verdict: same person: 1.0000 is at least {metrics['threshold']:.4f} (" in out
    assert f"({100 * metrics['accuracy']:.2f} % +- " in out
    pair = ["people/p1/0.jpg", "people/p2/1.jpg"]
    status, out, _ = run(*pair, "--threshold", 0.999, runs="my runs")
    assert status == 1
    assert re.search(r"different people: \S+ is below 0.9990 \(as given by --threshold\)", out)
    cosine = float(re.search(r"^cosine (\S+),", out, re.MULTILINE)[1])
    slope, intercept = metrics["calibration"]["slope"], metrics["calibration"]["intercept"]
    expected = 100 / (1 + np.exp(-(slope * cosine + intercept)))
    printed = re.search(r"probability of one person ([<>]?) ?(\S+) % \(where 50 % of pairs", out)
    assert float(printed[2]) == pytest.approx(expected, abs=0.3)
    # Ten impostor pairs support no FAR: said as lfw_eval.py says it.
    assert all(sentence in out for sentence in metrics["operating_points_refused"])
    for far in ("1e-3", "x"):
        status, _, err = run(*pair, "--far", far, runs="my runs")
        assert status == 2
        assert f"has no threshold at FAR {far}" in err
        assert "FAR 1e-3 is not shown" in err


def test_the_evaluation_of_another_model_or_protocol_is_noticed(run, metrics, world):
    pair = ["people/p1/0.jpg", "people/p2/1.jpg", "--threshold", 0.5]
    assert "is of another model" in run(*pair, runs="my runs", flags=[])[1]
    assert (
        "was measured on other embeddings (image and mirror image summed, cosine"
        in (run(*pair, "--no-flip", runs="my runs")[1])
    )
    original = (world / "model.onnx").read_bytes()
    kernel, matrix = write_onnx(world / "model.onnx", "n")
    try:
        write_onnx(world / "model.onnx", "n", weights=(kernel * 2, matrix))
        # Results are in a folder of the file's checksum.
        assert "This model has no evaluation" in run(*pair, runs="my runs")[1]
    finally:
        (world / "model.onnx").write_bytes(original)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"protocol": 3}', ""])
def test_a_corrupt_evaluation_is_said(damage, run, world, tmp_path):
    checksum = hashlib.sha256((world / "model.onnx").read_bytes()).hexdigest()
    path = tmp_path / "runs" / f"model-{checksum[:8]}" / "lfw.json"
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    status, out, _ = run("people/p1/0.jpg", "people/p1/0.jpg", "--threshold", 0.5)
    assert status == 0
    assert "lfw.json is corrupt" in out


@pytest.mark.parametrize("change", [turned, large_png, lambda jpeg: two_faces(jpeg, face(3))])
def test_the_crop_is_that_of_pre_process(change, tmp_path):
    photo = tmp_path / "photos" / "someone" / "1.img"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(change(face(0)))
    flags = f"--source {tmp_path}/photos --output {tmp_path}/out --images-dir {tmp_path}/im"
    pre_process.main(parse_args([*flags.split(), "--device", "cpu"], "pre_process"))
    record = bytes(RecordReader(tmp_path / "out").encoded(0))
    assert read_photo(str(photo), FaceDetector("cpu")).face.jpeg == record


def test_of_several_faces_the_large_central_one_is_taken_and_drawn(run, tmp_path):
    status, out, _ = run(
        "two.png", "people/p0/0.jpg", "--threshold", 0.9, "--picture", tmp_path / "a" / "v.png"
    )
    assert "two.png shows 2 faces; the large central one is taken." in out
    assert status == 0  # the central face is that of people/p0/0.jpg
    image = decode_image((tmp_path / "a" / "v.png").read_bytes()).astype(int)
    blue, vermillion = ((abs(image - c).max(2) < 30).sum() for c in ((0, 114, 178), (213, 94, 0)))
    assert blue > 1000  # the boxes and points of both faces
    assert vermillion > 100  # the dotted box of the other face
    assert not list((tmp_path / "a").glob(".*"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["none.jpg", "people/p0/0.jpg"], r"No face was found in none\.jpg \(250x250 pixels\)"),
        (["people/p0/0.jpg", "text.jpg"], r"text\.jpg: its 8 bytes cannot be decoded"),
        (["people/p0/0.jpg", "cut.jpg"], r"cut\.jpg: its 4000 bytes .*: its end is missing"),
        (["people/p0/0.jpg", "nowhere.jpg"], r"There is no photo nowhere\.jpg"),
        (["people/p0/0.jpg", "people"], r"There is no photo people\."),
        (
            ["people/p0/0.jpg", "two.png", "--picture", "v.txt"],
            r"v\.txt should end in one of \.png",
        ),
        (["people/p0/0.jpg"], "required: SECOND"),
        (["a", "b", "c"], "unrecognized arguments: c"),
    ],
)
def test_bad_input_is_a_sentence(argv, sentence, run, tmp_path):
    status, _, err = run(*argv, *([] if "--picture" in argv else ["--picture", tmp_path / "v.png"]))
    assert status == 2
    assert re.search(sentence, err)
    assert not list(tmp_path.iterdir())


def test_the_command_exits_with_its_verdict(world):
    pair = ["people/p0/0.jpg", "people/p1/0.jpg", "--threshold", "0.9999"]
    argv = [*pair, "--checkpoint", "model.onnx", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.compare", *argv],
        cwd=world,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Verdict: different people" in done.stdout) == (1, True), done.stderr
