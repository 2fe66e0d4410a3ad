"""Ranking statistics by hand, against scipy and against every order of tied values."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from nas.ranking.statistics import chances, intervals, kendall, overlap, regret, spearman, statistics, true_top

P = np.array([1.0, 2.0, 2.0, 3.0])
T = np.array([1.0, 3.0, 2.0, 2.0])
X = np.array([5.0, 3.0, 3.0, 3.0, 1.0])  # three tie for two of the three best places


def tied(seed: int, n: int = 40, levels: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.integers(levels, size=n)
    return p / 10, np.round(p + 3 * rng.normal(size=n))


def test_kendall_by_hand() -> None:
    """Pairs 12, 13, 14 agree, 24 disagrees, 23 ties in p, 34 in t: (3 - 1) / sqrt(5 * 5)."""
    assert kendall(P, T) == pytest.approx(0.4, abs=1e-15)
    assert kendall(P, P) == pytest.approx(1.0, abs=1e-15) and kendall(P, -P) == pytest.approx(-1.0, abs=1e-15)


def test_spearman_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: covariance 2.25 of variances 4.5."""
    assert spearman(P, T) == pytest.approx(0.5, abs=1e-15)
    assert spearman(P, P**3) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_against_scipy_and_the_definition(seed: int) -> None:
    p, t = tied(seed)
    signs = [(np.sign(p[i] - p[j]), np.sign(t[i] - t[j])) for i, j in itertools.combinations(range(len(p)), 2)]
    numerator = sum(a * b for a, b in signs)
    assert kendall(p, t) == pytest.approx(numerator / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)))
    assert spearman(p, t) == pytest.approx(float(stats.spearmanr(p, t).statistic), rel=1e-12)


@pytest.mark.parametrize("measure", [kendall, spearman])
def test_no_spread_is_nan_without_a_warning(measure: Callable[[np.ndarray, np.ndarray], float]) -> None:
    for p, t in ((np.ones(4), T), (P, np.ones(4)), (np.ones(1), np.ones(1))):
        assert math.isnan(measure(p, t))


def test_chances_by_hand() -> None:
    assert chances(X, 3) == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3, 0])
    assert chances(X, 1).tolist() == [1, 0, 0, 0, 0] and chances(X, 4).tolist() == [1, 1, 1, 1, 0]
    assert chances(np.zeros(4), 1).tolist() == [0.25] * 4


def test_overlap_by_hand() -> None:
    """The true top 3 are the last three; two of them tie with another for two places."""
    assert overlap(X, np.array([1.0, 2, 9, 8, 7]), 3) == pytest.approx(4 / 9)
    assert overlap(X, np.array([1.0, 7, 9, 8, 7]), 3) == pytest.approx(2 / 3)  # the other 7 counts as well
    p, t = tied(1)
    for k in (1, 3, 17, 40):
        assert overlap(p, p, k) == pytest.approx(1.0) and 0 <= overlap(p, t, k) <= 1
    assert true_top(X, 2).tolist() == [True, True, True, True, False]


def test_regret_by_hand() -> None:
    """The first is sure; 2 of 2, 9, 8 join it: the best is 9 in two of three cases, else 8."""
    assert regret(X, np.array([1.0, 2, 9, 8, 7]), 3) == pytest.approx(1 / 3)
    assert regret(X, np.array([8.5, 2, 9, 8, 7]), 3) == pytest.approx(0.5 / 3)  # the sure one is better than 8
    assert regret(X, np.array([1.0, 2, 9, 8, 7]), 1) == 8.0
    assert regret(X, np.array([1.0, 2, 9, 8, 7]), 5) == 0.0
    assert regret(np.zeros(4), np.array([1.0, 2, 3, 5]), 1) == pytest.approx(5 - 11 / 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_is_the_mean_over_every_order_of_ties(seed: int, k: int) -> None:
    p, t = tied(seed, n=6, levels=3)
    best, overlaps, regrets = true_top(t, k), [], []
    for order in itertools.permutations(range(6)):
        top = sorted(range(6), key=lambda i: (-p[i], order[i]))[:k]
        overlaps.append(sum(best[i] for i in top) / k)
        regrets.append(max(t) - max(t[i] for i in top))
    assert overlap(p, t, k) == pytest.approx(np.mean(overlaps), abs=1e-12)
    assert regret(p, t, k) == pytest.approx(np.mean(regrets), abs=1e-12)


def test_an_interval_of_a_mean_is_the_normal_one() -> None:
    t = np.random.default_rng(3).normal(size=400)
    ((low, high),) = intervals([lambda p, t: float(t.mean())], t, t, seed=1, rounds=4000)
    half = 1.645 * t.std() / 20
    assert low == pytest.approx(t.mean() - half, abs=0.07 * half) and high == pytest.approx(t.mean() + half, abs=0.07 * half)


def test_resamples_are_pairs_and_follow_the_seed() -> None:
    p, t = tied(2)
    assert intervals([lambda p, t: float(np.abs(p - t).max())], p, p, 1, 50) == [(0.0, 0.0)]
    first, again, other = (statistics(p, t, seed=seed, rounds=60)["kendall_tau"] for seed in (1, 1, 2))
    assert first == again and first.value == other.value and (first.low, first.high) != (other.low, other.high)
    assert first.low < first.value < first.high
    twice = intervals([kendall, spearman], p, t, 5, 60)
    assert twice == [intervals([measure], p, t, 5, 60)[0] for measure in (kendall, spearman)]  # the same resamples


def test_resamples_without_spread_are_left_out() -> None:
    few, many = [iter([math.nan] * n + [float(i) for i in range(100 - n)]) for n in (50, 51)]
    assert intervals([lambda p, t: next(few)], P, T, 1, 100) == [(pytest.approx(2.45), pytest.approx(46.55))]
    assert all(math.isnan(end) for end in intervals([lambda p, t: next(many)], P, T, 1, 100)[0])


def test_statistics_name_their_n_and_k() -> None:
    p, t = tied(3)
    found = statistics(p, t, top=10, rounds=30)
    shapes = {name: (estimate.n, estimate.k) for name, estimate in found.items()}
    best = t >= np.sort(t)[-4]
    assert shapes == {
        "kendall_tau": (40, None), "spearman": (40, None), "overlap": (40, 10), "regret": (40, 10),
        "tenth_kendall_tau": (int(best.sum()), 4), "tenth_overlap": (40, 4), "tenth_regret": (40, 4),
    }  # fmt: skip
    assert all(estimate.note == "" and estimate.low <= estimate.high for estimate in found.values())
    assert found["tenth_kendall_tau"].value == pytest.approx(kendall(p[best], t[best]))
    assert found["overlap"].value == overlap(p, t, 10) and found["tenth_regret"].value == regret(p, t, 4)


def test_whole_numbers_are_ranked_as_they_are() -> None:
    macs = np.array([2**60, 2**60 + 1, 2**60 + 2, 2**60 + 3])  # equal as float64
    assert statistics(macs, np.arange(4), rounds=20)["kendall_tau"].value == pytest.approx(1.0)


def test_constants_are_said_in_words() -> None:
    found = statistics(np.ones(20), np.arange(20.0), top=4, rounds=30)
    for name in ("kendall_tau", "spearman", "tenth_kendall_tau"):
        estimate = found[name]
        assert all(map(math.isnan, estimate[:3])) and estimate.note == "all predictions are equal"
    assert found["overlap"].value == pytest.approx(0.2) and found["overlap"].note.endswith("no more than chance")
    both = statistics(np.ones(20), np.ones(20), rounds=30)["spearman"]
    assert both.note == "all predictions and truths are equal"
    best = (np.arange(12) == 11).astype(float)  # its top two differ where a resample holds it exactly once: 0.38 of them
    pair = statistics(best, np.arange(12), rounds=200)["tenth_kendall_tau"]
    assert pair.value == pytest.approx(1.0) and math.isnan(pair.low)
    assert pair.note == "no interval: most resamples have no spread"
    few = statistics(np.arange(5.0), np.arange(5.0), top=10, rounds=30)
    assert math.isnan(few["tenth_kendall_tau"].value) and few["tenth_kendall_tau"].note == "one architecture has no order"
    assert few["overlap"].k == 5 and few["overlap"].note == "the top 10 are all 5" and few["kendall_tau"].note == ""


@pytest.mark.parametrize(("p", "t", "top", "words"), [
    ([1, 2], [1, 2], 10, "needs 3 architectures or more; given: 2"),
    ([1, 2, 3], [1, 2], 10, "predictions have shape"),
    ([1, 2, math.nan], [1, 2, 3], 10, "must be finite"),
    ([1, 2, 3], [1, math.inf, 3], 10, "must be finite"),
    ([1, 2, 3], [1, 2, 3], 0, "top = 0"),
])  # fmt: skip
def test_what_cannot_be_ranked(p: list[float], t: list[float], top: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        statistics(np.array(p), np.array(t), top)
