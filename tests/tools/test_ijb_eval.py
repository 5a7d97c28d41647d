"""tools.ijb_eval on a small benchmark of the published layout."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch

from config import parse_args
from evaluation import ijb
from evaluation.ijb_files import read_ijb
from models import build_model
from tests.helpers.ijb_benchmark import IDENTITIES, IMAGES, write_benchmark
from tools import ijb_eval


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


def results(here):
    """The folder of the model's results, whose name ends with its checksum."""
    (folder,) = (here / "runs").glob("theirs-*")
    return folder


@pytest.mark.parametrize("name", ["ijbc", "ijbb"])
def test_the_script_reports_both_protocols(here, capsys, name):
    folder = write_benchmark(here / "set", name, ("G1", "G2") if name == "ijbc" else ("S1", "S2"))
    run(folder)
    report = json.loads((results(here) / f"{name}.json").read_text())
    assert (report["pictures"], report["templates"]) == (IMAGES, 2 * IDENTITIES)
    assert (report["pairs"], report["matched_pairs"]) == (36, 6)
    assert list(report["tar_at_far"]) == ["1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6"]
    assert report["tar_at_far"]["1e-1"]["tar"] >= report["tar_at_far"]["1e-6"]["tar"]
    names = [f"{g}{i}" for g, i in zip("GG" if name == "ijbc" else "SS", "12", strict=True)]
    assert list(report["identification"]) == [*names, "+".join(names)]
    assert report["identification"][names[0]]["mated"] == 3
    assert report["identification"]["+".join(names)]["best_non_mates"]
    assert min(cv2.imread(str(here / "images" / f"{name}_roc.png")).shape[:2]) > 400
    assert "TAR at FAR 1e-4" in capsys.readouterr().out


def test_the_report_is_the_definition_on_the_networks_embeddings(here, ijb_folder):
    """Templates and scores written out for one setting of the options."""
    run(ijb_folder, "--no-norm-weight", "--no-flip")
    report = json.loads((results(here) / "ijbc.json").read_text())
    metadata = read_ijb(ijb_folder)
    model = build_model("tiny", emb_size=8).eval()
    model.load_state_dict(torch.load("theirs.pth"))
    faces = np.stack([ijb.align_by_points(metadata, i) for i in range(IMAGES)]).astype(np.float32)
    with torch.no_grad():
        features = model(torch.from_numpy(faces.transpose(0, 3, 1, 2) / 127.5 - 1)).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features *= metadata.detector_scores[:, None]

    def template(number):
        mine = metadata.template_of == number
        medias = set(metadata.media_of[mine])
        total = sum(features[mine & (metadata.media_of == media)].mean(0) for media in medias)
        return total / np.linalg.norm(total)

    scores = np.array([[template(10 + a) @ template(100 + b) for b in range(6)] for a in range(6)])
    impostor = np.sort(scores[~np.eye(6, dtype=bool)])
    expected = np.mean(np.diag(scores) > impostor[-4])  # 3 of 30 are 1e-1
    assert report["tar_at_far"]["1e-1"]["tar"] == pytest.approx(expected)
    assert report["tar_at_far"]["1e-1"]["threshold"] == pytest.approx(impostor[-4], abs=1e-4)
    ranks = (scores >= np.diag(scores)[None, :]).sum(0)  # of probes (columns) in both galleries
    assert report["identification"]["G1+G2"]["rank1"] == pytest.approx(np.mean(ranks == 1))


def test_features_are_kept_until_model_or_images_change(here, edit_ijb, capsys, monkeypatch):
    folder = edit_ijb("ijbc_face_tid_mid.txt", "", "")
    calls = []
    embed = ijb.embed_ijb
    monkeypatch.setattr(ijb, "embed_ijb", lambda *a: calls.append(1) or embed(*a))
    run(folder)
    first = json.loads((results(here) / "ijbc.json").read_text())
    run(folder, "--no-detector-score")
    run(folder)
    assert len(calls) == 1
    again = json.loads((results(here) / "ijbc.json").read_text())
    assert again["tar_at_far"] == first["tar_at_far"]
    run(folder, "--no-flip")
    image = folder / "loose_crop" / "3.jpg"
    image.write_bytes(image.read_bytes() + b"\0")
    run(folder)
    assert len(calls) == 3
    features = results(here) / "embeddings" / "ijbc-theirs.npy"
    data = bytearray(features.read_bytes())
    data[-5] ^= 1
    features.write_bytes(data)
    capsys.readouterr()
    run(folder)
    assert len(calls) == 4
    assert "ijbc-theirs.npy is corrupt (its checksum does not match)" in capsys.readouterr().out


@pytest.mark.parametrize("same_size", [False, True])
def test_an_image_in_a_sub_folder_that_changes_is_noticed(here, edit_ijb, same_size):
    """Stale features would give the accuracy of images that are no longer there."""
    folder = edit_ijb("ijbc_face_tid_mid.txt", "", "")
    (folder / "loose_crop" / "img").mkdir()
    for path in (folder / "loose_crop").glob("*.jpg"):
        path.rename(path.parent / "img" / path.name)
    for name in ("face_tid_mid", "name_5pts_score"):
        path = folder / "meta" / f"ijbc_{name}.txt"
        path.write_text(re.sub(r"(?m)^", "img/", path.read_text().strip()))
    run(folder)
    features = results(here) / "embeddings" / "ijbc-theirs.npy"
    before = np.load(features)
    image = folder / "loose_crop" / "img" / "3.jpg"
    other = (folder / "loose_crop" / "img" / "4.jpg").read_bytes()
    if same_size:
        size = max(len(other), image.stat().st_size)
        image.write_bytes(image.read_bytes().ljust(size, b"\0"))
        run(folder)
        other = other.ljust(size, b"\0")
    image.write_bytes(other)
    run(folder)
    after = np.load(features)
    np.testing.assert_array_equal(after[2], after[3])
    assert not np.array_equal(before[2], after[2])
    np.testing.assert_array_equal(np.delete(before, 2, 0), np.delete(after, 2, 0))


def test_a_missing_image_is_told_before_any_is_embedded(here, edit_ijb, capsys, monkeypatch):
    folder = edit_ijb("ijbc_face_tid_mid.txt", "", "")
    for name in ("29.jpg", "30.jpg"):
        (folder / "loose_crop" / name).unlink()
    monkeypatch.setattr(ijb, "align_by_points", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(SystemExit):
        run(folder)
    assert re.search(r"There is no .*29\.jpg, which .* 2 of 30 images are", capsys.readouterr().err)


def test_embedding_resumes_after_a_kill(here, ijb_folder, capsys, monkeypatch):
    """After any block, with the very bytes of an uninterrupted run; other weights start anew."""
    monkeypatch.setattr(ijb, "ALIGNED_AHEAD", 8)
    run(ijb_folder)
    features = results(here) / "embeddings" / "ijbc-theirs.npy"
    expected = features.read_bytes()
    kept = {path.name for path in features.parent.iterdir()}
    assert kept == {"ijbc-theirs.npy", "ijbc-theirs.key"}
    embed_ijb = ijb.embed_ijb

    def killed_after(blocks):
        def embed(*args):
            for i, block in enumerate(embed_ijb(*args)):
                if i == blocks:
                    raise KeyboardInterrupt
                yield block

        return embed

    for blocks in (1, 2, 3):
        for path in features.parent.iterdir():
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(ijb, "embed_ijb", killed_after(blocks))
            with pytest.raises(SystemExit):
                run(ijb_folder)
        part = features.with_suffix(".part")
        part.write_bytes(part.read_bytes() + b"half a block")
        capsys.readouterr()
        if blocks == 3:
            run(ijb_folder, "--no-flip")  # other features: nothing is resumed
            assert "resuming" not in capsys.readouterr().out
            continue
        run(ijb_folder)
        assert f"resuming after {8 * blocks} of 30 images" in capsys.readouterr().out
        assert features.read_bytes() == expected
        assert {path.name for path in features.parent.iterdir()} == kept


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
def test_what_is_missing_is_named_in_a_sentence(here, edit_ijb, capsys, damage, complaint):
    folder = edit_ijb("ijbc_face_tid_mid.txt", "", "")
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        run(folder)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert re.search(complaint, said), said
