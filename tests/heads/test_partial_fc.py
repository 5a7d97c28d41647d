"""The sharded head against the dense one, in groups of 1, 2 and 4 processes."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fileio.checkpoint_file import load_checkpoint
from focal_loss import FocalLoss
from heads.partial_fc import PartialFC, _initial_rows
from heads.softmax_margins import ArcFace
from tests.helpers.host_waits import HostWaits

CLASSES, EMB = 11, 6  # 11 classes: shards of different sizes for any number of processes


def dense(embedding, label, criterion, margin, weight):
    """Loss, gradients of the embedding and the weight, and how many are right, the plain way."""
    embedding = embedding.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    cosine = F.linear(F.normalize(embedding), F.normalize(weight))
    loss = criterion(margin(cosine, label), label)
    loss.backward()
    return loss.detach(), embedding.grad, weight.grad, (cosine.argmax(1) == label).sum()


def curricular(cosine, label):
    """A margin whose other logits depend on the true class's cosine (Huang et al., 2004.00288)."""
    true = cosine.gather(1, label[:, None])
    with_margin = true * np.cos(0.5) - (1 - true * true).clamp(min=1e-7).sqrt() * np.sin(0.5)
    others = torch.where(cosine > with_margin, cosine * (0.3 + cosine), cosine)
    return others.scatter(1, label[:, None], with_margin) * 16


def coupled(cosine, label):
    """Another, with a gradient from the other logits to the true class's cosine."""
    true = cosine.gather(1, label[:, None])
    return (cosine * (1 + 0.1 * true)).scatter(1, label[:, None], true - 0.35) * 16


MARGINS = {
    "arcface": ArcFace(EMB, 0, 32.0, 0.5).margin,
    "curricular": curricular,
    "coupled": coupled,
}


def problem(labels):
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(len(labels), EMB, generator=generator)
    return embedding, torch.tensor(labels), torch.randn(CLASSES, EMB, generator=generator)


def relative(actual, expected):
    """The error's norm over the norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("ranks", [0, 1, 2, 4])
def test_equal_to_the_dense_head(groups, tmp_path, ranks):
    worst = {"loss": 0.0, "embedding": 0.0, "weight": 0.0}
    # Labels of every shard, of one shard only (the others have no positive), and a batch that the
    # processes cannot share evenly.
    batches = ([0, 3, 7, 10, 10, 2, 5, 8], [0, 1, 0, 1, 0, 1, 0, 1], [4, 9, 1, 4, 6, 0, 2])
    orders = list(itertools.product(batches, MARGINS, (0.0, 2.0)))
    groups.run(tmp_path, ranks, "sharded_heads", orders)
    for number, (labels, margin, gamma) in enumerate(orders):
        criterion = FocalLoss(gamma) if gamma else nn.CrossEntropyLoss()
        embedding, label, weight = problem(labels)
        expected = dense(embedding, label, criterion, MARGINS[margin], weight)
        result = load_checkpoint(tmp_path / "results.pt")[str(number)]
        assert result["num_correct"] == expected[3]
        errors = [relative(result["loss"], expected[0]), relative(result["embedding"], expected[1])]
        errors.append(relative(result["weight"], expected[2]))
        worst = {k: max(v, e) for (k, v), e in zip(worst.items(), errors, strict=True)}
    print(ranks, worst)
    assert max(worst.values()) < 1e-6


def test_chunks_make_no_difference():
    embedding, label, weight = problem([0, 3, 7, 10, 10, 2, 5, 8])
    results = []
    for chunk in (1, 8, 24, 1 << 20):
        head = PartialFC(EMB, CLASSES, MARGINS["arcface"], chunk=chunk)
        head.weight.data.copy_(weight)
        rows = embedding.clone().requires_grad_()
        result = head.loss(rows, label, nn.CrossEntropyLoss(), len(label))
        result.loss.backward()
        results.append([result.loss.detach(), rows.grad, head.weight.grad])
    for other in results[1:]:
        assert all(relative(a, b) < 1e-6 for a, b in zip(other, results[0], strict=True))


def test_the_softmax_is_never_in_one_piece(monkeypatch):
    sizes = []
    normalise = F.normalize
    monkeypatch.setattr(F, "normalize", lambda x, *a: (sizes.append(x.shape[0]), normalise(x))[1])
    head = PartialFC(4, 1000, MARGINS["arcface"], chunk=400)
    head.loss(torch.randn(8, 4), torch.arange(8), nn.CrossEntropyLoss(), 8).loss.backward()
    assert max(sizes) == 50  # 8 rows of 50 classes make 400 logits


def test_initial_weights_are_those_of_the_dense_head():
    for classes, emb in ((7, 5), (70_000, 3), (65_536, 2), (65_540, 4)):
        torch.manual_seed(3)
        expected = ArcFace(emb, classes).weight
        after = torch.rand(1)
        bounds = (0, classes // 3, classes // 2, classes)
        for low, high in itertools.pairwise(bounds):
            torch.manual_seed(3)
            assert torch.equal(_initial_rows(classes, emb, slice(low, high)), expected[low:high])
            assert torch.equal(torch.rand(1), after)  # what comes next is the same, too


# ------------------------------------------------------------------------------ sampled


def test_a_sample_holds_the_batch_and_is_reproducible():
    head = PartialFC(4, 1000, MARGINS["arcface"], sample_rate=0.1, seed=5)
    label = torch.tensor([3, 999, 500, 3])
    head.sample(label, 4, 7)
    assert len(head.sampled) == 100
    assert torch.isin(label, head.sampled).all()
    assert torch.equal(head.sampled, head.sampled.unique())
    first = head.sampled
    head.sample(label, 4, 8)
    assert not torch.equal(head.sampled, first)
    head.sample(label, 4, 7)
    assert torch.equal(head.sampled, first)
    many = torch.arange(300)  # more positives than a tenth: all of them, and nothing else
    head.sample(many, 300, 9)
    assert torch.equal(head.sampled, many)


def test_a_sample_is_the_plain_one():
    """The batch's classes, then those with the highest random priority: written with masks."""
    head = PartialFC(4, 200, MARGINS["arcface"], sample_rate=0.1, seed=5)
    head.shard = slice(100, 300)  # of 400 classes; NO_LABEL and other shards' labels are not chosen
    for step, labels in enumerate(([-1, 3, 100, 299, 150, 150, 399], range(80, 320, 3))):
        label = torch.tensor(labels)
        generator = torch.Generator()
        seeds = np.random.default_rng([5, 3, step, 0])
        generator.manual_seed(int(seeds.integers(2**63)))
        priority = torch.rand(200, generator=generator)
        own = label[(label >= 100) & (label < 300)] - 100
        priority[own] = 2
        count = max(20, len(own.unique()))
        head.sample_classes(label, step)
        assert torch.equal(head.sampled, priority.topk(count).indices.sort().values)


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_a_gpu_would_never_have_the_host_wait(rate):
    head = PartialFC(EMB, 1000, MARGINS["arcface"], sample_rate=rate)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    embedding, label = torch.randn(6, EMB, requires_grad=True), torch.arange(6) * 7
    with HostWaits() as waits:
        head.sample(label, 8, 0)
        head.loss(embedding, label, nn.CrossEntropyLoss(), 8).loss.backward()
        optimizer.step()
        head.update(optimizer)
    assert not waits.operations
    with HostWaits() as waits:  # what the count would find
        float(embedding.detach()[label > 2].sum())
        head.weight.new_tensor([60.0, -60.0])
    assert waits.operations.total() >= 2


def test_a_sampled_step_is_the_dense_step_on_its_rows_and_leaves_the_others():
    torch.manual_seed(0)
    head = PartialFC(EMB, 50, MARGINS["arcface"], sample_rate=0.2)
    weight, speed = head.weight.detach().clone(), torch.randn(50, EMB)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = torch.optim.SGD(head.parameters(), **options)
    momentum = optimizer.state[head.weight]["momentum_buffer"] = speed.clone()
    embedding, label = torch.randn(6, EMB), torch.tensor([1, 8, 8, 30, 44, 49])
    head.sample(label, 6, 0)
    rows = head.sampled.clone()
    result = head.loss(embedding, label, nn.CrossEntropyLoss(), 6)
    result.loss.backward()
    optimizer.step()  # without a gradient it leaves the weight alone
    head.update(optimizer)

    rows_of_labels = torch.searchsorted(rows, label)
    expected = dense(
        embedding, rows_of_labels, nn.CrossEntropyLoss(), MARGINS["arcface"], weight[rows]
    )
    torch.testing.assert_close(result.loss.detach(), expected[0])
    new_speed = speed.clone()
    new_speed[rows] = 0.9 * speed[rows] + expected[2] + 0.01 * weight[rows]
    new_weight = weight.clone()
    new_weight[rows] -= 0.1 * new_speed[rows]
    torch.testing.assert_close(momentum, new_speed)
    torch.testing.assert_close(head.weight.detach(), new_weight)
    others = ~torch.isin(torch.arange(50), rows)
    assert torch.equal(head.weight[others], weight[others])
    assert head.sampled is None
