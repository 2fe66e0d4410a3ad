"""Parts of a space hold exactly what the space holds: by enumeration where it is small, by sampling elsewhere."""
from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_space_properties import enumerated, legal, spaces

from nas.searchers.genes import Genes
from nas.splits.regions import barren, divide, holder, splittable
from search_spaces.bignas import AttentiveNAS, BigNAS
from search_spaces.darts import Cells
from search_spaces.macro import ConvMacro
from search_spaces.mobilenet import OFAMobileNetV3, OFAProxyless, compound
from search_spaces.nasnet import NASNet
from search_spaces.nats import NAMES, OPS, Sizes, Topology
from search_spaces.patterns import restricted, tied
from search_spaces.preresnet import PreResNet
from search_spaces.proxyless import ProxylessNAS
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.resnet50d import OFAResNet50D
from search_spaces.space import Arch, Choice, SearchSpace, Value
from search_spaces.vit import AutoFormer, ViT

Groups = Sequence[Sequence[Value]]
SHORT = ("none", "skip_connect", "sep_conv_3x3")
MOBILE = OFAMobileNetV3(0.35, True, (3, 5, 7), (2, 3), (1, 2, 4), (16, 17))
RESNET = CifarResNet(20, "tied")
FAMILIES: dict[str, SearchSpace] = {
    "resnet14": CifarResNet(14), "autoformer": AutoFormer("tiny"), "resnet164": CifarResNet(164),
    "resnet32-tas": CifarResNet(32, "tas"), "imagenet18": ImageNetResNet(18), "preresnet": PreResNet(11, (2, 3, 4)),
    "resnet50d": OFAResNet50D(0.125, (1, 1, 2, 1), (32, 48)), "nb201": Topology(4, 1), "widths": Sizes(), "darts": Cells(4, 3),
    "short": Cells(4, 3, nodes=2, ops=SHORT), "nasnet": NASNet(2, 8, blocks=2), "macro": ConvMacro(),
    "proxyless": ProxylessNAS(0.3, True), "vit": ViT([6, 8, 12], [1, 2, 3], [1, 2, 3], [1, 1.5, 2], 4, 2, 8), "ofa": MOBILE,
    "ofa-proxyless": OFAProxyless(0.3, True), "bignas": BigNAS(True, 0.3), "attentive": AttentiveNAS(True, 0.25, [(1, 2)] * 7),
    # recipes that take canonical options away, or all but one of what is needed
    "ofa-large": restricted(MOBILE, {"*.kernel": [5, 7], "stage1.depth": 2, "stage4.*": "largest"}),
    "resnet-deep": restricted(CifarResNet(20, "tas"), {"*.conv0.width": 3, "stage2.depth": [2, 3], "stage1.depth": [1]}),
    "nb201-less": restricted(Topology(4, 1), {"node1.from0": ["nor_conv_3x3", "none"], "node3.*": ["none", "skip_connect"]}),
    "nasnet-lists": restricted(NASNet(2, 8, blocks=2), {"normal.concat": ["3", "23", "123"]}),
    "darts-always": restricted(Cells(4, 3), {"normal.node2.*": ["sep_conv_3x3", "sep_conv_5x5", "skip_connect"]}),
    # ties: leaders that are split, followers that are needed
    "ofa-compound": compound(OFAMobileNetV3(), elastic_kernel=True),
    "resnet-depths": RESNET.tie("stage1.depth", "stage0.depth", {1: 3, 2: 1, 3: 2}),
    "nb201-tied": tied(Topology(4, 1), {"node3.from*": {"leader": "node2.from0", "values": dict(zip(OPS, OPS[1:] + OPS[:1]))}}),
    "darts-tied": tied(Cells(4, 3, nodes=1, ops=SHORT), {"reduce.*": {"leader": "normal.*", "values": {o: o for o in SHORT}}}),
    "nasnet-tied": NASNet(2, 8, blocks=1).tie("reduce.concat", "normal.concat", {o: o for o in ("2", "02", "12", "012")}),
}  # fmt: skip


class Split(NamedTuple):
    space: SearchSpace
    choice: str
    groups: Groups


class Tree(NamedTuple):
    """``splits[i]``: how the node of number i was split, and the numbers of its children; leaves have none."""

    nodes: list[SearchSpace]
    splits: dict[int, tuple[Split, list[int]]]

    @property
    def leaves(self) -> list[int]:
        return [i for i in range(len(self.nodes)) if i not in self.splits]

    def owner(self, arch: Arch) -> int:
        """The leaf of ``arch``, worked out from the rule itself: by its option, inert ones by the canonical option."""
        at = 0
        while at in self.splits:
            (space, choice, groups), children = self.splits[at]
            value = arch[choice] if choice in space.counting(arch) else space.root[choice].options[0]
            if value not in space[choice].options:
                value = space[choice].options[0]
            at = next(child for child, group in zip(children, groups) if value in group)
        return at


def grown(space: SearchSpace, rng: random.Random, levels: int) -> Tree:
    """Each node of each level split at random: choice, number of groups and groups (none of barren options alone)."""
    nodes, splits, level = [space], dict[int, tuple[Split, list[int]]](), [0]
    for _ in range(levels):
        below: list[int] = []
        for i in level:
            free = rng.sample(nodes[i].free, len(nodes[i].free))
            choice = next((name for name in free if splittable(nodes[i], [name])), None)
            if choice and (i == 0 or rng.random() < 0.8):
                groups = grouped(nodes[i], choice, rng)
                children = list(range(len(nodes), len(nodes) + len(groups)))
                nodes += divide(nodes[i], choice, groups)
                splits[i] = Split(nodes[i], choice, groups), children
                below += children
        level = below
    return Tree(nodes, splits)


def grouped(space: SearchSpace, choice: str, rng: random.Random) -> Groups:
    alone = barren(space, choice)
    some = [option for option in space[choice].options if option not in alone]
    rng.shuffle(some)
    n = rng.randint(2, min(3, len(some)))
    groups = [[option] for option in some[:n]]
    for option in [*some[n:], *alone]:
        rng.choice(groups).append(option)
    return groups


def samples(space: SearchSpace, n: int, seed: int) -> list[Arch]:
    return [space.sample(random.Random(seed)), space.largest(), space.smallest(),
            *space.decode(space.random_codes(np.random.default_rng(seed), n))]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_leaves_of_every_family_partition_it(name: str, seed: int) -> None:
    space = FAMILIES[name]
    tree = grown(space, random.Random(f"{name}{seed}"), seed + 1)
    leaves = [tree.nodes[i] for i in tree.leaves]
    assert len(leaves) > 1 and sum(leaf.size for leaf in leaves) == space.size and all(leaf.size > 0 for leaf in leaves)
    for arch in samples(space, 20, seed):
        assert tree.leaves[holder(leaves, arch)] == tree.owner(arch)
    for i, leaf in zip(tree.leaves, leaves):
        inside = samples(leaf, 4, seed)
        for arch in inside:  # the extremes too
            leaf.check(arch)
            space.check(arch)
            assert space.canonical(arch) == arch and tree.owner(arch) == i
        codes = space.encode([inside[0], *inside[3:]])
        assert leaf.lawful(codes).all() and space.lawful(codes).all()


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32))
def test_leaves_of_small_spaces_partition_them_by_enumeration(space: SearchSpace, seed: int) -> None:
    whole = enumerated(space)
    tree = grown(space, random.Random(seed), 3)
    leaves = [tree.nodes[i] for i in tree.leaves]
    parts = [enumerated(leaf) for leaf in leaves]
    assert [leaf.size for leaf in leaves] == [len(part) for part in parts] and all(parts)
    assert sum(map(len, parts)) == len(whole) and set().union(*parts) == set(whole)  # disjoint, and all of it
    for i, part in zip(tree.leaves, parts):
        assert all(tree.owner(arch) == i for arch in part.values())


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**32))
def test_a_choice_is_splittable_where_it_counts_with_two_options(space: SearchSpace, seed: int) -> None:
    archs = [arch for arch in enumerated(space).values() if space.lawful(space.encode([arch]))[0]]
    for choice in space.choices:
        met = {arch[choice.name] for arch in archs if choice.name in space.counting(arch)}
        splits = choice.name in space.free and (len(met) > 1 if space.nones else bool(met))
        assert (choice.name in splittable(space)) == splits
        if splits:
            assert barren(space, choice.name) == tuple(o for o in choice.options if o not in met)
    raw = space.root.decode(np.random.default_rng(seed).integers(  # not canonical: inert settings are anything
        0, [[len(choice.options) for choice in space.root.choices]], size=(20, len(space.choices))))
    if names := splittable(space):
        parts = divide(space, names[0], [[option] for option in space[names[0]].options if not barren(space, names[0])]
                       or grouped(space, names[0], random.Random(seed)))
        for arch in raw:
            if legal(space, arch):
                assert holder(parts, arch) == holder(parts, space.canonical(arch))
            else:
                with pytest.raises(ValueError):
                    holder(parts, arch)


# ---- rules of families -----------------------------------------------------------------------------------------------


def members(space: SearchSpace, codes: np.ndarray) -> np.ndarray:
    """(N, M) -> (N,) bool: without needs and ties, a space holds what has a remaining option everywhere."""
    return np.all([np.isin(column, [root.options.index(option) for option in choice.options])
                   for choice, root, column in zip(space.choices, space.root.choices, codes.T)], axis=0)  # fmt: skip


def every(space: SearchSpace) -> np.ndarray:
    sizes = [len(choice.options) for choice in space.choices]
    return np.indices(sizes, dtype=np.int16).reshape(len(sizes), -1).T


ONE = Cells(4, 1, nodes=1, ops=SHORT)
TWO = restricted(Cells(4, 1, nodes=3, ops=("none", "skip_connect")), {"reduce.*": ["none"]})


@pytest.mark.parametrize("space", [
    Topology(4, 1), restricted(Topology(4, 1), {"node2.*": ["none", "nor_conv_3x3"]}), ONE, TWO,
    restricted(TWO, {"normal.node4.from1": ["skip_connect"], "normal.node3.from2": ["none"]}),
], ids=str)  # fmt: skip
def test_what_leaves_draw_is_what_the_space_draws(space: SearchSpace) -> None:
    codes = every(space.root)
    codes = codes[members(space, codes)]
    lawful = space.lawful(codes)
    for choice in space.free:
        seen = codes[lawful, space._at[choice]]
        without = [o for k, o in enumerate(space.root[choice].options) if o in space[choice].options and k not in seen]
        assert (choice in splittable(space)) == (len(space[choice].options) - len(without) > 1)
        if choice in splittable(space):
            assert barren(space, choice) == tuple(without)
    for seed in range(4):
        tree = grown(space, random.Random(seed), 3)
        held = np.array([members(tree.nodes[i], codes) for i in tree.leaves])
        assert (held.sum(axis=0) == 1).all()
        for i, inside in zip(tree.leaves, held):
            assert (tree.nodes[i].lawful(codes[inside]) == lawful[inside]).all() and lawful[inside].any()
            drawn = tree.nodes[i].random_codes(np.random.default_rng(seed), 400)
            some = {tuple(row) for row in codes[inside & lawful].tolist()}
            found = {tuple(row) for row in drawn.tolist()}
            assert found <= some and (len(some) > 40 or found == some)


def test_nb201_has_five_parts_of_3125_cells() -> None:
    space = Topology()
    for name in NAMES[1:]:
        parts = divide(space, name, [[op] for op in OPS])
        assert [part.size for part in parts] == [3125] * 5 and sum(part.size for part in parts) == 15625
    two = divide(space, "node3.from1", [["none", "nor_conv_1x1"], ["skip_connect", "nor_conv_3x3", "avg_pool_3x3"]])
    four = [leaf for part in two for leaf in divide(part, "node1.from0", [list(OPS[:2]), list(OPS[2:])])]
    assert [part.size for part in two] == [6250, 9375] and [leaf.size for leaf in four] == [2500, 3750, 3750, 5625]
    cell = space.parse("|skip_connect~0|+|none~0|none~1|+|none~0|avg_pool_3x3~1|none~2|")  # node 2 gets nothing: never drawn,
    assert [holder(two, cell), holder(four, cell)] == [1, 2]  # but the tables have it, and one leaf


def test_a_part_without_a_cell_to_draw_is_refused() -> None:
    space = Topology()
    line = ("The group none of node1.from0 would hold no architecture that nats.Topology(C=16, N=5) may draw. Put it together "
            "with another group, or restrict node1.from0 to its other options.")  # fmt: skip
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        divide(space, "node1.from0", [[op] for op in OPS])
    assert barren(space, "node1.from0") == ("none",) and barren(space, "node2.from0") == ()
    assert "node1.from0" in splittable(space)
    assert "node1.from0" not in splittable(space.restrict({"node1.from0": ["none", "skip_connect"]}))
    half = space.restrict({"node2.from1": ["none"]})
    with pytest.raises(ValueError, match=r"The group none of node2.from0 would hold no architecture"):
        divide(half, "node2.from0", [["none"], OPS[1:]])


def test_darts_nodes_keep_two_inputs() -> None:
    space = Cells()
    names = [f"normal.node3.from{i}" for i in range(3)]
    halves: Groups = [["none", *space.ops[1:4]], [*space.ops[4:]]]
    once = divide(space, names[0], halves)[1]  # keeps the edge always
    twice = divide(once, names[1], halves)[1]
    assert names[1] in splittable(once) and names[2] in splittable(once)
    assert names[2] not in splittable(twice)  # a third input would be in no architecture that the space draws
    with pytest.raises(ValueError, match=r"normal.node3.from2 cannot be split: fewer than two of none, max_pool_3x3, .* restr"):
        divide(twice, names[2], halves)
    space.genotype(twice.sample(random.Random(0)))  # two inputs everywhere
    with pytest.raises(ValueError, match=r"The group none of normal.node2.from1 would hold no architecture"):
        divide(space, "normal.node2.from1", [["none"], space.ops[1:]])  # node 2 has two edges and keeps both


def test_outputs_of_nasnet_are_split_where_no_rule_sets_them() -> None:
    space = NASNet(2, 8, blocks=2)
    assert space.ruled == ("normal.concat", "reduce.concat") and not {*space.ruled} & {*splittable(space)}
    with pytest.raises(ValueError, match=r"concat cannot be split: nasnet.NASNet sets it by a rule .* Restrict it first"):
        divide(space, "normal.concat", [["3"], space["normal.concat"].options[1:]])
    named = space.restrict({"normal.concat": ["3", "23"]})
    assert named.ruled == ("reduce.concat",) and named.size == 2 * space.size
    assert [part.size for part in divide(named, "normal.concat", [["23"], ["3"]])] == [space.size] * 2


# ---- the rule for inert choices, by hand -----------------------------------------------------------------------------


def hand() -> SearchSpace:
    """b counts at depth 3 where a is 8; a counts from depth 2."""
    return SearchSpace([
        Choice("b", (10, 20, 30), needs=(("depth", (3,)), ("a", (8,)))), Choice("depth", (1, 2, 3)),
        Choice("a", (4, 8), needs=(("depth", (2, 3)),)),
    ], {})  # fmt: skip


def left(space: SearchSpace) -> dict[str, tuple[Value, ...]]:
    return {choice.name: choice.options for choice in space.choices}


def test_inert_architectures_stay_with_the_canonical_option() -> None:
    high, low = divide(hand(), "b", [[30, 20], [10]])
    assert left(high) == {"b": (20, 30), "depth": (3,), "a": (8,)} and high.size == 2  # what b needs, and no more
    assert left(low) == {"b": (10,), "depth": (1, 2, 3), "a": (4, 8)} and low.size == 1 + 2 + (1 + 1)
    for inert in ({"b": 30, "depth": 1, "a": 8}, {"b": 20, "depth": 3, "a": 4}, {"b": 99, "depth": 2, "a": 8}):
        assert holder([high, low], inert) == 1  # whatever b says
    assert [holder([high, low], {"b": b, "depth": 3, "a": 8}) for b in (10, 20, 30)] == [1, 0, 0]


def test_where_the_canonical_option_is_gone_the_first_that_is_left_stands_for_it() -> None:
    space = hand().restrict({"b": [20, 30], "depth": [2, 3]})
    last, first = divide(space, "b", [[30], [20]])
    assert left(last) == {"b": (30,), "depth": (3,), "a": (8,)}
    assert left(first) == {"b": (20,), "depth": (2, 3), "a": (4, 8)}
    inert = space.canonical({"b": 30, "depth": 2, "a": 4})
    assert inert["b"] == 10 and holder([last, first], inert) == 1


def test_a_choice_is_split_again_below() -> None:
    keeps, rest = divide(hand(), "b", [[10, 20], [30]])
    again = divide(keeps, "b", [[10], [20]])
    assert [left(part)["depth"] for part in again] == [(1, 2, 3), (3,)]
    assert [part.size for part in (*again, rest)] == [1 + 2 + (1 + 1), 1, 1] and hand().size == 7
    high = divide(hand(), "b", [[10], [20, 30]])[1]
    assert [left(part) for part in divide(high, "b", [[20], [30]])] == [
        {"b": (b,), "depth": (3,), "a": (8,)} for b in (20, 30)]  # there b counts in both


def test_a_needed_follower_is_restricted_through_its_leader() -> None:
    space = RESNET.tie("stage1.depth", "stage0.depth", {1: 3, 2: 1, 3: 2})
    name = "stage1.block1.conv0.width"  # needs stage1.depth = 2, 3
    first, rest = divide(space, name, [[9], space[name].options[1:]])
    assert (rest["stage0.depth"].options, rest["stage1.depth"].options) == ((1, 3), (2, 3))
    assert first["stage0.depth"].options == (1, 2, 3) and first.size + rest.size == space.size
    clash = space.tie("stage2.depth", "stage0.depth", {1: 1, 2: 3, 3: 1})  # 2 where stage1.depth is 1
    both = SearchSpace([Choice("d", (1, 2)), Choice("e", (1, 2)), Choice("f", (1, 2)),
                        Choice("x", (5, 6), needs=(("e", (2,)), ("f", (2,))))], {})
    assert splittable(both) == ["d", "e", "f", "x"]
    never = both.tie("e", "d", {1: 1, 2: 2}).tie("f", "d", {1: 2, 2: 1})
    assert splittable(never) == ["d"] and "stage2.block2.conv0.width" in splittable(clash)
    assert left(divide(clash, "stage2.block2.conv0.width", [[19], [25, 32, 38, 44, 51, 57, 64]])[1])["stage0.depth"] == (2,)


# ---- patterns and errors ---------------------------------------------------------------------------------------------


def test_splittable_follows_patterns_in_the_order_of_the_space() -> None:
    assert splittable(hand()) == ["b", "depth", "a"] and splittable(hand(), ["a", "b"]) == ["b", "a"]
    assert splittable(hand().restrict({"depth": [2]})) == ["a"] and splittable(hand().restrict({"depth": [1]})) == []
    assert splittable(Topology(), ["node3.*"]) == [f"node3.from{i}" for i in range(3)]
    with pytest.raises(ValueError, match=r"^'edge\*' matches no choice of nats.Topology. Choices: node1.from0, .*\(6 in all\)"):
        splittable(Topology(), ["*", "edge*"])


@pytest.mark.parametrize(("choice", "groups", "line"), [
    ("c", [[1], [2]], "c is not a choice of space.SearchSpace. Nearest"),
    ("b", [[10], [20]], r"b cannot be split into 10 | 20. Give two or more groups that hold each option once: 10, 20, 30."),
    ("b", [[10, 20], [20, 30]], "b cannot be split into 10, 20 | 20, 30."),
    ("b", [[10, 20], [20]], "b cannot be split into 10, 20 | 20."),
    ("b", [[10, 20, 30], []], "b cannot be split into 10, 20, 30 | ."),
    ("b", [[10, 20, 30]], "b cannot be split into 10, 20, 30."),
    ("b", [[10, 25], [20, 30]], "b = 25 is not in this space. Allowed: 10, 20, 30. Nearest: 20."),
])  # fmt: skip
def test_divide_refuses_groups(choice: str, groups: Sequence[Sequence[Value]], line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        divide(hand(), choice, groups)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("space", "choice", "line"), [
    (hand().restrict({"a": [8]}), "a", "a has one option left, 8, so it cannot be split."),
    (hand().restrict({"depth": [1, 2]}), "b", "b cannot be split: it counts in no architecture of this space. depth: 1, 2."),
    (RESNET.tie("stage1.depth", "stage0.depth", {1: 3, 2: 1, 3: 2}), "stage1.depth",
     "stage1.depth follows stage0.depth, so it cannot be split. Split stage0.depth."),
])  # fmt: skip
def test_divide_refuses_choices(space: SearchSpace, choice: str, line: str) -> None:
    for refuse in (lambda: divide(space, choice, [[o] for o in space[choice].options]), lambda: barren(space, choice)):
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            refuse()


def test_holder_refuses() -> None:
    parts = divide(hand(), "b", [[10], [20], [30]])
    with pytest.raises(ValueError, match=r"^b = 40 is not in this space. Allowed: 10, 20, 30. Nearest: 30.$"):
        holder(parts, {"b": 40, "depth": 3, "a": 8})
    with pytest.raises(ValueError, match=r"^b = 20 is not in this space. Allowed: 10, 30."):
        holder([parts[0], parts[2]], {"b": 20, "depth": 3, "a": 8})
    with pytest.raises(ValueError, match=r"^None of the 1 parts holds this architecture, though each of its settings"):
        holder([tie_of_hand()], {"depth": 2, "w": 20})
    with pytest.raises(ValueError, match=r"^2 of the 3 parts hold b = 20, depth = 3, a = 8. Give parts that divide made.$"):
        holder([*parts[:2], parts[1]], {"b": 20, "depth": 3, "a": 8})
    with pytest.raises(ValueError, match="does not set a of"):
        holder(parts, {"b": 20, "depth": 3})
    with pytest.raises(ValueError, match="Give the parts of a split"):
        holder([], {"b": 20, "depth": 3, "a": 8})


def tie_of_hand() -> SearchSpace:
    return SearchSpace([Choice("depth", (1, 2)), Choice("w", (10, 20))], {}).tie("w", "depth", {1: 20, 2: 10})


# ---- what restricted spaces and their searchers must get right -------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_genes_of_a_leaf_stay_in_it(name: str) -> None:
    tree = grown(FAMILIES[name], random.Random(name), 2)
    for i in tree.leaves:
        leaf, rng = tree.nodes[i], np.random.default_rng(i)
        genes = Genes(leaf, {})
        rows = genes.random(rng, 8)
        opened = genes.opened(leaf.encode([leaf.largest(), leaf.smallest()]))
        rows = np.concatenate([rows, opened, genes.mutate(rng, rows, genes.rates(0.5)), genes.cross(rng, rows, rows[::-1])])
        for arch, canonical in zip(leaf.decode(rows), leaf.decode(leaf.canonical_codes(rows))):
            leaf.check(arch)
            assert leaf.canonical(arch) == canonical and tree.owner(arch) == i
        assert genes.fits(rows)[:8].all()
