"""Bringing a derived architecture to its budget: always met where it can be, and near the most probable way to meet it."""
from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import pytest
import torch

from nas.alpha import Alpha
from nas.budget import Budget
from nas.cost import CostTable
from search_spaces.darts import Cells as CellSpace
from search_spaces.nats import Topology as TopologySpace
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, SearchSpace
from supernets.darts import Cells as CellNet
from supernets.nats import Topology as TopologyNet
from supernets.resnet import ResNet

SPACE = CifarResNet(8, "tied")
COSTS = CostTable(ResNet(SPACE, classes=5), (8, 8))


def believed(space: SearchSpace, std: float, seed: int) -> Alpha:
    return Alpha(space, std, torch.Generator().manual_seed(seed)).double()


def odds(space: SearchSpace, p: Mapping[str, Sequence[float]], arch: Arch) -> float:
    return sum(math.log(p[name][space.root[name].options.index(arch[name])]) for name in space.free)


def derived(budget: Budget, space: SearchSpace, alpha: Alpha) -> Arch:
    return budget.derive(alpha.probabilities(), lambda p: alpha.architecture(None, p))


def started(space: SearchSpace, target: str, **more: float | str) -> Budget:
    budget = Budget(target, **more)  # type: ignore[arg-type]
    budget.start(COSTS, space)
    return budget


@pytest.mark.parametrize("target", ["25%", "50%", "80%"])
@pytest.mark.parametrize("std", [0.001, 0.5, 2.0])
def test_it_meets_the_budget_in_a_probable_way(target: str, std: float) -> None:
    """Against enumeration: what fits is found, and of 20 times most are the best that fits or little less probable."""
    space = SPACE.restrict({c.name: c.options[1::2] for c in SPACE.choices if len(c.options) > 3})
    budget = started(space, target)
    archs = [dict(zip((c.name for c in space.choices), values))
             for values in itertools.product(*(c.options for c in space.choices))]  # fmt: skip
    fitting = [arch for arch in archs if budget.fits(arch)]
    assert fitting and len(fitting) < len(archs) / 2
    worse = []
    for seed in range(20):
        alpha = believed(space, std, seed)
        p, arch = alpha.probabilities(), derived(budget, space, alpha)
        assert budget.fits(arch)
        best = max(odds(space, p, other) for other in fitting)
        worse.append(best - odds(space, p, arch))
    assert min(worse) > -1e-9  # enumeration misses nothing
    assert sum(gap < 1.5 * std for gap in worse) >= 15


def test_what_fits_already_is_left_alone() -> None:
    budget = started(SPACE, "50%", tolerance=0.9)
    alpha = believed(SPACE, 1.0, 3)
    assert budget.fits(alpha.architecture()) and derived(budget, SPACE, alpha) == alpha.architecture()


def test_at_most_shrinks_and_never_grows() -> None:
    budget = started(SPACE, "60%", side="at_most")
    for seed in range(10):
        alpha = believed(SPACE, 1.0, seed)
        arch = derived(budget, SPACE, alpha)
        assert COSTS.of(arch) <= 1.05 * budget.R
        if COSTS.of(alpha.architecture()) <= 1.05 * budget.R:
            assert arch == alpha.architecture()


def test_a_restriction_and_a_tie_are_kept() -> None:
    narrow = SPACE.restrict({"stage2.width": SPACE["stage2.width"].options[-2:]})
    options = narrow["stage0.block0.conv0.width"].options
    tied = narrow.tie("stage0.block0.conv0.width", "stage0.width", dict(zip(narrow["stage0.width"].options, options)))
    budget = started(tied, "70%")
    arch = derived(budget, tied, believed(tied, 1.0, 1))
    tied.check(arch)
    assert budget.fits(arch)


def test_the_rule_may_be_the_strategys_own() -> None:
    """Whatever is tried goes through the rule: here one that always takes the widest first stage."""
    budget, alpha = started(SPACE, "60%"), believed(SPACE, 1.0, random.Random(0).randrange(9))
    widest = SPACE["stage0.width"].options[-1]
    arch = budget.derive(alpha.probabilities(), lambda p: alpha.architecture(None, p) | {"stage0.width": widest})
    assert budget.fits(arch) and arch["stage0.width"] == widest


def test_a_budget_that_no_derived_cell_meets_is_refused_and_the_others_are_met() -> None:
    """A DARTS cell keeps two edges a node: 70% of what all its edges would cost is out of its reach, 55% is not."""
    space = CellSpace(C=4, layers=3)
    costs = CostTable(CellNet(space, 3, 10), (16, 16))
    with pytest.raises(ValueError, match=r"budget\.target = 70% .* is out of reach: what this space derives costs from"):
        Budget("70%").start(costs, space)
    for target in ("30%", "55%"):
        budget = Budget(target)
        budget.start(costs, space)
        for seed in range(3):
            alpha = believed(space, 0.1, seed)
            arch = derived(budget, space, alpha)
            space.genotype(arch)  # still two inputs a node
            assert budget.fits(arch)


@pytest.mark.parametrize("side", ["both", "at_most"])
@pytest.mark.parametrize("target", ["24%", "40%", "70%"])
def test_a_small_space_is_searched_whole(target: str, side: str) -> None:
    """Cells of NAS-Bench-201: the most probable of all that fit, or the nearest where none does (24%: between two costs)."""
    space = TopologySpace(C=4, N=1)
    costs = CostTable(TopologyNet(space, 1, 10), (8, 8))
    budget = Budget(target, side=side, tolerance=0.005)
    budget.start(costs, space)
    archs = [dict(zip((c.name for c in space.choices), ops)) for ops in itertools.product(*(c.options for c in space.choices))]
    prices = dict(zip(range(len(archs)), costs.batch(space.encode(archs)).tolist()))
    fitting = [i for i, cost in prices.items() if budget.fits(archs[i])] if target != "24%" else []
    for seed in range(3):
        alpha = believed(space, 1.0, seed)
        p, arch = alpha.probabilities(), derived(budget, space, alpha)
        if budget.fits(alpha.architecture()):
            assert arch == alpha.architecture()
        elif fitting:
            assert budget.fits(arch)
            assert odds(space, p, arch) == pytest.approx(max(odds(space, p, archs[i]) for i in fitting))
        else:
            gap = min(abs(cost - budget.R) for cost in prices.values())
            assert budget.fits(arch) or abs(costs.of(arch) - budget.R) == gap
