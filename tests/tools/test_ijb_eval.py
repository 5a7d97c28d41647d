"""ijb_eval.py and its files on a small benchmark of the published layout."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch

from config import parse_args
from evaluation.ijb import align
from evaluation.ijb_files import read_ijb, read_pairs, read_subjects
from models import build_model
from tools import ijb_eval
from utils import TEMPLATE, UserError

PEOPLE, IMAGES = 6, 30
SHIFT = np.array([20, 12])  # of the face in the image


def write_benchmark(folder, name="ijbc", galleries=("G1", "G2")):
    """30 images of 6 people in 12 templates; 10 is a person's first, 100 their second."""
    rng = np.random.default_rng(0)
    (folder / "meta").mkdir(parents=True)
    (folder / "loose_crop").mkdir()
    tid, points = [], []
    for i in range(IMAGES):
        person, second = i % PEOPLE, i % (2 * PEOPLE) >= PEOPLE
        cells = np.random.default_rng(person).integers(40, 216, (8, 8, 3))
        cells = np.clip(cells + rng.normal(0, 8, cells.shape), 0, 255).astype(np.uint8)
        image = cv2.resize(cells, (150, 140), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(folder / "loose_crop" / f"{i + 1}.jpg"), image)
        tid.append(f"{i + 1}.jpg {(100 if second else 10) + person} {i // 3}")
        places = " ".join(f"{v:.3f}" for v in (TEMPLATE + SHIFT).ravel())
        points.append(f"{i + 1}.jpg {places} {0.9 + i / 1000:.6f}")
    pairs = [f"{10 + a} {100 + b} {int(a == b)}" for a in range(PEOPLE) for b in range(PEOPLE)]
    for file, lines in (
        ("face_tid_mid", tid), ("name_5pts_score", points), ("template_pair_label", pairs)
    ):  # fmt: skip
        (folder / "meta" / f"{name}_{file}.txt").write_text("\n".join(lines) + "\n")
    for file, which in (
        (f"gallery_{galleries[0]}", range(3)),
        (f"gallery_{galleries[1]}", range(3, 6)),
        ("probe_mixed", range(6)),
    ):
        offset = 100 if file == "probe_mixed" else 10
        # Every image of a template has a line.
        rows = [f"{offset + p},{p},img/{k}.jpg,{k}" for p in which for k in range(2)]
        header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n"
        (folder / "meta" / f"{name}_1N_{file}.csv").write_text(header + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("ijb") / "IJBC")


@pytest.fixture
def changed(benchmark, tmp_path):
    """A copy to damage, and a way to edit one of its files."""
    folder = tmp_path / "IJBC"
    shutil.copytree(benchmark, folder)

    def edit(file, old, new):
        path = folder / "meta" / file
        path.write_text(path.read_text().replace(old, new, 1))
        return folder

    return edit


# ---------------------------------------------------------------- files


def test_metadata_is_read_in_the_order_of_the_images(benchmark):
    ijb = read_ijb(benchmark)
    assert (ijb.name, ijb.files[:2], len(ijb.files)) == ("ijbc", ["1.jpg", "2.jpg"], IMAGES)
    np.testing.assert_allclose(ijb.points[4], TEMPLATE + SHIFT, atol=1e-3)
    assert ijb.detector_scores[7] == pytest.approx(0.907)
    assert (ijb.template_of[[0, 6]].tolist(), ijb.media_of[7]) == ([10, 100], 2)
    ids = np.unique(ijb.template_of)
    first, second, same = read_pairs(ijb, ids)
    assert ids[first[:7]].tolist() == [10] * 6 + [11]
    assert ids[second[:7]].tolist() == [100, 101, 102, 103, 104, 105, 100]
    assert np.flatnonzero(same).tolist() == [0, 7, 14, 21, 28, 35]
    place, subjects = read_subjects(ijb.meta / "ijbc_1N_probe_mixed.csv", ids)
    assert (ids[place].tolist(), subjects.tolist()) == (list(range(100, 106)), list(range(6)))


@pytest.mark.parametrize("block", [1, 10, 1 << 24])
@pytest.mark.parametrize("newline", ["\n", ""])
def test_pairs_are_read_in_blocks_of_any_size(benchmark, changed, monkeypatch, block, newline):
    expected = read_pairs(read_ijb(benchmark), np.r_[10:16, 100:106])
    monkeypatch.setattr("evaluation.ijb_files.BLOCK", block)
    folder = changed("ijbc_template_pair_label.txt", "15 105 1\n", f"15 105 1{newline}")
    found = read_pairs(read_ijb(folder), np.r_[10:16, 100:106])
    for column, whole in zip(found, expected, strict=True):
        assert (column == whole).all()


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("face_tid_mid.txt", "5.jpg 14 1", "5.jpg 14", "not lines of a name and 2 numbers"),
        ("face_tid_mid.txt", "5.jpg 14 1", "5.jpg x 1", "not lines of a name and 2 numbers"),
        ("face_tid_mid.txt", "5.jpg", "55.jpg", "they part at line 5"),
        ("face_tid_mid.txt", "5.jpg", "../../5.jpg", "'../../5.jpg', which is not in loose_crop/"),
        ("face_tid_mid.txt", "5.jpg", "/etc/5.jpg", "which is not in loose_crop/"),
        ("name_5pts_score.txt", "1.jpg ", "1.jpg nan ", "not lines of a name and 11 numbers"),
        ("template_pair_label.txt", "10 101 0", "10 101", "is not lines 'template template 0/1'"),
        ("template_pair_label.txt", "10 101 0", "10 101 2", "is not lines 'template template 0/1'"),
        ("template_pair_label.txt", "10 101 0", "ten 101 0", "is not lines 'template"),
        ("template_pair_label.txt", "10 101 0", "10 777 0", "Line 2 of .* names template 777"),
        ("1N_probe_mixed.csv", "103,3,", "103;3;", "is not lines 'template,subject"),
        ("1N_probe_mixed.csv", "103,3,", "103,4,", "one subject each"),
        ("1N_probe_mixed.csv", "103,3,", "555,3,", "names 1 templates without an image, 555"),
    ],
)
def test_damaged_metadata_gets_a_sentence(changed, file, old, new, complaint):
    folder = changed(f"ijbc_{file}", old, new)
    with pytest.raises(UserError, match=complaint) as raised:
        ijb = read_ijb(folder)
        ids = np.unique(ijb.template_of)
        read_pairs(ijb, ids)
        read_subjects(ijb.meta / "ijbc_1N_probe_mixed.csv", ids)
    assert f"ijbc_{file}" in str(raised.value)


@pytest.mark.parametrize(
    "file", ["face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt"]
)
def test_missing_and_empty_metadata_get_a_sentence(changed, file):
    folder = changed("ijbc_face_tid_mid.txt", "", "")
    path = folder / "meta" / f"ijbc_{file}"
    for action in (lambda: path.write_text(""), path.unlink):
        action()
        with pytest.raises(UserError, match=file):
            ijb = read_ijb(folder)
            read_pairs(ijb, np.unique(ijb.template_of))


# ---------------------------------------------------------------- the script


def test_faces_are_aligned_by_the_points_given(benchmark):
    ijb = read_ijb(benchmark)
    image = cv2.imread(str(benchmark / "loose_crop" / "4.jpg"))[..., ::-1]
    np.testing.assert_allclose(align(ijb, 3), image[12:124, 20:132], atol=2)


def run(folder, *flags):
    ijb_eval.main(parse_args(["--ijb", str(folder), "--device", "cpu", "--network", "tiny",
                              "--checkpoint", "theirs.pth", *flags], "ijb_eval",
                             ijb_eval.Settings))  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in, with the weights of a small network."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(build_model("tiny", emb_size=8).state_dict(), "theirs.pth")
    return tmp_path


@pytest.mark.parametrize("name", ["ijbc", "ijbb"])
def test_the_script_reports_both_protocols(here, capsys, name):
    folder = write_benchmark(here / "set", name, ("G1", "G2") if name == "ijbc" else ("S1", "S2"))
    run(folder)
    report = json.loads((here / "runs" / "theirs" / f"{name}.json").read_text())
    assert (report["pictures"], report["templates"]) == (IMAGES, 2 * PEOPLE)
    assert (report["pairs"], report["matched_pairs"]) == (36, 6)
    assert list(report["tar_at_far"]) == ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6"]
    assert report["tar_at_far"]["1e-1"]["tar"] >= report["tar_at_far"]["1e-6"]["tar"]
    names = [f"{g}{i}" for g, i in zip("GG" if name == "ijbc" else "SS", "12", strict=True)]
    assert list(report["identification"]) == [*names, "+".join(names)]
    assert report["identification"][names[0]]["mated"] == 3
    assert report["identification"]["+".join(names)]["best_non_mates"]
    assert min(cv2.imread(str(here / "images" / f"{name}_roc.png")).shape[:2]) > 400
    assert "TAR at FAR 1e-4" in capsys.readouterr().out


def test_the_report_is_the_definition_on_the_networks_embeddings(here, benchmark):
    """Templates and scores written out for one setting of the options."""
    run(benchmark, "--no-norm-weight", "--no-flip")
    report = json.loads((here / "runs" / "theirs" / "ijbc.json").read_text())
    ijb = read_ijb(benchmark)
    model = build_model("tiny", emb_size=8).eval()
    model.load_state_dict(torch.load("theirs.pth"))
    faces = np.stack([align(ijb, i) for i in range(IMAGES)]).astype(np.float32)
    with torch.no_grad():
        features = model(torch.from_numpy(faces.transpose(0, 3, 1, 2) / 127.5 - 1)).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features *= ijb.detector_scores[:, None]

    def template(number):
        mine = ijb.template_of == number
        medias = set(ijb.media_of[mine])
        total = sum(features[mine & (ijb.media_of == media)].mean(0) for media in medias)
        return total / np.linalg.norm(total)

    scores = np.array([[template(10 + a) @ template(100 + b) for b in range(6)] for a in range(6)])
    impostor = np.sort(scores[~np.eye(6, dtype=bool)])
    expected = np.mean(np.diag(scores) > impostor[-4])  # 3 of 30 are 1e-1
    assert report["tar_at_far"]["1e-1"]["tar"] == pytest.approx(expected)
    assert report["tar_at_far"]["1e-1"]["threshold"] == pytest.approx(impostor[-4], abs=1e-4)
    ranks = (scores >= np.diag(scores)[None, :]).sum(0)  # of probes (columns) in both galleries
    assert report["identification"]["G1+G2"]["rank1"] == pytest.approx(np.mean(ranks == 1))


def test_features_are_kept_until_model_or_images_change(here, changed, capsys, monkeypatch):
    folder = changed("ijbc_face_tid_mid.txt", "", "")
    calls = []
    embed = ijb_eval.embed_images
    monkeypatch.setattr(ijb_eval, "embed_images", lambda *a: calls.append(1) or embed(*a))
    run(folder)
    first = json.loads((here / "runs" / "theirs" / "ijbc.json").read_text())
    run(folder, "--no-detector-score")
    run(folder)
    assert len(calls) == 1
    again = json.loads((here / "runs" / "theirs" / "ijbc.json").read_text())
    assert again["tar_at_far"] == first["tar_at_far"]
    run(folder, "--no-flip")
    image = folder / "loose_crop" / "3.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    run(folder)
    assert len(calls) == 3
    features = here / "runs" / "theirs" / "embeddings" / "ijbc-theirs.npy"
    data = bytearray(features.read_bytes())
    data[-5] ^= 1
    features.write_bytes(data)
    capsys.readouterr()
    run(folder)
    assert len(calls) == 4
    assert "ijbc-theirs.npy is damaged (its checksum does not match)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "loose_crop" / "9.jpg").unlink(), "There is no .*9.jpg"),
        (lambda folder: (folder / "loose_crop" / "9.jpg").write_bytes(b"no"), "9.jpg: its 2 bytes"),
        (lambda folder: (folder / "meta" / "ijbc_1N_gallery_G2.csv").unlink(), "gallery_G2.csv"),
        (lambda folder: shutil.rmtree(folder / "meta"), "--ijb names the folder"),
        (lambda folder: shutil.rmtree(folder / "loose_crop"), "loose_crop"),
    ],
)
def test_what_is_missing_is_named_in_a_sentence(here, changed, capsys, damage, complaint):
    folder = changed("ijbc_face_tid_mid.txt", "", "")
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        run(folder)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert re.search(complaint, said), said
