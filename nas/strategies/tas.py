"""TAS: Network Pruning via Transformable Architecture Search. Xuanyi Dong, Yi Yang. NeurIPS 2019. arXiv 1905.09717.

    min over A = (alpha, beta):  CE_val(w*(A), A) + lambda_cost * L_cost(A)
    w*(A) = argmin over w of CE_train(w, A)

One step, first order, w is not unrolled:

    (1) w <- SGD  on CE(train batch; w, A, fresh sample S1)
    (2) A <- Adam on CE(valid batch; w, A, fresh sample S2) + lambda_cost * L_cost(A)

A sample mixes two candidate widths of every convolution, drawn without replacement (3)-(5), interpolated and added by the
supernet (6)-(8), and all depths of every stage (9). L_cost (10)-(13) is log E of the expected cost, with a sign that the
cost F of the arg-max network decides. The found network is trained from scratch with the strategy ``plain``, (14).

Inherent, and not mended here: the merge of depths trains every depth, shallow taps most; the search samples, the
derivation takes the arg-max. R and F_max leave out the classifier's bias (as many MACs as classes).

Not done: the redraw of both samples per replica (every rank draws the same sample; gradients are averaged).
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nas.alpha import Alpha
from nas.bilevel import something_open
from nas.budget import budget
from nas.descent import Descent
from nas.losses import top1
from nas.protocols import Draw, Metrics, Moment, Setup
from nas.schedules import cosine_per_epoch
from search_spaces.space import Arch, Setting, Value


@dataclass
class TAS:
    """Hyper-parameters with the published CIFAR values; see the module for the method.

    ``target``: the budget R in the price of the run's cost table (MACs): "55%" of the unpruned net, or a number.
    ``tolerance`` t; ``cost_weight`` lambda_cost; ``candidates`` I, the widths sampled for a convolution.
    ``rule``: when the cost loss pulls. "paper": F outside (1 -+ t) R, F the true cost of the network that would be built.
    "released": F > R, or F < R - t F_max, F by the released estimator ("estimated" view). E is the "searched" view in both.
    ``all_of``: pattern of the choices that mix all their options (depths) instead of ``candidates``.
    ``temperature``: tau from first to last epoch, "linear" or "cosine" (the released script: cosine with [5, 0.1]).
    """

    target: str | float = "55%"
    tolerance: float = 0.05
    cost_weight: float = 2.0
    rule: str = "paper"
    candidates: int = 2
    all_of: str = "*.depth"
    temperature: tuple[float, float] = (10.0, 0.1)
    temperature_schedule: str = "linear"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    clip: float | None = None
    alpha_lr: float = 1e-3
    alpha_betas: tuple[float, float] = (0.5, 0.999)
    alpha_weight_decay: float = 1e-3
    alpha_std: float = 0.01

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "released"):
            raise ValueError(f"rule = {self.rule!r} is not known. Allowed: paper, released.")
        if self.temperature_schedule not in ("linear", "cosine"):
            raise ValueError(f"temperature_schedule = {self.temperature_schedule!r} is not known. Allowed: linear, cosine.")
        if self.candidates < 1:
            raise ValueError(f"candidates = {self.candidates} is too few. Allowed: 1 or more; the paper draws 2.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance = {self.tolerance} is not a share. Allowed: 0 up to 1; the paper takes 0.05.")

    def start(self, setup: Setup) -> None:
        if setup.space is None or setup.costs is None:
            raise ValueError("TAS searches a space: give the run a supernet, its space and a cost table.")
        self.setup, self.net, self.space, self.costs = setup, setup.net, setup.space, setup.costs
        something_open(self.space)
        self.F_max = float(self.costs.of(self.space.root.largest()))
        self.R = budget(self.target, self.costs, self.space)
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0,
                      weight_decay=self.weight_decay, fused=True)
        schedule = cosine_per_epoch(setup.steps // setup.epoch_steps, setup.epoch_steps, self.warmup_epochs)
        # idle="zeros": widths that were not sampled keep their momentum and weight decay, as in the released code.
        self.w = Descent(self.net.parameters(), sgd, schedule, clip=self.clip, idle="zeros")
        self.alpha = Alpha(self.space, self.alpha_std).to(next(self.net.parameters()).device)
        adam = partial(torch.optim.Adam, lr=self.alpha_lr, betas=self.alpha_betas, weight_decay=self.alpha_weight_decay)
        self.a = Descent(self.alpha.parameters(), adam)

    def passes(self) -> float:
        return 2

    def update(self, draw: Draw, now: Moment) -> Metrics:
        tau, rate = self.tau(now), self.w.rate
        x, y, _ = draw("train")
        with torch.no_grad():
            S1 = self.sample(tau, now)
        z = self.net(x, S1)
        train = self.setup.loss(z, y)
        self.w.down(train, norm=True)  # (1)

        x, y_valid, _ = draw("valid", odds=1.0)  # each step meets uniformly random images of the second half
        S2 = self.sample(tau, now)
        with self.w.frozen():
            z_valid = self.net(x, S2)
            valid = self.setup.loss(z_valid, y_valid)
            pull, E, F = self.cost_loss()
            self.a.down(valid + self.cost_weight * pull)  # (2)
        return {
            "train/loss": train.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "valid/loss": valid.detach(), "valid/top1": top1(z_valid, y_valid),
            "cost/expected": E.detach(), "cost/current": F, "cost/target": self.R,
            "alpha/entropy": self.alpha.entropy().detach(), "alpha/temperature": tau,
        }

    def sample(self, tau: float, now: Moment) -> dict[str, Setting]:
        """(3)-(5): ``candidates`` widths of every convolution, and q over all depths of every stage."""
        names = self.space.free
        whole = [name for name in names if fnmatch(name, self.all_of)]
        some = [name for name in names if name not in whole]
        return (self.alpha.gumbel(tau, now.noise, some, self.candidates) | self.alpha.gumbel(tau, now.noise, whole))

    def tau(self, now: Moment) -> float:
        """The temperature of an epoch; linear reaches its end in the last one, the released cosine just after it."""
        start, end = self.temperature
        if self.temperature_schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * now.epoch / now.epochs)) / 2
        return start + (end - start) * now.epoch / max(now.epochs - 1, 1)

    def cost_loss(self) -> tuple[Tensor, Tensor, float]:
        """L_cost, E and F: +log E where F is too big, -log E where it is too small, else 0."""
        E = self.costs.seen("searched").expected(self.alpha.soft(), self.space)  # (10)-(13)
        F, R, t = self.F(self.alpha.architecture()), self.R, self.tolerance
        if self.rule == "paper":
            big, small = F > (1 + t) * R, F < (1 - t) * R
        else:
            big, small = F > R, F < R - t * self.F_max
        return (float(big) - float(small)) * E.log(), E, F

    def F(self, arch: Mapping[str, Value]) -> float:
        """The cost of a hard architecture (not canonical: the released estimator reads what removed blocks say)."""
        return float((self.costs if self.rule == "paper" else self.costs.seen("estimated")).of(arch))

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        with torch.no_grad():
            return self.sample(self.tau(now), now)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities()

    def architecture(self) -> Arch:
        return self.alpha.architecture()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        """Whether F(arch) lies within t R of the target (released rule: t F_max); ``arch`` as ``architecture`` gave it."""
        slack = self.tolerance * (self.R if self.rule == "paper" else self.F_max)
        return abs(self.F(arch) - self.R) <= slack

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net
