"""What every strategy promises, checked for each entry of STRATEGIES: a new entry inherits every test."""
from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nas import checkpoint
from nas.cost import CostTable
from nas.data import Data
from nas.descent import Descent
from nas.engine import moment, seed_from
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.plain import Plain
from nas.strategies.tas import TAS
from search_spaces.resnet import CifarResNet
from search_spaces.space import Mixture, Setting, Value
from supernets.extract import extract
from supernets.resnet import ResNet

EPOCH_STEPS, STEPS, SEED = 3, 6, 4
Restriction = Mapping[str, tuple[Value, ...]]


class Entry(NamedTuple):
    """``make``: a strategy that has not started. ``kind``: of its space; None where it trains a plain network.
    ``moves``: the attributes that are Descents, and what they train."""

    id: str
    make: Callable[[], Any]
    kind: str | None
    moves: Mapping[str, str]
    taught: bool = False


STRATEGIES = [
    Entry("tas-tied", lambda: TAS(target="60%"), "tied", {"w": "weights", "a": "alphas"}),
    Entry("tas-tas", lambda: TAS(target=40_000, rule="released", temperature=(5.0, 0.1), temperature_schedule="cosine"),
          "tas", {"w": "weights", "a": "alphas"}),
    Entry("plain", lambda: Plain(), None, {"w": "weights"}),
    Entry("plain-taught-ema", lambda: Plain(ema=0.9, accumulate=2, schedule="cosine"), None, {"w": "weights"}, True),
]  # fmt: skip
SEARCHES = [entry for entry in STRATEGIES if entry.kind]
DATA = Data("digits", batch_size=16, valid_fraction=0.5)


@pytest.fixture(params=STRATEGIES, ids=lambda entry: entry.id)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


@pytest.fixture(params=SEARCHES, ids=lambda entry: entry.id)
def search(request: pytest.FixtureRequest) -> Entry:
    return request.param


class Draws:
    """The feed of the digits, in the net's precision, counting what was asked for."""

    def __init__(self) -> None:
        self.feed, self.asked = DATA.feed(SEED, "cpu"), []  # type: ignore[var-annotated]

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        self.asked.append(split)
        x, y, index = self.feed(split, size, odds)
        return Batch(x.double(), y, index)


def started(entry: Entry, restrict: Restriction | None = None) -> Any:
    """The strategy with a net of its own, in the state that a run of seed SEED begins with."""
    strategy, loss = entry.make(), CrossEntropy()
    if entry.kind:
        space = CifarResNet(14, entry.kind, widths=(4, 6, 8))
        net = ResNet(space, channels=1, classes=10).double()
        net.reset(torch.Generator().manual_seed(1))
        if restrict:
            space = space.restrict(restrict)
        setup = Setup(net, space, CostTable(net, (8, 8)), loss, None, STEPS, EPOCH_STEPS, DATA.count("train"))
    else:
        setup = Setup(plain_net(1), None, None, loss, plain_net(2).eval() if entry.taught else None, STEPS, EPOCH_STEPS, 0)
    torch.manual_seed(seed_from(SEED, "start"))
    strategy.start(setup)
    return strategy


def plain_net(seed: int) -> nn.Module:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=10).double()
    return extract(net, space.largest(), torch.zeros(2, 1, 8, 8).double(), inherit=False, seed=seed)


def run(strategy: Any, draw: Any, start: int = 0, end: int = STEPS) -> list[dict[str, Any]]:
    return [dict(strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))) for step in range(start, end)]


def values(descent: Descent) -> list[Tensor]:
    return [p.detach().clone() for p in descent.params]


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through lists and dicts."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(p, q) for p, q in zip(a, b))
    return a == b


# -- one step -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_can_hold_it_before_step_0(entry: Entry) -> None:
    checkpoint.check(started(entry))


def test_descents_share_no_parameter_and_weights_are_the_nets(entry: Entry) -> None:
    strategy = started(entry)
    descents = {name: value for name, value in vars(strategy).items() if isinstance(value, Descent)}
    assert descents.keys() == entry.moves.keys()
    ids = [id(p) for descent in descents.values() for p in descent.params]
    assert len(ids) == len(set(ids))
    net = {id(p) for p in strategy.setup.net.parameters()}
    for name, what in entry.moves.items():
        mine = {id(p) for p in descents[name].params}
        assert mine == net if what == "weights" else not mine & net


def test_a_descent_moves_its_own_parameters_only(entry: Entry) -> None:
    """With the rates of all others at zero, nothing else of the strategy changes by a single bit."""
    for mine in entry.moves:
        strategy = started(entry)
        for name in entry.moves.keys() - {mine}:
            getattr(strategy, name).bases = [0.0]
        before = {name: values(getattr(strategy, name)) for name in entry.moves}
        buffers = {name: value.clone() for name, value in strategy.setup.net.named_buffers()}
        run(strategy, Draws(), end=2)
        for name in entry.moves:
            moved = [not torch.equal(a, b) for a, b in zip(before[name], values(getattr(strategy, name)))]
            assert any(moved) if name == mine else not any(moved)
        if entry.kind:  # a supernet in training writes no buffer; a plain network keeps its running statistics
            assert all(torch.equal(buffers[name], value) for name, value in strategy.setup.net.named_buffers())


def test_no_step_leaves_gradients_in_anothers_parameters(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = started(entry)
    descents = [getattr(strategy, name) for name in entry.moves]
    held: list[list[bool]] = []
    step = Descent.step

    def watched(self: Descent, norm: bool = False) -> None:
        held.append([any(p.grad is not None for p in d.params) == (d is self) for d in descents])
        step(self, norm)

    monkeypatch.setattr(Descent, "step", watched)
    run(strategy, Draws(), end=2)
    assert len(held) == 2 * len(descents) * getattr(strategy, "accumulate", 1) and all(map(all, held))
    assert all(p.grad is None for d in descents for p in d.params)
    teacher = strategy.setup.teacher
    assert teacher is None or all(p.grad is None for p in teacher.parameters())


def test_metrics_are_finite_and_name_the_loss(entry: Entry) -> None:
    for metrics in run(started(entry), Draws()):
        assert {"train/loss", "train/top1", "train/lr"} <= metrics.keys()
        for tag, value in metrics.items():
            value = torch.as_tensor(value)
            assert value.ndim == 0 and bool(value.isfinite()) and not value.requires_grad, tag


def test_the_weights_learn_from_train_and_the_alphas_from_valid(entry: Entry) -> None:
    draw = Draws()
    strategy = started(entry)
    run(strategy, draw, end=1)
    passes = getattr(strategy, "accumulate", 1)
    assert draw.asked == (["train", "valid"] if entry.kind else ["train"] * passes)


# -- time ---------------------------------------------------------------------------------------------------------------


def test_saved_and_restored_midway_is_uninterrupted(entry: Entry) -> None:
    whole, draw = started(entry), Draws()
    metrics = run(whole, draw)
    first, draw = started(entry), Draws()
    early = run(first, draw, end=2)
    file = io.BytesIO()
    torch.save({"strategy": checkpoint.state_of(first), "draw": draw.feed.state_dict()}, file)
    run(first, draw, start=2)  # what goes on must not reach what was saved
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second, draw = started(entry), Draws()
    run(second, Draws(), end=1)  # a state of its own to overwrite
    checkpoint.restore(second, state["strategy"])
    draw.feed.load_state_dict(state["draw"])
    assert equal(early + run(second, draw, start=2), metrics)
    assert equal(checkpoint.state_of(second), checkpoint.state_of(whole))
    assert second.architecture() == whole.architecture()


def test_reading_a_strategy_changes_nothing(entry: Entry) -> None:
    strategy = started(entry)
    run(strategy, Draws(), end=1)
    before = copy.deepcopy(checkpoint.state_of(strategy))
    now = moment(1, STEPS, EPOCH_STEPS, SEED)
    arch = strategy.arch(now)
    assert not any(isinstance(s, Mixture) and s.weights.requires_grad for s in arch.values())
    strategy.probabilities(), strategy.architecture(), strategy.network(arch), strategy.fits(strategy.architecture())
    assert equal(checkpoint.state_of(strategy), before)


def test_arch_is_what_the_next_weight_step_runs(search: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, seen = started(search), []
    now = moment(0, STEPS, EPOCH_STEPS, SEED)
    announced = strategy.arch(now)
    forward = type(strategy.net).forward

    def watched(net: Any, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
        seen.append(arch)
        return forward(net, x, arch)

    monkeypatch.setattr(type(strategy.net), "forward", watched)
    run(strategy, Draws(), end=1)
    assert plainly(seen[0]) == plainly(announced) and plainly(seen[1]) != plainly(announced)


def plainly(arch: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: (s.options, s.weights.tolist(), s.active) if isinstance(s, Mixture) else s for name, s in arch.items()}


# -- architectures ------------------------------------------------------------------------------------------------------

RESTRICTIONS: dict[str, Restriction] = {
    "free": {},
    "width-only": {f"stage{s}.depth": (2,) for s in range(3)},
    "depth-only": {},  # filled by forbidden()
    "some": {"stage0.depth": (1,), "stage1.block0.conv0.width": (2, 4, 6), "stage2.block1.conv0.width": (3, 4)},
}


def forbidden(entry: Entry, name: str) -> Restriction:
    if name != "depth-only":
        return RESTRICTIONS[name]
    space = CifarResNet(14, entry.kind or "tied", widths=(4, 6, 8))
    return {choice.name: choice.options[-1:] for choice in space.choices if choice.name.endswith("width")}


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_a_restriction_is_honoured(search: Entry, name: str) -> None:
    """No forbidden option is sampled, believed in or derived, and what is left is sampled."""
    strategy = started(search, forbidden(search, name))
    space = strategy.setup.space
    met: set[tuple[str, Value]] = set()
    for step in range(12):
        for setting_of, setting in strategy.arch(moment(step, 12, 4, SEED)).items():
            allowed = space[setting_of].options
            if not isinstance(setting, Mixture):
                assert (setting,) == allowed
                continue
            computed = range(len(setting.options)) if setting.active is None else setting.active
            assert {setting.options[j] for j in computed} <= set(allowed) and len(allowed) > 1
            assert setting.weights.sum().item() == pytest.approx(1.0, abs=1e-6)
            assert all(float(setting.weights[j]) == 0.0 for j in range(len(setting.options)) if j not in computed)
            met.update((setting_of, setting.options[j]) for j in computed)
    assert met == {(c.name, option) for c in space.choices for option in c.options if len(c.options) > 1}
    for choice, row in strategy.probabilities().items():
        assert len(row) == len(space.root[choice].options) and sum(row) == pytest.approx(1.0)
        assert all(p == 0.0 for option, p in zip(space.root[choice].options, row) if option not in space[choice].options)
    run(strategy, Draws(), end=2)
    space.check(strategy.architecture())


def test_the_architecture_lies_in_the_space(search: Entry) -> None:
    strategy = started(search)
    for step in range(STEPS):
        strategy.update(Draws(), moment(step, STEPS, EPOCH_STEPS, SEED))
        space = strategy.setup.space
        arch = strategy.architecture()
        assert list(arch) == [choice.name for choice in space.choices]
        space.check(space.canonical(arch))
        for choice in space.choices:
            assert arch[choice.name] in choice.options


def test_the_network_runs_what_arch_says(entry: Entry) -> None:
    strategy, draw = started(entry), Draws()
    run(strategy, draw, end=1)
    x = draw("train").x
    for arch in (strategy.arch(moment(1, STEPS, EPOCH_STEPS, SEED)), strategy.architecture()):
        net = strategy.network(arch)
        assert (net(x, arch) if arch else net(x)).shape == (16, 10)


def test_a_budget_that_cannot_be_met_is_refused(search: Entry) -> None:
    for target, words in ((1.0, "cannot be reached in this space"), ("much", "is not a budget"), ("101%", "cannot be reached")):
        strategy = search.make()
        strategy.target = target
        with pytest.raises(ValueError, match=words):
            started(search._replace(make=partial(copy.copy, strategy)))


def test_fits_is_the_tolerance_around_the_target(search: Entry) -> None:
    strategy = started(search)
    arch = strategy.architecture()
    view = "derived" if strategy.rule == "paper" else "estimated"  # the released rule reads what removed blocks say
    F = strategy.setup.costs.seen(view).of(arch)
    unit = strategy.R if strategy.rule == "paper" else strategy.F_max
    for off, expected in ((0.049, True), (0.051, False)):
        for sign in (1, -1):
            strategy.R = F / (1 + sign * off) if strategy.rule == "paper" else F - sign * off * unit
            assert strategy.fits(arch) is expected
