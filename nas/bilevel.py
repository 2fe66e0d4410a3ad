"""What the strategies of one bilevel search share: hyper-parameters of the two descents, on weights and on alphas.

    min over alpha: L_val(w*(alpha), alpha),   w*(alpha) = argmin over w of L_train(w, alpha)
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Adam, Optimizer

from nas.alpha import Alpha
from nas.budget import Budget
from nas.cost import CostTable
from nas.descent import Descent
from nas.optimizers import optimizer
from nas.protocols import Moment, Setup, Strategy
from nas.schedules import Schedule, cosine, exponential
from search_spaces.space import Arch, SearchSpace

SCHEDULES = ("cosine", "exponential")


@dataclass
class Weights:
    """The descent on the weights; the values of DARTS (arXiv 1806.09055, released code).

    ``optimizer``: "sgd" (reads ``momentum``, ``nesterov``), "adam" or "adamw" (read ``betas``), or "rmsprop" (reads
    ``momentum``, ``alpha``, ``eps``). The rate grows in equal steps to ``lr`` over ``warmup_epochs``, then falls, constant
    within an epoch where ``per_epoch``. ``schedule``: "cosine", half of one, to ``lr_min`` at the end of the run, or
    "exponential", times ``decay_rate`` every ``decay_epochs``, never below ``lr_min``. ``warmup_start``: a factor of ``lr``,
    and another warm-up: the fall begins with the run, and a factor that grows from this one to 1 multiplies it (AttentiveNAS).
    ``norm_decay``: whether norms and biases decay too. ``clip``: largest gradient norm, None for no clipping; ``clip_value``
    instead of it: the largest size of one gradient's entry. ``idle``: what a weight that a step does not use gets, "zeros"
    (its momentum and decay go on, as in the released codes) or "skip".

    ``accumulate``: batches of one step. All run the same architectures, each loss counts for its share: the gradients are those
    of one batch so many times as large, but for batch norms, which see one batch at a time. An epoch has as many steps fewer.
    Strategies without alphas know it; others refuse more than 1 (``descent``).
    """

    lr: float = 0.025
    lr_min: float = 0.001
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 3e-4
    clip: float | None = 5.0
    per_epoch: bool = True
    idle: str = "zeros"
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: int = 0
    warmup_start: float | None = None
    schedule: str = "cosine"
    decay_rate: float = 0.97
    decay_epochs: float = 2.4
    norm_decay: bool = True
    clip_value: float | None = None
    alpha: float = 0.9
    eps: float = 1e-3
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.lr_min <= self.lr or self.lr == 0:
            raise ValueError(f"weights: lr = {self.lr}, lr_min = {self.lr_min}. Allowed: 0 <= lr_min <= lr, lr above 0.")
        self._optimizer()
        if self.warmup_epochs < 0:
            raise ValueError(f"weights: warmup_epochs = {self.warmup_epochs}. Allowed: 0 or more.")
        if self.warmup_start is not None and not (0 <= self.warmup_start <= 1 and self.warmup_epochs):
            raise ValueError(f"weights: warmup_start = {self.warmup_start}, warmup_epochs = {self.warmup_epochs}. Allowed: "
                             "0 to 1 with a warm-up of 1 epoch or more, or null.")  # fmt: skip
        if self.schedule not in SCHEDULES:
            raise ValueError(f"weights: schedule = {self.schedule!r} is not known. Allowed: {', '.join(SCHEDULES)}.")
        if not 0 < self.decay_rate <= 1 or not self.decay_epochs > 0:
            raise ValueError(f"weights: decay_rate = {self.decay_rate}, decay_epochs = {self.decay_epochs}. Allowed: a rate "
                             "above 0 up to 1, epochs above 0.")  # fmt: skip
        if self.clip is not None and self.clip_value is not None:
            raise ValueError(f"weights: clip = {self.clip}, clip_value = {self.clip_value}. Allowed: one of the two, the other "
                             "null.")  # fmt: skip
        if self.accumulate < 1:
            raise ValueError(f"weights: accumulate = {self.accumulate} is too few. Allowed: 1 or more.")

    def descent(self, params: Iterable[nn.Parameter], setup: Setup, accumulates: bool = False) -> Descent:
        """Over ``params``, with a schedule as long as the run of ``setup``. ``accumulates``: whether the strategy runs
        ``accumulate`` batches, each with a ``Descent.step`` of its own, the last of which acts.

        ValueError where it does not and is asked to, and where warming up takes all of the run.
        """
        if not accumulates:
            self.one_batch()
        return Descent(params, self._optimizer(), self.factor(setup), clip=self.clip, idle=self.idle,
                       accumulate=self.accumulate, clip_value=self.clip_value)  # fmt: skip

    def one_batch(self, name: str = "weights") -> None:
        """ValueError where a step is to be of several batches. ``name``: of the section that says so."""
        if self.accumulate > 1:
            raise ValueError(f"{name}: accumulate = {self.accumulate}, but here a step is one batch of each split it reads. "
                             "Allowed: 1, with a larger data.batch_size where memory has room.")  # fmt: skip

    def _optimizer(self) -> Callable[[list[nn.Parameter]], Optimizer]:
        return optimizer(self.optimizer, self.lr, self.weight_decay, momentum=self.momentum, nesterov=self.nesterov,
                         betas=self.betas, alpha=self.alpha, eps=self.eps, norm_decay=self.norm_decay)  # fmt: skip

    def factor(self, setup: Setup) -> Schedule:
        """Of the learning rate, at every step."""
        length, start = setup.epoch_steps if self.per_epoch else 1, self.warmup_start
        warmup = self.warmup_epochs * setup.epoch_steps
        if warmup and warmup >= setup.steps:
            raise ValueError(f"weights: warmup_epochs = {self.warmup_epochs} are the whole run ({setup.steps:,} steps of "
                             f"{setup.epoch_steps:,} an epoch). Allowed: less.")  # fmt: skip
        before, floor = warmup if start is None else 0, self.lr_min / self.lr
        if self.schedule == "cosine":
            fall = cosine(max((setup.steps - before) // length, 1), floor=floor)
        else:
            fall = exponential(self.decay_epochs * setup.epoch_steps / length, self.decay_rate, floor)
        if start is not None:
            return lambda step: (start + (1 - start) * min(step / warmup, 1.0)) * fall(step // length)
        return lambda step: (step + 1) / warmup if step < warmup else fall((step - warmup) // length)


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
        """Fresh logits for the space of ``setup``, where its net is. ValueError where they would wait for all of the run, and
        where nothing is open."""
        assert setup.space is not None
        something_open(setup.space)
        if self.warmup_epochs and self.warmup_epochs * setup.epoch_steps >= setup.steps:
            raise ValueError(f"alphas: warmup_epochs = {self.warmup_epochs} are the whole run of "
                             f"{setup.steps // setup.epoch_steps} epochs, so nothing would be searched. Allowed: less.")
        return Alpha(setup.space, self.std).to(next(setup.net.parameters()).device)

    def descent(self, alpha: nn.Module) -> Descent:
        adam = partial(Adam, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        return Descent(alpha.parameters(), adam)

    def derive(self, alpha: Alpha, budget: Budget | None, by: str = "softmax") -> Arch:
        """The most probable architecture with no more skips than ``skip_limit``, brought to the ``budget`` if there is one.
        ``by``: how alpha is read (``Alpha.probabilities``)."""
        rule, p = partial(alpha.architecture, self.skip_limit), alpha.probabilities(by)
        return rule(p) if budget is None else budget.derive(p, rule)

    def rest(self, now: Moment) -> bool:
        """Whether the alphas still wait for the weights."""
        return now.epoch < self.warmup_epochs


def weights_of(strategy: Strategy) -> Weights | None:
    """How ``strategy`` trains its weights, where it says so by a field of that name."""
    found = vars(strategy).get("weights")
    return found if isinstance(found, Weights) else None


def space_and_costs(setup: Setup, name: str) -> tuple[SearchSpace, CostTable]:
    """What ``setup`` gives to the strategy ``name`` to search. ValueError where there is none."""
    if setup.space is None or setup.costs is None:
        raise ValueError(f"{name} searches a space: give the run a supernet, its space and a cost table.")
    return setup.space, setup.costs


def something_open(space: SearchSpace) -> None:
    """ValueError where ``space`` leaves one architecture, so that alphas would have nothing to weigh."""
    if not space.free:
        raise ValueError(f"{space!r} leaves one architecture, so there is nothing to search. Restrict or split it less; to "
                         "train one architecture: nas extract RECIPE --arch largest, then nas retrain.")  # fmt: skip


@contextmanager
def undropped(net: nn.Module) -> Iterator[None]:
    """``net`` without dropout, then as before: around passes in training mode, whose norms are the batch's own, that judge an
    architecture. Dropped features would change the verdict by chance."""
    active = [module for module in net.modules() if isinstance(module, _DropoutNd) and module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


def temperature(now: Moment, start: float, end: float) -> float:
    """tau of an epoch, linear from ``start`` in the first to ``end`` in the last."""
    return start + (end - start) * now.epoch / max(now.epochs - 1, 1)
