"""Attentive sampling in a space small enough to be written out: p(t), the marginals, and what is drawn from them; mutants.

Letters: t the number of a bin, p(t) its share among random architectures, K options of a choice.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from nas.bins import Bins, bin_width
from nas.cost import CostTable
from search_spaces.nats import Topology as CellSpace
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, Choice, SearchSpace
from supernets.nats import Topology as CellNet
from supernets.resnet import ResNet

WIDTH, SAMPLES, WRONG = "1.5%", 20_000, "WRONG"


def small() -> tuple[SearchSpace, CostTable]:
    """294 settings of the last stage: a width, a depth of 1 or 2, two inner widths, one of them inert at depth 1."""
    space = CifarResNet(14, "tied", widths=(4, 6, 8))
    with torch.device("meta"):
        net = ResNet(space, channels=1)
    fixed = {c.name: c.options[:1] for c in space.choices if not c.name.startswith("stage2")}
    return space.restrict({**fixed, "stage2.width": (2, 4, 8)}), CostTable(net, (8, 8))


SPACE, COSTS = small()


def settings(space: SearchSpace) -> list[Arch]:
    """Every combination of options, inert ones and all: what uniform genes meet, each as often."""
    return [dict(zip((c.name for c in space.choices), values)) for values in product(*(c.options for c in space.choices))]


def bin_of(arch: Mapping[str, Any]) -> int:
    return round(COSTS.of(SPACE.canonical(arch)) / bin_width(WIDTH, COSTS, SPACE))


ALL = settings(SPACE)
SHARE = {t: n / len(ALL) for t, n in Counter(map(bin_of, ALL)).items()}


def fit(counts: Mapping[Any, int], odds: Mapping[Any, float]) -> float:
    """The p-value of a chi-square test, cells of fewer than five expected taken together; 0 for what is impossible."""
    n = sum(counts.values())
    if any(counts[key] and not odds.get(key) for key in counts):
        return 0.0
    if len(odds) == 1:
        return 1.0
    rare = [key for key, p in odds.items() if n * p < 5]
    cells = [(counts.get(key, 0), n * p) for key, p in odds.items() if n * p >= 5]
    cells += [(sum(counts.get(key, 0) for key in rare), n * sum(odds[key] for key in rare))] if rare else []
    return float(chi2.sf(sum((met - e) ** 2 / e for met, e in cells if e), len(cells) - 1))


def started(**given: Any) -> Bins:
    return Bins(SPACE, COSTS, **{"width": WIDTH, "samples": SAMPLES, **given})


def test_the_case_is_worth_testing() -> None:
    assert len(ALL) == 294 and len(SHARE) >= 5 and max(SHARE.values()) < 0.5
    assert any("stage2.block1.conv0.width" not in SPACE.counting(arch) for arch in ALL)


def test_the_bins_are_counted() -> None:
    bins = started()
    assert bins.counts.sum() == SAMPLES and bins.bins.tolist() == sorted(SHARE)
    met = dict(zip(bins.bins.tolist(), bins.counts.tolist()))
    assert fit(met, SHARE) > 1e-3 and bins.odds.tolist() == pytest.approx([SHARE[t] for t in sorted(SHARE)], abs=0.02)
    codes = SPACE.encode(ALL)
    assert bins.of(codes).tolist() == [bin_of(arch) for arch in ALL]


def test_marginals_are_of_the_choices_that_count() -> None:
    bins = started()
    for i, t in enumerate(bins.bins.tolist()):
        inside = [arch for arch in ALL if bin_of(arch) == t]
        for m, choice in enumerate(SPACE.choices):
            live = [arch for arch in inside if choice.name in SPACE.counting(arch)]
            met = {option: int(bins.genes[i, m, k]) for k, option in enumerate(SPACE.root.choices[m].options)}
            if live:
                odds = {option: n / len(live) for option, n in Counter(arch[choice.name] for arch in live).items()}
                assert fit(met, odds) > 1e-4, (t, choice.name)
                assert sum(met.values()) <= bins.counts[i]
            else:  # counts nowhere in this bin: whatever is allowed
                assert met == {option: int(option in choice.options) for option in met}
    some = [t for t in SHARE if all("stage2.block1.conv0.width" not in SPACE.counting(a) for a in ALL if bin_of(a) == t)]
    assert some  # so the second case was met


# -- what is drawn ------------------------------------------------------------------------------------------------------


def expected(bins: Bins, t: int) -> dict[Any, float]:
    """Key of an architecture -> its share of the draws from bin t: a product of marginals, given that its own bin is t."""
    genes = bins.genes[bins.bins.tolist().index(t)]
    odds: dict[Any, float] = {}
    for arch in ALL:
        if bin_of(arch) == t:
            p = 1.0
            for m, choice in enumerate(SPACE.root.choices):
                p *= genes[m, choice.options.index(arch[choice.name])] / genes[m].sum()
            odds[SPACE.key(arch)] = odds.get(SPACE.key(arch), 0.0) + p
    return {key: p / sum(odds.values()) for key, p in odds.items()}


def drawn(bins: Bins, n: int = 6000) -> list[Arch]:
    rng = random.Random(5)
    return [bins.draw(rng)[0] for _ in range(n)]


def keeps_the_law(mutate: Callable[[Bins], None] = lambda bins: None) -> None:
    """Bins by p(t), and within the two most likely ones, architectures by the marginals. AssertionError, saying WRONG."""
    bins, law = started(), started()
    mutate(bins)
    archs = drawn(bins)
    assert fit(Counter(map(bin_of, archs)), dict(zip(law.bins.tolist(), law.odds.tolist()))) > 1e-3, WRONG
    for t in sorted(SHARE, key=lambda t: -SHARE[t])[:3]:
        inside = Counter(SPACE.key(arch) for arch in archs if bin_of(arch) == t)
        assert fit(inside, expected(law, t)) > 1e-3, WRONG


@pytest.mark.slow
def test_draws_keep_the_law() -> None:
    keeps_the_law()


def equal_bins(bins: Bins) -> None:
    bins.counts = np.ones_like(bins.counts)


def uniform_genes(bins: Bins) -> None:
    bins.genes = np.broadcast_to(bins.genes.sum(axis=0) > 0, bins.genes.shape).astype(np.int64)


def anothers_genes(bins: Bins) -> None:
    bins.genes = bins.genes[::-1]


def never_again(bins: Bins) -> None:
    bins.tries = 1


def rounded_down(bins: Bins) -> None:
    bins.of = lambda codes: (COSTS.batch(codes) // bins.width).astype(np.int64)  # type: ignore[method-assign]


@pytest.mark.parametrize("mutant", [equal_bins, uniform_genes, anothers_genes, never_again, rounded_down],
                         ids=lambda mutant: mutant.__name__)  # fmt: skip
def test_a_mutant_fails(mutant: Callable[[Bins], None]) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        keeps_the_law(mutant)


def test_candidates_share_a_bin() -> None:
    bins, rng, met = started(), random.Random(2), set()
    for _ in range(50):
        archs = bins.draw(rng, 6)
        assert len(archs) == 6 and len({bin_of(arch) for arch in archs}) == 1
        met |= {bin_of(archs[0])}
        assert all(list(arch.items()) == list(SPACE.canonical(arch).items()) for arch in archs)
    assert len(met) > 3


def test_the_last_candidate_is_taken_where_none_hits() -> None:
    """Marginals that cannot hit: bin 0's genes are those of the largest network."""
    bins = started(tries=4)
    bins.counts = np.where(np.arange(len(bins.bins)) == 0, 1, 0)
    bins.genes = bins.genes.copy()
    bins.genes[0] = 0
    bins.genes[0, np.arange(len(SPACE.choices)), SPACE.encode([SPACE.largest()])[0]] = 1
    assert bins.draw(random.Random(1), 3) == [SPACE.largest()] * 3 and bin_of(SPACE.largest()) != bins.bins[0]


def test_ties_and_restrictions_are_respected() -> None:
    """A follower outside its leader's list, a restriction of an inert choice: legal, and everything legal is met."""
    some = SPACE.restrict({"stage2.block1.conv0.width": (3, 8), "stage2.width": (2, 8)})
    inner = SPACE.root["stage2.block0.conv0.width"].options
    tied = some.tie("stage2.block0.conv0.width", "stage2.width", {2: inner[0], 8: inner[-1]})
    bins, rng = Bins(tied, COSTS, WIDTH, SAMPLES), random.Random(0)
    met = Counter[Any]()
    for arch in (bins.draw(rng)[0] for _ in range(300)):
        tied.check(arch)
        assert arch["stage2.block0.conv0.width"] == {2: inner[0], 8: inner[-1]}[int(arch["stage2.width"])]
        assert arch["stage2.depth"] == 2 or arch["stage2.block1.conv0.width"] == inner[0]  # inert: the root's first
        met[tied.key(arch)] += 1
    assert set(met) == {tied.key(arch) for arch in settings(tied) if arch == tied._follow(dict(arch))}


# -- one run, every rank, any resumption --------------------------------------------------------------------------------


def test_equal_seeds_draw_alike_and_others_do_not() -> None:
    one, two, other = started(), started(), started(seed=1)
    assert np.array_equal(one.genes, two.genes) and not np.array_equal(one.genes, other.genes)
    a, b, c = (bins.draw(random.Random(seed), 40) for bins, seed in ((one, 3), (two, 3), (two, 4)))
    assert a == b and a != c
    state = torch.random.get_rng_state()
    np.random.seed(0)
    before = np.random.random()
    np.random.seed(0)
    started().draw(random.Random(3), 4)
    assert torch.equal(torch.random.get_rng_state(), state) and np.random.random() == before  # nothing of global streams


def test_what_was_counted_is_saved() -> None:
    one, other = started(), started(seed=1)
    state = one.state_dict()
    assert all(value.dtype == torch.int64 for value in state.values())
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert one.draw(random.Random(3), 20) == other.draw(random.Random(3), 20)
    one.genes += 1  # the state is a copy
    assert not np.array_equal(state["genes"].numpy(), one.genes)
    with pytest.raises(ValueError, match="Resume with the space that the run began with"):
        other.load_state_dict({**state, "genes": state["genes"][:, 1:]})


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_widths_are_shares_or_numbers() -> None:
    full = COSTS.of(SPACE.root.largest())
    assert bin_width("10%", COSTS, SPACE) == pytest.approx(full / 10) == bin_width(full / 10, COSTS, SPACE)
    assert bin_width("2500", COSTS, SPACE) == 2500 == bin_width("0.0025M", COSTS, SPACE)
    for wrong in ("0%", 0, -3.0, "nan", "inf"):
        with pytest.raises(ValueError, match="Allowed: a share such as 2%, or a number above 0"):
            bin_width(wrong, COSTS, SPACE)
    with pytest.raises(ValueError, match="bins: width = 'much' is not a budget"):
        bin_width("much", COSTS, SPACE)


def test_other_values_are_refused() -> None:
    for wrong in ({"samples": 0}, {"tries": 0}):
        with pytest.raises(ValueError, match=r"Allowed: 1 or more\."):
            started(**wrong)
    with pytest.raises(ValueError, match="k = 0 candidates"):
        started().draw(random.Random(0), 0)
    with pytest.raises(ValueError, match=r"puts all architectures .* into one bin.* such as 2%"):
        started(width=25e6)
    space = CellSpace(4, 1)
    with pytest.raises(ValueError, match="forbids some combinations"):
        Bins(space, CostTable(CellNet(space, 1, 10), (8, 8)), "5%")


def test_a_space_of_one_architecture_has_one_bin() -> None:
    single = SPACE.restrict({c.name: c.options[-1:] for c in SPACE.choices})
    assert Bins(single, COSTS, 25e6, 10).draw(random.Random(0), 2) == [single.largest()] * 2


def test_a_chain_of_needs_counts_where_all_of_it_holds() -> None:
    """c counts where b counts and is 2, b where a is 2."""
    choices = [Choice("c", (1, 2, 3), needs=(("b", (2,)),)), Choice("a", (1, 2)), Choice("b", (1, 2), needs=(("a", (2,)),))]
    space = SearchSpace(choices, {})

    class Free:
        def batch(self, codes: np.ndarray) -> np.ndarray:
            return codes[:, 1] * 10  # bins by a alone

        def of(self, arch: Arch) -> int:
            return 10 * (int(arch["a"]) - 1)

    bins = Bins(space, Free(), 10, 6000)  # type: ignore[arg-type]
    assert bins.bins.tolist() == [0, 1]
    assert bins.genes[0].tolist() == [[1, 1, 1], [bins.counts[0], 0, 0], [1, 1, 0]]
    of_c, of_a, of_b = bins.genes[1]
    assert of_a.tolist() == [0, bins.counts[1], 0] and of_b.sum() == bins.counts[1] and of_c.sum() == of_b[1]
    assert all(n == pytest.approx(of_c.sum() / 3, rel=0.15) for n in of_c)
