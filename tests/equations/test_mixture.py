"""Mixture through ``update``: how configurations are shared out among models, what is trained and rewarded (pooling-mixture.md,
sections 2 and 5), and mutants that must fail. The net is a table of one vector an option; a path adds its vectors:

    z = x (sum over choices i of T_i[option of i])
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from balancing import literal, replayed, softmax, uneven
from rank_runs import flat
from torch import Tensor, nn

from nas.balance import balance
from nas.bilevel import Weights
from nas.cost import CostTable
from nas.data import Data
from nas.engine import moment, seed_from
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.mixture import Mixture, published
from nas.strategies.spos import SPOS
from search_spaces.nats import Topology
from search_spaces.pooling import PoolingResNet
from search_spaces.space import Arch, Choice, SearchSpace, Setting
from supernets.layers import Layer
from supernets.nats import Topology as TopologyNet
from supernets.pooling import PoolingResNet as PoolingNet

B, N, SEED, STEPS, EPOCH_STEPS = 24, 3, 7, 12, 3
WRONG = "not what the paper's step does"
WEIGHTS = Weights(lr=0.5, lr_min=0.1, momentum=0.8, weight_decay=0.05, clip=0.5)
FEW = [Choice("place", ("a", "b", "c"), ordered=False), Choice("width", (4, 8))]
DEPENDENT = [Choice("depth", (1, 2)), Choice("width", (4, 8, 16), needs=(("depth", (2,)),))]
Mutation = Callable[[Any], Any]


class Table(nn.Module):
    """See the top of this file."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.T = nn.ParameterList([torch.zeros(len(c.options), N, dtype=torch.float64) for c in space.root.choices])
        self.dropout = nn.Dropout(0.5)
        self.reset(torch.Generator().manual_seed(1))

    def reset(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for t in self.T:
                t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, N) -> (B, N)
        z = logits(self.space, list(self.T), x, arch)
        return z if torch.is_grad_enabled() else z + self.dropout(torch.ones_like(z)) - 1  # dropout would change a reward

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return []


def logits(space: SearchSpace, T: list[Tensor], x: Tensor, arch: Mapping[str, Any]) -> Tensor:
    return x * sum(t[c.options.index(arch[c.name])] for t, c in zip(T, space.root.choices))


class Draws:
    """Random batches, of each split a stream of its own. ``asked``: the splits, in order."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.asked, self.streams = shape or (N,), list[str](), dict[str, torch.Generator]()

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        self.asked.append(split)
        stream = self.streams.setdefault(split, torch.Generator().manual_seed(sum(split.encode())))
        x = torch.randn(B, *self.shape, generator=stream, dtype=torch.float64)
        return Batch(x, torch.randint(N, (B,), generator=stream), torch.arange(B))


def started(strategy: Any, net: Any, steps: int = STEPS, epoch_steps: int = EPOCH_STEPS, side: int = 1) -> Any:
    torch.manual_seed(seed_from(SEED, "start"))
    strategy.start(Setup(net, net.space, CostTable(net, (side, side)), CrossEntropy(), None, steps, epoch_steps, B))
    return strategy


def toy(**given: Any) -> Mixture:
    settings: dict[str, Any] = {"models": 2, "temperature": (1.0, 40.0), "weights": WEIGHTS, **given}
    return Mixture(**settings)


def now_of(step: int, steps: int = STEPS) -> Any:
    return moment(step, steps, EPOCH_STEPS, SEED)


# -- one run, by hand ----------------------------------------------------------------------------------------------------


def stepped(p: Tensor, v: Tensor, g: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    v = 0.8 * v + g + 0.05 * p
    return p - rate * v, v


def gradient(space: SearchSpace, T: list[Tensor], batch: Batch, arch: Arch) -> list[Tensor]:
    """Of the loss, clipped to norm 0.5."""
    leaves = [t.clone().requires_grad_() for t in T]
    g = torch.autograd.grad(nn.functional.cross_entropy(logits(space, leaves, batch.x, arch), batch.y), leaves)
    norm = float(torch.cat([part.flatten() for part in g]).norm())
    return [part * min(1.0, 0.5 / (norm + 1e-6)) for part in g]


def check(mutate: Mutation = lambda strategy: None) -> None:
    """Four epochs of three steps. AssertionError, saying WRONG, where anything differs."""
    space = SearchSpace(FEW, {}, dear={"place": "c"}, cheap={"place": "a"})
    strategy, draw, twin = started(toy(), Table(space)), Draws(), Draws()
    mutate(strategy)
    models = [[t.detach().clone() for t in net.T] for net in (strategy.net, *strategy.copies)]
    assert not any(torch.equal(s, t) for s, t in zip(*models)), WRONG
    moments = [[torch.zeros_like(t) for t in model] for model in models]
    keys = [(place, width) for place in "abc" for width in (4, 8)]
    used = [0, 0]
    W: dict[Any, list[float]] = {key: [1.0, 1.0] for key in keys}
    visits: dict[Any, list[int]] = {key: [0, 0] for key in keys}
    T, stored, met = 0.0, list[list[float]](), set[int]()
    for step in range(STEPS):
        now, rate = now_of(step), strategy.w.rate
        metrics = strategy.update(draw, now)
        rng = now_of(step).rng
        if step % EPOCH_STEPS == 0:
            T, used = 1.0 + 39.0 * (step // EPOCH_STEPS) / 3, [0, 0]
            stored = literal(list(W.values()), T)[1]
            fewest = min(min(row) for row in visits.values())
            said = {"mixture/divisions": len(stored), "mixture/temperature": T, "mixture/fewest_visits": fewest,
                    "mixture/kl": uneven([sum(p) / 6 for p in zip(*(softmax(T, row) for row in W.values()))])}  # fmt: skip
            assert all(metrics[tag] == pytest.approx(value, abs=1e-9) for tag, value in said.items()), WRONG
        arch = space.sample(rng)  # (5)
        a = (arch["place"], arch["width"])
        m = rng.choices(range(2), replayed(W[a], T, stored))[0]  # (6), (7)
        batch = twin("train")
        g = gradient(space, models[m], batch, arch)
        both = [stepped(*part, rate) for part in zip(models[m], moments[m], g)]
        models[m], moments[m] = [p for p, _ in both], [v for _, v in both]  # (8)
        batch = twin("valid")
        r = float((logits(space, models[m], batch.x, arch).argmax(1) == batch.y).float().mean())  # (9), of the new weights
        W[a][m] = 0.9 * W[a][m] + 0.1 * r  # (10)
        visits[a][m] += 1
        used[m] += 1
        met.add(m)
        for net, model in zip((strategy.net, *strategy.copies), models):
            assert all(torch.allclose(p.detach(), t, rtol=1e-10, atol=1e-13) for p, t in zip(net.T, model)), WRONG
        row = strategy.rewards[f"place={a[0]},width={a[1]}"]
        assert row == pytest.approx(W[a], abs=1e-12) and metrics["valid/top1"] == pytest.approx(r, abs=1e-6), WRONG
        assert strategy.visits[f"place={a[0]},width={a[1]}"] == visits[a], WRONG
        assert [metrics[f"mixture/use_{i}"] for i in (0, 1)] == pytest.approx([n / sum(used) for n in used]), WRONG
        p = strategy.assigned(f"place={a[0]},width={a[1]}").tolist()
        assert p == pytest.approx(replayed(W[a], T, stored), abs=1e-9), WRONG
        assert strategy.network(arch) is (strategy.net, *strategy.copies)[p.index(max(p))], WRONG
    assert draw.asked == ["train", "valid"] * STEPS and met == {0, 1} and len(stored) > 0, WRONG


def test_a_run_by_hand() -> None:
    check()


def judged_before(strategy: Any) -> None:
    """(9) before (8)."""
    down, reward, old = strategy.down, strategy.reward, {}

    def first(net: Any, arch: Any, batches: Any) -> Any:
        old["net"] = copy.deepcopy(net)
        return down(net, arch, batches)

    strategy.down, strategy.reward = first, lambda net, arch, batch: reward(old["net"], arch, batch)


def judged_on_what_it_learned(strategy: Any) -> None:
    down, reward, old = strategy.down, strategy.reward, {}

    def kept(net: Any, arch: Any, batches: Any) -> Any:
        old["batch"] = batches[-1]
        return down(net, arch, batches)

    strategy.down, strategy.reward = kept, lambda net, arch, batch: reward(net, arch, old["batch"])


def dropped_out(strategy: Any) -> None:
    strategy.reward = torch.no_grad()(lambda net, arch, batch: float((net(batch.x, arch).argmax(1) == batch.y).float().mean()))


def no_balance(strategy: Any) -> None:
    rebalance = strategy.rebalance

    def plain(now: Any) -> Any:
        found = rebalance(now)
        strategy.divisions = []
        return found

    strategy.rebalance = plain


def old_table(strategy: Any) -> None:
    """P as it was when the epoch began."""
    assigned, rebalance = strategy.assigned, strategy.rebalance

    def frozen(now: Any) -> Any:
        found = rebalance(now)
        rows = copy.deepcopy(strategy.rewards)

        def old(a: str) -> Tensor:
            mine, strategy.rewards = strategy.rewards, rows
            try:
                return assigned(a)
            finally:
                strategy.rewards = mine

        strategy.assigned = old
        return found

    strategy.rebalance = frozen


def one_division_less(strategy: Any) -> None:
    rebalance = strategy.rebalance

    def fewer(now: Any) -> Any:
        found = rebalance(now)
        del strategy.divisions[-1:]
        return found

    strategy.rebalance = fewer


def constant_temperature(strategy: Any) -> None:
    strategy.temperature = (1.0, 1.0)


def idle_models_move(strategy: Any) -> None:
    strategy.w.idle = "zeros"


def alike(strategy: Any) -> None:
    strategy.copies[0].load_state_dict(strategy.net.state_dict())


def first_model_always(strategy: Any) -> None:
    down = strategy.down
    strategy.down = lambda net, arch, batches: down(strategy.net, arch, batches)


MUTANTS = [judged_before, judged_on_what_it_learned, dropped_out, no_balance, old_table, one_division_less,
           constant_temperature, idle_models_move, alike, first_model_always]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


@pytest.mark.parametrize(("name", "value"), [("KEEP", 0.8), ("temperature", lambda now, start, end: end)])
def test_a_mutant_of_a_number_fails(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"nas.strategies.mixture.{name}", value)
    with pytest.raises(AssertionError, match=WRONG):
        check()


def test_what_was_not_visited_looks_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page, check 6: W = 1, r = .3 -> .93. A pair that was visited is less than one that was not."""
    space = SearchSpace(FEW, {}, dear={"place": "c"}, cheap={"place": "a"})
    strategy, draw = started(toy(temperature=(50.0, 50.0)), Table(space)), Draws()
    monkeypatch.setattr(strategy, "reward", lambda *given: 0.3)
    strategy.update(draw, now_of(0))
    (key,) = strategy.rewards
    assert sorted(strategy.rewards[key]) == pytest.approx([0.93, 1.0], abs=1e-15)
    m = strategy.rewards[key].index(1.0)
    assert float(strategy.assigned(key)[m]) == pytest.approx(1 / (1 + math.exp(-50 * 0.07)), abs=1e-12)
    monkeypatch.setattr(Mixture, "ones", property(lambda self: [0.0, 0.0]))
    with pytest.raises(AssertionError, match=WRONG):
        check()


def test_models_specialise_and_stay_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model 1 is better at everything, at width 8 by far, at width 4 by a little: each gets a half all the same, of what it is
    comparatively better at."""
    space = SearchSpace(FEW, {}, dear={"place": "c"}, cheap={"place": "a"})

    def reward(net: Any, arch: Arch, batch: Batch) -> float:
        other = net is not strategy.net
        return (0.9 if other else 0.1) if arch["width"] == 8 else (0.6 if other else 0.5)

    for T, sure in (((1.0, 100.0), True), ((0.0, 0.0), False)):
        strategy, draw, shares = started(toy(temperature=T), Table(space), 600, 30), Draws(), list[float]()
        monkeypatch.setattr(strategy, "reward", reward)
        for step in range(600):
            metrics = strategy.update(draw, moment(step, 600, 30, SEED))
            shares += [float(metrics["mixture/use_0"])] if step % 30 == 29 else []
        assert sum(shares) / 20 == pytest.approx(0.5, abs=0.1)
        for place in "abc":
            wide, narrow = (strategy.assigned(f"place={place},width={width}") for width in (8, 4))
            if not sure:
                assert wide.tolist() == narrow.tolist() == [0.5, 0.5]
            else:
                assert float(wide[1]) > 0.99 and float(narrow[0]) > 0.7
                assert strategy.network({"place": place, "width": 8}) is strategy.copies[0]
                assert strategy.network({"place": place, "width": 4}) is strategy.net


def test_a_configuration_that_is_drawn_more_often_weighs_more() -> None:
    strategy = started(toy(temperature=(9.0, 9.0)), Table(SearchSpace(DEPENDENT, {})))
    strategy.rewards = {"depth=1,width=4": [0.9, 0.1], "depth=2,width=8": [0.2, 0.6]}
    said = strategy.rebalance(now_of(0))
    W = torch.tensor([[0.9, 0.1], [1.0, 1.0], [0.2, 0.6], [1.0, 1.0]], dtype=torch.float64)
    odds = torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)
    assert strategy.divisions == balance(W, 9.0, odds).divisions and said["mixture/divisions"] > 0
    assert strategy.divisions != balance(W, 9.0, torch.full((4,), 0.25, dtype=torch.float64)).divisions


# -- one model is SPOS ---------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], Any]] = {
    "pooling": lambda: PoolingNet(PoolingResNet((2, 1, 1), 2, (4, 6, 8)), 1, N),
    "cells": lambda: TopologyNet(Topology(4, 1), 1, N),  # most of its weights rest in a step
    "dependent": lambda: Table(SearchSpace(DEPENDENT, {})),
}


@pytest.mark.parametrize("idle", ["zeros", "skip"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_model_is_single_path_training(name: str, idle: str, accumulate: int) -> None:
    """Page, check 5, to the last bit: weights, momentum and what is reported."""
    weights, found = replace(WEIGHTS, idle=idle, accumulate=accumulate), []
    shape = () if name == "dependent" else (1, 8, 8)
    for make in (SPOS, lambda weights: Mixture(1, choices=["node[12].*"] if name == "cells" else ["*"], weights=weights)):
        net = NETS[name]().double()
        net.reset(torch.Generator().manual_seed(1))
        strategy, draw = started(make(weights), net, side=8), Draws(*shape)
        told = [strategy.update(draw, now_of(step)) for step in range(6)]
        state = [dict(strategy.w.optimizer.state[p]) for p in strategy.w.params]
        found.append((strategy, told, state))
    (spos, theirs, a), (mixture, mine, b) = found
    assert all(torch.equal(p, q) for p, q in zip(spos.w.params, mixture.w.params, strict=True))
    assert [s.keys() for s in a] == [s.keys() for s in b]
    assert all(torch.equal(s[key], t[key]) for s, t in zip(a, b) for key in s if s[key] is not None)
    assert all(float(row[tag]) == float(other[tag]) for row, other in zip(theirs, mine) for tag in row)
    assert mixture.copies == [] and mixture.passes() == spos.passes() == accumulate
    assert mixture.network(spos.architecture()) is mixture.net and mixture.assigned("anything").tolist() == [1.0]


# -- what is refused, and who serves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "words"), [
    ({"models": 0}, "models = 0 is too few"), ({"temperature": (1.0, math.inf)}, "temperature"),
    ({"temperature": (-1.0, 1.0)}, "each 0 or more"), ({"choices": []}, "give a list"), ({"choices": "*"}, "give a list"),
    ({"serve": 2}, r"serve = 2\. Allowed: assigned, or the number of a model, 0 to 1"), ({"serve": "best"}, "serve"),
    ({"serve": True}, "serve"),
])  # fmt: skip
def test_values_that_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        toy(**given)
    assert "\n" not in str(error.value)


def test_a_run_without_validation_images_is_refused_before_it_moves() -> None:
    data = Data("digits", batch_size=16)
    strategy, feed = started(toy(), NETS["pooling"](), side=8), data.feed(SEED, "cpu")
    before = [p.detach().clone() for p in strategy.w.params]
    with pytest.raises(ValueError, match=r"'valid' holds no image\. Set some aside by --data\.valid_fraction") as error:
        strategy.update(feed, now_of(0))
    assert "\n" not in str(error.value) and all(torch.equal(p, q) for p, q in zip(before, strategy.w.params))


def test_models_begin_apart_and_alike_in_every_start() -> None:
    first, second = (started(toy(models=3), NETS["pooling"]().double(), side=8) for _ in range(2))
    for net, twin in zip(first.copies, second.copies, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    one, two, three = (flat(net) for net in first.nets)
    assert len(first.nets) == 3 and not torch.equal(two, three) and not torch.equal(one, two)
    assert first.nets[0] is first.net is first.setup.net and len(first.w.params) == 3 * len(list(first.net.parameters()))


def test_any_model_can_be_asked_to_serve() -> None:
    strategies = [started(toy(models=3, serve=serve), NETS["pooling"](), side=8) for serve in ("assigned", 0, 2)]
    arch = strategies[0].space.smallest()
    for strategy in strategies:
        strategy.rewards[strategy.configurations.of(arch)] = [0.1, 0.9, 0.5]
    assert [s.nets.index(s.network(arch)) for s in strategies] == [1, 0, 2]
    assert published() == Weights(lr=0.1, lr_min=0.001, momentum=0.9, nesterov=False, weight_decay=0.0, clip=None)
