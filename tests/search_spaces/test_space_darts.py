"""The cells of DARTS against sections 2 and 5 of their page."""
from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.darts import AMOEBANET, DARTS_V1, DARTS_V2, NASNET, OPS, Cells, Genotype, edge, parts
from search_spaces.space import Arch

V2 = ("normal:|sep_conv_3x3~0|sep_conv_3x3~1|+|sep_conv_3x3~0|sep_conv_3x3~1|+|skip_connect~0|sep_conv_3x3~1|"
      "+|skip_connect~0|dil_conv_3x3~2| reduce:|max_pool_3x3~0|max_pool_3x3~1|+|max_pool_3x3~1|skip_connect~2|"
      "+|max_pool_3x3~0|skip_connect~2|+|max_pool_3x3~1|skip_connect~2|")
NODES = [(kind, node) for kind in ("normal", "reduce") for node in (2, 3, 4, 5)]


def rows(space: Cells, **set_: list[float]) -> dict[str, list[float]]:
    """Probabilities: none takes nearly all; ``set_``: those of the named edges of normal cells, "2_1" for node 2."""
    odds = {choice.name: [0.93] + [0.01] * (len(space.ops) - 1) for choice in space.root.choices}
    return odds | {f"normal.node{key[1]}.from{key[3]}": row for key, row in set_.items()}


def kept(arch: Arch, node: int, kind: str = "normal") -> list[tuple[int, object]]:
    return [(source, arch[edge(kind, node, source)]) for source in range(node)
            if arch[edge(kind, node, source)] != "none"]


# ---- the space -----------------------------------------------------------------------------------------------------------

def test_choices_of_the_page() -> None:
    space = Cells()
    assert len(space.choices) == 28 and {choice.options for choice in space.choices} == {OPS}
    assert [choice.name for choice in space.choices][:6] == [
        "normal.node2.from0", "normal.node2.from1", "normal.node3.from0", "normal.node3.from1", "normal.node3.from2",
        "normal.node4.from0"]
    assert space.choices[13].name == "normal.node5.from4" and space.choices[14].name == "reduce.node2.from0"
    assert OPS == ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
                   "dil_conv_3x3", "dil_conv_5x5")
    assert not any(choice.ordered for choice in space.choices)
    assert space.args == {"C": 16, "layers": 8, "stem": "cifar", "nodes": 4} and space.name == "darts.Cells"
    assert (space.C, space.layers, space.stem, space.nodes) == (16, 8, "cifar", 4)
    assert space.normal_concat == space.reduce_concat == (2, 3, 4, 5)
    assert set(space.largest().values()) == {"sep_conv_5x5"} and set(space.smallest().values()) == {"skip_connect"}
    assert [space.part(name) for name in ("normal.node5.from4", "reduce.node2.from0")] == ["normal", "reduce"]
    with pytest.raises(ValueError, match=r"mean.node2.from0 is not a choice"):
        space.part("mean.node2.from0")


def test_sizes_in_closed_form() -> None:
    assert Cells().size == 8**28
    assert Cells().genotypes == (1 * 3 * 6 * 10 * 7**8) ** 2  # about 10^18, as in the paper
    small = Cells(4, 1, nodes=1, ops=("none", "skip_connect", "sep_conv_3x3"))
    assert small.size == 3**4 and small.genotypes == 2**4
    assert small.restrict({"normal.node2.from0": ["none"]}).genotypes == 2**4  # the root's


@pytest.mark.parametrize("ops", [("none", "skip_connect", "sep_conv_3x3"),
                                 ("none", "skip_connect", "sep_conv_3x3", "sep_conv_3x3+skip_connect")])
def test_genotypes_by_enumeration(ops: Sequence[str]) -> None:
    space = Cells(4, 1, nodes=1, ops=ops)
    found = set()
    for values in itertools.product(ops, repeat=4):
        arch = dict(zip((choice.name for choice in space.choices), values))
        if all(sum(len(parts(op)) for op in half) == 2 for half in (values[:2], values[2:])):
            found.add(space.genotype(arch))
        else:
            with pytest.raises(ValueError, match=r"has [0-4] operations; a genotype has two a node"):
                space.genotype(arch)
    assert len(found) == space.genotypes


@pytest.mark.parametrize(("args", "line"), [
    ({"C": 0}, "C = 0: give an integer, 1 or more."), ({"layers": True}, "layers = True"), ({"nodes": 0}, "nodes = 0"),
    ({"stem": "svhn"}, "stem = svhn is not in this space. Allowed: cifar, imagenet."),
    ({"ops": ("none", "sep_conv_3x4")}, "ops = sep_conv_3x4 is not .* Nearest: sep_conv_3x3"),
    ({"ops": ("none", "skip_connect", "none")}, "ops lists none twice: none, skip_connect, none."),
    ({"ops": ("none", "skip_connect+sep_conv_3x3", "sep_conv_3x3+skip_connect")}, "ops lists sep_conv_3x3.skip_.* twice"),
    ({"ops": ("none",)}, "ops = none: give none and at least one other operation."),
    ({"ops": ("skip_connect", "sep_conv_3x3")}, "give none and at least one other"),
    ({"ops": ("none", "none+skip_connect")}, r"ops holds none\+skip_connect. Allowed: one operation, or a sum of two"),
    ({"normal_concat": [2, 6]}, r"normal_concat = \[2, 6\]: give some of the nodes, each once: 2, 3, 4, 5."),
    ({"reduce_concat": []}, r"reduce_concat = \[\]"), ({"reduce_concat": [3, 3]}, r"reduce_concat = \[3, 3\]"),
])
def test_refused_arguments(args: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Cells(**args)


def test_args_say_what_is_unusual() -> None:
    space = Cells(4, 3, nodes=3, ops=["none", "conv_7x1_1x7", "sep_conv_7x7"], normal_concat=[2, 3, 4],
                  reduce_concat=[3, 4])
    assert space.args == {"C": 4, "layers": 3, "stem": "cifar", "nodes": 3, "reduce_concat": [3, 4],
                          "ops": ["none", "conv_7x1_1x7", "sep_conv_7x7"]}
    again = Cells(**json.loads(json.dumps(space.args)))
    assert again.hash == space.hash and again.reduce_concat == (3, 4) and again.normal_concat == (2, 3, 4)
    assert set(space.smallest().values()) == {"conv_7x1_1x7"} and set(space.largest().values()) == {"sep_conv_7x7"}


# ---- derive: section 5 of the page ---------------------------------------------------------------------------------------

def test_derive_by_hand() -> None:
    space = Cells(4, 3, ops=("none", "skip_connect", "sep_conv_3x3"))
    odds = rows(space)
    odds["normal.node3.from0"] = [0.90, 0.04, 0.06]  # second: none is strongest by far and does not count
    odds["normal.node3.from1"] = [0.00, 0.95, 0.05]
    odds["normal.node3.from2"] = [0.40, 0.55, 0.05]
    arch = space.derive(odds)
    assert kept(arch, 3) == [(1, "skip_connect"), (2, "skip_connect")]
    odds["normal.node3.from2"] = [0.95, 0.03, 0.02]
    assert kept(space.derive(odds), 3) == [(0, "sep_conv_3x3"), (1, "skip_connect")]
    space.genotype(space.derive(odds))


def test_ties_take_the_first_edge_and_the_first_operation() -> None:
    space = Cells()
    arch = space.derive({choice.name: [1 / 8] * 8 for choice in space.choices})
    assert all(kept(arch, node, kind) == [(0, "max_pool_3x3"), (1, "max_pool_3x3")] for kind, node in NODES)
    arch = space.derive(rows(space, n4_3=[0.1, 0, 0, 0.2, 0.2, 0, 0, 0.5], n4_1=[0.1, 0, 0, 0.2, 0.2, 0, 0, 0.2]))
    assert kept(arch, 4) == [(1, "skip_connect"), (3, "dil_conv_5x5")]
    arch = space.derive(rows(space, n5_4=[0.2, 0, 0, 0.4, 0.4, 0, 0, 0], n5_3=[0.6, 0, 0, 0, 0.4, 0, 0, 0],
                             n5_1=[0.6, 0, 0, 0, 0, 0.4, 0, 0]))
    assert kept(arch, 5) == [(1, "sep_conv_5x5"), (3, "sep_conv_3x3")]


def test_derive_respects_a_restriction() -> None:
    space = Cells(4, 3, ops=("none", "skip_connect", "sep_conv_3x3"))
    no_skip = space.restrict({"normal.node3.from2": ["none", "sep_conv_3x3"]})
    odds = rows(space, n3_2=[0.0, 0.995, 0.005])
    assert kept(space.derive(odds), 3) == [(0, "skip_connect"), (2, "skip_connect")]
    assert kept(no_skip.derive(odds), 3) == [(0, "skip_connect"), (1, "skip_connect")]
    forced = space.restrict({"normal.node3.from2": ["skip_connect", "sep_conv_3x3"]})
    weak = rows(space, n3_2=[0.998, 0.0, 0.002])
    assert kept(forced.derive(weak), 3) == [(0, "skip_connect"), (2, "sep_conv_3x3")]
    gone = space.restrict({f"normal.node3.from{j}": ["none"] for j in (0, 2)})
    assert kept(gone.derive(weak), 3) == [(1, "skip_connect")]  # too few are left: what can be kept
    every = space.restrict({f"normal.node4.from{j}": ["sep_conv_3x3"] for j in (0, 1, 2)})
    assert kept(every.derive(weak), 4) == [(j, "sep_conv_3x3") for j in (0, 1, 2)]
    for name in ("normal.node4.from0", "normal.node4.from2"):
        del weak[name]  # decided
    assert kept(every.derive(weak), 4) == [(j, "sep_conv_3x3") for j in (0, 1, 2)]


def test_derive_refuses_what_every_space_refuses() -> None:
    space = Cells()
    odds = rows(space)
    with pytest.raises(ValueError, match=r"normal.node2.from0 needs 8 probabilities"):
        space.derive({name: row for name, row in odds.items() if name != "normal.node2.from0"})
    with pytest.raises(ValueError, match="hold nan"):
        space.derive(odds | {"reduce.node2.from0": [float("nan")] * 8})
    with pytest.raises(ValueError, match=r"reduce.node9.from0 is not a choice"):
        space.derive(odds | {"reduce.node9.from0": [0.1] * 8})


def test_one_cell_for_both_kinds_by_ties() -> None:
    space = Cells()
    for choice in space.choices[14:]:
        space = space.tie(choice.name, choice.name.replace("reduce", "normal"), {op: op for op in OPS})
    rng = random.Random(0)
    odds = {choice.name: [rng.random() for _ in OPS] for choice in space.choices[:14]}
    for arch in (space.derive(odds), space.sample(rng),
                 *space.decode(space.random_codes(np.random.default_rng(0), 5))):
        space.check(arch)
        genotype = space.genotype(arch)
        assert genotype.normal == genotype.reduce


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_derive_keeps_the_strongest_that_the_restriction_allows(data: st.DataObject) -> None:
    root = Cells(4, 1, nodes=2, ops=("none", "skip_connect", "sep_conv_3x3", "avg_pool_3x3"))
    allowed = st.lists(st.sampled_from(root.ops), min_size=1, unique=True)
    space = root.restrict({choice.name: data.draw(allowed) for choice in root.choices})
    odds = {c.name: data.draw(st.lists(st.floats(0, 1), min_size=4, max_size=4)) for c in root.choices}
    arch = space.derive(odds)
    space.check(arch)
    for kind, node in itertools.product(("normal", "reduce"), (2, 3)):
        best = {}
        for source in range(node):
            name = edge(kind, node, source)
            left = {op: p for op, p in zip(root.ops, odds[name]) if op in space[name].options and op != "none"}
            if left:
                best[source] = (-("none" not in space[name].options), -max(left.values()), source)
                if arch[name] != "none":
                    assert left[str(arch[name])] == max(left.values())
        forced = sum(rank[0] for rank in best.values())
        chosen = sorted(best, key=lambda source: best[source])[:max(2, -forced)]
        assert {source for source, _ in kept(arch, node, kind)} == set(chosen)


# ---- drawing ---------------------------------------------------------------------------------------------------------------

def drawn(space: Cells, n: int) -> list[list[Arch]]:
    rng = random.Random(0)
    return [[space.sample(rng) for _ in range(n)], space.decode(space.random_codes(np.random.default_rng(0), n))]


def test_samples_are_uniform_genotypes() -> None:
    space = Cells(4, 1)
    for archs in drawn(space, 2520):
        pairs = Counter(tuple(source for source, _ in kept(arch, 4)) for arch in archs)
        assert set(pairs) == set(itertools.combinations(range(4), 2)) and len(pairs) == 6
        assert sum((count - 420) ** 2 / 420 for count in pairs.values()) < 22  # chi-square, 5: p < .001
        ops = Counter(op for arch in archs for _, op in kept(arch, 5, "reduce"))
        assert set(ops) == set(OPS) - {"none"}
        assert sum((count - 720) ** 2 / 720 for count in ops.values()) < 24  # chi-square, 6
        for arch in archs[:300]:
            assert space.arch_of(space.genotype(arch)) == arch


def test_samples_of_a_restriction() -> None:
    space = Cells(4, 1, ops=("none", "skip_connect", "sep_conv_3x3")).restrict({
        "normal.node2.from0": ["none"], "normal.node3.from1": ["sep_conv_3x3"],
        "normal.node4.from2": ["none", "skip_connect"],
        **{f"normal.node5.from{j}": ["skip_connect", "sep_conv_3x3"] for j in (0, 1, 4)}})
    for archs in drawn(space, 1200):
        assert all(space.check(arch) is None for arch in archs)  # type: ignore[func-returns-value]
        assert {tuple(kept(arch, 2)) for arch in archs} == {((1, "skip_connect"),), ((1, "sep_conv_3x3"),)}
        others = Counter(source for arch in archs for source, op in kept(arch, 3) if source != 1)
        assert all((1, "sep_conv_3x3") in kept(arch, 3) and len(kept(arch, 3)) == 2 for arch in archs)
        assert others[0] + others[2] == 1200 and abs(others[0] - 600) < 70  # four standard deviations
        assert {op for arch in archs for source, op in kept(arch, 4) if source == 2} == {"skip_connect"}
        assert {tuple(source for source, _ in kept(arch, 5)) for arch in archs} == {(0, 1, 4)}


def test_a_node_may_be_left_without_input() -> None:
    space = Cells(4, 1, nodes=1).restrict({f"normal.node2.from{j}": ["none"] for j in (0, 1)})
    for archs in drawn(space, 3):
        assert all(kept(arch, 2) == [] and len(kept(arch, 2, "reduce")) == 2 for arch in archs)


# ---- genotypes and text ----------------------------------------------------------------------------------------------------

def unordered(genotype: Genotype) -> list[object]:
    """What counts of a genotype: the order inside a node does not."""
    return [[sorted(pairs[i:i + 2]) for i in range(0, len(pairs), 2)] for pairs in (genotype.normal, genotype.reduce)] + [
        tuple(genotype.normal_concat), tuple(genotype.reduce_concat)]


@pytest.mark.parametrize("genotype", [DARTS_V1, DARTS_V2, NASNET, AMOEBANET])
def test_published_genotypes_read_back(genotype: Genotype) -> None:
    space = Cells.of(genotype, 4, 5)
    arch = space.arch_of(genotype)
    space.check(arch)
    assert unordered(space.genotype(arch)) == unordered(genotype)
    assert space.parse(space.text(arch)) == arch and space.arch_of(space.genotype(arch)) == arch
    assert space.derive({name: [float(op == value) for op in space.ops] for name, value in arch.items()}) == arch \
        or genotype in (NASNET, AMOEBANET)  # there, nodes may read one state twice: derive keeps two states


def test_the_tables_of_the_page() -> None:
    def short(pairs: Sequence[tuple[str, int]]) -> str:
        names = {"sep_conv_3x3": "sep3", "skip_connect": "skip", "max_pool_3x3": "max3", "avg_pool_3x3": "avg3",
                 "dil_conv_3x3": "dil3"}
        words = [f"({names[op]},{source})" for op, source in pairs]
        return " | ".join("".join(words[i:i + 2]) for i in range(0, 8, 2))

    assert short(DARTS_V1.normal) == "(sep3,1)(sep3,0) | (skip,0)(sep3,1) | (skip,0)(sep3,1) | (sep3,0)(skip,2)"
    assert short(DARTS_V1.reduce) == "(max3,0)(max3,1) | (skip,2)(max3,0) | (max3,0)(skip,2) | (skip,2)(avg3,0)"
    assert short(DARTS_V2.normal) == "(sep3,0)(sep3,1) | (sep3,0)(sep3,1) | (sep3,1)(skip,0) | (skip,0)(dil3,2)"
    assert short(DARTS_V2.reduce) == "(max3,0)(max3,1) | (skip,2)(max3,1) | (max3,0)(skip,2) | (skip,2)(max3,1)"
    for genotype in (DARTS_V1, DARTS_V2):
        assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)


def test_cells_of_five_nodes_with_part_of_them_as_output() -> None:
    space = Cells.of(NASNET)
    assert (space.nodes, space.C, space.layers, len(space.choices)) == (5, 36, 20, 40)
    assert space.normal_concat == (2, 3, 4, 5, 6) and space.reduce_concat == (4, 5, 6)
    assert space.ops == (*OPS, "sep_conv_5x5+sep_conv_3x3", "avg_pool_3x3+avg_pool_3x3", "sep_conv_3x3+skip_connect",
                         "sep_conv_7x7")
    arch = space.arch_of(NASNET)
    assert kept(arch, 3) == [(0, "sep_conv_5x5+sep_conv_3x3")] and kept(arch, 5) == [(0, "avg_pool_3x3+avg_pool_3x3")]
    assert "+|sep_conv_5x5~0|sep_conv_3x3~0|+" in space.text(arch)
    assert parts("sep_conv_5x5+sep_conv_3x3") == ("sep_conv_5x5", "sep_conv_3x3") and parts("none") == ()
    assert Cells.of(DARTS_V2, 16, 8).hash == Cells().hash


def test_text_of_any_architecture() -> None:
    space = Cells()
    assert space.text(space.arch_of(DARTS_V2)) == V2 and space.parse(V2) == space.arch_of(DARTS_V2)
    assert space.parse(V2.replace("|sep_conv_3x3~0|sep_conv_3x3~1|", "|sep_conv_3x3~1|none~2|sep_conv_3x3~0|", 2).replace(
        "|none~2", "", 1)) == space.arch_of(DARTS_V2)
    small = Cells(4, 1, nodes=2, ops=("none", "skip_connect", "sep_conv_3x3"))
    nothing = dict.fromkeys(small.largest(), "none")
    assert small.text(nothing) == "normal:|+| reduce:|+|" and small.parse(small.text(nothing)) == nothing
    assert small.text(small.smallest()) == ("normal:|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|"
                                            "skip_connect~2| reduce:|skip_connect~0|skip_connect~1|+|skip_connect~0|"
                                            "skip_connect~1|skip_connect~2|")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_every_architecture_has_a_text(seed: int) -> None:
    space = Cells(4, 1, nodes=3, ops=(*OPS, "skip_connect+sep_conv_3x3"))
    codes = np.random.default_rng(seed).integers(0, 9, size=(3, len(space.choices)))
    for arch in space.decode(codes):
        assert space.parse(space.text(arch)) == arch


@pytest.mark.parametrize(("text", "line"), [
    ("normal:|sep_conv_3x3~0|", "is not a pair of cells. They are written normal:"),
    (V2.replace("~0", "", 1), "is not a pair of cells"),
    (V2.replace("normal", "__import__('os')"), "is not a pair of cells"),
    (V2.replace("|+|", "| |", 1), "is not a pair of cells"),
    (V2.replace("+|skip_connect~0|dil_conv_3x3~2|", ""), "normal has 3 nodes, this space has 4."),
    (V2.replace("dil_conv_3x3~2", "dil_conv_3x3~5"), "normal.node5 cannot read state 5. Allowed: 0 to 4."),
    (V2.replace("dil_conv_3x3~2", "dil_conv_3x4~2"), "normal.node5.from2 = dil_conv_3x4 is not .* Nearest: dil_conv_3x3"),
    (V2.replace("dil_conv_3x3~2", "dil_conv_3x3~0"), r"normal.node5.from0 = .*skip_connect.* is not in this space"),
])
def test_text_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        Cells().parse(text)
    assert "\n" not in str(error.value)


def test_genotypes_refused() -> None:
    space = Cells()
    with pytest.raises(ValueError, match=r"normal_concat = \[2, 3\], here it is \[2, 3, 4, 5\]. Use Cells.of"):
        space.arch_of(DARTS_V1._replace(normal_concat=[2, 3]))
    with pytest.raises(ValueError, match=r"A genotype has two entries a node; here are 7 in a cell."):
        space.arch_of(DARTS_V1._replace(normal=DARTS_V1.normal[:7]))
    with pytest.raises(ValueError, match=r"reduce has 3 nodes, this space has 4."):
        space.arch_of(DARTS_V1._replace(reduce=DARTS_V1.reduce[:6]))
    with pytest.raises(ValueError, match=re.escape("normal.node2 has 1 operations; a genotype has two a node.")):
        space.genotype(space.arch_of(DARTS_V1) | {"normal.node2.from0": "none"})
    with pytest.raises(ValueError, match=r"normal.node2.from0 = pool is not in this space"):
        space.genotype(space.arch_of(DARTS_V1) | {"normal.node2.from0": "pool"})
    lists = Genotype(list(DARTS_V1.normal), range(2, 6), list(DARTS_V1.reduce), [2, 3, 4, 5])  # as published code has it
    assert space.arch_of(lists) == space.arch_of(DARTS_V1)
