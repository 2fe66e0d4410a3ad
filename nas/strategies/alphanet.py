"""AlphaNet: Improved Training of Supernets with Alpha-Divergence. Dilin Wang, Chengyue Gong, Meng Li, Qiang Liu, Vikas Chandra.
ICML 2021. arXiv 2102.07954. Facts and formulas of the shared page bignas.md, section 3; none of the released code.

    L = CE(y, z(a_max)) + sum over the other a of max over alpha in {alpha-, alpha+} of D_alpha(stopgrad p(a_max) || p(a))

One step, one batch, as of AttentiveNAS but for what is sampled and how it is taught:

    (1) a_max, the largest network: the labels' loss, dropout and drop-connect on
    (2) ``children`` uniform random networks, then a_min, the smallest, last: the adaptive alpha-divergence (nas.divergence) to
        the logits of (1), no dropout
    (3) one step on the sum of all gradients, each clipped by its value (``weights.clip_value``)

Published: alpha- = -1, alpha+ = 1, clip 5. What is reported of (2) is the surrogate G, whose gradient is that of D.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs, undropped
from nas.divergence import adaptive_divergence, check_divergence
from nas.losses import means, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value

COMBINE = ("sum", "mean")


def published() -> Weights:
    """For 256 images a step (the rate grows with them, 0.8 at 2048); recipes add the warm-up."""
    return Weights(lr=0.1, lr_min=0.0, nesterov=True, weight_decay=1e-5, norm_decay=False, clip=None, clip_value=1.0,
                   per_epoch=False)  # fmt: skip


@dataclass
class AlphaNet:
    """``children``: how many networks are sampled a step. ``alphas``: alpha- and alpha+; ``clip``: of the ratios, None for no
    clipping. ``drop``: of the largest network. ``combine``: the "sum" of the networks' losses, as published, or their "mean".
    """

    children: int = 2
    alphas: tuple[float, float] = (-1.0, 1.0)
    clip: float | None = 5.0
    drop: float = 0.2
    combine: str = "sum"
    weights: Weights = field(default_factory=published)

    def __post_init__(self) -> None:
        if len(self.alphas) != 2:
            raise ValueError(f"alphas = {list(self.alphas)}. Give two, alpha- and alpha+, such as [-1, 1].")
        check_divergence(self.alphas, self.clip)
        if self.children < 0 or not 0 <= self.drop < 1:
            raise ValueError(f"children = {self.children}, drop = {self.drop}. Allowed: from 0; from 0, below 1.")
        if self.combine not in COMBINE:
            raise ValueError(f"combine = {self.combine!r} is not known. Allowed: {', '.join(COMBINE)}.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "AlphaNet")
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)

    def passes(self) -> float:
        return (2 + self.children) * self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, parts = self.w.rate, list[dict[str, Tensor]]()
        archs = [*(self.space.sample(now.rng) for _ in range(self.children)), self.space.smallest()]
        share = 1.0 if self.combine == "sum" else 1 / (1 + len(archs))
        for _ in range(self.weights.accumulate):
            x, y, _ = draw("train")
            z = self.net(x, self.space.largest(), self.drop)
            loss = self.setup.loss(z, y)
            self.w.add(share * loss)  # (1)
            losses = list[Tensor]()
            with undropped(self.net):
                for arch in archs:
                    losses.append(adaptive_divergence(self.net(x, arch), z, self.alphas, self.clip))
                    self.w.add(share * losses[-1])  # (2)
            self.w.step(norm=True)  # (3)
            children = {"train/loss_children": torch.stack(losses[:-1]).detach().mean()} if self.children else {}
            parts.append({
                "train/loss": loss.detach(), "train/top1": top1(z, y), "train/loss_smallest": losses[-1].detach(), **children,
            })  # fmt: skip
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm}

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
