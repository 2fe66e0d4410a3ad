"""tau-b within bins of MACs, and differences of tau-b on the same resamples, by hand and against their definitions."""
from __future__ import annotations

import math

import numpy as np
import pytest

from nas.ranking.bins import binned, bins_of
from nas.ranking.compare import Bin, compare, how_many
from nas.ranking.statistics import differences, ends, intervals, kendall, resampled_taus, resamples, spearman, statistics

T = np.array([1.0, 2, 3, 4, 1, 2, 3, 2, 2])
P = np.array([1.0, 2, 4, 3, 3, 2, 1, 1, 2])  # in bins of 4, 3 and 2: (5 - 1) / 6, -1, none
OF = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])


def noisy(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two predictions and a truth, all with ties."""
    rng = np.random.default_rng(seed)
    t = rng.integers(8, size=n)
    return t + rng.integers(4, size=n), t + rng.integers(12, size=n), t / 8


# ---- bins ----------------------------------------------------------------------------------------------------------


def test_bins_hold_equally_many() -> None:
    assert bins_of(np.array([30, 10, 60, 20, 50, 40]), 3).tolist() == [1, 0, 2, 0, 2, 1]
    for n in (30, 32, 199):
        sizes = np.bincount(bins_of(np.random.default_rng(n).permutation(n), 5))
        assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1
    assert bins_of(np.arange(7), 1).tolist() == [0] * 7


def test_equal_macs_stay_together() -> None:
    """Of 8 in 2 bins, the five of 20 MACs lie at places 2 to 6, their middle one at 4: beyond the half."""
    assert bins_of(np.array([10, 10, 20, 20, 20, 20, 20, 30]), 2).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert bins_of(np.array([10, 20, 20, 20, 20, 20, 30, 30]), 2).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert bins_of(np.array([5, 5, 5]), 5).tolist() == [0, 0, 0]
    assert bins_of(np.array([1, 1, 1, 9]), 4).tolist() == [0, 0, 0, 1]  # no empty bin between
    macs = np.random.default_rng(1).integers(20, size=200)
    of = bins_of(macs, 5)
    assert all(len(set(of[macs == value])) == 1 for value in set(macs.tolist()))
    assert all(macs[of == b].max() < macs[of == b + 1].min() for b in range(of.max()))


def test_tau_in_bins_and_its_mean_by_hand() -> None:
    found = binned({"p": P, "flat": np.where(OF == 1, 1.0, P)}, T, OF, seed=1, rounds=50)
    first, second, few = found["p"].bins
    assert [b.value for b in (first, second)] == pytest.approx([2 / 3, -1]) and [b.n for b in found["p"].bins] == [4, 3, 2]
    assert math.isnan(few.value) and few.note == "a tau-b needs 3 architectures"
    mean = found["p"].mean
    assert mean.value == pytest.approx((4 * 2 / 3 - 3) / 7) and mean.n == 7 and mean.note.startswith("1 of 3 bins have none")
    flat = found["flat"]
    assert flat.bins[1].note == "all predictions are equal" and math.isnan(flat.bins[1].value)
    assert (flat.mean.value, flat.mean.n) == (pytest.approx(2 / 3), 4) and flat.mean.note.startswith("2 of 3 bins have none")
    none = binned({"p": P}, np.ones(9), OF, seed=1, rounds=50)["p"]
    assert math.isnan(none.mean.value) and none.mean.n == 0 and none.mean.note == "no bin has a tau-b"


def test_intervals_of_bins_resample_within_them() -> None:
    p, _, t = noisy(1)
    of = np.arange(40) % 2
    found = binned({"p": p, "t": t}, t, of, seed=3, rounds=200)
    drawn = [resampled_taus([p[of == b]], t[of == b], [3, b], 200)[:, 0] for b in (0, 1)]
    for b in (0, 1):
        assert (found["p"].bins[b].low, found["p"].bins[b].high) == ends(drawn[b])
    low, high = ends((drawn[0] + drawn[1]) / 2)
    assert (found["p"].mean.low, found["p"].mean.high) == (pytest.approx(low), pytest.approx(high))
    assert found["t"].mean[:3] == pytest.approx((1, 1, 1)) and low < found["p"].mean.value < high
    assert not np.array_equal(drawn[0], drawn[1])  # bins are drawn independently of each other


# ---- differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 40, 1001])
def test_resampled_taus_are_taus_of_resamples(n: int) -> None:
    """Both ways of computing: by all pairs, and above 1,000 one by one."""
    p, q, t = noisy(2, n)
    found = resampled_taus([p, q, np.ones(n)], t, 5, 20)
    assert found.shape == (20, 3) and np.isnan(found[:, 2]).all()
    for row, at in zip(found, resamples(n, 5, 20)):
        assert row[:2].tolist() == pytest.approx([kendall(p[at], t[at]), kendall(q[at], t[at])], abs=1e-12)


def test_whole_numbers_are_compared_as_they_are() -> None:
    macs = np.array([2**60, 2**60 + 1, 2**60 + 2, 2**60 + 3])  # equal as float64
    drawn = resampled_taus([macs], np.arange(4), 1, 20)
    assert np.nanmin(drawn) == pytest.approx(1.0)


def test_a_difference_is_paired() -> None:
    p, q, t = noisy(3)
    found = differences({"p": p, "q": q, "twin": 2 * p + 1, "minus": -q}, t, seed=4, rounds=300)
    assert list(found) == [("p", "q"), ("p", "twin"), ("p", "minus"), ("q", "twin"), ("q", "minus"), ("twin", "minus")]
    by = found["p", "q"]
    assert by.value == pytest.approx(kendall(p, t) - kendall(q, t)) and (by.n, by.note) == (40, "")
    pairs = [kendall(p[at], t[at]) - kendall(q[at], t[at]) for at in resamples(40, 4, 300)]
    assert (by.low, by.high) == pytest.approx(tuple(np.quantile(pairs, [0.05, 0.95])))
    assert found["p", "twin"][:3] == (0, 0, 0)  # unpaired, it would be as wide as two intervals
    assert found["q", "minus"].value == pytest.approx(2 * kendall(q, t))
    (alone,) = intervals([kendall], q, t, 4, 300)
    assert (found["q", "minus"].low, found["q", "minus"].high) == pytest.approx((2 * alone[0], 2 * alone[1]))


def test_a_difference_to_nothing_says_so() -> None:
    p, _, t = noisy(4)
    by = differences({"p": p, "flat": np.ones(40)}, t, rounds=20)["p", "flat"]
    assert math.isnan(by.value) and math.isnan(by.low) and by.note == "flat: all predictions are equal"


# ---- side by side --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_of_two() -> None:
    p, q, t = noisy(5)
    macs = np.arange(40) // 4 * 1000  # ten values, four of each
    found = compare({"a": p, "b": q}, {"macs": macs, "params": macs[::-1]}, t, top=3, bins=5, seed=6)
    assert list(found.rankers) == ["a", "b", "macs", "params"] and list(found.given) == ["a", "b"]
    assert found.statistics["b"] == statistics(q, t, 3, 6)
    assert list(found.differences) == [("a", "b"), ("a", "macs"), ("a", "params"), ("b", "macs"), ("b", "params")]
    assert found.bins == [Bin(8, 2000 * b, 2000 * b + 1000) for b in range(5)]
    assert [by.value for by in found.binned["b"].bins] == [kendall(q[i : i + 8], t[i : i + 8]) for i in range(0, 40, 8)]
    taus = [kendall(p[i : i + 8], t[i : i + 8]) for i in range(0, 40, 8)]
    assert found.binned["a"].mean.value == pytest.approx(np.mean(taus))
    for off in (compare({"a": p}, {}, t), compare({"a": p}, {"macs": macs, "params": macs}, t, bins=0)):
        assert off.bins == [] and off.binned == {} and off.statistics["a"]["spearman"].value == spearman(p, t)


def test_how_many_bins() -> None:
    assert [how_many(None, n, True) for n in (49, 50, 500)] == [0, 5, 5] and how_many(None, 500, False) == 0
    assert how_many(3, 5, True) == 3 and how_many(0, 500, False) == how_many(0, 500, True) == 0
    with pytest.raises(ValueError, match=r"--bins 4: the MACs of these architectures are not known. Name a run"):
        how_many(4, 100, False)
