"""RARTS: an Efficient First-Order Relaxed Architecture Search Method. Fanghui Xue, Yingyong Qi, Jack Xin. IEEE Access 2022.
arXiv 2008.03901.

    (1) L(y, w, a) = L_val(y, a) + lam L_train(w, a) + beta / 2 ||y - w||^2

Two copies of the weights, w on the training half and y on the validation half, share one architecture a. One step:

    (2) w <- w - eta_w [lam grad_w L_train(w, a) + beta (w - y)]
    (3) y <- y - eta_y [grad_y L_val(y, a) + beta (y - w)]
    (4) a <- a - eta_a [lam grad_a L_train(w, a) + grad_a L_val(y, a)]

each with the newest values (Gauss-Seidel, in any order), or all with the old ones from two passes (Jacobi). Momentum, decay
and Adam are the descents' own; the coupling is part of the gradient, before momentum.

``kind`` of a: "mixture", softmax over the options of every choice, as in DARTS; or "scales", the width search of the paper: a
holds the scale of every batch-norm channel, with an L1 penalty, and one threshold over all channels leaves the widths
(search_spaces.preresnet). The found network is trained from scratch. No official code is public.
Not done: a free start of y (it starts as w), and an optimizer of its own for y (w and y share ``weights``).
"""
from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from nas.alpha import Alpha
from nas.bilevel import Alphas, Weights, space_and_costs
from nas.budget import Budget
from nas.losses import top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from nas.scales import Scales
from search_spaces.space import Arch, Setting, Value

_log = logging.getLogger("nas")
ORDER = ("w", "y", "a")


@dataclass
class RARTS:
    """``lam``, ``beta``: weights of the training loss and of the coupling. ``order``: of the three updates. ``mode``:
    "gauss_seidel" or "jacobi". ``hold_coupling``: beta grows as the rate falls, so that beta * eta stays what it was.

    ``kind`` "scales" reads ``l1``, the penalty on |a|, and ``keep``, the share of channels that the threshold leaves
    (with a budget, the most channels that meet it).
    """

    lam: float = 1.0
    beta: float = 1.0
    order: tuple[str, str, str] = ORDER
    mode: str = "gauss_seidel"
    hold_coupling: bool = False
    kind: str = "mixture"
    l1: float = 1e-5
    keep: float = 0.6
    weights: Weights = field(default_factory=Weights)
    alphas: Alphas = field(default_factory=Alphas)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(ORDER):
            raise ValueError(f"order = {list(self.order)} is not an order of the three updates. Allowed: w, y, a, each once.")
        if self.mode not in ("gauss_seidel", "jacobi"):
            raise ValueError(f"mode = {self.mode!r} is not known. Allowed: gauss_seidel, jacobi.")
        if self.kind not in ("mixture", "scales"):
            raise ValueError(f"kind = {self.kind!r} is not known. Allowed: mixture, scales.")
        if not (self.lam > 0 and self.beta > 0 and self.l1 >= 0 and 0 < self.keep <= 1):
            raise ValueError(f"lam = {self.lam}, beta = {self.beta}, l1 = {self.l1}, keep = {self.keep}. "
                             "Allowed: lam and beta above 0, l1 from 0, keep above 0 up to 1.")  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "RARTS")
        self.twin = copy.deepcopy(self.net)  # y starts as w
        self.w = self.weights.descent(self.net.parameters(), setup)
        self.y = self.weights.descent(self.twin.parameters(), setup)
        if self.kind == "mixture":
            self.alpha: Any = self.alphas.alpha(setup)
        else:
            self.alpha = Scales(self.space).to(self.w.params[0].device)
        self.a = self.alphas.descent(self.alpha)
        self.rate = self.w.rate
        if self.budget is not None:
            self.budget.start(self.costs, self.space)
        momentum = self.weights.momentum if self.weights.optimizer == "sgd" else 0.0
        for line in unstable(self.lam, self.beta, self.rate, momentum):
            _log.warning("%s", line)

    def passes(self) -> float:
        return 4 if self.mode == "gauss_seidel" else 2

    def update(self, draw: Draw, now: Moment) -> Metrics:
        train, valid, rate = draw("train"), draw("valid"), self.w.rate
        beta = self.beta * (self.rate / rate if self.hold_coupling and rate > 0 else 1.0)
        found: dict[str, Any] = {"train/lr": rate, "rarts/coupling": beta * rate}
        if self.mode == "jacobi":
            self.jacobi(train, valid, beta, now, found)
        else:
            for variable in self.order:
                if variable == "a":
                    if not self.alphas.rest(now):
                        self.down_a(train, valid)
                elif variable == "w":
                    found |= self.down_w(train, beta)
                else:
                    found |= self.down_y(valid, beta)
        found |= {"train/grad_norm": self.w.grad_norm, "alpha/entropy": self.alpha.entropy().detach()}
        with torch.no_grad():
            y, w = list[Tensor](self.y.params), list[Tensor](self.w.params)
            found["rarts/distance"] = get_total_norm(torch._foreach_sub(y, w))
        if self.a.norm is not None:
            found["alpha/grad_norm"] = self.a.norm
        if self.budget is not None and self.kind == "mixture":
            found |= self.budget.metrics(self.alpha.soft(), self.alpha.architecture())
        return found

    def down_w(self, train: Batch, beta: float) -> dict[str, Any]:
        with torch.no_grad():
            fixed = self.alpha.soft()
        z = self.net(train.x, fixed)
        loss = self.setup.loss(z, train.y)
        self.w.add(self.lam * loss)
        self.w.pull(self.y.params, beta)
        self.w.step(norm=True)  # (2)
        return {"train/loss": loss.detach(), "train/top1": top1(z, train.y)}

    def down_y(self, valid: Batch, beta: float) -> dict[str, Any]:
        with torch.no_grad():
            fixed = self.alpha.soft()
        z = self.twin(valid.x, fixed)
        loss = self.setup.loss(z, valid.y)
        self.y.add(loss)
        self.y.pull(self.w.params, beta)
        self.y.step()  # (3)
        return {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y)}

    def down_a(self, train: Batch, valid: Batch) -> None:
        with self.w.frozen():
            self.a.add(self.lam * self.setup.loss(self.net(train.x, self.alpha.soft()), train.y))
        with self.y.frozen():
            soft = self.alpha.soft()
            self.a.add(self.setup.loss(self.twin(valid.x, soft), valid.y) + self.terms(soft))
        self.a.step(norm=True)  # (4)

    def jacobi(self, train: Batch, valid: Batch, beta: float, now: Moment, found: dict[str, Any]) -> None:
        """(2)-(4) with the old values on every right-hand side: a's gradient comes with those of w and y."""
        rest = self.alphas.rest(now)
        also = () if rest else (self.a,)
        z = self.net(train.x, self.alpha.soft())
        loss = self.setup.loss(z, train.y)
        self.w.add(self.lam * loss, *also)
        soft = self.alpha.soft()
        z_valid = self.twin(valid.x, soft)
        loss_valid = self.setup.loss(z_valid, valid.y)
        self.y.add(loss_valid + self.terms(soft), *also)
        self.w.pull(self.y.params, beta)
        self.y.pull(self.w.params, beta)
        self.w.step(norm=True)
        self.y.step()
        if not rest:
            self.a.step(norm=True)
        found |= {
            "train/loss": loss.detach(), "train/top1": top1(z, train.y),
            "valid/loss": loss_valid.detach(), "valid/top1": top1(z_valid, valid.y),
        }  # fmt: skip

    def terms(self, soft: Mapping[str, Setting]) -> Tensor | float:
        """What is added to L_val for a alone: the penalty on scales, or the budget's term (scales are no probabilities, so
        nothing is expected of them; their budget is met by the threshold)."""
        if self.kind == "scales":
            return self.l1 * self.alpha.l1()
        return 0.0 if self.budget is None else self.budget.loss(soft)

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        with torch.no_grad():
            return self.alpha.soft()

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Of scales nothing: a share of a threshold is no belief in an option."""
        return self.alpha.probabilities() if self.kind == "mixture" else {}

    def architecture(self) -> Arch:
        if isinstance(self.alpha, Alpha):
            return self.alphas.derive(self.alpha, self.budget)
        if self.budget is not None:
            return self.alpha.for_budget(self.budget.table, self.budget.R)
        return self.alpha.architecture(keep=self.keep)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """w; y has seen the other half and serves no one."""
        return self.net


def unstable(lam: float, beta: float, rate: float, momentum: float) -> list[str]:
    """What is doubtful about lam, beta and a first rate, in words: the solvable model's condition (page section 6), and the
    effective step of the coupling under momentum."""
    found = []
    if 4 * lam * beta - 2 * lam - beta <= 0:
        found.append(f"lam = {lam}, beta = {beta}: 1 / (4 lam) + 1 / (2 beta) is not below 1, where RARTS diverges on its "
                     "solvable model. Raise lam or beta.")  # fmt: skip
    step = beta * rate / (1 - momentum) if momentum < 1 else float("inf")
    if step >= 1:
        found.append(f"beta * eta / (1 - momentum) = {step:.3g} at the first rate {rate}: the coupling of y and w may "
                     "oscillate. Keep it below 1: lower beta or the rate.")  # fmt: skip
    return found
