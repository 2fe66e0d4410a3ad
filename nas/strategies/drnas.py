"""DrNAS: Dirichlet Neural Architecture Search. Xiangning Chen, Ruochen Wang, Minhao Cheng, Xiaocheng Tang, Cho-Jui Hsieh.
ICLR 2021. arXiv 2006.10355.

    min over a:  E_t [L_val(w*(a), t)],   t ~ Dirichlet(elu(a) + 1) for every choice
    where  w*(a) = argmin over w of E_t [L_train(w, t)]

    (1) a <- Adam on grad_a [L_val(w, t) + kl sum over choices of KL(Dirichlet(elu(a) + 1) || Dirichlet(anchor))],   t a sample
    (2) w <- SGD on grad_w L_train(w, t), another sample, clipped

The gradient goes through the sample (``nas.simplex.dirichlet``). A sample is drawn afresh for every forward, one for the whole
network: all cells share it. The regulariser is a decay of 1e-3 on a (``alphas.weight_decay``), or instead of it the divergence
with kl = 1e-3. The derived architecture is the most probable one by softmax(a).

Not done: the progressive search through partial channel connections with its growing widths and shrinking operation sets,
for which the pages give no settings; so on DARTS cells all channels pass through the operations. Not part of the paper:
``budget``, a term on the cost expected of t, that is at the mean of the Dirichlet; alpha warm-up and skip limit (``alphas``).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Alphas, Weights, space_and_costs
from nas.budget import Budget
from nas.losses import top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class DrNAS:
    """``kl``: weight of the divergence from Dirichlet(``anchor``), the uniform distribution at 1; it takes the place of
    ``alphas.weight_decay``, which must be 0 with it."""

    kl: float = 0.0
    anchor: float = 1.0
    weights: Weights = field(default_factory=Weights)
    alphas: Alphas = field(default_factory=Alphas)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if not (self.kl >= 0 and self.anchor > 0):
            raise ValueError(f"kl = {self.kl}, anchor = {self.anchor}. Allowed: kl of 0 or more, anchor above 0.")
        if self.kl and self.alphas.weight_decay:
            raise ValueError(f"kl = {self.kl} and alphas.weight_decay = {self.alphas.weight_decay}: two regularisers, of which "
                             "the paper takes one. Set either to 0.")  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "DrNAS")
        self.w = self.weights.descent(self.net.parameters(), setup)
        self.alpha = self.alphas.alpha(setup)
        self.a = self.alphas.descent(self.alpha)
        if self.budget is not None:
            self.budget.start(self.costs, self.space)

    def passes(self) -> float:
        return 2

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate = self.w.rate
        found: Metrics = {}
        x, y, _ = draw("train")
        if not self.alphas.rest(now):
            found = self.search(draw("valid"), now)
        with torch.no_grad():
            sample = self.alpha.dirichlet(now.noise)
        z = self.net(x, sample)
        loss = self.setup.loss(z, y)
        self.w.down(loss, norm=True)  # (2)
        return {
            "train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "alpha/entropy": self.alpha.entropy().detach(), **found,
        }  # fmt: skip

    def search(self, valid: Batch, now: Moment) -> Metrics:
        """The step on a."""
        sample = self.alpha.dirichlet(now.noise)
        with self.w.frozen():
            z = self.net(valid.x, sample)
            loss = self.setup.loss(z, valid.y)
            L_val, found = loss, dict[str, float | Tensor]()
            if self.kl:
                kl = self.alpha.divergence(self.anchor)
                L_val, found = L_val + self.kl * kl, {"alpha/divergence": kl.detach()}
            if self.budget is not None:
                mean = self.alpha.dirichlet(None)
                L_val = L_val + self.budget.loss(mean)
                found |= self.budget.metrics(mean, self.alpha.architecture())
            self.a.down(L_val, norm=True)  # (1)
        return {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y), "alpha/grad_norm": self.a.grad_norm, **found}

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        with torch.no_grad():
            if not self.alphas.rest(now):
                self.alpha.dirichlet(now.noise)  # the step on a draws before the step on w
            return self.alpha.dirichlet(now.noise)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities()

    def architecture(self) -> Arch:
        return self.alphas.derive(self.alpha, self.budget)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
