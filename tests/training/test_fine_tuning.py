"""train.py --init: a run that begins with the backbone of another checkpoint."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lfw_eval
import train
from config import parse_args
from evaluation.embedders import load_embedder
from fileio.checkpoint_file import load_checkpoint
from fileio.image_loader import load_images
from fileio.recordio import RecordReader
from heads.registry import build_head
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set
from tools import make_shards
from training.run import Run
from training.sharded_dataset import ShardOrder

# FLAGS without what a base says itself; all 48 images are trained on, in 6 steps an epoch.
MORE = FLAGS.replace("--network tiny --emb-size 16 ", "").replace("--augment adaface", "")
MORE += "--valid-fraction 0 --no-amp --schedule step"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """A checkpoint that knows the images after five epochs."""
    runs = tmp_path_factory.mktemp("base")
    argv = f"{FLAGS} --no-amp --epochs 5 --train-set {folder} --lfw {folder}/lfw.bin "
    argv += f"--runs-dir {runs} --images-dir {runs}"
    train.main(parse_args(argv.split(), "train"))
    return next(runs.glob("*/last.pt"))


@pytest.fixture
def start(folder, tmp_path, monkeypatch, capsys):
    """Runs train.py in a folder of its own: status, what it printed, its newest last.pt."""
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)

    def run(line, name="runs"):
        argv = f"--runs-dir {tmp_path / name} --images-dir {tmp_path} {line}"
        if "--resume" not in line:
            argv = f"{MORE} --train-set {folder} --lfw {folder}/lfw.bin {argv}"
        code = 0
        try:
            train.main(parse_args(argv.split(), "train"))
        except SystemExit as error:
            code = error.code
        printed = "".join(capsys.readouterr())
        last = sorted((tmp_path / name).glob("*/last.pt"))
        return code, printed, load_checkpoint(last[-1]) if last else {}

    return run


def class_means(checkpoint, folder):
    """The mean embedding of each class of the tiny set, (4, 16), not by the code under test."""
    embed, _ = load_embedder(checkpoint, device=torch.device("cpu"), flip=False)
    reader = RecordReader(folder)
    embeddings = embed(load_images(reader, np.arange(48))[0])
    return torch.stack([embeddings[reader.labels == label].mean(0) for label in range(4)])


def momentum_of(state):
    """The momentum of each parameter, the head's weight last."""
    return [entry["momentum_buffer"] for _, entry in sorted(state["optimizer"]["state"].items())]


# ------------------------------------------------------------------------------ the beginning


def test_at_a_learning_rate_of_zero_lfw_is_the_bases_to_the_last_digit(base, start):
    code, printed, state = start(f"--init {base} --lr 0 --epochs 1 --ema 0.9")
    assert code == 0, printed
    expected = load_checkpoint(base)
    assert_same(state["model"], expected["model"])
    assert state["history"]["lfw"][0][1:] == expected["history"]["lfw"][-1][1:]
    assert state["history"]["ema_lfw"][0][1:] == expected["history"]["lfw"][-1][1:]
    assert_same(state["ema"], {name: expected["model"][name] for name in state["ema"]})


def test_centres_begin_as_class_means_of_the_length_of_random_ones(base, folder, start):
    _, _, state = start(f"--init {base} --lr 0 --epochs 1")
    weight = state["head"]["weight"]
    torch.testing.assert_close(F.normalize(weight), F.normalize(class_means(base, folder)))
    _, _, random = start("--network tiny --emb-size 16 --lr 0 --epochs 1", "random")
    torch.testing.assert_close(weight.norm(dim=1), random["head"]["weight"].norm(dim=1))
    assert 0.02 < weight.norm(dim=1).mean() < 0.06  # 0.01 times the root of 16


def test_a_class_without_images_and_further_subcentres_keep_random_centres():
    torch.manual_seed(0)
    head = build_head("subcenter", 8, 3, margin_s=64, margin_m=0.5)
    before = head.weight.detach().clone()
    directions = torch.randn(3, 8)
    directions[1] = 0
    head.set_centres(directions)
    rows, random = head.weight.detach().view(3, 3, 8), before.view(3, 3, 8)
    assert torch.equal(rows[:, 1:], random[:, 1:])
    assert torch.equal(rows[1], random[1])
    torch.testing.assert_close(F.normalize(rows[::2, 0]), F.normalize(directions[::2]))
    torch.testing.assert_close(rows.norm(dim=2), random.norm(dim=2))


def test_the_base_is_recorded_in_the_run_and_its_evaluation(base, folder, start, tmp_path):
    flags = f"--init {base} --freeze-epochs 1 --backbone-lr-factor 0.5 --epochs 2"
    _, printed, state = start(flags)
    checksum = hashlib.sha256(base.read_bytes()).hexdigest()
    assert f"Base: {base}, SHA-256 {checksum}; backbone's learning rate x 0.5" in printed
    assert "0.5; the head alone: 1 of 2 epochs" in printed
    config = state["config"]
    assert (config["init"], config["init_sha256"]) == (str(base), checksum)
    assert (config["network"], config["emb_size"]) == ("tiny", 16)  # the base's, not the defaults
    (run,) = (tmp_path / "runs").glob("*-tiny-s0")
    argv = f"--checkpoint {run}/last.pt --lfw {folder}/lfw.bin --images-dir {tmp_path}"
    lfw_eval.main(parse_args(argv.split(), "lfw_eval"))
    evaluated = json.loads((run / "lfw.json").read_text())
    assert (evaluated["init"], evaluated["init_sha256"]) == (str(base), checksum)
    page = (run / "report.html").read_text()
    assert "fine-tuned from, SHA-256" in page and checksum in page


def test_weights_of_others_begin_a_run_too(base, start, tmp_path):
    theirs = {f"module.{k}": v.half() for k, v in load_checkpoint(base)["model"].items()}
    theirs = {k: v.long() if k.endswith("num_batches_tracked") else v for k, v in theirs.items()}
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "theirs.pth")
    flags = f"--init {tmp_path}/theirs.pth --epochs 1 --lr 0"
    code, printed, _ = start(flags)
    assert code == 2
    assert "are not those of network r50: " in printed
    assert "They are those of --network tiny." in printed
    assert not list(tmp_path.glob("runs/*"))
    code, printed, state = start(f"{flags} --network tiny")
    assert code == 0, printed
    assert "theirs.pth: RGB, mean 0.5, std 0.5" in printed
    assert state["config"]["emb_size"] == 16  # that of the file
    for name, value in load_checkpoint(base)["model"].items():
        assert torch.equal(state["model"][name], theirs[f"module.{name}"].to(value.dtype))


def test_a_set_in_shards_has_all_its_training_images_in_the_centres(base, folder, start, tmp_path):
    argv = f"--source {folder} --output {tmp_path}/shards --shard-images 16"
    make_shards.main(parse_args(argv.split(), "make_shards", make_shards.Settings))
    code, printed, state = start(f"--init {base} --lr 0 --epochs 1 --train-set {tmp_path}/shards")
    assert code == 0, printed
    expected = F.normalize(class_means(base, folder))
    torch.testing.assert_close(F.normalize(state["head"]["weight"]), expected)
    order = ShardOrder(np.array([0, 13, 20, 32]), 4, seed=0, valid_every=5)
    assert sorted([*order.training(), *order.validation()]) == list(range(32))
    assert len(order.training()) == len(order)


# ------------------------------------------------------------------------------ frozen


@pytest.mark.parametrize("more", ["", "--sample-rate 0.5", "--no-decay-bn --clip-norm 1"])
def test_a_frozen_backbone_neither_moves_nor_gathers_momentum(base, start, more):
    _, _, state = start(f"--init {base} --freeze-epochs 2 --ema 0.5 {more}")
    expected = load_checkpoint(base)["model"]
    assert_same(state["model"], expected)
    assert_same(state["ema"], {name: expected[name] for name in state["ema"]})
    *backbone, head = momentum_of(state)
    assert not any(momentum.any() for momentum in backbone)
    assert head.any()
    _, _, initial = start(f"--init {base} --lr 0 --epochs 1 {more}", "initial")
    assert not torch.equal(state["head"]["weight"], initial["head"]["weight"])


def test_after_the_frozen_epochs_all_of_it_is_trained(base, start):
    _, _, state = start(f"--init {base} --freeze-epochs 1")
    for name, value in load_checkpoint(base)["model"].items():
        changes = name != "features.weight"  # which is constant
        assert torch.equal(state["model"][name], value) != changes, name
    assert all(momentum.any() for momentum in momentum_of(state))


@pytest.mark.parametrize("more", ["", "--no-decay-bn"])
def test_the_factor_scales_the_backbones_steps_alone(base, start, monkeypatch, more):
    """One step without momentum: each weight moves by its learning rate times the same gradient."""
    moves = []
    monkeypatch.setattr("data_gen.steps_per_epoch", lambda *_: 1)
    monkeypatch.setattr("training.run_state.steps_per_epoch", lambda *_: 1)
    flags = f"--init {base} --epochs 1 --momentum 0 --dropout 0 {more}"
    for name, factor in (("none", "0 --lr 0"), ("whole", "1"), ("half", "0.5")):
        _, _, state = start(f"{flags} --backbone-lr-factor {factor}", name)
        assert state["steps"] == 1
        moves.append([state["model"]["fc.weight"], state["model"]["bn1.weight"]])
        moves[-1].append(state["head"]["weight"])
    for part, (initial, whole, half) in enumerate(zip(*moves, strict=True)):
        expected = 1.0 if part == 2 else 0.5
        assert (whole - initial).any()
        torch.testing.assert_close(half - initial, expected * (whole - initial), atol=1e-7, rtol=0)


# ------------------------------------------------------------------------------ resumed


@pytest.mark.parametrize(
    ("stop", "more"),  # while frozen, between, and after
    [(3, ""), (6, "--sample-rate 0.7"), (9, "--backbone-lr-factor 0.1")],
)
def test_a_run_resumes_bit_for_bit_without_its_base(base, start, monkeypatch, tmp_path, stop, more):
    copy = tmp_path / "base.pt"
    copy.write_bytes(base.read_bytes())
    flags = f"--init {copy} --freeze-epochs 1 --ema 0.9 {more}"
    _, _, straight = start(flags, "straight")
    train_step = Run.train_step

    def stopping(self, *arguments):
        if self.global_step == stop - 1:
            self.request_stop()
        return train_step(self, *arguments)

    monkeypatch.setattr(Run, "train_step", stopping)
    code, printed, state = start(flags)
    assert code == 130, printed
    assert state["epoch"] * 6 + state["step"] == stop
    monkeypatch.undo()
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
    copy.unlink()
    code, printed, resumed = start("--resume")
    assert code == 0, printed
    assert f"Base: {copy}, SHA-256" in printed
    for entry in ("config", "versions"):
        straight.pop(entry), resumed.pop(entry)
    assert_same(resumed, straight)


def test_processes_begin_with_the_centres_of_one(base, folder, groups, start, tmp_path):
    flags = f"{MORE} --init {base} --train-set {folder} --lfw {folder}/lfw.bin --epochs 1"
    _, _, alone = start(f"--init {base} --lr 0 --epochs 1")
    printed = groups.run(tmp_path / "two", 2, "run_train", f"{flags} --lr 0".split())
    assert printed[0].count("Base: ") == 1 and "Base: " not in printed[1]
    together = load_checkpoint(next((tmp_path / "two").glob("runs/*/last.pt")))
    assert_same(together["model"], alone["model"])
    torch.testing.assert_close(together["head"]["weight"], alone["head"]["weight"])
    more = "--freeze-epochs 1 --epochs 2 --ema 0.9 --sample-rate 0.5"
    groups.run(tmp_path / "frozen", 2, "run_train", f"{flags} {more}".split())
    state = load_checkpoint(next((tmp_path / "frozen").glob("runs/*/last.pt")))
    assert state["epoch"] == 2
    assert all(momentum.any() for momentum in momentum_of(state))


# ------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--init {base} --network r18", "has network tiny, not r18; leave --network out"),
        ("--init {base} --emb-size 512", "has emb size 16, not 512; leave --emb-size out"),
        ("--init {base} --use-se", "has use se False, not True; leave --use-se out"),
        ("--init model.onnx", "model.onnx is an ONNX model, which cannot be trained"),
        ("--init nothing.pt", "There is no checkpoint at nothing.pt"),
        ("--init {base.parent}", "There is no checkpoint at"),
        ("--freeze-epochs 2", "--freeze-epochs is for the backbone that --init names; name one"),
    ],
)
def test_what_cannot_begin_a_run_is_a_sentence(base, start, tmp_path, flags, sentence):
    code, printed, state = start(flags.format(base=base))
    assert code == 2
    assert sentence in printed
    assert "Traceback" not in printed
    assert not state and not list(tmp_path.glob("runs/*"))


def test_init_and_resume_together_are_a_sentence(base, start):
    _, _, before = start(f"--init {base} --epochs 1")
    code, printed, after = start(f"--resume --epochs 2 --init {base}")
    assert code == 2
    assert (
        "--init begins a new run, and" in printed and "leave one of --init and --resume" in printed
    )
    assert_same(after, before)
