"""plain: train one network, alone or taught by another. The strategy of retraining.

    w <- SGD on (1 - lam) CE(z, y) + lam T^2 KL(softmax(z_teacher / T) || softmax(z / T))

With a teacher this is the knowledge distillation of TAS, (14) (Dong, Yang. NeurIPS 2019. arXiv 1905.09717): the teacher is
the unpruned network in eval mode, without gradient. Without one it is the loss alone.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nas.descent import Descent, cosine, cosine_per_epoch
from nas.losses import distillation, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class Plain:
    """Hyper-parameters with the CIFAR values of TAS, section 5.

    ``lam``, ``T``: share and temperature of the teacher, read only if there is one. ``schedule``: "cosine_per_epoch" (as
    released) or "cosine" (every step). ``accumulate``: backward passes a step. ``ema``: decay of a moving average of
    the weights, which then is the network that is evaluated and kept.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: int = 0
    schedule: str = "cosine_per_epoch"
    clip: float | None = None
    lam: float = 0.9
    T: float = 4.0
    accumulate: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine_per_epoch", "cosine"):
            raise ValueError(f"schedule = {self.schedule!r} is not known. Allowed: cosine_per_epoch, cosine.")
        if self.accumulate < 1:
            raise ValueError(f"accumulate = {self.accumulate} is too few. Allowed: 1 or more.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0,
                      weight_decay=self.weight_decay, fused=True)
        epochs = setup.steps // setup.epoch_steps
        if self.schedule == "cosine":
            factor = cosine(setup.steps, warmup=self.warmup_epochs * setup.epoch_steps)
        else:
            factor = cosine_per_epoch(epochs, setup.epoch_steps, self.warmup_epochs)
        self.w = Descent(self.net.parameters(), sgd, factor, clip=self.clip, accumulate=self.accumulate, ema=self.ema)

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, teacher = self.w.rate, self.setup.teacher
        for _ in range(self.accumulate):
            x, y, _ = draw("train")
            z = self.net(x)
            if teacher is None:
                loss = self.setup.loss(z, y)
            else:
                with torch.no_grad():
                    z_teacher = teacher(x)
                loss = distillation(z, z_teacher, y, self.lam, self.T, self.setup.loss)  # (14)
            self.w.down(loss, norm=True)
        assert self.w.norm is not None
        return {"train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.norm}

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
