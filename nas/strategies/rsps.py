"""RSPS: Random Search and Reproducibility for Neural Architecture Search. Liam Li, Ameet Talwalkar. UAI 2019.
arXiv 1902.07638. Rules as in the NATS-Bench code (shared page single-path.md).

    (1) w <- SGD on grad_w L_train(w, A), A a uniform random legal architecture, fresh every step
    (2) at the end: of ``archs`` random architectures, the one with the best accuracy on validation images

Legal is what ``space.sample`` gives: in NAS-Bench-201 a node is redrawn while all its incoming operations are none. In (2)
every architecture sees ``batches`` random batches (published: one of 512; its standard error is about 2 points, so give more
unless fidelity is the aim) and is normalised by the batch's own statistics, without dropout. They are images held out for
picks (``select``, where that is empty the validation split), as they are: without the training view's crops and flips. Before
the end ``architecture`` is the path of the last step. There are no alphas; the arch half is not forwarded during training.

Not done: the released code draws operations for every cell anew; here all cells share one architecture, as what is derived.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs, undropped
from nas.descent import average
from nas.losses import means, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class RSPS:
    """``archs``: how many are compared at the end, on ``batches`` batches each."""

    archs: int = 100
    batches: int = 1
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        if self.archs < 1 or self.batches < 1:
            raise ValueError(f"archs = {self.archs}, batches = {self.batches}. Allowed: 1 or more.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "RSPS")
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)
        self.chosen: Arch = self.space.smallest()

    def passes(self) -> float:
        return self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, parts = self.w.rate, list[dict[str, Tensor]]()
        self.chosen = self.space.sample(now.rng)
        for _ in range(self.weights.accumulate):
            x, y, _ = draw("train")
            z = self.net(x, self.chosen)
            loss = self.setup.loss(z, y)
            self.w.down(loss, norm=True)  # (1)
            parts.append({"train/loss": loss.detach(), "train/top1": top1(z, y)})
        found: Metrics = {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm}
        return {**found, **(self.select(draw, now) if now.step + 1 == now.steps else {})}

    @torch.no_grad()
    def select(self, draw: Draw, now: Moment) -> Metrics:
        best = -1.0
        for _ in range(self.archs):
            arch, right = self.space.sample(now.rng), torch.zeros((), dtype=torch.float64)
            for _ in range(self.batches):
                x, y, _ = draw("select", odds=1.0)
                with undropped(self.net):
                    z = self.net(x, arch)
                right += average(top1(z, y)).double().cpu() / self.batches
            if float(right) > best:
                best, self.chosen = float(right), arch  # (2)
        return {"valid/top1": best}

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        return self.space.sample(now.rng)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        """What was chosen. Of a part of a space that was given its parent's state, that may be gone: the smallest, until the
        first step."""
        try:
            self.space.check(self.chosen)
        except ValueError:
            return self.space.smallest()
        return dict(self.chosen)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
