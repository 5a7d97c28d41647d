"""held_out.py and its lists on a small set, and training without the identities."""

import json

import numpy as np
import pytest
import torch

import train
from config import parse_args
from data_gen import make_split
from evaluation.pair_sets import load_set
from fileio.checkpoint_file import load_checkpoint
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from tools import held_out
from training.sample_lists import read_held_out, training_mask, write_held_out
from utils import UserError

PEOPLE, EACH = 60, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 identities of 5 noisy images each."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.integers(0, 255, (PEOPLE, 7, 7, 3)), EACH, 0)
    faces = np.clip(centres + rng.normal(0, 20, centres.shape), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    write_dataset(folder, jpegs, np.repeat(np.arange(PEOPLE), EACH).tolist())
    return folder


def run(argv, folder, tmp_path):
    argv = f"{argv} --train-set {folder} --data-dir {tmp_path} --runs-dir {tmp_path}/runs"
    held_out.main(parse_args(f"{argv} --device cpu".split(), "held_out", held_out.Settings))


# ------------------------------------------------------------------------------ lists


def test_held_out_identities_are_not_trained_on(folder, tmp_path):
    reader, path = RecordReader(folder), tmp_path / "a" / "held_out.txt"
    write_held_out(path, reader, np.array([3, 10, 59]))
    assert read_held_out(path, reader).tolist() == [3, 10, 59]
    used = training_mask(reader, hold_out=str(path))
    faces = make_split(reader.labels, valid_fraction=0.2, used=used)
    assert faces.num_classes == 57
    assert set(reader.labels[faces.indices]) == set(range(60)) - {3, 10, 59}
    assert np.unique(faces.labels).tolist() == list(range(57))
    some = make_split(reader.labels, valid_fraction=0, max_classes=4, used=used)
    assert set(reader.labels[some.indices]) == {0, 1, 2, 4}


def test_lists_of_another_set_and_damaged_ones_are_sentences(folder, tmp_path):
    reader, path = RecordReader(folder), tmp_path / "held_out.txt"
    with pytest.raises(UserError, match=r"no .*held_out.txt; make it"):
        read_held_out(path, reader)
    for text, why in (
        (b"", "is no list"),
        (b"3\n10\n", "is no list"),
        (b"\xff\xfe", "is no list"),
        (b"# identities held out of records 0123456789abcdef\n3\n", "made for other records"),
    ):
        path.write_bytes(text)
        with pytest.raises(UserError, match=why):
            read_held_out(path, reader)
    for damage in ("60", "-1", "x", ""):
        write_held_out(path, reader, np.array([3]))
        path.write_text(path.read_text() + damage + "\n")
        with pytest.raises(UserError, match="corrupt"):
            read_held_out(path, reader)


# ------------------------------------------------------------------------------ the script


def test_from_pairs_to_a_model_to_all_pairs(folder, tmp_path, capsys):
    run("--make-pairs 200 --held-out-identities 30", folder, tmp_path)
    path = tmp_path / "held_out.txt"
    chosen = set(read_held_out(path, RecordReader(folder)).tolist())
    test_set = load_set(tmp_path / "held_out.bin", "")
    assert len(test_set.pairs.same) == 200
    assert test_set.pairs.same.sum() == 100
    assert np.bincount(test_set.pairs.folds).tolist() == [20] * 10

    flags = "--network tiny --emb-size 16 --batch-size 8 --epochs 1 --device cpu --train-set "
    flags += f"{folder} --data-dir {tmp_path} --runs-dir {tmp_path}/runs --images-dir {tmp_path} "
    flags += f"--hold-out {path} --lfw {tmp_path}/held_out.bin"
    train.main(parse_args(flags.split(), "train"))
    printed = capsys.readouterr().out
    assert "Left out by lists: 150 of 300 images." in printed
    assert "of 30 identities" in printed
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpoint = load_checkpoint(run_dir / "last.pt")
    assert checkpoint["num_classes"] == 30
    assert len(checkpoint["history"]["lfw"]) == 1

    run("", folder, tmp_path)
    printed = capsys.readouterr().out
    assert "150 images of 30 identities: 300 genuine and 10,875 impostor pairs" in printed
    assert "Warning" not in printed
    report = json.loads((run_dir / "held_out.json").read_text())
    assert not report["tar_at_far"]  # 10,875 pairs are too few for a FAR of 1e-3
    assert len(report["refused"]) == 4
    assert "FAR 1e-3 is not shown" in printed

    checkpoint["config"]["hold_out"] = ""
    torch.save(checkpoint, run_dir / "best.pt")
    run("", folder, tmp_path)
    assert "Warning: this model was trained without --hold-out" in capsys.readouterr().out
    run("--make-pairs 200 --held-out-identities 30 --hard-negatives", folder, tmp_path)
    assert "an image and its hardest impostor" in capsys.readouterr().out
    assert set(read_held_out(path, RecordReader(folder)).tolist()) == chosen
    hard = load_set(tmp_path / "held_out.bin", "")
    assert hard.pairs.same.sum() == len(hard.pairs.same) / 2
