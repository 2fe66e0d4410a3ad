"""Spaces restricted and tied by patterns of names."""
from __future__ import annotations

import json
from typing import Any

import pytest

from search_spaces.mobilenet import OFAMobileNetV3, OFAProxyless, compound
from search_spaces.patterns import restricted, tied
from search_spaces.space import Choice, SearchSpace

COMPOFA = {"stage*.block*.expand": {"leader": "stage*.depth", "values": {2: 3, 3: 4, 4: 6}}}
KERNELS = {f"stage{s}.*.kernel": [k] for s, k in enumerate((3, 5, 3, 3, 5))}


def small() -> SearchSpace:
    """Two widths and a depth in order, an operation without."""
    choices = [Choice("a.width", (4, 6, 8)), Choice("b.width", (6, 8)), Choice("a.depth", (1, 2)),
               Choice("c.op", ("x", "y", "z"), False)]  # fmt: skip
    return SearchSpace(choices, {}, dear={"c.op": "y"}, cheap={"c.op": "z"})


def options(space: SearchSpace) -> dict[str, tuple[Any, ...]]:
    return {choice.name: choice.options for choice in space.choices}


WHOLE = options(small())


@pytest.mark.parametrize(("patterns", "left"), [
    ({}, {}),
    ({"*.width": [4, 6]}, {"a.width": (4, 6), "b.width": (6,)}),  # of each those that it has
    ({"*.width": 8}, {}),  # eight of the largest: all
    ({"*.width": 2}, {"a.width": (6, 8), "b.width": (6, 8)}),
    ({"*.width": 1}, {"a.width": (8,), "b.width": (8,)}),
    ({"?.width": "smallest"}, {"a.width": (4,), "b.width": (6,)}),
    ({"*": "largest"}, {"a.width": (8,), "b.width": (8,), "a.depth": (2,), "c.op": ("y",)}),
    ({"*": "smallest"}, {"a.width": (4,), "b.width": (6,), "a.depth": (1,), "c.op": ("z",)}),
    ({"c.op": "x"}, {"c.op": ("x",)}),
    ({"c.op": ["z", "x"]}, {"c.op": ("x", "z")}),
    ({"*.width": [4, 6], "a.*": "largest"}, {"a.width": (6,), "b.width": (6,), "a.depth": (2,)}),  # in order
    ({"[ab].width": [8]}, {"a.width": (8,), "b.width": (8,)}),
])
def test_what_a_pattern_leaves(patterns: dict[str, Any], left: dict[str, tuple[Any, ...]]) -> None:
    assert options(restricted(small(), patterns)) == {**WHOLE, **left}


@pytest.mark.parametrize(("patterns", "words"), [
    ({"d.*": "largest"}, ["'d.*' matches no choice", "a.width, b.width", "Choices"]),
    ({"*.width": [4]}, ["b.width would have no option left of 4", "Allowed: 6, 8"]),
    ({"*.width": [4, 6, 7]}, ["a.width = 7 is not in this space", "Allowed: 4, 6, 8"]),
    ({"*.width": 0}, ["a.width: 0", "1 or more"]),
    ({"*": 2}, ["c.op: 2", "in order"]),
    ({"*.width": True}, ["a.width = True is not in this space"]),
    ({"*.width": [4, 6], "b.*": [8]}, ["b.width would have no option left of 8", "Allowed: 6"]),
    ({"c.op": ["x", "z"], "*": "largest"}, ["c.op has no order", "y is not among x, z"]),
])
def test_a_pattern_that_leaves_nothing_or_says_what_is_unknown(patterns: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        restricted(small(), patterns)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_inert_choice_is_restricted_by_its_own_options() -> None:
    """Where depth 2 is all that is left, the kernel of a third block is inert: its canonical value is no longer an option."""
    space = restricted(OFAMobileNetV3(), {"*.kernel": [7], "*.depth": [2]})
    again = restricted(space, {"*": "largest"})
    assert again["stage0.block2.kernel"].options == (7,) and again.size == 1


def test_the_largest_of_a_space_whose_stages_differ() -> None:
    """The last stage of the Proxyless space has one block: two depths of it are the one there is."""
    space = restricted(OFAProxyless(), {"*.depth": 2, "*.expand": [4, 6]})
    assert space["stage0.depth"].options == (3, 4) and space["stage5.depth"].options == (1,)
    assert space["stage5.block0.expand"].options == (4, 6)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_of_a_recipe_is_compofas_coupling(as_json: bool) -> None:
    """JSON and YAML written by a run turn the depths into text."""
    line = json.loads(json.dumps(COMPOFA)) if as_json else COMPOFA
    root = OFAMobileNetV3(resolution=())
    given = compound(root)
    for found in (tied(restricted(root, KERNELS), line), restricted(tied(root, line), KERNELS)):
        assert options(found) == options(given) and found.ties == given.ties and found.size == 243
    free = tied(root, line)
    assert options(free) == options(compound(root, elastic_kernel=True))
    assert free.size == compound(root, elastic_kernel=True).size


def test_a_tie_by_plain_names() -> None:
    space = tied(small(), {"b.width": {"leader": "a.depth", "values": {1: 6, 2: 8}}})
    assert space.ties["b.width"].leader == "a.depth" and space.size == 3 * 2 * 3
    with pytest.raises(ValueError, match=r"follows a\.depth, which still asks for 8"):
        restricted(space, {"b.width": "smallest"})
    assert restricted(space, {"*": "largest"}).size == 1


@pytest.mark.parametrize(("tie", "words"), [
    ({"d.*": {"leader": "a.depth", "values": {1: 6}}}, ["tie: 'd.*' matches no choice"]),
    ({"b.width": {"leader": "a.depth"}}, ["tie: 'b.width' says", "Give {leader: NAME"]),
    ({"b.width": 3}, ["Give {leader: NAME"]),
    ({"b.width": {"leader": "a.depth", "values": [6, 8]}}, ["Give {leader: NAME"]),
    ({"b.width": {"leader": "*.depth", "values": {1: 6, 2: 8}}}, ["'*.depth' has more *"]),
    ({"b.width": {"leader": "a.depht", "values": {1: 6, 2: 8}}}, ["a.depht is not a choice", "Nearest: a.depth"]),
    ({"b.width": {"leader": "a.depth", "values": {1: 6, 3: 8}}}, ["a.depth = 3 is not in this space"]),
    ({"b.width": {"leader": "a.depth", "values": {1: 6}}}, ["no value is given for a.depth = 2"]),
    ({"b.width": {"leader": "a.depth", "values": {1: 6, 2: 7}}}, ["b.width = 7 is not in this space"]),
])
def test_a_tie_that_cannot_be(tie: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        tied(small(), tie)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
