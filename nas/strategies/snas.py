"""SNAS: Stochastic Neural Architecture Search. Sirui Xie, Hehui Zheng, Chunxiao Liu, Liang Lin. ICLR 2019. arXiv 1812.09926.

    u = (log softmax(a) + Gumbel) / tau,   mixture weights = softmax(u), all options run

    (1) a <- Adam on grad_a L_val(w, a), a fresh sample
    (2) w <- SGD on grad_w L_train(w, a), another fresh sample, clipped

tau falls linearly over the epochs: 1 to 0.03 on the DARTS cells, 1 to 0.1 on NAS-Bench-201 (rules as in released code of
later studies; shared page darts.md, "Variants on the same space"). Not done: the paper's cost term, whose place ``budget``
takes, and its single-level training (both steps read one batch there).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Alphas, Weights, space_and_costs, temperature
from nas.budget import Budget
from nas.losses import top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class SNAS:
    """``tau``: temperature of the first and of the last epoch."""

    tau: tuple[float, float] = (1.0, 0.03)
    weights: Weights = field(default_factory=Weights)
    alphas: Alphas = field(default_factory=Alphas)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if min(self.tau) <= 0:
            raise ValueError(f"tau = {list(self.tau)} is not a pair of temperatures. Allowed: above 0.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "SNAS")
        self.w = self.weights.descent(self.net.parameters(), setup)
        self.alpha = self.alphas.alpha(setup)
        self.a = self.alphas.descent(self.alpha)
        if self.budget is not None:
            self.budget.start(self.costs, self.space)

    def passes(self) -> float:
        return 2

    def update(self, draw: Draw, now: Moment) -> Metrics:
        tau, rate = temperature(now, *self.tau), self.w.rate
        found: Metrics = {}
        x, y, _ = draw("train")
        if not self.alphas.rest(now):
            found = self.search(draw("valid"), tau, now)
        with torch.no_grad():
            sample = self.alpha.gumbel(tau, now.noise)
        z = self.net(x, sample)
        loss = self.setup.loss(z, y)
        self.w.down(loss, norm=True)  # (2)
        return {
            "train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "alpha/entropy": self.alpha.entropy().detach(), "alpha/temperature": tau, **found,
        }  # fmt: skip

    def search(self, valid: Batch, tau: float, now: Moment) -> Metrics:
        sample = self.alpha.gumbel(tau, now.noise)
        with self.w.frozen():
            z = self.net(valid.x, sample)
            loss = self.setup.loss(z, valid.y)
            L_val, costs = loss, dict[str, float | Tensor]()
            if self.budget is not None:
                soft = self.alpha.soft()
                L_val, costs = loss + self.budget.loss(soft), self.budget.metrics(soft, self.alpha.architecture())
            self.a.down(L_val, norm=True)  # (1)
        return {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y), "alpha/grad_norm": self.a.grad_norm, **costs}

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        tau = temperature(now, *self.tau)
        with torch.no_grad():
            if not self.alphas.rest(now):
                self.alpha.gumbel(tau, now.noise)  # the step on a draws before the step on w
            return self.alpha.gumbel(tau, now.noise)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities()

    def architecture(self) -> Arch:
        return self.alphas.derive(self.alpha, self.budget)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
