"""The spaces of NATS-Bench against sections 1, 2 and 8 of their page; the table itself is read in tests/oracles."""
from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.nats import NAMES, OPS, Numbering, Sizes, Topology, cell_arch, cell_text, edge
from search_spaces.space import Arch

BEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
FIRST = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
ALL: list[Arch] = [dict(zip(NAMES, ops)) for ops in itertools.product(OPS, repeat=6)]


def cell(*ops: str) -> Arch:
    return dict(zip(NAMES, ops))


# ---- topology ----------------------------------------------------------------------------------------------------------

def test_lawful_are_the_cells_in_which_every_node_receives_something() -> None:
    """4 x 24 x 124 of them (page single-path.md, section 5)."""
    lawful = Topology().lawful(Topology().encode(ALL))
    assert lawful.sum() == 4 * 24 * 124
    fed = [all(any(arch[name] != "none" for name in NAMES if name.startswith(f"node{n}.")) for n in (1, 2, 3)) for arch in ALL]
    assert lawful.tolist() == fed


def test_choices_of_the_page() -> None:
    space = Topology()
    assert [choice.name for choice in space.choices] == [
        "node1.from0", "node2.from0", "node2.from1", "node3.from0", "node3.from1", "node3.from2"]
    assert {choice.options for choice in space.choices} == {
        ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")}
    assert not any(choice.ordered for choice in space.choices)
    assert space.size == 15625 and edge(3, 1) == "node3.from1"
    assert (space.C, space.N, space.args) == (16, 5, {"C": 16, "N": 5}) and space.name == "nats.Topology"
    assert set(space.largest().values()) == {"nor_conv_3x3"} and set(space.smallest().values()) == {"skip_connect"}
    assert space.skips == ("skip_connect",) and space.nones == ("none",) and space.part("node3.from1") == ""
    space.check(cell(*["none"] * 6))  # the tables hold it


def test_strings_of_the_page() -> None:
    space = Topology()
    best = cell("nor_conv_3x3", "nor_conv_3x3", "nor_conv_3x3", "skip_connect", "nor_conv_3x3", "nor_conv_1x1")
    assert space.parse(BEST) == best and space.text(best) == BEST
    assert space.parse(FIRST) == cell("avg_pool_3x3", "nor_conv_1x1", "skip_connect", "nor_conv_1x1", "skip_connect",
                                      "skip_connect")


@pytest.mark.parametrize(("text", "line"), [
    ("", "'' is not a cell of NAS-Bench-201. A cell is written"),
    (BEST[:-1], "is not a cell of"),
    (BEST.replace("~2", "~1"), "is not a cell of"),
    (BEST.replace("|+|", "+|", 1), "is not a cell of"),
    (BEST + "+|none~0|", "is not a cell of"),
    (BEST.replace("skip_connect", "skip"), r"node3.from0 = skip is not in this space. Allowed: none, skip"),
])
def test_strings_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Topology().parse(text)


@pytest.mark.parametrize(("ops", "key"), [
    (["skip_connect"] * 6, "0+0+0+0"),
    (["none"] * 6, "#+#+#"),
    (["avg_pool_3x3", "none", "nor_conv_1x1", "none", "none", "skip_connect"], "#+#+#+((0)@avg_pool_3x3)@nor_conv_1x1"),
    (["none", "none", "nor_conv_3x3", "nor_conv_1x1", "nor_conv_3x3", "none"], "#+#+(0)@nor_conv_1x1"),
])
def test_keys_by_hand(ops: list[str], key: str) -> None:
    assert Topology().key(cell(*ops)) == key


def test_key_sees_isomorphism_only() -> None:
    key = Topology().key
    one = cell("skip_connect", "none", "none", "nor_conv_1x1", "nor_conv_3x3", "none")  # node 1 is node 0
    two = cell("skip_connect", "none", "none", "nor_conv_3x3", "nor_conv_1x1", "none")
    three = cell("avg_pool_3x3", "skip_connect", "none", "nor_conv_1x1", "none", "nor_conv_3x3")  # so is node 2
    assert key(one) == key(two) == "#+(0)@nor_conv_1x1+(0)@nor_conv_3x3"
    assert key(three) == "#+(#+0)@nor_conv_3x3+(0)@nor_conv_1x1" != key(one)  # the published rule keeps that #
    swapped = cell("nor_conv_1x1", "nor_conv_3x3", "skip_connect", "none", "none", "skip_connect")
    assert key(swapped) == "#+#+(0)@nor_conv_1x1+(0)@nor_conv_3x3" != key(swapped | {"node2.from1": "avg_pool_3x3"})
    assert len({key(arch) for arch in ALL}) == 6466


def legal(arch: Arch) -> bool:
    return all(any(arch[edge(node, source)] != "none" for source in range(node)) for node in (1, 2, 3))


def test_samples_follow_rsps() -> None:
    """Node 1 is never none, node 2 has 24 draws and node 3 has 124, all equally likely and independent (the page)."""
    space, n = Topology(), 29760  # ten of each of 4 * 24 * 124 / 4 = 2,976 draws of nodes 2 and 3
    rng = random.Random(0)
    few = [space.sample(rng) for _ in range(3000)]
    many = space.decode(space.random_codes(np.random.default_rng(0), n))
    assert all(legal(arch) for arch in few + many)
    for archs, slack in ((few, 1.45), (many, 1.12)):
        for node, draws in ((1, 4), (2, 24), (3, 124)):
            found = Counter(tuple(arch[edge(node, source)] for source in range(node)) for arch in archs)
            assert len(found) == draws
            share = len(archs) / draws
            chi2 = sum((count - share) ** 2 / share for count in found.values())
            assert chi2 < draws - 1 + 4 * (2 * (draws - 1)) ** 0.5 + slack
    pairs = Counter((arch["node1.from0"], arch["node2.from1"] == "none") for arch in many)
    assert len(pairs) == 8  # P(node2.from1 = none) = 4 / 24, whatever node 1 says
    for (_, none), count in pairs.items():
        assert count / n == pytest.approx((1 if none else 5) / 24, rel=0.1)


def test_samples_of_a_restriction_and_of_ties() -> None:
    space = Topology().restrict({"node1.from0": ["none", "skip_connect"], "node2.from0": ["none"],
                                 "node2.from1": ["none", "nor_conv_1x1"]}).tie(
        "node3.from2", "node3.from0", {op: op for op in OPS})
    wanted = {space.text(arch) for arch in ALL if legal(arch) and arch["node1.from0"] == "skip_connect"
              and arch["node2.from0"] == "none" and arch["node2.from1"] == "nor_conv_1x1"
              and arch["node3.from2"] == arch["node3.from0"]}
    rng = random.Random(0)
    assert {space.text(space.sample(rng)) for _ in range(400)} == wanted and len(wanted) == 24
    assert {space.text(arch) for arch in space.decode(space.random_codes(np.random.default_rng(0), 400))} == wanted
    narrower = space.restrict({"node3.from1": ["avg_pool_3x3"]})  # what was worked out for space does not serve it
    assert {narrower.sample(rng)["node3.from1"] for _ in range(20)} == {"avg_pool_3x3"}


def test_a_node_without_input_is_refused_where_it_is_drawn() -> None:
    dead = cell("skip_connect", "none", "none", "skip_connect", "none", "none")
    space = Topology().restrict({name: [op] for name, op in dead.items()})
    assert space.size == 1 and space.largest() == space.smallest() == dead  # the tables hold it
    line = "leaves node 2 nothing but none on node2.from0, node2.from1. Allow another operation on one of them."
    with pytest.raises(ValueError, match=line):
        space.sample(random.Random(0))
    with pytest.raises(ValueError, match=line):
        space.random_codes(np.random.default_rng(0), 2)


def test_a_tie_that_leaves_a_node_nothing_is_refused_where_it_is_drawn() -> None:
    follows = {op: "none" if op != "none" else "skip_connect" for op in OPS}
    space = Topology().tie("node2.from1", "node3.from1", follows).restrict(
        {"node2.from0": ["none"], "node3.from0": ["none"], "node3.from2": ["none"]})
    line = r"has no cell in which every node receives something: the choices that follow others \(node2.from1\) are none"
    with pytest.raises(ValueError, match=line):
        space.sample(random.Random(0))
    with pytest.raises(ValueError, match=line):
        space.random_codes(np.random.default_rng(0), 3)


def test_smallest_of_a_restriction_is_a_network() -> None:
    space = Topology().restrict({name: ["none", "nor_conv_1x1", "avg_pool_3x3"] for name in NAMES})
    assert set(space.smallest().values()) == {"nor_conv_1x1"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from(OPS), min_size=1, unique=True), min_size=6, max_size=6), st.integers(0, 999))
def test_restrictions_draw_legal_cells_or_say_why_not(allowed: list[list[str]], seed: int) -> None:
    space = Topology().restrict(dict(zip(NAMES, allowed)))
    possible = all(set(sum((space[edge(node, source)].options for source in range(node)), ())) != {"none"}
                   for node in (1, 2, 3))
    if not possible:
        with pytest.raises(ValueError, match="nothing but none"):
            space.sample(random.Random(seed))
        return
    for arch in [space.sample(random.Random(seed)), *space.decode(space.random_codes(np.random.default_rng(seed), 5))]:
        space.check(arch)
        assert legal(arch) and Topology().parse(space.text(arch)) == arch


def test_derive_may_pick_none() -> None:
    odds = {name: [0.4, 0.3, 0.1, 0.1, 0.1] for name in NAMES}
    assert set(Topology().derive(odds).values()) == {"none"}  # argmax per edge, as DARTS and GDAS do here
    assert Topology().derive(odds | {"node3.from1": [0.1, 0.1, 0.4, 0.4, 0.0]})["node3.from1"] == "nor_conv_1x1"


@pytest.mark.parametrize(("args", "line"), [
    ({"C": 0}, "C = 0: give an integer, 1 or more."), ({"N": -1}, "N = -1"), ({"C": 1.5}, "C = 1.5"),
    ({"N": True}, "N = True"), ({"N": "5"}, "N = 5: give an integer"),
])
def test_refused_arguments(args: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Topology(**args)


# ---- numbering ---------------------------------------------------------------------------------------------------------

STRINGS = [cell_text(arch) for arch in ALL]


@pytest.fixture(scope="module")
def shuffled() -> list[str]:
    strings = list(STRINGS)
    random.Random(3).shuffle(strings)
    return strings


def test_numbering_is_the_order_of_the_list(shuffled: list[str]) -> None:
    numbering = Numbering(shuffled)
    for i in (0, 1, 777, 15624):
        assert numbering.arch(i) == cell_arch(shuffled[i]) and numbering.of(numbering.arch(i)) == i
    assert numbering.codes.shape == (15625, 6)
    assert Topology().decode(numbering.codes[777:778]) == [numbering.arch(777)]
    for wrong in (-1, 15625, 1.0, True):
        with pytest.raises(ValueError, match=r"index = .* is not in this space. Allowed: integers, 0 to 15624."):
            numbering.arch(wrong)  # type: ignore[arg-type]
    for arch in ({"node1.from0": "none"}, ALL[5] | {"node1.from0": "pool"}):
        with pytest.raises(ValueError, match=r"is not a cell of NAS-Bench-201: it sets node1.from0"):
            numbering.of(arch)


@pytest.mark.parametrize(("change", "line"), [
    (lambda rows: rows[:-1], "15624 cells; an index needs all 15625 of the space, one a row."),
    (lambda rows: [*rows[:9], rows[4], *rows[10:]], r"rows 4 and 9 hold the same cell, \|"),
    (lambda rows: [*rows[:9], "|x~0|", *rows[10:]], r"row 9: '\|x~0\|' is not a cell"),
])
def test_numberings_refused(shuffled: list[str], change, line: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=line):
        Numbering(change(shuffled))


def test_a_table_is_read_by_content_or_by_name(tmp_path: Path, shuffled: list[str]) -> None:
    path = tmp_path / "table.csv"
    path.write_text("acc,cell,other\n" + "".join(f"{i},{text},{other}\n" for i, (text, other) in enumerate(
        zip(shuffled, STRINGS))), encoding="utf-8")
    assert Numbering.read(path).strings == tuple(shuffled)
    assert Numbering.read(path, "other").strings == tuple(STRINGS)
    with pytest.raises(ValueError, match=r"table.csv: column = cells is not .* Allowed: acc, cell, other. Nearest: cell"):
        Numbering.read(path, "cells")
    with pytest.raises(ValueError, match=r"table.csv: row 0: '0' is not a cell"):
        Numbering.read(path, "acc")
    path.write_text("index,latency\n0,1.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"table.csv: no column holds cells written .* Columns: index, latency."):
        Numbering.read(path)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no column holds cells"):
        Numbering.read(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Numbering.read(tmp_path / "none.csv")


# ---- sizes -------------------------------------------------------------------------------------------------------------

def test_sizes_of_the_page() -> None:
    space = Sizes()
    assert [choice.name for choice in space.choices] == ["c1", "c2", "c3", "c4", "c5"]
    assert {choice.options for choice in space.choices} == {(8, 16, 24, 32, 40, 48, 56, 64)}
    assert space.size == 32768 and space.args == {} and space.name == "nats.Sizes"
    assert Topology().text(space.cell) == (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|")
    for text, index in (("8:8:8:8:8", 0), ("8:8:8:16:32", 11), ("64:64:64:64:64", 32767)):
        arch = space.parse(text)
        assert space.number(arch) == index and space.numbered(index) == arch and space.text(arch) == text
    assert space.smallest() == space.numbered(0) and space.largest() == space.numbered(32767)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 32767))
def test_sizes_are_numbered_both_ways(i: int) -> None:
    space = Sizes().restrict({"c1": [8]})
    arch = space.numbered(i)
    assert space.number(arch) == i == sum((int(arch[f"c{k}"]) // 8 - 1) * 8 ** (5 - k) for k in range(1, 6))
    assert space.parse(space.text(arch)) == arch


@pytest.mark.parametrize(("text", "line"), [
    ("8:8:8:8", "'8:8:8:8' is not five widths. They are written c1:c2:c3:c4:c5"), ("8:8:8:8:a", "is not five widths"),
    ("8:8:12:8:8", "c3 = 12 is not in this space. Allowed: 8, 16, .* Nearest: 8"), ("8:8:8:8:-8", "is not five widths"),
])
def test_sizes_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Sizes().parse(text)


def test_indices_of_sizes_refused() -> None:
    with pytest.raises(ValueError, match=r"index = 32768 is not in this space. Allowed: integers, 0 to 32767."):
        Sizes().numbered(32768)
    with pytest.raises(ValueError, match="c2 = 9 is not in this space"):
        Sizes().number(Sizes().smallest() | {"c2": 9})
