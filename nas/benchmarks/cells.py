"""Search steps on the DARTS cells against plain networks: ``python -m nas.benchmarks.cells`` (method: nas/benchmarks/pairs.py).

``weights``, ``darts1``, ``darts2``: a weight step of the softmax mixture and whole updates of DARTS, over a step of the
static DARTS_V2 network of the same C and cells. ``rarts``: an update over one of second-order DARTS on the same supernet.
``gdas``: a weight pass and an alpha pass over a pass of the same single path.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nas.benchmarks.pairs import Bench, Case, Option, moments, program
from nas.benchmarks.steps import Step, training
from nas.protocols import Moment
from nas.strategies.darts import DARTS
from nas.strategies.gdas import GDAS
from nas.strategies.rarts import RARTS
from search_spaces.darts import DARTS_V2
from search_spaces.darts import Cells as CellSpace
from search_spaces.space import Setting
from supernets.darts import Cells
from supernets.extract import extract

CASES = {
    "weight step": Case("mixture", "static", 7.0),
    "DARTS, first order": Case("darts1", "static", 14.0),
    "DARTS, second order": Case("darts2", "static", 30.0),
    "RARTS, Gauss-Seidel": Case("rarts", "darts2", 0.85),
    "RARTS, Jacobi": Case("jacobi", "darts2", 0.45),
    "GDAS, weight pass": Case("gdas-w", "path", 1.1),
    "GDAS, alpha pass": Case("gdas-a", "path", 1.5),
}
OPTIONS = {"C": Option(16, "channels of the first cells"), "layers": Option(8, "cells")}


class CellBench(Bench):
    """Steps on cells of C channels."""

    def make(self, name: str) -> Step:
        if name == "static":
            space = self._space()
            net = extract(Cells(space), space.arch_of(DARTS_V2), self.data.x[:2], inherit=False)
            sgd: Any = partial(torch.optim.SGD, lr=0.025, momentum=0.9, weight_decay=3e-4, fused=True)
            return training(net, sgd, self.conditions, self.layout)
        now = moments()
        if name == "mixture":
            strategy = self._started(DARTS(order=1))
            return lambda: self.weights(strategy, strategy.arch, next(now))
        if name in ("gdas-w", "gdas-a", "path"):
            strategy = self._started(GDAS())
            if name == "gdas-w":
                return lambda: self.weights(strategy, strategy.arch, next(now))
            if name == "gdas-a":
                return lambda: strategy.search(self.data, 10.0, next(now))
            return lambda: self.weights(strategy, self._path, next(now))
        strategies: dict[str, Callable[[], Any]] = {
            "darts1": lambda: DARTS(order=1), "darts2": lambda: DARTS(order=2), "rarts": lambda: RARTS(),
            "jacobi": lambda: RARTS(mode="jacobi"),
        }  # fmt: skip
        strategy = self._started(strategies[name]())
        return lambda: strategy.update(self.draw, next(now))

    def _space(self) -> CellSpace:
        return CellSpace(C=self.numbers["C"], layers=self.numbers["layers"])

    def _started(self, strategy: Any) -> Any:
        torch.manual_seed(0)
        space = self._space()
        return self.started(strategy, space, Cells(space))

    def _path(self, now: Moment) -> dict[str, Setting]:
        """A uniform random path: each edge one option that counts or not, as GDAS's first samples are."""
        return {choice.name: now.rng.choice(choice.options) for choice in self._space().choices}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return program("nas.benchmarks.cells", __doc__, CellBench, CASES, OPTIONS, argv)


if __name__ == "__main__":
    main()
