"""ArcFace's formula against its definition with angles, its slope and its behaviour at the ends."""

import math

import numpy as np
import pytest
import torch

from heads.softmax_margins import ArcFace


def arcface_float64(cosine, label, s, m, easy):
    """The definition with angles, in float64: s·cos(θ + m) where that falls with θ."""
    logits = cosine.astype(np.float64).copy()
    for row, column in enumerate(label):
        cos = np.clip(logits[row, column], -1, 1)
        theta = np.arccos(cos)
        if easy:
            value = np.cos(theta + m) if cos > 0 else cos
        else:
            value = np.cos(theta + m) if theta + m < np.pi else cos - m * np.sin(m)
        logits[row, column] = value
    return s * logits


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("m", [0.0, 0.3, 0.5, 1.0])
def test_margin_against_the_definition_in_float64(m, easy):
    theta = np.array([0, 1e-3, 0.2, 1.0, np.pi / 2 - 1e-3, np.pi / 2 + 1e-3, 2.0])
    edge = np.pi - m
    theta = np.append(theta, [edge - 1e-3, min(edge + 1e-3, np.pi), np.pi - 1e-3, np.pi])
    cosine = np.stack([np.cos(theta), np.full(len(theta), 0.1), np.full(len(theta), -0.3)], 1)
    label = np.zeros(len(theta), np.int64)
    head = ArcFace(8, 3, margin_s=64.0, margin_m=m, easy=easy)
    logits = head.margin(torch.tensor(cosine, dtype=torch.float32), torch.from_numpy(label))
    # sqrt(1 − cos²) in float32 is off by up to sqrt(1e-7) next to θ = 0 and π.
    expected = arcface_float64(cosine, label, 64.0, m, easy)
    np.testing.assert_allclose(logits.numpy(), expected, atol=64 * 4e-4)
    np.testing.assert_array_equal(logits[:, 1:].numpy(), np.float32(cosine[:, 1:]) * 64)


def test_the_logit_falls_with_the_angle_everywhere():
    cosine = torch.linspace(1, -1, 2001)[:, None].repeat(1, 2)
    head = ArcFace(8, 2, margin_m=0.5)
    logit = head.margin(cosine, torch.zeros(2001, dtype=torch.int64))[:, 0]
    # A step where the branches meet is allowed to fall, never to rise.
    assert (logit.diff() <= 1e-3).all()


@pytest.mark.parametrize("easy", [False, True])
def test_gradient_against_finite_differences(easy):
    head = ArcFace(8, 4, margin_s=4.0, margin_m=0.5, easy=easy)
    theta = torch.tensor([0.05, 0.7, 1.5, 1.7, 2.5, 2.8, 3.1], dtype=torch.float64)
    cosine = (theta.cos()[:, None] * torch.tensor([1.0, 0.3, -0.2, 0.5])).requires_grad_()
    label = torch.zeros(7, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda c: head.margin(c, label), cosine, atol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_stay_finite_where_the_angle_is_0_or_180_degrees(sign):
    head = ArcFace(4, 3)
    embedding = (sign * head.weight.detach()[:1]).clone().requires_grad_()
    head(embedding, torch.tensor([0])).sum().backward()
    assert embedding.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_head_is_float32_under_autocast():
    head = ArcFace(16, 10)
    embedding, label = torch.randn(6, 16), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(embedding, label)
        from_bfloat16 = head(embedding.bfloat16(), label)
    assert logits.dtype == from_bfloat16.dtype == torch.float32
    torch.testing.assert_close(logits, head(embedding, label), rtol=0, atol=0)


def test_logits_ignore_the_lengths_of_embeddings_and_centres():
    head = ArcFace(16, 10)
    embedding, label = torch.randn(6, 16), torch.arange(6)
    before = head(embedding, label)
    with torch.no_grad():
        head.weight.mul_(7)
    torch.testing.assert_close(head(embedding * 1e-3, label), before, rtol=1e-4, atol=1e-3)
    assert before.abs().max() <= 64.0 * (1 + math.sin(0.5))
