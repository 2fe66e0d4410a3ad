"""Spaces by hand: one small space whose every answer can be worked out on paper."""
from __future__ import annotations

import random

import numpy as np
import pytest

from search_spaces.space import Choice, SearchSpace


class Small(SearchSpace):
    """depth 1..3; a counts from depth 2; b counts at depth 3 where a counts and is 8; op is unordered."""

    def __init__(self, note: str = "") -> None:
        self.mark = ["kept by copies"]
        super().__init__([
            Choice("b", (10, 20, 30), needs=(("depth", (3,)), ("a", (8,)))),  # before what it needs: order is free
            Choice("depth", (1, 2, 3)),
            Choice("a", (4, 8), needs=(("depth", (2, 3)),)),
            Choice("op", ("skip", "conv", "pool"), ordered=False),
        ], {"note": note}, dear={"op": "conv"}, cheap={"op": "skip"})


def arch(b: object, depth: object, a: object, op: object = "skip") -> dict:
    return {"b": b, "depth": depth, "a": a, "op": op}


def test_size_by_hand() -> None:
    assert Small().size == (1 + 2 + (1 + 3)) * 3
    assert Small().restrict({"depth": [2]}).size == 2 * 3
    assert Small().restrict({"depth": [3], "b": [10, 30], "op": ["pool"]}).size == 1 + 2


def test_canonical_follows_needs_through_needs() -> None:
    space = Small()
    assert space.canonical(arch(30, 3, 8)) == arch(30, 3, 8)
    assert space.canonical(arch(30, 3, 4)) == arch(10, 3, 4)
    assert space.canonical(arch(30, 1, 8)) == arch(10, 1, 4)
    assert space.counting(arch(30, 2, 8)) == {"depth", "a", "op"}
    assert list(space.canonical({"op": "skip", "a": 4, "depth": 1, "b": 10})) == ["b", "depth", "a", "op"]
    assert space.key(arch(30, 1, 8)) == space.key(arch(20, 1, 4)) != space.key(arch(20, 2, 4))


def test_canonical_of_a_restricted_space_is_the_roots() -> None:
    space = Small().restrict({"a": [8], "b": [30]})
    assert space.canonical(arch(30, 1, 8)) == arch(10, 1, 4)
    space.check(arch(10, 1, 4))  # inert settings outside the remaining options are fine


def test_largest_and_smallest() -> None:
    assert Small().largest() == arch(30, 3, 8, "conv")
    assert Small().smallest() == arch(10, 1, 4, "skip")
    small = Small().restrict({"depth": [2, 3], "a": [8], "op": ["conv", "pool"]})
    assert small.largest() == arch(30, 3, 8, "conv")
    assert small.smallest() == arch(10, 2, 8, "conv")  # skip is gone: the first that is left
    assert small.restrict({"op": ["pool"]}).largest()["op"] == "pool"


def test_an_extreme_gives_something_where_something_is_left() -> None:
    class Empty(Small):
        nones = ("skip", "pool")

    assert Empty().smallest()["op"] == "skip"  # named cheap
    assert Empty().restrict({"op": ["conv", "pool"]}).smallest()["op"] == "conv"
    assert Empty().restrict({"op": ["skip", "pool"]}).largest()["op"] == "pool"  # nothing else is left


def test_text_by_hand() -> None:
    space = Small().restrict({"depth": [1]})
    assert space.text(arch(30, 3, 8)) == "b=30,depth=3,a=8,op=skip"
    assert space.text(arch(30, 1, 8)) == "b=10,depth=1,a=4,op=skip"
    assert space.parse(" op=conv, a=8 ,depth=3,b=30\n") == arch(30, 3, 8, "conv")
    assert space.part("a") == "" and space.skips == space.nones == ()


@pytest.mark.parametrize(("text", "line"), [
    ("b=30,depth=3,a=8", "does not set op of"),
    ("b=30,depth=3,a=8,op", r"'op' is not name=value. .* is written name=value,name=value."),
    ("b=30,depth=3,a=9,op=skip", "a = 9 is not in this space. Allowed: 4, 8."),
    ("b=30,depth=3,a=8,op=skip,a=8", "a is set twice, to 8 and to 8. Set it once."),
    ("b=30,deep=3,a=8,op=skip", "deep is not a choice of .* Nearest: depth."),
])
def test_text_refused(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Small().parse(text)


def test_restrict_is_a_copy_that_knows_its_root() -> None:
    space = Small("x")
    once = space.restrict({"depth": [3, 2]})
    twice = once.restrict({"a": [8]})
    assert [c.options for c in twice.choices] == [(10, 20, 30), (2, 3), (8,), ("skip", "conv", "pool")]
    assert [c.options for c in space.choices] == [(10, 20, 30), (1, 2, 3), (4, 8), ("skip", "conv", "pool")]
    assert twice.root is once.root is space.root is space
    assert isinstance(twice, Small) and twice.mark is space.mark and twice["a"].options == (8,)
    assert (twice.name, twice.args, twice.hash) == (space.name, {"note": "x"}, space.hash)
    assert twice.free == ("b", "depth", "op")
    assert space.size == 21 and twice.size == 3 * (1 + 3)  # neither reads the other's count


def test_hash_sees_name_args_and_choices() -> None:
    def plain(options: tuple, **args: object) -> str:
        return SearchSpace([Choice("a", options)], args).hash

    assert plain((1, 2)) == plain((1, 2)) and len(plain((1, 2))) == len("sha256:") + 64
    assert len({plain((1, 2)), plain((1, 3)), plain((1, 2), n=1), Small().hash, Small("x").hash}) == 5
    assert plain((1, 2), n=(1, 2)) == plain((1, 2), n=[1, 2])


@pytest.mark.parametrize(("setting", "line"), [
    (arch(10, 3, 5), "a = 5 is not in this space. Allowed: 4, 8. Nearest: 4."),
    (arch(26, 3, 8), "b = 26 is not in this space. Allowed: 10, 20, 30. Nearest: 30."),
    (arch(10, 1, 4, "convv"), "op = convv is not in this space. Allowed: skip, conv, pool. Nearest: conv."),
    (arch(10, 1, 4, 7), "op = 7 is not in this space. Allowed: skip, conv, pool."),
    (arch(10, 1, 4) | {"depths": 1}, "depths is not a choice of {name}. Nearest: depth."),
    ({"depth": 1, "a": 4, "op": "skip"}, "This architecture does not set b of {name}. Allowed: 10, 20, 30."),
    ({"op": "skip"}, "This architecture does not set b and 2 more of the choices of {name}. Allowed: 10, 20, 30."),
])
def test_check_says_what_where_allowed_nearest(setting: dict, line: str) -> None:
    space = Small()
    with pytest.raises(ValueError) as error:
        space.check(setting)
    assert str(error.value) == line.format(name=space.name)


def test_check_ignores_inert_settings_and_uses_what_is_left() -> None:
    Small().check(arch(999, 1, "nonsense"))
    with pytest.raises(ValueError, match=r"^depth = 1 is not in this space\. Allowed: 2, 3\. Nearest: 2\.$"):
        Small().restrict({"depth": [2, 3]}).check(arch(10, 1, 4))


@pytest.mark.parametrize(("allowed", "line"), [
    ({"depht": [1]}, "depht is not a choice of .*Small. Nearest: depth."),
    ({"depth": [4]}, "depth = 4 is not in this space. Allowed: 1, 2, 3. Nearest: 3."),
    ({"a": []}, "a would have no option left. Allowed: 4, 8."),
])
def test_restrict_refuses(allowed: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Small().restrict(allowed)
    with pytest.raises(ValueError, match=r"depth = 1 is not in this space. Allowed: 2, 3. Nearest: 2."):
        Small().restrict({"depth": [2, 3]}).restrict({"depth": [1]})


def test_unknown_choice_by_name() -> None:
    with pytest.raises(ValueError, match=r"dept is not a choice of .*Small. Nearest: depth."):
        Small()["dept"]


def test_derive_is_the_argmax_over_what_is_left() -> None:
    odds = {"b": [0.1, 0.2, 0.7], "depth": [0.8, 0.1, 0.1], "a": [0.5, 0.5], "op": [0.2, 0.3, 0.5]}
    assert Small().derive(odds) == arch(30, 1, 4, "pool")  # b stays raw though it is inert
    left = Small().restrict({"depth": [2, 3], "op": ["conv"]})
    assert left.derive({name: odds[name] for name in ("b", "depth", "a")}) == arch(30, 2, 4, "conv")
    assert left.derive(odds | {"op": [9, 0, float("nan")]})["op"] == "conv"  # what is forbidden is not read


def test_derive_refuses() -> None:
    odds = {"b": [0.1, 0.2, 0.7], "depth": [0.8, 0.1, 0.1], "a": [0.5, 0.5], "op": [0.2, 0.3, 0.5]}
    with pytest.raises(ValueError, match=r"op needs 3 probabilities, one for each option .* given: none"):
        Small().derive({name: odds[name] for name in ("b", "depth", "a")})
    with pytest.raises(ValueError, match=r"a needs 2 probabilities.* given: 3"):
        Small().derive(odds | {"a": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"opp is not a choice"):
        Small().derive(odds | {"opp": [1]})
    with pytest.raises(ValueError, match=r"probabilities of a hold nan: nan, 0.5"):
        Small().derive(odds | {"a": [float("nan"), 0.5]})


def test_sample_is_uniform_in_each_free_choice() -> None:
    rng = random.Random(0)
    space = Small().restrict({"depth": [2, 3]})
    draws = [space.sample(rng) for _ in range(3000)]
    assert abs(sum(d["depth"] == 2 for d in draws) / 3000 - 1 / 2) < 0.04
    assert abs(sum(d["op"] == "pool" for d in draws) / 3000 - 1 / 3) < 0.04
    assert space.sample(random.Random(5)) == space.sample(random.Random(5))


def test_codes_by_hand() -> None:
    space = Small().restrict({"depth": [3]})
    codes = space.encode([arch(30, 3, 8, "pool"), arch(10, 2, 4)])
    assert codes.dtype == np.int16 and codes.tolist() == [[2, 2, 1, 2], [0, 1, 0, 0]]  # positions in the ROOT options
    assert space.decode(codes) == [arch(30, 3, 8, "pool"), arch(10, 2, 4)]
    assert space.canonical_codes(np.array([[2, 2, 0, 1], [2, 0, 1, 1]])).tolist() == [[0, 2, 0, 1], [0, 0, 0, 1]]
    assert space.encode([]).shape == (0, 4) and space.decode(np.zeros((0, 4), int)) == []


def test_random_codes_are_uniform_over_what_is_left() -> None:
    space = Small().restrict({"depth": [2, 3], "op": ["skip", "pool"]})
    codes = space.random_codes(np.random.default_rng(0), 4000)
    assert codes.dtype == np.int16 and codes.shape == (4000, 4)
    assert set(codes[:, 1].tolist()) == {1, 2} and set(codes[:, 3].tolist()) == {0, 2}
    assert abs((codes[:, 1] == 2).mean() - 1 / 2) < 0.04
    assert (codes[codes[:, 1] == 1][:, 0] == 0).all()  # b is inert at depth 2
    assert (space.random_codes(np.random.default_rng(7), 9) == space.random_codes(np.random.default_rng(7), 9)).all()


def test_codes_refuse() -> None:
    space = Small()
    with pytest.raises(ValueError, match=r"a = 5 is not in this space. Allowed: 4, 8. Nearest: 4."):
        space.encode([arch(10, 1, 4), arch(10, 1, 5)])
    with pytest.raises(ValueError, match=r"Codes of .*Small are integers \(N, 4\); given: int64 \(3,\)"):
        space.decode(np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"given: float64 \(1, 4\)"):
        space.decode(np.zeros((1, 4)))
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"Code {wrong} of depth in row 1 .* Allowed: 0 to 2"):
            space.decode(np.array([[0, 0, 0, 0], [0, wrong, 0, 0]]))


@pytest.mark.parametrize(("choices", "args", "line"), [
    ([("a", ())], {}, "a has no options"),
    ([("a", (1, 1))], {}, "a lists an option twice: 1, 1"),
    ([("a", (2, 1))], {}, "a is ordered, so its options must ascend: 2, 1"),
    ([("a", (1,)), ("a", (2,))], {}, "has two choices named a"),
    ([("a", (1,), True, (("c", (1,)),))], {}, "c is not a choice of space.SearchSpace. Nearest: a"),
    ([("a", (1,)), ("b", (1,), True, (("a", (2,)),))], {}, "a = 2 is not in this space. Allowed: 1"),
    ([("a", (1,), True, (("b", (1,)),)), ("b", (1,), True, (("a", (1,)),))], {}, "form a circle among a, b"),
    ([("a", (1,))], {"f": object()}, "args of space.SearchSpace must be JSON data"),
])
def test_a_wrong_space_is_refused(choices: list, args: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        SearchSpace([Choice(*choice) for choice in choices], args)


# ---- ties ------------------------------------------------------------------------------------------------------------

FOLLOW = {1: 10, 2: 10, 3: 20}


def tied() -> SearchSpace:
    return SearchSpace([Choice("depth", (1, 2, 3)), Choice("w", (10, 20, 30), needs=(("depth", (2, 3)),)),
                        Choice("v", (1, 2))], {}).tie("w", "depth", FOLLOW)


def test_a_follower_is_its_leaders_function() -> None:
    space = tied()
    assert space.size == 3 * 2 and space.root.size == (1 + 2 * 3) * 2
    assert space["w"].options == (10, 20) and space.free == ("depth", "v") and space.root.free == ("depth", "w", "v")
    assert space.largest() == {"depth": 3, "w": 20, "v": 2}
    assert space.derive({"depth": [0, 0, 1], "w": [1, 0, 0], "v": [1, 0]}) == {"depth": 3, "w": 20, "v": 1}
    assert space.derive({"depth": [0, 1, 0], "v": [1, 0]})["w"] == 10
    rng = random.Random(1)
    assert {(a["depth"], a["w"]) for a in (space.sample(rng) for _ in range(60))} == {(1, 10), (2, 10), (3, 20)}
    codes = space.random_codes(np.random.default_rng(0), 60)
    assert {tuple(row) for row in codes[:, :2].tolist()} == {(0, 0), (1, 0), (2, 1)}
    with pytest.raises(ValueError) as error:
        space.check({"depth": 2, "w": 20, "v": 1})
    assert str(error.value) == "w = 20 is not in this space: it follows depth = 2. Allowed: 10."
    space.check({"depth": 1, "w": 30, "v": 1})  # w is inert at depth 1


def test_restricting_the_leader_narrows_the_follower() -> None:
    space = tied().restrict({"depth": [3], "w": [10, 20]})
    assert space["w"].options == (20,) and space.size == 2 and space.smallest() == {"depth": 3, "w": 20, "v": 1}
    with pytest.raises(ValueError, match=r"w follows depth, which still asks for 10. Restrict depth."):
        tied().restrict({"w": [20]})
    assert tied().restrict({"depth": [3], "w": [20]}).size == 2
    early = space.root.restrict({"depth": [3], "w": [20, 30]}).tie("w", "depth", FOLLOW)  # depths 1, 2 are gone
    assert early.largest()["w"] == 20


@pytest.mark.parametrize(("follower", "leader", "values", "line"), [
    ("v", "v", {1: 1, 2: 2}, "v cannot follow v: a choice follows one leader"),
    ("w", "v", {1: 10, 2: 20}, "w cannot follow v: a choice follows one leader"),
    ("v", "w", {10: 1, 20: 2}, "v cannot follow w: a choice follows one leader"),
    ("depth", "v", {1: 1, 2: 2}, "depth cannot follow v: a choice follows one leader"),
    ("v", "depth", {1: 1, 2: 2}, "v follows depth, but no value is given for depth = 3"),
    ("v", "depth", {1: 1, 2: 2, 3: 3}, "v = 3 is not in this space. Allowed: 1, 2. Nearest: 2"),
    ("v", "depth", {1: 1, 2: 2, 3: 2, 4: 2}, "depth = 4 is not in this space"),
    ("v", "deep", {1: 1}, "deep is not a choice"),
])
def test_ties_refused(follower: str, leader: str, values: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        tied().tie(follower, leader, values)


def test_conditions_reach_the_needs_of_needs() -> None:
    assert Small().conditions("b") == {"depth": {3}, "a": {8}} and Small().conditions("a") == {"depth": {2, 3}}
    assert Small().conditions("op") == {} == Small().conditions("depth")


def test_a_leader_counts_wherever_its_follower_does() -> None:
    root = tied().root
    with pytest.raises(ValueError, match=r"v cannot follow w: w may be inert where v counts \(it needs depth = 2, 3\)"):
        root.tie("v", "w", {10: 1, 20: 2, 30: 2})
    deep = root.restrict({"depth": [2, 3]}).tie("v", "w", {10: 1, 20: 2, 30: 2})  # there w always counts
    assert deep.size == 2 * 3 and deep.largest() == {"depth": 3, "w": 30, "v": 2}


def test_needs_of_needs_decide_whether_a_leader_counts() -> None:
    root = SearchSpace([
        Choice("depth", (1, 2, 3)), Choice("a", (4, 8), needs=(("depth", (2, 3)),)),
        Choice("b", (1, 2), needs=(("depth", (3,)), ("a", (8,)))),  # counts at depth 3 only, though a counts from 2
        Choice("lead", (1, 2), needs=(("depth", (3,)),)), Choice("late", (1, 2), needs=(("a", (4,)),)),
    ], {})
    assert root.tie("b", "lead", {1: 2, 2: 1}).size == 1 + (2 + 1) + (2 * 2 + 2 * 1)
    with pytest.raises(ValueError, match=r"lead may be inert where late counts \(it needs depth = 3\)"):
        root.tie("late", "lead", {1: 1, 2: 2})
