"""What does not fit is said before a folder is made, for every level; and what a split leaves alone."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from split_runs import EDGES, EPOCH_STEPS, SEED, built, gm, go, tree

from nas.budget import Budget
from nas.splits.grow import planned, rehearse
from nas.splits.measure import DRAWS, Measured, _distances, _moment, decide
from nas.splits.partitions import best
from nas.splits.split import Split
from nas.splits.tree import Tree
from nas.strategies.darts import DARTS
from nas.strategies.mixture import Mixture
from nas.strategies.pada import PADA
from nas.strategies.random import Random
from nas.strategies.spos import SPOS
from search_spaces import nats


def refused(split: Split, strategy: Any = None, epochs: int = 3) -> str:
    with pytest.raises(ValueError) as failure:
        rehearse(Tree(built(split, strategy, epochs), split, Path("nowhere"), epochs, SEED))
    return str(failure.value)


def test_levels_without_anything_to_split() -> None:
    assert "nothing to split" in refused(gm([1, 2, 3], choices=EDGES), epochs=4)  # two edges, each split once
    said = refused(gm([1, 2], groups=[2, 3], least=2))
    assert "groups of 2 or more" in said  # three groups of two need six operations
    deep = Split(by="exhaustive", at=[1, 2], choices=["node2.from0", "node2.from1"])
    assert "node2.from1" in refused(deep)  # where the one is none, the other must not be
    assert "nothing to compare" in refused(gm([1], leave_out=["*"]))
    assert "random search" in refused(gm([1]), Random(trials=1))
    assert "several supernets already" in refused(gm([1]), Mixture(2, choices=["node1.from0"]))


def test_children_that_could_not_take_over_their_parents_state() -> None:
    same = gm([1], before={"path": True})
    rehearse(Tree(built(same, PADA(data=False)), same, Path("nowhere"), 3, SEED))
    for strategy, before in ((PADA(), {"path": False}), (PADA(shared=False), {"shared": True})):
        split = gm([1], before=before)
        assert "split.before: the children cannot take over" in refused(split, strategy)
        anew = gm([1], "weights", before=before)
        rehearse(Tree(built(anew, strategy), anew, Path("nowhere"), 3, SEED))


def test_schedules_end_where_only_weights_go_on() -> None:
    """Page, section 2a: the supernet is trained to its end, then the children with a rate that begins anew."""
    ends = {("weights",): [1, 3], ("all",): [3, 3], ("nothing",): [3, 3], ("all", "weights"): [2, 2, 3],
            ("weights", "all"): [1, 3, 3], ("all", "nothing"): [3, 3, 3]}  # fmt: skip
    for inherit, wanted in ends.items():
        split = gm(list(range(1, len(inherit) + 1)), list(inherit))
        made = Tree(built(split), split, Path("nowhere"), 3, SEED)
        assert made.until == wanted
        begins = made.begins
        assert [made.parts(level)[1].steps for level in range(len(wanted))] == [
            (end - begin) * EPOCH_STEPS for begin, end in zip(begins, wanted)]  # fmt: skip
    untrained = gm([0], "weights")
    assert Tree(built(untrained), untrained, Path("nowhere"), 3, SEED).until == [3, 3]


def test_a_partition_that_cannot_be_searched_is_passed_over() -> None:
    D = np.ones((4, 4))
    D[0, 1] = D[1, 0] = D[2, 3] = D[3, 2] = 0.1
    D[0, 2] = D[2, 0] = D[1, 3] = D[3, 1] = 0.2
    first, second = ((0, 1), (2, 3)), ((0, 2), (1, 3))
    assert best(D, 2, 2).groups == first
    asked = []
    found = best(D, 2, 2, admits=lambda groups: not asked.append(groups) and groups != first)
    assert found.groups == second and asked == [first, second]
    assert found.within == pytest.approx(0.4) and found.cut == pytest.approx(2.6 - 0.4)
    with pytest.raises(ValueError, match="none of the 3 partitions"):
        best(D, 2, 2, admits=lambda groups: False)


def test_a_budget_that_a_part_cannot_reach_forbids_that_cut() -> None:
    split = gm([1], choices=["node3.from0"])
    made = built(split, DARTS(order=1, budget=Budget("99%")))  # every part needs a 3x3 convolution on the edge
    assert "node3.from0 makes parts that can be searched: " in refused(split, DARTS(order=1, budget=Budget("99%")))
    measured, told = Measured(made, split, 0), list[Any]()

    def refuses(choice: str, groups: Any) -> str:
        told.append(groups)
        return "" if all({"nor_conv_1x1", "nor_conv_3x3"} & set(group) for group in groups) else "out of reach"

    found = decide(made, measured, split, 0, refuses)
    assert len(told) > 1 and found["groups"] == told[-1] and refuses("", found["groups"]) == ""
    with pytest.raises(ValueError, match="makes parts that can be searched: out of reach"):
        decide(made, measured, split, 0, lambda choice, groups: "out of reach")


def test_options_that_make_no_such_groups_are_one_line() -> None:
    """Where no partition was even asked about."""
    split = gm([1], choices=["node3.from0"])
    made = built(split)
    measured = Measured(made, split, 0)
    measured.barren["node3.from0"] = list(range(5))
    with pytest.raises(ValueError, match="makes parts that can be searched: their options do not make such groups"):
        decide(made, measured, split, 0)


def test_paths_that_an_option_would_kill_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page, section 3: random paths are redrawn until input reaches output, with every operation on the edge."""
    split = gm([1], choices=["node3.from0"])
    made = built(split, SPOS())
    made.strategy.start(made.setup)
    deadly = {"node1.from0": "nor_conv_1x1", "node2.from0": "skip_connect", "node2.from1": "none",
              "node3.from0": "skip_connect", "node3.from1": "none", "node3.from2": "none"}  # fmt: skip
    lively = deadly | {"node3.from2": "nor_conv_3x3"}
    space, drawn = nats.Topology(2, 1), iter([deadly, deadly, lively])
    assert space.lawful(space.encode([deadly | {"node3.from0": "none"}])).tolist() == [False]
    monkeypatch.setattr(made.strategy, "arch", lambda now: next(drawn))
    feed = made.data.feed(1, "cpu")
    D = _distances(made, split, "node3.from0", feed("train"), _moment(made, 0, 1, 0))
    assert next(drawn, None) is None and np.isfinite(D).all()
    always = iter([deadly] * (DRAWS + 1))
    monkeypatch.setattr(made.strategy, "arch", lambda now: next(always))
    _distances(made, split, "node3.from0", feed("train"), _moment(made, 1, 1, 0))
    assert len(list(always)) == 1  # gives up


@pytest.mark.slow
def test_children_that_were_trained_are_not_begun_again(tmp_path: Path) -> None:
    """Where split.json was deleted, as a message says."""
    split = gm([1])
    go(tmp_path / "run", split)
    made = tree(tmp_path / "run", split)
    steps = [made.done(leaf) for leaf in made.level(1)]
    arch = (tmp_path / "run" / "arch.json").read_text()
    (tmp_path / "run" / "split.json").unlink()
    go(tmp_path / "run", split)
    again = tree(tmp_path / "run", split)
    assert [again.done(leaf) for leaf in again.level(1)] == steps == [6, 6]
    assert again.trained().step == 2 + 4 + 4 and again.trained().finished  # the root's steps are not counted again
    assert (tmp_path / "run" / "arch.json").read_text() == arch


def test_what_a_tree_takes() -> None:
    split = gm([1, 2], "all")
    made = Tree(built(split), split, Path("nowhere"), 3, SEED)
    assert planned(made) == EPOCH_STEPS * (1 + 2 + 4)
    few = Split(by="exhaustive", at=[2], choices=["node2.from0"])
    assert planned(Tree(built(few), few, Path("nowhere"), 3, SEED)) == EPOCH_STEPS * (2 + 5)
