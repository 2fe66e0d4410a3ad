"""The NASNet space: what the page says of its cells, genotypes and their text, what is drawn, how many there are."""
from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from search_spaces.nasnet import KINDS, NASNET_A, OPS, SIDES, Block, NASNet, block, choice, concat

SMALL = NASNet(1, 4, blocks=2)


def test_the_choices_are_those_of_the_page() -> None:
    """Section 1: five blocks of five decisions, 13 operations, both combinations; block b reads states 0 to b."""
    space = NASNet()
    assert len(OPS) == 13 == len(set(OPS)) and len(space.choices) == 2 * (5 * 5 + 1)
    assert not any(c.ordered for c in space.choices)
    for kind, b, side in itertools.product(KINDS, range(1, 6), SIDES):
        assert space[choice(kind, b, f"{side}.input")].options == tuple(range(b + 1))
        assert space[choice(kind, b, f"{side}.op")].options == OPS
        assert space[choice(kind, b, "combine")].options == ("add", "concat")
    assert len(space["normal.concat"].options) == 2**6 and all(o.endswith("6") for o in space["normal.concat"].options)  # type: ignore[union-attr]
    assert space.part("reduce.block1.combine") == "reduce" and space.skips == ("identity",)


def test_nasnet_a_is_that_of_the_page() -> None:
    """Section 2.1. Its outputs hold state 1 (normal) and state 3 (reduction), which blocks read as well: 6F and 4F. What no
    block reads would be 5F and 3F, so the rule alone does not give the published cells."""
    space = NASNet()
    arch = space.arch_of(NASNET_A)
    assert space.states(arch, "normal") == (1, 2, 3, 4, 5, 6) and space.states(arch, "reduce") == (3, 4, 5, 6)
    assert space.unread(arch, "normal") == "23456" and space.unread(arch, "reduce") == "456"
    assert {arch[choice(kind, b, "combine")] for kind in KINDS for b in range(1, 6)} == {"add"}
    assert space.genotype(arch) == NASNET_A and space.parse("NASNET_A") == arch
    text = space.text(arch)
    assert text == (
        "normal: sep_conv_5x5(0)+sep_conv_3x3(1) sep_conv_5x5(1)+sep_conv_3x3(1) avg_pool_3x3(0)+identity(1) "
        "avg_pool_3x3(1)+avg_pool_3x3(1) sep_conv_3x3(0)+identity(0) =1,2,3,4,5,6 "
        "reduce: sep_conv_5x5(0)+sep_conv_7x7(1) max_pool_3x3(0)+sep_conv_7x7(1) avg_pool_3x3(0)+sep_conv_5x5(1) "
        "identity(3)+avg_pool_3x3(2) sep_conv_3x3(2)+max_pool_3x3(0) =3,4,5,6")
    ruled = space.parse(text.replace(" =1,2,3,4,5,6", "").replace(" =3,4,5,6", ""))
    assert ruled == arch | {"normal.concat": "23456", "reduce.concat": "456"}
    assert block("conv_1x1(0)|identity(2)") == Block("conv_1x1", 0, "identity", 2, "concat")


def enumerated(space: NASNet) -> list[dict[str, Any]]:
    names = [c.name for c in space.choices if not c.name.endswith("concat")]
    found = []
    for values in itertools.product(*(space[name].options for name in names)):
        arch = dict(zip(names, values))
        arch |= {concat(kind): space.unread(arch, kind) for kind in KINDS}
        found.append(space.canonical(arch))
    return found


def few(space: NASNet) -> NASNet:
    """Two operations; and all of the reduction cell but one input fixed, or there would be too many to enumerate."""
    ops = {c.name: ["identity", "conv_1x1"] for c in space.choices if c.name.endswith(".op")}
    small = space.restrict(ops)
    largest = small.smallest()
    keep = "reduce.block2.right.input"
    return small.restrict({name: [value] for name, value in largest.items()
                           if name.startswith("reduce") and name not in (keep, "reduce.concat")})


def test_the_size_counts_what_is_drawn() -> None:
    space = few(SMALL)
    found = enumerated(space)
    assert len(found) == space.size == (4 * 9) * 2**4 * 2**2 * 3 == len({tuple(arch.values()) for arch in found})
    assert {arch["normal.concat"] for arch in found} == {"3", "03", "13", "23", "023", "123"}
    drawn = {tuple(space.sample(random.Random(seed)).values()) for seed in range(200)}
    assert drawn <= {tuple(arch.values()) for arch in found} and len(drawn) > 150
    assert SMALL.size == (4 * 9 * 13**4 * 4) ** 2
    assert NASNet().size == (2 * 3 * 4 * 5 * 6) ** 4 * 13**20 * 2**10
    one_list = SMALL.restrict({"normal.concat": ["0123"]})
    assert one_list.size == SMALL.size and one_list.restrict({"reduce.concat": ["3", "23"]}).size == 2 * SMALL.size


def test_an_output_that_follows_one_of_the_rule_is_no_choice_of_its_own() -> None:
    space = NASNet(1, 4, blocks=1)
    same = space.tie("reduce.concat", "normal.concat", {o: o for o in space["normal.concat"].options})
    assert space.ruled == ("normal.concat", "reduce.concat") and same.ruled == ("normal.concat",)
    assert same.size == space.size == (4 * 13**2 * 2) ** 2
    arch = same.sample(random.Random(0))
    assert arch["reduce.concat"] == arch["normal.concat"] and same.lawful(same.encode([arch])).all()


def test_pairs_do_not_tell_left_from_right() -> None:
    space = few(SMALL)
    normal = {space.key(arch)[0] for arch in enumerated(space)}
    assert len(normal) == 2**2 * (4 * 5 // 2) * (6 * 7 // 2)  # of two operations on two, then three states
    assert SMALL.pairs == (2**2 * (26 * 27 // 2) * (39 * 40 // 2)) ** 2


def test_keys_are_equal_under_swapping_and_otherwise_differ() -> None:
    space, rng = NASNet(), random.Random(3)
    for _ in range(20):
        arch = space.sample(rng)
        kind, b = rng.choice(KINDS), rng.randrange(1, 6)
        swapped = dict(arch)
        for what in ("input", "op"):
            left, right = choice(kind, b, f"left.{what}"), choice(kind, b, f"right.{what}")
            swapped[left], swapped[right] = arch[right], arch[left]
        assert space.key(swapped) == space.key(arch)
        name = rng.choice([c.name for c in space.choices])
        other = rng.choice([option for option in space[name].options if option != arch[name]])
        assert space.key(arch | {name: other}) != space.key(arch)


def test_samples_are_uniform_and_outputs_follow_the_rule() -> None:
    space, rng = NASNet(), random.Random(0)
    archs = [space.sample(rng) for _ in range(1300)]
    archs += space.decode(space.random_codes(np.random.default_rng(0), 1300))
    for arch in archs:
        space.check(arch)
        assert all(arch[concat(kind)] == space.unread(arch, kind) for kind in KINDS)
    for name, wanted in (("normal.block5.left.op", 200), ("reduce.block4.right.input", 520), ("normal.block1.combine", 1300)):
        counts = Counter(arch[name] for arch in archs)
        assert set(counts) == set(space[name].options) and all(abs(n - wanted) < 5 * wanted**0.5 for n in counts.values())


def test_restrictions_and_ties_reach_the_outputs() -> None:
    space = NASNet(1, 4).restrict({"normal.concat": ["123456"], "normal.block5.right.input": [5]})
    assert {space.sample(random.Random(n))["normal.concat"] for n in range(9)} == {"123456"}
    assert {space.sample(random.Random(n))["normal.block5.right.input"] for n in range(9)} == {5}
    tied = NASNet(1, 4, blocks=1).tie("reduce.block1.left.input", "normal.block1.left.input", {0: 1, 1: 0})
    for arch in (*(tied.sample(random.Random(n)) for n in range(9)), tied.largest(), tied.smallest(),
                 *tied.decode(tied.random_codes(np.random.default_rng(0), 9))):
        assert arch["reduce.block1.left.input"] == 1 - int(arch["normal.block1.left.input"])
        assert arch["reduce.concat"] == tied.unread(arch, "reduce")
        tied.check(arch)
    odds = {c.name: [float(option == NASNet().smallest()[c.name]) for option in c.options] for c in NASNet().choices}
    assert NASNet().derive(odds | {"normal.concat": [1.0] * 64}) == NASNet().smallest()


@pytest.mark.parametrize("args, words", [
    ({"F": 5}, "F = 5 cannot be halved.*multiples of 2"), ({"F": 6, "skeleton": "imagenet"}, "multiples of 4"),
    ({"skeleton": "cifra"}, "Nearest: cifar"), ({"stem_filters": 32}, "has 3 F = 96 channels"), ({"blocks": 9}, "1 to 8"),
    ({"N": 0}, "N = 0"),
])  # fmt: skip
def test_settings_off_their_range_are_refused(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        NASNet(**args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("NASNET_B", "not a pair of cells.*by name: NASNET_A"),
    ("normal: identity(0)+identity(1) reduce: identity(0)+identity(1)", "has 1 blocks, this space has 2"),
    ("normal: identity(0)+identity(1) identity(0)+identity(3) reduce: identity(0)+identity(1) identity(0)+identity(1)",
     r"normal\.block2\.right\.input = 3"),
    ("normal: identity(0)+dreamt(1) identity(0)+identity(1) reduce: identity(0)+identity(1) identity(0)+identity(1)",
     r"normal\.block1\.right\.op = dreamt"),
    ("normal: identity(0)-identity(1) identity(0)+identity(1) reduce: identity(0)+identity(1) identity(0)+identity(1)",
     "is not a block"),
    ("normal: identity(0)+identity(1) identity(0)+identity(1) =1,2 reduce: identity(0)+identity(1) identity(0)+identity(1)",
     r"normal\.concat = 12"),
])  # fmt: skip
def test_texts_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        SMALL.parse(text)
    assert "\n" not in str(error.value)
