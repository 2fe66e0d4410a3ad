"""How well architectures of like cost are ranked: Kendall's tau-b within bins of MACs, where the cost itself says little."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nas.ranking.statistics import FEWEST, Estimate, ends, kendall, note, resampled_taus, rounds_of, unsure

BINS, FROM = 5, 50  # how many bins where nothing is said, and from how many architectures on


class Binned(NamedTuple):
    """Of one ranker: tau-b in each bin, and their ``mean`` weighted by the bins' architectures, whose ``n`` it states: those
    of bins that have a tau-b."""

    bins: list[Estimate]
    mean: Estimate


def bins_of(macs: np.ndarray, count: int) -> np.ndarray:
    """(n,) the bin of each, from 0 on without a gap, by rising ``macs`` (n,): ``count`` bins of equally many, up to one.

    Equal MACs are never separated: they go where the middle one of them belongs. So bins may be of unequal size, or fewer.
    """
    _, at, sizes = np.unique(macs, return_inverse=True, return_counts=True)
    middle = 2 * np.cumsum(sizes) - sizes  # twice the place among all, a whole number
    return np.unique((middle * count // (2 * len(macs)))[at], return_inverse=True)[1]


def binned(
    rankers: Mapping[str, np.ndarray], t: np.ndarray, of: np.ndarray, seed: int, rounds: int | None = None
) -> dict[str, Binned]:
    """Of every ranker, values (n,), its tau-b against ``t`` (n,) within the bins ``of`` (n,).

    Architectures are resampled within their bin, alike for all rankers. A bin of fewer than three, or without spread, has no
    tau-b and says so.
    """
    rounds = rounds or rounds_of(len(t))
    sizes = np.bincount(of)
    taus = np.full((len(rankers), len(sizes)), math.nan)
    drawn = np.full((len(rankers), len(sizes), rounds), math.nan)
    for b, size in enumerate(sizes):
        if size >= FEWEST:
            mine = of == b
            within = [p[mine] for p in rankers.values()]
            taus[:, b] = [kendall(p, t[mine]) for p in within]
            drawn[:, b] = resampled_taus(within, t[mine], [seed, b], rounds).T
    found = {}
    for i, (name, p) in enumerate(rankers.items()):
        rows = []
        for b, size in enumerate(sizes):
            value, (low, high) = float(taus[i, b]), ends(drawn[i, b])
            few = f"a tau-b needs {FEWEST} architectures" if size < FEWEST else note(p[of == b], t[of == b], value)
            rows.append(Estimate(value, low, high, int(size), note=few or unsure(value, low)))
        found[name] = Binned(rows, _mean(taus[i], drawn[i], sizes))
    return found


def _mean(taus: np.ndarray, drawn: np.ndarray, sizes: np.ndarray) -> Estimate:
    """Over the bins that have one, of ``taus`` (bins,) and of their resamples ``drawn`` (bins, rounds)."""
    there = ~np.isnan(taus)
    if not there.any():
        return Estimate(math.nan, math.nan, math.nan, 0, note="no bin has a tau-b")
    weights = sizes[there] / sizes[there].sum()
    value, (low, high) = float(weights @ taus[there]), ends(weights @ drawn[there])
    left = f"{len(taus) - there.sum()} of {len(taus)} bins have none" if not there.all() else ""
    return Estimate(value, low, high, int(sizes[there].sum()), note="; ".join(filter(None, [left, unsure(value, low)])))
