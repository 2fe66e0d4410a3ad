"""SNAS and GDAS through ``update``, six steps against the same by hand in float64 (single-path.md, section 5), and mutants that
must fail.

Letters: f_j the operations of edge 0, e_k those of edge 1, o = sum_k q_k sin(v_k x1 + h), h = sum_j p_j tanh(u_j x0), logits
(o, 0), d_j = dL/dp_j. No autograd in what is computed by hand.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.bilevel import Alphas, Weights, temperature
from nas.budget import Budget
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Draw, Setup, Supernet
from nas.strategies.gdas import GDAS
from nas.strategies.snas import SNAS
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.layers import Layer, Shape
from supernets.mixing import blend

EPOCHS, EPOCH_STEPS, SEED = 3, 2, 7
STEPS = EPOCHS * EPOCH_STEPS
WRONG = "not what was computed by hand"
COSTS = torch.tensor([0.0, 4.0, 9.0], dtype=torch.float64)
Mutation = Callable[[Any, Any], Any]


class Edges(nn.Module):
    """Two edges of three operations; an operation is computed only where it counts."""

    options = ("none", "small", "large")

    def __init__(self) -> None:
        super().__init__()
        self.space = SearchSpace([Choice(f"edge{i}", self.options, ordered=False) for i in range(2)], {})
        self.u = nn.Parameter(torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([0.9, -1.3, 0.5], dtype=torch.float64))
        self.ran: list[tuple[int, int]] = []

    def op(self, i: int, j: int, x: Tensor, h: Tensor) -> Tensor:
        self.ran.append((i, j))
        return (self.u[j] * x).tanh() if i == 0 else (self.v[j] * x + h).sin()

    def edge(self, i: int, x: Tensor, h: Tensor, setting: Setting) -> Tensor:
        if not isinstance(setting, Mixture):
            return self.op(i, self.options.index(str(setting)), x, h)
        candidates = [lambda x, w, j=j: (self.op(i, j, x, h), w) for j in range(3)]
        return blend(candidates, x, setting)

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, 2) -> (B, 2)
        h = self.edge(0, x[:, 0], x[:, 0], arch["edge0"])
        o = self.edge(1, x[:, 1], h, arch["edge1"])
        return torch.stack([o, torch.zeros_like(o)], dim=1)

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


WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=0.05)


class Hand:
    b1, b2 = 0.5, 0.999

    def __init__(self, strategy: SNAS | GDAS, R: float | None) -> None:
        s = strategy
        self.gdas, self.idle = isinstance(s, GDAS), getattr(s, "idle", "absent")
        self.weights, self.alphas, self.tau, self.R = s.weights, s.alphas, s.tau, R
        self.w = torch.cat([p.detach().clone() for p in s.net.parameters()])  # u, v
        self.a = s.alpha.logits["3"].detach().clone()
        self.buffer, self.m, self.n = torch.zeros(6).double(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()

    def sample(self, tau: float, noise: torch.Generator) -> Tensor:
        """(2, 3): softmax((log softmax a + Gumbel) / tau) of both edges."""
        g = -torch.empty(2, 3, dtype=torch.float64).exponential_(generator=noise).log()
        u = (self.a - self.a.exp().sum(1, keepdim=True).log() + g) / tau
        return u.exp() / u.exp().sum(1, keepdim=True)

    def backward(self, batch: Batch, weights: Tensor) -> tuple[float, Tensor, Tensor, tuple[float, float]]:
        """L; dL/d(u, v); dL/d(p, q); and the sums of dL/dh and of dL/do over the images."""
        (p, q), u, v, (x0, x1) = weights, self.w[:3], self.w[3:], batch.x.T
        f = (x0[:, None] * u).tanh()
        angle = x1[:, None] * v + (f * p).sum(1, keepdim=True)
        sigma = 1 / (1 + (-(angle.sin() * q).sum(1)).exp())
        hit = (batch.y == 0).double()
        L = -(hit * sigma.log() + (1 - hit) * (1 - sigma).log()).mean()
        G = (sigma - hit) / 4  # dL/do
        G0 = G * (angle.cos() * q).sum(1)  # dL/dh
        du = (G0[:, None] * p * (1 - f**2) * x0[:, None]).sum(0)
        dv = (G[:, None] * q * angle.cos() * x1[:, None]).sum(0)
        d = torch.stack([(G0[:, None] * f).sum(0), (G[:, None] * angle.sin()).sum(0)])
        return L.item(), torch.cat([du, dv]), d, (G0.sum().item(), G.sum().item())

    def step_w(self, rate: float, tau: float, noise: torch.Generator, train: Batch) -> dict[str, float]:
        p = self.sample(tau, noise)
        weights = nn.functional.one_hot(p.argmax(1), 3).double() if self.gdas else p
        L, g, _, _ = self.backward(train, weights)
        norm = float(g.norm())
        g = g * min(1.0, 0.05 / (norm + 1e-6)) + self.weights.weight_decay * self.w  # unused operations decay too
        self.buffer = self.weights.momentum * self.buffer + g
        self.w = self.w - rate * self.buffer
        return {"train/loss": L, "train/grad_norm": norm}

    def step_a(self, n: int, tau: float, noise: torch.Generator, valid: Batch) -> dict[str, float]:
        p = self.sample(tau, noise)
        k = p.argmax(1)
        L, _, d, sums = self.backward(valid, nn.functional.one_hot(k, 3).double() if self.gdas else p)
        for i in range(2 if self.gdas else 0):  # of the others: what they add is their weight itself
            d[i] = torch.where(torch.arange(3) == k[i], d[i], sums[i] if self.idle == "ones" else 0.0)
        G = p * (d - (p * d).sum(1, keepdim=True)) / tau
        assert G.sum(1).tolist() == pytest.approx([0.0, 0.0], abs=1e-15)  # log softmax adds nothing
        if self.R is not None:
            soft = self.a[0].softmax(0)
            E = float(soft @ COSTS)
            G[0] += 0.7 * math.copysign(1.0, E - self.R) * soft * (COSTS - E) / E
        norm = float(G.norm())
        G = G + self.alphas.weight_decay * self.a
        self.m, self.n = self.b1 * self.m + (1 - self.b1) * G, self.b2 * self.n + (1 - self.b2) * G**2
        root = (self.n / (1 - self.b2**n)).sqrt() + 1e-8
        self.a = self.a - self.alphas.lr * self.m / (1 - self.b1**n) / root
        return {"valid/loss": L, "alpha/grad_norm": norm}

    def step(self, step: int, train: Batch, valid: Batch) -> dict[str, float]:
        epoch, noise = step // EPOCH_STEPS, moment(step, STEPS, EPOCH_STEPS, SEED).noise
        tau = self.tau[0] + (self.tau[1] - self.tau[0]) * epoch / (EPOCHS - 1)
        rate = 0.02 + 0.08 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        found = {"train/lr": rate, "alpha/temperature": tau}
        if self.gdas:  # w, then a
            return found | self.step_w(rate, tau, noise, train) | self.step_a(step + 1, tau, noise, valid)
        return found | self.step_a(step + 1, tau, noise, valid) | self.step_w(rate, tau, noise, train)


def started(make: Callable[..., Any], **given: Any) -> Any:
    net = Edges()
    strategy = make(**{"weights": WEIGHTS, "alphas": Alphas(lr=0.1, weight_decay=0.02), **given})
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    with torch.no_grad():
        strategy.alpha.double().logits["3"].copy_(torch.tensor([[0.3, -0.2, 0.1], [-0.4, 0.2, 0.0]]))
    return strategy


def check(make: Any, mutate: Mutation = lambda strategy, draw: draw, R: float | None = None, **given: Any) -> None:
    """Six steps in three epochs. AssertionError, saying WRONG, where anything differs."""
    strategy = started(make, **given)
    hand, twin = Hand(strategy, R), draws()
    draw = mutate(strategy, draws())
    for step in range(STEPS):
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
        expected = hand.step(step, twin("train"), twin("valid"))
        found = {tag: float(metrics.get(tag, math.nan)) for tag in expected}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-13), WRONG
        w, a = torch.cat([*strategy.net.parameters()]), strategy.alpha.logits["3"]
        assert w.tolist() == pytest.approx(hand.w.tolist(), rel=1e-9, abs=1e-11), WRONG
        assert a.flatten().tolist() == pytest.approx(hand.a.flatten().tolist(), rel=1e-9, abs=1e-11), WRONG


PRICED = {"R": 2.0, "budget": Budget("2", weight=0.7)}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (SNAS, {}), (SNAS, {"tau": (2.0, 0.5)}), (SNAS, PRICED), (GDAS, {}), (GDAS, {"idle": "absent"}),
    (GDAS, {"tau": (2.0, 0.5)}), (GDAS, PRICED),
]  # fmt: skip


@pytest.mark.parametrize("make, given", CASES, ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value))
def test_six_steps_by_hand(make: Callable[..., Any], given: dict[str, Any]) -> None:
    assert isinstance(Edges(), Supernet)
    check(make, **given)


@pytest.mark.parametrize("idle", ["ones", "absent"])
def test_a_pass_of_gdas_is_that_of_the_chosen_operations(idle: str) -> None:
    strategy, x = started(GDAS, idle=idle), draws()("valid").x
    met = set()
    for seed in range(20):
        now = moment(0, STEPS, EPOCH_STEPS, seed)
        sample, path = strategy.sample(1.0, now), strategy.arch(moment(0, STEPS, EPOCH_STEPS, seed))
        chosen = {name: s.options[s.active[0]] for name, s in sample.items()}
        strategy.net.ran.clear()
        z = strategy.net(x, sample)
        assert strategy.net.ran == [(i, Edges.options.index(chosen[f"edge{i}"])) for i in range(2)]  # nothing else ran
        assert torch.allclose(z, strategy.net(x, chosen), rtol=0, atol=1e-14)
        met.add(tuple(chosen.values()))
        assert not any(isinstance(setting, Mixture) for setting in path.values())
    assert len(met) > 4


@pytest.mark.parametrize("make, start, end", [(SNAS, 1.0, 0.03), (GDAS, 10.0, 0.1)])
def test_temperature_is_linear_over_the_epochs(make: Any, start: float, end: float) -> None:
    assert make().tau == (start, end)
    found = [temperature(moment(epoch * 7 + 3, 35, 7, 0), *make().tau) for epoch in (0, 2, 4)]
    assert found == pytest.approx([start, (start + end) / 2, end], rel=1e-12)
    assert temperature(moment(3, 7, 7, 0), start, end) == start  # a single epoch


@pytest.mark.parametrize("make, wrong, words", [
    (SNAS, {"tau": (1.0, 0.0)}, "is not a pair of temperatures. Allowed: above 0"), (GDAS, {"tau": (-1.0, 1.0)}, "above 0"),
    (GDAS, {"idle": "gate"}, "idle = 'gate' is not known. Allowed: ones, absent"),
])  # fmt: skip
def test_unknown_hyper_parameters_are_refused(make: Any, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**wrong)


# -- mutants ------------------------------------------------------------------------------------------------------------


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def other_order(strategy: Any, draw: Any) -> Any:
    """The two steps of SNAS change places; GDAS gives its weight step the second sample."""
    search, down, arch, waiting = strategy.search, strategy.w.down, strategy.arch, list[Any]()

    def late(now: Any) -> Any:
        strategy.sample(strategy.tau[0], now)
        return arch(now)

    def later(*given: Any) -> dict[str, Any]:
        waiting.append(given)
        return {}

    def both(loss: Tensor, norm: bool = False) -> None:
        down(loss, norm=norm)
        search(*waiting.pop())

    if isinstance(strategy, GDAS):
        strategy.arch = late  # type: ignore[method-assign]
    else:
        strategy.search, strategy.w.down = later, both
    return draw


def sampler(strategy: Any, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces how the alphas are sampled."""
    name = "straight_through" if isinstance(strategy, GDAS) else "gumbel"
    setattr(strategy.alpha, name, change(getattr(strategy.alpha, name)))


def reweighted(strategy: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Every sample's weights are changed."""

    def changed(sample: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tau, noise: {name: s._replace(weights=change(s.weights)) for name, s in sample(tau, noise).items()}

    sampler(strategy, changed)


def frozen_temperature(strategy: Any, draw: Any) -> Any:
    sampler(strategy, lambda sample: lambda tau, noise: sample(strategy.tau[0], noise))
    return draw


def one_noise(strategy: Any, draw: Any) -> Any:
    """Both samples of a step see the same noise."""
    sampler(strategy, lambda sample: lambda tau, noise: sample(tau, torch.Generator().manual_seed(noise.initial_seed())))
    return draw


def no_gradient(strategy: Any, draw: Any) -> Any:
    reweighted(strategy, lambda weights: 0.0 * weights + weights.detach())
    return draw


def half_the_gradient(strategy: Any, draw: Any) -> Any:
    reweighted(strategy, lambda weights: 0.5 * (weights + weights.detach()))
    return draw


def weight_step_reaches_alphas(strategy: Any, draw: Any) -> Any:
    def with_graph(sample: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(tau: float, noise: torch.Generator) -> Any:
            with torch.enable_grad():
                return sample(tau, noise)

        return drawn

    sampler(strategy, with_graph)
    strategy.w.add = lambda loss, *also: loss.backward()
    return draw


def the_other_idle(strategy: Any, draw: Any) -> Any:
    strategy.idle = "absent" if strategy.idle == "ones" else "ones"
    return draw


def unused_operations_rest(strategy: Any, draw: Any) -> Any:
    """Neither momentum nor decay where a path does not pass."""
    for p in strategy.w.params:
        p.register_hook(lambda g, p=p: torch.where(g == 0, -strategy.weights.weight_decay * p.detach(), g))
    return draw


def soft_weights(strategy: Any, draw: Any) -> Any:
    """The mixture itself instead of the straight-through path."""
    sampler(strategy, lambda _: strategy.alpha.gumbel)
    return draw


BOTH: list[Mutation] = [swapped_splits, other_order, frozen_temperature, one_noise, no_gradient, half_the_gradient]
MUTANTS = [*((make, mutant) for make in (SNAS, GDAS) for mutant in BOTH), (SNAS, weight_step_reaches_alphas),
           (GDAS, the_other_idle), (GDAS, unused_operations_rest), (GDAS, soft_weights)]  # fmt: skip


@pytest.mark.parametrize("make, mutant", MUTANTS, ids=lambda value: value.__name__)
def test_a_mutant_fails(make: Any, mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(make, mutant)
