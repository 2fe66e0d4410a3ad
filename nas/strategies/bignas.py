"""BigNAS: Scaling Up Neural Architecture Search with Big Single-Stage Models. Jiahui Yu, Pengchong Jin, Hanxiao Liu, Gabriel
Bender, Pieter-Jan Kindermans, Mingxing Tan, Thomas Huang, Xiaodan Song, Ruoming Pang, Quoc Le. ECCV 2020. arXiv 2003.11142.
There is no official code; rules as in the shared page bignas.md, sections 1, 3 and 4.

    L = CE(y, z(a_max)) + sum over a of D(stopgrad p(a_max), p(a)),   a: the smallest child and N random ones

One step, the sandwich rule with in-place distillation, on one batch:

    (1) z(a_max) with dropout; backward of the label loss, smoothed where the recipe's loss is; keep z(a_max), detached
    (2) each other child without dropout: backward of D, soft cross-entropy with softmax(z(a_max)), no label term
    (3) the gradients of all are summed; one step of the optimizer, which adds weight decay once

Every backward follows its forward, so that one graph is held at a time. D exceeds the KL divergence by the teacher's entropy,
a constant. A child reads the batch at its own resolution where that is a choice (the supernet resizes). Batch norms use each
child's own batch statistics. "mean" divides by the number of children, as mmrazor does: the rate is then as many times
smaller for plain SGD. The zero start of the last scales is the supernet's (``zero_gamma``); the floor of the rate is that of
``weights`` (``lr_min``). What is trained is picked from by a searcher, ranked after recalibration, without retraining.

The published numbers of optimizer and schedule are as the page gives them, none of them verified.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs, undropped
from nas.importance import ImageImportance, Importance
from nas.losses import means, soft_cross_entropy, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value

COMBINE = ("sum", "mean")


def published() -> Weights:
    """RMSProp at batch 4096: 0.256 max(0.97^(t / 2.4), 0.05) after 5 epochs of warming up, t in epochs."""
    return Weights(lr=0.256, lr_min=0.0128, optimizer="rmsprop", weight_decay=1e-5, clip=None, per_epoch=False, warmup_epochs=5,
                   schedule="exponential")  # fmt: skip


@dataclass
class BigNAS:
    """``children``: N, the random ones of a step. ``drop``: dropout of the biggest. ``combine``: the gradients of all children
    are added ("sum", published) or averaged ("mean"). ``images``: drawn in proportion to the biggest's gradients, as PA&DA does
    (no part of the paper); None: each once an epoch."""

    children: int = 2
    drop: float = 0.2
    combine: str = "sum"
    weights: Weights = field(default_factory=published)
    images: Importance | None = None

    def __post_init__(self) -> None:
        if self.children < 0 or not 0.0 <= self.drop < 1.0:
            raise ValueError(f"children = {self.children}, drop = {self.drop}. Allowed: from 0, and a rate from 0, below 1.")
        if self.combine not in COMBINE:
            raise ValueError(f"combine = {self.combine!r} is not known. Allowed: {', '.join(COMBINE)}.")
        if self.images is not None and self.images.reweight:
            raise ValueError("images: reweight = true, but children learn from the biggest, and their distances have no weight "
                             "of an image. Allowed with BigNAS: false.")  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "BigNAS")
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)
        self.drawn = ImageImportance(setup.images, self.images, next(self.net.parameters()).device)

    def passes(self) -> float:
        return (2 + self.children) * self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, parts = self.w.rate, list[dict[str, Tensor]]()
        children = [self.space.smallest(), *(self.space.sample(now.rng) for _ in range(self.children))]
        share = 1.0 if self.combine == "sum" else 1.0 / (1 + len(children))
        for _ in range(self.weights.accumulate):
            x, y, i = draw("train", odds=self.drawn.odds)
            z = self.net(x, self.space.largest(), drop=self.drop)
            loss = self.drawn.loss(self.setup.loss, z, y, i)
            self.w.add(share * loss)  # (1)
            teacher, distances = z.detach(), list[Tensor]()
            with undropped(self.net):
                for child in children:
                    D = soft_cross_entropy(self.net(x, child), teacher)
                    self.w.add(share * D)  # (2)
                    distances.append(D.detach())
            self.w.step(norm=True)  # (3)
            smallest, *others = distances
            parts.append({
                "train/loss": loss.detach(), "train/top1": top1(z, y), "train/loss_smallest": smallest,
                **({"train/loss_children": torch.stack(others).mean()} if others else {}), **self.drawn.see(i, z, y),
            })  # fmt: skip
        if (now.step + 1) % self.setup.epoch_steps == 0:
            self.drawn.turn(now.epoch / now.epochs)
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm}

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """What a step runs first."""
        return self.space.largest()

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        """The biggest; a searcher picks."""
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
