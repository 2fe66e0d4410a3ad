"""What a split promises of every strategy: its leaves are trained, what is picked lies in the leaf that serves it, and a run
that is broken off ends like one that is not. A strategy is one more line of SPLITS."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from split_runs import DATA, Enough, breaking, gm, outcome, same
from strategy_entries import SEARCHES, random_paths
from strategy_entry import KINDS, SEED
from torch.utils.tensorboard import SummaryWriter

from nas import ranks
from nas.build import gather
from nas.limits import Select
from nas.losses import CrossEntropy
from nas.search import Found, search
from nas.searchers.random import Random
from nas.splits import measure as measuring
from nas.splits.tree import Tree
from search_spaces import nats

EPOCHS = 4
CHOICES = {
    "cells": ["node1.from0", "node3.from1"], "darts": ["normal.node2.from0", "normal.node3.from2"],
    "tied": ["stage0.depth", "stage1.block0.conv0.width"], "tied-shared": ["stage[12].block0.*.width"],
    "mobile": ["stage0.block1.kernel", "stage1.block0.expand"], "attentive": ["stage1.expand", "stage2.kernel"],
    "mobile-sized": ["stage0.block1.kernel", "stage1.block0.expand"], "macro": ["c1", "k2"],
}  # fmt: skip
"""Of each kind of space, what may be split: also what counts in some of its networks only."""
ARCHS = {entry.id: entry for entry in (*SEARCHES, *random_paths("cells", 4, False))}
FAIR = dict.fromkeys(nats.NAMES, ("skip_connect", "nor_conv_3x3"))


class Case(NamedTuple):
    """A strategy of strategy_entries. ``fast``: what is inherited in the fast tests. ``picks``: by a searcher."""

    id: str
    fast: str = ""
    picks: bool = False


SPLITS = [
    Case("darts-1-cells", fast="all"), Case("darts-2-cells"), Case("snas-cells"), Case("gdas-cells"), Case("drnas-cells"),
    Case("proxyless-cells"), Case("tangle-softmax-cells"), Case("tangle-dirichlet-macro"), Case("darts-1-darts"),
    Case("snas-tied"), Case("rarts-cells"), Case("tas-tied"), Case("rsps-cells"), Case("spos-cells", picks=True),
    Case("spos-mobile", picks=True), Case("fairnas-cells", picks=True), Case("pada-both-cells", picks=True),
    Case("bignas-mobile", picks=True),
    Case("bignas-tied", picks=True), Case("ofa-mobile-sized", picks=True), Case("ofa-tied-shared", picks=True),
    Case("deps-mobile", picks=True), Case("attentive-attentive", picks=True), Case("alphanet-attentive", picks=True),
]  # fmt: skip
PARAMS = [pytest.param(case, inherit, id=f"{case.id}-{inherit}", marks=[] if case.fast == inherit else [pytest.mark.slow])
          for case in SPLITS for inherit in ("all", "nothing")]  # fmt: skip


def parts(case: Case, inherit: str) -> dict[str, Any]:
    """Of a run: one split after the first of four epochs, of two steps each."""
    entry = ARCHS[case.id]
    assert entry.kind is not None
    kind = KINDS[entry.kind]
    space = kind.space().restrict(FAIR) if case.id == "fairnas-cells" else kind.space()
    net = kind.net(space, channels=1, classes=10)
    net.reset(torch.Generator().manual_seed(1))
    split = gm([1], inherit, choices=CHOICES[entry.kind])
    return {"net": net, "strategy": entry.make(), "split": split, "searcher": Random(trials=4) if case.picks else None}


def run(out: Path, case: Case, inherit: str) -> Found:
    given = parts(case, inherit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_figure", lambda *given: None)
        return search(DATA, given["net"], given["strategy"], epochs=EPOCHS, out=out, seed=SEED, device="cpu", every=2,
                      gap=False, searcher=given["searcher"], limits=Select(bn_images=16), split=given["split"])  # fmt: skip


def tree(out: Path, case: Case, inherit: str) -> Tree:
    given = parts(case, inherit)
    built = gather(DATA, given["net"], given["strategy"], CrossEntropy(), epochs=EPOCHS, seed=SEED, device=torch.device("cpu"),
                   group=ranks.Ranks(0, 1, 0, True), searcher=given["searcher"], split=given["split"])  # fmt: skip
    return Tree(built, given["split"], out, EPOCHS, SEED)


def broken(out: Path, case: Case, inherit: str, holder: Any, name: str, nth: int) -> None:
    """A run that ends when a function is called for the ``nth`` time (from 0)."""
    calls = iter(range(1_000_000))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(holder, name, breaking(getattr(holder, name), lambda *given: next(calls) == nth))
        run(out, case, inherit)


@pytest.mark.parametrize("case, inherit", PARAMS)
def test_a_split_of_any_strategy(case: Case, inherit: str, tmp_path: Path) -> None:
    strategy = type(ARCHS[case.id].make())
    out = tmp_path / "broken" / "run"
    broken(out, case, inherit, measuring, "_distances", 3)  # two steps later, amid the second batch
    broken(out, case, inherit, strategy, "update", 3)  # amid the second epoch of a leaf
    found = run(out, case, inherit)
    assert same(outcome(out), outcome(run(tmp_path / "whole" / "run", case, inherit).folder)) == []
    made = tree(out, case, inherit)
    leaves = made.level(1)
    assert [leaf.name for leaf in leaves] == ["0", "1"] and sum(leaf.space.size for leaf in leaves) == made.built.space.size
    assert made.trained().finished
    leaf = made.leaf(found.arch.arch)
    leaf.space.check(found.arch.arch)
    for one in leaves:
        assert case.picks != (one.folder / "arch.json").exists()
        if not case.picks:
            one.space.check(json.loads((one.folder / "arch.json").read_text())["arch"])
        opened = made.open(one)
        one.space.check(one.space.canonical(opened.strategy.architecture()))
        assert opened.step == opened.setup.steps == (8 if inherit == "all" else 6)
        assert made.fits(one.space.largest()) in (True, False)
    x = next(iter(DATA.batches("train", torch.device("cpu"), batch_size=4))).x
    net = made.network(found.arch.arch)
    with torch.no_grad():
        assert net(x, found.arch.arch).shape == (4, 10) and bool(net(x, found.arch.arch).isfinite().all())
