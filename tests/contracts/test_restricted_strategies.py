"""What single strategies count, refuse or remember of a space, in a part of it: the rest of test_restricted_spaces."""
from __future__ import annotations

import copy
import functools
import random
from typing import Any

import pytest
import torch
from strategy_entries import Draws, equal, run, started
from strategy_entry import ALONE, BOTH, STEPS, Entry, Restriction, made
from strategy_parts import CUTS, inside, kin, watched

from nas import checkpoint
from nas.bilevel import Weights
from nas.budget import Budget
from nas.strategies.attentive import Attentive
from nas.strategies.darts import DARTS
from nas.strategies.deps import DepS
from nas.strategies.fairnas import FairNAS
from nas.strategies.gdas import GDAS
from nas.strategies.ofa import OFA, Phase, opened
from nas.strategies.proxyless import Proxyless
from nas.strategies.tangle import Tangle
from nas.strategies.tas import TAS
from search_spaces import mobilenet, nats
from search_spaces.space import SearchSpace
from supernets.mobilenet import OFAMobileNetV3


@pytest.mark.parametrize("make", [DARTS, GDAS, lambda: Proxyless(every=1), lambda: Tangle("sparsemax")],
                         ids=["darts", "gdas", "proxyless", "tangle"])  # fmt: skip
def test_followers_keep_to_what_is_left_of_their_leader(make: Any) -> None:
    space, net, _ = made("cells")
    space = space.tie("node3.from0", "node1.from0", {option: option for option in nats.OPS})
    part = space.restrict({"node1.from0": ("none", "nor_conv_1x1"), "node2.from1": ("avg_pool_3x3",)})
    assert part["node3.from0"].options == ("none", "nor_conv_1x1")
    parent, child = kin(make, space, part, net)
    run(parent, Draws(), end=2)
    checkpoint.restore(child, checkpoint.state_of(parent))
    for arch in (*watched(child, 2, 4).ran, child.architecture()):
        inside(part, arch)


def test_a_space_of_one_architecture_is_refused_by_what_searches_with_alphas() -> None:
    for make, kind in ((DARTS, "cells"), (lambda: TAS(target="100%"), "tied"), (lambda: Tangle(), "vit")):
        one = {name: (value,) for name, value in made(kind)[0].largest().items() if value in made(kind)[0][name].options}
        with pytest.raises(ValueError, match="leaves one architecture, so there is nothing to search"):
            started(Entry("one", make, kind, BOTH), one)


def test_a_budget_out_of_a_childs_reach_is_refused_at_its_start() -> None:
    dear = dict.fromkeys(nats.NAMES[:4], ("nor_conv_3x3",))
    with pytest.raises(ValueError, match=r"budget\.target = 35% .* cannot be reached in this space") as caught:
        started(Entry("dear", lambda: DARTS(budget=Budget("35%")), "cells", BOTH), dear)
    assert "\n" not in str(caught.value)


def test_fairnas_refuses_what_leaves_unequal_choices_and_counts_its_own_options() -> None:
    entry = Entry("fairnas", FairNAS, "cells", ALONE)
    with pytest.raises(ValueError, match=r"in every open choice: node1\.from0 has 2, node2\.from0 has 5") as caught:
        started(entry, {"node1.from0": nats.OPS[:2]})
    assert "\n" not in str(caught.value)
    parent, child = started(entry), started(entry, dict.fromkeys(nats.NAMES, nats.OPS[2:4]))
    checkpoint.restore(child, checkpoint.state_of(parent))
    assert (parent.passes(), child.passes()) == (5, 2)
    ran = watched(child, 0, 1).ran
    assert len(ran) == 2 and {arch["node1.from0"] for arch in ran} == set(nats.OPS[2:4])


def attentive(width: str) -> Entry:
    return Entry("attentive", lambda: Attentive(bin_width=width, samples=500), "attentive", ALONE)


def test_bins_are_counted_in_ones_own_space() -> None:
    part = CUTS["attentive"]
    parent, child, fresh = started(attentive("5%")), started(attentive("5%"), part), started(attentive("5%"), part)
    assert parent.bins.width == child.bins.width  # a share of the root's largest
    checkpoint.restore(child, checkpoint.state_of(parent))
    assert equal(child.bins.state_dict(), fresh.bins.state_dict())
    assert not equal(child.bins.state_dict(), parent.bins.state_dict())
    for arch in child.bins.draw(random.Random(0), 20):
        inside(child.space, arch)
    other = started(attentive("5%")._replace(make=lambda: Attentive(bin_width="5%", samples=500, seed=1)), part)
    checkpoint.restore(other, checkpoint.state_of(fresh))  # of the same space: as its run began
    assert equal(other.bins.state_dict(), fresh.bins.state_dict())


def test_a_part_may_lie_in_one_bin_of_the_whole() -> None:
    space = made("attentive")[0]
    narrow = {c.name: c.options[-1:] for c in space.choices if len(c.options) > 1 and c.name != "stage1.kernel"}
    assert len(started(attentive("20%"), narrow).bins.bins) == 1
    with pytest.raises(ValueError, match="into one bin"):
        started(attentive("1000%"))


# -- progressive shrinking -------------------------------------------------------------------------------------------------

ONCE = Weights(lr=0.05, lr_min=0.001, nesterov=True, norm_decay=False, clip=None, per_epoch=False, idle="skip")
PHASES = [
    Phase("full", 1, 1.0), Phase("kernel", 2, 0.5, {"*.kernel": 3}), Phase("depth 1", 1, 0.2, {"*.depth": 2}, nets=2),
    Phase("depth 2", 1, 0.2, {"*.depth": 3}, nets=2), Phase("expand", 1, 0.2, {"*.expand": 3}, nets=2, sort=True),
]  # fmt: skip
LISTED = [
    Phase("full", 1, 1.0), Phase("kernel 1", 1, 1.0, {"*.kernel": [5, 7]}), Phase("kernel 2", 1, 1.0, {"*.kernel": [3, 5, 7]}),
    Phase("the rest", 1, 1.0, {"*.depth": 3, "*.expand": 3}),
]  # fmt: skip
KERNELS: Restriction = {"stage0.block0.kernel": (3,), "stage1.block0.kernel": (3, 5), "stage2.block0.kernel": (3, 7)}
LEFT: Restriction = {**KERNELS, "stage3.depth": (1, 2), "stage4.block0.expand": (3,), "stage4.block1.expand": (3, 4)}


@functools.cache
def once_for_all() -> tuple[SearchSpace, Any]:
    """All that the published phases open: kernels 3, 5, 7, expands 3, 4, 6, depths 1, 2, 3."""
    space = mobilenet.OFAMobileNetV3(0.1, True, (3, 5, 7), (3, 4, 6), (1, 2, 3), ())
    net = OFAMobileNetV3(space, channels=1, classes=10).double()
    net.reset(torch.Generator().manual_seed(1))
    return space, net


def shrinks() -> OFA:
    return OFA(PHASES, drop=0.0, weights=ONCE)


@pytest.mark.parametrize("begins", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_ofas_phases_go_on_where_choices_were_cut(begins: int) -> None:
    """Split before or in any phase: the child runs its part of each, taught by what its parent is taught by."""
    space, net = once_for_all()
    part = space.restrict(LEFT)
    parent, child = kin(shrinks, space, part, net)
    run(parent, Draws(), end=begins)
    checkpoint.restore(child, copy.deepcopy(checkpoint.state_of(parent)))
    for step in range(begins, STEPS):
        for arch in watched(child, step, step + 1).ran:
            child.plan.spaces[child.plan.at(step)].check(arch)
            inside(part, arch)
    assert child.plan.spaces[-1].choices == part.choices and child.plan.spaces[1]["stage1.block0.kernel"].options == (3, 5)
    assert child.plan.full == space.largest() != part.largest()
    run(parent, Draws(), begins, 2)  # its teacher is made before the second phase
    x, arch = Draws()("train").x, part.smallest()
    assert torch.equal(child.taught(x, arch), parent.taught(x, arch))
    with torch.no_grad():
        assert torch.equal(child.taught(x, arch), child.teacher(x, space.largest()))


def test_a_child_that_begins_anew_is_taught_by_its_own_largest() -> None:
    space, net = once_for_all()
    part = space.restrict(LEFT)
    _, child = kin(shrinks, space, part, net)
    assert watched(child, 0, 1).ran == [part.largest()] == [child.plan.full]
    watched(child, 1, 2)
    x = Draws()("train").x
    with torch.no_grad():
        assert torch.equal(child.taught(x, part.smallest()), child.teacher(x, part.largest()))


def test_phases_that_list_options_open_what_is_left_of_them() -> None:
    space, _ = once_for_all()
    part = space.restrict(LEFT)
    spaces = opened(part, LISTED, space)
    assert [[each[name].options for name in KERNELS] for each in spaces] == [
        [(3,), (5,), (7,)], [(3,), (5,), (7,)], [(3,), (3, 5), (3, 7)], [(3,), (3, 5), (3, 7)],
    ]  # fmt: skip
    assert spaces[-1].choices == part.choices
    with pytest.raises(ValueError, match=r"stage0\.block0\.kernel would have no option left of 5, 7\. Allowed: 3"):
        opened(part, LISTED)  # a recipe whose space never had them
    with pytest.raises(ValueError, match="9 is not"):
        opened(part, [*LISTED[:1], Phase("none", 1, 1.0, {"*.kernel": [9]}), *LISTED[1:]], space)


@pytest.mark.parametrize("protect", [{"*.expand": 2}, {"*.expand": [4, 6]}, None], ids=["number", "list", "none"])
def test_deps_shrinks_where_choices_were_cut(protect: dict[str, Any] | None) -> None:
    """Split while the largest learns alone: past the sort, the child's subnets and its largest are its own."""
    space, net = once_for_all()
    part = space.restrict(LEFT)
    parent, child = kin(lambda: DepS(1, 0, weights=ONCE, protect=protect), space, part, net)
    run(parent, Draws(), end=2)
    checkpoint.restore(child, copy.deepcopy(checkpoint.state_of(parent)))
    alone, together = watched(child, 2, 3).ran, watched(child, 3, 4).ran
    assert alone == [part.largest()] and together[:2] == [part.largest(), part.smallest()] and len(together) == 4
    for arch in together:
        inside(part, arch)
