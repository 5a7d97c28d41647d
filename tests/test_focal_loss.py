import math

import pytest
import torch
import torch.nn.functional as F

from focal_loss import FocalLoss


def test_gamma_zero_is_cross_entropy():
    logits, label = torch.randn(8, 5), torch.arange(8) % 5
    assert torch.allclose(FocalLoss(0)(logits, label), F.cross_entropy(logits, label))


def test_against_a_hand_computed_case():
    # p = 3/4 and p = 1/4 by softmax of (log 3, 0): each sample has its own weight.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    label = torch.tensor([0, 1])
    expected = (0.25**2 * -math.log(0.75) + 0.75**2 * -math.log(0.25)) / 2
    assert FocalLoss(2.0)(logits, label).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_against_float64_and_finite_differences(gamma):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 3, 5, 3])
    p = logits.softmax(1)[torch.arange(4), label]
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    assert torch.allclose(FocalLoss(gamma)(logits, label), expected)
    assert torch.autograd.gradcheck(lambda x: FocalLoss(gamma)(x, label), logits)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_certain_predictions_give_finite_gradients(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = FocalLoss(gamma)(logits, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(100.0)
    assert logits.grad.isfinite().all()
