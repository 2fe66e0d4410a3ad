"""Training steps of supernets against plain networks: ``python -m nas.benchmarks.steps``.

Every ratio is ours over static in the same process: alternated pairs, CPU time, one thread, same layout, precision, batch
and optimizer on both sides; the median of the pairs' ratios with its bootstrap 90% interval. A goal or bound is met where
the interval reaches below it. Batches are ready in memory, on the CPU.

``elastic``: one step of the supernet at a fixed architecture, over a step of the extracted network.
``tas``: a weights step and an architecture step of the strategy, over two steps of the plain network of full width.
``costs``: architectures a second of a cost table, and milliseconds of an expected cost with its gradient (no ratios).

Peak memory is not here: the allocator of one process cannot tell the two sides apart.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from nas.alpha import Alpha
from nas.cost import CostTable
from nas.descent import Descent
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.precision import PRECISIONS, in_precision
from nas.protocols import Batch, Setup
from nas.strategies.tas import TAS
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, SearchSpace
from supernets.extract import extract
from supernets.resnet import ResNet

MEASURES = ("elastic", "tas", "costs")
LAYOUTS = ("nchw", "channels_last")
GOALS = {"elastic": (1.02, 1.06), "tas": (1.35, 1.7)}
"""(goal, bound) of each ratio; the released TAS code needs 2.65."""

Row = dict[str, Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Conditions:
    """What all measures share. ``batch`` images of ``size`` x ``size``; ``depth``, ``widths``: of the residual space.

    ``fused``: the optimizer of both sides of ``elastic`` (both sides of ``tas`` use the strategy's). ``archs``: random
    architectures a cost table is asked for, in a space of ``cost_depth``.
    """

    pairs: int = 30
    batch: int = 128
    size: int = 32
    depth: int = 20
    widths: tuple[int, ...] = CifarResNet.WIDTHS
    precision: str = "float32"
    fused: bool = False
    archs: int = 1_000_000
    cost_depth: int = 56

    def __post_init__(self) -> None:
        if self.pairs < 2 or self.batch < 1 or self.size < 4 or self.archs < 1:
            raise ValueError(f"pairs = {self.pairs}, batch = {self.batch}, size = {self.size}, archs = {self.archs}. "
                             "Allowed: from 2, 1, 4 and 1.")  # fmt: skip
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision = {self.precision!r} is not known. Allowed: {', '.join(PRECISIONS)}.")


# -- method -------------------------------------------------------------------------------------------------------------


def ratio(ours: Step, static: Step, pairs: int, warm: int = 3) -> Row:
    """Median of ``pairs`` CPU-time ratios ours / static with its bootstrap 90% interval; who goes first alternates."""
    for _ in range(warm):
        ours(), static()
    found = np.empty(pairs)
    for turn in range(pairs):
        if turn % 2:
            below, above = cpu_seconds(static), cpu_seconds(ours)
        else:
            above, below = cpu_seconds(ours), cpu_seconds(static)
        found[turn] = above / below
    interval = bootstrap((found,), np.median, confidence_level=0.9, method="percentile", random_state=0).confidence_interval
    return {"ratio": float(np.median(found)), "interval90": [float(interval.low), float(interval.high)]}


def cpu_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


class _Calls(TorchDispatchMode):
    """Counts operator calls, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def aten_calls(step: Step) -> int:
    """Operator calls of one step (best not its first): what a GPU launches, whatever the load on this machine."""
    with _Calls() as calls:
        step()
    return calls.count


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- measures -----------------------------------------------------------------------------------------------------------


def elastic(conditions: Conditions, layout: str) -> list[Row]:
    """A step of the tied supernet over a step of the extracted network, at three architectures."""
    space = CifarResNet(conditions.depth, "tied", conditions.widths)
    x = batch(conditions, layout).x
    cases = {"largest": space.largest(), "middle": middle(space), "smallest": space.smallest()}
    rows = []
    for case, arch in cases.items():
        net = ResNet(space)
        plain = extract(net, arch, x[:2])
        sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=conditions.fused)
        ours = training(net, sgd, conditions, layout, arch)
        static = training(plain, sgd, conditions, layout)
        rows.append(row("elastic", case, layout, ratio(ours, static, conditions.pairs), (aten_calls(ours), aten_calls(static))))
    return rows


def tas(conditions: Conditions, layout: str) -> list[Row]:
    """``TAS.update`` at its published settings, a fresh sample each time, over two steps at full width, for both kinds."""
    rows = []
    data = batch(conditions, layout)
    steps = 2 * conditions.pairs + 10
    for kind in ("tas", "tied"):
        space = CifarResNet(conditions.depth, kind, conditions.widths)
        net = ResNet(space)
        plain = extract(net, space.largest(), data.x[:2], inherit=False)
        costs = CostTable(net, (conditions.size, conditions.size))
        strategy = TAS(temperature=(5.0, 0.1))
        served = in_precision(net, conditions.precision, layout == "channels_last")
        strategy.start(Setup(served, space, costs, CrossEntropy(), None, steps, steps, conditions.batch))
        sgd = partial(torch.optim.SGD, **strategy.w.optimizer.defaults)
        static_step = training(plain, sgd, conditions, layout)
        moments = iter([moment(step, steps, steps, seed=1) for step in range(steps)])  # one epoch: temperature 5

        def ours(strategy: TAS = strategy, moments: Any = moments) -> None:
            strategy.update(lambda split, size=None, odds=None: data, next(moments))

        def static(step: Step = static_step) -> None:
            step(), step()

        rows.append(row("tas", kind, layout, ratio(ours, static, conditions.pairs), (aten_calls(ours), aten_calls(static))))
    return rows


def costs(conditions: Conditions) -> list[Row]:
    """Cost tables of both kinds: random architectures in one call, and an expectation with its gradient."""
    rows = []
    for kind in ("tied", "tas"):
        space = CifarResNet(conditions.cost_depth, kind)
        table = CostTable(ResNet(space), (32, 32))
        codes = space.random_codes(np.random.default_rng(0), conditions.archs)
        alpha = Alpha(space, generator=torch.Generator().manual_seed(0))

        def expect(table: CostTable = table, alpha: Alpha = alpha) -> None:
            table.expected(alpha.soft()).backward()

        seconds = median_seconds(partial(table.batch, codes), 5)
        rows.append({
            "measure": "costs", "case": f"ResNet-{conditions.cost_depth} {kind}", "choices": len(space.choices),
            "archs": conditions.archs, "archs_per_s": conditions.archs / seconds,
            "expected_ms": 1000 * median_seconds(expect, conditions.pairs),
        })  # fmt: skip
    return rows


# -- parts --------------------------------------------------------------------------------------------------------------


def batch(conditions: Conditions, layout: str) -> Batch:
    """Random images and classes, the same ones every time."""
    draw, B = torch.Generator().manual_seed(0), conditions.batch
    x = torch.randn(B, 3, conditions.size, conditions.size, generator=draw)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return Batch(x, torch.randint(10, (B,), generator=draw), torch.arange(B))


def training(net: nn.Module, optimizer: Callable[..., Optimizer], conditions: Conditions, layout: str, *arch: Arch) -> Step:
    """Forward, cross-entropy, backward into what was used, and the optimizer's step, as the strategies do it."""
    x, y, _ = batch(conditions, layout)
    net = in_precision(net, conditions.precision, layout == "channels_last").train()
    w, loss = Descent(net.parameters(), optimizer), CrossEntropy()
    return lambda: w.down(loss(net(x, *arch), y))


def middle(space: SearchSpace) -> Arch:
    """Every ordered choice at its middle option, the others as in the largest architecture."""
    largest = space.largest()
    return {c.name: c.options[len(c.options) // 2] if c.ordered else largest[c.name] for c in space.choices}


def median_seconds(step: Step, times: int) -> float:
    step()
    return statistics.median(cpu_seconds(step) for _ in range(times))


def row(measure: str, case: str, layout: str, found: Row, calls: tuple[int, int]) -> Row:
    goal, bound = GOALS[measure]
    low = found["interval90"][0]
    verdict = "goal met" if low < goal else "bound met" if low < bound else "missed"
    return {
        "measure": measure, "case": case, "layout": layout, **found, "goal": goal, "bound": bound, "verdict": verdict,
        "aten_calls": {"ours": calls[0], "static": calls[1], "difference": calls[0] - calls[1]},
    }  # fmt: skip


# -- report -------------------------------------------------------------------------------------------------------------


def measure(conditions: Conditions, only: Sequence[str] = MEASURES, layouts: Sequence[str] = LAYOUTS) -> dict[str, Any]:
    """All rows of the measures in ``only``, in ``layouts``, and the conditions they were taken under."""
    rows: list[Row] = []
    with one_thread():
        for name, step in (("elastic", elastic), ("tas", tas)):
            for layout in layouts if name in only else ():
                rows += step(conditions, layout)
        if "costs" in only:
            rows += costs(conditions)
    return {"conditions": asdict(conditions), "threads": 1, "torch": torch.__version__, "rows": rows}


def markdown(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    given = figures["conditions"]
    lines = [f"torch {figures['torch']}, CPU, 1 thread, {given['pairs']} pairs, batch {given['batch']} of 3x{given['size']}x"
             f"{given['size']}, {given['precision']}, elastic with {'fused' if given['fused'] else 'plain'} SGD"]  # fmt: skip
    ratios = [r for r in figures["rows"] if "ratio" in r]
    if ratios:
        lines += ["", "| measure | case | layout | ours / static (90%) | goal | bound | | aten calls, ours - static |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in ratios:
        (low, high), calls = r["interval90"], r["aten_calls"]
        cells = (r["measure"], r["case"], r["layout"], f"{r['ratio']:.3f} ({low:.3f} to {high:.3f})", r["goal"], r["bound"],
                 r["verdict"], f"{calls['ours']} - {calls['static']} = {calls['difference']}")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    tables = [r for r in figures["rows"] if r["measure"] == "costs"]
    if tables:
        lines += ["", "| cost table | choices | architectures a second | expected cost and gradient, ms |", "|---|---|---|---|"]
    for r in tables:
        lines.append(f"| {r['case']} | {r['choices']} | {r['archs_per_s']:,.0f} | {r['expected_ms']:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m nas.benchmarks.steps", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--depth", type=int, default=20, help="of the residual network")
    parser.add_argument("--widths", type=int, nargs=3, default=CifarResNet.WIDTHS, help="full width of each stage")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--fused", action="store_true", help="fused SGD on both sides of elastic (tas: as the strategy)")
    parser.add_argument("--archs", type=int, default=1_000_000, help="architectures a cost table is asked for")
    parser.add_argument("--cost-depth", type=int, default=56, help="of the space that is priced")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = vars(parser.parse_args(argv))
    only, layouts, out = args.pop("only"), args.pop("layouts"), args.pop("out")
    figures = measure(Conditions(**args | {"widths": tuple(args["widths"])}), only, layouts)
    print(markdown(figures))
    if out:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    main()
