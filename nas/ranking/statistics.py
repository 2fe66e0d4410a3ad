"""How well predictions rank architectures: Kendall's tau-b, Spearman's rho, top-k overlap and regret, with intervals.

Equal n and seed are resampled alike: intervals of several rankers, and of their differences, are paired.

``p`` are predictions and ``t`` truths of the same ``n`` architectures, (n,) each, finite; higher is better in both. Tied
values have no order: tau-b discounts them, rho gives them their mean rank, a predicted top k is an expectation over their
random order, and a true top k holds all that tie with its last.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

Measure = Callable[[np.ndarray, np.ndarray], float]
LEVEL = 0.9  # of the bootstrap intervals
FEWEST = 3  # architectures that a ranking needs
Seed = int | Sequence[int]
_PAIRWISE = 1000  # architectures up to which a matrix of all pairs is faster than a sort for every resample


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
    bounds = intervals([measure for _, measure, _, _ in rows], p, t, seed, rounds or rounds_of(n))
    found = {}
    for (name, measure, within, size), (low, high) in zip(rows, bounds):
        value = measure(p, t)
        notes = [note(p[within], t[within], value), unsure(value, low)]
        if size == k < top:
            notes.append(f"the top {top} are all {n}")
        found[name] = Estimate(value, low, high, int(within.sum()), size, "; ".join(filter(None, notes)))
    return found


def differences(
    rankers: Mapping[str, np.ndarray], t: np.ndarray, seed: Seed = 1, rounds: int | None = None
) -> dict[tuple[str, str], Estimate]:
    """(a, b) -> tau-b of ranker a less that of b, which comes later: on the same resamples, those of ``statistics``."""
    taus = resampled_taus(list(rankers.values()), t, seed, rounds or rounds_of(len(t)))
    values = {name: kendall(p, t) for name, p in rankers.items()}
    found = {}
    for (i, a), (j, b) in combinations(enumerate(rankers), 2):
        value, (low, high) = values[a] - values[b], ends(taus[:, i] - taus[:, j])
        odd = "; ".join(f"{name}: {said}" for name in (a, b) if (said := note(rankers[name], t, values[name])))
        found[a, b] = Estimate(value, low, high, len(t), note=odd or unsure(value, low))
    return found


def unsure(value: float, low: float) -> str:
    """What to say of a ``value`` whose interval begins at ``low``; "" where it has one, or where there is no value."""
    return "no interval: most resamples have no spread" if math.isnan(low) and not math.isnan(value) else ""


def note(p: np.ndarray, t: np.ndarray, value: float) -> str:
    """What keeps a statistic of ``p`` and ``t`` from saying anything; "" where nothing does."""
    if len(p) == 1:
        return "one architecture has no order" if math.isnan(value) else ""
    equal = " and ".join(name for name, x in (("predictions", p), ("truths", t)) if flat(x))
    return equal and f"all {equal} are equal" + ("" if math.isnan(value) else ": no more than chance")


def rounds_of(n: int) -> int:
    """Resamples behind an interval of ``n`` architectures."""
    return 1000 if n <= 5000 else 200


def resamples(n: int, seed: Seed, rounds: int) -> Iterator[np.ndarray]:
    """``rounds`` draws (n,) of n positions with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield rng.integers(n, size=n)


def intervals(measures: list[Measure], p: np.ndarray, t: np.ndarray, seed: Seed, rounds: int) -> list[tuple[float, float]]:
    """``ends`` of every measure in resamples of the n pairs with replacement (percentile bootstrap).

    All measures see the same resamples, and so do calls of equal n and seed.
    """
    values = [[measure(p[at], t[at]) for measure in measures] for at in resamples(len(p), seed, rounds)]
    return [ends(column) for column in np.array(values).T]


def ends(values: np.ndarray) -> tuple[float, float]:
    """What holds ``LEVEL`` of the ``values`` (rounds,) of resamples. Those without spread, nan, are left out; nan where they
    are more than half."""
    kept = values[~np.isnan(values)]
    if 2 * len(kept) < len(values):
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled_taus(ps: Sequence[np.ndarray], t: np.ndarray, seed: Seed, rounds: int) -> np.ndarray:
    """(rounds, len(ps)): tau-b of every one of ``ps`` (n,) against ``t`` (n,) in the same resamples; nan where either has no
    spread."""
    n = len(t)
    if n > _PAIRWISE:
        return np.array([[kendall(p[at], t[at]) for p in ps] for at in resamples(n, seed, rounds)])
    times = np.array([np.bincount(at, minlength=n) for at in resamples(n, seed, rounds)], dtype=float)  # (rounds, n)

    def pairs(signs: np.ndarray) -> np.ndarray:  # (n, n) -> (rounds,): their sum over a resample's ordered pairs, exactly
        return ((times @ signs) * times).sum(1)

    order = np.sign(np.subtract.outer(t, t)).astype(float)
    untied, found = pairs(np.abs(order)), np.empty((rounds, len(ps)))
    for column, p in zip(found.T, ps):
        mine = np.sign(np.subtract.outer(p, p)).astype(float)
        both = pairs(np.abs(mine)) * untied
        column[:] = np.where(both > 0, pairs(mine * order) / np.sqrt(np.maximum(both, 1)), math.nan)
    return found
