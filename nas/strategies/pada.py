"""PA&DA: Jointly Sampling PAth and DAta for Consistent NAS. Shun Lu, Yu Hu, Longxing Yang, Zihao Sun, Jilin Mei, Jianchao Tan,
Chengru Song. CVPR 2023. arXiv 2302.14772. Rules and numbers as in the shared page pada.md, section 2 (released code).

One path a step, as SPOS; its options and the images of an epoch are drawn in proportion to the norms of their gradients:

    (1)      path ~ p, each choice by itself                      (12) images ~ q, with replacement; first epoch: each once
    (3)      s_i = || softmax(z_i) - onehot(y_i) ||_2             (4)-(6) one backward, one clip, one update of w
    (7), (8) S_o = mean over the choices that carry option o of the norms of its gradients; G_o <- (G_o + S_o) / 2 where S_o > 0
    at the end of epoch e, with tau_e = e / E:
    (9)      p <- tau_e G / sum(G) + (1 - tau_e) / n              (11) q <- tau_e s / sum(s) + (1 - tau_e) / N

p is shared by all choices with the same options, as published. A path that the space would not sample (in NAS-Bench-201 a dead
cell, which the released code trains too) is drawn anew. Choices whose options share their weights (widths) are uniform. There
are no alphas; ``architecture`` is the largest network until a searcher has picked.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from nas.bilevel import Weights, space_and_costs
from nas.importance import ImageImportance, Importance, PathImportance
from nas.losses import means, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value

POINTS = ("after_clip", "before_clip")


def published() -> Weights:
    """Of NAS-Bench-201 (released code): SGD at 0.05 to 0, a cosine over the epochs; momentum 0.9."""
    return Weights(lr=0.05, lr_min=0.0, momentum=0.9, weight_decay=2.5e-4, clip=5.0)


@dataclass
class PADA:
    """``path``, ``data``: which of the two is drawn by importance; the other is uniform. ``shared``: one p for all choices with
    the same options, else one each. ``norm_point``: where gradients are read for (7), "after_clip" (published) or
    "before_clip". ``floor``: the least p of an option (published: 0, and options without parameters starve as tau nears 1).
    ``reweight``: losses times 1 / (N q_i), an unbiased gradient (published: no). ``carry``: an image that an epoch did not meet
    keeps its last score (published: 0, and it hardly comes again as tau nears 1)."""

    path: bool = True
    data: bool = True
    shared: bool = True
    norm_point: str = "after_clip"
    floor: float = 0.0
    reweight: bool = False
    carry: bool = False
    weights: Weights = field(default_factory=published)

    def __post_init__(self) -> None:
        if self.norm_point not in POINTS:
            raise ValueError(f"norm_point = {self.norm_point!r} is not known. Allowed: {', '.join(POINTS)}.")
        if not (self.path or self.data):
            raise ValueError("path and data are both false, so nothing is drawn by importance. Set one of them, or take SPOS.")
        if not self.data and (self.reweight or self.carry):
            raise ValueError("reweight and carry are about drawn images, but data is false. Leave them out, or set data.")
        if not self.path and (self.floor or self.norm_point != POINTS[0]):
            raise ValueError("floor and norm_point are about drawn paths, but path is false. Leave them out, or set path.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "PADA")
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)
        device = next(self.net.parameters()).device
        self.paths = PathImportance(self.space, self.net, self.shared, self.floor, device) if self.path else None
        self.images = ImageImportance(setup.images, Importance(self.reweight, self.carry) if self.data else None, device)

    def passes(self) -> float:
        return self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, path, parts = self.w.rate, self._path(now), list[dict[str, Tensor]]()
        look = None if self.paths is None else partial(self.paths.look, path)
        for _ in range(self.weights.accumulate):
            x, y, i = draw("train", odds=self.images.odds)  # (12)
            z = self.net(x, path)
            loss, scores = self.images.loss(self.setup.loss, z, y, i), self.images.see(i, z, y)  # (3)
            self.w.add(loss)  # (4)
            self.w.step(norm=True, look=look, unclipped=self.norm_point == "before_clip")  # (5)-(8)
            parts.append({"train/loss": loss.detach(), "train/top1": top1(z, y), **scores})
        tau = now.epoch / now.epochs
        if (now.step + 1) % self.setup.epoch_steps == 0:
            if self.paths is not None:
                self.paths.turn(tau)  # (9)
            self.images.turn(tau)  # (10)-(12)
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm, "importance/tau": tau}

    def _path(self, now: Moment) -> Arch:
        return self.space.sample(now.rng) if self.paths is None else self.paths.draw(now.rng)  # (1)

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        return self._path(now)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice: p says what is trained most, not what is best."""
        return {}

    def architecture(self) -> Arch:
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
