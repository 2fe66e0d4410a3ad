"""The step of DARTS on a, (1)-(5), through ``update``: against the figures of the pages (darts.md and rarts.md, section 6), and
against the exact gradient of the unrolled step by double backward.

All float64. Letters as in nas/strategies/darts.py: w, a, v, xi, mu, wd, eps, g, h.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from test_darts_steps import no_second_order, scaled_by_eps_squared
from torch import Tensor, nn
from torch.optim import SGD

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.descent import Descent
from nas.engine import moment
from nas.protocols import Batch, Setup
from nas.strategies.darts import DARTS
from search_spaces.space import Choice, SearchSpace
from supernets.layers import Layer, Shape

SEED = 5
PLAIN: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "clip": None}
Mutation = Callable[[Any, Any], Any]


# -- problems of a few numbers, whose net hands w and a on to the loss ------------------------------------------------------


class Raw(nn.Module):
    """Architecture variables that are read as they are."""

    def __init__(self, a: Sequence[float]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def soft(self) -> dict[str, Any]:
        return {"a": self.a * 1.0}

    def entropy(self) -> Tensor:
        return torch.zeros(())


class Point(nn.Module):
    """z = (w, a), one row, whatever the images."""

    def __init__(self, w: Sequence[float]) -> None:
        super().__init__()
        self.space = SearchSpace([Choice("a", (1, 2))], {})
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor, arch: Mapping[str, Any], drop: float = 0.0) -> Tensor:
        return torch.cat([self.w, arch["a"]])[None]

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return [Layer("a", "conv", ("a",), lambda k: Shape(k, 1))]


def which(split: str, size: int | None = None, odds: Any = None) -> Batch:
    """The label is the split: 0 train, 1 valid."""
    return Batch(torch.zeros(1, 1), torch.tensor([("train", "valid").index(split)]), torch.zeros(1).long())


def started(problem: Callable[[Tensor, Tensor, bool], Tensor], w: Sequence[float], a: Sequence[float], eta_a: float,
            steps: int = 1, **given: Any) -> DARTS:  # fmt: skip
    """On L(w, a, valid?), with plain SGD of rate ``eta_a`` on a."""
    net = Point(w)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return problem(z[0, : len(w)], z[0, len(w) :], bool(y))

    strategy = DARTS(**given)
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), loss, None, steps, 1, 1))
    strategy.alpha = Raw(a)  # type: ignore[assignment]
    strategy.a = Descent(strategy.alpha.parameters(), partial(SGD, lr=eta_a))
    return strategy


def variable(strategy: DARTS) -> Tensor:
    """a."""
    (a,) = strategy.alpha.parameters()
    return a


def solvable(w: Tensor, a: Tensor, valid: bool) -> Tensor:
    """rarts.md, section 6."""
    return (a * w - 2 * a + 1 if valid else (w - a) ** 2).sum()


def bumpy(w: Tensor, a: Tensor, valid: bool) -> Tensor:
    """darts.md, section 6."""
    (w1, w2), (a1, a2) = w, a
    if valid:
        return (w1 * w2 - a1) ** 2 + 0.1 * (a1**2 + a2**2) * w2
    return ((w1 * a1).sin() + w2 * a2 - 1) ** 2 + 0.5 * (w1 - a2) ** 2


# -- the solvable model -------------------------------------------------------------------------------------------------

TRAJECTORIES: dict[float, dict[int, tuple[float, float]]] = {
    0.0: {0: (2, -2), 1: (2.4, -1.12), 2: (2.712, -0.3536), 5: (3.229839, 1.340859), 10: (3.237197, 2.647636),
          20: (2.441234, 2.660470), 50: (1.983589, 1.977998), 100: (1.999968, 2.000014)},
    0.5: {0: (2, -2), 1: (1.8, -1.24), 2: (1.64, -0.664), 5: (1.327680, 0.344640), 10: (1.107374, 0.892626),
          20: (1.011529, 1.011529), 50: (1.000014, 1.000100), 100: (1.0, 1.0)},
}  # fmt: skip


def trajectory(end: int, mutate: Mutation = lambda strategy, draw: draw, **given: Any) -> dict[int, tuple[float, float]]:
    strategy = started(solvable, [-2.0], [2.0], 0.1, end, weights=Weights(0.1, 0.1, **PLAIN), **given)
    draw = mutate(strategy, which)
    found = {}
    for t in range(end + 1):
        found[t] = variable(strategy).item(), strategy.net.w.item()
        if t < end:
            strategy.update(draw, moment(t, end, 1, SEED))
    return found


@pytest.mark.parametrize("given, xi", [({"order": 1}, 0.0), ({"xi": 0.0}, 0.0), ({"xi": 0.5}, 0.5)],
                         ids=["first order", "xi = 0", "second order"])  # fmt: skip
def test_trajectories_of_the_page(given: dict[str, Any], xi: float) -> None:
    found = trajectory(200, **given)
    for t, row in TRAJECTORIES[xi].items():
        assert found[t] == pytest.approx(row, abs=6e-7), t
    assert found[200] == pytest.approx([2 / (1 + 2 * xi)] * 2, abs=1e-6)  # (11): (2, 2), or (1, 1)


def test_the_first_gradient_of_a_is_2_and_without_the_second_order_term_0() -> None:
    for mutate, g_a in ((lambda s, draw: draw, 2.0), (no_second_order, 0.0)):
        (a, _), (moved, _) = trajectory(1, mutate, xi=0.5).values()
        assert (a - moved) / 0.1 == pytest.approx(g_a, abs=1e-11)
    assert trajectory(200, no_second_order, xi=0.5)[200] == pytest.approx((2, 2), abs=1e-6)  # the trap of the page


# -- the second-order check ---------------------------------------------------------------------------------------------

W, A, XI = (0.3, -0.7), (0.5, 1.2), 0.1


def unrolled(problem: Any, w: Tensor, a: Tensor, v: Tensor, xi: float, mu: float, wd: float, nesterov: bool) -> Tensor:
    """d/da L_val(w'(a), a), by backward through (2); the optimizer's own step is w' under Nesterov momentum too."""
    w, a = w.detach().clone().requires_grad_(), a.detach().clone().requires_grad_()
    (d,) = torch.autograd.grad(problem(w, a, False), w, create_graph=True)
    d = d + wd * w
    ahead = w - xi * (d + mu * (mu * v + d) if nesterov else mu * v + d)
    return torch.autograd.grad(problem(ahead, a, True), a)[0]


def one_step(mutate: Mutation = lambda strategy, draw: draw, **given: Any) -> dict[str, Any]:
    """The gradient that a gets in the page's check, and what it was made of."""
    strategy = started(bumpy, W, A, 1.0, weights=Weights(XI, XI, **PLAIN), **given)
    draw, found = mutate(strategy, which), dict[str, Any]()
    grad, shifted = strategy.w.grad, strategy.w.shifted

    def watched(loss: Tensor, *also: Descent) -> list[Tensor]:
        g = grad(loss, *also)
        found.update(norm=float(torch.cat(g).norm()), h=torch.as_tensor(variable(strategy).grad).clone())
        return g

    def moved(g: list[Tensor], by: Any) -> Any:
        found.setdefault("eps", float(by))
        return shifted(g, by)

    strategy.w.grad, strategy.w.shifted = watched, moved  # type: ignore[method-assign,assignment]
    strategy.update(draw, moment(0, 1, 1, SEED))
    return {**found, "g": torch.tensor(A, dtype=torch.float64) - variable(strategy).detach()}


def test_the_second_order_check_of_the_page() -> None:
    assert one_step(order=1)["g"].tolist() == pytest.approx((1.35, -0.168), abs=1e-12)
    found = one_step(order=2)
    assert found["h"].tolist() == pytest.approx((1.298477774, -0.070623636), abs=6e-10)
    assert found["g"].tolist() == pytest.approx((1.455330232, -0.293417795), abs=6e-10)
    assert found["norm"] == pytest.approx(0.691782186, abs=6e-10) and found["eps"] == pytest.approx(0.014455417, abs=6e-10)
    assert found["eps"] * found["norm"] == pytest.approx(0.01, rel=1e-14)
    w, a = (torch.tensor(value, dtype=torch.float64) for value in (W, A))
    exact = unrolled(bumpy, w, a, torch.zeros(2), XI, 0.0, 0.0, False)
    assert exact.tolist() == pytest.approx((1.455331040, -0.293417691), abs=6e-10)
    assert one_step(scaled_by_eps_squared)["g"].tolist() == pytest.approx((1.298510550, -0.070670191), abs=6e-10)


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
@pytest.mark.parametrize("xi", [None, 0.07])
def test_the_gradient_of_a_is_that_of_the_unrolled_step(xi: float | None, nesterov: bool) -> None:
    """With momentum, decay and a schedule: at every step, by double backward. xi = None is the current rate."""
    weights = Weights(0.1, 0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.3, clip=None)
    strategy = started(bumpy, W, A, 0.1, 6, weights=weights, xi=xi)
    steps, rates = [], []
    for step in range(6):
        w, a = strategy.net.w.detach().clone(), variable(strategy).detach().clone()
        v, rate = strategy.w.optimizer.state[strategy.net.w]["momentum_buffer"].clone(), strategy.w.rate
        strategy.update(which, moment(step, 6, 1, SEED))
        exact = unrolled(bumpy, w, a, v, rate if xi is None else xi, 0.9, 0.3, nesterov)
        assert ((a - variable(strategy).detach()) / 0.1).tolist() == pytest.approx(exact.tolist(), rel=2e-5)
        steps.append(v.norm().item())
        rates.append(rate)
    assert min(steps[1:]) > 0.05 and len(set(rates)) == 6  # momentum and schedule have something to say
