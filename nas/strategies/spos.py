"""SPOS: Single Path One-Shot Neural Architecture Search with Uniform Sampling. Zichao Guo, Xiangyu Zhang, Haoyuan Mu, Wen Heng,
Zechun Liu, Yichen Wei, Jian Sun. ECCV 2020. arXiv 1904.00420. Rules as in the shared page single-path.md, section 2.

    (1) w <- SGD on grad_w L_train(w, A), A a uniform random path, fresh every step, the same for the whole batch
    (2) afterwards a searcher ranks paths by accuracy on held-out images, with recalibrated batch norms (published: evolution)

Uniform is what ``space.sample`` draws: an option per choice, each for itself. Cell spaces draw their legal cells only, all of
them equally often: in NAS-Bench-201 no node without input (the baselines in PA-DA's code train such dead cells too). There
are no alphas. ``architecture`` is the largest network until a searcher has picked.

Not done: training by a budget, where the paper redraws paths until one meets a limit.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nas.bilevel import Weights, space_and_costs
from nas.losses import means, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class SPOS:
    """``weights``: the descent on the weights, all there is to set."""

    weights: Weights = field(default_factory=Weights)

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "SPOS")
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)

    def passes(self) -> float:
        return self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, arch, parts = self.w.rate, self.arch(now), list[dict[str, Tensor]]()
        for _ in range(self.weights.accumulate):
            x, y, _ = draw("train")
            z = self.net(x, arch)
            loss = self.setup.loss(z, y)
            self.w.down(loss, norm=True)  # (1)
            parts.append({"train/loss": loss.detach(), "train/top1": top1(z, y)})
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm}

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        return self.space.sample(now.rng)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
