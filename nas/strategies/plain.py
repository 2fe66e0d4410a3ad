"""plain: train one network, alone or taught by another. The strategy of retraining.

    w <- SGD on (1 - lam) CE(z, y) + lam T^2 KL(softmax(z_teacher / T) || softmax(z / T)) + auxiliary CE(z_auxiliary, y)

With a teacher this is the knowledge distillation of TAS, (14) (Dong, Yang. NeurIPS 2019. arXiv 1905.09717): the teacher is
the unpruned network in eval mode, without gradient. Without one it is the loss alone. The last term, and drop path whose
strength grows by the epoch, are those of the evaluation of DARTS (Liu, Simonyan, Yang. ICLR 2019. arXiv 1806.09055).
ScheduledDropPath is that of NASNet (Zoph, Vasudevan, Shlens, Le. CVPR 2018. arXiv 1707.07012, released code):

    keep = 1 - min(1, t / T) * ((l + 1) / L) * (1 - k)        with T = drop_path_steps, 1 - k = drop_path

in step t and cell l of L: the network gives the second factor (``supernets.extract.DropPath``), this file the others.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nas.descent import Descent
from nas.losses import distillation, means, top1
from nas.optimizers import optimizer
from nas.protocols import Draw, Metrics, Moment, Setup
from nas.schedules import Schedule, cosine, cosine_per_epoch
from search_spaces.space import Arch, Setting, Value

SCHEDULES = ("cosine_per_epoch", "cosine", "exponential")


@dataclass
class Plain:
    """Hyper-parameters with the CIFAR values of TAS, section 5.

    ``lam``, ``T``: share and temperature of the teacher, read only if there is one. ``schedule``: "cosine_per_epoch" (as
    released), "cosine" (every step), or "exponential" (times ``gamma`` every epoch). ``accumulate``: backward passes a step.
    ``ema``: decay of a moving average of the weights, which then is the network that is evaluated and kept.
    ``auxiliary``: weight of the auxiliary head's loss. ``drop_path``: strength that it would reach after the last epoch, from
    0 in the first; with ``drop_path_steps`` it grows by the step and is reached after as many. ``drop_path_version``: as in the
    released code of NASNet, 1 scales it by time alone, 2 by depth alone, 3 by both (by depth: where the network does so).
    A net that is trained with either takes (x, drop) and, with a head, answers (2, B, N): its own logits and the head's
    (``supernets.extract.TrainingForm``). ``optimizer``: "sgd" (reads ``momentum``, ``nesterov``), "adam" or "adamw" (read
    ``betas``), or "rmsprop" (reads ``momentum``).
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    schedule: str = "cosine_per_epoch"
    gamma: float = 0.97
    clip: float | None = None
    lam: float = 0.9
    T: float = 4.0
    accumulate: int = 1
    ema: float | None = None
    auxiliary: float = 0.0
    drop_path: float = 0.0
    drop_path_steps: int | None = None
    drop_path_version: int = 3
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule = {self.schedule!r} is not known. Allowed: {', '.join(SCHEDULES)}.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate = {self.accumulate} is too few. Allowed: 1 or more.")
        if not 0.0 <= self.auxiliary < float("inf") or not 0.0 <= self.drop_path < 1.0 or not 0.0 < self.gamma <= 1.0:
            raise ValueError(
                f"auxiliary = {self.auxiliary}, drop_path = {self.drop_path}, gamma = {self.gamma}. Allowed: auxiliary of 0 or "
                "more, drop_path from 0 up to 1, gamma above 0 up to 1."
            )
        if (self.drop_path_steps is not None and self.drop_path_steps < 1) or self.drop_path_version not in (1, 2, 3):
            raise ValueError(
                f"drop_path_steps = {self.drop_path_steps}, drop_path_version = {self.drop_path_version}. Allowed: 1 step or "
                "more, or null to grow by the epoch; version 1 (by time), 2 (by depth) or 3 (by both)."
            )
        self._optimizer()

    def _optimizer(self) -> Callable[[list[nn.Parameter]], Optimizer]:
        nesterov = self.nesterov and self.momentum > 0
        return optimizer(self.optimizer, self.lr, self.weight_decay, momentum=self.momentum, nesterov=nesterov,
                         betas=self.betas)  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        factor = self._factor(setup)
        self.w = Descent(self.net.parameters(), self._optimizer(), factor, clip=self.clip, accumulate=self.accumulate,
                         ema=self.ema)  # fmt: skip

    def _factor(self, setup: Setup) -> Schedule:
        """Of the learning rate, at every step."""
        if self.schedule == "cosine":
            return cosine(setup.steps, warmup=self.warmup_epochs * setup.epoch_steps)
        if self.schedule == "cosine_per_epoch":
            return cosine_per_epoch(setup.steps // setup.epoch_steps, setup.epoch_steps, self.warmup_epochs)
        warmup = self.warmup_epochs * setup.epoch_steps
        return lambda step: (step + 1) / warmup if step < warmup else self.gamma ** ((step - warmup) // setup.epoch_steps)

    def passes(self) -> float:
        return self.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, teacher, drop = self.w.rate, self.setup.teacher, self.drop(now)
        parts = list[dict[str, Tensor]]()
        for _ in range(self.accumulate):
            x, y, _ = draw("train")
            z, z_auxiliary = self._logits(x, drop)
            if teacher is None:
                loss = self.setup.loss(z, y)
            else:
                with torch.no_grad():
                    z_teacher = teacher(x)
                loss = distillation(z, z_teacher, y, self.lam, self.T, self.setup.loss)  # (14)
            found = {"train/top1": top1(z, y)}
            if z_auxiliary is not None:
                beside = self.setup.loss(z_auxiliary, y)
                found["train/auxiliary"] = beside.detach()
                loss = loss + self.auxiliary * beside
            self.w.down(loss, norm=True)
            parts.append({"train/loss": loss.detach(), **found})
        more = {"train/drop_path": drop} if self.drop_path else {}
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm, **more}

    def drop(self, now: Moment) -> float:
        """The strength of drop path at this moment, before the share of a cell."""
        if self.drop_path_version == 2:
            return self.drop_path
        if self.drop_path_steps is None:
            return self.drop_path * now.epoch / now.epochs
        return self.drop_path * min(1.0, now.step / self.drop_path_steps)

    def _logits(self, x: Tensor, drop: float) -> tuple[Tensor, Tensor | None]:
        """Of the network and, where it counts, of its auxiliary head."""
        if not self.auxiliary and not self.drop_path:
            return self.net(x), None
        out = self.net(x, drop)
        return (out[0], out[1]) if self.auxiliary else (out, None)

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """A plain network has no architecture left to choose."""
        return {}

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return {}

    def architecture(self) -> Arch:
        return {}

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """The net, or with ``ema`` a copy of it that holds the moving average."""
        if self.ema is None:
            return self.net
        with self.w.averaged():
            return copy.deepcopy(self.net)
