"""Each margin against its paper's equation in float64 NumPy, and in training."""

import math
import typing

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import config
import lfw_eval
import train
from config import Config, parse_args
from fileio.checkpoint_file import load_checkpoint
from focal_loss import FocalLoss
from heads.partial_fc import PartialFC
from heads.registry import HEADS, build_head
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set
from utils import UserError

CLASSES, EMB, PI = 5, 8, math.pi
SHARDABLE = ["norm_softmax", "sphereface", "cosface", "arcface", "combined"]
# Angles between an embedding and its class: the ends, ordinary ones, and both sides of every
# branch: θ + m = π for the margins here, θ·1.5 = π, the cosines of the other classes.
ANGLES = [0, 1e-3, 0.05, 0.3, 0.7, 1.2, PI / 2, 1.9, 2.3, PI / 1.5, PI - 0.05, PI - 1e-3, PI]
ANGLES += [PI - m + side for m in (0.3, 0.4, 0.45, 0.5, 0.55, 0.8) for side in (-2e-3, 2e-3)]
ANGLES += [PI / 1.5 - 2e-3, PI / 1.5 + 2e-3, 0.35, 0.45]
LENGTHS = [0.5, 9.9, 10.1, 20.0, 35.0, 60.0, 109.0, 111.0, 250.0]


def make_head(name, **more):
    """A head with its defaults, random centres and a state as after some batches."""
    _, margin_s, margin_m, _ = config.MARGINS[name]
    torch.manual_seed(2)
    scale = {"margin_s": more.pop("margin_s", margin_s), "margin_m": more.pop("margin_m", margin_m)}
    head = build_head(name, EMB, CLASSES, **scale, options=more).double().eval()
    with torch.no_grad():
        head.weight.mul_(100)
        for key, value in head.named_buffers():
            if key == "memory":
                value.copy_(torch.randn(CLASSES, EMB))
                value[3] = 0  # an identity that has not been seen
            else:
                value.fill_({"t": 0.3, "mean": 22.0, "deviation": 8.0}[key])
        if name == "softmax":
            head.bias.copy_(torch.randn(CLASSES))
    return head


def problem(head):
    """Embeddings (N, EMB) at the ANGLES from their classes' centres and of the LENGTHS, labels."""
    rng = np.random.default_rng(4)
    label = np.arange(len(ANGLES)) % CLASSES
    centre = head.weight.detach().numpy()[label * (len(head.weight) // CLASSES)]
    centre = centre / np.linalg.norm(centre, axis=1, keepdims=True)
    side = rng.normal(size=centre.shape)
    side -= (side * centre).sum(1, keepdims=True) * centre
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    angle = np.array(ANGLES)[:, None]
    length = np.resize(LENGTHS, len(angle))[:, None]
    rows = length * (np.cos(angle) * centre + np.sin(angle) * side)
    return torch.from_numpy(rows), torch.from_numpy(label)


# ------------------------------------------------------------------------------ the oracle


def arc_continued(theta, m):
    return np.cos(theta + m) if theta + m < PI else np.cos(theta) - m * np.sin(m)


def softmax_loss(logits, y):
    return np.logaddexp.reduce(np.array(logits)) - logits[y]


def oracle(name, head, x, y):
    """The loss of one embedding x (EMB,) of class y, straight from the equations."""
    _, s, m, _ = config.MARGINS[name]
    weight = head.weight.detach().numpy()
    length = np.linalg.norm(x)
    if name == "softmax":
        return softmax_loss(weight @ x + head.bias.detach().numpy(), y)
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    cosines = np.clip(unit @ (x / length), -1, 1)
    if name == "subcenter":
        cosines = np.array([max(cosines[3 * j : 3 * j + 3]) for j in range(CLASSES)])
    theta = np.arccos(cosines)
    others = [j for j in range(CLASSES) if j != y]
    if name == "sphereface2":
        b, g = head.bias.item(), 2 * ((cosines + 1) / 2) ** 3 - 1
        own = np.logaddexp(0, -s * (g[y] - m) - b)
        rest = sum(np.logaddexp(0, s * (g[j] + m) + b) for j in others)
        return 50 * (0.7 / s * own + 0.3 / s * rest)
    if name == "uniface":
        b = head.threshold.item()
        own = np.logaddexp(0, -s * (cosines[y] - m) + b)
        return own + sum(np.logaddexp(0, s * cosines[j] - b) for j in others)
    logits = s * cosines
    extra = 0.0
    if name in ("cosface", "elastic_cos", "unitsface"):
        logits[y] = s * (np.cos(theta[y]) - m)
    elif name in ("arcface", "elastic_arc", "subcenter"):
        logits[y] = s * arc_continued(theta[y], m)
    elif name == "sphereface":
        logits[y] = s * np.cos(min(m * theta[y], PI))
    elif name == "combined":
        phi = 1.0 * theta[y] + m
        logits[y] = s * ((np.cos(phi) if phi < PI else -np.cos(phi) - 2) - 0.2)
    elif name == "curricularface":
        target = arc_continued(theta[y], m)
        for j in others:
            if cosines[j] > target:
                logits[j] = s * cosines[j] * (0.3 + cosines[j])
        logits[y] = s * target
    elif name == "magface":
        a = min(max(length, 10), 110)
        logits[y] = s * arc_continued(theta[y], 0.45 + (0.8 - 0.45) * (a - 10) / (110 - 10))
        extra = 35 * (a / 110**2 + 1 / a)
    elif name == "adaface":
        z = np.clip((min(max(length, 1e-3), 100) - 22) / (8 + 1e-3) * 0.333, -1, 1)
        shifted = min(max(theta[y] - m * z, 0), PI)
        logits[y] = s * (np.cos(shifted) - (m * z + m))
    if name == "unitsface":
        b, memory = head.threshold.item(), head.memory.numpy()
        between = {
            j: memory[j] @ x / length / np.linalg.norm(memory[j])
            for j in range(CLASSES)
            if memory[j].any()
        }
        if y in between:
            extra += np.logaddexp(0, -s * (between[y] - 0.1) + b)
        extra += sum(np.logaddexp(0, s * c - b) for j, c in between.items() if j != y)
    return softmax_loss(logits, y) + extra


def losses(head, rows, label, criterion=None):
    """The loss of each row by itself."""
    criterion = criterion or nn.CrossEntropyLoss()
    pairs = zip(rows.split(1), label.split(1), strict=True)
    return np.array([head.loss(row, one, criterion).loss.item() for row, one in pairs])


@pytest.mark.parametrize("name", HEADS)
def test_against_the_equations_in_float64(name):
    head = make_head(name)
    rows, label = problem(head)
    pairs = zip(rows.numpy(), label.tolist(), strict=True)
    expected = np.array([oracle(name, head, x, y) for x, y in pairs])
    assert np.ptp(expected) > 1  # the angles make a difference
    # What keeps the root's slope finite moves an angle of 0 or π by 3e-4.
    at_end = np.minimum(ANGLES, PI - np.array(ANGLES)) < 0.01
    errors = {}
    for dtype in (torch.float64, torch.float32):
        actual = losses(head.to(dtype), rows.to(dtype), label)
        errors[dtype] = np.abs(actual - expected) / head.margin_s
        scale = max(1, np.abs(expected).max() / 100 / head.margin_s)
        assert errors[dtype][at_end].max() < 4e-4 * scale
    assert errors[torch.float64][~at_end].max() < 1e-12
    assert errors[torch.float32][~at_end].max() < 2e-5 * scale
    print(
        f"\n{name}: largest error, in units of s: float32 {errors[torch.float32].max():.1e} "
        f"({errors[torch.float32][~at_end].max():.1e} away from 0 and π), "
        f"float64 {errors[torch.float64].max():.1e} ({errors[torch.float64][~at_end].max():.1e})"
    )


@pytest.mark.parametrize("name", [n for n in HEADS if n != "sphereface"])
def test_gradients_against_finite_differences(name):
    head = make_head(name)
    if head.margin_s > 8:
        head.margin_s = 8.0  # so that no probability is zero
    rows, label = problem(head)
    rows = rows.requires_grad_()
    criterion = nn.CrossEntropyLoss(reduction="sum")

    def loss(rows, *parameters):
        return head.loss(rows, label, criterion).loss

    if name == "adaface":  # it takes no gradient by the length, which a finite difference does
        lengths = rows.detach().norm(dim=1)
        head.margin = lambda c, y, _, margin=head.margin: margin(c, y, lengths)
    assert torch.autograd.gradcheck(loss, (rows, *head.parameters()), atol=1e-4, rtol=1e-3)


def test_spherefaces_gradient_is_that_of_the_cosine():
    head = make_head("sphereface")
    head.margin_s = 8.0
    rows, label = problem(head)
    inside = 1 - 1e-12  # at the very ends the clamp has no slope, and the angle none to give
    cosine = head.cosine(rows).detach().clamp(-inside, inside).requires_grad_()
    true = F.one_hot(label, CLASSES)
    logits = head.margin(cosine, label)
    F.cross_entropy(logits, label, reduction="sum").backward()
    torch.testing.assert_close(cosine.grad, 8 * (logits.detach().softmax(1) - true))
    assert not torch.allclose(logits.detach(), 8 * cosine.detach())


@pytest.mark.parametrize("name", HEADS)
def test_no_nan_at_the_ends_in_float32_and_under_autocast(name):
    head = make_head(name, margin_s=1000.0).float().train()
    with torch.no_grad():
        head.weight.copy_(F.normalize(head.weight))
    rows, label = problem(head)
    ends = torch.cat([head.weight.detach(), -head.weight.detach(), 1e-20 * rows[:1], 0 * rows[:1]])
    per_class = len(head.weight) // CLASSES
    label = torch.cat([torch.arange(len(head.weight)) // per_class] * 2 + [label[:1]] * 2)
    rows = ends.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = head.loss(rows, label, nn.CrossEntropyLoss())
        again = make_head(name).float()(rows.bfloat16(), label)
    result.loss.backward()
    assert result.loss.dtype == again.dtype == torch.float32
    assert all(v.isfinite().all() for v in (result.loss, rows.grad, again, *head.buffers()))
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_arcface_is_the_formula_with_python_numbers_to_the_bit():
    torch.manual_seed(0)
    head = build_head("arcface", EMB, CLASSES, margin_s=64.0, margin_m=0.5)
    rows, label = torch.randn(20, EMB), torch.arange(20) % CLASSES
    cosine = F.linear(F.normalize(rows), F.normalize(head.weight))
    true = cosine.gather(1, label[:, None])
    sine = (1 - true * true).clamp(min=1e-7).sqrt()
    shifted = true * math.cos(0.5) - sine * math.sin(0.5)
    shifted = torch.where(true > -math.cos(0.5), shifted, true - 0.5 * math.sin(0.5))
    logits = cosine.scatter(1, label[:, None], shifted) * 64
    assert torch.equal(head(rows, label), logits)
    result = head.loss(rows, label, nn.CrossEntropyLoss())
    assert torch.equal(result.loss, F.cross_entropy(logits, label))
    assert result.num_correct == (cosine.argmax(1) == label).sum()
    assert result.count == 20


# ------------------------------------------------------------------------------ details


def test_the_combined_margin_with_all_three():
    head = make_head("combined", margin_m=0.4, m1=1.35, m3=0.15)
    theta = torch.linspace(0, PI, 400, dtype=torch.float64)
    cosine = theta.cos()[:, None].repeat(1, 2)
    logit = head.margin(cosine, torch.zeros(400, dtype=torch.int64))[:, 0] / 64
    phi = 1.35 * theta + 0.4
    expected = torch.where(phi < PI, phi.cos(), -2 - phi.cos()) - 0.15
    torch.testing.assert_close(logit, expected, atol=1e-3, rtol=0)
    assert (logit.diff() <= 1e-9).all()  # it never rises with the angle


def test_curricular_faces_t_follows_the_batches_in_training_only():
    head = make_head("curricularface")
    rows, label = problem(head)
    head.loss(rows, label, nn.CrossEntropyLoss())
    assert head.t.item() == 0.3
    head.train().loss(rows, label, nn.CrossEntropyLoss())
    assert head.t.item() == pytest.approx(0.99 * 0.3 + 0.01 * np.cos(ANGLES).mean())


def test_ada_faces_statistics_follow_the_batches_in_training_only():
    head = make_head("adaface")
    rows, label = problem(head)
    head.loss(rows, label, nn.CrossEntropyLoss())
    assert (head.mean.item(), head.deviation.item()) == (22, 8)
    lengths = np.clip(np.resize(LENGTHS, len(rows)), 0.001, 100)
    head.train().loss(rows, label, nn.CrossEntropyLoss())
    assert head.mean.item() == pytest.approx(0.99 * 22 + 0.01 * lengths.mean())
    assert head.deviation.item() == pytest.approx(0.99 * 8 + 0.01 * lengths.std(ddof=1))
    head.loss(rows[:1], label[:1], nn.CrossEntropyLoss())  # a batch of one has no deviation
    assert head.deviation.isfinite()


@pytest.mark.parametrize("name", ["elastic_arc", "elastic_cos"])
def test_elastic_margins_are_random_per_image(name):
    head = make_head(name, std=0.05).train()
    cosine = torch.full((4000, CLASSES), math.cos(1.0), dtype=torch.float64)
    label = torch.zeros(4000, dtype=torch.int64)
    torch.manual_seed(1)
    logits = head.margin(cosine, label) / 64
    torch.manual_seed(1)
    assert torch.equal(head.margin(cosine, label) / 64, logits)
    margins = logits[:, 0].acos() - 1 if name == "elastic_arc" else math.cos(1.0) - logits[:, 0]
    assert margins.mean().item() == pytest.approx(config.MARGINS[name].margin, abs=0.004)
    assert margins.std().item() == pytest.approx(0.05, rel=0.05)
    torch.testing.assert_close(logits[:, 1:], cosine[:, 1:])
    state = torch.get_rng_state()
    head.eval().margin(cosine, label)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing


def test_a_sub_centre_takes_the_gradient_alone():
    head = make_head("subcenter")
    rows, label = torch.randn(6, EMB).double(), torch.arange(6) % CLASSES
    assert head.weight.shape == (CLASSES * 3, EMB)
    head.cosine(rows)[torch.arange(6), label].sum().backward()
    assert ((head.weight.grad.reshape(CLASSES, 3, EMB) != 0).any(2).sum(1) <= 2).all()


def test_sphereface2_starts_at_the_bias_where_its_loss_is_smallest():
    head = build_head("sphereface2", EMB, 50, margin_s=40.0, margin_m=0.4).double()

    def at(bias):
        with torch.no_grad():
            head.bias.fill_(bias)
            zeros = torch.zeros(1, 50, dtype=torch.float64)
            return float(head._loss(zeros, zeros, torch.tensor([3]), None))

    start = head.bias.item()
    assert at(start) < min(at(start - 0.1), at(start + 0.1))


def test_unitsface_remembers_the_last_embedding_of_each_identity():
    torch.manual_seed(0)
    head = build_head("unitsface", EMB, CLASSES, margin_s=64.0, margin_m=0.4)
    rows, label = torch.randn(5, EMB), torch.tensor([1, 0, 1, 4, 1])
    first = head.loss(rows, label, nn.CrossEntropyLoss()).loss
    assert torch.equal(first, F.cross_entropy(head(rows, label), label))  # nothing seen before
    assert torch.equal(head.memory[[0, 1, 4]], rows[[1, 4, 3]])
    assert not head.memory[[2, 3]].any()
    assert head.loss(rows, label, nn.CrossEntropyLoss()).loss > first
    before = head.memory.clone()
    head.eval().loss(rows.flip(0), label, nn.CrossEntropyLoss())
    assert torch.equal(head.memory, before)


@pytest.mark.parametrize("name", [n for n in HEADS if HEADS[n].is_softmax])
def test_focal_weighting_on_top_of_every_softmax(name):
    head = make_head(name)
    rows, label = problem(head)
    plain = losses(head, rows, label)
    none = losses(head, rows, label, lambda logits, _: logits.sum() * 0)  # what is no softmax
    cross_entropy = plain - none
    expected = (1 - np.exp(-cross_entropy)) ** 2 * cross_entropy + none
    np.testing.assert_allclose(losses(head, rows, label, FocalLoss(2.0)), expected, atol=1e-9)


# ------------------------------------------------------------------------------ settings


def test_the_choices_are_the_registry():
    hint = typing.get_type_hints(Config)["margin"]
    assert typing.get_args(hint) == tuple(HEADS) == tuple(config.MARGINS)
    for name, head in HEADS.items():
        assert set(head.options) == set(config.MARGINS[name].options)


def test_each_margin_has_its_own_defaults_and_the_command_line_goes_first():
    cfg = parse_args(["--margin", "cosface"], "train")
    assert (cfg.margin_s, cfg.margin_m) == (64.0, 0.35)
    cfg = parse_args(["--margin", "sphereface", "--margin-m", "1.7"], "train")
    assert (cfg.margin_s, cfg.margin_m) == (30.0, 1.7)
    assert set(cfg.given) == {"margin", "margin_m"}


# ------------------------------------------------------------------------------ sharded


@pytest.mark.parametrize("name", SHARDABLE)
def test_the_sharded_head_equals_the_dense_one(name):
    head = make_head(name).float()
    rows, label = (x[3:10] for x in problem(head))
    sharded = PartialFC(EMB, CLASSES, head.margin, chunk=16)
    sharded.weight.data.copy_(head.weight)
    results = []
    for loss in (
        lambda rows: head.loss(rows, label, nn.CrossEntropyLoss()),
        lambda rows: sharded.loss(rows, label, nn.CrossEntropyLoss(), len(label)),
    ):
        leaf = rows.float().clone().requires_grad_()
        result = loss(leaf)
        result.loss.backward()
        results.append((result.loss.detach(), result.num_correct, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sharded.weight.grad, head.weight.grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


def make_run(folder, *more):
    argv = FLAGS.replace("--margin-s 16 --margin-m 0.2 ", "").split()
    cfg = parse_args([*argv, "--train-set", str(folder), *more], "train")
    return train.build_run(cfg, folder)


def steps(run, count):
    generator = torch.Generator().manual_seed(run.step)
    run.engine.train()
    results = []
    for _ in range(count):
        images = torch.randn(8, 3, 112, 112, generator=generator)
        results.append(run.train_step(images, torch.arange(8) % 4, 0.01))
        run.step += 1
    return results


@pytest.mark.parametrize("name", HEADS)
def test_trains_and_resumes_from_its_checkpoint_to_the_bit(name, folder, tmp_path):
    run = make_run(folder, "--margin", name)
    before = [p.detach().clone() for p in run.engine.head.parameters()]
    steps(run, 2)
    for parameter, old in zip(run.engine.head.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
    loss, accuracy = run.validate()
    assert math.isfinite(loss)
    assert 0 <= accuracy <= 1
    run.folder = tmp_path
    run.save("last.pt")
    expected = steps(run, 2)
    other = make_run(folder, "--margin", name)
    other.load_state_dict(load_checkpoint(tmp_path / "last.pt"), tmp_path / "last.pt")
    actual = steps(other, 2)
    assert_same(actual, expected)
    assert_same(other.engine.state_dict(), run.engine.state_dict())


def test_a_run_is_evaluated_and_resumed_by_the_scripts(folder, tmp_path, capsys, monkeypatch):
    name = "curricularface"
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
    where = ["--runs-dir", f"{tmp_path}/runs", "--images-dir", f"{tmp_path}/images"]
    argv = [*FLAGS.split(), "--train-set", str(folder), "--epochs", "1", "--margin", name, *where]
    train.main(parse_args(argv, "train"))
    with pytest.raises(SystemExit):
        train.main(
            parse_args([*where, "--resume", "--epochs", "2", "--margin", "arcface"], "train")
        )
    assert f"another --margin (it has {name})" in capsys.readouterr().err
    train.main(parse_args([*where, "--resume", "--epochs", "2"], "train"))
    lfw = ["--lfw", str(folder / "lfw.bin"), "--device", "cpu"]
    lfw_eval.main(parse_args([*where, *lfw], "lfw_eval"))
    assert "ccuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "text"),
    [
        *(
            (f"--margin {name} --sample-rate 0.5", "needs all identities in one process")
            for name in HEADS
            if name not in SHARDABLE
        ),
        ("--margin uniface --focal-loss", "has a loss of its own"),
        ("--margin norm_softmax --margin-m 0.1", "has no margin"),
        ("--margin-s 0", "above zero"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(more, text, folder):
    with pytest.raises(UserError, match=text):
        make_run(folder, *more.split())


@pytest.mark.parametrize("name", SHARDABLE)
def test_sampled_classes_train_too(name, folder):
    run = make_run(folder, "--margin", name, "--sample-rate", "0.5")
    assert all(value.isfinite() for step in steps(run, 2) for value in step)
