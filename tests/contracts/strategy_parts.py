"""Parts of the spaces that strategies search, as the children of a split have them, and what is seen of a strategy in one."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from strategy_entries import SEARCHES, Draws, nets, run
from strategy_entry import EPOCH_STEPS, SEED, STEPS, Entry, Restriction
from torch import Tensor, nn

from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Moment, Setup
from nas.strategies.random import Random
from search_spaces import darts
from search_spaces.space import Mixture, SearchSpace, Setting

SPLIT = [entry for entry in SEARCHES if not isinstance(entry.make(), Random)]
WIDTHS: Restriction = {"stage0.depth": (1,), "stage1.block0.conv0.width": (1, 3), "stage2.block1.conv0.width": (2, 3, 5)}
MOBILE: Restriction = {"stage0.block0.kernel": (3,), "stage1.depth": (1,), "stage2.block1.expand": (2,)}
CUTS: Mapping[str, Restriction] = {
    "tied": WIDTHS, "tas": WIDTHS, "tied-shared": WIDTHS, "mobile": MOBILE, "mobile-sized": {**MOBILE, "resolution": (6,)},
    "cells": {"node1.from0": ("none", "skip_connect", "nor_conv_3x3"), "node3.from1": ("nor_conv_1x1", "nor_conv_3x3"),
              "node2.from0": ("skip_connect",)},
    "sizes": {"c1": (8, 32, 48, 56), "c3": (40, 48, 56, 64), "c4": (56,)},
    "darts": {"normal.node2.from0": darts.OPS[:4], "reduce.node3.from1": ("skip_connect", "sep_conv_5x5"),
              "normal.node3.from2": ("dil_conv_3x3",)},
    "nasnet": {"normal.block1.left.op": ("identity", "max_pool_3x3", "sep_conv_7x7"), "normal.block2.combine": ("add",),
               "reduce.block2.right.op": ("conv_1x1", "conv_3x3")},
    "scales": {"stage1.block0.norm0.width": (2, 4, 8), "final.width": tuple(range(1, 9)), "stage2.block0.norm2.width": (3,)},
    "pooling": {"pooling": ("1-1-3", "2-2-1", "1-2-2")},
    "macro": {"c1": (2, 3), "k2": (3, 7), "k3": (5,)},
    "vit": {"depth": (1, 2), "layer0.heads": (1,), "layer1.ratio": (2.0,)},
    "attentive": {"stage1.expand": (4, 5), "stage2.kernel": (3,), "stage0.depth": (1,)},
}  # fmt: skip
"""Of each kind of space: what a child has left of some choices, of one of them a single option. The largest option is gone of
some, the smallest of others. The budgets of the entries can be reached."""


def cut(entry: Entry) -> Restriction:
    """What the child has left. FairNAS needs equally many options everywhere: there a choice keeps all or one."""
    assert entry.kind is not None
    return {name: options for name, options in CUTS[entry.kind].items() if not entry.refuses or len(options) == 1}


class Seen(NamedTuple):
    """What the nets of a strategy ran, and the gradients (parameter, size of its largest entry) that any backward found."""

    ran: list[Mapping[str, Setting]]
    weights: dict[int, float]
    logits: dict[str, Tensor]  # K -> sum of |gradient| (n, K)


def watched(strategy: Any, start: int, end: int) -> Seen:
    """What is seen of some updates. A teacher of its own may run what it has learned, so it is not watched."""
    seen = Seen([], {}, {})

    def ran(net: nn.Module, given: tuple[Any, ...]) -> None:
        seen.ran.append(dict(given[1]))

    def weight(p: nn.Parameter, g: Tensor) -> None:
        seen.weights[id(p)] = max(seen.weights.get(id(p), 0.0), g.abs().max().item())

    def logit(K: str, g: Tensor) -> None:
        seen.logits[K] = seen.logits.get(K, torch.zeros_like(g)) + g.abs()

    hooks: list[Any] = [net.register_forward_pre_hook(ran) for net in nets(strategy)]
    hooks += [p.register_hook(functools.partial(weight, p)) for net in nets(strategy) for p in net.parameters()]
    for K, logits in getattr(getattr(strategy, "alpha", None), "logits", {}).items():
        hooks.append(logits.register_hook(functools.partial(logit, K)))
    run(strategy, Draws(), start, end)
    for hook in hooks:
        hook.remove()
    return seen


def moment_of(step: int) -> Moment:
    return moment(step, STEPS, EPOCH_STEPS, SEED)


def inside(space: SearchSpace, arch: Mapping[str, Setting]) -> None:
    """Fails where a path, or what a mixture computes or weighs, does not lie in ``space``."""
    if not any(isinstance(setting, Mixture) for setting in arch.values()):
        space.check(arch)  # type: ignore[arg-type]
        return
    for name, setting in arch.items():
        allowed = space[name].options
        if not isinstance(setting, Mixture):
            assert setting in allowed, name
            continue
        kept = range(len(setting.options)) if setting.active is None or setting.idle == "gate" else setting.active
        assert {setting.options[j] for j in kept} <= set(allowed), name
        weighed = {option for option, weight in zip(setting.options, setting.weights.tolist()) if weight != 0}
        assert weighed <= set(allowed), name


def kin(make: Callable[[], Any], space: SearchSpace, part: SearchSpace, net: Any) -> tuple[Any, Any]:
    """A started parent of ``space`` and a started child of ``part``, to which nothing is given yet. Both have nets for
    ``space``, as the nodes of a split have."""
    found = []
    for of in (space, part):
        mine = copy.deepcopy(net)
        mine.space = space
        strategy = make()
        strategy.start(Setup(mine, of, CostTable(mine, (8, 8)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 0))
        found.append(strategy)
    return found[0], found[1]
