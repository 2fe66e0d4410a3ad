"""Losses against values computed by hand, in float64."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pytest import approx

from nas.losses import CrossEntropy, distillation, top1

LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]], dtype=torch.float64)  # p: (1/4, 3/4), (4/5, 1/5)
Y = torch.tensor([1, 1])


def test_cross_entropy_by_hand() -> None:
    assert CrossEntropy()(LOGITS, Y).item() == approx((math.log(4 / 3) + math.log(5)) / 2, abs=1e-14)


def test_label_smoothing_by_hand() -> None:
    expected = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + 0.9 * math.log(5) + 0.1 * math.log(5 / 4)) / 2
    assert CrossEntropy(label_smoothing=0.2)(LOGITS, Y).item() == approx(expected, abs=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0]])
def test_a_class_costs_what_its_one_hot_row_costs(smoothing: float, weights: list[float] | None) -> None:
    loss, y = CrossEntropy(smoothing, weights), torch.tensor([0, 1])
    assert loss(LOGITS, F.one_hot(y, 2).double()).item() == approx(loss(LOGITS, y).item(), abs=1e-14)


def test_class_weights_scale_images_but_not_the_divisor() -> None:
    y = torch.tensor([0, 1])
    expected = (0.5 * math.log(4) + 2.0 * math.log(5)) / 2
    assert CrossEntropy(class_weights=[0.5, 2.0])(LOGITS, y).item() == approx(expected, abs=1e-14)


def test_cross_entropy_refuses() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropy(label_smoothing=1.0)
    with pytest.raises(ValueError, match="class_weights"):
        CrossEntropy(class_weights=[-1.0, 1.0])
    with pytest.raises(ValueError, match="3 for 2 classes"):
        CrossEntropy(class_weights=[1.0, 1.0, 1.0])(LOGITS, Y)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_distillation_is_14_and_not_the_printed_swap() -> None:
    T, lam = 2.0, 0.9
    student = T * torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)  # softmax(z/T) = (1/4, 3/4)
    teacher = T * torch.tensor([[math.log(4.0), 0.0]], dtype=torch.float64)  # (4/5, 1/5)
    y = torch.tensor([0])
    cross_entropy = math.log(1 + 9)  # -log softmax of (0, 2 log 3) at 0
    right = (1 - lam) * cross_entropy + lam * T**2 * kl([0.8, 0.2], [0.25, 0.75])
    swapped = (1 - lam) * cross_entropy + lam * T**2 * kl([0.25, 0.75], [0.8, 0.2])
    found = distillation(student, teacher, y, lam, T, CrossEntropy()).item()
    assert found == approx(right, abs=1e-13)
    assert abs(found - swapped) > 1e-2


def test_distillation_is_a_batch_mean_and_leaves_the_teacher() -> None:
    student = LOGITS.clone().requires_grad_()
    teacher = LOGITS.flip(0).clone().requires_grad_()
    one = distillation(student[:1], teacher[:1], Y[:1], 0.9, 4.0, CrossEntropy())
    two = distillation(student[1:], teacher[1:], Y[1:], 0.9, 4.0, CrossEntropy())
    both = distillation(student, teacher, Y, 0.9, 4.0, CrossEntropy())
    assert both.item() == approx((one.item() + two.item()) / 2, abs=1e-14)
    both.backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(ValueError, match="lam"):
        distillation(student, teacher, Y, 1.5, 4.0, CrossEntropy())


def test_top1() -> None:
    assert top1(LOGITS, Y).item() == 0.5
    assert top1(LOGITS, torch.tensor([1, 0])).item() == 1.0
    assert top1(LOGITS, torch.tensor([[0.3, 0.7], [0.2, 0.8]])).item() == 0.5
