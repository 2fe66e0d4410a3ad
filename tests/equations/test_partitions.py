"""Partitions of options and the choice to split (fewshot-gm.md, sections 2c, 2d, 5), against brute force, beside the loops that
were released (section 7), which must not agree with ours where they are wrong."""
from __future__ import annotations

import math
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest

from nas.splits.partitions import Cut, Partition, best, chosen, partitions, total, within

STIRLING = {(1, 1): 1, (3, 2): 3, (4, 2): 7, (4, 3): 6, (5, 2): 15, (5, 3): 25, (6, 3): 90, (7, 4): 350}


def random_D(n: int, seed: int) -> np.ndarray:
    half = np.triu(np.random.default_rng(seed).uniform(0.05, 2.0, (n, n)), 1)
    return half + half.T


def from_pairs(n: int, pairs: dict[tuple[int, int], float], rest: float = 0.0) -> np.ndarray:
    D = np.full((n, n), rest)
    for (i, j), value in pairs.items():
        D[i, j] = D[j, i] = value
    np.fill_diagonal(D, 0.0)
    return D


def brute(n: int, groups: int, least: int) -> set[Partition]:
    """All ways to give every position one of ``groups`` colours, told apart by who is with whom alone."""
    found = set()
    for colours in product(range(groups), repeat=n):
        parts = [tuple(i for i in range(n) if colours[i] == g) for g in range(groups)]
        if all(len(part) >= least for part in parts):
            found.add(tuple(sorted(parts)))
    return found


# ---- which partitions there are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "groups", "least", "count"), [
    (5, 2, 2, 10),  # NB201: 2 + 3
    (7, 2, 2, 56),  # DARTS without none: 2 + 5 and 3 + 4
    (6, 2, 2, 15 + 10), (6, 3, 2, 15), (7, 3, 2, 105),  # ProxylessNAS, without and with zero
    (3, 2, 1, 3), (3, 3, 1, 1), (3, 2, 2, 0), (5, 3, 2, 0), (2, 3, 1, 0),  # OFA kernels; none at all
    *((n, k, 1, count) for (n, k), count in STIRLING.items()),
])  # fmt: skip
def test_how_many(n: int, groups: int, least: int, count: int) -> None:
    assert len(partitions(n, groups, least)) == count


@pytest.mark.parametrize(("n", "groups", "least"), [(2, 2, 1), (3, 2, 1), (5, 2, 2), (6, 3, 2), (6, 4, 1), (7, 3, 2)])
def test_each_once_and_written_in_order(n: int, groups: int, least: int) -> None:
    found = partitions(n, groups, least)
    assert len(set(found)) == len(found) and set(found) == brute(n, groups, least)
    for partition in found:  # groups ascend, and stand in the order of their first members
        assert all(list(group) == sorted(group) for group in partition) and list(partition) == sorted(partition)


def test_the_order_is_fixed() -> None:
    assert partitions(3, 2) == [((0, 1), (2,)), ((0, 2), (1,)), ((0,), (1, 2))]
    assert partitions(4, 2, 2) == [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]


@pytest.mark.parametrize(("n", "groups", "least", "count", "sizes"), [
    (5, 2, 1, 10, [2, 3]), (6, 2, 1, 10, [3, 3]), (7, 2, 1, 35, [3, 4]), (7, 3, 1, 105, [2, 2, 3]), (8, 3, 1, 280, [2, 3, 3]),
    (6, 3, 2, 15, [2, 2, 2]), (5, 5, 1, 1, [1, 1, 1, 1, 1]), (5, 3, 2, 0, []),
])  # fmt: skip
def test_balanced_sizes_differ_by_one_at_most(n: int, groups: int, least: int, count: int, sizes: list[int]) -> None:
    found = partitions(n, groups, least, balanced=True)
    assert len(found) == count and all(sorted(map(len, partition)) == sizes for partition in found)
    even = [p for p in partitions(n, groups, least) if max(map(len, p)) - min(map(len, p)) <= 1]
    assert found == even  # in the same order


@pytest.mark.parametrize(("said", "line"), [((0, 1, 1), "n = 0"), ((3, 0, 1), "groups = 0"), ((3, 2, 0), "least = 0")])
def test_numbers_below_one_are_refused(said: tuple[int, int, int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        partitions(*said)


# ---- the best of them -------------------------------------------------------------------------------------------------------


def test_sums_by_hand() -> None:
    D = from_pairs(4, {(0, 1): 1.0, (0, 2): 2.0, (0, 3): 4.0, (1, 2): 8.0, (1, 3): 16.0, (2, 3): 32.0})
    assert total(D) == 63.0
    assert within(D, ((0, 1), (2, 3))) == 33.0
    assert within(D, ((0,), (1, 2, 3))) == 56.0
    assert best(D, 2) == Cut(((0, 1, 2), (3,)), 11.0, 52.0)
    assert best(D, 2, 2) == best(D, 2, balanced=True) == Cut(((0, 3), (1, 2)), 12.0, 51.0)
    assert best(D, 4) == Cut(((0,), (1,), (2,), (3,)), 0.0, 63.0)
    assert best(D, 1) == Cut(((0, 1, 2, 3),), 63.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "groups", "least"), [(5, 2, 2), (7, 2, 2), (6, 3, 2), (4, 3, 1)])
def test_within_and_cut_make_up_the_total(n: int, groups: int, least: int, seed: int) -> None:
    D = random_D(n, seed)
    for partition in partitions(n, groups, least):
        at = {i: g for g, group in enumerate(partition) for i in group}
        parted = sum(D[i, j] for i, j in combinations(range(n), 2) if at[i] != at[j])
        assert within(D, partition) + parted == pytest.approx(total(D), abs=1e-12)
    found = best(D, groups, least)
    assert found.within + found.cut == pytest.approx(total(D), abs=1e-12)


def test_planted_blocks_are_found() -> None:
    inside = {(0, 3): 0.1, (1, 2): 0.2, (1, 4): 0.15, (2, 4): 0.05}
    found = best(from_pairs(5, inside, rest=0.9), 2, 2)
    assert found.groups == ((0, 3), (1, 2, 4))
    assert found.within == pytest.approx(0.5, abs=1e-15) and found.cut == pytest.approx(6 * 0.9, abs=1e-12)


@pytest.mark.parametrize(("n", "groups", "least"), [(3, 2, 1), (4, 2, 2), (5, 2, 2), (6, 3, 2), (6, 2, 1), (7, 2, 2)])
def test_the_best_is_that_of_brute_force(n: int, groups: int, least: int) -> None:
    for seed in range(4):
        D = random_D(n, seed) - 0.5  # negative numbers too
        found = best(D, groups, least)
        sums = {p: sum(D[i, j] for group in p for i in group for j in group if i < j) for p in brute(n, groups, least)}
        assert found.groups == min(sums, key=lambda p: sums[p])
        assert found.within == pytest.approx(min(sums.values()), abs=1e-12)
        parted = {p: D[np.triu_indices(n, 1)].sum() - inside for p, inside in sums.items()}
        assert found.groups == max(parted, key=lambda p: parted[p])
        assert found.cut == pytest.approx(max(parted.values()), abs=1e-12)


def test_of_equal_ones_the_first() -> None:
    D = from_pairs(5, {}, rest=0.1)  # 0.1 + 0.1 + 0.1 + 0.1 in any order: all ten are equal
    assert best(D, 2, 2).groups == partitions(5, 2, 2)[0] == ((0, 1, 2), (3, 4))
    D = from_pairs(4, {(0, 2): 0.0, (1, 3): 0.0, (0, 3): 0.0, (1, 2): 0.0}, rest=1.0)
    assert best(D, 2, 2).groups == ((0, 2), (1, 3))  # before ((0, 3), (1, 2))


def test_ties_do_not_hang_on_the_order_of_a_sum() -> None:
    """{0,1,2} {3,4} and {0,1} {2,3,4} sum 0.3, 0.1 and 0.2 each; added from the left the second seems smaller."""
    D = from_pairs(5, {(0, 1): 0.3, (0, 2): 0.1, (1, 2): 0.2, (2, 3): 0.2, (2, 4): 0.1, (3, 4): 0.0}, rest=5.0)
    assert 0.3 + 0.2 + 0.1 < 0.3 + 0.1 + 0.2
    assert within(D, ((0, 1, 2), (3, 4))) == within(D, ((0, 1), (2, 3, 4)))
    assert best(D, 2, 2).groups == ((0, 1, 2), (3, 4))


@pytest.mark.parametrize(("D", "groups", "least", "line"), [
    (np.zeros((3, 3)), 2, 2, "3 options do not make 2 groups of 2"), (np.zeros((1, 1)), 2, 1, "do not make 2 groups"),
    (np.zeros((2, 3)), 2, 1, "square"), (np.zeros(3), 2, 1, "square"), (np.full((3, 3), math.nan), 2, 1, "9 not finite"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused(D: np.ndarray, groups: int, least: int, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        best(D, groups, least)


# ---- which choice -----------------------------------------------------------------------------------------------------------


def test_the_two_rules_differ_where_totals_differ() -> None:
    """A: total 16, B: total 4. A parts more (12 > 3), B keeps less together (1 < 4)."""
    B = best(from_pairs(4, {(0, 1): 0.5, (2, 3): 0.5}, rest=0.75), 2, 2)
    A = best(from_pairs(4, {(0, 1): 2.0, (2, 3): 2.0}, rest=3.0), 2, 2)
    assert (A.within, A.cut, B.within, B.cut) == (4.0, 12.0, 1.0, 3.0)
    C = Cut(((0, 1), (2, 3)), 20.0, 0.5)  # the largest within and the smallest cut: neither rule takes it
    assert chosen({"B": B, "C": C, "A": A}, "cut") == "A" and chosen({"A": A, "C": C, "B": B}, "within") == "B"


def test_equal_choices_give_the_first() -> None:
    one, other = Cut(((0,), (1,)), 1.0, 2.0), Cut(((0,), (1,)), 1.0, 2.0)
    for rule in ("cut", "within"):
        assert chosen({"first": one, "second": other}, rule) == "first"
        assert chosen({"second": other, "first": one}, rule) == "second"


@pytest.mark.parametrize(("cuts", "rule", "line"), [({"e": Cut(((0,), (1,)), 0.0, 1.0)}, "largest", "Allowed: cut, within"),
                                                    ({}, "cut", "no choice left")])  # fmt: skip
def test_unknown_rules_and_nothing_to_split_are_refused(cuts: dict[str, Cut], rule: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        chosen(cuts, rule)


# ---- the released loops (section 7) -----------------------------------------------------------------------------------------


def inside(D: np.ndarray, *groups: Any) -> float:
    return sum(D[i, j] for i, j in combinations(range(len(D)), 2) if any(i in group and j in group for group in groups))


def released_ofa(D: np.ndarray, mended: bool = False) -> tuple[Partition, float]:
    """Two groups. The running minimum is overwritten with total - cut, and raw cuts (our within) are compared with it."""
    n, least, parted, found = len(D), 1e5, 0.0, None
    for size in range(1, n // 2 + 1):
        for subset in combinations(range(n), size):
            rest = tuple(i for i in range(n) if i not in subset)
            cut = inside(D, subset, rest)
            if cut < least:
                found, parted = (subset, rest), total(D) - cut
                least = cut if mended else parted
    assert found is not None
    return tuple(sorted(found)), parted


def released_proxyless(D: np.ndarray, mended: bool = False) -> tuple[Partition, float]:
    """Three groups out of all permutations. The sum is never set back to 0 between partitions. Its third group may have one
    member; ours, as the page says, has two at least: what it finds mended is compared where that makes no difference."""
    n, least, cut, found = len(D), 1e5, 0.0, None
    for p in permutations(range(n)):
        for i in range(1, n // 2 + 1):
            for j in range(i + 2, n - 1):
                groups = (p[: i + 1], p[i + 1 : j + 1], p[j + 1 :])
                cut = (0.0 if mended else cut) + inside(D, *groups)
                if cut < least:
                    least, found = cut, groups
    assert found is not None
    return tuple(sorted(tuple(sorted(group)) for group in found)), least


def test_the_released_loop_for_ofa_ends_with_the_last_and_ours_does_not() -> None:
    """Kernels 3 and 5 disagree most, 5 and 7 agree: {3} {5, 7}. Released: total - cut is larger than the next raw cut, so every
    later subset wins, and {7} {3, 5} is what is left: the worst of the three."""
    D = from_pairs(3, {(0, 1): 1.0, (0, 2): 0.6, (1, 2): 0.2})
    ours = best(D, 2)
    assert ours.groups == ((0,), (1, 2)) and ours.within == pytest.approx(0.2) and ours.cut == pytest.approx(1.6)
    groups, cut = released_ofa(D)
    assert groups == ((0, 1), (2,)) != ours.groups
    assert cut == pytest.approx(0.8) and cut < ours.cut
    assert inside(D, *groups) == max(inside(D, *p) for p in partitions(3, 2))
    groups, cut = released_ofa(D, mended=True)
    assert groups == ours.groups and cut == pytest.approx(ours.cut)


def test_the_released_loop_for_proxyless_stays_with_the_first_and_ours_does_not() -> None:
    """The sum only grows, so the first partition that it meets, {0,1} {2,3} {4,5}, is never beaten: here it is the worst."""
    D = from_pairs(6, {(0, 3): 0.1, (1, 4): 0.2, (2, 5): 0.3, (0, 1): 1.9, (2, 3): 1.9, (4, 5): 1.9}, rest=1.0)
    ours = best(D, 3, 2)
    assert ours.groups == ((0, 3), (1, 4), (2, 5)) and ours.within == pytest.approx(0.6)
    groups, least = released_proxyless(D)
    assert groups == ((0, 1), (2, 3), (4, 5)) != ours.groups and least == pytest.approx(5.7)
    groups, least = released_proxyless(D, mended=True)
    assert groups == ours.groups and least == pytest.approx(ours.within)
