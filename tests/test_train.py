import dataclasses
import itertools
import math
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from config import parse_args
from data_gen import normalise, train_batches
from fileio.checkpoint_file import load_checkpoint, save_checkpoint
from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from heads.softmax_margins import ArcFace
from models import build_model
from training import engine
from training.event_log import NullEventLog
from training.run import Run
from training.schedule import learning_rate
from training.step_errors import TrainingError

FLAGS = "--network tiny --emb-size 16 --batch-size 8 --margin-s 16 --margin-m 0.2 --dropout 0.3 "
FLAGS += "--epochs 2 --valid-fraction 0.2 --log-every 2 --device cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4 identities of 8 noisy images each."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 255, (4, 7, 7, 3))
    faces = np.clip(np.repeat(centres, 8, 0) + rng.normal(0, 20, (32, 7, 7, 3)), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    write_dataset(folder, jpegs, [i // 8 for i in range(32)])
    return folder


@pytest.fixture
def configure(folder, tmp_path):
    def make(more=""):
        argv = f"{FLAGS} --train-set {folder} --data-dir {tmp_path} --runs-dir {tmp_path}/runs "
        argv += f"--images-dir {tmp_path}/images {more}"
        return parse_args(argv.split(), "train")

    return make


def make_run(cfg):
    return train.build_run(cfg, Path(cfg.runs_dir))


# ------------------------------------------------------------------------------ the schedule


def test_step_schedule():
    def lr(epoch):
        return learning_rate(epoch, lr=0.1, epochs=32, schedule="step", milestones=(20, 28))

    assert [lr(e) for e in (0, 19.99, 20, 27.99, 28, 31.9)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_schedules_that_fall_to_zero_with_warm_up():
    options = {"lr": 0.2, "epochs": 10, "warmup_epochs": 2}
    for schedule, middle in (("cosine", 0.1), ("linear", 0.1), ("poly", 0.2 * 0.5**2)):
        values = [learning_rate(e, schedule=schedule, **options) for e in np.linspace(0, 10, 101)]
        assert values[0] == 0
        assert values[10] == pytest.approx(0.1)  # half-way through the warm-up
        assert values[20] == pytest.approx(0.2)
        assert values[60] == pytest.approx(middle)  # half-way from there to the end
        assert values[100] == pytest.approx(0, abs=1e-9)
        assert all(a >= b for a, b in itertools.pairwise(values[20:]))


# ------------------------------------------------------------------------------ one step


def test_a_step_is_sgd_on_the_arcface_loss(configure):
    cfg = configure("--no-amp --dropout 0 --clip-norm 0.5 --momentum 0.8 --weight-decay 0.01")
    run = make_run(cfg)
    torch.manual_seed(cfg.seed)
    model = build_model("tiny", 16)
    head = ArcFace(16, 4, 16.0, 0.2)
    model.load_state_dict(run.engine.model.state_dict())
    head.load_state_dict(run.engine.head.state_dict())
    parameters = [p for m in (model, head) for p in m.parameters() if p.requires_grad]
    speeds = [torch.zeros_like(p) for p in parameters]

    for number in range(2):
        images, labels = torch.randn(8, 3, 112, 112), torch.arange(8) % 4
        loss, accuracy, gradient_norm = run.train_step(images, labels, lr=0.05 / (number + 1))

        model.train()
        cosine = head.cosine(model(images))
        expected = torch.nn.functional.cross_entropy(head.margin(cosine, labels), labels)
        grads = torch.autograd.grad(expected, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert gradient_norm.item() == pytest.approx(norm.item(), rel=1e-3)
        with torch.no_grad():
            for p, g, v in zip(parameters, grads, speeds, strict=True):
                v.mul_(0.8).add_(g * min(1.0, 0.5 / norm) + 0.01 * p)
                p.sub_(0.05 / (number + 1) * v)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert accuracy.item() == (cosine.argmax(1) == labels).float().mean()
    for p, q in zip(parameters, run.engine.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_embedding_scale_is_not_trained(configure):
    run = make_run(configure())
    before = run.engine.model.features.weight.clone()
    run.train_step(torch.randn(8, 3, 112, 112), torch.arange(8) % 4, lr=0.1)
    assert torch.equal(run.engine.model.features.weight, before)


def test_bfloat16_step_is_close_to_float32(configure):
    losses, grads = [], []
    images, labels = torch.randn(16, 3, 112, 112), torch.arange(16) % 4
    for amp in (None, torch.bfloat16):
        run = make_run(configure("--dropout 0"))
        run.engine.amp = amp
        loss, _, norm = run.train_step(images, labels, lr=0.0)
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in run.engine.parameters]))
        assert norm.item() == pytest.approx(grads[-1].norm().item(), rel=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (grads[1] - grads[0]).norm() / grads[0].norm() < 0.25
    assert torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0) > 0.97


# ------------------------------------------------------------------------------ complete runs


def events(run):
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return accumulator


def only_run(cfg):
    (run,) = Path(cfg.runs_dir).iterdir()
    return run


def test_a_run_leaves_checkpoints_events_and_curves(configure, capsys, tmp_path):
    cfg = configure()
    train.main(cfg)
    run = only_run(cfg)
    last, best = load_checkpoint(run / "last.pt"), load_checkpoint(run / "best.pt")
    assert (last["epoch"], last["step"]) == (2, 0)
    assert last["config"]["network"] == "tiny"
    losses = [loss for _, loss, _ in last["history"]["valid"]]
    assert len(losses) == 2
    valid = last["history"]["valid"]
    best_epoch = max(valid, key=lambda point: (point[2], -point[1]))[0]
    assert last["best"]["epoch"] == best["epoch"] == best_epoch
    scalars = events(run).Tags()["scalars"]
    expected = {"train/loss", "train/accuracy", "train/lr", "perf/images_per_s"}
    assert expected | {"valid/loss", "valid/accuracy"} == set(scalars)
    assert "config/text_summary" in events(run).Tags()["tensors"]
    for name in ("train_loss", "train_acc", "valid_loss", "valid_acc"):
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "epoch 2/2  loss" in printed
    assert "LFW is not prepared" in printed


def test_a_stopped_run_resumes_to_what_an_uninterrupted_one_comes_to(
    configure, tmp_path, monkeypatch
):
    straight = configure()
    train.main(straight)
    expected = load_checkpoint(only_run(straight) / "last.pt")

    broken = configure(f"--runs-dir {tmp_path}/broken")
    step = Run.train_step

    def interrupted(self, *args):
        if self.global_step == 4:  # in the second epoch
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Run, "train_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main(broken)
    assert ended.value.code == 130
    monkeypatch.setattr(Run, "train_step", step)
    stopped = load_checkpoint(only_run(broken) / "last.pt")
    assert (stopped["epoch"], stopped["step"]) == (1, 2)

    # Nothing but --resume: the rest of the configuration comes from the run.
    train.main(parse_args(["--resume", "--runs-dir", f"{tmp_path}/broken"], "train"))
    actual = load_checkpoint(only_run(broken) / "last.pt")
    for part in ("model", "head"):
        for name, tensor in expected[part].items():
            assert torch.equal(tensor, actual[part][name]), name
    assert actual["history"]["valid"] == expected["history"]["valid"]
    points = [e.step for e in events(only_run(broken)).Scalars("train/loss")]
    assert points == [2, 3, 5, 6]  # none doubled or missing


def test_resume_refuses_what_would_be_another_run(configure, capsys, tmp_path):
    train.main(configure("--epochs 1"))
    for more, text in (
        ("--network r18", "--network (it has tiny)"),
        ("--seed 3 --lr 0.05", "--seed (it has 0), --lr (it has 0.1)"),
        ("--milestones 1", "--milestones (it has (20, 28))"),
    ):
        with pytest.raises(SystemExit) as ended:
            train.main(configure(f"--epochs 1 --resume {more}"))
        assert ended.value.code == 2
        assert text in capsys.readouterr().err
    run = only_run(configure())
    before = (run / "last.pt").read_bytes()
    train.main(configure("--epochs 1 --resume"))  # draws the curves again, and that is all
    assert "has its 1 epochs" in capsys.readouterr().out
    assert (run / "last.pt").read_bytes() == before
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        train.main(configure(f"--resume {tmp_path}/other.pt"))
    assert "not a PyTorch checkpoint" in capsys.readouterr().err


def test_more_epochs_may_follow(configure):
    train.main(configure("--epochs 1"))
    cfg = configure("--epochs 3 --resume")
    train.main(cfg)
    history = load_checkpoint(only_run(cfg) / "last.pt")["history"]
    assert [point[0] for point in history["valid"]] == [1, 2, 3]
    # TensorBoard keeps the point that the first part ended with.
    assert [e.step for e in events(only_run(cfg)).Scalars("valid/loss")] == [3, 6, 9]


def test_a_loss_that_is_not_finite_stops_and_names_the_records(configure, capsys, monkeypatch):
    cfg = configure()
    step = Run.train_step

    def poisoned(self, images, labels, lr):
        if self.global_step == 5:
            images = images * math.nan
        return step(self, images, labels, lr)

    monkeypatch.setattr(Run, "train_step", poisoned)
    with pytest.raises(SystemExit) as ended:
        train.main(cfg)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    run = make_run(cfg)
    batches = train_batches(
        run.store, run.train_positions, batch_size=8, seed=0, epoch=1, first_step=2
    )
    batch = next(batches)
    records = run.store.record_ids(batch.positions)
    assert (
        f"loss is nan at epoch 2, step 3 of 3 (loss nan, lr 0.1, scale 16), on records {records}"
        in error
    )
    # last.pt is the state before, and still good.
    state = load_checkpoint(only_run(cfg) / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["model"].values())
    # The batch is as the network saw it, mirrored where it was.
    bad = load_checkpoint(only_run(cfg) / "bad_batch.pt")
    assert torch.equal(normalise(bad["images"]), batch.images)
    assert torch.equal(bad["labels"], batch.labels)
    assert (bad["records"], bad["step"], bad["epoch"], bad["lr"]) == (records, 2, 1, 0.1)
    assert math.isnan(bad["loss"])
    assert bad["random"]["cpu"].dtype == torch.uint8


def test_weights_that_are_not_finite_are_not_saved(configure, tmp_path):
    run = make_run(configure())
    with torch.no_grad():
        run.engine.parameters[0].fill_(math.inf)
    with pytest.raises(TrainingError, match="not finite"):
        run.save("last.pt")
    assert not list(tmp_path.rglob("last.pt"))


def test_sentences_for_sets_that_cannot_be_trained_on(configure, capsys, tmp_path):
    cfg = configure()
    for train_set, text in (
        (tmp_path / "nowhere", "make demo"),
        (tmp_path / "one", "one identity"),
    ):
        if text == "one identity":
            write_dataset(train_set, [encode_jpeg(np.zeros((112, 112, 3), np.uint8))] * 3, [0] * 3)
        with pytest.raises(SystemExit) as ended:
            train.main(dataclasses.replace(cfg, train_set=str(train_set)))
        assert ended.value.code == 2
        assert text in capsys.readouterr().err


def test_focal_loss_and_an_option_reach_the_engine(configure):
    run = make_run(configure("--focal-loss 1.5 --margin-option easy=1"))
    assert run.engine.criterion.gamma == 1.5
    assert run.engine.head.easy
    assert isinstance(make_run(configure()).engine.criterion, torch.nn.CrossEntropyLoss)


def test_a_network_that_does_not_exist_is_a_sentence(configure, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(configure("--network mobilefacenet --use-se"))
    assert ended.value.code == 2
    assert "leave --use-se out" in capsys.readouterr().err


def test_compile_without_a_compiler_is_a_sentence(configure, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as ended:
        train.main(configure("--compile on"))
    assert ended.value.code == 2
    assert "C++ compiler" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once_and_saves_no_half_step(configure, capsys, monkeypatch):
    def impatient(self, *args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C did not stop it")

    cfg = configure()
    monkeypatch.setattr(Run, "train_step", impatient)
    with pytest.raises(SystemExit) as ended:
        train.main(cfg)
    assert ended.value.code == 130
    state = load_checkpoint(only_run(cfg) / "last.pt")
    assert (state["epoch"], state["step"]) == (0, 0)


@pytest.mark.parametrize(
    ("asked", "steps", "decided"),
    [("auto", 1999, "off"), ("auto", 2000, "on"), ("on", 1, "on"), ("off", 10**6, "off")],
)
def test_long_runs_are_compiled(asked, steps, decided, monkeypatch):
    monkeypatch.setattr(engine.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert engine.choose_compile(asked, torch.device("cpu"), steps) == decided


def test_a_long_run_without_a_compiler_is_not_compiled(monkeypatch, capsys):
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    assert engine.choose_compile("auto", torch.device("cpu"), 10**6) == "off"
    assert "faster with a C++ compiler" in capsys.readouterr().out


def test_a_compiled_run_resumes_without_a_compiler(configure, tmp_path, capsys, monkeypatch):
    """On another machine: uncompiled, said so, as a run that never was compiled."""
    cfg = configure("--epochs 1")
    train.main(cfg)
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    weights = []
    for compiled in ("off", "on"):
        folder = shutil.copytree(only_run(cfg), tmp_path / compiled)
        state = load_checkpoint(folder / "last.pt")
        state["config"]["compile"] = compiled
        save_checkpoint(folder / "last.pt", state)
        capsys.readouterr()
        train.main(parse_args(f"--resume {folder} --epochs 2".split(), "train"))
        said = "The run began compiled and goes on uncompiled." in capsys.readouterr().out
        assert said == (compiled == "on")
        weights.append(load_checkpoint(folder / "last.pt")["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_failing_step_leaves_no_loader_thread(configure, monkeypatch):
    """The garbage collector would join it, perhaps inside another thread's start: a deadlock."""
    run = make_run(configure("--cache none"))
    alive = []

    def fail(*_):
        alive.extend(t.name for t in threading.enumerate() if t.name.startswith("prefetch"))
        raise ValueError("a bug")

    monkeypatch.setattr(run, "train_step", fail)
    with pytest.raises(ValueError, match="a bug") as error:  # which keeps the frames alive
        run.train_one_epoch(NullEventLog())
    assert alive  # it does load ahead
    assert not [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]
    del error
