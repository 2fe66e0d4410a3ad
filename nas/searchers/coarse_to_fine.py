"""Coarse to fine, as BigNAS picks its networks (Yu et al. ECCV 2020. arXiv 2003.11142).

    coarse   one setting for a kind of choice in the whole network (resolution x depth x width x kernel): score the whole grid
             within the limits, keep the best ``skeletons``
    fine     ``rounds`` times: ``changes`` random changes, choice by choice, of the best so far; keep the best

Setting j of J takes, for a choice of K options, option round(j (K - 1) / (J - 1)): 0 is the first everywhere, J - 1 the last.
The paper's grid has 5 resolutions, 4 depths, 2 widths, 4 kernels: ``settings: {resolution: 5, depth: 4, width: 2, kernel: 4}``.
It does not say how many changes are tried: ``rounds``, ``changes`` and ``mutation`` are ours.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np

from nas.searchers.evolution import DRAWS
from nas.searchers.rounds import Rounds

GRID = 100_000
"""The largest grid that is scored."""


def kind(name: str) -> str:
    """What a choice is about: its name behind the last dot, without digits. stage2.block1.kernel -> kernel, c3 -> c."""
    return re.sub(r"\d+", "", name.rsplit(".", 1)[-1]) or name


@dataclass
class CoarseToFine(Rounds):
    """``settings``: kind of choice -> J, how many settings of it the grid has (other kinds: as many as the choice with the most
    options has). ``mutation``: the probability that a choice is drawn afresh in a change."""

    settings: dict[str, int] = field(default_factory=dict)
    skeletons: int = 1
    rounds: int = 10
    changes: int = 50
    mutation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("skeletons", 1), ("rounds", 0), ("changes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}. Allowed: {least} or more.")
        if not 0 < self.mutation <= 1:
            raise ValueError(f"mutation = {self.mutation} changes nothing or is no probability. Allowed: above 0, to 1.")
        if any(count < 1 for count in self.settings.values()):
            raise ValueError(f"settings = {self.settings}. Allowed: 1 or more for each kind of choice.")

    def grid(self) -> np.ndarray:
        """(N, M) rows: every global setting, whatever it costs; no network twice.

        Raises ValueError for kinds that the space does not have, and a grid beyond reason.
        """
        free = [i for i, choice in enumerate(self.space.choices) if choice.name in self.space.free]
        kinds: dict[str, list[int]] = {}
        for i in free:
            kinds.setdefault(kind(self.space.choices[i].name), []).append(i)
        for name in self.settings:
            if name not in kinds:
                raise ValueError(f"settings of {name}: the space has no such kind of choice. Allowed: {', '.join(kinds)}.")
        options = [choice.options for choice in self.space.choices]
        counts = [self.settings.get(name, max(len(options[i]) for i in members)) for name, members in kinds.items()]
        if math.prod(counts) > GRID:
            listed = ", ".join(f"{name} {count}" for name, count in zip(kinds, counts))
            raise ValueError(f"a grid of {listed} has {math.prod(counts)} networks. Give fewer settings: at most {GRID}.")
        at = np.indices(counts).reshape(len(counts), -1) if counts else np.zeros((0, 1), dtype=np.intp)
        rows = np.repeat(self.genes.opened(self.space.encode([self.space.smallest()])), at.shape[1], axis=0)
        for j, J, members in zip(at, counts, kinds.values()):
            for i in members:
                places = np.array([self.space.root.choices[i].options.index(option) for option in options[i]])
                rows[:, i] = places[(2 * j * (len(places) - 1) + (J - 1)) // (2 * max(J - 1, 1))]  # rounded, halves up
        return self.genes.unlike(self.genes.follow(rows))

    def _next(self, rng: np.random.Generator) -> np.ndarray:
        if self.round == 0:
            grid = self.grid()
            fitting = grid[self.genes.fits(grid)]
            return fitting if len(fitting) else self.genes.approach(rng, grid)
        if self.round > self.rounds:
            return self._none()
        self.kept = best = self._ranked(np.concatenate([self.kept, self.rows]))[: self.skeletons]
        rates = self.genes.rates(self.mutation)

        def changed(k: int) -> np.ndarray:
            return self.genes.mutate(rng, best[rng.integers(len(best), size=k)], rates)

        return self.genes.gather(changed, self.changes, DRAWS * self.changes, self.cache, set())
