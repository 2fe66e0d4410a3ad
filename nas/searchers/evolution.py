"""Evolution under limits, as once-for-all networks are searched (Cai et al. ICLR 2020. arXiv 1908.09791).

    P_0 = ``population`` random architectures
    each generation:   parents = the best ``parents`` of P
                       P = parents + ``mutations`` of random parents + ``crossovers`` of two random parents each

Limits by rejection: a child that misses them is drawn again, its parents too. The defaults are those of OFA's released code,
where the gene of the resolution has a mutation rate of its own. Ours: parents and children are all different, and no child
was scored before, so no evaluation is spent twice; where mutation finds nothing new any more, a generation is smaller, and the
search ends with one that is empty. What was told before the first ``ask`` joins the population.

Published settings:
    OFA                      the defaults
    SPOS (arXiv 1904.00420)  population 50, parents 10, mutations 25, crossovers 25, generations 20 (unverified)
    AlphaNet (2102.07954)    population 512, mutations 128, crossovers 128, mutation 0.2, resolution 0.2, generations 20,
                             bins 10e6: parents = the best of every bin of 10 M MACs among all that were scored
"""
from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from nas.searchers.rounds import Rounds

DRAWS = 64
"""A child is drawn at most so often, on average, before a generation stays smaller."""


@dataclass
class Evolution(Rounds):
    """``mutation``: the probability that a gene is drawn afresh; ``resolution``: that of the choice of this name.

    ``bins``: 0, or the width of the cost bins, at the price of the first limit, whose best are the parents (all of them).
    """

    population: int = 100
    parents: int = 25
    mutations: int = 50
    crossovers: int = 50
    mutation: float = 0.1
    resolution: float = 0.5
    generations: int = 500
    bins: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("population", 1), ("parents", 1), ("mutations", 0), ("crossovers", 0), ("generations", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}. Allowed: {least} or more.")
        for name in ("mutation", "resolution"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)} is no probability. Allowed: 0 to 1.")
        if not 0 <= self.bins < float("inf"):
            raise ValueError(f"bins = {self.bins} is no width. Allowed: 0 (no bins), or a width in the unit of the price.")

    def _next(self, rng: np.random.Generator) -> np.ndarray:
        if self.round == 0:
            self.kept = self.genes.opened(self._scored()[0])
            return self.genes.meeting(rng, self.population, self.cache)
        if self.round > self.generations:
            return self._none()
        self.kept = parents = self._parents()
        rates = self.genes.rates(self.mutation, resolution=self.resolution)

        def mutants(k: int) -> np.ndarray:
            return self.genes.mutate(rng, parents[rng.integers(len(parents), size=k)], rates)

        def children(k: int) -> np.ndarray:
            mothers, fathers = rng.integers(len(parents), size=(2, k))
            return self.genes.cross(rng, parents[mothers], parents[fathers])

        taken: set[Hashable] = set()
        changed = self.genes.gather(mutants, self.mutations, DRAWS * self.mutations, self.cache, taken)
        crossed = self.genes.gather(children, self.crossovers, DRAWS * self.crossovers, self.cache, taken)
        return np.concatenate([changed, crossed])

    def _parents(self) -> np.ndarray:
        """(P, M): the best first. With ``bins``, what earlier bins hold is compared with this generation's children."""
        ranked = self._ranked(np.concatenate([self.kept, self.rows]))
        if not self.bins:
            return ranked[: self.parents]
        price = self.genes.limits[0].price if self.genes.limits else next(iter(self.genes.costs))
        _, first = np.unique(self.genes.costs[price].batch(ranked) // self.bins, return_index=True)
        return ranked[np.sort(first)]
