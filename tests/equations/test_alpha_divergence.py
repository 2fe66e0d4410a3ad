"""The alpha-divergence in float64 against its definition by autograd, against KL, by hand, and mutants that must fail."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from nas.divergence import NEAR, Divergence, adaptive_divergence, alpha_divergence

WRONG = "WRONG"
Divides = Callable[..., Divergence]


def logits(B: int = 6, N: int = 5, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(B, N, generator=rng, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def defined(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """D (B,) by the definition, differentiable in the student."""
    q, p = student.softmax(1), teacher.softmax(1).detach()
    if alpha == 1:
        return (p * (p / q).log()).sum(1)
    if alpha == 0:
        return (q * (q / p).log()).sum(1)
    return ((q * (p / q) ** alpha).sum(1) - 1) / (alpha * (alpha - 1))


def agrees(divides: Divides, alpha: float) -> None:
    """Value and gradient, image by image (the sum over the batch keeps images apart). AssertionError, saying WRONG."""
    student, teacher = logits()
    found = divides(student, teacher, alpha)
    expected = defined(student, teacher, alpha)
    assert found.D.tolist() == pytest.approx(expected.tolist(), rel=1e-13, abs=1e-15), WRONG
    (slope,) = torch.autograd.grad(expected.sum(), student)
    mine, reached = torch.autograd.grad(found.G.sum(), (student, teacher), allow_unused=True)
    assert torch.allclose(mine, slope, rtol=1e-12, atol=1e-14) and slope.abs().min() > 1e-4, WRONG
    assert reached is None and not found.D.requires_grad, WRONG


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0])
def test_without_clipping_value_and_gradient_are_those_of_the_definition(alpha: float) -> None:
    agrees(alpha_divergence, alpha)


def test_alpha_one_is_kl_and_alpha_zero_the_other_kl() -> None:
    student, teacher = logits()
    P, Q = Categorical(logits=teacher.detach()), Categorical(logits=student.detach())
    assert alpha_divergence(student, teacher, 1.0).D.tolist() == pytest.approx(kl_divergence(P, Q).tolist(), rel=1e-13)
    assert alpha_divergence(student, teacher, 0.0).D.tolist() == pytest.approx(kl_divergence(Q, P).tolist(), rel=1e-13)
    (found,) = torch.autograd.grad(alpha_divergence(student, teacher, 1.0, clip=1.001).G.sum(), student)  # never clipped
    kl = F.kl_div(student.log_softmax(1), teacher.detach().log_softmax(1), reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(kl, student)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("alpha, value", [
    (-1.0, (0.64 / 0.5 + 0.04 / 0.5) / 2 - 0.5), (2.0, (0.25 / 0.8 + 0.25 / 0.2) / 2 - 0.5),
    (1.0, 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)), (0.0, 0.8 * math.log(1.6) + 0.2 * math.log(0.4)),
])  # fmt: skip
def test_two_classes_by_hand(alpha: float, value: float) -> None:
    """q = (0.8, 0.2), p = (0.5, 0.5): sum q^2 / p = 1.36, sum p^2 / q = 1.5625."""
    student = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    found = alpha_divergence(student, torch.zeros(1, 2).double(), alpha)
    assert found.D.item() == pytest.approx(value, rel=1e-13) and found.D.shape == found.G.shape == (1,)


def test_the_surrogate_is_reported() -> None:
    """G = -sum q rho log q, constants of rho and all: q = (0.8, 0.2), p = (0.5, 0.5), alpha = -1, w = (0.625, 2.5)."""
    q = torch.tensor([[0.8, 0.2]], dtype=torch.float64)
    rho = [-1.6 + 0.5, -0.4 + 0.5]
    G = -(0.8 * rho[0] * math.log(0.8) + 0.2 * rho[1] * math.log(0.2))
    assert alpha_divergence(q.log(), torch.zeros(1, 2).double(), -1.0).G.item() == pytest.approx(G, rel=1e-13)
    # D(1) = 0.2231 > D(-1) = 0.18: alpha+ wins, whose G is the cross-entropy
    CE = -(0.5 * math.log(0.8) + 0.5 * math.log(0.2))
    assert adaptive_divergence(q.log(), torch.zeros(1, 2).double()).item() == pytest.approx(CE, rel=1e-13)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_of_equal_logits_both_are_zero(alpha: float, clip: float | None) -> None:
    student, _ = logits()
    found = alpha_divergence(student, student.detach() + 3.0, alpha, clip)  # the same softmax
    (slope,) = torch.autograd.grad(found.G.sum(), student)
    assert found.D.abs().max() < 1e-14 and slope.abs().max() < 1e-14


# -- clipping -----------------------------------------------------------------------------------------------------------


def clipped_by_hand(student: Tensor, teacher: Tensor, alpha: float, clip: float) -> tuple[list[float], Tensor]:
    """D and dG/dstudent, class by class: dG/dz_k = q_k (sum_c q_c rho_c - rho_k)."""
    D, slope = [], torch.zeros_like(student)
    for i, (q, p) in enumerate(zip(student.detach().softmax(1).tolist(), teacher.detach().softmax(1).tolist())):
        w = [min((b / a) ** alpha if alpha else b / a, clip) for a, b in zip(q, p)]
        if alpha:
            D.append(sum(a * (v - 1) for a, v in zip(q, w)) / (alpha * (alpha - 1)))
            rho = [v / alpha + 1 / (alpha * (alpha - 1)) for v in w]
        else:
            D.append(-sum(a * math.log(v) for a, v in zip(q, w)))
            rho = [math.log(v) - 1 for v in w]
        mean = sum(a * r for a, r in zip(q, rho))
        slope[i] = torch.tensor([a * (mean - r) for a, r in zip(q, rho)], dtype=slope.dtype)
    return D, slope


def clips(divides: Divides, alpha: float) -> None:
    student, teacher = logits(scale=2.5)
    found = divides(student, teacher, alpha, 1.5)
    D, slope = clipped_by_hand(student, teacher, alpha, 1.5)
    assert found.D.tolist() == pytest.approx(D, rel=1e-12), WRONG
    (mine,) = torch.autograd.grad(found.G.sum(), student)
    assert torch.allclose(mine, slope, rtol=1e-11, atol=1e-14), WRONG


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 2.0])
def test_the_clip_acts(alpha: float) -> None:
    clips(alpha_divergence, alpha)
    student, teacher = logits(scale=2.5)
    free, bound = (alpha_divergence(student, teacher, alpha, clip).D for clip in (None, 1.5))
    assert bool((free != bound).any())
    assert torch.allclose(alpha_divergence(student, teacher, alpha, 1e9).D, free, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_ratios_stay_finite(dtype: torch.dtype) -> None:
    """exp(-1000) is 0 in both types: p / q is 1 / 0, 0 / 1 and 0 / 0."""
    student = torch.tensor([[0.0, -1000.0, -900.0], [0.0, 0.0, -3e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1000.0, 0.0, -990.0], [0.0, -3e4, 0.0]], dtype=dtype)
    for loss in (adaptive_divergence(student, teacher), *(alpha_divergence(student, teacher, alpha, 5.0).G.mean()
                                                          for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0))):  # fmt: skip
        (slope,) = torch.autograd.grad(loss, student)
        assert bool(loss.isfinite()) and bool(slope.isfinite().all())
    D = alpha_divergence(student, teacher, -1.0, 5.0).D  # q = (1, 0, 0): w^-1 is clipped to 5
    assert D[0].item() == pytest.approx((5.0 - 1.0) / 2, rel=1e-6)


# -- two alphas ---------------------------------------------------------------------------------------------------------


def adapts(adaptive: Callable[..., Tensor]) -> None:
    """Image by image, the G of the larger D, in value and gradient; both sides win somewhere."""
    student, teacher = logits(B=12, seed=4)
    found = adaptive(student, teacher)
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0))
    first = (low.D > high.D).tolist()
    assert 2 < sum(first) < 10
    chosen = torch.stack([low.G[i] if wins else high.G[i] for i, wins in enumerate(first)]).sum() / 12
    assert found.shape == () and found.item() == pytest.approx(chosen.item(), rel=1e-13), WRONG
    mine, expected = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, chosen))
    assert torch.allclose(mine, expected, rtol=1e-12, atol=1e-15), WRONG


def test_the_larger_divergence_is_minimised() -> None:
    adapts(adaptive_divergence)


def test_an_alpha_of_zero_is_taken_as_said() -> None:
    """``alpha or default`` would not."""
    student, teacher = logits()
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (0.0, 2.0))
    expected = torch.where(low.D > high.D, low.G, high.G).mean()
    assert adaptive_divergence(student, teacher, (0.0, 2.0)).item() == expected.item()
    assert adaptive_divergence(student, teacher).item() != pytest.approx(expected.item(), rel=1e-3)


def test_one_image() -> None:
    """As it does in a batch, whose loss is the mean."""
    batch, other = logits(B=4)
    each = [adaptive_divergence(batch[i : i + 1], other[i : i + 1]) for i in range(4)]
    assert all(loss.shape == () for loss in each)
    assert adaptive_divergence(batch, other).item() == pytest.approx(sum(loss.item() for loss in each) / 4, rel=1e-13)


def test_beside_zero_and_one_the_limits_are_taken() -> None:
    student, teacher = logits()
    for limit in (0.0, 1.0):
        for alpha in (limit - NEAR / 2, limit + NEAR / 2):
            assert torch.equal(alpha_divergence(student, teacher, alpha).G, alpha_divergence(student, teacher, limit).G)
        beside = alpha_divergence(student, teacher, limit + 2 * NEAR).D
        assert torch.allclose(beside, alpha_divergence(student, teacher, limit).D, rtol=0.02)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (1, 4)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4))])
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"Give two tensors \(batch, classes\) of one shape"):
        alpha_divergence(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 0.5)


@pytest.mark.parametrize("alpha, clip, words", [
    (math.nan, 5.0, "no order of a divergence"), (math.inf, 5.0, "no order"), (0.5, 0.0, "clip = 0.0 is no bound"),
    (0.5, -1.0, "Allowed: a number above 0, or None"), (0.5, math.nan, "clip = nan"),
])  # fmt: skip
def test_other_values_are_refused(alpha: float, clip: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        alpha_divergence(torch.zeros(2, 3), torch.zeros(2, 3), alpha, clip)


# -- mutants ------------------------------------------------------------------------------------------------------------


def changed(rho: Callable[[Tensor, float], Tensor], of: Callable[[Any], Any] = lambda value: value.detach()) -> Divides:
    """The general form with another ``rho``, or with what of w carries a gradient."""
    def divides(student: Tensor, teacher: Tensor, alpha: float, clip: float | None = None) -> Divergence:
        log_q, lp = student.log_softmax(1), teacher.detach().log_softmax(1)
        q, w = of(log_q.exp()), of(lp - log_q).exp()
        w_a = (w**alpha).clamp(max=clip) if clip else w**alpha
        return Divergence((q * (w_a - 1)).sum(1).detach() / (alpha * (alpha - 1)), -(q * rho(w_a, alpha) * log_q).sum(1))

    return divides


def test_the_frame_of_the_mutants_is_right() -> None:
    for alpha in (-1.0, 0.5):
        agrees(changed(lambda w, a: w / a), alpha)
        clips(changed(lambda w, a: w / a + 1 / (a * (a - 1))), alpha)


MUTANTS: dict[str, Divides] = {
    "w itself": changed(lambda w, a: w), "divided twice": changed(lambda w, a: w / a / (a - 1)),
    "the other sign": changed(lambda w, a: -w / a), "gradient through w": changed(lambda w, a: w / a, lambda value: value),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_fails(mutant: Divides) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        agrees(mutant, -1.0)


def late_clip(student: Tensor, teacher: Tensor, alpha: float, clip: float) -> Divergence:
    """w is clipped, not w^alpha."""
    w = (teacher.detach().softmax(1) / student.detach().softmax(1)).clamp(max=clip) ** alpha
    q = student.detach().softmax(1)
    return Divergence((q * (w - 1)).sum(1) / (alpha * (alpha - 1)), -(q * w / alpha * student.log_softmax(1)).sum(1))


@pytest.mark.parametrize("mutant", [late_clip, lambda s, t, alpha, clip: alpha_divergence(s, t, alpha)],
                         ids=["w is clipped", "nothing is clipped"])  # fmt: skip
def test_a_clip_that_is_not_the_papers_fails(mutant: Divides) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        clips(mutant, -1.0)


def smaller(student: Tensor, teacher: Tensor) -> Tensor:
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0))
    return torch.where(low.D < high.D, low.G, high.G).mean()


def by_surrogate(student: Tensor, teacher: Tensor) -> Tensor:
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0))
    return torch.maximum(low.G, high.G).mean()


def by_batch(student: Tensor, teacher: Tensor) -> Tensor:
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0))
    return low.G.mean() if low.D.mean() > high.D.mean() else high.G.mean()


def summed(student: Tensor, teacher: Tensor) -> Tensor:
    return adaptive_divergence(student, teacher) * len(student)


@pytest.mark.parametrize("mutant", [smaller, by_surrogate, by_batch, summed], ids=lambda mutant: mutant.__name__)
def test_a_choice_that_is_not_the_papers_fails(mutant: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        adapts(mutant)
