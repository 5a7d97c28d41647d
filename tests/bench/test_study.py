"""bench/study.py: two arms on a small set, tested as the scripts test them, and the table."""

import json
import statistics

import numpy as np
import pytest
import torch

from bench import study
from config import parse_args
from evaluation.embedders import load_embedder
from evaluation.evaluate import evaluate_lfw
from evaluation.pair_sets import load_set
from fileio.bin_sets import write_bin
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from tools import held_out

IDENTITIES, EACH = 40, 5


@pytest.fixture
def folder(tmp_path):
    """40 identities of 5 noisy images each, an lfw.bin, and 20 identities held out."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.integers(0, 255, (IDENTITIES, 7, 7, 3)), EACH, 0)
    faces = np.clip(centres + rng.normal(0, 60, centres.shape), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    write_dataset(tmp_path / "set", jpegs, np.repeat(np.arange(IDENTITIES), EACH).tolist())
    write_bin(tmp_path / "lfw.bin", jpegs[:80], [i % 2 == 0 for i in range(40)])
    flags = f"--make-pairs 6000 --held-out-identities 20 --data-dir {tmp_path} --train-set "
    held_out.main(parse_args(f"{flags}{tmp_path}/set".split(), "held_out", held_out.Settings))
    return tmp_path


def test_a_study_agrees_with_the_scripts_and_skips_finished_runs(folder, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", folder)
    argv = ["arcface=--emb-size 16", "mine=--emb-size 16 --margin cosface --ema 0.5"]
    argv += f"--train-set {folder}/set --lfw {folder}/lfw.bin --seeds 3 --epochs 1".split()
    argv += f"--hold-out {folder}/held_out.txt --runs {folder}/runs --batch-size 50".split()
    argv += ["--device", "cpu", "--jobs", "2"]
    study.main(argv)
    printed = capsys.readouterr().out
    report = json.loads((folder / "study-cpu-tiny.json").read_text())
    assert list(report["arms"]) == ["arcface", "mine", "mine, EMA weights"]
    assert report["settings"]["epochs"] == 1
    pairs = load_set(folder / "held_out.bin", "")
    for arm, file in {
        "arcface": "last.pt",
        "mine": "last.pt",
        "mine, EMA weights": "best_ema.pt",
    }.items():
        (path,) = (folder / "runs" / arm.split(",")[0] / "s3").glob(f"*/{file}")
        embed = load_embedder(path, device=torch.device("cpu"))[0]
        metrics = report["arms"][arm]["seeds"]["3"]
        assert metrics["pairs"] == pytest.approx(evaluate_lfw(embed, pairs).metrics["accuracy"])
        lfw = evaluate_lfw(embed, load_set(folder / "lfw.bin", "")).metrics["accuracy"]
        assert metrics["lfw"] == pytest.approx(lfw)
        assert f"| {arm} | {100 * lfw:.2f} | {100 * metrics['pairs']:.2f} |" in printed

    for log in folder.glob("runs/*/*/train.log"):
        log.unlink()
    study.main(argv)
    assert json.loads((folder / "study-cpu-tiny.json").read_text())["arms"] == report["arms"]
    assert not list(folder.glob("runs/*/*/train.log"))
    with pytest.raises(SystemExit):
        study.main(["arcface=--lr 0.2", *argv[1:]])
    assert "other flags" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(["nobody", *argv])
    assert "no arm 'nobody'" in capsys.readouterr().err


def test_the_table_has_means_standard_deviations_and_differences():
    values = {"a": (0.80, 0.82, 0.84), "b": (0.85, 0.86, 0.90)}
    rows = {
        arm: {"seeds": {str(i): {"lfw": v, "pairs": v - 0.1} for i, v in enumerate(accuracies)}}
        for arm, accuracies in values.items()
    }
    *_, first, second = study.study_table(rows).splitlines()
    assert first == "| a | 82.00 ± 2.00 | 72.00 ± 2.00 |  |  |  |  |"
    error = (4 / 3 + statistics.variance([85, 86, 90]) / 3) ** 0.5
    assert second == f"| b | 87.00 ± 2.65 | 77.00 ± 2.65 |  |  |  | +5.00 ± {error:.2f} |"
