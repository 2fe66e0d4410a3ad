"""RSPS and Random through ``update``: what is sampled, what is trained on it and which one wins (single-path.md, sections 2, 4
and 5). The net is a vector w and a rule that says how many images of a validation batch an architecture gets right.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.protocols import Batch, Setup
from nas.strategies.random import Random
from nas.strategies.rsps import RSPS
from search_spaces.nats import OPS, Topology
from search_spaces.space import Arch, Choice, SearchSpace, Setting
from supernets.layers import Layer

B, SEED = 12, 3
SCALES = SearchSpace([Choice("depth", (1, 2)), Choice("width", (1, 2, 4, 8), needs=(("depth", (2,)),))], {})


class Rule(nn.Module):
    """Gets ``right(arch, i)`` of the B images of the i-th batch right. Its loss is 1/2 ||w - t||^2, t = ``target(arch)``."""

    def __init__(self, space: SearchSpace, right: Callable[[Arch, int], int]) -> None:
        super().__init__()
        self.space, self.right = space, right
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.ran: list[tuple[Arch, bool]] = []  # what ran, and whether with a graph
        self.resets: list[Tensor] = []

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, 1), which is the number of the batch -> logits of the classes 0 (right) and 1, and w - t."""
        self.ran.append((dict(arch), torch.is_grad_enabled()))  # type: ignore[arg-type]
        wrong = torch.arange(len(x)) >= self.right(dict(arch), int(x[0, 0]))  # type: ignore[arg-type]
        offset = self.w - target(arch)
        return torch.cat([1e6 * torch.stack([~wrong, wrong], dim=1), offset.expand(len(x), 2)], dim=1)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return []

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> list[Any]:
        return []

    def reset(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.w.copy_(torch.randn(2, generator=generator))
        self.resets.append(self.w.detach().clone())


def target(arch: Mapping[str, Any]) -> Tensor:
    return torch.tensor([len(str(value)) for value in arch.values()][:2], dtype=torch.float64)


class Draws:
    """Batches of B images of class 0, numbered within their split."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        number = sum(name == split for name, _ in self.asked)
        self.asked.append((split, odds))
        return Batch(torch.full((B, 1), float(number)), torch.zeros(B).long(), torch.arange(B))


def started(strategy: Any, net: Rule, steps: int, epoch_steps: int = 1) -> Any:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (z[0, 2:] ** 2).sum()

    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), loss, None, steps, epoch_steps, B))
    return strategy


# -- RSPS ---------------------------------------------------------------------------------------------------------------


def fit(counts: Counter, odds: Mapping[Any, float]) -> float:
    """The p-value of a chi-square test; 0 where something impossible was met."""
    n = sum(counts.values())
    if set(counts) - set(odds):
        return 0.0
    return float(chi2.sf(sum((counts[key] - n * p) ** 2 / (n * p) for key, p in odds.items()), len(odds) - 1))


def test_rsps_redraws_a_node_while_all_its_operations_are_none() -> None:
    """Node 1: none never, each other operation 1/4; 24 and 124 equally likely draws for nodes 2 and 3."""
    strategy, now = started(RSPS(), Rule(Topology(1, 1), lambda arch, i: 0), 1), moment(0, 1, 1, SEED)
    archs = [strategy.arch(now) for _ in range(4000)]  # from one stream: a fresh one each step is as good
    space = strategy.space
    for node in (1, 2, 3):
        names = [name for name in (choice.name for choice in space.choices) if name.startswith(f"node{node}.")]
        met = Counter(tuple(arch[name] for name in names) for arch in archs)
        legal = [draw for draw in product(OPS, repeat=len(names)) if set(draw) != {"none"}]
        assert len(legal) == (4, 24, 124)[node - 1]
        assert fit(met, dict.fromkeys(legal, 1 / len(legal))) > 1e-3
        biased = {draw: float(1 + (draw[0] == "none")) for draw in legal}
        if node > 1:  # the test sees a first operation that is none twice as often
            assert fit(met, {draw: p / sum(biased.values()) for draw, p in biased.items()}) < 1e-6
    pairs = Counter((arch["node1.from0"], arch["node2.from1"]) for arch in archs)  # nodes are independent
    odds = {(op, other): (5 if other != "none" else 4) / 24 / 4 for op in OPS[1:] for other in OPS}
    assert fit(pairs, odds) > 1e-3


def test_rsps_trains_a_fresh_legal_architecture_each_step() -> None:
    net = Rule(Topology(1, 1), lambda arch, i: 0)
    weights = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=0.5)
    strategy, draw = started(RSPS(archs=1, weights=weights), net, 6, 2), Draws()
    w, v = torch.zeros(2).double(), torch.zeros(2).double()
    for step in range(5):
        announced = strategy.arch(moment(step, 6, 2, SEED))
        metrics = strategy.update(draw, moment(step, 6, 2, SEED))
        assert net.ran[-1] == (announced, True) and strategy.architecture() == announced
        g, rate = w - target(announced), 0.02 + 0.08 * (1 + math.cos(math.pi * (step // 2) / 3)) / 2
        v = 0.9 * v + g * min(1.0, 0.5 / (float(g.norm()) + 1e-6)) + 0.05 * w
        w = w - rate * v  # (1)
        assert net.w.tolist() == pytest.approx(w.tolist(), rel=1e-12) and metrics["train/lr"] == pytest.approx(rate)
    assert len({tuple(arch.values()) for arch, _ in net.ran}) > 3 and draw.asked == [("train", None)] * 5


def strings(arch: Arch, op: str) -> int:
    return sum(value == op for value in arch.values())


@pytest.mark.parametrize("batches", [1, 2])
def test_rsps_takes_the_best_of_its_architectures(batches: int) -> None:
    """Of 40 random ones, judged on random validation batches of their own; the first of equal ones."""

    def right(arch: Arch, i: int) -> int:
        return min(2 * strings(arch, "nor_conv_3x3" if i % batches == 0 else "skip_connect"), 6)

    net = Rule(Topology(1, 1), right)
    strategy, draw = started(RSPS(archs=40, batches=batches), net, 3), Draws()
    for step in range(3):
        metrics = strategy.update(draw, moment(step, 3, 1, SEED))
        assert ("valid/top1" in metrics) == (step == 2)
    rng = moment(2, 3, 1, SEED).rng
    net.space.sample(rng)  # what step 2 trained
    tried = [net.space.sample(rng) for _ in range(40)]
    scores = [sum(right(arch, i) for i in range(batches)) / B / batches for arch in tried]
    assert strategy.architecture() == tried[scores.index(max(scores))] and len(set(scores)) > 2
    assert batches > 1 or scores.count(max(scores)) > 1
    assert metrics["valid/top1"] == pytest.approx(max(scores))
    assert draw.asked == [("train", None)] * 3 + [("select", 1.0)] * 40 * batches
    assert net.ran[3:] == [(arch, False) for arch in tried for _ in range(batches)]


# -- Random -------------------------------------------------------------------------------------------------------------


def quality(arch: Arch, i: int) -> int:
    return {1: 3, 2: 9, 4: 6, 8: 9}[int(arch["width"])] if arch["depth"] == 2 else 4


def test_a_random_search_by_hand() -> None:
    """Ten steps, three trials: they begin at 0, 4 and 7, each with weights, momentum and schedule of its own."""
    net, draw = Rule(SCALES, quality), Draws()
    given: list[dict[str, Any]] = [{"depth": 2, "width": 4}]
    weights = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=None)
    strategy = started(Random(trials=3, judge=2, given=given, weights=weights), net, 10)
    begins, at, ended = (0, 4, 7), 0, []
    for step in range(10):
        announced = strategy.arch(moment(step, 10, 1, SEED))
        fresh = len(net.resets)
        metrics = strategy.update(draw, moment(step, 10, 1, SEED))
        assert len(net.resets) - fresh == (step in begins)
        if step in begins:
            arch, w, v, at = announced, net.resets[-1], torch.zeros(2).double(), step
        rate = 0.02 + 0.08 * (1 + math.cos(math.pi * min(step - at, 3) / 3)) / 2
        v = 0.9 * v + w - target(arch) + 0.05 * w
        w = w - rate * v  # (1)
        assert net.w.tolist() == pytest.approx(w.tolist(), rel=1e-12) and metrics["train/lr"] == pytest.approx(rate)
        assert announced == arch and metrics["random/trial"] == sum(begin <= step for begin in begins) - 1
        last = step in (3, 6, 9)
        assert ("valid/top1" in metrics) == last and net.ran[-1] == (arch, not last)
        if last:
            ended.append((arch, w.tolist(), quality(arch, 0) / B))
            assert metrics["valid/top1"] == pytest.approx(ended[-1][2])
            best = max(ended, key=lambda trial: trial[2])
            assert strategy.architecture() == best[0]
            assert strategy.network(best[0]).w.tolist() == pytest.approx(best[1], rel=1e-12)
    assert ended[0][0] == given[0] and len({tuple(w.tolist()) for w in net.resets}) == 3
    assert Counter(draw.asked) == {("train", None): 10, ("select", None): 6}
    others = [arch for arch, _, _ in ended if arch != best[0]]
    assert others and all(strategy.network(arch) is net for arch in others)


def test_the_winner_keeps_its_weights_and_is_the_first_of_equal_ones() -> None:
    """The second of three given architectures wins, the third is as good; what follows does not touch its weights."""
    given: list[dict[str, Any]] = [{"depth": 1, "width": 4}, {"depth": 2, "width": 2}, {"depth": 2, "width": 8}]
    net = Rule(SCALES, quality)
    strategy, draw = started(Random(trials=3, judge=1, given=given), net, 3), Draws()
    held = []
    for step in range(3):
        strategy.update(draw, moment(step, 3, 1, SEED))
        held.append(net.w.detach().clone())
    assert [arch["depth"] for arch, graph in net.ran if graph] == [1, 2, 2]
    assert strategy.architecture() == given[1] and torch.equal(strategy.network(given[1]).w, held[1])
    assert not torch.equal(held[1], held[2]) and strategy.best()["top1"] == 0.75
    assert net.ran[0][0] == {"depth": 1, "width": 1}  # canonical, as an arch.json says it


def test_before_a_trial_has_ended_the_one_under_way_is_the_architecture() -> None:
    net = Rule(SCALES, quality)
    strategy = started(Random(trials=2), net, 8)
    strategy.update(Draws(), moment(0, 8, 1, SEED))
    assert strategy.architecture() == net.ran[0][0] and strategy.network(net.ran[0][0]) is net and strategy.best() is None


@pytest.mark.parametrize("make, steps, words", [
    (lambda: Random(trials=0), 4, "trials = 0"), (lambda: Random(judge=0), 4, "judge = 0"),
    (lambda: Random(trials=1, given=[SCALES.largest()] * 2), 4, "2 given"),
    (lambda: Random(trials=5), 4, "5 trials need 5 steps at least, the run has 4"),
    (lambda: Random(given=[{"depth": 3, "width": 1}]), 8, "depth = 3 is not in this space"),
    (lambda: RSPS(archs=0), 4, "archs = 0"), (lambda: RSPS(batches=0), 4, "batches = 0"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused(make: Callable[[], Any], steps: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        started(make(), Rule(SCALES, quality), steps)
