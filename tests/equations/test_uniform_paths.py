"""SPOS and FairNAS through ``update``: how paths are drawn and what is trained on them (single-path.md, sections 2 and 5), and
mutants that must fail. The net is a table of one vector an option; a path adds its vectors:

    z = x (sum over choices i of T_i[option of i])
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.fairnas import FairNAS
from nas.strategies.spos import SPOS
from search_spaces.nats import OPS, Topology
from search_spaces.space import Arch, Choice, SearchSpace, Setting
from supernets.layers import Layer

B, N, SEED = 5, 3, 7
WRONG = "not what strict fairness asks"
FAIR = [Choice(f"layer{i}", ("a", "b", "c"), ordered=False) for i in range(4)]
WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.8, weight_decay=0.05, clip=0.5, per_epoch=False)
Mutation = Callable[[Any], Any]


def space_of(*choices: Choice) -> SearchSpace:
    unordered = {c.name: c.options[-1] for c in choices if not c.ordered}
    return SearchSpace(choices, {}, dear=unordered, cheap=unordered)


class Table(nn.Module):
    """See the top of this file. ``ran``: every path; ``seen``: the batch of each."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        generator = torch.Generator().manual_seed(1)
        self.T = nn.ParameterList(
            [torch.randn(len(c.options), N, generator=generator, dtype=torch.float64) for c in space.root.choices])
        self.ran: list[Arch] = []
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, 1) -> (B, N)
        self.ran.append(dict(arch))  # type: ignore[arg-type]
        self.seen.append(x)
        return logits(self.space, list(self.T), x, arch)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return []


def logits(space: SearchSpace, T: list[Tensor], x: Tensor, arch: Mapping[str, Any]) -> Tensor:
    return x * sum(t[c.options.index(arch[c.name])] for t, c in zip(T, space.root.choices))


class Draws:
    def __init__(self) -> None:
        self.generator, self.asked = torch.Generator().manual_seed(2), []  # type: ignore[var-annotated]

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        self.asked.append((split, size, odds))
        x = torch.randn(B, 1, generator=self.generator, dtype=torch.float64)
        return Batch(x, torch.randint(N, (B,), generator=self.generator), torch.arange(B))


def started(strategy: Any, space: SearchSpace, steps: int = 6, epoch_steps: int = 2) -> Any:
    net = Table(space)
    strategy.start(Setup(net, space, CostTable(net, (1, 1)), CrossEntropy(), None, steps, epoch_steps, B))
    return strategy


def fit(counts: Counter, odds: Mapping[Any, float]) -> float:
    """The p-value of a chi-square test; 0 where something impossible was met."""
    n = sum(counts.values())
    if set(counts) - set(odds):
        return 0.0
    return float(chi2.sf(sum((counts[key] - n * p) ** 2 / (n * p) for key, p in odds.items()), len(odds) - 1))


def drawn(strategy: Any, steps: int) -> list[list[Arch]]:
    """The paths of every step of a run."""
    found, net, draw = [], strategy.net, Draws()
    for step in range(steps):
        del net.ran[:]
        strategy.update(draw, moment(step, steps, steps, SEED))
        found.append(list(net.ran))
    return found


# -- SPOS ---------------------------------------------------------------------------------------------------------------


def test_spos_draws_uniformly_and_each_layer_for_itself() -> None:
    sizes = {"layer0": 3, "layer1": 2, "layer2": 4, "layer3": 3}
    space = space_of(*(Choice(name, tuple(range(n))) for name, n in sizes.items()))
    steps = drawn(started(SPOS(), space, 600, 600), 600)
    assert all(len(paths) == 1 for paths in steps)
    archs = [path for (path,) in steps]
    for name, n in sizes.items():
        assert fit(Counter(arch[name] for arch in archs), dict.fromkeys(range(n), 1 / n)) > 1e-3
    for a, b in combinations(sizes, 2):  # independent across layers
        joint = dict.fromkeys(product(range(sizes[a]), range(sizes[b])), 1 / (sizes[a] * sizes[b]))
        assert fit(Counter((arch[a], arch[b]) for arch in archs), joint) > 1e-3
    tied = Counter((arch["layer0"], arch["layer0"]) for arch in archs)  # the test sees layers that follow each other
    assert fit(tied, dict.fromkeys(product(range(3), range(3)), 1 / 9)) < 1e-6
    later = Counter((one["layer0"], two["layer0"]) for one, two in zip(archs[::2], archs[1::2]))  # and across steps
    assert fit(later, dict.fromkeys(product(range(3), range(3)), 1 / 9)) > 1e-3


def test_spos_draws_living_cells_only() -> None:
    strategy, now = started(SPOS(), Topology(1, 1)), moment(0, 6, 2, SEED)
    archs = [strategy.arch(now) for _ in range(2000)]
    first = Counter(arch["node1.from0"] for arch in archs)
    assert fit(first, dict.fromkeys(OPS[1:], 1 / 4)) > 1e-3 and "none" not in first
    assert all({arch[f"node2.from{i}"] for i in range(2)} != {"none"} for arch in archs)


def test_spos_trains_what_it_announces() -> None:
    space = space_of(*FAIR)
    strategy, draw, twin = started(SPOS(WEIGHTS), space), Draws(), Draws()
    T, v = [t.detach().clone() for t in strategy.net.T], [torch.zeros_like(t) for t in strategy.net.T]
    for step in range(6):
        announced, rate = strategy.arch(moment(step, 6, 2, SEED)), strategy.w.rate
        metrics = strategy.update(draw, moment(step, 6, 2, SEED))
        assert strategy.net.ran[-1] == announced and metrics["train/lr"] == rate
        T, v = stepped(T, v, gradient(space, T, twin("train"), announced), rate)
        assert_same(strategy, T)
    assert draw.asked == [("train", None, None)] * 6 and strategy.passes() == 1
    assert len({tuple(arch.values()) for arch in strategy.net.ran}) > 3


def gradient(space: SearchSpace, T: list[Tensor], batch: Batch, *paths: Mapping[str, Any], share: float = 1.0) -> list[Tensor]:
    """The sum of as many separate backward passes."""
    total = [torch.zeros_like(t) for t in T]
    for path in paths:
        leaves = [t.clone().requires_grad_() for t in T]
        loss = nn.functional.cross_entropy(logits(space, leaves, batch.x, path), batch.y)
        for one, g in zip(total, torch.autograd.grad(loss, leaves, allow_unused=True)):
            one.add_(0.0 if g is None else share * g)
    return total


def stepped(T: list[Tensor], v: list[Tensor], g: list[Tensor], rate: float) -> tuple[list[Tensor], list[Tensor]]:
    """One clip of the whole gradient, then v = mu v + g + wd w;  w <- w - lr v."""
    norm = float(torch.cat([part.flatten() for part in g]).norm())
    factor = min(1.0, 0.5 / (norm + 1e-6))
    v = [0.8 * u + factor * part + 0.05 * t for u, part, t in zip(v, g, T)]
    return [t - rate * u for t, u in zip(T, v)], v


def assert_same(strategy: Any, T: list[Tensor]) -> None:
    for p, t in zip(strategy.net.T, T):
        assert torch.allclose(p.detach(), t, rtol=1e-10, atol=1e-13), WRONG


# -- FairNAS ------------------------------------------------------------------------------------------------------------


def check(mutate: Mutation = lambda strategy: None, combine: str = "sum") -> None:
    """Six steps: every (choice, option) once a step, all on one batch, the gradient that of n separate backward passes, the
    permutations fresh. AssertionError, saying WRONG, where anything differs."""
    space = space_of(*FAIR)
    strategy, draw, twin = started(FairNAS(combine, WEIGHTS), space), Draws(), Draws()
    mutate(strategy)
    T, v = [t.detach().clone() for t in strategy.net.T], [torch.zeros_like(t) for t in strategy.net.T]
    counts: Counter = Counter()
    for step in range(6):
        del strategy.net.ran[:], strategy.net.seen[:]
        announced, rate = strategy.arch(moment(step, 6, 2, SEED)), strategy.w.rate
        metrics = strategy.update(draw, moment(step, 6, 2, SEED))
        paths, batch = list(strategy.net.ran), twin("train")
        counts.update((name, option) for path in paths for name, option in path.items())
        assert set(counts.values()) == {step + 1} and len(counts) == 12, WRONG
        assert all(torch.equal(x, batch.x) for x in strategy.net.seen) and paths[0] == announced, WRONG
        g = gradient(space, T, batch, *paths, share=1.0 if combine == "sum" else 1 / 3)
        losses = [nn.functional.cross_entropy(logits(space, T, batch.x, path), batch.y) for path in paths]
        expected = [float(sum(losses)) / 3, float(torch.cat([part.flatten() for part in g]).norm()), rate]
        found = [float(metrics[tag]) for tag in ("train/loss", "train/grad_norm", "train/lr")]
        assert found == pytest.approx(expected, rel=1e-10), WRONG
        T, v = stepped(T, v, g, rate)
        assert_same(strategy, T)
    assert draw.asked == [("train", None, None)] * 6, WRONG


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_fairnas_is_n_separate_backward_passes_on_one_batch(combine: str) -> None:
    check(combine=combine)


def mean_for_sum(strategy: Any) -> None:
    strategy.combine = "mean"


def uniform_paths(strategy: Any) -> None:
    strategy.paths = lambda now: [strategy.space.sample(now.rng) for _ in range(strategy.count)]


def one_path_fewer(strategy: Any) -> None:
    paths = strategy.paths
    strategy.paths = lambda now: paths(now)[:-1]


def a_step_for_each_path(strategy: Any) -> None:
    add, step = strategy.w.add, strategy.w.step
    strategy.w.add = lambda loss: (add(loss), step(True))
    strategy.w.step = lambda norm=False: None


def clipped_by_path(strategy: Any) -> None:
    add = strategy.w.add

    def each(loss: Tensor) -> None:
        before = [p.grad for p in strategy.w.params]
        for p in strategy.w.params:
            p.grad = None
        add(loss)
        nn.utils.clip_grad_norm_(strategy.w.params, 0.5)
        for p, g in zip(strategy.w.params, before):
            p.grad = g if p.grad is None else p.grad if g is None else p.grad + g

    strategy.w.add = each


@pytest.mark.parametrize("mutant", [mean_for_sum, uniform_paths, one_path_fewer, a_step_for_each_path, clipped_by_path],
                         ids=lambda mutant: mutant.__name__)  # fmt: skip
def test_a_mutant_of_fairnas_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


def test_permutations_are_uniform_independent_and_fresh() -> None:
    steps = drawn(started(FairNAS(), space_of(*FAIR), 600, 600), 600)
    orders = {c.name: [tuple(path[c.name] for path in paths) for paths in steps] for c in FAIR}
    every = list(permutations(("a", "b", "c")))
    for name in orders:
        assert fit(Counter(orders[name]), dict.fromkeys(every, 1 / 6)) > 1e-3
        pairs = Counter(zip(orders[name][::2], orders[name][1::2]))
        assert fit(pairs, dict.fromkeys(product(every, every), 1 / 36)) > 1e-3  # fresh every step, not once an epoch
        stale = Counter(zip(orders[name][::2], orders[name][::2]))
        assert fit(stale, dict.fromkeys(product(every, every), 1 / 36)) < 1e-6
    for a, b in combinations(orders, 2):
        assert fit(Counter(zip(orders[a], orders[b])), dict.fromkeys(product(every, every), 1 / 36)) > 1e-3


def test_fixed_choices_are_in_every_path() -> None:
    space = space_of(*FAIR).restrict({"layer1": ("b",), "layer2": ("a",)})
    strategy = started(FairNAS(), space)
    assert strategy.passes() == 3
    for paths in drawn(strategy, 6):
        assert [(path["layer1"], path["layer2"]) for path in paths] == [("b", "a")] * 3
        assert {path["layer0"] for path in paths} == {path["layer3"] for path in paths} == {"a", "b", "c"}


def test_fairnas_uses_dead_cells_too() -> None:
    """Strictly fair means none on the only edge into node 1 in one of five paths."""
    for paths in drawn(started(FairNAS(), Topology(1, 1)), 3):
        assert sorted(str(path["node1.from0"]) for path in paths) == sorted(OPS)


DEPENDENT = (Choice("depth", (1, 2)), Choice("width", (4, 8), needs=(("depth", (2,)),)))


@pytest.mark.parametrize("space, words", [
    (space_of(Choice("kernel", (3, 5)), Choice("width", (4, 8, 16)), Choice("pad", (1,))),
     "as many options in every open choice: kernel has 2, width has 3"),
    (space_of(*FAIR).restrict({"layer2": ("a", "c")}), "layer0 has 3, layer1 has 3, layer2 has 2, layer3 has 3"),
    (space_of(*DEPENDENT), "other choices decide whether width count"),
    (space_of(Choice("depth", (1, 2)), Choice("width", (4, 8))).tie("width", "depth", {1: 4, 2: 8}), "whether width count"),
    (space_of(Choice("kernel", (3,))), "none is open"),
], ids=["unequal", "restricted", "dependent", "tied", "closed"])  # fmt: skip
def test_fairnas_refuses_choices_that_cannot_be_fair(space: SearchSpace, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        started(FairNAS(), space)
    assert "\n" not in str(error.value)


def test_fairnas_takes_choices_that_always_count() -> None:
    assert started(FairNAS(), space_of(*DEPENDENT).restrict({"depth": (2,)})).passes() == 2


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"combine = 'max' is not known\. Allowed: sum, mean"):
        replace(FairNAS(), combine="max")
