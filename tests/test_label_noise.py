"""label_noise.py on a set with labels shuffled on purpose, and training by its list."""

import cv2
import numpy as np
import pytest
import torch

import label_noise
import train
from checkpoints import load_checkpoint
from config import parse_args
from label_noise import score
from record_writer import write_dataset
from recordio import RecordReader, encode_jpeg
from selection import KeepList, read_keep, write_keep
from utils import UserError

PEOPLE, EACH, WRONG = 12, 20, 24


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """12 identities of 20 noisy pictures each, a tenth under another's name; which, and whose."""
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


def test_scores_are_the_angles_one_by_one():
    rng = np.random.default_rng(0)
    embeddings = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(3000, 8))).float())
    centres, labels = torch.from_numpy(rng.normal(size=(30, 8))).float(), rng.integers(0, 30, 3000)
    found = score(embeddings, torch.from_numpy(labels), centres)
    unit = centres.double().numpy() / np.linalg.norm(centres.double().numpy(), axis=1)[:, None]
    angles = np.degrees(np.arccos(np.clip(embeddings.double().numpy() @ unit.T, -1, 1)))
    rows = np.arange(3000)
    np.testing.assert_allclose(found.angle, angles[rows, labels], atol=0.02)
    angles[rows, labels] = 999
    np.testing.assert_allclose(found.other_angle, angles.min(1), atol=0.02)
    assert np.mean(found.other == angles.argmin(1)) > 0.999
    kept = found.kept(60)
    assert np.array_equal(kept, (found.angle <= found.other_angle) & (found.angle <= 60))


def test_a_list_is_read_as_it_was_written_and_another_sets_refused(noisy, tmp_path):
    folder, wrong, _ = noisy
    reader, path = RecordReader(folder), tmp_path / "keep.tsv"
    some = np.arange(0, len(reader), 2)
    angles = np.linspace(0, 90, len(some))
    rows = KeepList(reader.keys[some], reader.labels[some], angles, some, angles, ~wrong[some])
    write_keep(path, rows)
    used = read_keep(path, reader)
    assert np.array_equal(used[some], ~wrong[some])
    assert used[1::2].all()
    write_keep(path, rows._replace(label=rows.label + 1))
    with pytest.raises(UserError, match=r"other records.* line 2 speaks of record 1 with label 1"):
        read_keep(path, reader)
    write_keep(path, rows)
    whole = path.read_text()
    for text, why in ((whole[7:], "no list"), (whole[:-4], "cannot be read"), ("", "no list")):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            read_keep(path, reader)
    with pytest.raises(UserError, match="label_noise"):
        read_keep(tmp_path / "none.tsv", reader)


def test_planted_noise_is_found_and_left_out(noisy, tmp_path, capsys):
    cv2.setNumThreads(1)
    folder, wrong, truth = noisy
    where = f"--train-set {folder} --data-dir {tmp_path} --runs-dir {tmp_path}/runs --device cpu"
    flags = f"{where} --images-dir {tmp_path}/images --network tiny --emb-size 32 --batch-size 24 "
    flags += "--margin-s 16 --margin-m 0 --dropout 0 --lr 0.05 --schedule poly --poly-power 1 "
    flags += "--clip-norm 5 --valid-fraction 0 --epochs "
    train.main(parse_args(f"{flags} 3".split(), "train"))
    label_noise.main(parse_args(where.split(), "label_noise"))
    reader = RecordReader(folder)
    used = read_keep(tmp_path / "keep.tsv", reader)
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
    flags += f"1 --seed 1 --keep {tmp_path}/keep.tsv"
    train.main(parse_args(flags.split(), "train"))
    printed = capsys.readouterr().out
    assert f"Left out by lists: {dropped.sum()} of 240 pictures." in printed
    (run,) = set((tmp_path / "runs").iterdir()) - runs
    assert load_checkpoint(run / "last.pt")["epoch"] == 1

    used_by = f"--checkpoint {run}/last.pt"
    (tmp_path / "keep.tsv").rename(tmp_path / "old.tsv")
    rows = (tmp_path / "old.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "keep.tsv").write_text("".join(rows[:100]))  # another list under the same name
    with pytest.raises(SystemExit):
        label_noise.main(parse_args(used_by.split(), "label_noise"))
    assert "other pictures" in capsys.readouterr().err
