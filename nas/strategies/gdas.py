"""GDAS: Searching for a Robust Neural Architecture in Four GPU Hours. Xuanyi Dong, Yi Yang. CVPR 2019. arXiv 1910.04465.

    (1) l = (log softmax(a) + Gumbel) / tau;  p = softmax(l);  k = argmax p
    (2) h = onehot(k) - stopgrad(p) + p
    (3) out = h_k f_k(x) + sum over j != k of h_j          the h_j have value 0 and only carry gradient

    (4) w <- SGD on grad_w L_train(w, h), a fresh sample
    (5) a <- Adam on grad_a L_val(w, h), another fresh sample

Only option k runs, of every choice. In (4) h is onehot(k), so a weight step is the pass of one plain path. tau falls linearly
over the epochs, 10 to 0.1. Not part of the paper: ``budget``, alpha warm-up and skip limit (``alphas``).
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
from search_spaces.space import Arch, Mixture, Setting, Value


@dataclass
class GDAS:
    """``tau``: temperature of the first and of the last epoch. ``idle``: "ones" as in (3), or "absent", the known variant
    that keeps only h_k f_k(x)."""

    tau: tuple[float, float] = (10.0, 0.1)
    idle: str = "ones"
    weights: Weights = field(default_factory=Weights)
    alphas: Alphas = field(default_factory=Alphas)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if min(self.tau) <= 0:
            raise ValueError(f"tau = {list(self.tau)} is not a pair of temperatures. Allowed: above 0.")
        if self.idle not in ("ones", "absent"):
            raise ValueError(f"idle = {self.idle!r} is not known. Allowed: ones, absent.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "GDAS")
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
        z = self.net(x, self.arch(now))
        loss = self.setup.loss(z, y)
        self.w.down(loss, norm=True)  # (4)
        if not self.alphas.rest(now):
            found = self.search(draw("valid"), tau, now)
        return {
            "train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "alpha/entropy": self.alpha.entropy().detach(), "alpha/temperature": tau, **found,
        }  # fmt: skip

    def search(self, valid: Batch, tau: float, now: Moment) -> Metrics:
        sample = self.sample(tau, now)
        with self.w.frozen():
            z = self.net(valid.x, sample)
            loss = self.setup.loss(z, valid.y)
            L_val, costs = loss, dict[str, float | Tensor]()
            if self.budget is not None:
                soft = self.alpha.soft()
                L_val, costs = loss + self.budget.loss(soft), self.budget.metrics(soft, self.alpha.architecture())
            self.a.down(L_val, norm=True)  # (5)
        return {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y), "alpha/grad_norm": self.a.grad_norm, **costs}

    def sample(self, tau: float, now: Moment) -> dict[str, Setting]:
        """(1)-(3): one option of every choice, with the straight-through weights of all."""
        drawn = self.alpha.straight_through(tau, now.noise)
        return {name: s._replace(idle=self.idle) if isinstance(s, Mixture) else s for name, s in drawn.items()}

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """The path of the weight step: a plain architecture, as h is onehot(k) where a gets no gradient."""
        with torch.no_grad():
            drawn = self.sample(temperature(now, *self.tau), now)
        return {name: s.options[s.active[0]] if isinstance(s, Mixture) and s.active else s for name, s in drawn.items()}

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities()

    def architecture(self) -> Arch:
        return self.alphas.derive(self.alpha, self.budget)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
