"""ProxylessNAS through ``update``, six steps in float64 against the full graph (single-path.md, section 5, checks 5 to 8): all
operations run, autograd differentiates sum_j g_j f_j(x) in g, the chain rule, Adam, SGD and the rescaling are written out. What
was drawn is taken from the strategy; how it is drawn is tested in test_proxyless_parts. And mutants that must fail.

Letters: e an edge, j an option, f_ej(x) = tanh(u_ej x_e) of edges 0 and 1, h their sum, f_2j = sin(u_2j x_1 + h), logits
(f_2 + c, 0); option 0 is zero.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.cost import CostTable
from nas.engine import moment
from nas.latency import Row, write_latency
from nas.losses import CrossEntropy
from nas.protocols import Batch, Draw, Setup, Supernet
from nas.strategies.proxyless import Proxyless
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.layers import Layer, Shape
from supernets.mixing import blend
from supernets.operations import joined

EPOCHS, EPOCH_STEPS, SEED = 3, 2, 7
STEPS = EPOCHS * EPOCH_STEPS
WRONG = "not what the full graph gives"
OPTIONS = ("none", "small", "wide", "large")
KERNELS = {"small": (2, 2), "large": (3, 3), "wide": (1, 5)}
COSTS = torch.tensor([0.0, 4.0, 5.0, 9.0], dtype=torch.float64)  # of every edge; 16 are fixed
Mutation = Callable[[Any, Any], Any]
WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=None, idle="skip")
SETTLED = Alphas(lr=0.1, betas=(0.0, 0.999), weight_decay=0.0)
MOVING = Alphas(lr=0.1, betas=(0.5, 0.999), weight_decay=0.02)


class Space(SearchSpace):
    nones = ("none",)


class Edges(nn.Module):
    """Two edges that are added, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.space = Space([Choice(f"edge{e}", OPTIONS, ordered=False) for e in range(3)], {})
        u = [[0.7, -0.4, 1.1], [0.9, -1.3, 0.5], [-0.6, 0.8, 1.4]]
        self.u = nn.ParameterList([nn.Parameter(torch.tensor(v, dtype=torch.float64)) for row in u for v in row])
        self.c = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.ran: list[tuple[int, int, bool]] = []

    def op(self, e: int, j: int, x: Tensor, h: Tensor) -> Tensor:
        self.ran.append((e, j, torch.is_grad_enabled()))
        u = self.u[3 * e + j - 1]
        return (u * x[:, 1] + h).sin() if e == 2 else (u * x[:, e]).tanh()

    def node(self, edges: Sequence[int], x: Tensor, h: Tensor, arch: Mapping[str, Setting]) -> Tensor:
        settings = {e: arch[f"edge{e}"] for e in edges}
        if not any(isinstance(s, Mixture) for s in settings.values()):
            found = [self.op(e, OPTIONS.index(str(s)), x, h) for e, s in settings.items() if s != "none"]
            return sum(found, start=torch.zeros_like(h))
        candidates: list[Any] = []
        for e, s in settings.items():
            assert isinstance(s, Mixture)
            for j in map(OPTIONS.index, s.options):  # type: ignore[arg-type]
                candidates.append((lambda _, w, e=e, j=j: (self.op(e, j, x, h), w)) if j else None)
        mixtures = [s for s in settings.values() if isinstance(s, Mixture)]
        return blend(candidates, x, joined(mixtures), lambda x: x[:, 0] * 0.0)

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, 2) -> (B, 2)
        h = self.node((0, 1), x, torch.zeros_like(x[:, 0]), arch)
        o = self.node((2,), x, h, arch) + self.c
        return torch.stack([o, torch.zeros_like(o)], dim=1)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        def shape(option: str) -> Shape | None:
            return Shape(1, 1, KERNELS[option]) if option in KERNELS else None

        return [Layer("head", "conv", (), lambda: Shape(1, 1, (4, 4))),
                *(Layer(f"edge{e}", "conv", (f"edge{e}",), shape) for e in range(3))]  # fmt: skip

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


class Hand:
    """The same steps, written out: every operation runs, weighted by a gate that is a leaf."""

    def __init__(self, strategy: Proxyless, price: str, R: float, costs: Tensor, fixed: float) -> None:
        self.s, self.price, self.R, self.zero_rests = strategy, price, R, strategy.zero_rests
        self.costs, self.fixed = costs, fixed
        self.u = torch.stack([p.detach().clone() for p in (*strategy.net.u, strategy.net.c)])
        self.a = strategy.alpha.logits["4"].detach().clone()
        self.buffer, self.m, self.v = torch.zeros(10).double(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
        self.count = 0

    def loss(self, u: Tensor, g: Sequence[Mapping[int, Tensor]], batch: Batch) -> Tensor:
        """L of the full graph; g: for each edge the gates of the options that have one."""
        x, h = batch.x, torch.zeros(4).double()
        h = sum((gate * (u[3 * e + j - 1] * x[:, e]).tanh() for e in (0, 1) for j, gate in g[e].items() if j), h)
        o = sum((gate * (u[6 + j - 1] * x[:, 1] + h).sin() for j, gate in g[2].items() if j), torch.zeros(4).double())
        return -torch.log_softmax(torch.stack([o + u[9], torch.zeros(4).double()], 1), 1)[torch.arange(4), batch.y].mean()

    def step_w(self, path: Mapping[str, Setting], batch: Batch, rate: float) -> dict[str, float]:
        on = [OPTIONS.index(str(path[f"edge{e}"])) for e in range(3)]
        u = self.u.clone().requires_grad_()
        L = self.loss(u, [{j: torch.ones(()).double()} for j in on], batch)
        (G,) = torch.autograd.grad(L, u)
        used = torch.zeros(10, dtype=torch.bool)  # where edge 2 is none, nothing before it is reached
        used[[3 * e + j - 1 for e, j in enumerate(on) if j and (on[2] or e == 2)] + [9]] = True
        norm = float(G[used].norm())
        G = G + WEIGHTS.weight_decay * self.u
        self.buffer = torch.where(used, WEIGHTS.momentum * self.buffer + G, self.buffer)
        self.u = torch.where(used, self.u - rate * self.buffer, self.u)
        return {"train/loss": L.item(), "train/lr": rate, "train/grad_norm": norm}

    def step_a(self, drawn: Sequence[tuple[Sequence[int], int]], batch: Batch) -> dict[str, float]:
        """``drawn``: for each edge the options that take part, and the active one."""
        g = [{j: torch.tensor(float(j == i), dtype=torch.float64, requires_grad=True) for j in at} for at, i in drawn]
        L = self.loss(self.u, g, batch)
        dots = torch.autograd.grad(L, [gate for row in g for gate in row.values()], allow_unused=True, materialize_grads=True)
        G, p = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
        part = torch.zeros(3, 4, dtype=torch.bool)
        found = iter(dots)
        for e, (at, _) in enumerate(drawn):
            part[e, at] = True
            p[e, at] = self.a[e, at].exp() / self.a[e, at].exp().sum()
            for j in at:
                G[e, j] = next(found)
        s, costs, E = self.s, self.costs, self.fixed + (p * self.costs).sum()
        if self.price == "mul_log":
            factor = s.cost_a * (E.log() / math.log(self.R)) ** s.cost_b
            G = factor * G + L.detach() * factor * s.cost_b / (E * E.log()) * costs
        elif self.price == "add_linear":
            G = G + s.cost_c * costs / self.R
        elif self.price == "budget":
            G = G + torch.sign(E - self.R) * costs / E
        da = torch.zeros(3, 4).double()
        for e, (at, i) in enumerate(drawn):
            for k in at:
                da[e, k] = sum(G[e, j] * p[e, j] * (float(j == k) - p[e, k]) for j in at)
            assert abs(float(da[e].sum())) < 1e-14
            if self.zero_rests and i == 0:
                da[e], part[e] = 0.0, False
        self.adam(da, part)
        return {"valid/loss": L.item(), "alpha/grad_norm": float(da.norm())}

    def adam(self, da: Tensor, part: Tensor) -> None:
        self.count += 1
        (b1, b2), G = self.s.alphas.betas, da + self.s.alphas.weight_decay * self.a
        self.m, self.v = b1 * self.m + (1 - b1) * G, b2 * self.v + (1 - b2) * G**2
        new = self.a - self.s.alphas.lr * self.m / (1 - b1**self.count) / ((self.v / (1 - b2**self.count)).sqrt() + 1e-8)
        for e in range(3 if self.s.mode == "two" else 0):
            new[e] -= (new[e][part[e]].exp().sum() / self.a[e][part[e]].exp().sum()).log() if part[e].any() else 0.0
        self.a = torch.where(part, new, self.a)


def started(**given: Any) -> Any:
    net = Edges()
    strategy = Proxyless(**{"weights": WEIGHTS, "alphas": SETTLED, "every": 1, **given})
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    start = [[0.3, -0.2, 0.1, 0.5], [-0.4, 0.2, 0.0, 0.3], [0.1, 0.6, -0.3, 0.2]]
    with torch.no_grad():
        strategy.alpha.double().logits["4"].copy_(torch.tensor(start))
    return strategy


def listened(strategy: Any) -> tuple[list[Any], list[Any]]:
    """The paths and the gates of the steps to come, as the strategy hands them to the net."""
    paths, gates = list[Any](), list[Any]()

    def hear(net: nn.Module, given: tuple[Any, ...]) -> None:
        (gates if isinstance(given[1]["edge0"], Mixture) else paths).append(given[1])

    strategy.net.register_forward_pre_hook(hear)
    return paths, gates


def numbered(gates: Mapping[str, Any]) -> list[tuple[list[int], int]]:
    """For each edge the options that have a gate, and the one that is open."""
    return [([OPTIONS.index(o) for o in s.options], OPTIONS.index(s.options[s.weights.argmax()])) for s in gates.values()]


def check(
    mutate: Mutation = lambda strategy, draw: draw, seed: int = SEED, price: str = "",
    costs: tuple[float, Tensor, float] = (35.0, COSTS, 16.0), **given: Any,
) -> None:  # fmt: skip
    """Six steps in three epochs. AssertionError, saying WRONG, where anything differs. ``costs``: the target, what the options
    of an edge cost, and what is fixed."""
    strategy, twin = started(**given), draws()
    hand, (paths, gates) = Hand(strategy, price, *costs), listened(strategy)
    draw = mutate(strategy, draws())
    for step in range(STEPS):
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, seed))
        rate = 0.02 + 0.08 * (1 + math.cos(math.pi * (step // EPOCH_STEPS) / EPOCHS)) / 2
        expected = hand.step_w(paths.pop(), twin("train"), rate)
        assert bool(gates) == ((step + 1) % given.get("every", 1) == 0)
        if gates:
            expected |= hand.step_a(numbered(gates.pop()), twin("valid"))
        found = {tag: float(metrics.get(tag, math.nan)) for tag in expected}
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-13), WRONG
        u, a = torch.stack([*strategy.net.u, strategy.net.c]), strategy.alpha.logits["4"]
        assert u.tolist() == pytest.approx(hand.u.tolist(), rel=1e-11, abs=1e-12), WRONG
        assert a.flatten().tolist() == pytest.approx(hand.a.flatten().tolist(), rel=1e-9, abs=1e-11), WRONG


def priced(kind: str, **given: Any) -> dict[str, Any]:
    return {"price": kind, "budget": Budget("35"), "cost_loss": kind, **given}


CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "every": {"every": 2}, "zero learns": {"zero_rests": False}, "momentum": {"alphas": MOVING},
    "mul_log": priced("mul_log", cost_a=0.7, cost_b=0.3), "add_linear": priced("add_linear", cost_c=0.5),
    "budget": priced("budget"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["full_v2", "two", "full"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [7, 11])
def test_six_steps_are_those_of_the_full_graph(case: str, mode: str, seed: int) -> None:
    assert isinstance(Edges(), Supernet)
    check(mode=mode, seed=seed, **CASES[case])


@pytest.mark.parametrize("mode", ["full_v2", "two"])
@pytest.mark.parametrize("kind", ["mul_log", "budget"])
def test_six_steps_at_the_milliseconds_of_a_table(kind: str, mode: str, tmp_path: Path) -> None:
    """A price that is no count of multiply-adds: the operation with more of them is the cheaper one."""
    ms = {"small": 0.45, "wide": 0.3, "large": 0.8}
    rows = [Row("conv", Shape(1, 1, KERNELS[option]), ms[option]) for option in KERNELS]
    write_latency(tmp_path / "ms.csv", [*rows, Row("conv", Shape(1, 1, (4, 4)), 2.0)])
    budget = Budget(3.8, price=str(tmp_path / "ms.csv"))
    costs = 3.8, torch.tensor([0.0, 0.45, 0.3, 0.8], dtype=torch.float64), 2.0
    check(price=kind, mode=mode, costs=costs, budget=budget, cost_loss=kind, cost_a=0.7, cost_b=0.3)
    with pytest.raises(AssertionError, match=WRONG):
        check(price=kind, mode=mode, costs=(3.8, COSTS / 10, 2.0), budget=budget, cost_loss=kind, cost_a=0.7, cost_b=0.3)


# -- mutants ------------------------------------------------------------------------------------------------------------


def reweighted(strategy: Any, change: Callable[[str, Mixture], Tensor]) -> None:
    """The net's gates have other weights."""
    ran = strategy.ran
    strategy.ran = lambda gates: {name: s._replace(weights=change(name, s)) for name, s in ran(gates).items()}


def wrong_sign(strategy: Any, draw: Any) -> Any:
    reweighted(strategy, lambda name, s: 2 * s.weights.detach() - s.weights)
    return draw


def no_p(strategy: Any, draw: Any) -> Any:
    """The gate's gradient as that of the logit."""

    def straight(name: str, s: Mixture) -> Tensor:
        a = strategy.alpha.logits["4"][int(name[-1])][[OPTIONS.index(o) for o in s.options]]  # type: ignore[arg-type]
        return s.weights.detach() + a - a.detach()

    reweighted(strategy, straight)
    return draw


def active_alone(strategy: Any, draw: Any) -> Any:
    """Only the gate of the operation that ran learns."""
    reweighted(strategy, lambda name, s: torch.where(s.weights.detach() > 0, s.weights, s.weights.detach()))
    return draw


def no_rescaling(strategy: Any, draw: Any) -> Any:
    step = strategy.step

    def flat(gates: Any) -> None:
        mode, strategy.mode = strategy.mode, "full_v2"
        step(gates)
        strategy.mode = mode

    strategy.step = flat
    return draw


def all_logits_move(strategy: Any, draw: Any) -> Any:
    strategy.parts = lambda gates: [(a, torch.ones_like(a, dtype=torch.bool)) for a in strategy.alpha.logits.values()]
    return draw


def leaks(strategy: Any, draw: Any) -> Any:
    """The pass of the gates leaves gradients in the weights."""
    strategy.w.frozen, strategy.a.add = nullcontext, lambda loss: loss.backward()
    return draw


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def zero_learns(strategy: Any, draw: Any) -> Any:
    strategy.zero_rests = False
    return draw


def unpriced(strategy: Any, draw: Any) -> Any:
    strategy.priced = lambda loss, soft: loss
    return draw


def cost_of_all(strategy: Any, draw: Any) -> Any:
    """E under the softmax of all options, where only two take part."""
    priced = strategy.priced
    strategy.priced = lambda loss, soft: priced(loss, strategy.alpha.soft())
    return draw


def cost_of_the_path(strategy: Any, draw: Any) -> Any:
    """E of the gates' values, which are one-hot."""
    sample = strategy.sample
    strategy.sample = lambda now: (lambda gates: (gates, gates))(sample(now)[1])
    return draw


ALWAYS: list[Mutation] = [wrong_sign, no_p, active_alone, leaks, swapped_splits]
MUTANTS: list[tuple[Mutation, dict[str, Any]]] = [
    *((mutant, {"mode": mode}) for mutant in ALWAYS for mode in ("full_v2", "two")),
    *((mutant, priced(price, mode="two")) for mutant in (unpriced, cost_of_all) for price in ("mul_log", "add_linear")),
    (no_rescaling, {"mode": "two"}), (all_logits_move, {"mode": "two", "alphas": MOVING}), (zero_learns, {}),
    (cost_of_the_path, priced("mul_log")),
]  # fmt: skip


@pytest.mark.parametrize("mutant, given", MUTANTS, ids=lambda value: value.__name__ if callable(value) else "-".join(value))
def test_a_mutant_fails(mutant: Mutation, given: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant, **given)
