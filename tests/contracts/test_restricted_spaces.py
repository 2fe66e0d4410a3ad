"""What every strategy promises of a part of its space, as the children of a split have it: it stays inside, and it goes on
where its parent stood, whose state has the same shape. A new entry of STRATEGIES inherits every test.

Left out are ``plain``, which has no space, and ``random``: its trials begin with fresh weights, so there is nothing to inherit.
"""
from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from strategy_entries import Draws, equal, nets, param, run, started
from strategy_entry import STEPS, Entry
from strategy_parts import SPLIT, cut, inside, moment_of, watched
from torch import Tensor

from nas import checkpoint, health
from nas.picks import heatmap, three
from nas.strategies.tas import TAS
from search_spaces.space import SearchSpace


def once() -> Iterator[Any]:
    """Every entry; the second and later ones of a strategy are slow."""
    seen: set[str] = set()
    for entry in SPLIT:
        name = type(entry.make()).__name__
        yield param(entry._replace(slow=entry.slow or name in seen))
        seen |= set() if entry.slow else {name}


@pytest.fixture(params=once())
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


@functools.cache
def family(id: str) -> tuple[Any, Any]:
    """A parent after two steps on the whole space, and its child, which has not moved yet. They are only read."""
    entry = next(entry for entry in SPLIT if entry.id == id)
    parent = started(entry)
    run(parent, Draws(), end=2)
    return parent, heir(entry, parent)


def heir(entry: Entry, parent: Any) -> Any:
    child = started(entry, cut(entry))
    checkpoint.restore(child, copy.deepcopy(checkpoint.state_of(parent)))
    return child


def forbidden(space: SearchSpace, whole: SearchSpace) -> Iterator[tuple[str, Any]]:
    for choice, root in zip(space.choices, whole.choices):
        yield from ((choice.name, option) for option in root.options if option not in choice.options)


def test_a_restricted_strategy_stays_inside_its_space(entry: Entry) -> None:
    """In what it runs, announces and derives; and forbidden options learn nothing."""
    strategy = started(entry, cut(entry))
    space, whole = strategy.setup.space, strategy.setup.net.space
    assert space.size < whole.size and list(forbidden(space, whole))
    seen = watched(strategy, 0, STEPS if "models" in entry.moves.values() else 3)  # until every model had its turn
    assert len(seen.ran) >= 3
    for arch in (*seen.ran, strategy.arch(moment_of(3)), strategy.architecture()):
        inside(space, arch)
    supernets: list[Any] = nets(strategy)
    for net in supernets:
        dead = {id(p) for name, option in forbidden(space, whole) for p in net.owned(name, option)}
        assert dead or entry.kind in ("scales", "macro", "pooling"), "there no option owns a weight"
        assert not any(seen.weights.get(key, 0.0) for key in dead)
        assert any(seen.weights.get(id(p), 0.0) > 0 for p in net.parameters() if id(p) not in dead)
    groups = getattr(getattr(strategy, "alpha", None), "groups", {})
    assert bool(seen.logits) == bool(groups)
    for K, names in groups.items():
        for name, row in zip(names, seen.logits.get(str(K), torch.zeros(len(names), K))):
            options = whole.root[name].options
            assert not any(g for option, g in zip(options, row.tolist()) if option not in space[name].options), name
    assert not groups or any(rows.sum() > 0 for rows in seen.logits.values())


def shapes(state: Any, name: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a state, by path."""
    if isinstance(state, Tensor):
        return {name: tuple(state.shape)}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {path: shape for key, value in items for path, shape in shapes(value, f"{name}/{key}").items()}


def own(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without what each space counts for itself: the bins of attentive sampling."""
    return {name: value for name, value in state.items() if name != "bins"}


def test_a_child_has_all_that_its_parent_had(entry: Entry) -> None:
    """Weights, copies, alphas, optimizers: the same names and shapes from the start, and then the same numbers."""
    parent, child = family(entry.id)
    state, fresh = checkpoint.state_of(parent), checkpoint.state_of(started(entry, cut(entry)))
    assert fresh.keys() == state.keys()
    wanted = shapes(own(state))
    assert all(wanted[name] == shape for name, shape in shapes(own(fresh)).items())
    assert equal(own(checkpoint.state_of(child)), own(state))
    for name in entry.moves:
        mine, theirs = getattr(child, name), getattr(parent, name)
        assert mine.count == theirs.count == 2 and mine.rate == theirs.rate
        for p, q in zip(mine.params, theirs.params):
            assert torch.equal(p, q) and equal(dict(mine.optimizer.state[p]), dict(theirs.optimizer.state[q]))
        moments = [t for p in mine.params for t in mine.optimizer.state[p].values() if isinstance(t, Tensor)]
        assert any(bool(t.any()) for t in moments)


def test_a_child_computes_what_its_parent_does(entry: Entry) -> None:
    parent, child = family(entry.id)
    space, x = child.setup.space, Draws()("train").x
    archs = [space.largest(), space.smallest(), *(space.sample(random.Random(seed)) for seed in range(2))]
    for arch in archs:
        inside(space, arch)
        for training in (True, False):
            found = []
            for strategy in (parent, child):
                net = strategy.network(arch).train(training)
                torch.manual_seed(0)
                with torch.no_grad():
                    found.append(net(x, arch))
                net.train()
            assert torch.equal(*found)


def test_a_child_goes_on(entry: Entry) -> None:
    """Inside its space from the first reading on; its weights move, and the schedule with them."""
    parent, _ = family(entry.id)
    child = heir(entry, parent)
    space, before = child.setup.space, [p.detach().clone() for p in child.w.params]
    inside(space, child.arch(moment_of(2)))
    inside(space, child.architecture())
    for arch in watched(child, 2, 4).ran:
        inside(space, arch)
    inside(space, child.architecture())
    assert any(not torch.equal(p, q) for p, q in zip(before, child.w.params))
    assert all(bool(p.isfinite().all()) for p in child.w.params) and child.w.count == 4


def test_a_budget_of_the_root_holds_in_a_child(entry: Entry) -> None:
    """A share is of the root's largest network; what a child derives meets the budget and lies in its space."""
    parent, child = family(entry.id)
    if not isinstance(child, TAS) and getattr(child, "budget", None) is None:
        assert child.fits(child.architecture())
        return
    space, full = child.setup.space, child.setup.costs.of(child.setup.space.root.largest())
    target = child.target if isinstance(child, TAS) else child.budget.target
    R = child.R if isinstance(child, TAS) else child.budget.R
    assert R == (float(target[:-1]) / 100 * full if isinstance(target, str) else target)
    assert R == (parent.R if isinstance(parent, TAS) else parent.budget.R)
    space.check(child.architecture())
    assert isinstance(child, TAS) or child.fits(child.architecture())  # TAS has no rule that brings it there
    (metrics,) = run(heir(entry, parent), Draws(), 2, 3)
    assert metrics["cost/target"] == R and metrics["cost/current"] > 0


def test_beliefs_have_the_roots_shape(entry: Entry) -> None:
    """Forbidden options at 0, so that reports of a child, and of its parent's space, can read them."""
    _, child = family(entry.id)
    space, whole, believed = child.setup.space, child.setup.net.space, child.probabilities()
    for name, row in believed.items():
        options = whole.root[name].options
        assert len(row) == len(options) and sum(row) == pytest.approx(1.0)
        assert all(p == 0 for p, option in zip(row, options) if option not in space[name].options)
    assert not believed or believed.keys() >= set(whole.free)
    arch = space.canonical(child.architecture())
    for of in (space, whole):
        tags = health.read(of, arch, believed).tags()
        assert bool(tags) == (entry.kind != "pooling") and all(0 <= value <= 1 + 1e-9 for value in tags.values())
        assert ("health/entropy" in tags) == bool(believed)
        if believed:
            heatmap({name: believed[name] for name in of.free}, {name: of.root[name].options for name in of.free})
            with torch.no_grad():
                z = child.network(arch)(Draws()("train").x, health.relaxed(of, believed))
            assert bool(z.isfinite().all())
    for arch in three(space).values():
        space.check(arch)
