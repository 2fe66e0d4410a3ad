"""TangleNAS: Weight-Entanglement Meets Gradient-Based Neural Architecture Search. Rhea Sanjay Sukthanker, Arjun Krishnakumar,
Mahmoud Safari, Frank Hutter. AutoML 2024. arXiv 2312.10440.

    min over a:  L_val(w*(a), t(a))   with   w*(a) = argmin over w of L_train(w, t(a))

Where the candidates of a choice are slices of one weight, the supernet superposes them, W = sum_i t_i pad0(s_i(W)), and runs
once (supernets.superpose; of cells, ``entangled: true``); any other supernet mixes outputs, as ever. One iteration:

    (1) a validation batch;  t(a);  a <- Adam on grad_a [L_val(w, t) + cost(t) + kl KL(Dirichlet || Dirichlet(anchor))]
    (2) a training batch;    t(a) again, at the new a and of a sample its own;  w <- grad_w L_train(w, t), clipped at 5

``mixing``, how a gives the weights t of the options:

    softmax      DARTS of first order
    sparsemax    DARTS as the paper entangles it; options far behind have weight 0
    dirichlet    t ~ Dirichlet(elu(a) + 1), the paper's main method, with DrNAS's decay on a or its divergence (``kl``)
    gumbel       GDAS: onehot(k) - stopgrad(p) + p of p = softmax((log softmax(a) + Gumbel) / tau), k = argmax p; only slice k
                 runs, times t_k; tau linear over the epochs

One rule reads a in training and in derivation: the most probable option of each choice is the argmax of a, and where choices
are compared (edges of a cell, a budget) it is by t without noise: softmax, sparsemax, the mean of the Dirichlet. That mean is
ours: the released DrNAS (and nas.strategies.drnas) reads softmax(a), which orders the options of a choice alike, but may keep
other edges of a DARTS cell and meet a budget with another architecture.

Not part of the paper, which searches by accuracy alone: ``budget``, a term on the expected cost, at t without noise, which is
what t costs in expectation; alpha warm-up and skip limit (``alphas``). Not done: DARTS of second order (nas.strategies.darts).
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

MIXINGS = ("softmax", "sparsemax", "dirichlet", "gumbel")


@dataclass
class Tangle:
    """``mixing``: softmax, sparsemax, dirichlet or gumbel. ``tau``: temperature of the first and of the last epoch, of gumbel.
    ``kl``, ``anchor``: of dirichlet, weight of the divergence and what it is from; ``kl`` takes the place of
    ``alphas.weight_decay``, which must be 0 with it."""

    mixing: str = "dirichlet"
    tau: tuple[float, float] = (10.0, 0.1)
    kl: float = 0.0
    anchor: float = 1.0
    weights: Weights = field(default_factory=Weights)
    alphas: Alphas = field(default_factory=Alphas)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing = {self.mixing!r} is not known. Allowed: {', '.join(MIXINGS)}.")
        if min(self.tau) <= 0:
            raise ValueError(f"tau = {list(self.tau)} is not a pair of temperatures. Allowed: above 0.")
        if not (self.kl >= 0 and self.anchor > 0):
            raise ValueError(f"kl = {self.kl}, anchor = {self.anchor}. Allowed: kl of 0 or more, anchor above 0.")
        if self.kl and (self.mixing != "dirichlet" or self.alphas.weight_decay):
            raise ValueError(f"kl = {self.kl}, mixing = {self.mixing!r}, alphas.weight_decay = {self.alphas.weight_decay}. "
                             "Allowed: kl with dirichlet alone, in place of the decay (0).")  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "TangleNAS")
        self.w = self.weights.descent(self.net.parameters(), setup)
        self.alpha = self.alphas.alpha(setup)
        self.a = self.alphas.descent(self.alpha)
        if self.budget is not None:
            self.budget.start(self.costs, self.space)

    def passes(self) -> float:
        return 2

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, found = self.w.rate, dict[str, float | Tensor]()
        if not self.alphas.rest(now):
            found |= self.search(draw("valid"), now)
        x, y, _ = draw("train")
        z = self.net(x, self.fixed(now))
        loss = self.setup.loss(z, y)
        self.w.down(loss, norm=True)  # (2)
        if self.mixing == "gumbel":
            found["alpha/temperature"] = temperature(now, *self.tau)
        return {
            "train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "alpha/entropy": self.alpha.entropy().detach(), **found,
        }  # fmt: skip

    def search(self, valid: Batch, now: Moment) -> Metrics:
        """The step on a."""
        t = self.mixed(now)
        with self.w.frozen():
            z = self.net(valid.x, t)
            loss = self.setup.loss(z, valid.y)
            L_val, found = loss, dict[str, float | Tensor]()
            if self.kl:
                kl = self.alpha.divergence(self.anchor)
                L_val, found = L_val + self.kl * kl, {"alpha/divergence": kl.detach()}
            if self.budget is not None:
                expected = self.expected()
                L_val = L_val + self.budget.loss(expected)
                found |= self.budget.metrics(expected, self.alpha.architecture(probabilities=self.probabilities()))
            self.a.down(L_val, norm=True)  # (1)
        return {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y), "alpha/grad_norm": self.a.grad_norm, **found}

    def mixed(self, now: Moment) -> dict[str, Setting]:
        """t(a); of dirichlet and gumbel the next sample of ``now``."""
        if self.mixing == "dirichlet":
            return self.alpha.dirichlet(now.noise)
        if self.mixing != "gumbel":
            return self.expected()
        drawn = self.alpha.straight_through(temperature(now, *self.tau), now.noise)
        return {name: s._replace(idle="absent") if isinstance(s, Mixture) else s for name, s in drawn.items()}

    def expected(self) -> dict[str, Setting]:
        """The expectation of t(a); gumbel's k is distributed as softmax(a), whatever tau."""
        if self.mixing == "sparsemax":
            return self.alpha.sparsemax()
        return self.alpha.dirichlet(None) if self.mixing == "dirichlet" else self.alpha.soft()

    def fixed(self, now: Moment) -> dict[str, Setting]:
        """t(a) for the step on w: a constant, of gumbel the path itself, as t_k is 1 there."""
        with torch.no_grad():
            t = self.mixed(now)
        return {name: s.options[s.active[0]] if isinstance(s, Mixture) and self.mixing == "gumbel" and s.active else s
                for name, s in t.items()}  # fmt: skip

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        if not self.alphas.rest(now):
            self.fixed(now)  # the step on a draws before the step on w
        return self.fixed(now)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities(self._reading())

    def architecture(self) -> Arch:
        return self.alphas.derive(self.alpha, self.budget, self._reading())

    def _reading(self) -> str:
        """The name of ``expected`` in nas.simplex."""
        return "softmax" if self.mixing == "gumbel" else self.mixing

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
