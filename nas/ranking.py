"""How well predictions rank architectures: Kendall's tau-b, Spearman's rho, top-k overlap and regret, with intervals.

``p`` are predictions and ``t`` truths of the same ``n`` architectures, (n,) each, finite; higher is better in both. Tied
values have no order: tau-b discounts them, rho gives them their mean rank, a predicted top k is an expectation over their
random order, and a true top k holds all that tie with its last.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import stats

Measure = Callable[[np.ndarray, np.ndarray], float]
LEVEL = 0.9  # of the bootstrap intervals
FEWEST = 3  # architectures that a ranking needs


class Estimate(NamedTuple):
    """A statistic and the ends of its interval; nan where there is none, and ``note`` says why.

    ``n``: architectures that it ranks. ``k``: of the top that it is about, None for a statistic of all.
    """

    value: float
    low: float
    high: float
    n: int
    k: int | None = None
    note: str = ""


def kendall(p: np.ndarray, t: np.ndarray) -> float:
    """tau-b = (concordant - discordant) / sqrt(pairs untied in p * pairs untied in t); nan where either is constant."""
    return math.nan if flat(p) or flat(t) else float(stats.kendalltau(p, t).statistic)


def spearman(p: np.ndarray, t: np.ndarray) -> float:
    """The correlation of mean ranks; nan where either is constant."""
    return math.nan if flat(p) or flat(t) else float(np.corrcoef(stats.rankdata(p), stats.rankdata(t))[0, 1])


def flat(x: np.ndarray) -> bool:
    """Whether ``x`` (n,) has no spread: no order at all."""
    return bool(np.ptp(x) == 0)


def chances(x: np.ndarray, k: int) -> np.ndarray:
    """(n,) the probability of each to be one of the ``k`` largest, tied ones in random order; their sum is k."""
    edge = np.partition(x, len(x) - k)[len(x) - k]
    above, tied = x > edge, x == edge
    return above + tied * ((k - above.sum()) / tied.sum())


def overlap(p: np.ndarray, t: np.ndarray, k: int) -> float:
    """The expected share of the predicted top ``k`` that is in the true one, where what ties with its last counts too."""
    return float(chances(p, k) @ true_top(t, k)) / k


def regret(p: np.ndarray, t: np.ndarray, k: int) -> float:
    """The best truth less the expected best truth among the predicted top ``k``; 0 or more."""
    chance = chances(p, k)
    sure, tied = t[chance == 1], np.sort(t[(chance > 0) & (chance < 1)])[::-1]
    best = sure.max() if len(sure) else -math.inf
    if not len(tied):
        return float(t.max() - best)
    m, left = k - len(sure), len(tied) - np.arange(len(tied))  # m of the tied are drawn; left[j] are not better than tied[j]
    hit = np.minimum(m / left, 1.0)  # tied[j] is drawn, given that none better was
    first = hit * np.cumprod(np.concatenate([[1.0], 1 - hit[:-1]]))
    return float(first @ (t.max() - np.maximum(tied, best)))


def kendall_of_top(p: np.ndarray, t: np.ndarray, k: int) -> float:
    """tau-b among the true top ``k`` and what ties with its last."""
    best = true_top(t, k)
    return kendall(p[best], t[best])


def true_top(t: np.ndarray, k: int) -> np.ndarray:
    """(n,) bool: the ``k`` largest and what ties with the last of them."""
    return t >= np.partition(t, len(t) - k)[len(t) - k]


def statistics(p: np.ndarray, t: np.ndarray, top: int = 10, seed: int = 1, rounds: int | None = None) -> dict[str, Estimate]:
    """kendall_tau, spearman; overlap and regret of the top ``top``; the same three of the true top tenth (``tenth_``).

    ``rounds``: resamples of the architectures behind an interval; by default 1,000, or 200 above 5,000 architectures.
    ValueError for unequal lengths, values that are not finite, and fewer than three architectures.
    """
    p, t = np.asarray(p), np.asarray(t)
    n = len(p)
    if p.shape != t.shape or p.ndim != 1:
        raise ValueError(f"predictions have shape {p.shape}, truths {t.shape}. Allowed: (n,) both.")
    if not (np.isfinite(p).all() and np.isfinite(t).all()):
        raise ValueError("predictions and truths must be finite numbers: leave out the architectures that lack one.")
    if n < FEWEST:
        raise ValueError(f"a ranking needs {FEWEST} architectures or more; given: {n}.")
    if top < 1:
        raise ValueError(f"top = {top}. Allowed: 1 or more.")
    k, tenth = min(top, n), -(-n // 10)
    everyone, best = np.ones(n, dtype=bool), true_top(t, tenth)
    rows: list[tuple[str, Measure, np.ndarray, int | None]] = [  # what it is called, computes, is about, and of which top
        ("kendall_tau", kendall, everyone, None),
        ("spearman", spearman, everyone, None),
        ("overlap", partial(overlap, k=k), everyone, k),
        ("regret", partial(regret, k=k), everyone, k),
        ("tenth_kendall_tau", partial(kendall_of_top, k=tenth), best, tenth),
        ("tenth_overlap", partial(overlap, k=tenth), everyone, tenth),
        ("tenth_regret", partial(regret, k=tenth), everyone, tenth),
    ]
    ends = intervals([measure for _, measure, _, _ in rows], p, t, seed, rounds or (1000 if n <= 5000 else 200))
    found = {}
    for (name, measure, within, size), (low, high) in zip(rows, ends):
        value = measure(p, t)
        notes = [_note(p[within], t[within], value)]
        if math.isnan(low) and not math.isnan(value):
            notes.append("no interval: most resamples have no spread")
        if size == k < top:
            notes.append(f"the top {top} are all {n}")
        found[name] = Estimate(value, low, high, int(within.sum()), size, "; ".join(filter(None, notes)))
    return found


def _note(p: np.ndarray, t: np.ndarray, value: float) -> str:
    """What keeps a statistic of ``p`` and ``t`` from saying anything; "" where nothing does."""
    if len(p) == 1:
        return "one architecture has no order" if math.isnan(value) else ""
    equal = " and ".join(name for name, x in (("predictions", p), ("truths", t)) if flat(x))
    return equal and f"all {equal} are equal" + ("" if math.isnan(value) else ": no more than chance")


def intervals(measures: list[Measure], p: np.ndarray, t: np.ndarray, seed: int, rounds: int) -> list[tuple[float, float]]:
    """Percentile bootstrap: the ends that hold ``LEVEL`` of the values in resamples of the n pairs with replacement.

    All measures see the same resamples, and so do calls of equal n and seed. Resamples without spread are left out;
    nan where they are more than half.
    """
    rng = np.random.default_rng(seed)
    values = np.empty((rounds, len(measures)))
    for row in values:
        at = rng.integers(len(p), size=len(p))
        x, y = p[at], t[at]
        row[:] = [measure(x, y) for measure in measures]
    ends = []
    for column in values.T:
        kept = column[~np.isnan(column)]
        low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if 2 * len(kept) >= rounds else (math.nan, math.nan)
        ends.append((float(low), float(high)))
    return ends
