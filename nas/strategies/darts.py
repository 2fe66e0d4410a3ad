"""DARTS: Differentiable Architecture Search. Hanxiao Liu, Karen Simonyan, Yiming Yang. ICLR 2019. arXiv 1806.09055.

    min over a:  L_val(w*(a), a)   with   w*(a) = argmin over w of L_train(w, a)

One step; a first, then w. First order:

    (1) a <- Adam on grad_a L_val(w, a)

Second order, xi = the current rate of w unless given:

    (2) w' = w - xi (mu v + grad_w L_train(w, a) + wd w)
    (3) g = grad_{w'} L_val(w', a);  h = grad_a L_val(w', a)
    (4) eps = 0.01 / ||g||;  w+- = w +- eps g                       around w, not w'
    (5) a <- Adam on h - xi [grad_a L_train(w+, a) - grad_a L_train(w-, a)] / (2 eps);  w as before
        where w learns with Nesterov momentum, (2) is that step and xi (1 + mu) stands in (5), as grad_w L_train does in it

    (6) w <- SGD on grad_w L_train(w, a_new), clipped

Every choice of the space mixes all its options by softmax(a). Not part of the paper: ``budget``, a term on the expected
cost that joins L_val; alpha warm-up and skip limit (``alphas``).

The second order needs float32 or more: in bfloat16 the difference in (5) is mostly rounding.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from nas.bilevel import Alphas, Weights, space_and_costs
from nas.budget import Budget
from nas.losses import top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class DARTS:
    """``order``: 1 or 2. ``xi``: the look-ahead step, None for the current rate of the weights. Defaults: published."""

    order: int = 2
    xi: float | None = None
    weights: Weights = field(default_factory=Weights)
    alphas: Alphas = field(default_factory=Alphas)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order = {self.order} is not known. Allowed: 1, 2.")
        if self.xi is not None and self.xi < 0:
            raise ValueError(f"xi = {self.xi} is not a step. Allowed: 0 or more, or null for the rate of the weights.")
        if self.order == 2 and self.weights.optimizer != "sgd":
            raise ValueError(f"weights.optimizer = {self.weights.optimizer!r}: (5) is of sgd. Allowed with order 2: sgd.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "DARTS")
        self.w = self.weights.descent(self.net.parameters(), setup)
        self.alpha = self.alphas.alpha(setup)
        self.a = self.alphas.descent(self.alpha)
        if self.budget is not None:
            self.budget.start(self.costs, self.space)

    def passes(self) -> float:
        return 2 if self.order == 1 else 5

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, train = self.w.rate, draw("train")
        found: Metrics = {}
        if not self.alphas.rest(now):
            found = self.search(train, draw("valid"))
        with torch.no_grad():
            fixed = self.alpha.soft()
        z = self.net(train.x, fixed)
        loss = self.setup.loss(z, train.y)
        self.w.down(loss, norm=True)  # (6)
        return {
            "train/loss": loss.detach(), "train/top1": top1(z, train.y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "alpha/entropy": self.alpha.entropy().detach(), **found,
        }  # fmt: skip

    def search(self, train: Batch, valid: Batch) -> Metrics:
        """The step on a, of either order."""
        if self.order == 1:
            with self.w.frozen():
                L_val, found = self.L_val(valid)
                self.a.add(L_val)  # (1)
        else:
            xi = self.w.rate if self.xi is None else self.xi
            with torch.no_grad():
                fixed = self.alpha.soft()
            with self.w.ahead(self.L_train(train, fixed), rate=xi):  # (2)
                L_val, found = self.L_val(valid)
                g = self.w.grad(L_val, self.a)  # (3), h is left in a
            eps = 0.01 / get_total_norm(g).clamp_min(1e-30)  # (4)
            scale = xi * (1 + self.weights.momentum if self.weights.nesterov else 1) / (2 * eps)
            for sign in (1, -1):
                with self.w.shifted(g, sign * eps), self.w.frozen():
                    self.a.add(-sign * scale * self.L_train(train, self.alpha.soft()))  # (5)
        self.a.step(norm=True)
        costs = {} if self.budget is None else self.budget.metrics(self.alpha.soft(), self.alpha.architecture())
        return {**found, "alpha/grad_norm": self.a.grad_norm, **costs}

    def L_train(self, train: Batch, soft: Mapping[str, Setting]) -> Tensor:
        return self.setup.loss(self.net(train.x, soft), train.y)

    def L_val(self, valid: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The validation loss with the budget's term, at the weights of the moment; and what to report of it."""
        soft = self.alpha.soft()
        z = self.net(valid.x, soft)
        loss = self.setup.loss(z, valid.y)
        found = {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y)}
        return (loss if self.budget is None else loss + self.budget.loss(soft)), found

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        with torch.no_grad():
            return self.alpha.soft()

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities()

    def architecture(self) -> Arch:
        return self.alphas.derive(self.alpha, self.budget)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
