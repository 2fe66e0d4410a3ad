"""RARTS through ``update``: the solvable model of the page (rarts.md, section 6) to its printed digits, and what is promised of
any smooth full-batch problem: the Lagrangian (1) falls, (5)-(7) hold at the end, beta brings y and w together.

All float64, plain SGD on all three variables. Letters as in nas/strategies/rarts.py: w, y, a, lam, beta, eta.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.descent import Descent
from nas.engine import moment
from nas.protocols import Batch, Setup
from nas.strategies.rarts import RARTS, unstable
from search_spaces.space import Choice, SearchSpace
from supernets.layers import Layer, Shape

NOW = moment(0, 1, 1, 0)  # RARTS draws nothing
ORDERS = [("w", "y", "a"), ("y", "w", "a"), ("a", "w", "y"), ("a", "y", "w")]


def doubles(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Raw(nn.Module):
    """Architecture variables that are read as they are."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def soft(self) -> dict[str, Any]:
        return {"a": self.a * 1.0}

    def entropy(self) -> Tensor:
        return torch.zeros(())


class Problem(nn.Module):
    """A net whose two rows of outputs are ``rows(w, a)``: of the training and of the validation loss."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.space = SearchSpace([Choice("a", (1, 2))], {})
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor, arch: Mapping[str, Any], drop: float = 0.0) -> Tensor:
        return self.rows(self.w, arch["a"])

    def rows(self, w: Tensor, a: Tensor) -> Tensor:
        raise AssertionError("of which problem?")

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return [Layer("a", "conv", ("a",), lambda k: Shape(k, 1))]


class Solvable(Problem):
    """L_val = a w - 2a + 1, L_train = (w - a)^2, many copies side by side: nothing of one reaches another."""

    def rows(self, w: Tensor, a: Tensor) -> Tensor:
        return torch.stack([(w - a) ** 2, a * w - 2 * a + 1])


class Quadratic(Problem):
    """L = 1/2 ||A w + B a - c||^2, with matrices of its own for each half. The columns of (A B) are orthonormal: L is strongly
    convex in (w, a), and well conditioned."""

    A, B = torch.linalg.qr(doubles(2, 9, 7, seed=1))[0].split([4, 3], dim=2)
    c = 3.0 * doubles(2, 9, seed=3)

    def rows(self, w: Tensor, a: Tensor) -> Tensor:
        return 0.5 * (self.A @ w + self.B @ a - self.c) ** 2


def which(split: str, size: int | None = None, odds: Any = None) -> Batch:
    """The label is the split, the row of outputs."""
    return Batch(torch.zeros(2, 1), torch.full((2,), ("train", "valid").index(split)), torch.arange(2))


def started(net: Problem, a: Tensor, eta: float, momentum: float = 0.0, **given: Any) -> RARTS:
    """Plain SGD of one rate on all three; a fresh start at the net's w."""
    weights = Weights(eta, eta, momentum=momentum, weight_decay=0.0, clip=None)
    strategy = RARTS(weights=weights, **given)
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), lambda z, y: z[y[0]].sum(), None, 1, 1, 1))
    strategy.alpha = Raw(a)
    strategy.a = Descent(strategy.alpha.parameters(), partial(SGD, lr=eta))
    return strategy


def solvable(y0: Sequence[float], eta: float, **given: Any) -> RARTS:
    """From (a, w) = (2, -2), one copy for each y0."""
    n = len(y0)
    strategy = started(Solvable(torch.full((n,), -2.0).double()), torch.full((n,), 2.0).double(), eta, **given)
    with torch.no_grad():
        strategy.twin.w.copy_(torch.tensor(y0))
    return strategy


def step(strategy: RARTS, count: int = 1) -> None:
    for _ in range(count):
        strategy.update(which, NOW)


def now(strategy: RARTS) -> Tensor:
    """(copies, 3): a, w, y."""
    return torch.stack([strategy.alpha.a, strategy.net.w, strategy.twin.w], dim=1).detach().clone()


# -- the solvable model -------------------------------------------------------------------------------------------------

Y0 = (-2.0, 0.0, 2.0)
TRAJECTORY = {  # t -> for each y0: a, w, y
    0: [(2, -2, -2), (2, -2, 0), (2, -2, 2)],
    1: [(1.3994, -1.2, -1.94), (1.4212, -1.0, -0.12), (1.443, -0.8, 1.7)],
    2: [(1.00705, -0.75412, -1.835406), (1.073058, -0.42776, -0.164988), (1.139066, -0.1014, 1.50543)],
    5: [(0.413752, -0.314321, -1.465316), (0.640032, 0.188871, -0.125719), (0.866311, 0.692064, 1.213879)],
    10: [(0.055609, -0.277295, -0.987123), (0.477093, 0.314260, 0.023425), (0.898577, 0.905816, 1.033972)],
    20: [(-0.130678, -0.277813, -0.525116), (0.430259, 0.340284, 0.194566), (0.991195, 0.958380, 0.914248)],
    50: [(0.022987, -0.053435, -0.128190), (0.530368, 0.464959, 0.374968), (1.037749, 0.983354, 0.878125)],
    100: [(0.346870, 0.278357, 0.196189), (0.699259, 0.637686, 0.543070), (1.051648, 0.997015, 0.889950)],
    200: [(0.729189, 0.668206, 0.572534), (0.898082, 0.840425, 0.738784), (1.066975, 1.012643, 0.905034)],
    500: [(1.042340, 0.987523, 0.880785), (1.060934, 1.006483, 0.899087), (1.079528, 1.025443, 0.917390)],
    1000: [(1.080101, 1.026028, 0.917955), (1.080572, 1.026508, 0.918417), (1.081042, 1.026987, 0.918880)],
    2000: [(1.081080, 1.027026, 0.918918), (1.081081, 1.027027, 0.918919), (1.081081, 1.027027, 0.918919)],
}


def test_the_trajectory_of_the_page() -> None:
    strategy, t = solvable(Y0, 0.01, lam=10.0, beta=10.0), 0
    for at, rows in TRAJECTORY.items():
        step(strategy, at - t)
        t = at
        expected = torch.tensor(rows, dtype=torch.float64)
        assert torch.allclose(now(strategy), expected, rtol=0, atol=6e-7), t  # six digits are printed


def end(lam: float, beta: float) -> Tensor:
    """(9): a, w, y."""
    D = 4 * lam * beta - 2 * lam - beta
    a = 4 * lam * beta / D
    return torch.tensor([a, a * (1 - 1 / (2 * lam)), 2 - a], dtype=torch.float64)


@pytest.mark.parametrize("lam, beta, eta, steps", [(10, 10, 0.02, 1300), (10, 10, 0.05, 550), (10, 10, 0.08, 350),
                                                   (2, 3, 0.1, 500), (1, 5, 0.15, 450)])  # fmt: skip
def test_the_end_point(lam: float, beta: float, eta: float, steps: int) -> None:
    """The fixed point (9), whatever the step and y0."""
    strategy = solvable(Y0, eta, lam=lam, beta=beta)
    step(strategy, steps)
    assert torch.allclose(now(strategy), end(lam, beta).expand(3, 3), rtol=0, atol=1e-7)
    if lam == beta == 10:
        assert torch.allclose(end(lam, beta), torch.tensor([1.081081, 1.027027, 0.918919]).double(), rtol=0, atol=6e-7)


@pytest.mark.parametrize("given", [*({"order": order} for order in ORDERS[1:3]), {"mode": "jacobi"}], ids=str)
def test_every_order_and_jacobi_end_at_the_same_point_by_other_paths(given: dict[str, Any]) -> None:
    strategy, other = solvable(Y0, 0.04, lam=10.0, beta=10.0, **given), solvable(Y0, 0.04, lam=10.0, beta=10.0)
    step(strategy, 3)
    step(other, 3)
    assert not torch.allclose(now(strategy), now(other), rtol=0, atol=1e-3)
    step(strategy, 650)
    assert torch.allclose(now(strategy), end(10, 10).expand(3, 3), rtol=0, atol=1e-7)


def test_the_first_step_of_jacobi_takes_old_values_everywhere() -> None:
    lam, beta, eta, a, w, y = 10.0, 10.0, 0.01, 2.0, -2.0, torch.tensor(Y0, dtype=torch.float64)
    strategy = solvable(Y0, eta, lam=lam, beta=beta, mode="jacobi")
    step(strategy)
    g_w, g_y = 2 * lam * (w - a) + beta * (w - y), a + beta * (y - w)  # (8)
    g_a = -2 * lam * (w - a) + y - 2
    stale = torch.stack([a - eta * g_a, w - eta * g_w, y - eta * g_y], dim=1)
    assert torch.allclose(now(strategy), stale, rtol=0, atol=1e-14)
    fresh = torch.tensor(TRAJECTORY[1], dtype=torch.float64)
    assert torch.allclose(stale[:, 1], fresh[:, 1]) and not torch.isclose(stale, fresh, atol=1e-3)[:, [0, 2]].any()


def test_the_coupling_is_in_the_gradient_before_momentum() -> None:
    """Three steps by hand: the velocity holds lam grad L + beta (w - y), so a coupling of the past goes on."""
    lam, beta, eta, mu = 4.0, 3.0, 0.02, 0.9
    strategy = solvable([1.0], eta, lam=lam, beta=beta, momentum=mu)
    a, w, y, v, u = 2.0, -2.0, 1.0, 0.0, 0.0
    for _ in range(3):
        v = mu * v + 2 * lam * (w - a) + beta * (w - y)
        w -= eta * v
        u = mu * u + a + beta * (y - w)
        y -= eta * u
        a -= eta * (-2 * lam * (w - a) + y - 2)
        step(strategy)
        assert now(strategy)[0].tolist() == pytest.approx([a, w, y], abs=1e-13)


def test_where_D_is_negative_it_diverges_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nas"):
        strategy = solvable([-2.0], 0.1, lam=0.3, beta=0.5)
        assert "is not below 1, where RARTS diverges" in caplog.text
        caplog.clear()
        solvable([-2.0], 0.01, lam=10.0, beta=10.0)
        assert caplog.text == ""
    step(strategy, 300)
    far = now(strategy).abs().max()
    step(strategy, 100)
    assert now(strategy).abs().max() > 1.5 * far > 100


@pytest.mark.parametrize("lam, beta, rate, momentum, words", [
    (10, 10, 0.01, 0.0, []), (1, 1, 0.025, 0.9, []), (0.25, 100, 0.0001, 0.9, ["is not below 1"]),
    (1, 2 / 3, 0.01, 0.0, ["is not below 1"]), (0.5, 1.01, 0.001, 0.0, []), (10, 10, 0.025, 0.9, ["2.5 at the first rate"]),
    (0.1, 50, 0.1, 0.0, ["is not below 1", "5 at the first rate"]), (10, 4, 0.025, 0.9, ["1 at the first rate"]),
])  # fmt: skip
def test_what_is_unstable(lam: float, beta: float, rate: float, momentum: float, words: list[str]) -> None:
    lines = unstable(lam, beta, rate, momentum)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines))


# -- any smooth problem -------------------------------------------------------------------------------------------------


def quadratic(lam: float, beta: float, eta: float, **given: Any) -> RARTS:
    strategy = started(Quadratic(doubles(4, seed=4)), doubles(3, seed=5), eta, lam=lam, beta=beta, **given)
    with torch.no_grad():
        strategy.twin.w.copy_(doubles(4, seed=6))
    return strategy


def gradients(strategy: RARTS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w, y, a, grad_w L_train, grad_y L_val, grad_a L_train, grad_a L_val: in matrices, no autograd."""
    w, y, a = (p.detach() for p in (strategy.net.w, strategy.twin.w, strategy.alpha.a))
    (A, P), (B, Q), (c, r) = Quadratic.A, Quadratic.B, Quadratic.c
    train, valid = A @ w + B @ a - c, P @ y + Q @ a - r
    return w, y, a, A.T @ train, P.T @ valid, B.T @ train, Q.T @ valid


def lagrangian(strategy: RARTS) -> float:
    """(1)."""
    w, y, a, *_ = gradients(strategy)
    (A, P), (B, Q), (c, r) = Quadratic.A, Quadratic.B, Quadratic.c
    L_train, L_val = ((A @ w + B @ a - c) ** 2).sum() / 2, ((P @ y + Q @ a - r) ** 2).sum() / 2
    return float(L_val + strategy.lam * L_train + strategy.beta / 2 * ((y - w) ** 2).sum())


@pytest.mark.parametrize("given", [*({"order": order} for order in ORDERS), {"mode": "jacobi"}], ids=str)
def test_the_lagrangian_falls(given: dict[str, Any]) -> None:
    strategy = quadratic(2.0, 3.0, 0.05, **given)
    found = [lagrangian(strategy)]
    for _ in range(60):
        step(strategy)
        found.append(lagrangian(strategy))
    assert all(after < before for before, after in pairwise(found)) and found[0] - found[-1] > 10.0


@pytest.mark.parametrize("given", [{}, {"order": ("y", "w", "a")}, {"mode": "jacobi"}], ids=str)
def test_at_the_end_5_to_7_hold_and_beta_brings_y_and_w_together(given: dict[str, Any]) -> None:
    lam, apart = 2.0, []
    for beta, eta, steps in ((1.0, 0.3, 70), (4.0, 0.15, 120), (16.0, 0.05, 350)):
        strategy = quadratic(lam, beta, eta, **given)
        step(strategy, steps)
        w, y, _, w_train, y_val, a_train, a_val = gradients(strategy)
        assert (lam * w_train + beta * (w - y)).abs().max() < 1e-6  # (5)
        assert (y_val + beta * (y - w)).abs().max() < 1e-6  # (6)
        assert (lam * a_train + a_val).abs().max() < 1e-6  # (7)
        apart.append(float((y - w).norm()))
        assert apart[-1] == pytest.approx(float(y_val.norm()) / beta, rel=1e-4)
        assert w_train.norm() > 0.1 and y_val.norm() > 0.1  # the halves disagree: neither is at its own minimum
    assert apart[0] > 1.5 * apart[1] > 4 * apart[2]
