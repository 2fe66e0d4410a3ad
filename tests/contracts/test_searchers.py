"""What every searcher promises, checked for each entry of SEARCHERS in each of SPACES: a new entry inherits every test."""
from __future__ import annotations

import functools
import io
import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from nas.cost import CostTable, params
from nas.searchers.coarse_to_fine import CoarseToFine
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from search_spaces import macro, nats
from search_spaces.resnet import CifarResNet
from search_spaces.space import SearchSpace
from supernets.macro import ConvMacro
from supernets.nats import Topology
from supernets.resnet import ResNet

SEARCHERS: dict[str, Callable[..., Any]] = {
    "random": functools.partial(Random, trials=60),
    "evolution": functools.partial(Evolution, population=20, parents=6, mutations=10, crossovers=10, generations=6),
    "evolution-bins": functools.partial(
        Evolution, population=20, mutations=10, crossovers=10, mutation=0.2, generations=6, bins=1e5
    ),
    "coarse-to-fine": functools.partial(CoarseToFine, rounds=4, changes=15, mutation=0.3, skeletons=2),
}


class Place(NamedTuple):
    """A (restricted) space, its cost tables and a window that some of its architectures meet and some do not."""

    space: SearchSpace
    costs: dict[str, CostTable]
    limits: list[tuple[str, float, float]]


@functools.cache
def place(name: str) -> Place:
    space: SearchSpace
    net: nn.Module
    if name == "resnet":  # without the two narrowest widths of stage 0
        whole = CifarResNet(8)
        space, net, size = whole.restrict({"stage0.width": whole["stage0.width"].options[2:]}), ResNet(whole), (8, 8)
    elif name == "depths":  # inert choices: blocks that a depth leaves out
        whole = CifarResNet(14, "tas")
        last = "stage2.block1.conv1.width"
        space, net, size = whole.restrict({last: whole[last].options[3:]}), ResNet(whole), (8, 8)
    elif name == "topology":
        cells = nats.Topology(C=4, N=1)
        space, net, size = cells.restrict({cells.free[0]: cells[cells.free[0]].options[1:4]}), Topology(cells), (8, 8)
    else:
        chain = macro.ConvMacro()
        space = chain.restrict({"c1": (16, 32)}).tie("k2", "k1", {3: 3, 5: 5, 7: 5})
        net, size = ConvMacro(chain), (32, 32)
    costs = {"macs": CostTable(net, size), "params": CostTable(net, size, params)}
    rng = random.Random(0)
    macs = sorted(costs["macs"].of(space.sample(rng)) for _ in range(200))
    return Place(space, costs, [("macs", macs[60], macs[140]), ("params", 0, costs["params"].of(space.largest()))])


SPACES = ["resnet", "depths", "topology", "macro"]


@pytest.fixture(params=SPACES)
def at(request: pytest.FixtureRequest) -> Place:
    return place(request.param)


@pytest.fixture(params=list(SEARCHERS))
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return SEARCHERS[request.param]


def score(codes: np.ndarray) -> np.ndarray:
    """(N, M) -> (N,): a smooth part and a rough one; rounded, or a code's last bit would depend on those beside it."""
    weights = np.cos(np.arange(codes.shape[1]) + 1.0)
    return np.round(codes @ weights + 0.3 * np.sin(codes @ (17.0 * weights + 3.0)), 6)


def started(make: Callable[..., Any], at: Place, **own: Any) -> Any:
    searcher = make(**own)
    searcher.start(at.space, at.costs, at.limits)
    return searcher


def run(searcher: Any, n: int = 7, asks: int = 10_000) -> np.ndarray:
    """Asks and tells to the end, or ``asks`` times; all that was asked (N, M)."""
    asked = [searcher.ask(1)[:0]]
    for _ in range(asks):
        codes = searcher.ask(n)
        if not len(codes):
            break
        searcher.tell(codes, score(codes))
        asked.append(codes)
    return np.concatenate(asked)


def test_every_candidate_is_canonical_in_the_space_and_within_the_limits(make: Callable[..., Any], at: Place) -> None:
    codes = run(started(make, at))
    assert len(codes) > 20 and np.array_equal(codes, at.space.canonical_codes(codes))
    assert at.space.lawful(codes).all()  # no cell that sampling would not draw, so none that was never trained
    for arch in at.space.decode(codes):
        at.space.check(arch)
        for price, low, high in at.limits:
            assert low <= at.costs[price].of(arch) <= high


def test_nothing_is_asked_twice(make: Callable[..., Any], at: Place) -> None:
    codes = run(started(make, at))
    assert len({at.space.key(arch) for arch in at.space.decode(codes)}) == len(codes)


def test_what_is_known_is_never_asked_and_keeps_its_score(make: Callable[..., Any], at: Place) -> None:
    first = started(make, at)
    told = first.ask(10)
    searcher = started(make, at)
    searcher.tell(told, np.full(len(told), -100.0))
    codes = run(searcher)
    assert not {at.space.key(arch) for arch in at.space.decode(told)} & {at.space.key(arch) for arch in at.space.decode(codes)}
    searcher.tell(told, np.zeros(len(told)))
    assert (searcher.known(told) == -100.0).all()
    assert np.array_equal(searcher.known(codes), score(codes))


def test_asking_again_or_for_more_at_once_changes_nothing(make: Callable[..., Any], at: Place) -> None:
    searcher = started(make, at)
    assert np.array_equal(searcher.ask(5), searcher.ask(5))
    assert np.array_equal(searcher.ask(9)[:5], searcher.ask(5))
    assert np.array_equal(run(searcher, 3), run(started(make, at), 1000))


def test_the_seed_decides(make: Callable[..., Any], at: Place) -> None:
    one, same, other = (run(started(make, at, seed=seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("asks", [0, 1, 4, 8])
def test_resumed_equals_uninterrupted(make: Callable[..., Any], at: Place, asks: int) -> None:
    whole = started(make, at)
    expected = run(whole)
    begun = started(make, at)
    before = run(begun, asks=asks)
    begun.ask(3)  # killed with three under way
    file = io.BytesIO()
    torch.save(begun.state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    run(begun)  # the state is a copy
    resumed = started(make, at)
    resumed.load(state)
    assert np.array_equal(np.concatenate([before, run(resumed)]), expected)
    assert resumed.best() == whole.best() and resumed.front("macs") == whole.front("macs")


def test_a_state_of_another_search_is_refused(make: Callable[..., Any], at: Place) -> None:
    state = started(make, at).state()
    other = make()
    other.start(at.space, at.costs, [])
    for searcher, word in ((started(make, at, seed=5), "seed"), (other, "limits")):
        with pytest.raises(ValueError, match=word):
            searcher.load(state)


def test_best_and_front(make: Callable[..., Any], at: Place) -> None:
    searcher = started(make, at)
    assert searcher.best() is None and searcher.front("macs") == []
    codes = run(searcher)
    best = searcher.best()
    assert best.score == score(codes).max() and best.costs == {name: table.of(best.arch) for name, table in at.costs.items()}
    cost, scores = at.costs["macs"].batch(codes), score(codes)
    beaten = ((cost[None] <= cost[:, None]) & (scores[None] >= scores[:, None])
              & ((cost[None] < cost[:, None]) | (scores[None] > scores[:, None]))).any(1)  # fmt: skip
    front = searcher.front("macs")
    assert [(f.costs["macs"], f.score) for f in front] == sorted(set(zip(cost[~beaten].tolist(), scores[~beaten].tolist())))
    assert front[-1].arch == best.arch


def test_what_misses_the_limits_is_never_best(make: Callable[..., Any], at: Place) -> None:
    searcher = started(make, at)
    dear = at.space.encode([at.space.largest()])
    searcher.tell(dear, np.array([1e6]))
    run(searcher)
    assert searcher.best().score < 1e6 and all(found.score < 1e6 for found in searcher.front("macs"))


def test_bad_tellings_are_refused(make: Callable[..., Any], at: Place) -> None:
    searcher = started(make, at)
    codes = at.space.random_codes(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="one score for each"):
        searcher.tell(codes, np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        searcher.tell(codes, np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="Codes"):
        searcher.tell(codes[:, 1:], np.zeros(2))
    root = at.space.root
    outside = next(arch for arch in (root.sample(random.Random(i)) for i in itertools.count()) if not inside(at.space, arch))
    with pytest.raises(ValueError, match="Allowed"):
        searcher.tell(root.encode([outside]), np.zeros(1))
    assert searcher.best() is None


def inside(space: SearchSpace, arch: Any) -> bool:
    try:
        space.check(arch)
    except ValueError:
        return False
    return True


def test_limits_that_cannot_be_met_are_refused_at_the_start(make: Callable[..., Any], at: Place) -> None:
    for limits, words in (
        ([("macs", 0, 1)], "No architecture was found"),
        ([("macs", 2, 1)], "low <= high"),
        ([("latency", 0, 1)], "no cost table"),
    ):
        with pytest.raises(ValueError, match=words):
            make().start(at.space, at.costs, limits)


def test_a_window_that_random_draws_miss_is_found(make: Callable[..., Any]) -> None:
    """Of the ResNet's cheap corner: of 4096 random draws none."""
    at = place("depths")
    small = at.costs["macs"].of(at.space.smallest())
    narrow = at._replace(limits=[("macs", small, 1.01 * small)])
    assert not (at.costs["macs"].batch(at.space.random_codes(np.random.default_rng(0), 4096)) <= 1.01 * small).any()
    codes = run(started(make, narrow))
    assert len(codes) and (at.costs["macs"].batch(codes) <= 1.01 * small).all()


# -- finding what there is ------------------------------------------------------------------------------------------------


def everything(at: Place) -> np.ndarray:
    """All codes of the space that meet the limits."""
    axes = [[at.space.root[choice.name].options.index(option) for option in choice.options] for choice in at.space.choices]
    archs = at.space.decode(np.array(list(itertools.product(*axes)), dtype=np.int16))
    codes = at.space.encode([arch for arch in archs if inside(at.space, arch)])
    for price, low, high in at.limits:
        cost = at.costs[price].batch(codes)
        codes = codes[(cost >= low) & (cost <= high)]
    return codes


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["topology", "macro"])
def test_evolution_finds_the_best_of_all_with_a_fifth_of_the_evaluations(name: str, seed: int) -> None:
    at = place(name)
    if name == "macro":  # half of 1458 rather than a third
        at = at._replace(limits=[("macs", 0, at.limits[0][2])])
    codes = everything(at)
    make = functools.partial(Evolution, population=30, parents=10, mutations=10, crossovers=10, mutation=0.2)
    searcher = started(make, at, generations=8, seed=seed)
    asked = run(searcher, 100)
    assert len(asked) < len(codes) / 5
    assert searcher.best().score == score(codes).max()


def test_evolution_goes_on_from_what_it_was_told() -> None:
    """The best of all, told beforehand, is the one parent of a generation, whoever is in the population of one: its mutants
    hold every neighbour that is one gene away, and lie nearer to it than to that other one."""
    at = place("macro")
    codes = everything(at)
    top = codes[[score(codes).argmax()]]
    searcher = started(functools.partial(Evolution, population=1, parents=1, crossovers=0), at)
    searcher.tell(top, score(top))
    other = run(searcher, asks=1)
    children = searcher.ask(50)
    words = {row.tobytes() for row in children}
    assert len(other) == 1 and 10 < len(children) == len(words) <= 50
    neighbours = codes[(codes != top).sum(1) == 1]
    assert len(neighbours) == 5 and {row.tobytes() for row in neighbours} <= words
    assert (children != top).sum(1).max() <= 4 and (children != top).mean() < 0.5 * (children != other).mean()


def test_random_search_of_more_trials_than_networks_tries_all() -> None:
    chain = macro.ConvMacro()
    space = chain.restrict({name: chain[name].options[:1] for name in chain.free[2:]})
    searcher = Random(trials=50)
    searcher.start(space, {}, [])
    assert len(run(searcher)) == 9 == space.size


def test_the_coarse_grid_is_the_product_of_its_settings() -> None:
    at = place("macro")
    searcher = CoarseToFine(rounds=0)
    searcher.start(at.space.root, at.costs, [])
    assert len(run(searcher, 100)) == 3 * 3
    archs = at.space.decode(searcher.grid())
    assert at.space.root.smallest() in archs and at.space.root.largest() in archs
    assert all(len({arch[f"k{i}"] for i in range(1, 5)}) == 1 for arch in archs)
    two = CoarseToFine(settings={"c": 2}, rounds=0)
    two.start(at.space.root, at.costs, [])
    assert len(two.grid()) == 2 * 3
    wrong = CoarseToFine(settings={"depth": 2})
    wrong.start(at.space.root, at.costs, [])
    with pytest.raises(ValueError, match="no such kind"):
        wrong.ask(1)


def test_fine_improves_on_coarse() -> None:
    at = place("macro")
    coarse, fine = started(functools.partial(CoarseToFine, rounds=0), at), started(CoarseToFine, at)
    run(coarse), run(fine)
    assert fine.best().score == score(everything(at)).max() > coarse.best().score


def test_genes_mutate_at_their_own_rates() -> None:
    """The defaults published for OFA; the first choice stands for the resolution."""
    at = place("macro")
    searcher = started(Evolution, at)
    rates = searcher.genes.rates(0.1, c2=0.5)
    rng = np.random.default_rng(0)
    rows = searcher.genes.random(rng, 20_000)
    moved = (searcher.genes.mutate(rng, rows, rates) != rows).mean(0)
    wanted = [0.1 / 2, 0.5 * 2 / 3, *[0.1 * 2 / 3] * 3]
    assert moved[:5] == pytest.approx(wanted, abs=0.012)
    assert searcher.genes.rates(searcher.mutation, resolution=searcher.resolution).tolist() == [0.1] * 8


@pytest.mark.parametrize("bad", [
    lambda: Random(trials=0), lambda: Evolution(parents=0), lambda: Evolution(mutation=1.5), lambda: Evolution(bins=-1.0),
    lambda: CoarseToFine(mutation=0.0), lambda: CoarseToFine(skeletons=0), lambda: CoarseToFine(settings={"depth": 0}),
])  # fmt: skip
def test_hyper_parameters_out_of_range_are_refused(bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="Allowed"):
        bad()
