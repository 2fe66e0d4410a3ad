"""What every strategy promises, checked for each entry of STRATEGIES: a new entry inherits every test."""
from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from strategy_entries import (
    SEARCHES,
    STRATEGIES,
    Draws,
    Told,
    equal,
    nets,
    param,
    plain_net,
    plainly,
    run,
    started,
    values,
    watch,
    whole,
)
from strategy_entry import EPOCH_STEPS, KINDS, SEED, STEPS, Entry, Restriction
from torch import Tensor

from nas import checkpoint
from nas.budget import Budget
from nas.descent import Descent
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Setup
from nas.strategies.bignas import BigNAS
from nas.strategies.darts import DARTS
from nas.strategies.drnas import DrNAS
from nas.strategies.fairnas import FairNAS
from nas.strategies.gdas import GDAS
from nas.strategies.mixture import Mixture as Balanced
from nas.strategies.proxyless import Proxyless
from nas.strategies.random import Random
from nas.strategies.rarts import RARTS
from nas.strategies.rsps import RSPS
from nas.strategies.snas import SNAS
from nas.strategies.spos import SPOS
from nas.strategies.tangle import Tangle
from nas.strategies.tas import TAS
from search_spaces.space import Mixture, Setting, Value


@pytest.fixture(params=map(param, STRATEGIES))
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


@pytest.fixture(params=map(param, SEARCHES))
def search(request: pytest.FixtureRequest) -> Entry:
    return request.param


# -- one step -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_can_hold_it_before_step_0(entry: Entry) -> None:
    checkpoint.check(started(entry))


def test_descents_share_no_parameter_and_weights_are_the_nets(entry: Entry) -> None:
    strategy = started(entry)
    descents = {name: value for name, value in vars(strategy).items() if isinstance(value, Descent)}
    assert descents.keys() == entry.moves.keys()
    ids = [id(p) for descent in descents.values() for p in descent.params]
    assert len(ids) == len(set(ids))
    net, *copies = [{id(p) for p in module.parameters()} for module in nets(strategy)]
    for name, what in entry.moves.items():
        mine = {id(p) for p in descents[name].params}
        if what == "alphas":
            assert not mine & net.union(*copies) and mine == {id(p) for p in strategy.alpha.parameters()}
        else:
            assert mine == {"weights": net, "models": net.union(*copies)}.get(what, copies[0] if copies else None)
    if "copies" in entry.moves.values():  # they begin as one
        assert all(torch.equal(p, q) for p, q in zip(strategy.net.parameters(), strategy.twin.parameters()))


def test_a_descent_moves_its_own_parameters_only(entry: Entry) -> None:
    """With the rates of all others at zero, nothing else of the strategy changes by a single bit."""
    for mine in entry.moves:
        strategy = started(entry)
        for name in entry.moves.keys() - {mine}:
            getattr(strategy, name).bases = [0.0]
        before = {name: values(getattr(strategy, name)) for name in entry.moves}
        buffers = [value.clone() for net in nets(strategy) for value in net.buffers()]
        run(strategy, Draws(), end=2)
        for name in entry.moves:
            moved = [not torch.equal(a, b) for a, b in zip(before[name], values(getattr(strategy, name)))]
            assert any(moved) if name == mine else not any(moved)
        if entry.kind:  # a supernet in training writes no buffer; a plain network keeps its running statistics
            assert equal(buffers, [value for net in nets(strategy) for value in net.buffers()])


def test_no_step_leaves_gradients_in_anothers_parameters(entry: Entry) -> None:
    """A Descent that steps holds gradients, one that has stepped or has no share in the backward holds none."""
    strategy, told = whole(entry.id)
    parts = getattr(getattr(strategy, "weights", strategy), "accumulate", 1)
    for step in told:
        names = [name for name, _, _ in step.stepped]
        assert sorted(names) == sorted([*entry.moves] * parts)
        for i, (name, _, holding) in enumerate(step.stepped):
            assert holding == (set(names[i:]) if entry.shared else {name})
    assert all(p.grad is None for name in entry.moves for p in getattr(strategy, name).params)
    teacher = strategy.setup.teacher
    assert teacher is None or all(p.grad is None for p in teacher.parameters())


def test_metrics_are_finite_and_name_the_loss(entry: Entry) -> None:
    strategy, told = whole(entry.id)
    for step in told:
        assert {"train/loss", "train/top1", "train/lr", "train/grad_norm"} <= step.metrics.keys()
        for tag, value in step.metrics.items():
            value = torch.as_tensor(value)
            assert value.ndim == 0 and bool(value.isfinite()) and not value.requires_grad, tag
        if "a" in entry.moves:
            assert {"valid/loss", "valid/top1", "alpha/entropy"} <= step.metrics.keys()
        budget = getattr(strategy, "budget", None)
        if budget is not None:
            share = float(budget.target.rstrip("%")) / 100
            assert step.metrics["cost/target"] == budget.R == share * strategy.costs.of(strategy.space.largest())
            assert {"cost/expected", "cost/current"} <= step.metrics.keys()


def test_the_weights_learn_from_train_and_the_alphas_from_valid(entry: Entry) -> None:
    told = whole(entry.id)[1]
    assert told[0].asked == list(entry.asks)
    for step in told:  # searches without alphas read images held out for picks to judge, without a graph
        assert step.asked[: len(entry.asks)] == list(entry.asks) and set(step.asked[len(entry.asks) :]) <= {"select"}


def test_passes_are_the_forwards_and_backwards_of_a_step(entry: Entry) -> None:
    """In every step, or, where steps differ, on the mean of the run."""
    strategy, told = whole(entry.id)
    passes = [step.passes for step in told]
    assert passes == [step.backwards for step in told] and min(passes) >= 1
    alike = [strategy.passes()] * STEPS
    assert passes == alike or (len(set(passes)) > 1 and sum(passes) == pytest.approx(sum(alike)))


# -- time ---------------------------------------------------------------------------------------------------------------


def test_saved_and_restored_midway_is_uninterrupted(entry: Entry) -> None:
    uninterrupted, told = whole(entry.id)
    metrics = [step.metrics for step in told]
    first, draw = started(entry), Draws()
    early = run(first, draw, end=2)
    file = io.BytesIO()
    torch.save({"strategy": checkpoint.state_of(first), "draw": draw.feed.state_dict()}, file)
    run(first, draw, start=2, end=3)  # what goes on must not reach what was saved
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second, draw = started(entry), Draws()
    run(second, Draws(), end=1)  # a state of its own to overwrite
    checkpoint.restore(second, state["strategy"])
    draw.feed.load_state_dict(state["draw"])
    assert equal(early + run(second, draw, start=2), metrics)
    assert equal(checkpoint.state_of(second), checkpoint.state_of(uninterrupted))
    assert second.architecture() == uninterrupted.architecture()


def test_reading_a_strategy_changes_nothing(entry: Entry) -> None:
    strategy = started(entry)
    run(strategy, Draws(), end=1)
    before = copy.deepcopy(checkpoint.state_of(strategy))
    now = moment(1, STEPS, EPOCH_STEPS, SEED)
    arch = strategy.arch(now)
    assert not any(isinstance(s, Mixture) and s.weights.requires_grad for s in arch.values())
    strategy.probabilities(), strategy.architecture(), strategy.network(arch), strategy.fits(strategy.architecture())
    assert equal(checkpoint.state_of(strategy), before)


def test_arch_is_what_the_next_weight_step_runs(search: Entry) -> None:
    """Where the alphas move first, the weights run what they have become: with the rate of the alphas at zero, arch."""
    strategy = started(search)
    now = moment(0, STEPS, EPOCH_STEPS, SEED)
    announced = plainly(strategy.arch(now))
    if search.first == "a":
        moving = copy.deepcopy(strategy)
        (step,) = watch(moving, search, 1)
        assert search.runs == "path" or ran_by_w(step) != announced  # the same path may win again
        strategy.a.bases = [0.0]
    (step,) = watch(strategy, search, 1)
    if search.runs == "sandwich":
        assert len(step.ran) > 1
        assert step.ran[0] == announced and search.first == step.stepped[0][0] == "w"
        return
    assert ran_by_w(step) == announced and step.stepped[0][0] == search.first
    others = [arch for arch in step.ran if arch is not ran_by_w(step)]
    if search.runs == "sample" or isinstance(strategy, GDAS):  # every pass draws afresh
        assert len(others) == 1 and others[0] != announced
    after = plainly(strategy.arch(moment(1, STEPS, EPOCH_STEPS, SEED)))
    if search.first == "a":
        assert search.runs != "mixture" or after == announced  # the alphas did not move
    elif not isinstance(strategy, Random):  # whose trial goes on
        assert after != announced
    assert {type(setting) is Mixture for name, setting in strategy.arch(now).items() if name in strategy.space.free} == {
        search.runs != "path"
    }


def ran_by_w(step: Told) -> dict[str, Any]:
    """What the net ran last before the weights' step."""
    return next(arch for name, arch, _ in step.stepped if name == "w")


# -- architectures ------------------------------------------------------------------------------------------------------

RESTRICTED = [param(entry, name) for entry in SEARCHES if entry.kind for name in KINDS[entry.kind].restrictions]


def drawn(search: Entry, strategy: Any, restriction: Restriction) -> list[Mapping[str, Setting]]:
    """What it would run. A path is one draw a reading: of one stream, which is as good as many. Of several children a step
    those that some runs meet, by a net that costs nothing."""
    if search.runs != "sandwich":
        once = moment(0, STEPS, EPOCH_STEPS, SEED)
        return [strategy.arch(now) for now in ([once] * 200 if search.runs == "path" else
                                               [moment(step, 12, 4, SEED) for step in range(12)])]  # fmt: skip
    met: list[Mapping[str, Setting]] = []
    draw = Draws()
    for seed in range(8):
        strategy = started(search, restriction)

        def forward(x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0, strategy: Any = strategy) -> Tensor:
            met.append(dict(arch))
            return next(strategy.net.parameters()).sum() * x.new_ones(len(x), 10)

        strategy.net.forward = forward
        for step in range(STEPS):
            strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, seed))
    return met


@pytest.mark.parametrize("search, name", RESTRICTED)
def test_a_restriction_is_honoured(search: Entry, name: str) -> None:
    """No forbidden option is sampled, believed in or derived, and what is left is sampled."""
    assert search.kind is not None
    restriction = KINDS[search.kind].restrictions[name]
    if name in search.refuses:
        with pytest.raises(ValueError, match="Restrict"):
            started(search, restriction)
        return
    strategy = started(search, restriction)
    space, legal = strategy.setup.space, search.legal and "a" not in search.moves  # drawn by the space: canonical, no dead cell
    met: set[tuple[str, Value]] = set()
    for arch in drawn(search, strategy, restriction):
        live = space.counting(arch) if legal else arch.keys()
        for setting_of, setting in arch.items():
            allowed = space[setting_of].options
            if not isinstance(setting, Mixture):
                assert setting in allowed if setting_of in live else setting == space.root[setting_of].options[0]
                assert search.runs in ("path", "sandwich") or len(allowed) == 1
                met.update({(setting_of, setting)} if setting_of in live and len(allowed) > 1 else ())
                continue
            computed = range(len(setting.options)) if setting.active is None else setting.active
            assert {setting.options[j] for j in computed} <= set(allowed) and len(allowed) > 1
            assert search.kind == "scales" or setting.weights.sum().item() == pytest.approx(1.0, abs=1e-6)
            assert all(float(setting.weights[j]) == 0.0 for j in range(len(setting.options)) if j not in computed)
            met.update((setting_of, setting.options[j]) for j in computed)
    open_ = {(c.name, option) for c in space.choices for option in c.options if len(c.options) > 1}
    if legal:
        inert = {c.name for c in space.choices if any(set(space[n].options).isdisjoint(needed) for n, needed in c.needs)}
        inert |= {c.name for c in space.choices if c.name.endswith(".concat")}  # of NASNet: what the inputs leave unread
        open_ = {(name, option) for name, option in open_ if name not in inert} - {("node1.from0", "none")}
        met = {(name, option) for name, option in met if name not in inert}
    assert met == open_
    believed = strategy.probabilities()
    some = "a" in search.moves and search.kind != "scales"  # scales are no probabilities
    assert believed.keys() >= set(space.free) if some else believed == {}
    for choice, row in believed.items():
        assert len(row) == len(space.root[choice].options) and sum(row) == pytest.approx(1.0)
        assert all(p == 0.0 for option, p in zip(space.root[choice].options, row) if option not in space[choice].options)
    run(strategy, Draws(), end=2)
    space.check(strategy.architecture())


def test_the_architecture_lies_in_the_space(search: Entry) -> None:
    strategy, told = whole(search.id)
    space = strategy.setup.space
    for step in told:
        assert list(step.arch) == [choice.name for choice in space.choices]
        space.check(space.canonical(step.arch))
        for choice in space.choices:
            assert step.arch[choice.name] in choice.options


def test_the_network_runs_what_arch_says(entry: Entry) -> None:
    strategy, draw = started(entry), Draws()
    run(strategy, draw, end=1)
    x = draw("train").x
    for arch in (strategy.arch(moment(1, STEPS, EPOCH_STEPS, SEED)), strategy.architecture()):
        net = strategy.network(arch)
        assert (net(x, arch) if arch else net(x)).shape == (16, 10)


# -- budgets ------------------------------------------------------------------------------------------------------------

Target = str | float


def budgeted(kind: str) -> dict[str, tuple[Callable[[Target], Any], str]]:
    """Strategies with a budget, by name: of a target, and the kind of space they search."""
    return {
        f"darts-{kind}": (lambda target: DARTS(budget=Budget(target)), kind),
        f"rarts-{kind}": (lambda target: RARTS(budget=Budget(target)), kind),
        f"snas-{kind}": (lambda target: SNAS(budget=Budget(target)), kind),
        f"gdas-{kind}": (lambda target: GDAS(budget=Budget(target)), kind),
        f"drnas-{kind}": (lambda target: DrNAS(budget=Budget(target)), kind),
        f"tangle-{kind}": (lambda target: Tangle("sparsemax", budget=Budget(target)), kind),
    }


BUDGETED: dict[str, tuple[Callable[[Target], Any], str]] = {
    "tas": (lambda target: TAS(target=target), "tied"),
    "tas-released": (lambda target: TAS(target=target, rule="released"), "tas"),
    **budgeted("tied"), **budgeted("cells"),
    "proxyless-cells": (lambda target: Proxyless(budget=Budget(target)), "cells"),
    "rarts-scales": (lambda target: RARTS(kind="scales", budget=Budget(target)), "scales"),
}  # fmt: skip


@pytest.fixture(params=BUDGETED)
def within(request: pytest.FixtureRequest) -> Callable[[Target], Any]:
    """A target -> a started strategy with that budget."""
    make, kind = BUDGETED[request.param]
    return lambda target: started(Entry(request.param, lambda: make(target), kind, {}))


def test_a_budget_that_cannot_be_met_is_refused(within: Callable[[Target], Any]) -> None:
    for target, words in ((1.0, "cannot be reached in this space"), ("much", "is not a budget"), ("101%", "cannot be reached")):
        with pytest.raises(ValueError, match=words):
            within(target)


def test_fits_is_the_tolerance_around_the_target(within: Callable[[Target], Any]) -> None:
    strategy = within("60%")
    arch, released = strategy.architecture(), getattr(strategy, "rule", "") == "released"
    F = strategy.setup.costs.seen("estimated" if released else "derived").of(arch)  # what removed blocks say is read there
    holder = strategy if isinstance(strategy, TAS) else strategy.budget
    unit = strategy.F_max if released else holder.R
    assert isinstance(strategy, TAS) or getattr(strategy, "kind", "") == "scales" or strategy.fits(arch)  # derived to fit
    for off, expected in ((0.049, True), (0.051, False)):
        for sign in (1, -1):
            holder.R = F - sign * off * unit if released else F / (1 + sign * off)
            assert strategy.fits(arch) is expected


def test_a_strategy_without_a_budget_fits_everything(search: Entry) -> None:
    strategy = whole(search.id)[0]
    if not isinstance(strategy, TAS) and getattr(strategy, "budget", None) is None:
        assert strategy.fits(strategy.space.smallest()) and strategy.fits(strategy.space.largest())


@pytest.mark.parametrize("make", [DARTS, RARTS, SNAS, GDAS, DrNAS, Tangle, RSPS, Random, TAS, Proxyless, SPOS, FairNAS, BigNAS,
                                  Balanced])  # fmt: skip
def test_a_search_without_a_space_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="searches a space: give the run a supernet, its space and a cost table"):
        make().start(Setup(plain_net(1), None, None, CrossEntropy(), None, STEPS, EPOCH_STEPS, 0))
