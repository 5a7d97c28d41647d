"""lfw_eval.py on small made-up sets: what it reads, what it reports, what it writes."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import lfw_eval
from config import parse_args
from evaluation import figures, galleries, verification
from evaluation.evaluate import evaluate_lfw
from evaluation.groups import group_metrics, group_table
from evaluation.metrics import (
    Calibration,
    ComparedModel,
    Comparison,
    Intervals,
    LfwJson,
    RobustnessMetrics,
)
from evaluation.pair_sets import find_set, load_set
from evaluation.shared_set import open_lfw
from fileio.bin_sets import write_bin
from fileio.checkpoint_file import save_checkpoint
from fileio.images import encode_jpeg
from fileio.index_tsv import INDEX_HEADER, IndexRow, format_index_row
from fileio.record_writer import write_dataset
from models import build_model
from tests.helpers.paths import ROOT
from utils import UserError

IDENTITIES = 12  # two images each; 4 folds of 3 genuine and 3 impostor pairs


def face_of(identity, shot):
    """A 112x112 face in the identity's colours, a little different in each shot."""
    rng = np.random.default_rng([identity, 9])
    cells = rng.integers(0, 256, (7, 7, 3)).astype(np.float32)
    noise = np.random.default_rng([identity, shot]).normal(0, 12, (7, 7, 3))
    return np.kron(np.clip(cells + noise, 0, 255).astype(np.uint8), np.ones((16, 16, 1), np.uint8))


def name_of(identity):
    return f"李_{identity}" if identity % 2 else f"Ann_{identity}"


def pairs_text(folds=4, each=3):
    lines = [f"{folds}\t{each}"]
    for fold in range(folds):
        identities = range(fold * each, fold * each + each)
        lines += [f"{name_of(p)}\t1\t2" for p in identities]
        lines += [f"{name_of(p)}\t1\t{name_of((p + 5) % IDENTITIES)}\t2" for p in identities]
    return "\n".join(lines) + "\n"


@pytest.fixture
def data(tmp_path):
    """data/ with a prepared LFW, its pairs, and the archive of 250x250 images it came from."""
    folder = tmp_path / "data" / "faces_lfw_112x112"
    faces = [(identity, shot) for identity in range(IDENTITIES) for shot in (1, 2)]
    jpegs = [encode_jpeg(face_of(*face)) for face in faces]
    write_dataset(folder, jpegs, [identity for identity, _ in faces])
    archive = tmp_path / "data" / "lfw-funneled.tgz"
    rows = [INDEX_HEADER]
    with tarfile.open(archive, "w:gz") as tar:
        for record, (identity, shot) in enumerate(faces, 1):
            name = f"lfw_funneled/{name_of(identity)}/{name_of(identity)}_{shot:04d}.jpg"
            status = "central_crop" if record in (2, 5) else "ok"
            points = [[80, 90], [120, 90], [100, 110], [85, 130], [115, 130]]
            detection = () if status == "central_crop" else (0.99, (60, 60, 140, 150), points)
            row = IndexRow(record, identity, name_of(identity), name, status, *detection)
            rows.append(format_index_row(row))
            image = encode_jpeg(np.full((250, 250, 3), record, np.uint8))
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    rows.append(format_index_row(IndexRow(None, None, "Odd", "lfw/Odd/Odd_0001.jpg", "unreadable")))
    (folder / "index.tsv").write_text("".join(rows), "utf-8")
    (folder / "report.json").write_text(json.dumps({"source": str(archive)}), "utf-8")
    (tmp_path / "data" / "pairs.txt").write_text(pairs_text(), "utf-8")
    return tmp_path / "data"


def mean_colours(faces):
    """An embedding that knows the 7x7 cells of face_of."""
    cells = faces.float().reshape(len(faces), 7, 16, 7, 16, 3).mean((2, 4))
    return cells.flatten(1) - 127


# ---------------------------------------------------------------- reading


def test_load_a_prepared_folder(data):
    lfw = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    assert len(lfw.images) == len(lfw.pairs.names) == 2 * IDENTITIES
    assert (lfw.name, lfw.missed, lfw.faces_status.count("central_crop")) == ("lfw", 2, 2)
    assert (lfw.box.shape, lfw.points.shape) == ((24, 4), (24, 5, 2))
    assert lfw.points[3].tolist() == [[80, 90], [120, 90], [100, 110], [85, 130], [115, 130]]
    for name, image in zip(lfw.pairs.names, lfw.images, strict=True):
        identity, shot = int(name.split("/")[0].split("_")[1]), int(name[-4:])
        assert np.abs(image.numpy().astype(int) - face_of(identity, shot)).mean() < 6  # JPEG
    identities = np.array([name.split("/")[0] for name in lfw.pairs.names])
    assert ((identities[lfw.pairs.first] == identities[lfw.pairs.second]) == lfw.pairs.same).all()


def test_faces_that_no_pair_names_are_not_counted(data):
    text = "2\t1\nAnn_0\t1\t2\nAnn_0\t1\tAnn_2\t2\nAnn_4\t1\t2\nAnn_4\t1\t李_3\t2\n"
    (data / "pairs.txt").write_text(text, "utf-8")
    lfw = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    identities = ["Ann_0", "Ann_0", "Ann_2", "Ann_4", "Ann_4", "李_3"]
    assert [name.split("/")[0] for name in lfw.pairs.names] == identities
    assert lfw.missed == 1  # record 2 is Ann_0's second image, record 5 the first of Ann_2


def test_a_pair_that_names_no_image_gets_a_sentence(data):
    text = pairs_text().replace("Ann_0\t1\t2", "Ann_0\t1\t7").replace("Ann_4\t1", "Bea\t1")
    (data / "pairs.txt").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"names 3 of .* \(Ann_0/Ann_0_0007, Bea/Bea_0001, Bea/"):
        load_set(data / "faces_lfw_112x112", data / "pairs.txt")


def test_a_corrupt_summary_gets_a_sentence(data):
    (data / "faces_lfw_112x112" / "report.json").write_text("[1, 2")
    with pytest.raises(UserError, match=r"report\.json is corrupt"):
        load_set(data / "faces_lfw_112x112", data / "pairs.txt")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "There is no"),
        (b"\xff\xfe\x00", "is no list of pairs"),
        (b"4\t3\nAnn_0\t1\t2\n", "line 1 promises 4 x 2 x 3 pairs"),
        (b"Ann_0\t1\t2\nAnn_2\t1\t2\n", "the pairs are all of one kind"),
    ],
)
def test_bad_pairs_files_get_a_sentence(data, content, complaint):
    path = data / "pairs.txt"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s)pairs\.txt.*{complaint}|{complaint}.*pairs\.txt"):
        load_set(data / "faces_lfw_112x112", path)


def test_load_bin_embeds_each_face_once(tmp_path):
    jpegs = [encode_jpeg(face_of(identity, 1)) for identity in range(3)]
    order = [0, 1, 0, 0, 1, 1] + [2, 0] * 8
    same = [False, True, True] + [False] * 8
    write_bin(tmp_path / "lfw.bin", [jpegs[i] for i in order], same)
    lfw = load_set(tmp_path / "lfw.bin", tmp_path / "unused")
    assert (lfw.name, lfw.points, lfw.faces_status) == ("lfw", None, None)
    assert len(lfw.images) == 3
    assert lfw.pairs.first.tolist() == [0, 0, 1] + [2] * 8
    assert lfw.pairs.second.tolist() == [1, 0, 1] + [0] * 8
    assert lfw.pairs.same.tolist() == same
    assert lfw.pairs.folds.tolist() == [0, *range(10)]


def test_load_bin_of_one_kind_or_another_size_gets_a_sentence(tmp_path):
    path = tmp_path / "lfw.bin"
    write_bin(path, [encode_jpeg(face_of(i, 1)) for i in range(40)], [True] * 20)
    with pytest.raises(UserError, match="one kind"):
        load_set(path, "")
    write_bin(path, [encode_jpeg(np.zeros((96, 80, 3), np.uint8))] * 40, [True, False] * 10)
    with pytest.raises(UserError, match="80x96"):
        load_set(path, "")
    write_bin(path, [encode_jpeg(face_of(0, 1)), b"no JPEG"] * 20, [True, False] * 10)
    with pytest.raises(UserError, match=r"Image 1 of .*lfw\.bin"):
        load_set(path, "")


def test_find_lfw_prefers_images_to_bins(data, tmp_path):
    bins = [data / "lfw.bin", data / "faces_webface_112x112" / "lfw.bin"]
    bins[1].parent.mkdir()
    for path in bins:
        path.write_bytes(b"")
    assert find_set("lfw", data) == data / "faces_lfw_112x112"
    (data / "faces_lfw_112x112" / "train.rec").unlink()
    assert find_set("lfw", data) == bins[1]
    assert find_set("lfw", data, tmp_path / "other") == bins[0]
    bins[0].unlink()
    assert find_set("lfw", data, tmp_path / "other") is None


# ---------------------------------------------------------------- numbers


def test_evaluate_lfw_is_the_protocol_on_the_cosines(data):
    lfw = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    report = evaluate_lfw(mean_colours, lfw).metrics
    assert report["accuracy"] == report["best_accuracy"] == report["auc"] == 1
    assert (report["eer"], report["standard_error"], report["missed_faces"]) == (0, 0, 2)
    assert report["tar_at_far"] == {"1e-3": 1, "1e-2": 1}
    assert (report["pairs"], report["faces"]) == (24, 24)
    unit = mean_colours(lfw.images).double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[lfw.pairs.first, lfw.pairs.second]
    gap = cosines[~lfw.pairs.same].max(), cosines[lfw.pairs.same].min()
    assert report["best_threshold"] == pytest.approx(sum(gap) / 2, abs=1e-6)


def test_worst_errors_come_first():
    scores = np.array([0.9, 0.2, 0.8, 0.95, 0.1, 0.5, 0.7])
    same = np.array([False, True, False, True, True, False, True])
    positives, negatives = verification.worst_errors(scores, same, 0.6)
    assert positives.tolist() == [0, 2]
    assert negatives.tolist() == [4, 1]
    assert [len(errors) for errors in verification.worst_errors(scores, same, 0.9)] == [1, 3]


# ---------------------------------------------------------------- galleries


def grey_level(path):
    image = cv2.imread(str(path))
    return image.shape, round(float(image.mean()))


def test_galleries_hold_the_originals_and_lose_stale_ones(data, tmp_path):
    lfw = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    images = tmp_path / "images"
    (images / "demo").mkdir(parents=True)
    stale = ["0_fp_0.jpg", "7_fp_1.jpg", "12_fn_0.jpg"]
    kept = ["0_raw.jpg", "0_img.jpg", "x_fp_0.jpg", "roc.png", "demo/0_fp_0.jpg"]
    for name in stale + kept:
        (images / name).write_bytes(b"old")
    # Pair 4 is Ann_0's first image (record 1) and 李_5's second (12); pair 0 Ann_0's two.
    errors = {"fp": np.array([3]), "fn": np.array([0])}
    notice = galleries.write_galleries(images, lfw.pairs, lfw.images, errors, lfw.source)
    assert notice == ""
    assert grey_level(images / "0_fp_0.jpg") == ((250, 250, 3), 1)
    assert grey_level(images / "0_fp_1.jpg") == ((250, 250, 3), 12)
    assert [grey_level(images / f"0_fn_{i}.jpg")[1] for i in (0, 1)] == [1, 2]
    assert all((images / name).read_bytes() == b"old" for name in kept)
    assert not (images / "7_fp_1.jpg").exists()
    assert not (images / "12_fn_0.jpg").exists()


def test_galleries_fall_back_on_aligned_faces(data, tmp_path):
    lfw = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    errors = {"fp": np.array([3]), "fn": np.array([], int)}
    for source in ("", str(tmp_path / "gone.tgz")):
        notice = galleries.write_galleries(tmp_path, lfw.pairs, lfw.images, errors, source)
        assert "aligned faces" in notice
        shape, level = grey_level(tmp_path / "0_fp_1.jpg")
        assert shape == (112, 112, 3)
        assert level == pytest.approx(face_of(5, 2).mean(), abs=2)


def test_galleries_turn_other_formats_into_jpeg(data, tmp_path):
    lfw = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    identity = tmp_path / "originals" / "lfw" / name_of(0)
    identity.mkdir(parents=True)
    image = np.zeros((250, 250, 3), np.uint8)
    image[..., 2] = 200  # red, in OpenCV's order
    (identity / "Ann_0_0001.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    (identity / "Ann_0_0002.bmp").write_bytes(b"no image")
    errors = {"fp": np.array([], int), "fn": np.array([0])}
    notice = galleries.write_galleries(
        tmp_path, lfw.pairs, lfw.images, errors, str(tmp_path / "originals")
    )
    assert "1 of 2" in notice
    written = tmp_path / "0_fn_0.jpg"
    assert written.read_bytes()[:2] == b"\xff\xd8"
    np.testing.assert_allclose(cv2.imread(str(written)), image, atol=4)
    assert grey_level(tmp_path / "0_fn_1.jpg")[0] == (112, 112, 3)


@pytest.mark.parametrize("quality", [0.0, 0.15, 5.0])
def test_figures_are_drawn_for_poor_and_perfect_models(tmp_path, quality):
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    scores = np.tanh(rng.normal(0, 0.2, 400) + quality * same)
    report = verification.verify(scores, same, verification.contiguous_folds(400))
    figures.plot_angles(tmp_path / "new" / "theta_dist.png", scores, same, report)
    roc = figures.roc_figure(verification.roc(scores, same), report)
    figures.save_figure(roc, tmp_path / "new" / "roc.png")
    for name in ("theta_dist.png", "roc.png"):
        image = cv2.imread(str(tmp_path / "new" / name))
        assert min(image.shape[:2]) > 400
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50  # not a blank page


# ---------------------------------------------------------------- the script


def save_tiny(path):
    torch.manual_seed(0)
    path.parent.mkdir(parents=True)
    config = {"network": "tiny", "use_se": False, "seed": 4}
    model = build_model("tiny", emb_size=8)
    save_checkpoint(path, {"config": config, "model": model.state_dict(), "epoch": 2})


def test_script_without_flags_takes_the_newest_run(data, tmp_path):
    for run_name in ("20250101-000000-r50-s0", "20250601-000000-tiny-s4"):
        save_tiny(tmp_path / "runs" / run_name / "best.pt")
    # A genuine pair labelled impostor: no threshold predicts all of them correctly.
    wrong_label = pairs_text().replace("Ann_0\t1\t李_5\t2", "Ann_0\t1\tAnn_0\t2")
    (data / "pairs.txt").write_text(wrong_label, "utf-8")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "9_fn_1.jpg").write_bytes(b"stale")
    done = subprocess.run(
        [sys.executable, str(ROOT / "lfw_eval.py"), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    newest = Path("runs", "20250601-000000-tiny-s4")
    assert str(newest / "best.pt") in done.stdout
    assert "newest run" in done.stdout
    assert "epoch 2" in done.stdout
    report = json.loads((tmp_path / newest / "lfw.json").read_text("utf-8"))
    assert {"accuracy", "standard_error", "threshold", "best_accuracy", "best_threshold",
            "tar_at_far", "auc", "eer", "pairs", "missed_faces"} <= report.keys()  # fmt: skip
    assert (report["pairs"], report["missed_faces"], report["seed"]) == (24, 2, 4)
    for key in ("accuracy", "best_accuracy", "auc", "eer"):
        assert 0 <= report[key] <= 1
    assert f"{100 * report['accuracy']:.3f} %" in done.stdout
    assert f"{100 * report['best_accuracy']:.3f} %" in done.stdout
    wrong = report["false_positives"] + report["false_negatives"]
    assert wrong == round((1 - report["best_accuracy"]) * 24)
    assert wrong > 0
    expected = {f"{i}_{kind}_{side}.jpg" for kind, count in (("fp", report["false_positives"]),
                ("fn", report["false_negatives"])) for i in range(min(10, count))
                for side in (0, 1)}  # fmt: skip
    written = {path.name for path in (tmp_path / "images").iterdir()}
    assert written == expected | {"theta_dist.png", "roc.png"}
    assert not (tmp_path / "runs" / "20250101-000000-r50-s0" / "lfw.json").exists()


def main(*flags):
    lfw_eval.main(parse_args(["--device", "cpu", *flags], "lfw_eval"))


def save_theirs(path="theirs.pth", seed=0, runs_dir="runs"):
    """A third-party state dict, and the folder of its results."""
    torch.manual_seed(seed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(build_model("tiny", emb_size=8).state_dict(), path)
    checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Path(runs_dir, f"{Path(path).stem}-{checksum[:8]}")


def test_reports_of_others_models_go_into_folders_of_their_own(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["r50/backbone.pth", "r100/backbone.pth"]
    folders = [save_theirs(path, seed, "out") for seed, path in enumerate(paths)]
    for path in paths:
        main("--checkpoint", path, "--network", "tiny", "--runs-dir", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(f.name for f in folders)
    for folder, path in zip(folders, paths, strict=True):
        report = json.loads((folder / "lfw.json").read_text("utf-8"))
        assert (report["checkpoint"], report["pairs"]) == (path, 24)
        assert (folder / "report.html").is_file()


def test_a_folder_lfw_that_nobody_named_is_not_the_test_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_theirs()
    for identity in range(IDENTITIES):
        for shot in (1, 2):
            path = Path("lfw", name_of(identity), f"{name_of(identity)}_{shot:04d}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_jpeg(face_of(identity, shot)))
    Path("data").mkdir()
    Path("data/pairs.txt").write_text(pairs_text(), "utf-8")
    assert find_set("lfw", "data") is None
    assert open_lfw("", "data", batch=64, device=torch.device("cpu")) is None
    flags = ("--checkpoint", "theirs.pth", "--network", "tiny")
    for more in ((), ("--sets", "lfw")):
        with pytest.raises(SystemExit):
            main(*flags, *more)
        assert "There is no prepared LFW at" in capsys.readouterr().err
    for more in (("--lfw", "lfw"), ("--sets", "./lfw")):
        main(*flags, *more)
        assert "24 pairs of 24 faces" in capsys.readouterr().out
    Path("lfw").rename("mine")
    assert find_set("mine", "data") == Path("mine")  # whoever writes so means it


# ---------------------------------------------------------------- groups


def test_group_metrics_are_those_that_rfws_authors_print():
    """ArcFace as Wang and Deng (CVPR 2020) trained it: mean 95.37, STD 1.53, SER 2.33."""
    published = {"Caucasian": 0.9737, "Indian": 0.9568, "Asian": 0.9455, "African": 0.9387}
    metrics = group_metrics(published)
    printed = (100 * metrics["mean"], 100 * metrics["deviation"], metrics["skewed_error_ratio"])
    assert [round(value, 2) for value in printed] == [95.37, 1.53, 2.33]
    table = group_table(metrics).splitlines()
    assert [line.split()[0] for line in table] == [
        "group", *published, "mean", "standard", "skewed",
    ]  # fmt: skip


def write_group(path, wrong):
    """40 pairs, genuine ones of one image twice; `wrong` of them are labelled impostor."""
    jpegs = [encode_jpeg(face_of(i, 1)) for i in range(40)]
    pairs = [(i, i if i % 2 == 0 else (i + 1) % 40) for i in range(40)]
    same = [i % 2 == 0 for i in range(40)]
    for i in range(wrong):
        pairs[4 * i + 1] = (4 * i + 1, 4 * i + 1)
    write_bin(path, [jpegs[end] for pair in pairs for end in pair], same)


def test_groups_show_a_planted_gap(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_theirs()
    Path("data").mkdir()
    for name, wrong in (("African", 8), ("Asian", 4), ("Caucasian", 2), ("Indian", 4)):
        write_group(Path("data", f"{name}.bin"), wrong)
    flags = ("--checkpoint", "theirs.pth", "--network", "tiny")
    main(*flags, "--groups", "African,Asian,Caucasian,Indian")
    printed = capsys.readouterr().out
    report = json.loads((folder / "eval.json").read_text("utf-8"))
    groups = report["groups"]
    expected = {"African": 0.8, "Asian": 0.9, "Caucasian": 0.95, "Indian": 0.9}
    assert groups["accuracies"] == pytest.approx(expected)
    assert groups["mean"] == pytest.approx(0.8875)
    # Deviations -0.0875, 0.0125, 0.0625, 0.0125; squares add up to 0.011875, over 3.
    assert groups["deviation"] == pytest.approx((0.011875 / 3) ** 0.5)
    assert groups["skewed_error_ratio"] == pytest.approx(4)
    assert "skewed error ratio         4.000" in printed
    assert list(report["sets"]) == list(expected)
    page = (folder / "report.html").read_text("utf-8")
    assert "skewed error ratio" in page and "4.000" in page
    write_group(Path("data", "Indian.bin"), 0)
    main(*flags, "--groups", "African,Indian")
    assert "not defined: a group has no error" in capsys.readouterr().out
    main(*flags, "--sets", "African,Indian")
    assert "groups" not in json.loads((folder / "eval.json").read_text("utf-8"))


def test_several_sets_in_one_run_make_one_table_and_one_json(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_theirs()
    order = [identity for identity in range(20) for _ in (0, 1)]
    jpegs = [encode_jpeg(face_of(identity, i % 2 + 1)) for i, identity in enumerate(order)]
    genuine, impostor = jpegs, jpegs[:1] + jpegs[2:] + jpegs[:1]
    faces = [x for i in range(0, 40, 2) for x in genuine[i : i + 2] + impostor[i : i + 2]]
    write_bin("data/cfp_fp.bin", faces, [True, False] * 20)
    flags = ("--checkpoint", "theirs.pth", "--network", "tiny", "--sets", "lfw,cfp_fp")
    main(*flags)
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith(("lfw ", "cfp"))
            ] == [["lfw", "24"], ["cfp_fp", "40"]]  # fmt: skip
    report = json.loads((folder / "eval.json").read_text("utf-8"))
    assert list(report["sets"]) == ["lfw", "cfp_fp"]
    assert [r["from_cache"] for r in report["sets"].values()] == [False, False]
    main(*flags)
    again = json.loads((folder / "eval.json").read_text("utf-8"))
    assert [r["from_cache"] for r in again["sets"].values()] == [True, True]
    for name, metrics in report["sets"].items():
        for key in ("accuracy", "fold_thresholds", "tar_at_far", "auc"):
            assert again["sets"][name][key] == metrics[key]


def test_the_protocol_is_named_and_those_of_others_are_fixed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_theirs()
    flags = ("--checkpoint", "theirs.pth", "--network", "tiny")
    main(*flags, "--as", "insightface")
    assert "standard deviation of the folds" in capsys.readouterr().out
    report = json.loads((folder / "lfw.json").read_text("utf-8"))
    assert report["protocol"]["grid"] is True
    main(*flags, "--no-flip", "--fuse", "concat")
    assert "Protocol: no mirror image, cosine" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(*flags, "--as", "paper", "--flip")
    assert "--as paper fixes --flip" in capsys.readouterr().err


def save_other(path, epoch, seed):
    """A checkpoint of another epoch, with weights of its own."""
    torch.manual_seed(seed)
    config = {"network": "tiny", "use_se": False, "seed": 4}
    state = build_model("tiny", emb_size=8).state_dict()
    save_checkpoint(path, {"config": config, "model": state, "epoch": epoch})


def test_last_epoch_stands_beside_best_epoch(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "20250601-000000-tiny-s4"
    save_tiny(run / "best.pt")
    save_other(run / "last.pt", epoch=9, seed=1)
    main()
    printed = capsys.readouterr().out
    assert "best.pt (tiny, epoch 2)" in printed
    assert "last.pt (tiny, epoch 9)" in printed
    report = json.loads((run / "lfw.json").read_text("utf-8"))
    (other,) = report["compared_with"]
    assert (report["epoch"], other["epoch"]) == (2, 9)
    metrics = other["sets"]["lfw"]
    assert metrics["comparison"]["accuracy_difference"] == pytest.approx(
        report["accuracy"] - metrics["accuracy"]
    )
    assert metrics["comparison"]["verdict"] in printed
    save_other(run / "last.pt", epoch=2, seed=0)
    main()
    assert "last.pt is of the same epoch, 2." in capsys.readouterr().out
    (run / "last.pt").write_bytes(b"cut short")
    main()
    assert "Without last.pt: " in capsys.readouterr().out


def test_against_compares_with_any_model_on_every_set(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "runs" / "20250601-000000-tiny-s4" / "best.pt")
    torch.save(build_model("tiny", emb_size=8).state_dict(), "theirs.pth")
    main("--against", "theirs.pth", "--network", "tiny", "--sets", "lfw")
    report = json.loads(next((tmp_path / "runs").glob("*-s4/eval.json")).read_text("utf-8"))
    (other,) = report["compared_with"]
    assert (other["checkpoint"], list(other["sets"])) == ("theirs.pth", ["lfw"])
    assert "second: theirs.pth" in capsys.readouterr().out
    main("--against", "runs/20250601-000000-tiny-s4/best.pt", "--no-flip")
    assert "No statistically significant difference (0 pairs" in capsys.readouterr().out


def test_a_diverged_other_model_leaves_the_report_of_this_one(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "runs" / "20250601-000000-tiny-s4" / "best.pt")
    state = build_model("tiny", emb_size=8).state_dict()
    state["features.weight"].fill_(1e38)
    torch.save(state, "diverged.pth")
    with pytest.raises(SystemExit):
        main("--against", "diverged.pth", "--network", "tiny", "--sets", "lfw,")
    assert "finite" in capsys.readouterr().err
    report = json.loads(next((tmp_path / "runs").glob("*-s4/eval.json")).read_text("utf-8"))
    assert report["compared_with"] == []


def test_the_report_holds_intervals_and_operating_points(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "runs" / "20250601-000000-tiny-s4" / "best.pt")
    main()
    report = json.loads(next((tmp_path / "runs").glob("*-s4/lfw.json")).read_text("utf-8"))
    low, high = report["intervals"]["accuracy"]
    assert low <= report["accuracy"] <= high
    assert report["identities"] == IDENTITIES
    assert report["operating_points"] == []  # 12 impostor pairs support none
    assert len(report["operating_points_refused"]) == 4
    assert {"slope", "intercept", "ece", "bins"} <= report["calibration"].keys()
    printed = capsys.readouterr().out
    assert "FAR 1e-1 is not shown: 1.2 of 12 impostor pairs would decide it" in printed
    assert f"bootstrap over {IDENTITIES} identities (known by name), 1,000 resamples" in printed


def test_lfw_json_has_the_keys_of_its_type_in_their_order(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "20250601-000000-tiny-s4"
    save_tiny(run / "best.pt")
    save_other(run / "last.pt", epoch=9, seed=1)
    others = ("notes", "init", "init_sha256")  # of third-party and of fine-tuned models only
    keys = [key for key in LfwJson.__annotations__ if key not in ("sets", *others)]
    insightface = {"standard_deviation", "val", "val_far"}
    main("--robustness")
    report = json.loads((run / "lfw.json").read_text("utf-8"))
    assert list(report) == [key for key in keys if key not in insightface]
    assert list(report["intervals"]) == list(Intervals.__annotations__)
    assert list(report["calibration"]) == list(Calibration.__annotations__)
    assert list(report["robustness"]["clean"]) == list(RobustnessMetrics.__annotations__)
    (other,) = report["compared_with"]
    assert list(other) == [key for key in ComparedModel.__annotations__ if key not in others]
    assert list(other["sets"]["lfw"]["comparison"]) == list(Comparison.__annotations__)
    main("--as", "insightface")
    report = json.loads((run / "lfw.json").read_text("utf-8"))
    assert list(report) == [key for key in keys if key != "robustness"]


def test_a_network_of_nans_gets_a_sentence(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = build_model("tiny", emb_size=8).state_dict()
    state["features.weight"].fill_(1e38)
    state["features.bias"].fill_(1e38)
    torch.save(state, "theirs.pth")
    with pytest.raises(SystemExit):
        main("--checkpoint", "theirs.pth", "--network", "tiny")
    assert "finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "best.pt"),
        (["--sets", "lfw,cfp_fp"], "no cfp_fp.bin"),
        (
            ["--sets", "lfw", "--lfw", "data/faces_lfw_112x112"],
            "--lfw and --sets both name",
        ),
        (["--groups", "lfw"], "two or more test sets, not only lfw"),
        (["--checkpoint", "nothing.pt"], "nothing.pt"),
        (["--checkpoint", "data/pairs.txt"], "pairs.txt"),
        (["--lfw", "nowhere"], "nowhere"),
        (["--data-dir", "empty"], "make demo"),
    ],
)
def test_script_says_what_is_wrong_in_a_sentence(
    data, tmp_path, monkeypatch, capsys, flags, complaint
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(*flags)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "images").exists()
