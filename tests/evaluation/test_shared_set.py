"""A test set that several processes embed: what one process computes, to the last bit."""

import re

import pytest
import torch

from evaluation.embedders import torch_embedder
from evaluation.evaluate import evaluate_lfw
from evaluation.pair_sets import load_set
from evaluation.shared_set import batch_slices
from fileio.checkpoint_file import load_checkpoint
from models import build_model
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 7701])
def test_slices_are_whole_batches_and_even(count, parts):
    slices = batch_slices(count, 64, parts)
    assert len(slices) == parts
    assert [i for part in slices for i in range(count)[part]] == list(range(count))
    starts = set(range(0, count, 64))
    assert all(part.start in starts for part in slices if part.start < part.stop)
    batches = [-(-(part.stop - part.start) // 64) for part in slices]
    assert max(batches) - min(batches) <= 1
    assert batches[0] >= 1


def test_the_slices_of_the_docstring():
    assert batch_slices(1000, 256, 3) == [slice(0, 512), slice(512, 768), slice(768, 1000)]


@pytest.mark.parametrize(("ranks", "faces"), [(1, [24]), (2, [15, 9]), (7, [5, 5, 5, 0, 5, 4, 0])])
def test_processes_compute_what_one_computes_to_the_last_bit(
    groups, folder, tmp_path, ranks, faces
):
    groups.run(tmp_path / "one", 0, "evaluate_together", str(folder / "lfw.bin"), 5)
    printed = groups.run(tmp_path / "all", ranks, "evaluate_together", str(folder / "lfw.bin"), 5)
    assert [int(re.search(r"(\d+) faces", text)[1]) for text in printed] == faces
    one, together = (load_checkpoint(tmp_path / name / "lfw.pt") for name in ("one", "all"))
    assert one["embeddings"].shape == (24, 16)
    assert_same(together, one)


def test_no_process_evaluates_where_rank_0_has_no_set(groups, tmp_path):
    printed = groups.run(tmp_path, 2, "evaluate_together", "", 5)
    assert "LFW is not prepared" in printed[0]
    assert all("0 faces" in text for text in printed)
    assert not (tmp_path / "lfw.pt").exists()


def test_a_set_that_cannot_be_read_ends_all_processes(groups, folder, tmp_path):
    path = tmp_path / "lfw.bin"
    path.write_bytes((folder / "lfw.bin").read_bytes()[:3000])
    printed, codes = groups.run(tmp_path, 2, "evaluate_together", str(path), 5, fails=True)
    assert codes == [2, 2]
    assert str(path) in printed[0]
    assert "Traceback" not in printed[0] + printed[1]


def test_training_logs_what_one_process_measures_on_its_weights(groups, folder, tmp_path):
    """Raw and EMA weights, of which the processes have running statistics of their own."""
    flags = [*FLAGS.split(), "--train-set", str(folder), "--eval-batch", "5", "--ema", "0.9"]
    flags += ["--valid-fraction", "0"]  # validation would have given all the same statistics
    groups.run(tmp_path, 2, "run_train", flags)
    (path,) = tmp_path.glob("runs/*/last.pt")
    state = load_checkpoint(path)
    test_set = load_set(folder / "lfw.bin", "")
    for key, weights in (("lfw", state["model"]), ("ema_lfw", state["ema"])):
        model = build_model("tiny", emb_size=16, dropout=0.3)
        model.load_state_dict(weights, strict=key == "lfw")
        embed = torch_embedder(model, torch.device("cpu"), batch=5)
        metrics = evaluate_lfw(embed, test_set).metrics
        assert state["history"][key][-1] == (2, metrics["accuracy"], metrics["threshold"]), key


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_fills_in_one_process_ends_all_with_a_sentence(groups, folder, tmp_path, rank):
    flags = [*FLAGS.split(), "--train-set", str(folder), "--eval-batch", "5"]
    printed, codes = groups.run(tmp_path, 2, "train_with_full_memory", flags, rank, fails=True)
    assert codes == [2, 2]
    assert "Memory does not suffice for evaluating one image at a time" in printed[rank]
    assert "train.py --resume" in printed[rank]
    assert "does not suffice" not in printed[1 - rank]
    assert "Traceback" not in printed[0] + printed[1]
