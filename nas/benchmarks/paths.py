"""Steps of strategies that train a path at a time against SPOS: ``python -m nas.benchmarks.paths`` (method:
nas/benchmarks/pairs.py).

"nb201": NAS-Bench-201 cells of C channels, N cells a stage. "macro": NAS-Bench-Macro, width in per cent of the published. Both
sides of a case have networks of their own with the same weights and train the same random paths, one after another, on the same
batch, by the same descent; all that a step of a strategy does counts, its metrics too.

``PA&DA``, ``paths alone``, ``data alone``: an update over one of SPOS, at the published norms (after clipping). ``FairNAS``: an
update, on a path for each option, over as many of SPOS on these paths. The end of an epoch, at which the distributions change,
is no step: ``turn`` says its milliseconds for --images images, in the figures (--out).
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nas.benchmarks.pairs import Bench, Case, Option, moments, program
from nas.benchmarks.steps import Conditions, Row, Step, cpu_seconds
from nas.bilevel import Weights
from nas.importance import ImageImportance, Importance
from nas.protocols import Moment
from nas.strategies.fairnas import FairNAS
from nas.strategies.pada import PADA
from nas.strategies.spos import SPOS
from search_spaces.nasbenchmacro import NASBenchMacro
from search_spaces.nats import Topology
from search_spaces.space import Arch, SearchSpace
from supernets import nasbenchmacro, nats

KINDS = {"nb201": "NAS-Bench-201", "macro": "NAS-Bench-Macro"}
OURS = {"PA&DA": 1.05, "PA&DA, paths alone": 1.05, "PA&DA, data alone": 1.05, "FairNAS, a path": None}
"""What is measured -> what its ratio should stay below."""
CASES = {f"{said}: {name}": Case(f"{kind}/{name}", f"{kind}/{name}/SPOS", goal)
         for kind, said in KINDS.items() for name, goal in OURS.items()}  # fmt: skip
OPTIONS = {
    "C": Option(16, "nb201: channels of the first stage"), "N": Option(5, "nb201: cells a stage"),
    "width": Option(100, "macro: per cent of the published widths"), "images": Option(50_000, "turn: of the train split"),
}  # fmt: skip
WEIGHTS: dict[str, Any] = {"lr": 0.01, "lr_min": 0.0, "weight_decay": 2.5e-4, "per_epoch": False}


class PathBench(Bench):
    """Steps on a path; SPOS has a step of its own in every case, so that both sides are always at the same path."""

    def make(self, name: str) -> Step:
        kind, what, *rival = name.split("/")
        now = moments()
        if what == "FairNAS, a path":
            fair = self._started(kind, FairNAS(weights=Weights(**WEIGHTS)))
            if not rival:
                return lambda: fair.update(self.draw, next(now))
            spos, given = self._spos(kind, (path for each in moments() for path in fair.paths(each)))
            return lambda: [spos.update(self.draw, given) for _ in range(fair.count)]
        paths = (space.sample(each.rng) for space in [self._space(kind)] for each in moments())
        if rival:
            spos, _ = self._spos(kind, paths)
            return lambda: spos.update(self.draw, next(now))
        pada = self._started(kind, PADA(path=what != "PA&DA, data alone", data=what != "PA&DA, paths alone",
                                        weights=Weights(**WEIGHTS)))  # fmt: skip
        pada._path = lambda now: next(paths)  # its own draws are other paths than those of SPOS
        return lambda: pada.update(self.draw, next(now))

    def _spos(self, kind: str, paths: Iterator[Arch]) -> tuple[Any, Moment]:
        """SPOS on ``paths``, and a moment for updates that need no other."""
        spos = self._started(kind, SPOS(weights=Weights(**WEIGHTS)))
        spos.arch = lambda now: next(paths)
        return spos, next(moments())

    def _space(self, kind: str) -> SearchSpace:
        if kind == "nb201":
            return Topology(C=self.numbers["C"], N=self.numbers["N"])
        return NASBenchMacro(width=self.numbers["width"] / 100)

    def _started(self, kind: str, strategy: Any) -> Any:
        torch.manual_seed(0)
        space = self._space(kind)
        supernets: dict[str, Any] = {"nb201": nats, "macro": nasbenchmacro}
        return self.started(strategy, space, supernets[kind].build(space, 3, 10))


def turn(conditions: Conditions, numbers: Mapping[str, int], layout: str) -> Row:
    """CPU milliseconds of the end of an epoch: scores, q and the odds of the next one."""
    n = numbers["images"]
    images = ImageImportance(n, Importance(), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    for index in torch.randint(n, (n,), generator=draw).split(conditions.batch):
        images.see(index, torch.randn(len(index), 10, generator=draw), index % 10)
    return {"case": "turn", "images": n, "milliseconds": 1000 * cpu_seconds(lambda: images.turn(0.5))}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return program("nas.benchmarks.paths", __doc__, PathBench, CASES, OPTIONS, argv, {"turn": turn})


if __name__ == "__main__":
    main()
