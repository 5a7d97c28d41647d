import pytest
import torch
from torch import nn

import lfw_eval
import train
from config import Config, parse_args
from fileio.checkpoint_file import load_checkpoint
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set
from training.ema import ModelEMA
from training.event_log import read_event_frames

CPU = torch.device("cpu")


def test_the_average_follows_its_definition():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = ModelEMA(model, 0.6)
    expected = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    for step in range(12):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(step)
        average.update(step)
        d = min(0.6, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if name in expected:
                expected[name] = d * expected[name] + (1 - d) * value
    assert "1.running_mean" in expected
    torch.testing.assert_close(average.state_dict(), expected)


def test_the_network_has_the_average_for_a_block_only():
    model = nn.BatchNorm1d(2)
    average = ModelEMA(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(5)
        model.running_var.fill_(7)
    with pytest.raises(ZeroDivisionError), average.applied():
        assert model.weight.tolist() == [1, 1]
        assert model.running_var.tolist() == [1, 1]
        raise ZeroDivisionError
    assert model.weight.tolist() == [5, 5]
    assert model.running_var.tolist() == [7, 7]
    assert average.state_dict()["weight"].tolist() == [1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


def run(cwd, folder, *more):
    argv = ["--runs-dir", f"{cwd}/runs", "--images-dir", f"{cwd}/images", *more]
    if "--resume" not in more:
        argv += [*FLAGS.split(), "--train-set", str(folder), "--ema", "0.9"]
    train.main(parse_args(argv, "train"))
    return next(cwd.glob("runs/[!.]*"))


def test_a_run_with_ema_weights_resumes_to_the_bit(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
    # A schedule that does not end with the run, so that its first epoch is the same run.
    steady = ("--schedule", "step")
    straight = run(tmp_path / "straight", folder, *steady)
    printed = capsys.readouterr().out
    assert "ema valid loss" in printed
    assert "ema lfw" in printed
    broken = run(tmp_path / "broken", folder, *steady, "--epochs", "1")
    run(tmp_path / "broken", folder, "--resume", "--epochs", "2")
    states = [load_checkpoint(path / "last.pt") for path in (straight, broken)]
    for state in states:
        state["config"] = {}
    assert_same(states[1], states[0])
    assert len(states[0]["history"]["ema"]) == len(states[0]["history"]["ema_lfw"]) == 2
    tags = [
        value.tag
        for path in straight.glob("events.*")
        for _, event in read_event_frames(path.read_bytes())
        for value in event.summary.value
    ]
    assert {"valid/ema_loss", "valid/ema_accuracy", "lfw/ema_accuracy"} <= set(tags)

    # best_ema.pt: the averages, where lfw_eval.py finds weights; not a state to resume from.
    best = load_checkpoint(straight / "best_ema.pt")
    points = states[0]["history"]["ema"]
    assert best["epoch"] == max(points, key=lambda p: (p[2], -p[1], -p[0]))[0]
    if best["epoch"] == 2:
        for name, value in states[0]["ema"].items():
            assert torch.equal(best["model"][name], value)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tmp_path / "straight", folder, "--resume", str(straight / "best_ema.pt"))
    assert "is not a checkpoint of this train.py" in capsys.readouterr().err
    lfw = ["--lfw", str(folder / "lfw.bin"), "--checkpoint", str(straight / "best_ema.pt")]
    where = ["--runs-dir", f"{tmp_path}/r", "--images-dir", f"{tmp_path}/i", "--device", "cpu"]
    lfw_eval.main(parse_args([*where, *lfw], "lfw_eval"))


# ------------------------------------------------------------------------------ weight decay


def test_decay_spares_batch_normalisation_and_biases():
    torch.manual_seed(0)
    options = {"network": "tiny", "emb_size": 16, "batch_size": 8, "weight_decay": 0.1}
    engine = train.build_engine(Config(**options, decay_bn=False), 5, CPU)
    spared, decayed = engine.optimizer.param_groups
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0, 0.1)
    names = {id(p): n for n, p in engine.model.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} >= {"bn1.weight", "bn1.bias", "prelu.weight"}
    assert all(p.dim() > 1 for p in decayed["params"])
    assert decayed["params"][-1] is engine.head.weight
    assert len(spared["params"]) + len(decayed["params"]) == len(engine.parameters)
    before = engine.model.bn1.weight.detach().clone(), engine.model.conv1.weight.detach().clone()
    for parameter in engine.parameters:
        parameter.grad = torch.zeros_like(parameter)
    engine.optimizer.step()
    assert torch.equal(engine.model.bn1.weight, before[0])
    assert not torch.equal(engine.model.conv1.weight, before[1])
    (group,) = train.build_engine(Config(**options), 5, CPU).optimizer.param_groups
    assert group["weight_decay"] == 0.1
