"""DrNAS through ``update`` in float64: the Dirichlet sample and its gradient against what is known of the distribution, the
divergence against torch.distributions, six steps by hand, and mutants that must fail.

Letters: t the sample, c = elu(a) + 1 its concentration, C = sum c, K options; f_k the operations, d_k = dL/dt_k.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.special import betainc, betaincinv
from test_single_path import EPOCH_STEPS, EPOCHS, SEED, STEPS, WRONG, Edges, draws
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from nas import checkpoint
from nas.alpha import Alpha
from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Setup
from nas.simplex import concentration, dirichlet, dirichlet_kl
from nas.strategies.drnas import DrNAS
from search_spaces.space import Choice, Mixture, SearchSpace

A = [[0.3, -0.2, 0.1, -1.5], [-0.4, 1.2, 0.0, -3.0]]


def noise(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, expected: Tensor, error: Tensor, slack: float = 0.0) -> None:
    """Within 4.5 standard errors, and a relative ``slack`` for torch's approximation of the derivative."""
    assert bool(((found - expected).abs() <= 4.5 * error + slack * expected.abs() + 1e-12).all()), (found, expected, error)


def sampled(a: Tensor, n: int) -> Tensor:
    """n samples (n, rows, K), each with its gradient."""
    return dirichlet(a.expand(n, *a.shape).flatten(0, 1), noise()).view(n, *a.shape)


# -- the distribution ---------------------------------------------------------------------------------------------------


def test_mean_and_covariance_are_those_of_the_distribution() -> None:
    a = torch.tensor(A, dtype=torch.float64)
    t, of = sampled(a, 20_000), Dirichlet(concentration(a))
    assert torch.allclose(t.sum(2), torch.ones(()).double(), rtol=0, atol=1e-14) and bool((t >= 0).all())
    close(t.mean(0), of.mean, t.std(0) / math.sqrt(len(t)))
    square = (t - of.mean) ** 2
    close(square.mean(0), of.variance, square.std(0) / math.sqrt(len(t)))
    pair = t[..., 0] * t[..., 1]
    c, C = concentration(a), concentration(a).sum(1)
    close(pair.mean(0), c[:, 0] * c[:, 1] / (C * (C + 1)), pair.std(0) / math.sqrt(len(t)))


@pytest.mark.parametrize("power", [1, 2])
def test_the_gradient_is_that_of_the_expectation(power: int) -> None:
    """E of sum_k g_k t_k^power: d/da of g c / C, and of g c (c + 1) / (C (C + 1)). Each sample's gradient is an unbiased
    estimate, so their spread bounds the error of the mean."""
    n, g = 20_000, torch.tensor([0.7, -1.3, 2.0, 0.4], dtype=torch.float64)
    a = torch.tensor(A, dtype=torch.float64).expand(n, 2, 4).clone().requires_grad_()
    t = dirichlet(a.flatten(0, 1), noise()).view(n, 2, 4)
    (each,) = torch.autograd.grad((g * t**power).sum(), a)
    x = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    c = torch.nn.functional.elu(x) + 1
    C = c.sum(1, keepdim=True)
    exact = c / C if power == 1 else c * (c + 1) / (C * (C + 1))
    (expected,) = torch.autograd.grad((g * exact).sum(), x)
    close(each.mean(0), expected, each.std(0) / math.sqrt(n), slack=1e-3)
    assert bool((each.std(0) / math.sqrt(n) < 0.03).all()) and bool((expected.abs() > 0.04).any())  # it can fail
    wrong = each.mean(0) * torch.tensor([1.0, 0.5, 1.0, 1.0])
    with pytest.raises(AssertionError):
        close(wrong, expected, each.std(0) / math.sqrt(n), slack=1e-3)


def test_the_gradient_is_that_of_torch_distributions() -> None:
    """At equal samples: the pathwise derivative that rsample uses."""
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    g, t = torch.randn(2, 4, dtype=torch.float64, generator=noise(1)), dirichlet(a, noise())
    (found,) = torch.autograd.grad((g * t).sum(), a)
    c, x = concentration(a), t.detach()
    d = torch._dirichlet_grad(x, c.detach(), c.detach().sum(1, keepdim=True).expand_as(x))
    (expected,) = torch.autograd.grad((c * d * (g - (x * g).sum(1, keepdim=True))).sum(), a)
    assert torch.allclose(found, expected, rtol=1e-13, atol=0)
    assert torch.allclose(found[0].sum(), expected[0].sum()) and found.abs().min() > 0


def test_two_options_against_the_cumulated_beta() -> None:
    """dt/dc at a fixed quantile: t is the inverse of the cumulated Beta(c0, c1) distribution, here by scipy."""
    a = torch.tensor([[0.3, -0.2], [-1.0, 0.8]], dtype=torch.float64, requires_grad=True)
    t = dirichlet(a, noise())
    for row in range(2):
        (found,) = torch.autograd.grad(t[row, 0], a, retain_graph=True)
        c = concentration(a.detach())[row]
        u, h = betainc(*c.tolist(), t[row, 0].item()), 1e-5
        slope = [(betaincinv(*(c + d).tolist(), u) - betaincinv(*(c - d).tolist(), u)) / (2 * h)
                 for d in h * torch.eye(2, dtype=torch.float64)]  # fmt: skip
        elu = a.detach()[row].clamp(max=0).exp()
        assert found[row].tolist() == pytest.approx((torch.tensor(slope) * elu).tolist(), rel=2e-3)


def test_far_below_zero_one_option_has_all() -> None:
    """Small concentrations: a corner of the simplex, which one in proportion to c, and nothing that is not finite."""
    a = torch.tensor([[-30.0, -30.0, -30.0 - math.log(2)]], dtype=torch.float64).expand(4000, 3).clone().requires_grad_()
    t = dirichlet(a, noise())
    (g,) = torch.autograd.grad((t * torch.tensor([1.0, 2.0, 3.0])).sum(), a)
    assert bool(g.isfinite().all()) and bool((t.max(1).values > 1 - 1e-6).all())
    share = t.detach().mean(0)
    close(share, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64), (share * (1 - share) / 4000).sqrt())
    single = torch.tensor([[-40.0, 30.0]])
    assert dirichlet(single, noise()).tolist() == [[0.0, 1.0]]


def test_forbidden_options_are_left_out() -> None:
    """A restricted row is the Dirichlet distribution of what is left: the same as of a space that never had the rest."""
    space = SearchSpace([Choice("a", (1, 2, 3, 4)), Choice("b", (1, 2, 3, 4))], {})
    alpha = Alpha(space.restrict({"a": [1, 3]})).double()
    with torch.no_grad():
        alpha.logits["4"].copy_(torch.tensor(A, dtype=torch.float64))
    n, total = 4000, torch.zeros(2, dtype=torch.float64)
    for seed in range(n):
        with torch.no_grad():
            t = alpha.dirichlet(noise(seed))["a"]
        assert isinstance(t, Mixture) and t.active == (0, 2) and t.weights[1] == t.weights[3] == 0.0
        total += t.weights[[0, 2]]
    of = Dirichlet(concentration(torch.tensor([A[0][0], A[0][2]], dtype=torch.float64)))
    close(total / n, of.mean, (of.variance / n).sqrt())
    setting = alpha.dirichlet(noise())["a"]
    assert isinstance(setting, Mixture)
    (g,) = torch.autograd.grad(setting.weights[0], alpha.logits["4"])
    assert (g != 0).tolist() == [[True, False, True, False], [False] * 4] and bool(g.isfinite().all())
    mean = alpha.dirichlet(None)["a"]
    assert isinstance(mean, Mixture) and mean.weights[[0, 2]].tolist() == pytest.approx(of.mean.tolist(), rel=1e-12)


def test_equal_logits_give_equal_samples_in_every_precision() -> None:
    """Drawn on the host in float64: what ranks and devices share."""
    exact = torch.tensor(A)  # of numbers that float32 holds
    fine, coarse = (dirichlet(exact.to(dtype), noise()) for dtype in (torch.float64, torch.float32))
    assert torch.equal(fine.float(), coarse) and coarse.dtype == torch.float32
    assert not torch.equal(fine, dirichlet(exact.double(), noise(4)))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    dirichlet(exact, noise())
    assert torch.equal(torch.get_rng_state(), before)  # nothing of the global stream


@pytest.mark.parametrize("anchor", [1.0, 0.5, 3.0])
def test_the_divergence_is_that_of_torch_distributions(anchor: float) -> None:
    a = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    found = dirichlet_kl(a, anchor)
    expected = kl_divergence(Dirichlet(torch.nn.functional.elu(a) + 1), Dirichlet(torch.full_like(a, anchor)))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    slope, other = (torch.autograd.grad(y.sum(), a)[0] for y in (found, expected))
    assert torch.allclose(slope, other, rtol=1e-10, atol=1e-12)
    some = torch.tensor([[0.3, -math.inf, 0.1, -math.inf]], dtype=torch.float64, requires_grad=True)
    left = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    assert dirichlet_kl(some, anchor).item() == pytest.approx(dirichlet_kl(left, anchor).item(), abs=1e-13)
    (g,) = torch.autograd.grad(dirichlet_kl(some, anchor).sum(), some)
    assert bool(g.isfinite().all()) and (g != 0).tolist() == [[True, False, True, False]]
    assert dirichlet_kl(torch.zeros(1, 3), 1.0).item() == pytest.approx(0.0, abs=1e-6)  # elu(0) + 1 is the anchor


# -- the step -----------------------------------------------------------------------------------------------------------

WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=0.05)
Mutation = Callable[[Any, Any], Any]


def started(**given: Any) -> DrNAS:
    net = Edges()
    strategy = DrNAS(**{"weights": WEIGHTS, "alphas": Alphas(lr=0.1, weight_decay=0.02), **given})
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    with torch.no_grad():
        strategy.alpha.double().logits["3"].copy_(torch.tensor([[0.3, -0.2, 0.1], [-0.4, 0.2, 0.0]]))
    return strategy


COSTS = torch.tensor([0.0, 4.0, 9.0], dtype=torch.float64)


class Hand:
    """The step again: the sample by its definition from the same noise, everything else written out."""

    def __init__(self, s: Any, R: float | None) -> None:
        self.weights, self.alphas, self.kl, self.anchor, self.R = s.weights, s.alphas, s.kl, s.anchor, R
        self.w = torch.cat([p.detach().clone() for p in s.net.parameters()])
        self.a = s.alpha.logits["3"].detach().clone()
        self.buffer, self.m, self.n = torch.zeros(6).double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()

    def c(self) -> Tensor:
        return torch.where(self.a > 0, self.a + 1, self.a.exp())

    def sample(self, rng: torch.Generator) -> Tensor:
        """Gamma(c) = Gamma(c + 1) U^(1/c), and their shares."""
        g = torch._standard_gamma(self.c() + 1, rng)
        u = (-torch.empty(2, 3, dtype=torch.float64).exponential_(generator=rng)).exp()
        g = g * u ** (1 / self.c())
        return g / g.sum(1, keepdim=True)

    def backward(self, batch: Any, t: Tensor) -> tuple[float, Tensor, Tensor]:
        """L, dL/d(u, v) and dL/dt of the two edges (see test_single_path)."""
        (p, q), u, v, (x0, x1) = t, self.w[:3], self.w[3:], batch.x.T
        f = (x0[:, None] * u).tanh()
        angle = x1[:, None] * v + (f * p).sum(1, keepdim=True)
        sigma = 1 / (1 + (-(angle.sin() * q).sum(1)).exp())
        hit = (batch.y == 0).double()
        G = (sigma - hit) / 4
        G0 = G * (angle.cos() * q).sum(1)
        du = (G0[:, None] * p * (1 - f**2) * x0[:, None]).sum(0)
        dv = (G[:, None] * q * angle.cos() * x1[:, None]).sum(0)
        d = torch.stack([(G0[:, None] * f).sum(0), (G[:, None] * angle.sin()).sum(0)])
        return -(hit * sigma.log() + (1 - hit) * (1 - sigma).log()).mean().item(), torch.cat([du, dv]), d

    def gradient(self, t: Tensor, d: Tensor) -> Tensor:
        """Of L_val, the divergence and the budget with respect to a."""
        c = self.c()
        C = c.sum(1, keepdim=True)
        slope = torch._dirichlet_grad(t, c, C.expand_as(c))
        G = slope * (d - (t * d).sum(1, keepdim=True))
        # psi' terms: d KL / d c_k = (c_k - b) psi'(c_k) - psi'(C) sum_j (c_j - b)
        tri = torch.special.polygamma(1, c)
        G = G + self.kl * ((c - self.anchor) * tri - torch.special.polygamma(1, C) * (c - self.anchor).sum(1, keepdim=True))
        if self.R is not None:
            E = float((c[0] * COSTS).sum() / C[0])
            G[0] += 0.7 * math.copysign(1.0, E - self.R) * (COSTS - E) / C[0] / E
        return G * torch.where(self.a > 0, 1.0, self.a.exp())

    def step(self, step: int, train: Any, valid: Any) -> dict[str, float]:
        epoch, rng = step // EPOCH_STEPS, moment(step, STEPS, EPOCH_STEPS, SEED).noise
        t = self.sample(rng)
        L_val, _, d = self.backward(valid, t)
        G = self.gradient(t, d)
        found = {"valid/loss": L_val, "alpha/grad_norm": float(G.norm())}
        G = G + self.alphas.weight_decay * self.a
        n = step + 1
        self.m, self.n = 0.5 * self.m + 0.5 * G, 0.999 * self.n + 0.001 * G**2
        self.a = self.a - self.alphas.lr * self.m / (1 - 0.5**n) / ((self.n / (1 - 0.999**n)).sqrt() + 1e-8)
        L, g, _ = self.backward(train, self.sample(rng))
        rate = 0.02 + 0.08 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        found |= {"train/loss": L, "train/grad_norm": float(g.norm()), "train/lr": rate}
        g = g * min(1.0, 0.05 / (float(g.norm()) + 1e-6)) + self.weights.weight_decay * self.w
        self.buffer = self.weights.momentum * self.buffer + g
        self.w = self.w - rate * self.buffer
        return found


def check(mutate: Mutation = lambda strategy, draw: draw, R: float | None = None, **given: Any) -> None:
    """Six steps. AssertionError, saying WRONG, where anything differs."""
    strategy = started(**given)
    hand, twin = Hand(strategy, R), draws()
    draw = mutate(strategy, draws())
    for step in range(STEPS):
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
        expected = hand.step(step, twin("train"), twin("valid"))
        found = {tag: float(metrics.get(tag, math.nan)) for tag in expected}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), WRONG
        w, a = torch.cat([*strategy.net.parameters()]), strategy.alpha.logits["3"]
        assert w.tolist() == pytest.approx(hand.w.tolist(), rel=1e-8, abs=1e-11), WRONG
        assert a.flatten().tolist() == pytest.approx(hand.a.flatten().tolist(), rel=1e-8, abs=1e-11), WRONG


STILL: dict[str, Any] = {"alphas": Alphas(lr=0.1, weight_decay=0.0)}


CASES = {"decay": {}, "kl": {"kl": 1e-3, **STILL}, "anchor": {"kl": 0.3, "anchor": 2.0, **STILL},
         "budget": {"R": 2.0, "budget": Budget("2", weight=0.7)}}  # fmt: skip


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_six_steps_by_hand(given: dict[str, Any]) -> None:
    check(**given)


def test_the_divergence_is_reported() -> None:
    strategy = started(kl=0.3, **STILL)
    c = concentration(strategy.alpha.logits["3"].detach())
    expected = kl_divergence(Dirichlet(c), Dirichlet(torch.ones_like(c))).sum().item()
    metrics = strategy.update(draws(), moment(0, STEPS, EPOCH_STEPS, SEED))
    assert float(metrics["alpha/divergence"]) == pytest.approx(expected, rel=1e-12)
    assert "alpha/divergence" not in started().update(draws(), moment(0, STEPS, EPOCH_STEPS, SEED))


def drawn(strategy: DrNAS, step: int) -> Tensor:
    """(2, 3): what the step on w would run."""
    arch = strategy.arch(moment(step, STEPS, EPOCH_STEPS, SEED))
    return torch.stack([setting.weights for setting in arch.values() if isinstance(setting, Mixture)])


def test_samples_of_a_step_are_the_same_on_every_rank_and_after_resuming() -> None:
    one, draw = started(), draws()
    for step in range(3):
        one.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
    state = copy.deepcopy(checkpoint.state_of(one))
    torch.manual_seed(99)  # a rank, or a process that begins anew, has another global stream
    other = started()
    checkpoint.restore(other, state)
    mine, theirs, next_step = (drawn(strategy, step) for strategy, step in ((one, 3), (other, 3), (one, 4)))
    assert torch.equal(mine, theirs) and not bool((mine == next_step).any())


@pytest.mark.parametrize("wrong, words", [
    ({"kl": -1.0}, "Allowed: kl of 0 or more, anchor above 0"), ({"anchor": 0.0}, "anchor above 0"),
    ({"kl": 1e-3}, "two regularisers, of which the paper takes one"),
])  # fmt: skip
def test_unknown_hyper_parameters_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DrNAS(**wrong)


# -- mutants ------------------------------------------------------------------------------------------------------------


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def sampler(strategy: Any, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    strategy.alpha.dirichlet = change(strategy.alpha.dirichlet)


def one_sample(strategy: Any, draw: Any) -> Any:
    sampler(strategy, lambda sample: lambda rng: sample(torch.Generator().manual_seed(rng.initial_seed())))
    return draw


def the_mean(strategy: Any, draw: Any) -> Any:
    sampler(strategy, lambda sample: lambda rng: sample(None))
    return draw


def no_gradient(strategy: Any, draw: Any) -> Any:
    """As torch._sample_dirichlet has none."""
    sampler(strategy, lambda sample: lambda rng: {
        name: s._replace(weights=s.weights.detach() + 0 * s.weights) for name, s in sample(rng).items()})
    return draw


def straight_through_the_mean(strategy: Any, draw: Any) -> Any:
    """The gradient of c / C at the sample's value."""
    def drawn(sample: Any) -> Any:
        return lambda rng: {name: s._replace(weights=s.weights.detach() + m.weights - m.weights.detach())
                            for (name, s), m in zip(sample(rng).items(), sample(None).values())}  # fmt: skip

    sampler(strategy, drawn)
    return draw


def other_order(strategy: Any, draw: Any) -> Any:
    search, down, waiting = strategy.search, strategy.w.down, list[Any]()

    def later(*given: Any) -> dict[str, Any]:
        waiting.append(given)
        return {}

    def both(loss: Tensor, norm: bool = False) -> None:
        down(loss, norm=norm)
        search(*waiting.pop())

    strategy.search, strategy.w.down = later, both
    return draw


@pytest.mark.parametrize("mutant", [swapped_splits, one_sample, the_mean, no_gradient, straight_through_the_mean, other_order],
                         ids=lambda mutant: mutant.__name__)  # fmt: skip
def test_a_mutant_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


@pytest.mark.parametrize("mutant", [{"kl": 0.0}, {"anchor": 1.0}], ids=["no divergence", "another anchor"])
def test_a_divergence_that_is_not_the_papers_fails(mutant: dict[str, float]) -> None:
    def changed(strategy: Any, draw: Any) -> Any:
        for name, value in mutant.items():
            setattr(strategy, name, value)
        return draw

    with pytest.raises(AssertionError, match=WRONG):
        check(changed, kl=0.3, anchor=2.0, **STILL)
