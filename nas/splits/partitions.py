"""Which options of a choice share a supernet, and which choice is split (page fewshot-gm, sections 2c and 2d).

    within(p) = sum of D_ij over the pairs i < j inside a group of p        total = the same over all pairs
    cut(p)    = total - within(p)                                            p* = argmin within = argmax cut

D is (n, n): what ``nas.splits.gradients`` says of n options, their pairs i < j are read. All sums are exact but for one
rounding (``math.fsum``), whatever their order: partitions that are equally good are a tie, and the first one is taken.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np

from nas.splits.split import RULES

Partition = tuple[tuple[int, ...], ...]
"""Groups of positions, ascending; the groups in the order of their first members."""


class Cut(NamedTuple):
    """A partition of the options of one choice: what its groups keep together and what it parts."""

    groups: Partition
    within: float
    cut: float


def partitions(n: int, groups: int, least: int = 1, balanced: bool = False) -> list[Partition]:
    """All partitions of n positions into so many groups of ``least`` members or more, each once; [] where there is none.

    ``balanced``: sizes differ by one at most. Order: each position in turn joins the groups that there are, the first one
    first, and then begins one. Published: NB201 (5, 2, 2), DARTS (7, 2, 2), ProxylessNAS (6 or 7, 2 or 3, 2), OFA (3, 2 or 3).
    ValueError for numbers below 1.
    """
    for name, given in (("n", n), ("groups", groups), ("least", least)):
        if given < 1:
            raise ValueError(f"partitions: {name} = {given}. Allowed: 1 or more.")
    low, high = (max(least, n // groups), -(-n // groups)) if balanced else (least, n)
    found: list[Partition] = []
    made: list[list[int]] = []

    def place(i: int) -> None:
        missing = sum(max(low - len(group), 0) for group in made) + low * (groups - len(made))
        if missing > n - i:
            return
        if i == n:
            found.append(tuple(tuple(group) for group in made))
            return
        for group in made:
            if len(group) < high:
                group.append(i)
                place(i + 1)
                group.pop()
        if len(made) < groups:
            made.append([i])
            place(i + 1)
            made.pop()

    place(0)
    return found


def within(D: np.ndarray, partition: Partition) -> float:
    """The sum of D_ij over the pairs that share a group."""
    return _sum(D, (pair for group in partition for pair in combinations(group, 2)))


def total(D: np.ndarray) -> float:
    """The sum of D_ij over all pairs i < j."""
    return _sum(D, combinations(range(len(D)), 2))


def _sum(D: np.ndarray, pairs: Iterable[tuple[int, int]]) -> float:
    return math.fsum(float(D[i, j]) for i, j in pairs)


def best(
    D: np.ndarray, groups: int, least: int = 1, balanced: bool = False, barren: Collection[int] = (),
    admits: Callable[[Partition], bool] = lambda partition: True,
) -> Cut:  # fmt: skip
    """Of all admissible partitions that of the smallest ``within``, so of the largest cut; of equal ones the first.

    ``barren``: positions that make no group without any other (``nas.splits.regions.barren``). ``admits``: asked of partitions,
    the best first, until one is taken.
    ValueError where there is none, and where D is not square or holds a number that is not finite.
    """
    D = np.asarray(D, dtype=np.float64)
    if D.ndim != 2 or D.shape[0] != D.shape[1] or not np.isfinite(D).all():
        raise ValueError(f"Distances are a square of finite numbers, a row for each option; given: {D.shape}, "
                         f"{int((~np.isfinite(D)).sum())} not finite.")  # fmt: skip
    found = [made for made in partitions(len(D), groups, least, balanced) if all(set(group) - set(barren) for group in made)]
    if not found:
        raise ValueError(f"{len(D)} options do not make {groups} groups of {least} or more. Allowed: groups x least up to the "
                         "number of options; take fewer groups, or leave this choice out of split.choices.")  # fmt: skip
    for inside, k in sorted((within(D, partition), k) for k, partition in enumerate(found)):
        if admits(found[k]):
            return Cut(found[k], inside, total(D) - inside)
    raise ValueError(f"none of the {len(found)} partitions makes parts that the strategy can search.")


def chosen(cuts: Mapping[str, Cut], rule: str) -> str:
    """The choice to split: that of the largest cut ("cut"; NB201, OFA), or of the smallest within ("within"; DARTS,
    ProxylessNAS); of equal ones the first. ValueError for another rule, and where there are no choices."""
    if rule not in RULES:
        raise ValueError(f"split.rule = {rule!r} is not known. Allowed: {', '.join(RULES)}.")
    if not cuts:
        raise ValueError("There is no choice left to split. Match more with split.choices, or take fewer levels.")
    if rule == "cut":
        return max(cuts, key=lambda name: cuts[name].cut)
    return min(cuts, key=lambda name: cuts[name].within)
