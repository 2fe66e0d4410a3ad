"""Steps of once-for-all supernets against their extracted networks: ``python -m nas.benchmarks.once`` (method:
nas/benchmarks/pairs.py).

"ofa": OFA-MobileNetV3 at width 1.0, with kernel matrices. "attentive": the space of AttentiveNAS. Images of --size, no
resolution to choose, so that neither side resizes.

``largest``, ``random``, ``smallest``: forward, cross-entropy, backward and SGD's step of one architecture in the supernet, over
the same of the network extracted for it (the random one is the same throughout). ``sandwich``: a step of BigNAS with the
largest, the smallest and two random children, the same ones every time, over forward and backward of these four as plain
networks, at the same losses, and one optimizer step, of the largest; beside it over one step of the largest alone, for the peak
memory. All that a step of the strategy does counts (its metrics, the norm of its gradient).

``evolution``: --generations of --population candidates in the space of "ofa" within a window of MACs, each scored by a number
at once; CPU seconds. ``evaluation``: recalibrating and evaluating --subnets subnets of "ofa" over evaluating the extracted
networks, in ten parts; on as many training images as test images, so that twice the forward passes are run.
"""
from __future__ import annotations

import random
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from nas.benchmarks.pairs import Bench, Case, Option, program
from nas.benchmarks.steps import Conditions, Row, Step, ratio
from nas.bilevel import Weights
from nas.cost import CostTable
from nas.data import Data
from nas.descent import Descent
from nas.engine import moment
from nas.evaluate import score_archs, score_plain
from nas.losses import CrossEntropy, soft_cross_entropy
from nas.precision import in_precision
from nas.searchers.evolution import Evolution
from nas.strategies.bignas import BigNAS
from search_spaces.bignas import AttentiveNAS
from search_spaces.mobilenet import OFAMobileNetV3
from search_spaces.space import Arch, SearchSpace
from supernets import bignas, mobilenet
from supernets.extract import extract

KINDS = ("ofa", "attentive")
ARCHS = ("largest", "random", "smallest")
GOAL, BOUND = 1.02, 1.06
"""Of elastic and sandwich steps: what is aimed at, and what they may cost at most."""
RELEASED = {"largest": 1.00, "random": 1.1, "smallest": 1.13, "sandwich": 1.15}
CASES = {
    **{f"{kind}, {arch}": Case(f"{kind}-{arch}", f"{kind}-{arch}-plain", GOAL) for kind in KINDS for arch in ARCHS},
    **{f"{kind}, sandwich": Case(f"{kind}-sandwich", f"{kind}-sandwich-plain", GOAL) for kind in KINDS},
    **{f"{kind}, sandwich over the largest": Case(f"{kind}-sandwich", f"{kind}-largest-plain", None) for kind in KINDS},
}
SECONDS = 2.0  # for the evolution
WINDOW = (0.35, 0.45)  # of the largest's MACs
OPTIONS = {
    "width": Option(100, "ofa: per cent of the published widths"),
    "population": Option(100, "evolution: candidates a generation"), "generations": Option(500, "evolution: generations"),
    "subnets": Option(100, "evaluation: networks"), "images": Option(128, "evaluation: test images, and training images too"),
}  # fmt: skip


class OnceBench(Bench):
    """Steps of both kinds."""

    def make(self, name: str) -> Step:
        kind, what, *plain = name.split("-")
        torch.manual_seed(0)
        space, net = supernet(kind, self.numbers["width"])
        sgd = Weights(lr=0.01, momentum=0.9, nesterov=True, weight_decay=3e-5, clip=None, per_epoch=False, idle="skip")
        if what == "sandwich":
            if plain:
                rng = moment(0, 1, 1, seed=1).rng
                return self._apart(net, [space.largest(), space.smallest(), space.sample(rng), space.sample(rng)])
            strategy = self.started(BigNAS(drop=0.0, weights=sgd), space, net)
            return lambda: strategy.update(self.draw, moment(0, 1, 1, seed=1))  # the same two random children every time
        arch = {"largest": space.largest, "smallest": space.smallest, "random": lambda: space.sample(random.Random(0))}[what]()
        if plain:
            return self._step(self._extracted(net, arch))
        return self._step(in_precision(net, self.conditions.precision, self.layout == "channels_last").train(), arch)

    def _extracted(self, net: nn.Module, arch: Arch) -> nn.Module:
        plain = extract(net, arch, self.data.x[:2], inherit=False)
        return in_precision(plain, self.conditions.precision, self.layout == "channels_last").train()

    def _step(self, net: nn.Module, *arch: Arch) -> Step:
        w, loss, (x, y, _) = _descent(net), CrossEntropy(), self.data
        return lambda: w.down(loss(net(x, *arch), y))

    def _apart(self, net: nn.Module, children: list[Arch]) -> Step:
        """Forward and backward of four plain networks, a step of the first, which teaches the others."""
        largest, *others = (self._extracted(net, arch) for arch in children)
        w, loss, (x, y, _) = _descent(largest), CrossEntropy(), self.data

        def step() -> None:
            z = largest(x)
            w.add(loss(z, y))
            for other in others:
                soft_cross_entropy(other(x), z.detach()).backward()
                other.zero_grad(set_to_none=True)
            w.step()

        return step


def supernet(kind: str, width: int, channels: int = 3) -> tuple[SearchSpace, nn.Module]:
    """The space of ``kind`` without resolutions, and its supernet. ``width``: per cent, of "ofa"."""
    if kind == "ofa":
        space = OFAMobileNetV3(width=width / 100, resolution=())
        return space, mobilenet.build(space, channels, 10)
    attentive = AttentiveNAS(resolution=())
    return attentive, bignas.build(attentive, channels, 10)


def _descent(net: nn.Module) -> Descent:
    return Descent(net.parameters(), partial(SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=3e-5, fused=True),
                   idle="skip")  # fmt: skip


def evolution(conditions: Conditions, numbers: Mapping[str, int], layout: str) -> Row:
    """CPU seconds of the search alone: every candidate gets a score at once."""
    space, net = supernet("ofa", numbers["width"])
    table = CostTable(net, (conditions.size, conditions.size))
    largest = table.of(space.largest())
    n = numbers["population"]
    searcher = Evolution(n, max(1, n // 4), n // 2, n - n // 2, generations=numbers["generations"])
    weights = np.random.default_rng(0).random(len(space.choices))
    began, scored = time.process_time(), 0
    searcher.start(space, {"macs": table}, [("macs", WINDOW[0] * largest, WINDOW[1] * largest)])
    while len(codes := searcher.ask(n)):
        searcher.tell(codes, codes @ weights)
        scored += len(codes)
    return {"measure": "evolution", "candidates": scored, "seconds": time.process_time() - began, "goal": SECONDS}


def evaluation(conditions: Conditions, numbers: Mapping[str, int], layout: str) -> Row:
    """Ratios of recalibrated readings to plain ones, on the digits at the size of the conditions."""
    torch.manual_seed(0)
    data, cpu = Data("digits", size=conditions.size, batch_size=numbers["images"] // 2 or 1), torch.device("cpu")
    space, net = supernet("ofa", numbers["width"], channels=1)
    x = next(iter(data.batches("train", cpu))).x[:2]
    last = layout == "channels_last"
    rng = random.Random(0)
    archs = [space.sample(rng) for _ in range(numbers["subnets"])]
    plain = [in_precision(extract(net, arch, x), conditions.precision, last) for arch in archs]
    net = in_precision(net, conditions.precision, last)
    parts = max(2, min(10, len(archs)))
    turns = {"ours": 0, "plain": 0}

    def part(side: str) -> range:
        first = turns[side] % parts
        turns[side] += 1
        return range(first, len(archs), parts)

    def ours() -> None:
        score_archs(net, [archs[i] for i in part("ours")], data, "test", cpu, numbers["images"], limit=numbers["images"])

    def against() -> None:
        for i in part("plain"):
            score_plain(plain[i], data, "test", cpu, limit=numbers["images"])

    return {"measure": "evaluation", "subnets": len(archs), "images": numbers["images"],
            **ratio(ours, against, parts, warm=0), "passes": 2.0}  # fmt: skip


def verdict(row: Row) -> str:
    """How a step does against goal, bound and the released code, in a line."""
    low, what = row["interval90"][0], row["case"].partition(", ")[2]
    words = "goal met" if low < GOAL else "bound met" if low < BOUND else "missed"
    return (f"{row['case']}, {row['layout']}: {row['ratio']:.3f}; goal {GOAL}, at most {BOUND}: {words}; released code "
            f"{RELEASED[what]:.2f}")  # fmt: skip


FURTHER = {"evolution": evolution, "evaluation": evaluation}


def said(row: Row) -> str:
    """A further figure in a line."""
    if row["measure"] == "evolution":
        end = "met" if row["seconds"] < row["goal"] else "missed"
        return f"evolution, {row['candidates']:,} candidates: {row['seconds']:.2f} s (goal {row['goal']}: {end})"
    low, high = row["interval90"]
    return (f"recalibrating and evaluating {row['subnets']} subnets / plain evaluations, {row['images']} images each: "
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}); passes: {row['passes']}")  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    figures = program("nas.benchmarks.once", __doc__, OnceBench, CASES, OPTIONS, argv, FURTHER)
    for row in figures.get("rows", ()):
        if row["goal"] is not None:
            print(verdict(row))
    for row in figures.get("further", ()):
        print(said(row))
    for layout, peaks in figures.get("peaks", {}).items():
        for kind in KINDS:
            ours, against = peaks.get(f"{kind}-sandwich", 0.0), peaks.get(f"{kind}-largest-plain", 0.0)
            if ours and against:  # measured, and more than torch itself takes
                print(f"{kind}, {layout}: peak memory of the sandwich / of the largest plain step {ours / against:.2f}")
    return figures


if __name__ == "__main__":
    main()
