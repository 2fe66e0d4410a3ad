"""Rankers of the same architectures side by side: runs or given predictions first, the trivial rankers after them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nas.ranking.bins import BINS, FROM, Binned, binned, bins_of
from nas.ranking.statistics import Estimate, differences, statistics


class Bin(NamedTuple):
    """``n`` architectures of ``low`` to ``high`` MACs, both among them."""

    n: int
    low: int
    high: int


class Comparison(NamedTuple):
    """Values (n,) of every ranker, of which ``given`` (runs, columns) come first, against ``truth`` (n,), and what was found:
    ``statistics`` by ranker and name, ``differences`` of tau-b between a given ranker and each that comes later, and
    ``binned`` by ranker within ``bins``; both empty without bins."""

    given: Sequence[str]
    rankers: Mapping[str, np.ndarray]
    truth: np.ndarray
    statistics: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[tuple[str, str], Estimate]
    bins: Sequence[Bin]
    binned: Mapping[str, Binned]


def compare(
    given: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray], truth: np.ndarray, *,
    top: int = 10, bins: int | None = None, seed: int = 1,
) -> Comparison:  # fmt: skip
    """``given`` and ``costs`` (macs, params; none where they are not known): values (n,) by ranker. ``bins``: how many bins of
    MACs, 0 for none; None: five where MACs are known and of 50 architectures on. ValueError as of ``statistics``."""
    rankers = {**given, **costs}
    found = {name: statistics(p, truth, top, seed) for name, p in rankers.items()}
    apart = {pair: by for pair, by in differences(rankers, truth, seed).items() if pair[0] in given}
    count = how_many(bins, len(truth), "macs" in costs)
    if not count:
        return Comparison(list(given), rankers, truth, found, apart, [], {})
    of = bins_of(costs["macs"], count)
    groups = [costs["macs"][of == b] for b in range(of.max() + 1)]
    return Comparison(list(given), rankers, truth, found, apart,
                      [Bin(len(group), int(group.min()), int(group.max())) for group in groups],
                      binned(rankers, truth, of, seed))  # fmt: skip


def how_many(asked: int | None, n: int, known: bool) -> int:
    """Bins of ``n`` architectures whose MACs are ``known`` or not. ValueError where that is what they lack."""
    if asked and not known:
        raise ValueError(f"--bins {asked}: the MACs of these architectures are not known. Name a run, a recipe or --space, or "
                         "leave it out.")  # fmt: skip
    return asked if asked is not None else BINS if known and n >= FROM else 0
