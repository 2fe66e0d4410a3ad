"""Six steps of DARTS, (1)-(6), through ``update`` with its own Descents and logits, against the same by hand in float64; and
mutants, each of which must fail that comparison. Letters as in nas/strategies/darts.py: w, a, v, xi, mu, wd, eps, g, h.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.cost import CostTable
from nas.descent import Descent
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Draw, Setup, Supernet
from nas.strategies.darts import DARTS
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.layers import Layer, Shape

EPOCHS, EPOCH_STEPS, SEED = 3, 2, 5
STEPS = EPOCHS * EPOCH_STEPS
WRONG = "not what was computed by hand"
Mutation = Callable[[Any, Any], Any]


# -- six steps by hand --------------------------------------------------------------------------------------------------

OPTIONS = {"edge0": ("none", "small", "large"), "edge1": ("left", "right")}
COSTS = (0.0, 4.0, 9.0)


def outputs(x: Tensor, u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """(B, 2) -> logits (B, 2) of two mixed edges with three and two operations."""
    first = (p * (u * x[:, :1]).tanh()).sum(1)
    o = first + q[0] * (v[0] * x[:, 1] + first).sin() + q[1] * (v[1] * x[:, 1] + first + 1).sin()
    return torch.stack([o, torch.zeros_like(o)], dim=1)


class Edges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space = SearchSpace([Choice(name, options, ordered=False) for name, options in OPTIONS.items()], {})
        self.u = nn.Parameter(torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([0.9, -1.3], dtype=torch.float64))

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        p, q = arch["edge0"], arch["edge1"]
        assert isinstance(p, Mixture) and isinstance(q, Mixture)
        return outputs(x, self.u, self.v, p.weights, q.weights)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        kernels = {"small": (2, 2), "large": (3, 3)}
        return [Layer("edge0", "conv", ("edge0",), lambda op: Shape(1, 1, kernels[op]) if op in kernels else None)]

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> list[Any]:
        return []

    def reset(self, generator: torch.Generator) -> None:
        """The numbers of this file are the weights."""


def draws() -> Draw:
    streams = {split: torch.Generator().manual_seed(seed) for seed, split in enumerate(("train", "valid"))}

    def draw(split: str, size: int | None = None, odds: Any = None) -> Batch:
        x = torch.randn(4, 2, generator=streams[split], dtype=torch.float64)
        return Batch(x, torch.randint(2, (4,), generator=streams[split]), torch.arange(4))

    return draw


Gradients = tuple[float, list[Tensor], list[Tensor]]


def gradients(batch: Batch, w: list[Tensor], a: list[Tensor], R: float | None = None) -> Gradients:
    """The loss of a batch, its gradients in w and in a; in those of a, a budget's 0.7 |log(E / R)| too."""
    w, a = ([p.clone().requires_grad_() for p in group] for group in (w, a))
    p, q = (torch.softmax(row, 0) for row in a)
    loss = -outputs(batch.x, w[0], w[1], p, q).log_softmax(1)[torch.arange(4), batch.y].mean()
    total = loss if R is None else loss + 0.7 * ((p * torch.tensor(COSTS)).sum() / R).log().abs()
    d = torch.autograd.grad(total, [*w, *a])
    return loss.item(), list(d[:2]), list(d[2:])


class Hand:
    """(1)-(6) on lists of tensors; autograd gives the gradients of one loss at one point, nothing else."""

    b1, b2 = 0.5, 0.999

    def __init__(self, strategy: DARTS, R: float | None) -> None:
        self.s, self.R, self.xi = strategy, R, strategy.xi
        self.w = [p.detach().clone() for p in strategy.net.parameters()]
        self.a = [strategy.alpha.logits[K][0].detach().clone() for K in ("3", "2")]
        self.v, self.m, self.n = ([torch.zeros_like(p) for p in group] for group in (self.w, self.a, self.a))

    def L(self, batch: Batch, w: list[Tensor], a: list[Tensor], valid: bool) -> Gradients:
        return gradients(batch, w, a, self.R if valid else None)

    def step(self, step: int, train: Batch, valid: Batch) -> dict[str, float]:
        s, W = self.s, self.s.weights
        rate = W.lr_min + (W.lr - W.lr_min) * (1 + math.cos(math.pi * (step // EPOCH_STEPS) / EPOCHS)) / 2
        mu, wd, n = W.momentum, W.weight_decay, step + 1
        if s.order == 1:
            L_val, _, G = self.L(valid, self.w, self.a, True)  # (1)
        else:
            xi = rate if self.xi is None else self.xi
            _, d, _ = self.L(train, self.w, self.a, False)
            d = [g + wd * p for g, p in zip(d, self.w)]
            v = [mu * v + g for v, g in zip(self.v, d)]
            ahead = [p - xi * (g + mu * b if W.nesterov else b) for p, g, b in zip(self.w, d, v)]  # (2)
            L_val, g, h = self.L(valid, ahead, self.a, True)  # (3)
            eps = 0.01 / math.sqrt(sum(float((t**2).sum()) for t in g))  # (4)
            plus, minus = ([p + e * t for p, t in zip(self.w, g)] for e in (eps, -eps))
            up, down = self.L(train, plus, self.a, False)[2], self.L(train, minus, self.a, False)[2]
            xi *= 1 + mu if W.nesterov else 1
            G = [t - xi * (one - other) / (2 * eps) for t, one, other in zip(h, up, down)]  # (5)
        norm = math.sqrt(sum(float((t**2).sum()) for t in G))
        for i, a in enumerate(self.a):
            G[i] = G[i] + s.alphas.weight_decay * a
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * G[i]
            self.n[i] = self.b2 * self.n[i] + (1 - self.b2) * G[i] ** 2
            root = (self.n[i] / (1 - self.b2**n)).sqrt() + 1e-8
            self.a[i] = a - s.alphas.lr * self.m[i] / (1 - self.b1**n) / root
        L_train, d, _ = self.L(train, self.w, self.a, False)  # (6)
        total = math.sqrt(sum(float((t**2).sum()) for t in d))
        scale = 1.0 if W.clip is None else min(1.0, W.clip / (total + 1e-6))
        d = [scale * g + wd * p for g, p in zip(d, self.w)]
        self.v = [mu * v + g for v, g in zip(self.v, d)]
        self.w = [p - rate * (g + mu * v if W.nesterov else v) for p, g, v in zip(self.w, d, self.v)]
        return {"train/loss": L_train, "valid/loss": L_val, "train/lr": rate, "train/grad_norm": total, "alpha/grad_norm": norm}


def settle(alpha: nn.Module) -> None:
    """Logits in float64, far enough from equal to matter."""
    with torch.no_grad():
        for logits in alpha.double().parameters():
            logits.copy_(torch.linspace(0.3, -0.2, logits.numel()).reshape(logits.shape))


WEIGHTS = Weights(lr=0.4, lr_min=0.1, momentum=0.9, weight_decay=0.05, clip=0.05)


def on_edges(**given: Any) -> DARTS:
    net = Edges()
    strategy = DARTS(**{"weights": WEIGHTS, "alphas": Alphas(lr=0.1, weight_decay=0.02), **given})
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    settle(strategy.alpha)
    return strategy


def check(mutate: Mutation = lambda strategy, draw: draw, R: float | None = None, **given: Any) -> None:
    """Six steps in three epochs. AssertionError, saying WRONG, where anything differs."""
    strategy = on_edges(**given)
    hand, twin = Hand(strategy, R), draws()
    draw = mutate(strategy, draws())
    for step in range(STEPS):
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
        expected = hand.step(step, twin("train"), twin("valid"))
        found = {tag: float(metrics.get(tag, math.nan)) for tag in expected}
        assert found == pytest.approx(expected, rel=1e-9), WRONG
        mine = [*strategy.net.parameters(), strategy.alpha.logits["3"][0], strategy.alpha.logits["2"][0]]
        for p, q in zip(mine, [*hand.w, *hand.a]):
            assert p.detach().tolist() == pytest.approx(q.tolist(), rel=1e-9, abs=1e-11), WRONG


@pytest.mark.parametrize("given", [
    {"order": 1}, {"order": 2}, {"order": 2, "xi": 0.25}, {"order": 2, "weights": Weights(0.4, 0.1, 0.9, True, 0.05, None)},
    {"order": 1, "R": 2.0, "budget": Budget("2", weight=0.7)}, {"order": 2, "R": 2.0, "budget": Budget("2", weight=0.7)},
], ids=["first", "second", "xi", "nesterov", "first-budget", "second-budget"])  # fmt: skip
def test_six_steps_by_hand(given: dict[str, Any]) -> None:
    assert isinstance(Edges(), Supernet)
    check(**given)


def test_5_leaves_w_and_6_leaves_a_as_they_were() -> None:
    strategy, draw, steps = on_edges(), draws(), []
    step_a, step_w = strategy.a.step, strategy.w.step

    def same(before: list[Tensor], descent: Descent) -> bool:
        return all(torch.equal(p, q) and q.grad is None for p, q in zip(before, descent.params))

    def after_5(norm: bool = False) -> None:
        steps.append(same(before_w, strategy.w))
        step_a(norm)
        before_a[:] = [p.detach().clone() for p in strategy.a.params]

    def after_6(norm: bool = False) -> None:
        step_w(norm)
        steps.append(same(before_a, strategy.a))

    strategy.a.step, strategy.w.step = after_5, after_6  # type: ignore[method-assign]
    for step in range(3):
        before_w: list[Tensor] = [p.detach().clone() for p in strategy.w.params]
        before_a: list[Tensor] = []
        strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
    assert steps == [True] * 6


# -- mutants ------------------------------------------------------------------------------------------------------------


def perturbed(strategy: Any, factor: Callable[[Any], Any]) -> None:
    """The losses at w+- are multiplied by a factor of the shift."""
    shifted, add = strategy.w.shifted, strategy.a.add

    @contextmanager
    def wrong(g: list[Tensor], by: Any) -> Iterator[None]:
        with shifted(g, by):
            strategy.a.add = lambda loss, *also: add(loss * factor(by), *also)
            yield
            strategy.a.add = add

    strategy.w.shifted = wrong


def scaled_by_eps_squared(strategy: Any, draw: Any) -> Any:
    """(p - n) / 2. * eps, as in several ports."""
    perturbed(strategy, lambda by: by**2)
    return draw


def no_second_order(strategy: Any, draw: Any) -> Any:
    perturbed(strategy, lambda by: 0.0)
    return draw


def wrong_sign(strategy: Any, draw: Any) -> Any:
    perturbed(strategy, lambda by: -1.0)
    return draw


def half_a_difference(strategy: Any, draw: Any) -> Any:
    perturbed(strategy, lambda by: 0.5)
    return draw


def around_the_look_ahead(strategy: Any, draw: Any) -> Any:
    grad, shifted = strategy.w.grad, strategy.w.shifted
    ahead: list[Tensor] = []

    def noted(loss: Tensor, *also: Descent) -> list[Tensor]:
        ahead[:] = [p.detach().clone() for p in strategy.w.params]
        return grad(loss, *also)

    strategy.w.grad = noted
    strategy.w.shifted = lambda g, by: shifted([q - p.detach() + by * d for q, p, d in zip(ahead, strategy.w.params, g)], 1.0)
    return draw


def not_sequenced(strategy: Any, draw: Any) -> Any:
    """Both gradients are taken at the weights of the last shift."""
    shifted = strategy.w.shifted
    strategy.w.shifted = lambda g, by: shifted(g, -abs(by))
    return draw


def gradient_at_w(strategy: Any, draw: Any) -> Any:
    """No look-ahead: (3) at w."""
    ahead = strategy.w.ahead
    strategy.w.ahead = lambda loss, rate=None: ahead(loss, 0.0)
    return draw


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def xi_of_the_start(strategy: Any, draw: Any) -> Any:
    strategy.xi = strategy.weights.lr
    return draw


def xi_of_the_next_step(strategy: Any, draw: Any) -> Any:
    """The scheduler is stepped too early."""
    update = strategy.update

    def wrong(draw: Any, now: Any) -> Any:
        strategy.xi = strategy.w.bases[0] * strategy.w.schedule(strategy.w.count + 1)
        return update(draw, now)

    strategy.update = wrong
    return draw


def look_ahead_without(name: str) -> Mutation:
    def mutant(strategy: Any, draw: Any) -> Any:
        ahead, group = strategy.w.ahead, strategy.w.optimizer.param_groups[0]

        @contextmanager
        def wrong(loss: Tensor, rate: float | None = None) -> Iterator[None]:
            kept, group[name] = group[name], 0.0
            with ahead(loss, rate):
                group[name] = kept
                yield

        strategy.w.ahead = wrong
        return draw

    mutant.__name__ = f"look_ahead_without_{name}"
    return mutant


def weight_step_reaches_alphas(strategy: Any, draw: Any) -> Any:
    soft = strategy.alpha.soft

    def with_graph() -> Any:
        with torch.enable_grad():
            return soft()

    strategy.alpha.soft = with_graph
    strategy.w.add = lambda loss, *also: loss.backward()
    return draw


def weights_first(strategy: Any, draw: Any) -> Any:
    """(6) before (5)."""
    search, down = strategy.search, strategy.w.down
    waiting: list[tuple[Batch, Batch]] = []

    def later(train: Batch, valid: Batch) -> dict[str, Any]:
        waiting.append((train, valid))
        return {}

    strategy.search = later

    def both(loss: Tensor, norm: bool = False) -> None:
        down(loss, norm=norm)
        search(*waiting.pop())

    strategy.w.down = both
    return draw


def look_ahead_on_half_the_gradient(strategy: Any, draw: Any) -> Any:
    ahead = strategy.w.ahead
    strategy.w.ahead = lambda loss, rate=None: ahead(loss * 0.5, rate)
    return draw


def no_clipping(strategy: Any, draw: Any) -> Any:
    strategy.w.clip = None
    return draw


MUTANTS: list[Mutation] = [
    scaled_by_eps_squared, no_second_order, wrong_sign, half_a_difference, around_the_look_ahead, not_sequenced, gradient_at_w,
    swapped_splits, xi_of_the_start, xi_of_the_next_step, look_ahead_without("momentum"), look_ahead_without("weight_decay"),
    weight_step_reaches_alphas, weights_first, look_ahead_on_half_the_gradient, no_clipping,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


@pytest.mark.parametrize("mutant", [swapped_splits, weight_step_reaches_alphas, weights_first], ids=lambda m: m.__name__)
def test_a_mutant_of_the_first_order_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant, order=1)
