"""Six steps of RARTS, (2)-(4), through ``update`` with its own Descents and logits, against the same by hand in float64; and
mutants, each of which must fail that comparison. The net is the one of test_darts_steps: two mixed edges.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_darts_steps import EPOCH_STEPS, EPOCHS, SEED, STEPS, WRONG, Edges, draws, gradients, settle
from torch import Tensor

from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.rarts import RARTS
from search_spaces.preresnet import PreResNet
from supernets.preresnet import PreResNet as Scaled

Mutation = Callable[[Any, Any], Any]
WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=0.3)


def size(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((t**2).sum()) for t in tensors))


class Copy:
    """Weights and their velocity: SGD with momentum, decay and clipping."""

    def __init__(self, values: list[Tensor], weights: Weights) -> None:
        self.values, self.weights = values, weights
        self.v = [torch.zeros_like(p) for p in values]
        self.norm = 0.0

    def down(self, g: list[Tensor], rate: float) -> None:
        """A new list: what was read of the old one stays."""
        W, self.norm = self.weights, size(g)
        scale = 1.0 if W.clip is None else min(1.0, W.clip / (self.norm + 1e-6))
        g = [scale * d + W.weight_decay * p for d, p in zip(g, self.values)]
        self.v = [W.momentum * v + d for v, d in zip(self.v, g)]
        self.values = [p - rate * (d + W.momentum * v if W.nesterov else v) for p, d, v in zip(self.values, g, self.v)]


class Hand:
    """(2)-(4) on lists of tensors, in the order and mode of ``strategy``."""

    b1, b2 = 0.5, 0.999

    def __init__(self, strategy: RARTS, R: float | None) -> None:
        s = strategy
        self.lam, self.beta, self.order, self.mode, self.hold, self.R = s.lam, s.beta, s.order, s.mode, s.hold_coupling, R
        self.w, self.y = (Copy([p.detach().clone() for p in s.net.parameters()], s.weights) for _ in range(2))  # y starts as w
        self.a = [s.alpha.logits[K][0].detach().clone() for K in ("3", "2")]
        self.alphas = s.alphas
        self.m, self.n, self.count = [torch.zeros_like(a) for a in self.a], [torch.zeros_like(a) for a in self.a], 0

    def step(self, step: int, train: Batch, valid: Batch) -> dict[str, float]:
        W, epoch = self.w.weights, step // EPOCH_STEPS
        self.rate = W.lr_min + (W.lr - W.lr_min) * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        self.strength = self.beta * (W.lr / self.rate if self.hold else 1.0)
        self.rests, self.found = epoch < self.alphas.warmup_epochs, dict[str, float]()
        if self.mode == "jacobi":
            g = self.of_w(train), self.of_y(valid), self.of_a(train, valid)
            self.w.down(g[0], self.rate)
            self.y.down(g[1], self.rate)
            self.adam(g[2])
        for name in self.order if self.mode == "gauss_seidel" else ():
            if name == "w":
                self.w.down(self.of_w(train), self.rate)  # (2)
            elif name == "y":
                self.y.down(self.of_y(valid), self.rate)  # (3)
            else:
                self.adam(self.of_a(train, valid))  # (4)
        return self.found | {
            "train/lr": self.rate, "train/grad_norm": self.w.norm, "rarts/coupling": self.strength * self.rate,
            "rarts/distance": size([q - p for p, q in zip(self.w.values, self.y.values)]),
        }  # fmt: skip

    def of_w(self, train: Batch) -> list[Tensor]:
        """lam grad_w L_train + beta (w - y)."""
        self.found["train/loss"], g, _ = gradients(train, self.w.values, self.a)
        return [self.lam * d + self.strength * (p - q) for d, p, q in zip(g, self.w.values, self.y.values)]

    def of_y(self, valid: Batch) -> list[Tensor]:
        """grad_y L_val + beta (y - w)."""
        self.found["valid/loss"], g, _ = gradients(valid, self.y.values, self.a)
        return [d + self.strength * (q - p) for d, p, q in zip(g, self.w.values, self.y.values)]

    def of_a(self, train: Batch, valid: Batch) -> list[Tensor]:
        """lam grad_a L_train(w, a) + grad_a L_val(y, a)."""
        one, other = gradients(train, self.w.values, self.a)[2], gradients(valid, self.y.values, self.a, self.R)[2]
        return [self.lam * d + e for d, e in zip(one, other)]

    def adam(self, G: list[Tensor]) -> None:
        if self.rests:
            return
        self.found["alpha/grad_norm"] = size(G)
        self.count += 1
        for i, a in enumerate(self.a):
            G[i] = G[i] + self.alphas.weight_decay * a
            self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * G[i]
            self.n[i] = self.b2 * self.n[i] + (1 - self.b2) * G[i] ** 2
            root = (self.n[i] / (1 - self.b2**self.count)).sqrt() + 1e-8
            self.a[i] = a - self.alphas.lr * self.m[i] / (1 - self.b1**self.count) / root


def check(mutate: Mutation = lambda strategy, draw: draw, R: float | None = None, **given: Any) -> None:
    """Six steps in three epochs. AssertionError, saying WRONG, where anything differs."""
    net = Edges()
    strategy = RARTS(**{"lam": 2.0, "beta": 3.0, "weights": WEIGHTS, "alphas": Alphas(lr=0.1, weight_decay=0.02), **given})
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    settle(strategy.alpha)
    hand, twin = Hand(strategy, R), draws()
    draw = mutate(strategy, draws())
    for step in range(STEPS):
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
        expected = hand.step(step, twin("train"), twin("valid"))
        found = {tag: float(metrics.get(tag, math.nan)) for tag in expected}
        assert found == pytest.approx(expected, rel=1e-9), WRONG
        mine = [*strategy.net.parameters(), *strategy.twin.parameters(), *(strategy.alpha.logits[K][0] for K in ("3", "2"))]
        for p, q in zip(mine, [*hand.w.values, *hand.y.values, *hand.a]):
            assert p.detach().tolist() == pytest.approx(q.tolist(), rel=1e-9, abs=1e-11), WRONG


@pytest.mark.parametrize("given", [
    {}, {"order": ("y", "w", "a")}, {"order": ("a", "y", "w")}, {"mode": "jacobi"}, {"hold_coupling": True},
    {"mode": "jacobi", "hold_coupling": True}, {"weights": Weights(0.1, 0.02, 0.9, True, 0.05, None)},
    {"alphas": Alphas(lr=0.1, weight_decay=0.02, warmup_epochs=1)},
    {"mode": "jacobi", "alphas": Alphas(lr=0.1, weight_decay=0.02, warmup_epochs=1)},
    {"R": 2.0, "budget": Budget("2", weight=0.7)}, {"mode": "jacobi", "R": 2.0, "budget": Budget("2", weight=0.7)},
], ids=["w-y-a", "y-w-a", "a-y-w", "jacobi", "held", "jacobi-held", "nesterov", "warm-up", "jacobi-warm-up", "budget",
        "jacobi-budget"])  # fmt: skip
def test_six_steps_by_hand(given: dict[str, Any]) -> None:
    check(**given)


# -- the width search ---------------------------------------------------------------------------------------------------


def on_scales(**given: Any) -> RARTS:
    """On a small pre-activation ResNet, in float64, with scales of both signs."""
    space = PreResNet(11, widths=(2, 2, 2))
    net = Scaled(space, channels=1, classes=3).double()
    strategy = RARTS(lam=2.0, beta=3.0, kind="scales", l1=0.25, weights=WEIGHTS, **given)
    strategy.start(Setup(net, space, CostTable(net, (8, 8)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    with torch.no_grad():
        strategy.alpha.double().scales.copy_(torch.linspace(-0.6, 0.9, len(strategy.alpha.scales)))
    return strategy


def images(split: str, size: int | None = None, odds: Any = None) -> Batch:
    generator = torch.Generator().manual_seed(("train", "valid").index(split))
    x = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(3, (4,), generator=generator), torch.arange(4))


@pytest.mark.parametrize("mode, order", [("jacobi", ("w", "y", "a")), ("gauss_seidel", ("a", "w", "y"))])
@pytest.mark.parametrize("given", [{}, {"budget": Budget("60%")}], ids=["free", "budget"])
def test_4_of_scales_has_the_penalty_once(mode: str, order: Any, given: dict[str, Any]) -> None:
    """lam grad_a L_train + grad_a L_val + l1 sign(a); a budget is met by the threshold and pulls at nothing."""
    strategy, found = on_scales(mode=mode, order=order, **given), list[Tensor]()
    step, scales = strategy.a.step, strategy.alpha.scales
    expected = 0.25 * scales.detach().sign()
    for net, split, factor in ((strategy.net, "train", 2.0), (strategy.twin, "valid", 1.0)):
        x, y, _ = images(split)
        loss = CrossEntropy()(net(x, strategy.alpha.soft()), y)
        expected = expected + factor * torch.autograd.grad(loss, scales)[0]

    def watched(norm: bool = False) -> None:
        found.append(torch.as_tensor(scales.grad).clone())
        step(norm)

    strategy.a.step = watched  # type: ignore[method-assign]
    metrics = strategy.update(images, moment(0, STEPS, EPOCH_STEPS, SEED))
    assert torch.allclose(found[0], expected, rtol=0, atol=1e-12) and len(found) == 1
    assert not any(tag.startswith("cost/") for tag in metrics)


def test_the_widths_are_what_the_threshold_leaves() -> None:
    for keep in (0.3, 0.8):
        strategy = on_scales(keep=keep)
        assert strategy.architecture() == strategy.alpha.architecture(keep=keep)
    strategy = on_scales(budget=Budget("60%", side="at_most"))
    arch, full = strategy.architecture(), strategy.costs.of(strategy.space.largest())
    assert 0.45 * full < strategy.costs.of(arch) <= 0.6 * full and strategy.fits(arch)
    assert not strategy.fits(strategy.space.largest())


# -- mutants ------------------------------------------------------------------------------------------------------------


def wrong_sign(name: str) -> Mutation:
    def mutant(strategy: Any, draw: Any) -> Any:
        descent = getattr(strategy, name)
        pull = descent.pull
        descent.pull = lambda toward, by: pull(toward, -by)
        return draw

    mutant.__name__ = f"wrong_sign_of_{name}"
    return mutant


def uncoupled(name: str) -> Mutation:
    def mutant(strategy: Any, draw: Any) -> Any:
        getattr(strategy, name).pull = lambda toward, by: None
        return draw

    mutant.__name__ = f"uncoupled_{name}"
    return mutant


def coupling_after_the_optimizer(strategy: Any, draw: Any) -> Any:
    """The coupling moves the weights beside momentum and decay, as a proximal step would."""
    for descent in (strategy.w, strategy.y):

        def pull(toward: Sequence[Tensor], by: float, descent: Any = descent) -> None:
            gaps = [by * descent.rate * (p - q).detach() for p, q in zip(descent.params, toward)]
            step = type(descent).step

            def late(norm: bool = False) -> None:
                step(descent, norm)
                with torch.no_grad():
                    for p, gap in zip(descent.params, gaps):
                        p.sub_(gap)

            descent.step = late

        descent.pull = pull
    return draw


def stale_w(strategy: Any, draw: Any) -> Any:
    """(3) reads w of before (2)."""
    update, pull, old = strategy.update, strategy.y.pull, list[Tensor]()

    def noted(draw: Any, now: Any) -> Any:
        old[:] = [p.detach().clone() for p in strategy.w.params]
        return update(draw, now)

    strategy.update, strategy.y.pull = noted, lambda toward, by: pull(old, by)
    return draw


def fresh_w(strategy: Any, draw: Any) -> Any:
    """Jacobi, but (3) reads w of after (2)."""
    pull_y, step_y = strategy.y.pull, strategy.y.step
    strategy.y.pull = lambda toward, by: None

    def late(norm: bool = False) -> None:
        pull_y(strategy.w.params, strategy.beta)
        step_y(norm)

    strategy.y.step = late
    return draw


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def of_a(factors: tuple[float, float], name: str) -> Mutation:
    """The two terms of (4) times ``factors``."""

    def mutant(strategy: Any, draw: Any) -> Any:
        add, calls = strategy.a.add, [0]

        def wrong(loss: Tensor, *also: Any) -> None:
            add(loss * factors[calls[0] % 2], *also)
            calls[0] += 1

        strategy.a.add = wrong
        return draw

    mutant.__name__ = name
    return mutant


def alpha_from_w_twice(strategy: Any, draw: Any) -> Any:
    """L_val too is read at w."""
    down, twin = strategy.down_a, strategy.twin

    def wrong(train: Batch, valid: Batch) -> None:
        strategy.twin = strategy.net
        down(train, valid)
        strategy.twin = twin

    strategy.down_a = wrong
    return draw


def no_lambda_in_2(strategy: Any, draw: Any) -> Any:
    add = strategy.w.add
    strategy.w.add = lambda loss, *also: add(loss / strategy.lam, *also)
    return draw


def other(**changes: Any) -> Mutation:
    def mutant(strategy: Any, draw: Any) -> Any:
        vars(strategy).update(changes)
        return draw

    mutant.__name__ = "-".join(f"{name}={value}" for name, value in changes.items())
    return mutant


def one_velocity(strategy: Any, draw: Any) -> Any:
    """w and y share their momentum."""
    for p, q in zip(strategy.w.params, strategy.y.params):
        strategy.y.optimizer.state[q]["momentum_buffer"] = strategy.w.optimizer.state[p]["momentum_buffer"]
    return draw


def weight_step_reaches_alphas(strategy: Any, draw: Any) -> Any:
    soft = strategy.alpha.soft

    def with_graph() -> Any:
        with torch.enable_grad():
            return soft()

    strategy.alpha.soft = with_graph
    strategy.w.add = lambda loss, *also: loss.backward()
    return draw


def alpha_step_reaches_weights(strategy: Any, draw: Any) -> Any:
    strategy.w.frozen = strategy.y.frozen = nullcontext
    strategy.a.add = lambda loss, *also: loss.backward()
    return draw


MUTANTS: list[Mutation] = [
    wrong_sign("w"), wrong_sign("y"), uncoupled("w"), uncoupled("y"), coupling_after_the_optimizer, stale_w, swapped_splits,
    of_a((0.5, 1.0), "no_lambda_in_4"), of_a((2.0, 1.0), "lambda_squared_in_4"), of_a((1.0, 0.0), "alpha_from_w_alone"),
    of_a((0.0, 1.0), "alpha_from_y_alone"), of_a((1.0, -1.0), "wrong_sign_in_4"), alpha_from_w_twice, no_lambda_in_2,
    other(mode="jacobi"), other(order=("y", "w", "a")), other(order=("a", "w", "y")), other(hold_coupling=True), one_velocity,
    weight_step_reaches_alphas, alpha_step_reaches_weights,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


@pytest.mark.parametrize("mutant", [wrong_sign("w"), uncoupled("y"), fresh_w, swapped_splits, other(mode="gauss_seidel")],
                         ids=lambda mutant: mutant.__name__)  # fmt: skip
def test_a_mutant_of_jacobi_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant, mode="jacobi")


@pytest.mark.parametrize("wrong, words", [
    ({"order": ("w", "y", "y")}, "is not an order of the three updates. Allowed: w, y, a, each once"),
    ({"mode": "both"}, "mode = 'both' is not known. Allowed: gauss_seidel, jacobi"),
    ({"kind": "widths"}, "kind = 'widths' is not known. Allowed: mixture, scales"),
    ({"lam": 0.0}, "lam = 0.0, beta = 1.0.*Allowed: lam and beta above 0"), ({"beta": -1.0}, "beta = -1.0"),
    ({"keep": 0.0}, "keep = 0.0"), ({"l1": -1e-4}, "l1 = -0.0001"),
])  # fmt: skip
def test_unknown_hyper_parameters_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RARTS(**wrong)
