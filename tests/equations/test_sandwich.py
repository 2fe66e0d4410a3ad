"""The sandwich step of BigNAS through ``update`` against the same from four separately computed gradients, in float64
(bignas.md, sections 3 and 6); and mutants of it, each of which must fail that comparison.

The net is a small perceptron: z = gain (1 - drop) tanh(x W1[:c]^T) norm[:c] W2[:, :c]^T + b, c the width; dropout scales, so
that what it does is known.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies import bignas
from nas.strategies.bignas import BigNAS, published
from search_spaces.space import Choice, SearchSpace, Setting
from supernets.layers import Layer

B, D, C, N = 6, 4, 5, 3
STEPS, EPOCH_STEPS, SEED, DROP = 6, 2, 5, 0.25
WRONG = "not what was computed by hand"
PLAIN = Weights(lr=0.1, lr_min=0.02, momentum=0.8, weight_decay=0.05, clip=None, per_epoch=False)
Mutation = Callable[[Any], Any]


class Perceptron(nn.Module):
    """See the top of this file. ``ran``: (arch, drop) of every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.space = SearchSpace([Choice("width", (1, 2, 3, 5)), Choice("gain", (1, 2))], {})
        generator = torch.Generator().manual_seed(1)
        self.W1, self.norm, self.W2, self.b = (
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
            for shape in ((C, D), (C,), (N, C), (N,)))  # fmt: skip
        self.ran: list[tuple[dict[str, Any], float]] = []

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, D) -> (B, N)
        self.ran.append((dict(arch), drop))
        return logits(dict(self.named_parameters()), x, arch, drop)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return []


def logits(w: Mapping[str, Tensor], x: Tensor, arch: Mapping[str, Any], drop: float = 0.0) -> Tensor:
    c = arch["width"]
    h = torch.tanh(x @ w["W1"][:c].T) * w["norm"][:c] * (1 - drop)
    return arch["gain"] * h @ w["W2"][:, :c].T + w["b"]


class Draws:
    def __init__(self) -> None:
        self.generator, self.asked = torch.Generator().manual_seed(2), []  # type: ignore[var-annotated]

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        self.asked.append((split, size, odds))
        x = torch.randn(B, D, generator=self.generator, dtype=torch.float64)
        return Batch(x, torch.randint(N, (B,), generator=self.generator), torch.arange(B))


def smoothed(z: Tensor, y: Tensor, by: float = 0.1) -> Tensor:
    """Cross-entropy with (1 - by) on the class and by / N everywhere."""
    target = (1 - by) * F.one_hot(y, N).double() + by / N
    return -(target * z.log_softmax(1)).sum(1).mean()


class Hand:
    """The same step: a gradient a child, the teacher a constant, then v = mu v + g + wd w;  w <- w - lr v."""

    def __init__(self, net: Perceptron, children: int, mean: bool, weights: Weights) -> None:
        self.w = {name: p.detach().clone() for name, p in net.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in self.w.items()}
        self.space, self.children, self.mean, self.weights = net.space, children, mean, weights

    def gradient(self, loss: Callable[[Mapping[str, Tensor]], Tensor]) -> list[Tensor]:
        leaves = {name: w.clone().requires_grad_() for name, w in self.w.items()}
        return list(torch.autograd.grad(loss(leaves), list(leaves.values())))

    def step(self, batch: Batch, rng: random.Random, rate: float) -> dict[str, float]:
        x, y, _ = batch
        largest, smallest = {"width": 5, "gain": 2}, {"width": 1, "gain": 1}
        teacher = logits(self.w, x, largest, DROP)
        p = teacher.softmax(1)
        children: list[Mapping[str, Any]] = [smallest, *(self.space.sample(rng) for _ in range(self.children))]

        def distance(w: Mapping[str, Tensor], child: Mapping[str, Any]) -> Tensor:
            return -(p * logits(w, x, child).log_softmax(1)).sum(1).mean()

        all_ = [self.gradient(lambda w: smoothed(logits(w, x, largest, DROP), y))]
        all_ += [self.gradient(lambda w, child=child: distance(w, child)) for child in children]  # type: ignore[misc]
        g = [sum(parts) / (len(all_) if self.mean else 1) for parts in zip(*all_)]
        losses = [distance(self.w, child).item() for child in children]
        found = {"train/loss": smoothed(teacher, y).item(), "train/loss_smallest": losses[0], "train/lr": rate,
                 "train/grad_norm": get_total_norm(g).item()}  # fmt: skip
        if self.children:
            found["train/loss_children"] = sum(losses[1:]) / self.children
        for (name, w), part in zip(self.w.items(), g):
            decay = self.weights.weight_decay if self.weights.norm_decay or w.ndim > 1 else 0.0
            self.v[name] = self.weights.momentum * self.v[name] + part + decay * w  # type: ignore[operator]
            self.w[name] = w - rate * self.v[name]
        return found


def started(strategy: BigNAS, net: Perceptron, loss: Any = None, steps: int = STEPS, epoch_steps: int = EPOCH_STEPS) -> BigNAS:
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), loss or CrossEntropy(0.1), None, steps, epoch_steps, B))
    return strategy


def check(mutate: Mutation = lambda strategy: None, children: int = 2, mean: bool = False, weights: Weights = PLAIN) -> None:
    """Six steps. AssertionError, saying WRONG, where anything differs."""
    net = Perceptron()
    strategy = started(BigNAS(children, DROP, "mean" if mean else "sum", weights), net)
    hand, draw, twin = Hand(net, children, mean, weights), Draws(), Draws()
    mutate(strategy)
    for step in range(STEPS):
        rate = strategy.w.rate
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
        expected = hand.step(twin("train"), moment(step, STEPS, EPOCH_STEPS, SEED).rng, rate)
        assert {tag: float(metrics[tag]) for tag in expected} == pytest.approx(expected, rel=1e-10), WRONG
        for name, p in net.named_parameters():
            assert p.tolist() == pytest.approx(hand.w[name].tolist(), rel=1e-10, abs=1e-13) if p.ndim == 1 else torch.allclose(
                p.detach(), hand.w[name], rtol=1e-10, atol=1e-13), WRONG  # fmt: skip
    assert draw.asked == [("train", None, None)] * STEPS


@pytest.mark.parametrize("norm_decay", [True, False])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("children", [0, 2, 3])
def test_six_steps_are_separate_gradients(children: int, mean: bool, norm_decay: bool) -> None:
    check(children=children, mean=mean, weights=replace(PLAIN, norm_decay=norm_decay))


# -- mutants ------------------------------------------------------------------------------------------------------------


def wrong_sum(strategy: BigNAS) -> None:
    strategy.combine = "mean"


def undetached_teacher(strategy: BigNAS) -> None:
    """One backward of all losses at the end, in which the biggest learns from its children too."""
    losses: list[Tensor] = []
    forward, last = strategy.net.forward, strategy.w.step
    teachers: list[Tensor] = []

    def noted(x: Tensor, arch: Any, drop: float = 0.0) -> Tensor:
        z = forward(x, arch, drop)
        if not losses:
            teachers[:] = [z]
        else:
            losses.append(-(teachers[0].softmax(1) * z.log_softmax(1)).sum(1).mean())
        return z

    def step(norm: bool = False) -> None:
        sum(losses[1:], losses[0]).backward()  # type: ignore[no-untyped-call]
        losses.clear()
        last(norm)

    strategy.net.forward, strategy.w.step = noted, step  # type: ignore[method-assign]
    strategy.w.add = lambda loss, *also: losses.append(loss) if not losses else None  # type: ignore[method-assign]


def decay_per_child(strategy: BigNAS) -> None:
    add = strategy.w.add

    def with_decay(loss: Tensor, *also: Any) -> None:
        add(loss + 0.5 * 0.05 * sum((p**2).sum() for p in strategy.w.params))

    strategy.w.add = with_decay  # type: ignore[method-assign]


def dropped(rate: Callable[[int, float], float]) -> Mutation:
    """The n-th forward of a step runs with dropout of ``rate(n, asked)``."""

    def mutate(strategy: BigNAS) -> None:
        forward, count = strategy.net.forward, [0]

        def other(x: Tensor, arch: Any, drop: float = 0.0) -> Tensor:
            count[0] += 1
            return forward(x, arch, rate((count[0] - 1) % 4, drop))

        strategy.net.forward = other

    return mutate


def dropout_on_children(strategy: BigNAS) -> None:
    dropped(lambda n, asked: DROP)(strategy)


def no_dropout(strategy: BigNAS) -> None:
    dropped(lambda n, asked: 0.0)(strategy)


def no_smoothing(strategy: BigNAS) -> None:
    strategy.setup = strategy.setup._replace(loss=CrossEntropy())


def replaced(D: Callable[[Tensor, Tensor], Tensor]) -> Mutation:
    """Another distance of child and teacher."""

    def mutate(strategy: BigNAS) -> None:
        update = strategy.update

        def other(*args: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bignas, "soft_cross_entropy", D)
                return update(*args)

        strategy.update = other  # type: ignore[method-assign, assignment]

    return mutate


def smoothing_in_children(strategy: BigNAS) -> None:
    replaced(lambda z, t: F.cross_entropy(z, t.softmax(1), label_smoothing=0.1))(strategy)


def hard_labels_of_the_teacher(strategy: BigNAS) -> None:
    replaced(lambda z, t: F.cross_entropy(z, t.argmax(1)))(strategy)


def other_way_round(strategy: BigNAS) -> None:
    replaced(lambda z, t: F.kl_div(t.log_softmax(1), z.log_softmax(1), reduction="batchmean", log_target=True))(strategy)


def summed_over_the_batch(strategy: BigNAS) -> None:
    replaced(lambda z, t: F.cross_entropy(z, t.softmax(1), reduction="sum"))(strategy)


def a_step_for_each_child(strategy: BigNAS) -> None:
    add = strategy.w.add

    def and_step(loss: Tensor, *also: Any) -> None:
        add(loss)
        type(strategy.w).step(strategy.w, True)

    strategy.w.add, strategy.w.step = and_step, lambda norm=False: None  # type: ignore[method-assign, assignment, misc]


class Elsewhere:
    """A space whose extremes or samples are others."""

    def __init__(self, space: SearchSpace, **changed: Any) -> None:
        self.space = space
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.space, name)


def no_smallest(strategy: BigNAS) -> None:
    strategy.space = Elsewhere(strategy.space, smallest=strategy.space.largest)  # type: ignore[assignment]


def the_same_children_every_step(strategy: BigNAS) -> None:
    sample = strategy.space.sample
    strategy.space = Elsewhere(strategy.space, sample=lambda _: sample(random.Random(0)))  # type: ignore[assignment]


def one_child_fewer(strategy: BigNAS) -> None:
    strategy.children = 1


def norms_rest(strategy: BigNAS) -> None:
    strategy.w = replace(PLAIN, norm_decay=False).descent(strategy.net.parameters(), strategy.setup)


MUTANTS: list[Mutation] = [
    wrong_sum, undetached_teacher, decay_per_child, dropout_on_children, no_dropout, no_smoothing, smoothing_in_children,
    hard_labels_of_the_teacher, other_way_round, summed_over_the_batch, a_step_for_each_child, no_smallest,
    the_same_children_every_step, one_child_fewer, norms_rest,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


# -- what the step is made of -------------------------------------------------------------------------------------------


def test_the_order_of_children_and_their_dropout() -> None:
    net = Perceptron()
    strategy, now = started(BigNAS(drop=DROP), net, steps=100, epoch_steps=10), moment(0, 100, 10, SEED)
    strategy.update(Draws(), now)
    rng = moment(0, 100, 10, SEED).rng
    assert net.ran == [(strategy.arch(now), DROP), (net.space.smallest(), 0.0), (net.space.sample(rng), 0.0),
                       (net.space.sample(rng), 0.0)]  # fmt: skip
    assert net.ran[0][0] == strategy.architecture() == {"width": 5, "gain": 2} and strategy.passes() == 4


@pytest.mark.parametrize("norm_decay", [True, False])
@pytest.mark.parametrize("children", [0, 2, 5])
def test_decay_is_added_once_however_many_children_ran(children: int, norm_decay: bool) -> None:
    """Without a data gradient each decayed weight shrinks by exactly lr wd w; norms and biases only if they decay."""

    class Silent(Perceptron):
        def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
            return 0.0 * super().forward(x, arch, drop)

    net = Silent()
    weights = Weights(lr=0.5, lr_min=0.5, momentum=0.0, weight_decay=0.25, clip=None, norm_decay=norm_decay)
    strategy = started(BigNAS(children, DROP, weights=weights), net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    strategy.update(Draws(), moment(0, STEPS, EPOCH_STEPS, SEED))
    for name, p in net.named_parameters():
        decayed = norm_decay or p.ndim > 1
        assert torch.equal(p.detach(), before[name] * (1 - 0.5 * 0.25) if decayed else before[name])


def test_no_gradient_through_the_teacher() -> None:
    """What only the biggest uses gets the gradient of the label loss alone, though every child is compared with its logits."""
    net = Perceptron()
    strategy = started(BigNAS(0, DROP, weights=replace(PLAIN, lr=1.0, lr_min=1.0, momentum=0.0, weight_decay=0.0)), net)
    before, (x, y, _) = net.W1.detach().clone(), Draws()("train")
    (label,) = torch.autograd.grad(smoothed(net(x, net.space.largest(), DROP), y), [net.W1])
    strategy.update(Draws(), moment(0, STEPS, EPOCH_STEPS, SEED))
    assert torch.allclose((before - net.W1.detach())[1:], label[1:], rtol=1e-12, atol=0)  # the smallest has a width of 1
    assert not torch.allclose((before - net.W1.detach())[0], label[0], rtol=1e-3, atol=0)


def test_the_published_rate() -> None:
    """lr(0) = lr0, the floor from epoch 236 on and never below it; five epochs of warming up come before."""
    epoch_steps = 20
    net = Perceptron()
    strategy = started(BigNAS(weights=replace(published(), warmup_epochs=0)), net, None, 360 * epoch_steps, epoch_steps)
    rates = []
    for count in range(360 * epoch_steps):
        strategy.w.count = count
        rates.append(strategy.w.rate)
    assert rates[0] == 0.256 and min(rates) == pytest.approx(0.05 * 0.256, rel=1e-15)
    assert rates[236 * epoch_steps] > 0.05 * 0.256 * (1 + 1e-9) and rates[237 * epoch_steps] == rates[-1] == min(rates)
    warm = started(BigNAS(), Perceptron(), None, 365 * epoch_steps, epoch_steps).w
    assert warm.rate == pytest.approx(0.256 / 100)
    warm.count = 100
    assert warm.rate == 0.256


@pytest.mark.parametrize("wrong, words", [
    ({"children": -1}, "children = -1"), ({"drop": 1.0}, r"drop = 1\.0"), ({"combine": "max"}, "Allowed: sum, mean"),
])  # fmt: skip
def test_what_is_not_known_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BigNAS(**wrong)
