"""Search steps on the DARTS cells against plain networks: ``python -m nas.benchmarks.cells``.

Method of nas/benchmarks/steps.py: alternated pairs in one process, CPU time, one thread, same layout, batch and optimizer on
both sides, median of the ratios with its bootstrap 90% interval.

``weights``, ``darts1``, ``darts2``: a weight step of the softmax mixture and whole updates of DARTS, over a step of the
static DARTS_V2 network of the same C and cells. ``rarts``: an update over one of second-order DARTS on the same supernet.
``gdas``: a weight pass and an alpha pass over a pass of the same single path.

Peak memory is of a process of its own for each side: the highest resident set during three steps, less what was resident
when the data and the network were ready.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nas.benchmarks.steps import LAYOUTS, Conditions, Row, Step, aten_calls, batch, one_thread, ratio, training
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.precision import in_precision
from nas.protocols import Batch, Setup
from nas.strategies.darts import DARTS
from nas.strategies.gdas import GDAS
from nas.strategies.rarts import RARTS
from search_spaces.darts import DARTS_V2
from search_spaces.darts import Cells as CellSpace
from search_spaces.space import Setting
from supernets.darts import Cells
from supernets.extract import extract

STEPS = 10_000
CASES: dict[str, tuple[str, str, float]] = {
    "weight step": ("mixture", "static", 7.0),
    "DARTS, first order": ("darts1", "static", 14.0),
    "DARTS, second order": ("darts2", "static", 30.0),
    "RARTS, Gauss-Seidel": ("rarts", "darts2", 0.85),
    "RARTS, Jacobi": ("jacobi", "darts2", 0.45),
    "GDAS, weight pass": ("gdas-w", "path", 1.1),
    "GDAS, alpha pass": ("gdas-a", "path", 1.5),
}
"""Case -> ours, what it is measured against, goal."""


class Bench:
    """The steps that the cases name, on one batch; each is made once, when asked for."""

    def __init__(self, conditions: Conditions, layout: str, C: int, layers: int) -> None:
        self.conditions, self.layout = conditions, layout
        self.space = CellSpace(C=C, layers=layers)
        self.data = batch(conditions, layout)
        self.steps: dict[str, Step] = {}

    def __getitem__(self, name: str) -> Step:
        if name not in self.steps:
            self.steps[name] = self._make(name)
        return self.steps[name]

    def _make(self, name: str) -> Step:
        if name == "static":
            net = extract(Cells(self.space), self.space.arch_of(DARTS_V2), self.data.x[:2], inherit=False)
            return training(net, self._sgd(), self.conditions, self.layout)
        if name == "mixture":
            strategy = self._started(DARTS(order=1))
            return partial(self._weights, strategy, strategy.arch)
        if name in ("gdas-w", "gdas-a", "path"):
            strategy = self._started(GDAS())
            moments = self._moments()
            if name == "gdas-w":
                return lambda: self._weights(strategy, strategy.arch, next(moments))
            if name == "gdas-a":
                return lambda: strategy.search(self.data, 10.0, next(moments))
            return lambda: self._weights(strategy, self._path, next(moments))
        make: dict[str, Callable[[], Any]] = {
            "darts1": lambda: DARTS(order=1), "darts2": lambda: DARTS(order=2), "rarts": lambda: RARTS(),
            "jacobi": lambda: RARTS(mode="jacobi"),
        }  # fmt: skip
        strategy, moments = self._started(make[name]()), self._moments()
        return lambda: strategy.update(self._draw, next(moments))

    def _started(self, strategy: Any) -> Any:
        torch.manual_seed(0)
        net = in_precision(Cells(self.space), self.conditions.precision, self.layout == "channels_last").train()
        size = (self.conditions.size, self.conditions.size)
        strategy.start(Setup(net, self.space, CostTable(net, size), CrossEntropy(), None, STEPS, STEPS, self.conditions.batch))
        return strategy

    def _sgd(self) -> Any:
        return partial(torch.optim.SGD, lr=0.025, momentum=0.9, weight_decay=3e-4, fused=True)

    def _weights(self, strategy: Any, arch: Callable[..., Any], now: Any = None) -> None:
        """Forward, loss, backward into the weights and their step, at a fresh ``arch``."""
        now = moment(0, STEPS, STEPS, 1) if now is None else now
        strategy.w.down(strategy.setup.loss(strategy.net(self.data.x, arch(now)), self.data.y))

    def _path(self, now: Any) -> dict[str, Setting]:
        """A uniform random path: each edge one option that counts or not, as GDAS's first samples are."""
        return {choice.name: now.rng.choice(choice.options) for choice in self.space.choices}

    def _draw(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        return self.data

    @staticmethod
    def _moments() -> Iterator[Any]:
        return (moment(step, STEPS, STEPS, seed=1) for step in range(STEPS))


def measure(conditions: Conditions, layout: str, C: int, layers: int, only: Sequence[str]) -> list[Row]:
    bench, rows = Bench(conditions, layout, C, layers), []
    for case in only:
        ours, against, goal = CASES[case]
        found = ratio(bench[ours], bench[against], conditions.pairs)
        calls = {"ours": aten_calls(bench[ours]), "against": aten_calls(bench[against])}
        rows.append({"case": case, "against": against, "layout": layout, **found, "goal": goal,
                     "met": found["interval90"][0] < goal, "aten_calls": calls})  # fmt: skip
    return rows


def peak(conditions: Conditions, layout: str, C: int, layers: int, name: str) -> float:
    """MiB by which three of its steps raise the highest resident set of this process. Call in a fresh one."""
    step = Bench(conditions, layout, C, layers)[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(words: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """``peak`` of every name, each in a process of its own; ``words``: this program's arguments that say the conditions."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", "nas.benchmarks.cells", *words, "--peak", name]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def markdown(figures: dict[str, Any]) -> str:
    given = figures["conditions"]
    lines = [f"torch {figures['torch']}, CPU, 1 thread, {given['pairs']} pairs, batch {given['batch']} of 3x{given['size']}x"
             f"{given['size']}, C = {figures['C']}, {figures['layers']} cells, {given['precision']}", "",
             "| case | against | layout | ratio (90%) | goal | | aten calls | peak memory, MiB (both: ours / against) |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in figures["rows"]:
        (low, high), calls, peaks = r["interval90"], r["aten_calls"], figures["peaks"][r["layout"]]
        ours, against, _ = CASES[r["case"]]
        cells = (r["case"], against, r["layout"], f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})", r["goal"],
                 "met" if r["met"] else "missed", f"{calls['ours']} / {calls['against']}",
                 f"{peaks[ours]:.0f} / {peaks[against]:.0f}")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m nas.benchmarks.cells", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--C", type=int, default=16, help="channels of the first cells")
    parser.add_argument("--layers", type=int, default=8, help="cells")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    conditions = Conditions(pairs=args.pairs, batch=args.batch, size=args.size, precision=args.precision)
    if args.peak:
        with one_thread():
            print(peak(conditions, args.layouts[0], args.C, args.layers, args.peak))
        return {}
    words = [f"--{key}={getattr(args, key)}" for key in ("pairs", "batch", "size", "C", "layers", "precision")]
    names = list(dict.fromkeys(name for case in args.only for name in CASES[case][:2]))
    figures: dict[str, Any] = {"conditions": asdict(conditions), "C": args.C, "layers": args.layers, "torch": torch.__version__,
                               "rows": [], "peaks": {}}  # fmt: skip
    for layout in args.layouts:
        figures["peaks"][layout] = memory([*words, f"--layouts={layout}"], names)
        with one_thread():
            figures["rows"] += measure(conditions, layout, args.C, args.layers, args.only)
    print(markdown(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
