"""FairNAS: Rethinking Evaluation Fairness of Weight Sharing Neural Architecture Search. Xiangxiang Chu, Bo Zhang, Ruijun Xu.
ICCV 2021. arXiv 1907.01845. Rules as in the shared page single-path.md, section 2 (no training code was released).

Strict fairness, one step on one batch, n options a choice:

    (1) for each choice an independent uniform permutation of its n options
    (2) path k takes element k of every permutation, k = 1..n
    (3) the gradients of all n paths are added; one clip, one update of w

So each option of each choice is used exactly once an update; where ``weights`` accumulates, once on each of its batches. The
permutations are fresh every step (PA-DA's code trains the same paths for a whole epoch). "sum" is what PA-DA's version does;
with "mean" the rate is n times smaller for plain SGD. Paths are what the permutations give: in NAS-Bench-201 that includes
cells in which a node receives nothing. An update costs n passes: compare by passes, not by epochs. A searcher picks afterwards,
as for SPOS.

Not done: choices of unequal numbers of options, and options that count in some paths only; they are refused.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs
from nas.importance import ImageImportance, Importance
from nas.losses import means, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, SearchSpace, Setting, Value

COMBINE = ("sum", "mean")


@dataclass
class FairNAS:
    """``combine``: the gradients of the n paths are added ("sum", published) or averaged ("mean"). ``images``: drawn in
    proportion to their gradients, the mean over the n paths, as PA&DA does (no part of the paper); None: each once an epoch."""

    combine: str = "sum"
    weights: Weights = field(default_factory=Weights)
    images: Importance | None = None

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise ValueError(f"combine = {self.combine!r} is not known. Allowed: {', '.join(COMBINE)}.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "FairNAS")
        options(self.space)  # refuses what it cannot train
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)
        self.drawn = ImageImportance(setup.images, self.images, next(self.net.parameters()).device)

    @property
    def count(self) -> int:
        """n. No attribute, which a part of the space would take over with its parent's state."""
        return options(self.space)

    def passes(self) -> float:
        return self.count * self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, paths, parts = self.w.rate, self.paths(now), list[dict[str, Tensor]]()
        share, seen = 1.0 if self.combine == "sum" else 1.0 / self.count, list[dict[str, Tensor]]()
        for _ in range(self.weights.accumulate):
            x, y, i = draw("train", odds=self.drawn.odds)
            every = list[Tensor]()
            for path in paths:
                z = self.net(x, path)
                loss = self.drawn.loss(self.setup.loss, z, y, i)
                self.w.add(share * loss)  # (3)
                every.append(z.detach())
                parts.append({"train/loss": loss.detach(), "train/top1": top1(z, y)})
            self.w.step(norm=True)
            seen.append(self.drawn.see(i, torch.cat(every), y))
        if (now.step + 1) % self.setup.epoch_steps == 0:
            self.drawn.turn(now.epoch / now.epochs)
        return {**means(parts), **means(seen), "train/lr": rate, "train/grad_norm": self.w.grad_norm}

    def paths(self, now: Moment) -> list[Arch]:
        """The n paths of a step."""
        orders = [now.rng.sample(choice.options, len(choice.options)) for choice in self.space.choices]  # (1)
        return [{choice.name: order[k % len(order)] for choice, order in zip(self.space.choices, orders)}
                for k in range(self.count)]  # (2): a choice with one option left takes it in every path  # fmt: skip

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """The first of the paths."""
        return self.paths(now)[0]

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        """The largest; a searcher picks."""
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net


def options(space: SearchSpace) -> int:
    """n, the number of options of every open choice. ValueError where they differ, where options count in some paths only,
    and where nothing is open."""
    counts = {c.name: len(c.options) for c in space.choices if len(c.options) > 1}
    bound = [name for name in counts if name in space.ties
             or any(not set(space[other].options) <= set(values) for other, values in space[name].needs)]  # fmt: skip
    if bound:
        raise ValueError(f"FairNAS uses every option once a step, but other choices decide whether {', '.join(bound)} count or "
                         "what they are. Restrict these to one option, or what they depend on.")  # fmt: skip
    if len(set(counts.values())) != 1:
        said = ", ".join(f"{name} has {n}" for name, n in counts.items()) or "none is open"
        raise ValueError(f"FairNAS needs as many options in every open choice: {said}. Restrict them to the same number.")
    return next(iter(counts.values()))
