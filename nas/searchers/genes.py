"""Architectures as rows of genes: drawn, mutated and crossed many at once, and kept within limits on their costs.

Rows are codes (N, M) as ``SearchSpace.encode`` gives them, but not canonical: a gene that is inert keeps an option of its own,
so that it has one when a mutation brings it to life. Every row lies in the (restricted, tied) space as it stands.

Letters: ``N`` rows, ``M`` choices, ``K`` options of one choice.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from nas.cost import CostTable

Make = Callable[[int], np.ndarray]
"""How many rows -> so many new rows (N, M)."""
BLOCK, POOL, STEPS, STALE = 16_384, 64, 200, 4


class Limit(NamedTuple):
    """``low`` <= cost <= ``high`` at one price, in the unit of its cost table."""

    price: str
    low: float = 0.0
    high: float = math.inf


class Genes:
    """The genes of ``space`` and the limits that its architectures must meet.

    Raises ValueError for limits without a cost table, and for those whose ends cross or are nan.
    """

    def __init__(
        self, space: SearchSpace, costs: Mapping[str, CostTable], limits: Sequence[tuple[str, float, float]] = ()
    ) -> None:
        self.space, self.costs, self.limits = space, dict(costs), [Limit(*limit) for limit in limits]
        for price, low, high in self.limits:
            if price not in self.costs:
                known = ", ".join(self.costs) or "none"
                raise ValueError(f"limit on {price}: there is no cost table at this price. Given: {known}.")
            if not low <= high:
                raise ValueError(f"limit on {price}: from {_cost(low)} to {_cost(high)} allows nothing. Give low <= high.")
        options = [[root.options.index(option) for option in choice.options]
                   for choice, root in zip(space.choices, space.root.choices)]  # fmt: skip
        self._K = np.array([len(row) for row in options])
        self._columns = np.arange(len(options))
        self._places = np.zeros((len(options), int(self._K.max(initial=1))), dtype=np.int16)
        for i, row in enumerate(options):
            self._places[i, : len(row)] = row
        at = {choice.name: i for i, choice in enumerate(space.choices)}
        self._ties = []
        for name, tie in space.ties.items():
            roots, leaders = space.root[name].options, space.root[tie.leader].options
            follows = [roots.index(tie.values[option]) if option in tie.values else 0 for option in leaders]
            self._ties.append((at[name], at[tie.leader], np.array(follows, dtype=np.int16)))
        self._scales = [abs(float(self.costs[price].of(space.largest()))) or 1.0 for price, _, _ in self.limits]

    # -- making rows ----------------------------------------------------------------------------------------------------

    def random(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, M): uniform in every free choice, followers set; where the space has a rule of its own, what it draws."""
        if type(self.space).random_codes is not SearchSpace.random_codes:
            return self.opened(self.space.random_codes(rng, n))
        return self.follow(self._places[self._columns, (rng.random((n, len(self._K))) * self._K).astype(np.intp)])

    def mutate(self, rng: np.random.Generator, rows: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """(N, M): each gene drawn afresh, its old option among the possible ones, with the probability ``rates`` (M,)."""
        fresh = self.random(rng, len(rows))
        return self.follow(np.where(rng.random(rows.shape) < rates, fresh, rows))

    def cross(self, rng: np.random.Generator, mothers: np.ndarray, fathers: np.ndarray) -> np.ndarray:
        """(N, M): each gene from one of two parents, with even odds."""
        return self.follow(np.where(rng.integers(2, size=mothers.shape, dtype=bool), mothers, fathers))

    def follow(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` with every follower as its leader asks, in place."""
        for follower, leader, follows in self._ties:
            rows[:, follower] = follows[rows[:, leader]]
        return rows

    def opened(self, codes: np.ndarray) -> np.ndarray:
        """Canonical codes of architectures of the space -> rows: inert genes get an option that is left."""
        rows = np.array(codes, dtype=np.int16)
        for i, K in enumerate(self._K.tolist()):
            rows[~np.isin(rows[:, i], self._places[i, :K]), i] = self._places[i, 0]
        return self.follow(rows)

    def rates(self, rate: float, **own: float) -> np.ndarray:
        """(M,): ``rate`` for every gene; ``own``: for the choices of these names, where the space has them."""
        return np.array([own.get(choice.name, rate) for choice in self.space.choices])

    # -- limits ---------------------------------------------------------------------------------------------------------

    def excess(self, rows: np.ndarray) -> np.ndarray:
        """(N, M) -> (N,): by how much the costs miss the limits, in shares of the largest network's; 0 where they are met."""
        total = np.zeros(len(rows))
        for (price, low, high), scale in zip(self.limits, self._scales):
            cost = self.costs[price].batch(rows)
            total += (np.maximum(low - cost, 0.0) + np.maximum(cost - high, 0.0)) / scale
        return total

    def fits(self, rows: np.ndarray) -> np.ndarray:
        """(N, M) -> (N,) bool: within the limits, and what the space may draw."""
        met = self.space.lawful(rows)
        for price, low, high in self.limits:
            cost = self.costs[price].batch(rows)
            met &= (cost >= low) & (cost <= high)
        return met

    def keys(self, codes: np.ndarray) -> list[Hashable]:
        """Of CANONICAL codes (N, M): equal where ``space.key`` is. A space with a key of its own (isomorphic cells) is asked
        for every one; elsewhere the bytes of the codes say the same, faster."""
        if type(self.space).key is not SearchSpace.key:
            return [self.space.key(arch) for arch in self.space.decode(codes)]
        whole, size = np.ascontiguousarray(codes, dtype=np.int16).tobytes(), 2 * codes.shape[1]
        return [whole[i * size : (i + 1) * size] for i in range(len(codes))]

    def unlike(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` in their order, no architecture twice: the first of equal ones."""
        first: dict[Hashable, int] = {}
        for i, key in enumerate(self.keys(self.space.canonical_codes(rows))):
            first.setdefault(key, i)
        return rows[list(first.values())]

    def gather(self, make: Make, n: int, draws: int, known: Container[Hashable], taken: set[Hashable]) -> np.ndarray:
        """At most ``n`` rows out of ``make``, by rejection: within the limits, no two alike, none ``known`` or ``taken``.

        Their keys join ``taken``. Gives up, with fewer, after ``draws`` rows, of which one that meets the limits but is not new
        counts ``STALE`` times: where those are the rule, hardly anything new is left to find.
        """
        found: list[np.ndarray] = []
        size, left = min(2 * n, BLOCK), draws
        while len(found) < n and left > 0:
            rows = make(min(size, left))
            left -= len(rows)
            rows = rows[self.fits(rows)]
            before = len(found)
            for i, key in enumerate(self.keys(self.space.canonical_codes(rows))):
                if key not in known and key not in taken:
                    taken.add(key)
                    found.append(rows[i])
                    if len(found) == n:
                        break
            left -= (STALE - 1) * (len(rows) - (len(found) - before))
            size = min(2 * size, BLOCK)
        return np.array(found, dtype=np.int16).reshape(-1, len(self._K))

    def meeting(self, rng: np.random.Generator, n: int, known: Container[Hashable]) -> np.ndarray:
        """At most ``n`` rows within the limits, no two alike, none that is ``known``: random ones, by rejection.

        Where the limits are so narrow that too few are hit, mutants of what meets them join: those are not uniform. Raises
        ValueError where nothing is found that meets the limits.
        """
        taken: set[Hashable] = set()
        found = self.gather(lambda k: self.random(rng, k), n, max(64 * n, 8 * BLOCK), known, taken)
        if len(found) == n or not self.limits:
            return found
        pool = np.concatenate([found, self.approach(rng, self.random(rng, BLOCK))])
        found = np.concatenate([found, self.gather(lambda _: pool, n - len(found), 1, known, taken)])
        rates = self.rates(max(0.1, 1.0 / len(self._K)))

        def mutants(k: int) -> np.ndarray:
            return self.mutate(rng, pool[rng.integers(len(pool), size=k)], rates)

        while len(found) < n:
            more = self.gather(mutants, n - len(found), 64 * n, known, taken)
            if not len(more):
                break
            found, pool = np.concatenate([found, more]), np.concatenate([pool, more])
        return found

    def approach(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """Rows within the limits, one at least: what comes nearest among ``rows``, the smallest and the largest is mutated
        until it meets them. Raises ValueError where none is found."""
        ends = self.opened(self.space.encode([self.space.smallest(), self.space.largest()]))
        pool = np.concatenate([ends, rows])
        rates = self.rates(max(0.1, 1.0 / len(self._K)))
        for _ in range(STEPS):
            excess = self.excess(pool) + ~self.space.lawful(pool)  # as bad as a whole network too much
            nearest = np.argsort(excess, kind="stable")[:POOL]
            if excess[nearest[0]] == 0.0:
                return self.unlike(pool[nearest[excess[nearest] == 0.0]])
            pool = pool[nearest]
            pool = np.concatenate([pool, self.mutate(rng, pool[rng.integers(len(pool), size=8 * POOL)], rates)])
        raise ValueError(self._unmet(ends))

    def _unmet(self, ends: np.ndarray) -> str:
        lines = []
        for price, low, high in self.limits:
            small, large = self.costs[price].batch(ends).tolist()
            full = float(self.costs[price].of(self.space.root.largest())) or 1.0
            said = [f"at least {_cost(low)}"] * (low > 0) + [f"at most {_cost(high)}"] * (high < math.inf)
            lines.append(f"{price} {' and '.join(said)} (smallest network {_cost(small)}, which is {small / full:.1%} of the "
                         f"largest there is; largest {_cost(large)}, {large / full:.1%})")  # fmt: skip
        return f"No architecture was found that meets the limits: {'; '.join(lines)}. Widen them."


def _cost(value: float) -> str:
    """Whole numbers whole, however large."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.10g}"
