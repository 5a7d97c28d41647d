"""Data sets of many record files: the reader, the order, and training on them."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

from config import parse_args
from distributed.collectives import even_slice
from fileio import shards
from fileio.checkpoint_file import load_checkpoint
from fileio.recordio import RecordError, RecordReader
from fileio.shards import ShardReader, write_shards
from tests.helpers.faults import FailingDisk
from tests.helpers.record_files import image_payload, labels_payload, record
from tests.helpers.tiny import FLAGS, write_tiny_set
from tools import make_shards
from training.sharded_dataset import ShardOrder, mirror_mask


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def folder(single_file, tmp_path_factory):
    """The 48 images in 5 files."""
    folder = tmp_path_factory.mktemp("shards")
    argv = f"--source {single_file} --output {folder}/s --shard-images 10 --seed 3"
    make_shards.main(parse_args(argv.split(), "make_shards", make_shards.Settings))
    return folder / "s"


def test_shards_hold_every_image_once(single_file, folder):
    reader, plain = ShardReader(folder), RecordReader(single_file)
    assert len(reader.files) == 5
    assert sorted(np.diff(reader.starts).tolist()) == [9, 9, 10, 10, 10]
    assert (len(reader), reader.num_classes) == (48, 4)
    numbers = np.arange(48)
    images = [
        (reader.encoded(i), label) for i, label in enumerate(reader.labels_of(numbers).tolist())
    ]
    expected = [(plain.encoded(i), int(plain.labels[i])) for i in range(48)]
    assert sorted(images) == sorted(expected)
    assert reader.image(7).shape == (112, 112, 3)
    # Each file is a record file that others can read, with the same labels.
    single = RecordReader(reader.files[2])
    begin = int(reader.starts[2])
    assert [single.encoded(i) for i in range(len(single))] == [
        reader.encoded(begin + i) for i in range(len(single))
    ]
    # Every identity is spread over the files.
    label = reader.labels_of(numbers)
    spans = itertools.pairwise(reader.starts.tolist())
    assert all(len(set(label[a:b].tolist())) >= 3 for a, b in spans)


def test_indexes_are_made_where_they_are_missing(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".npy":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    again, before = ShardReader(tmp_path), ShardReader(folder)
    for file in before.files:
        name = file.with_suffix(".npy").name
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert again.labels_of(np.arange(48)).tolist() == before.labels_of(np.arange(48)).tolist()
    assert shards.INDEX_DTYPE.itemsize <= 16


@pytest.mark.parametrize("kind", ["vector", "record 0", "both"])
def test_shards_that_others_wrote(single_file, tmp_path, kind):
    """With a label in a vector, or with record 0 and identity records in each file."""
    plain = RecordReader(single_file)
    for n in range(3):
        images = range(n, 48, 3)
        count = len(images)
        records = [record(labels_payload(0, count + 1, count + 2))] if kind != "vector" else []
        for key, i in enumerate(images, len(records)):
            label = float(plain.labels[i])
            head = image_payload(key, label, b"")
            if kind != "record 0":
                head = labels_payload(key, label, 0.25)
            records.append(record(head + plain.encoded(i)))
        if kind != "vector":
            records.append(record(labels_payload(count + 1, 1, count + 1)))
        (tmp_path / f"train-{n:05d}.rec").write_bytes(b"".join(records))
    (tmp_path / "property").write_text("4, 112, 112\n48\n")
    for _ in range(2):  # the second time with the .npy files of the first
        reader = ShardReader(tmp_path)
        order = [i for n in range(3) for i in range(n, 48, 3)]
        assert [reader.encoded(i) for i in range(48)] == [plain.encoded(i) for i in order]
        assert reader.labels_of(np.arange(48)).tolist() == plain.labels[order].tolist()
    cut = (tmp_path / "train-00002.rec").read_bytes()[:-8]
    (tmp_path / "train-00002.rec").write_bytes(cut)
    with pytest.raises(RecordError, match="its last record is not where the file ends"):
        ShardReader(tmp_path)


def test_what_is_wrong_is_a_sentence(folder, tmp_path):
    def copy():
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())

    copy()
    (tmp_path / "property").write_text("4")
    with pytest.raises(RecordError, match="begins with '4' instead of 'classes,height,width'"):
        ShardReader(tmp_path)
    (tmp_path / "property").unlink()
    with pytest.raises(RecordError, match=r"There is no .*property, the line 'classes,height"):
        ShardReader(tmp_path)
    (tmp_path / "property").write_text("4,96,96")
    with pytest.raises(RecordError, match="faces of 96x96 pixels"):
        ShardReader(tmp_path)
    (tmp_path / "property").write_text("3,112,112")
    with pytest.raises(RecordError, match="has label 3, not one below 3"):
        ShardReader(tmp_path).labels_of(np.arange(48))
    copy()
    (tmp_path / "train-00001.npy").write_bytes(b"nothing")
    with pytest.raises(RecordError, match="delete it and it will be written anew"):
        ShardReader(tmp_path)
    np.save(tmp_path / "train-00001.npy", np.zeros(3))
    with pytest.raises(RecordError, match="no index of a record file"):
        ShardReader(tmp_path)
    copy()
    entries = np.load(tmp_path / "train-00001.npy")
    entries["offset"][:-1] += 4
    np.save(tmp_path / "train-00001.npy", entries)
    with pytest.raises(RecordError, match="do not belong together"):
        ShardReader(tmp_path).encoded(12)
    copy()
    cut = (tmp_path / "train-00002.rec").read_bytes()[:-8]
    (tmp_path / "train-00002.rec").write_bytes(cut)
    with pytest.raises(RecordError, match="its last record is not where the file ends"):
        ShardReader(tmp_path)


# ------------------------------------------------------------------------------ the order

STARTS = np.cumsum([0, 700, 3, 512, 64, 1000, 721])  # 3,000 images in files of all sizes


def epoch(order, number, batch, ranks):
    """All batches of an epoch as lists of each process's images, down to the lanes' ends."""
    steps = -(-(len(order) // order.lanes + 1) // order.lane_images)
    parts = [even_slice(order.lanes, rank, ranks) for rank in range(ranks)]
    return [[order.batch(number, step, p)[0].tolist() for p in parts] for step in range(steps)]


@pytest.mark.parametrize("every", [0, 7])
@pytest.mark.parametrize("batch", [48, 64, 30])
def test_an_epoch_shows_every_image_once_to_one_process(batch, every):
    order = ShardOrder(STARTS, batch, seed=1, valid_every=every)
    held_out = order.validation().tolist()
    assert len(held_out) == (sum(n // every for n in np.diff(STARTS)) if every else 0)
    shown = {}
    for ranks in (1, 3, 4):
        batches = epoch(order, 0, batch, ranks)
        flat = [i for step in batches for images in step for i in images]
        assert sorted(flat + held_out) == list(range(3000))
        complete = batches[: len(order) // batch]
        assert all(sum(map(len, step)) == batch for step in complete)
        shown[ranks] = [sorted(i for images in step for i in images) for step in complete]
    assert shown[1] == shown[3] == shown[4]  # the batches are the same for any number of processes


def test_epochs_differ_and_batches_mix_the_files():
    order = ShardOrder(STARTS, 64, seed=1)
    first, second = (epoch(order, number, 64, 1)[0][0] for number in (0, 1))
    assert first != second
    assert len(set(np.searchsorted(STARTS, first, "right"))) >= 4
    # A process's images come from a part of the data set, not from all of it.
    mine = even_slice(order.lanes, 0, 8)
    seen = np.concatenate([order.batch(0, step, mine)[0] for step in range(40)])
    files = np.unique(np.searchsorted(STARTS, seen, "right"))
    assert len(files) <= 3


def test_half_of_the_images_are_mirrored_and_others_each_epoch():
    numbers = np.arange(10000)
    first, second = mirror_mask(numbers, 0, 0), mirror_mask(numbers, 0, 1)
    for share in (first.mean(), second.mean(), (first == second).mean()):
        assert abs(share - 0.5) < 0.02
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.02


# ------------------------------------------------------------------------------ training


@pytest.mark.slow
def test_training_on_shards_resumes_with_another_number_of_processes(groups, folder, tmp_path):
    flags = [*FLAGS.split(), "--train-set", str(folder), "--no-amp", "--dropout", "0"]
    flags += ["--sync-bn", "--lr", "0.000001", "--epochs", "1"]
    groups.run(tmp_path / "one", 0, "run_train", flags)
    cwd = tmp_path / "some"
    groups.run(cwd, 2, "train_until", flags, 3, fails=True)
    groups.run(cwd, 3, "run_train", ["--resume"])
    runs = [next(tmp_path.glob(f"{name}/runs/*")) for name in ("one", "some")]
    one, some = (load_checkpoint(run / "last.pt") for run in runs)
    assert one["steps"] == 5  # 40 of 48 images, 8 held out
    for a, b in zip(one["history"]["train"], some["history"]["train"], strict=True):
        assert a[2] == pytest.approx(b[2], rel=1e-4)
    for key, value in one["model"].items():
        torch.testing.assert_close(some["model"][key], value, rtol=1e-3, atol=1e-5)


def test_a_corrupt_image_is_skipped(folder, tmp_path, groups):
    data = [file.read_bytes() for file in sorted(folder.glob("*.rec"))]
    reader = ShardReader(folder)
    jpegs = [reader.encoded(i) for i in range(48)]
    jpegs[11] = b"\xff\xd8nothing"
    write_shards(tmp_path / "s", jpegs, reader.labels_of(np.arange(48)), 3)
    assert data  # the original is another set
    flags = [*FLAGS.split(), "--train-set", str(tmp_path / "s"), "--epochs", "1"]
    printed = groups.run(tmp_path, 2, "run_train", flags)
    assert "Training set" not in printed[1]  # PyTorch may warn there, with a time in the line
    assert "epoch 1/1" in printed[0]


def test_after_any_failing_call_the_files_are_no_set(single_file, tmp_path, monkeypatch, capsys):
    for fail_at in range(1, 400, 3):
        output = tmp_path / f"{fail_at}"
        argv = f"--source {single_file} --output {output} --shard-images 10"
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, fail_at)
            try:
                make_shards.main(parse_args(argv.split(), "make_shards", make_shards.Settings))
            except SystemExit as ended:
                assert ended.code == 2
                assert "cannot be written (" in capsys.readouterr().err
        if not disk.failed:
            break
        # Not even where only the last folder could not be synced are they fewer than all.
        with contextlib.suppress(RecordError):
            assert len(ShardReader(output)) == 48
    assert 50 < fail_at < 390
