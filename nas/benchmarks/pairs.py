"""Steps measured against other steps: what the benchmarks of searches share.

Method of nas/benchmarks/steps.py: alternated pairs in one process, CPU time, one thread, same layout, batch and optimizer on
both sides, median of the ratios with its bootstrap 90% interval. Peak memory is of a process of its own for each side, at a
batch of its own where one is given (that of a small batch drowns in what torch itself takes): the highest resident set during
three steps, less what was resident when the data and the network were ready.
"""
from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nas.benchmarks.steps import LAYOUTS, Conditions, Row, Step, aten_calls, batch, one_thread, ratio
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.precision import in_precision
from nas.protocols import Batch, Moment, Setup
from search_spaces.space import SearchSpace

STEPS = 10_000


class Case(NamedTuple):
    """``ours`` over ``against``, both names of steps; ``goal``: what the ratio should stay below, None where it is only
    reported."""

    ours: str
    against: str
    goal: float | None


Further = Callable[[Conditions, Mapping[str, int], str], Row]
"""A measure of its own: (conditions, the program's numbers, layout) -> its figures."""


class Option(NamedTuple):
    """A number that a program takes beside the conditions."""

    default: int
    help: str


class Bench:
    """The steps that the cases name, on one batch; each is made once, when asked for. A program says ``make``."""

    def __init__(self, conditions: Conditions, layout: str, numbers: Mapping[str, int]) -> None:
        self.conditions, self.layout, self.numbers = conditions, layout, numbers
        self.data = batch(conditions, layout)
        self.steps: dict[str, Step] = {}

    def __getitem__(self, name: str) -> Step:
        if name not in self.steps:
            self.steps[name] = self.make(name)
        return self.steps[name]

    def make(self, name: str) -> Step:
        """The step called ``name``."""
        raise KeyError(name)

    def started(self, strategy: Any, space: SearchSpace, net: Any) -> Any:
        """``strategy`` at the beginning of a run on ``net``, in training."""
        net = in_precision(net, self.conditions.precision, self.layout == "channels_last").train()
        size = (self.conditions.size, self.conditions.size)
        strategy.start(Setup(net, space, CostTable(net, size), CrossEntropy(), None, STEPS, STEPS, self.conditions.batch))
        return strategy

    def weights(self, strategy: Any, arch: Callable[..., Any], now: Moment) -> None:
        """Forward, loss, backward into the weights and their step, at a fresh ``arch``."""
        strategy.w.down(strategy.setup.loss(strategy.net(self.data.x, arch(now)), self.data.y))

    def draw(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        return self.data


def moments() -> Iterator[Moment]:
    """Of the steps of a run, one after another."""
    return (moment(step, STEPS, STEPS, seed=1) for step in range(STEPS))


def measure(bench: Bench, cases: Mapping[str, Case]) -> list[Row]:
    rows = []
    for name, (ours, against, goal) in cases.items():
        found = ratio(bench[ours], bench[against], bench.conditions.pairs)
        calls = {"ours": aten_calls(bench[ours]), "against": aten_calls(bench[against])}
        rows.append({"case": name, "ours": ours, "against": against, "layout": bench.layout, **found, "goal": goal,
                     "met": None if goal is None else found["interval90"][0] < goal, "aten_calls": calls})  # fmt: skip
    return rows


def peak(bench: Bench, name: str) -> float:
    """MiB by which three of its steps raise the highest resident set of this process. Call in a fresh one."""
    step = bench[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(module: str, words: Sequence[str], names: Iterable[str]) -> dict[str, float]:
    """``peak`` of every name, each in a process of its own; ``words``: the program's arguments that say the conditions."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", module, *words, "--peak", name]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return found


def markdown(figures: Mapping[str, Any]) -> str:
    given, numbers = figures["conditions"], "".join(f", {name} = {n}" for name, n in figures["numbers"].items())
    lines = [f"torch {figures['torch']}, CPU, 1 thread, {given['pairs']} pairs, batch {given['batch']} of 3x{given['size']}x"
             f"{given['size']}{numbers}, {given['precision']}", "",
             "| case | against | layout | ratio (90%) | goal | | aten calls | peak memory, MiB (ours / against)"
             f"{', batch ' + str(figures['peak_batch']) if figures['peak_batch'] != given['batch'] else ''} |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in figures["rows"]:
        (low, high), calls, peaks = r["interval90"], r["aten_calls"], figures["peaks"][r["layout"]]
        verdict = ("-", "") if r["goal"] is None else (r["goal"], "met" if r["met"] else "missed")
        cells = (r["case"], r["against"], r["layout"], f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})", *verdict,
                 f"{calls['ours']} / {calls['against']}", f"{peaks[r['ours']]:.0f} / {peaks[r['against']]:.0f}")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def program(
    module: str, doc: str | None, bench: type[Bench], cases: Mapping[str, Case], options: Mapping[str, Option],
    argv: list[str] | None, further: Mapping[str, Further] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The command line of a benchmark: measures, prints a table, returns the figures. ``further``: measures that are no pairs
    of steps; their rows are in the figures, each layout's."""
    also = dict(further or {})
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--peak-batch", type=int, help="images a step where memory is measured (default: --batch)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    for name, option in options.items():
        parser.add_argument(f"--{name}", type=int, default=option.default, help=option.help)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--only", nargs="+", choices=[*cases, *also], default=[*cases, *also])
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    conditions = Conditions(pairs=args.pairs, batch=args.batch, size=args.size, precision=args.precision)
    numbers = {name: getattr(args, name) for name in options}
    if args.peak:
        with one_thread():
            print(peak(bench(conditions, args.layouts[0], numbers), args.peak))
        return {}
    peak_batch = args.peak_batch or args.batch
    words = [f"--batch={peak_batch}", *(f"--{key}={getattr(args, key)}" for key in ("size", *options, "precision"))]
    wanted = {name: cases[name] for name in args.only if name in cases}
    names = list(dict.fromkeys(name for case in wanted.values() for name in (case.ours, case.against)))
    figures: dict[str, Any] = {"conditions": asdict(conditions), "numbers": numbers, "torch": torch.__version__,
                               "peak_batch": peak_batch, "rows": [], "peaks": {}}  # fmt: skip
    for layout in args.layouts:
        figures["peaks"][layout] = memory(module, [*words, f"--layouts={layout}"], names)
        with one_thread():
            figures["rows"] += measure(bench(conditions, layout, numbers), wanted)
            for name in (name for name in also if name in args.only):
                found = {**also[name](conditions, numbers, layout), "layout": layout}
                figures.setdefault("further", []).append(found)
    print(markdown(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures
