"""Architectures by what they cost: the sampler of attentive sampling.

AttentiveNAS: Improving Neural Architecture Search via Attentive Sampling. Dilin Wang, Meng Li, Chengyue Gong, Vikas Chandra.
CVPR 2021. arXiv 2011.09011.

    offline:  of uniform random architectures, t = round(cost / width);  p(t) = the share of bin t;
              for each bin and choice, how often each option was met
    a draw:   t ~ p;  each of k candidates gene by gene from the marginals of t, again up to ``tries`` times until its own
              bin is t; where none is, the last of them

A choice is counted in the architectures where it counts, so that what inert choices say blurs no marginal. Followers of ties
follow. Everything is drawn on the host, from numbers that every rank shares.

Letters: ``N`` architectures, ``M`` choices, ``K`` options of one choice in the ROOT space, ``T`` bins.
"""
from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nas.budget import read_amount
from nas.cost import CostTable
from nas.searchers.genes import Genes
from search_spaces.space import Arch, SearchSpace

BLOCK = 65_536


class Bins:
    """``width``: of a bin, in the unit of ``costs`` (published: 25e6 MACs), or "2%" of the root space's largest network.
    ``samples``: how many uniform architectures are counted, drawn from ``seed``. ``tries``: as above, published 100.

    ``bins``: (T,) the numbers t that were met, ascending; ``counts``: (T,) how often; ``genes``: (T, M, K) how often each
    option, 1 for each allowed option of a choice that counted nowhere in a bin. Raises ValueError for other values, a space
    that forbids combinations of options, and a width so large that all architectures share a bin: of the ``whole`` space, where
    ``space`` is a part of one (a split's), which may well lie in one bin.
    """

    bins: np.ndarray
    counts: np.ndarray
    genes: np.ndarray

    def __init__(self, space: SearchSpace, costs: CostTable, width: str | float = 25e6, samples: int = 100_000, seed: int = 0,
                 tries: int = 100, whole: SearchSpace | None = None) -> None:  # fmt: skip
        if samples < 1 or tries < 1:
            raise ValueError(f"bins: samples = {samples}, tries = {tries}. Allowed: 1 or more.")
        if type(space).random_codes is not SearchSpace.random_codes:
            raise ValueError(f"bins: {space!r} forbids some combinations of options, and bins draw each choice by itself. "
                             "Use a strategy that samples uniformly.")  # fmt: skip
        self.space, self.costs, self.tries = space, costs, tries
        self.width = bin_width(width, costs, space)
        self._rows = Genes(space, {})
        self._part = whole is not None and whole.choices != space.choices
        self._count(samples, np.random.default_rng(seed))

    @property
    def odds(self) -> np.ndarray:
        """(T,): p(t)."""
        return self.counts / self.counts.sum()

    def of(self, codes: np.ndarray) -> np.ndarray:
        """(N, M) codes -> (N,) int64, the number of each one's bin: its centre is that times ``width``."""
        return np.rint(self.costs.batch(codes) / self.width).astype(np.int64)

    def draw(self, rng: random.Random, k: int = 1) -> list[Arch]:
        """``k`` candidates of one bin, canonical."""
        if k < 1:
            raise ValueError(f"bins: k = {k} candidates. Allowed: 1 or more.")
        stream = np.random.default_rng(rng.getrandbits(64))
        below = self.counts.cumsum()
        i = int((stream.random() * below[-1] >= below).sum())
        rows = self._drawn(stream, i, k * self.tries)
        hits = (self.of(rows) == self.bins[i]).reshape(k, self.tries)
        first = np.where(hits.any(axis=1), hits.argmax(axis=1), self.tries - 1)
        chosen = rows.reshape(k, self.tries, -1)[np.arange(k), first]
        return self.space.decode(self.space.canonical_codes(chosen))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What was counted, and of which options: a run that goes on elsewhere draws as it did, whatever numpy draws there."""
        counted = {name: torch.from_numpy(getattr(self, name).copy()) for name in ("bins", "counts", "genes")}
        return {**counted, "allowed": torch.from_numpy(self._allowed().astype(np.int64))}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """ValueError where the state is of another space. Of another part of this one, as the state of a split's parent is,
        nothing is taken over: what was counted here stands."""
        if state["genes"].shape[1:] != self.genes.shape[1:]:
            raise ValueError(f"bins: the state counts {tuple(state['genes'].shape[1:])} choices and options, this space has "
                             f"{self.genes.shape[1:]}. Resume with the space that the run began with.")  # fmt: skip
        if "allowed" in state and not np.array_equal(state["allowed"].numpy(), self._allowed()):
            return
        self.bins, self.counts, self.genes = (state[name].numpy().copy() for name in ("bins", "counts", "genes"))

    def _drawn(self, stream: np.random.Generator, i: int, n: int) -> np.ndarray:
        """(n, M): every gene from the ``i``-th bin's marginals, followers as their leaders ask."""
        below = self.genes[i].cumsum(axis=1)  # (M, K)
        u = stream.random((n, len(below))) * below[:, -1]
        return self._rows.follow((u[:, :, None] >= below).sum(axis=2).astype(np.int16))

    def _count(self, samples: int, rng: np.random.Generator) -> None:
        parts = [self._rows.random(rng, min(BLOCK, samples - start)) for start in range(0, samples, BLOCK)]
        rows = np.concatenate(parts)
        self.bins, at, self.counts = np.unique(self.of(rows), return_inverse=True, return_counts=True)
        if len(self.bins) == 1 and not self._part and len(np.unique(self.costs.batch(rows[:BLOCK]))) > 1:
            low, high = (self.costs.of(arch) for arch in (self.space.smallest(), self.space.largest()))
            raise ValueError(f"bins: width = {self.width:,.10g} puts all architectures ({low:,.10g} to {high:,.10g}) into one "
                             "bin, and nothing is left to attend to. Give less, such as 2%.")  # fmt: skip
        allowed = self._allowed()
        M, K = allowed.shape
        self.genes = np.zeros((len(self.bins), M, K), dtype=np.int64)
        live = _live(self.space, rows)
        for m in range(M):
            met = np.bincount(at[live[:, m]] * K + rows[live[:, m], m], minlength=len(self.bins) * K)
            self.genes[:, m] = met.reshape(-1, K)
            self.genes[self.genes[:, m].sum(axis=1) == 0, m] = allowed[m]

    def _allowed(self) -> np.ndarray:
        """(M, K) bool: the options that the space has left."""
        K = max(len(choice.options) for choice in self.space.root.choices)
        return np.array([[k < len(root.options) and root.options[k] in choice.options for k in range(K)]
                         for choice, root in zip(self.space.choices, self.space.root.choices)])  # fmt: skip


def bin_width(width: str | float, costs: CostTable, space: SearchSpace) -> float:
    """"2%" of the largest architecture of the root space, or a number in the unit of ``costs``. ValueError for what is not
    above 0."""
    number, share = read_amount(width, "bins: width")
    value = number * costs.of(space.root.largest()) if share else number
    if not 0 < value < math.inf:
        raise ValueError(f"bins: width = {width} is no width. Allowed: a share such as 2%, or a number above 0.")
    return value


def _live(space: SearchSpace, rows: np.ndarray) -> np.ndarray:
    """(N, M) bool: which choices count in each of ``rows`` (N, M)."""
    at = {choice.name: m for m, choice in enumerate(space.root.choices)}
    columns: dict[str, Any] = {}

    def live(name: str) -> np.ndarray:
        if name not in columns:
            mask = np.ones(len(rows), dtype=bool)
            for needed, values in space.root[name].needs:
                holds = np.array([option in values for option in space.root[needed].options])
                mask &= live(needed) & holds[rows[:, at[needed]]]
            columns[name] = mask
        return columns[name]

    return np.stack([live(name) for name in at], axis=1)
