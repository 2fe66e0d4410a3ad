"""AttentiveNAS: Improving Neural Architecture Search via Attentive Sampling. Dilin Wang, Meng Li, Chengyue Gong, Vikas Chandra.
CVPR 2021. arXiv 2011.09011. Facts and formulas of the shared page bignas.md, section 3; none of the released code.

    L = CE(y, z(a_max)) + sum over the other a of CE(stopgrad softmax z(a_max), z(a))

One step, one batch:

    (1) a_max, the largest network: the labels' loss, dropout and drop-connect on
    (2) ``children`` sampled networks, then a_min, the smallest, last: soft cross-entropy to the logits of (1), no dropout
    (3) one step on the sum of all gradients, each clipped by its value (``weights.clip_value``)

A sampled network (nas.bins): a bin t of MACs by its share among random networks, ``candidates`` networks from the marginals of
t, scored by -loss of the labels on this batch without a gradient. ``pick`` "best" (BestUp) trains the best of them, "worst"
(WorstUp) the worst; one candidate is trained unscored. Published: BestUp, 3 candidates, bins of 25 M MACs. Where ``weights``
accumulates, a step's batches are drawn together and score as one: by the mean of their losses.

The images come at one size (224, ``data.size``) and the net resizes them to each network's resolution, a choice of the space.

Not done: scoring by an accuracy predictor (of the paper, 50 candidates, unverified). ``passes`` leaves out the candidates'
forward passes, as nothing learns from them.
"""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs, undropped
from nas.bins import Bins
from nas.descent import average
from nas.losses import means, soft_cross_entropy, top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value

PICKS = ("best", "worst")
COMBINE = ("sum", "mean")


def published() -> Weights:
    """For 256 images a step (the rate grows with them, 0.8 at 2048); recipes add the warm-up."""
    return Weights(lr=0.1, lr_min=0.0, nesterov=True, weight_decay=1e-5, norm_decay=False, clip=None, clip_value=1.0,
                   per_epoch=False)  # fmt: skip


@dataclass
class Attentive:
    """``children``: how many networks are sampled a step. ``candidates``: among how many each of them is picked.
    ``bin_width``: in MACs, or a share of the largest network such as "2%"; ``samples``, ``seed``: what the bins are counted
    from. ``drop``: of the largest network. ``combine``: the "sum" of the networks' losses, as published, or their "mean"."""

    children: int = 2
    candidates: int = 3
    pick: str = "best"
    bin_width: str | float = 25e6
    samples: int = 100_000
    seed: int = 0
    drop: float = 0.2
    combine: str = "sum"
    weights: Weights = field(default_factory=published)

    def __post_init__(self) -> None:
        if self.children < 0 or self.candidates < 1:
            raise ValueError(f"children = {self.children}, candidates = {self.candidates}. Allowed: from 0, from 1.")
        if self.pick not in PICKS or self.combine not in COMBINE:
            raise ValueError(f"pick = {self.pick!r}, combine = {self.combine!r}. Allowed: {', '.join(PICKS)}; "
                             f"{', '.join(COMBINE)}.")  # fmt: skip
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop = {self.drop} is no dropout rate. Allowed: from 0, below 1.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "AttentiveNAS")
        self.bins = Bins(self.space, self.costs, self.bin_width, self.samples, self.seed, whole=self.net.space)
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)

    def passes(self) -> float:
        return (2 + self.children) * self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, share = self.w.rate, 1.0 if self.combine == "sum" else 1 / (2 + self.children)
        batches, parts = [draw("train") for _ in range(self.weights.accumulate)], list[dict[str, Tensor]]()
        archs = list[Arch]()
        for x, y, _ in batches:
            z = self.net(x, self.space.largest(), self.drop)
            loss = self.setup.loss(z, y)
            self.w.add(share * loss)  # (1)
            losses = list[Tensor]()
            with undropped(self.net):
                for i in range(self.children + 1):
                    if len(archs) == i:  # on the first batch, for all of them
                        archs.append(self.attended(batches, now.rng) if i < self.children else self.space.smallest())
                    losses.append(soft_cross_entropy(self.net(x, archs[i]), z))
                    self.w.add(share * losses[-1])  # (2)
            self.w.step(norm=True)  # (3)
            children = {"train/loss_children": torch.stack(losses[:-1]).detach().mean()} if self.children else {}
            parts.append({
                "train/loss": loss.detach(), "train/top1": top1(z, y), "train/loss_smallest": losses[-1].detach(), **children,
            })  # fmt: skip
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm}

    @torch.no_grad()
    def attended(self, batches: Sequence[Batch], rng: random.Random) -> Arch:
        """The next network to sample, the same on every rank: scores are of all images of the step."""
        candidates = self.bins.draw(rng, self.candidates)
        if len(candidates) == 1:
            return candidates[0]
        losses = average(torch.stack([self._loss(batches, arch) for arch in candidates]))
        return candidates[int(losses.argmin() if self.pick == "best" else losses.argmax())]

    def _loss(self, batches: Sequence[Batch], arch: Arch) -> Tensor:
        return torch.stack([self.setup.loss(self.net(x, arch), y) for x, y, _ in batches]).mean()

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """The first network that the next step trains."""
        return self.space.largest()

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        """The largest; a searcher finds others."""
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
