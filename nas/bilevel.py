"""What the strategies of one bilevel search share: hyper-parameters of the two descents, on weights and on alphas.

    min over alpha: L_val(w*(alpha), alpha),   w*(alpha) = argmin over w of L_train(w, alpha)
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nas.alpha import Alpha
from nas.cost import Budget, CostTable
from nas.descent import Descent, cosine
from nas.protocols import Moment, Setup
from search_spaces.space import Arch, SearchSpace


@dataclass
class Weights:
    """SGD on the weights; the values of DARTS (arXiv 1806.09055, released code).

    The rate falls from ``lr`` to ``lr_min`` along half a cosine over the run, constant within an epoch where ``per_epoch``.
    ``clip``: largest gradient norm, None for no clipping. ``idle``: what a weight that a step does not use gets, "zeros"
    (its momentum and decay go on, as in the released codes) or "skip".
    """

    lr: float = 0.025
    lr_min: float = 0.001
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 3e-4
    clip: float | None = 5.0
    per_epoch: bool = True
    idle: str = "zeros"

    def __post_init__(self) -> None:
        if not 0 <= self.lr_min <= self.lr or self.lr == 0:
            raise ValueError(f"weights: lr = {self.lr}, lr_min = {self.lr_min}. Allowed: 0 <= lr_min <= lr, lr above 0.")

    def descent(self, params: Iterable[nn.Parameter], setup: Setup) -> Descent:
        """Over ``params``, with a schedule as long as the run of ``setup``."""
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov,
                      weight_decay=self.weight_decay, fused=True)  # fmt: skip
        length = setup.epoch_steps if self.per_epoch else 1
        factor = cosine(max(setup.steps // length, 1), floor=self.lr_min / self.lr)
        return Descent(params, sgd, lambda step: factor(step // length), clip=self.clip, idle=self.idle)


@dataclass
class Alphas:
    """Adam on the architecture parameters, started as N(0, ``std``); the values of DARTS.

    ``warmup_epochs``: epochs in which the weights learn alone. ``skip_limit``: how many parameter-free skips each part of
    a derived architecture (a kind of cell) may keep; None for no limit. Both are known to help against collapse and are
    no part of any of the papers here.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3
    std: float = 1e-3
    warmup_epochs: int = 0
    skip_limit: int | None = None

    def __post_init__(self) -> None:
        if self.warmup_epochs < 0 or (self.skip_limit is not None and self.skip_limit < 0):
            raise ValueError(f"alphas: warmup_epochs = {self.warmup_epochs}, skip_limit = {self.skip_limit}. "
                             "Allowed: 0 or more.")  # fmt: skip

    def alpha(self, setup: Setup) -> Alpha:
        """Fresh logits for the space of ``setup``, where its net is."""
        assert setup.space is not None
        return Alpha(setup.space, self.std).to(next(setup.net.parameters()).device)

    def descent(self, alpha: nn.Module) -> Descent:
        adam = partial(torch.optim.Adam, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return Descent(alpha.parameters(), adam)

    def derive(self, alpha: Alpha, budget: Budget | None) -> Arch:
        """The most probable architecture with no more skips than ``skip_limit``, brought to the ``budget`` if there is one."""
        rule = partial(alpha.architecture, self.skip_limit)
        return rule() if budget is None else budget.derive(alpha.probabilities(), rule)

    def rest(self, now: Moment) -> bool:
        """Whether the alphas still wait for the weights."""
        return now.epoch < self.warmup_epochs


def space_and_costs(setup: Setup, name: str) -> tuple[SearchSpace, CostTable]:
    """What ``setup`` gives to the strategy ``name`` to search. ValueError where there is none."""
    if setup.space is None or setup.costs is None:
        raise ValueError(f"{name} searches a space: give the run a supernet, its space and a cost table.")
    return setup.space, setup.costs


def temperature(now: Moment, start: float, end: float) -> float:
    """tau of an epoch, linear from ``start`` in the first to ``end`` in the last."""
    return start + (end - start) * now.epoch / max(now.epochs - 1, 1)
