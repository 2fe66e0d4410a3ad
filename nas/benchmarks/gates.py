"""Alpha passes of ProxylessNAS against passes of a single path: ``python -m nas.benchmarks.gates`` (method:
nas/benchmarks/pairs.py).

``two``, ``full_v2``: an alpha pass, which draws gates, runs them forward and backward with frozen weights, and lets Adam step.
``path``: forward, backward into the weights and SGD's step of the path that those gates leave open, drawn anew every time, the
same paths in the same order. ``full``: the reference that runs every operation with a graph.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nas.benchmarks.pairs import Bench, Case, Option, moments, program
from nas.benchmarks.steps import Step
from nas.protocols import Moment
from nas.strategies.proxyless import Proxyless
from search_spaces import darts, nats
from search_spaces.space import Mixture, Setting
from supernets.darts import Cells
from supernets.nats import Topology

CASES = {f"{space}, {mode}": Case(f"{space}/{mode}/alphas", f"{space}/{mode}/path", goal)
         for space in ("nb201", "darts") for mode, goal in (("two", 1.5), ("full_v2", None), ("full", None))}  # fmt: skip
OPTIONS = {"C": Option(16, "channels of the first cells")}


class GateBench(Bench):
    """Passes on NAS-Bench-201 (5 cells a stage) and DARTS cells (8), of C channels."""

    def make(self, name: str) -> Step:
        kind, mode, side = name.split("/")
        C = self.numbers["C"]
        torch.manual_seed(0)
        space: Any = nats.Topology(C=C, N=5) if kind == "nb201" else darts.Cells(C=C, layers=8)
        net: Any = (Topology if kind == "nb201" else Cells)(space)
        strategy, now = self.started(Proxyless(mode=mode), space, net), moments()
        if side == "alphas":
            return lambda: strategy.search(self.data, next(now))

        def path(now: Moment) -> Mapping[str, Setting]:
            with torch.no_grad():
                gates = strategy.sample(now)[1]
            return {name: s.options[s.active[0]] if isinstance(s, Mixture) and s.active else s for name, s in gates.items()}

        return lambda: self.weights(strategy, path, next(now))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return program("nas.benchmarks.gates", __doc__, GateBench, CASES, OPTIONS, argv)


if __name__ == "__main__":
    main()
