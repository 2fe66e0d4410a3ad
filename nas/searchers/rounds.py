"""What all searchers share: rounds of architectures, asked for and told about; every score kept, none asked for twice.

    searcher.start(space, {"macs": table}, [("macs", 0, 3e8)])
    while len(codes := searcher.ask(64)):                                  # (n, M), canonical
        searcher.tell(codes, [accuracy(arch) for arch in space.decode(codes)])
    searcher.best()

A round is a pure function of the seed, its number and what was told before. So ``ask`` may be repeated, what is asked for does
not depend on how many are asked for at once, and a searcher that is loaded goes on to the last bit as if never interrupted.
"""
from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nas.protocols import Found
from nas.searchers.genes import Genes
from search_spaces.space import SearchSpace

if TYPE_CHECKING:
    from nas.cost import CostTable


class Rounds(ABC):
    """The common part of all searchers, which are dataclasses of their hyper-parameters and say what a round is (``_next``).

    ``round``: its number, 0 before the first. ``rows``: the round's candidates (Genes rows), ``kept``: rows of earlier rounds
    that the next one builds on, ``cache``: key of the architecture (``space.key``) -> score, in the order told.
    """

    seed: int

    def start(
        self, space: SearchSpace, costs: Mapping[str, CostTable], limits: Sequence[tuple[str, float, float]] = ()
    ) -> None:
        """``limits``: (price, low, high), all of which every candidate meets; ``costs``: a table for each price.

        Raises ValueError for limits without a table, with crossed ends, or that nothing found in ``space`` meets.
        """
        self.space, self.genes = space, Genes(space, costs, limits)
        self.cache: dict[Hashable, float] = {}
        self._told: list[bytes] = []  # the canonical code of each entry of the cache
        self.round = 0
        self.rows = self.kept = self._none()
        self._codes, self._keys = self.rows, list[Hashable]()
        if self.genes.limits:
            self.genes.approach(np.random.default_rng((self.seed, 0)), self._none())

    def ask(self, n: int) -> np.ndarray:
        """At most ``n`` architectures that have no score yet: canonical codes (n, M). Empty: the search is over.

        The next round begins when all of this one are scored.
        """
        if n < 1:
            raise ValueError(f"ask for {n} architectures: ask for 1 or more.")
        while True:
            open_ = [i for i, key in enumerate(self._keys) if key not in self.cache]
            if open_:
                return self._codes[open_[:n]].copy()
            rows = self._next(np.random.default_rng((self.seed, self.round + 1)))
            if not len(rows):
                return self._none()
            self.round += 1
            self._begin(rows)

    def tell(self, codes: np.ndarray, scores: np.ndarray | Sequence[float]) -> None:
        """The ``scores`` (N,), higher is better, of ``codes`` (N, M), asked for or not. A score that is known stays.

        Raises ValueError for shapes that do not match, scores that are not finite and architectures outside the space.
        """
        codes, values = self.space.canonical_codes(codes).astype(np.int16), np.asarray(scores, dtype=np.float64)
        if values.shape != (len(codes),):
            raise ValueError(f"{len(codes)} architectures, scores of shape {values.shape}. Tell one score for each.")
        if not np.isfinite(values).all():
            n = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"score {n} is {values[n]}. Tell finite scores; give a network that failed the worst one.")
        asked, words = {row.tobytes() for row in self._codes}, [row.tobytes() for row in codes]
        foreign = [i for i, word in enumerate(words) if word not in asked]
        for arch in self.space.decode(codes[foreign]):
            self.space.check(arch)
        for key, word, value in zip(self.genes.keys(codes), words, values.tolist()):
            if key not in self.cache:
                self.cache[key] = value
                self._told.append(word)

    def known(self, codes: np.ndarray) -> np.ndarray:
        """The scores (N,) of ``codes`` (N, M); nan where there is none yet."""
        return np.array([self.cache.get(key, math.nan) for key in self.genes.keys(self.space.canonical_codes(codes))])

    def best(self) -> Found | None:
        """The highest score within the limits, the first of equal ones; None before the first."""
        codes, scores = self._scored()
        return self._found(codes[[int(scores.argmax())]], scores[[int(scores.argmax())]])[0] if len(codes) else None

    def front(self, price: str) -> list[Found]:
        """What no other beats in both cost and score, within the limits, from the cheapest to the dearest.

        Raises ValueError for a price without a cost table.
        """
        if price not in self.genes.costs:
            raise ValueError(f"front at {price}: no such cost table. Given: {', '.join(self.genes.costs) or 'none'}.")
        codes, scores = self._scored()
        cost = self.genes.costs[price].batch(codes)
        order = np.lexsort((-scores, cost))
        before = np.concatenate([[-math.inf], np.maximum.accumulate(scores[order])[:-1]])[: len(order)]
        order = order[scores[order] > before]
        return self._found(codes[order], scores[order])

    # -- state ----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Numbers, texts and tensors (``torch.load(weights_only=True)`` reads them)."""
        return {
            "about": self._about(), "round": self.round, "rows": torch.tensor(self.rows), "kept": torch.tensor(self.kept),
            "codes": torch.tensor(self._cached()), "scores": torch.tensor(list(self.cache.values()), dtype=torch.float64),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Call ``start`` first, as before.

        Raises ValueError where searcher, hyper-parameters, space or limits are not those of the state.
        """
        for name, value in self._about().items():
            if state["about"].get(name) != value:
                was = state["about"].get(name)
                raise ValueError(f"state of a searcher with {name} = {was}; this one has {value}. Resume with the same.")
        codes = state["codes"].numpy().astype(np.int16)
        self.cache = dict(zip(self.genes.keys(codes), state["scores"].tolist()))
        self._told = [row.tobytes() for row in codes]
        self.round, self.kept = state["round"], state["kept"].numpy().astype(np.int16)
        self._begin(state["rows"].numpy().astype(np.int16))

    def _about(self) -> dict[str, Any]:
        """What has to be the same for a search to go on."""
        assert dataclasses.is_dataclass(self)
        options = [[choice.name, list(choice.options)] for choice in self.space.choices]
        ties = [[name, tie.leader, list(tie.values.items())] for name, tie in self.space.ties.items()]
        return {
            "searcher": type(self).__name__, **dataclasses.asdict(self), "space": self.space.hash,
            "options": repr(options), "ties": repr(ties), "limits": [list(limit) for limit in self.genes.limits],
        }  # fmt: skip

    # -- rounds ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _next(self, rng: np.random.Generator) -> np.ndarray:
        """The rows of the round after this one, all of whose rows are scored; sets ``kept``. Empty: no more rounds."""

    def _begin(self, rows: np.ndarray) -> None:
        self.rows, self._codes = rows, self.space.canonical_codes(rows)
        self._keys = self.genes.keys(self._codes)

    def _ranked(self, rows: np.ndarray) -> np.ndarray:
        """Scored rows, the highest score first, of equal ones the earlier; no architecture twice."""
        rows = self.genes.unlike(rows)
        scores = [self.cache[key] for key in self.genes.keys(self.space.canonical_codes(rows))]
        return rows[np.argsort(-np.array(scores), kind="stable")]

    def _none(self) -> np.ndarray:
        return np.zeros((0, len(self.space.choices)), dtype=np.int16)

    def _cached(self) -> np.ndarray:
        """The codes that have a score (N, M), in the order told."""
        return np.frombuffer(b"".join(self._told), dtype=np.int16).reshape(-1, len(self.space.choices))

    def _scored(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes (N, M) and scores (N,) of what meets the limits: what was told but not asked for may not."""
        codes, scores = self._cached(), np.array(list(self.cache.values()), dtype=np.float64)
        fits = self.genes.fits(codes)
        return codes[fits], scores[fits]

    def _found(self, codes: np.ndarray, scores: np.ndarray) -> list[Found]:
        costs = {price: table.batch(codes).tolist() for price, table in self.genes.costs.items()}
        return [Found(arch, score, {price: row[i] for price, row in costs.items()})
                for i, (arch, score) in enumerate(zip(self.space.decode(codes), scores.tolist()))]  # fmt: skip
