"""label_noise.py on a set with labels shuffled on purpose, and training by its list."""

import cv2
import numpy as np
import pytest

import train
from bench.planted_noise import MIN_IMAGES, permuted_labels, plant, score_dropped, score_keep_list
from config import parse_args
from fileio.checkpoint_file import load_checkpoint
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from tests.helpers.onnx_files import write_onnx
from tools import label_noise
from training.sample_lists import KeepList, read_keep_list, write_keep_list
from utils import UserError

PEOPLE, EACH, WRONG = 12, 20, 24


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """12 identities of 20 noisy images each, a tenth under another's name; which, and whose."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(PEOPLE), EACH)
    centres = rng.integers(0, 255, (PEOPLE, 7, 7, 3))[truth]
    faces = np.clip(centres + rng.normal(0, 30, centres.shape), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    wrong = np.zeros(len(truth), bool)
    wrong[rng.choice(len(truth), WRONG, replace=False)] = True
    labels = np.where(wrong, (truth + rng.integers(1, PEOPLE, len(truth))) % PEOPLE, truth)
    order = np.argsort(labels, kind="stable")  # records stand by identity
    write_dataset(folder, [jpegs[i] for i in order], labels[order].tolist())
    return folder, wrong[order], truth[order]


def test_a_list_is_read_as_it_was_written_and_another_sets_refused(noisy, tmp_path):
    folder, wrong, _ = noisy
    reader, path = RecordReader(folder), tmp_path / "keep.tsv"
    some = np.arange(0, len(reader), 2)
    angles = np.linspace(0, 90, len(some))
    rows = KeepList(reader.keys[some], reader.labels[some], angles, some, angles, ~wrong[some])
    write_keep_list(path, rows)
    used = read_keep_list(path, reader)
    assert np.array_equal(used[some], ~wrong[some])
    assert used[1::2].all()
    write_keep_list(path, rows._replace(label=rows.label + 1))
    with pytest.raises(UserError, match=r"other records.* line 2 names record 1 with label 1"):
        read_keep_list(path, reader)
    write_keep_list(path, rows)
    whole = path.read_text()
    for text, why in ((whole[7:], "no list"), (whole[:-4], "cannot be read"), ("", "no list")):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            read_keep_list(path, reader)
    with pytest.raises(UserError, match="label_noise"):
        read_keep_list(tmp_path / "none.tsv", reader)


def test_planted_noise_is_found_and_left_out(noisy, tmp_path, capsys):
    cv2.setNumThreads(1)
    folder, wrong, truth = noisy
    where = f"--train-set {folder} --data-dir {tmp_path} --runs-dir {tmp_path}/runs --device cpu"
    flags = f"{where} --images-dir {tmp_path}/images --network tiny --emb-size 32 --batch-size 24 "
    flags += "--margin-s 16 --margin-m 0 --dropout 0 --lr 0.05 --schedule linear "
    flags += "--clip-norm 5 --valid-fraction 0 --epochs "
    train.main(parse_args(f"{flags} 3".split(), "train"))
    label_noise.main(parse_args(where.split(), "label_noise", label_noise.Settings))
    reader = RecordReader(folder)
    used = read_keep_list(tmp_path / "keep.tsv", reader)
    dropped = ~used
    found = (dropped & wrong).sum()
    print(f"recall {found / wrong.sum():.3f}, precision {found / dropped.sum():.3f}")
    assert found >= 0.9 * wrong.sum()
    assert found >= 0.95 * dropped.sum()
    lines = [line.split("\t") for line in (tmp_path / "keep.tsv").read_text().splitlines()[1:]]
    nearest = np.array([int(line[3]) for line in lines])
    assert np.mean(nearest[wrong] == truth[wrong]) > 0.8
    capsys.readouterr()

    runs = set((tmp_path / "runs").iterdir())
    flags += f"1 --seed 1 --keep {tmp_path}/keep.tsv --margin subcenter"
    flags += " --margin-option subcenters=2"
    train.main(parse_args(flags.split(), "train"))
    printed = capsys.readouterr().out
    assert f"Left out by lists: {dropped.sum()} of 240 images." in printed
    (run,) = set((tmp_path / "runs").iterdir()) - runs
    assert load_checkpoint(run / "last.pt")["epoch"] == 1

    used_by = f"--checkpoint {run}/last.pt --output {tmp_path}/second.tsv"
    label_noise.main(parse_args(used_by.split(), "label_noise", label_noise.Settings))
    assert "further than 75 degrees" in capsys.readouterr().out
    second = np.loadtxt(tmp_path / "second.tsv", skiprows=1)
    assert len(second) == used.sum()
    kept = (second[:, 2] - second[:, 4] <= 12.0) & (second[:, 2] <= 75.0)
    assert np.mean(second[:, 5] == kept) > 0.99  # but for the rounding of what is written

    (tmp_path / "keep.tsv").rename(tmp_path / "old.tsv")
    rows = (tmp_path / "old.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "keep.tsv").write_text("".join(rows[:100]))  # another list under the same name
    with pytest.raises(SystemExit):
        label_noise.main(parse_args(used_by.split(), "label_noise", label_noise.Settings))
    assert "other images" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flags = f"{used_by} --network r50"
        label_noise.main(parse_args(flags.split(), "label_noise", label_noise.Settings))
    error = capsys.readouterr().err
    assert "last.pt was written by train.py and has its own --network (tiny)" in error


# ------------------------------------------------------------------------------ models of others


def write_pattern_model(path):
    """An ONNX model whose embeddings are the bright and the dark of the 7x7 squares of an image.

    Its input is BGR with a mean of 0.5: colours are told apart only if that is heeded.
    """
    kernel = np.zeros((6, 3, 16, 16), np.float32)
    for channel in range(3):
        kernel[2 * channel, channel], kernel[2 * channel + 1, channel] = 1 / 256, -1 / 256
    write_onnx(path, "n", weights=(kernel, np.eye(6 * 49, dtype=np.float32)))


def test_a_model_of_others_finds_what_bench_plants(noisy, tmp_path, capsys):
    folder, wrong, _ = noisy
    rows = RecordReader(folder)
    write_keep_list(
        tmp_path / "right.tsv", KeepList(rows.keys, rows.labels, *np.zeros((3, 240)), ~wrong)
    )
    keep, planted = tmp_path / "keep.tsv", tmp_path / "planted"
    plant(folder, planted, noise_rate=0.1, seed=0, keep=str(tmp_path / "right.tsv"))
    assert "216 images, 22 of them" in capsys.readouterr().out
    write_pattern_model(tmp_path / "pattern.onnx")
    flags = f"--train-set {planted} --checkpoint {tmp_path}/pattern.onnx --output {keep} "
    flags += f"--data-dir {tmp_path} --device cpu --input-mean 0.5 0.5 0.5 --input-std 1 1 1 --bgr"
    label_noise.main(parse_args(flags.split(), "label_noise", label_noise.Settings))
    assert "194 kept, 22 dropped" in capsys.readouterr().out
    found = score_keep_list(planted, keep)
    assert [row["least"] for row in found] == list(MIN_IMAGES)
    assert all(row["recall"] == row["precision"] == row["named"] == 1 for row in found)


def test_planted_noise_is_scored_as_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2, 3])
    true = np.array([0, 0, 1, 1, 0, 2, 0])  # three planted; class 3 has nobody that belongs there
    dropped = np.array([True, False, True, False, True, False, False])
    other = np.array([1, 1, 1, 2, 3, 0, 0])
    found = score_dropped(labels, true, dropped, other, 1)
    counts = {"least": 1, "images": 7, "planted": 3, "dropped": 3, "found": 2}
    shares = {"recall": 0.6667, "precision": 0.6667, "ceiling": 0.6667, "named": 0.5}
    assert found == counts | shares
    assert score_dropped(labels, true, dropped, other, 3)["planted"] == 1


def test_planted_labels_keep_the_sizes_of_classes():
    labels = np.repeat(np.arange(30), np.arange(1, 31))
    planted = permuted_labels(labels, 0.2, seed=0)
    assert np.array_equal(np.bincount(planted), np.bincount(labels))
    assert np.sum(planted != labels) == 93
    assert np.array_equal(planted, permuted_labels(labels, 0.2, seed=0))
    with pytest.raises(UserError, match="more than half"):
        permuted_labels(np.array([0] * 90 + [1] * 10), 0.5, seed=0)


def test_what_cannot_be_scored_gets_a_sentence(noisy, tmp_path, capsys):
    where = f"--train-set {tmp_path} --data-dir {tmp_path} --device cpu"
    write_pattern_model(tmp_path / "pattern.onnx")
    for checkpoint, why in (("none.onnx", "no checkpoint"), ("pattern.onnx", "train.rec")):
        flags = f"{where} --checkpoint {tmp_path / checkpoint}"
        with pytest.raises(SystemExit) as ended:
            label_noise.main(parse_args(flags.split(), "label_noise", label_noise.Settings))
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    with pytest.raises(UserError, match="not made by plant"):
        score_keep_list(noisy[0], tmp_path / "keep.tsv")
