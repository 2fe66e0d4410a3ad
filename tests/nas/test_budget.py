"""The budget term against its equations, in float64: values, slopes, where it ends, what it refuses, how it is kept."""
from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from pytest import approx
from torch import Tensor, nn
from torch.optim import Adam

from nas import checkpoint
from nas.alpha import Alpha
from nas.budget import Budget, log_ratio
from nas.cost import CostTable, params
from nas.descent import Descent
from nas.losses import CrossEntropy
from nas.protocols import Setup
from search_spaces.resnet import CifarResNet
from search_spaces.space import Choice, Mixture, SearchSpace
from supernets.layers import Layer, Shape
from supernets.resnet import ResNet


class Cell(nn.Module):
    """Two edges that are free or cost 6 products; with ``stem``, 4 more that are always there."""

    def __init__(self, stem: bool = False) -> None:
        super().__init__()
        self.space = SearchSpace([Choice(name, ("skip", "conv"), ordered=False) for name in "ab"], {})
        self.stem = stem

    def layers(self, input_size: tuple[int, int], view: str) -> list[Layer]:
        edges = [Layer(name, "conv", (name,), lambda op: Shape(2, 3) if op == "conv" else None) for name in "ab"]
        return edges + ([Layer("stem", "conv", (), lambda: Shape(2, 2))] if self.stem else [])


class Ends(SearchSpace):
    """A space whose ends are told, as unordered choices need."""

    def largest(self) -> dict[str, Any]:
        return dict.fromkeys("ab", "conv")

    def smallest(self) -> dict[str, Any]:
        return dict.fromkeys("ab", "skip")


def cell(stem: bool = False) -> tuple[CostTable, SearchSpace]:
    net = Cell(stem)
    net.space = Ends(net.space.choices, {})
    return CostTable(net, (1, 1)), net.space


def mixed(p: float, q: float) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Settings of a cell that take "conv" with probability p and q; their weights are leaves."""
    a, b = (torch.tensor([1 - x, x], dtype=torch.float64, requires_grad=True) for x in (p, q))
    return {"a": Mixture(("skip", "conv"), a), "b": Mixture(("skip", "conv"), b)}, a, b


def started(target: Any, stem: bool = False, **more: Any) -> Budget:
    budget = Budget(target, **more)
    budget.start(*cell(stem))
    return budget


def resnet(kind: str = "tas") -> CostTable:
    return CostTable(ResNet(CifarResNet(8, kind, widths=(4, 4, 6)), classes=5), (8, 8))


# -- the equations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p, q", [(0.9, 0.6), (0.1, 0.2), (0.5, 0.5)])
@pytest.mark.parametrize("side", ["both", "at_most"])
def test_value_and_slope_by_hand(p: float, q: float, side: str) -> None:
    """E = 4 + 6 p + 6 q and R = 10, so d loss / dp = +-weight * 6 / E."""
    budget = started(10, stem=True, side=side, weight=3.0)
    soft, a, _ = mixed(p, q)
    loss = budget.loss(soft)
    E = 4 + 6 * p + 6 * q
    sign = math.copysign(1, E - 10) if abs(E - 10) > 1e-9 else 0.0
    sign = max(sign, 0.0) if side == "at_most" else sign
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == approx(3.0 * sign * math.log(E / 10), abs=1e-14)
    loss.backward()
    assert a.grad is not None
    assert (a.grad[1] - a.grad[0]).item() == approx(3.0 * sign * 6 / E, abs=1e-14)


def test_slope_in_the_logits_is_that_of_finite_differences() -> None:
    costs = resnet()
    torch.manual_seed(0)
    alpha = Alpha(costs.root, std=1.0).double()
    budget = Budget("30%", weight=2.0)
    budget.start(costs, costs.root)
    budget.loss(alpha.soft()).backward()
    for logits in alpha.parameters():
        if logits.shape[1] == 1:  # nothing to choose
            continue
        assert logits.grad is not None and logits.grad.abs().max() > 1e-3
        for at in itertools.islice(itertools.product(*map(range, logits.shape)), 0, None, 5):
            ends = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    logits[at] += h
                    ends.append(budget.loss(alpha.soft()).item())
                    logits[at] -= h
            assert logits.grad[at].item() == approx((ends[0] - ends[1]) / 2e-5, abs=1e-9)


def test_followers_count_with_their_leaders() -> None:
    costs, space = cell(stem=True)
    tied = space.tie("b", "a", {"skip": "conv", "conv": "skip"})
    budget = Budget(10)
    budget.start(costs, tied)
    soft, *_ = mixed(0.9, 0.9)
    assert budget.loss(soft).item() == approx(0.0, abs=1e-14)  # one of the two is there, always
    assert started(10, stem=True).loss(soft).item() == approx(math.log(1.48), abs=1e-14)


def test_the_ratio_is_a_log_and_far_below_its_tangent() -> None:
    r = torch.tensor([1e-3, 2e-3, 0.5, 1.0, 7.0], dtype=torch.float64)
    assert torch.equal(log_ratio(r), r.log())
    low = torch.tensor([0.0, 5e-4, 1e-3 - 1e-12], dtype=torch.float64, requires_grad=True)
    found = log_ratio(low)
    assert found.tolist() == approx([math.log(1e-3) - 1, math.log(1e-3) - 0.5, math.log(1e-3)], abs=1e-8)
    found.sum().backward()
    assert low.grad is not None and low.grad.tolist() == approx([1000.0] * 3)
    assert torch.autograd.gradcheck(log_ratio, torch.tensor([2e-4, 0.3, 4.0], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("side, value, slope", [("both", 1 - math.log(1e-3), -1000 * 6 / 6), ("at_most", 0.0, 0.0)])
def test_a_cell_that_costs_nothing_has_a_finite_slope(side: str, value: float, slope: float) -> None:
    """Where log E and its slope are infinite the term still says: more."""
    budget = started(6, side=side)
    soft, a, _ = mixed(0.0, 0.0)
    loss = budget.loss(soft)
    loss.backward()
    assert loss.item() == approx(value) and a.grad is not None
    assert a.grad.tolist() == approx([0.0, slope])


@pytest.mark.parametrize("side", ["both", "at_most"])
def test_logits_so_sure_that_their_softmax_underflows_are_no_nan(side: str) -> None:
    budget = started(6, side=side)
    logits = torch.tensor([[2000.0, -2000.0]] * 2, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(logits, dim=1)
    assert p[0, 1].item() == 0.0
    budget.loss({name: Mixture(("skip", "conv"), row) for name, row in zip("ab", p)}).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("start", ["smallest", "largest"])
def test_descent_on_the_term_alone_ends_at_the_target(start: str) -> None:
    costs = resnet("tied")
    alpha = Alpha(costs.root, std=0.0).double()
    with torch.no_grad():  # begin near the cheap or the dear end
        for logits in alpha.parameters():
            logits.add_(torch.linspace(-1, 1, logits.shape[1]), alpha=3.0 if start == "largest" else -3.0)
    budget = Budget("40%")
    budget.start(costs, costs.root)
    first = float(budget.metrics(alpha.soft(), alpha.architecture())["cost/expected"]) / budget.R
    assert first > 1.5 if start == "largest" else first < 0.7
    a = Descent(alpha.parameters(), partial(Adam, lr=0.02))
    for _ in range(400):
        a.down(budget.loss(alpha.soft()))
    found = budget.metrics(alpha.soft(), alpha.architecture())
    assert float(found["cost/expected"] / found["cost/target"]) == approx(1.0, rel=0.02)


# -- readings -------------------------------------------------------------------------------------------------------------


def test_metrics_are_expected_current_and_target() -> None:
    budget = started("62.5%", stem=True)
    soft, *_ = mixed(0.9, 0.6)
    found = budget.metrics(soft, {"a": "conv", "b": "skip"})
    E = found.pop("cost/expected")
    assert isinstance(E, Tensor) and not E.requires_grad and E.item() == approx(13.0)
    assert found == {"cost/current": 10.0, "cost/target": 10.0}


@pytest.mark.parametrize("target, side, fitting", [
    (10, "both", {10}), (10, "at_most", {4, 10}), (10.6, "both", set()), (10.5, "both", {10}), (9.5, "both", set()),
    (9.6, "at_most", {4, 10}), (9.4, "at_most", {4}), (16, "at_most", {4, 10, 16}),
])  # fmt: skip
def test_fits_allows_the_tolerance(target: float, side: str, fitting: set[int]) -> None:
    budget = started(target, stem=True, side=side)
    cost = {4: ("skip", "skip"), 10: ("conv", "skip"), 16: ("conv", "conv")}
    assert {c for c, (a, b) in cost.items() if budget.fits({"a": a, "b": b})} == fitting


def test_other_prices() -> None:
    costs = resnet()
    budget = Budget("50%", price="params")
    budget.start(costs, costs.root)
    large = costs.priced(params).of(costs.root.largest())
    assert budget.R == approx(0.5 * large) and budget.table.of(costs.root.largest()) == large
    same = Budget("50%")
    same.start(costs, costs.root)
    assert same.table is costs  # not built twice


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ({"target": "half"}, "budget.target = 'half' is not a budget. Allowed: a share .55%."),
    ({"target": "55%", "price": "flops"}, "budget.price = 'flops' is not known. Allowed: macs, params, activations, or"),
    ({"target": "55%", "weight": -1.0}, "budget.weight = -1.0 is no weight"),
    ({"target": "55%", "weight": math.inf}, "budget.weight = inf is no weight"),
    ({"target": "55%", "weight": math.nan}, "budget.weight = nan is no weight"),
    ({"target": "55%", "side": "below"}, "budget.side = 'below' is not known. Allowed: both, at_most"),
    ({"target": "55%", "tolerance": 1.0}, "budget.tolerance = 1.0 is not a share"),
])  # fmt: skip
def test_what_no_budget_can_say(given: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Budget(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target, words", [
    ("101%", r"budget.target = 101% \(12.12\) cannot be reached in this space. Smallest cost: 0 .*largest: 12 \(100.0%\)"),
    (1e9, "budget.target = .* cannot be reached"),
    (0, "budget.target = 0 is free"),
])  # fmt: skip
def test_what_the_space_cannot_reach(target: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        started(target)


def test_a_latency_table_is_read_when_the_search_starts(tmp_path: Path) -> None:
    table = tmp_path / "none.csv"
    budget = Budget("50%", price=str(table))
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such latency table. Make one: nas latency RECIPE"):
        budget.start(*cell())


# -- as a hyper-parameter -------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """A strategy with a budget."""

    budget: Budget | None = None

    def start(self, setup: Setup) -> None:
        self.setup = setup
        assert self.budget is not None and setup.costs is not None and setup.space is not None
        self.budget.start(setup.costs, setup.space)
        self.seen = 0


def test_a_strategy_with_a_budget_can_be_saved_and_restored() -> None:
    costs = resnet()
    setup = Setup(costs._net, costs.root, costs, CrossEntropy(), None, 10, 5, 20)
    first, second = Toy(Budget("50%")), Toy(Budget("50%"))
    first.start(setup)
    first.seen = 7
    checkpoint.check(first)
    state = copy.deepcopy(checkpoint.state_of(first))
    assert "budget" not in state
    second.start(setup)
    checkpoint.restore(second, state)
    assert second.seen == 7 and second.budget is not None and first.budget is not None
    assert second.budget.R == first.budget.R and second.budget == first.budget


def test_the_recipe_form() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--budget", type=Budget | None, default=None)
    parsed = parser.parse_object({"budget": {"price": "params", "target": "55%", "weight": 0.5}})
    assert parser.instantiate(parsed).budget == Budget("55%", "params", 0.5)
    assert parser.parse_args([]).budget is None
