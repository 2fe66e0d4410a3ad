"""Random search at equal cost: the baseline that every search must beat (Li, Talwalkar. UAI 2019. arXiv 1902.07638).

    for each of ``trials`` random architectures A: fresh weights; steps // trials steps of
        (1) w <- SGD on grad_w L_train(w, A)
    the winner is the A whose network, trained alone, is the most accurate on ``judge`` batches of images held out for picks
    (``select``, where that is empty the validation split), as they are: without the training view's crops and flips

One forward and backward pass a step, so a run of as many image-passes as another strategy's costs no more than that one: a
path is cheaper than a mixture. The weights that serve the winner are its own.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nas.bilevel import Weights, space_and_costs, undropped
from nas.descent import Descent, average
from nas.losses import top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value


@dataclass
class Random:
    """``trials``: networks trained one after another, the ``given`` architectures first and random ones after them.
    ``judge``: batches that judge each. ``weights``: of each trial, the schedule as long as the trial."""

    trials: int = 8
    judge: int = 16
    given: list[dict[str, Any]] = field(default_factory=list)
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        if self.trials < 1 or self.judge < 1 or len(self.given) > self.trials:
            raise ValueError(f"trials = {self.trials}, judge = {self.judge}, {len(self.given)} given. "
                             "Allowed: 1 or more, and no more given architectures than trials.")  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "Random")
        for arch in self.given:
            self.space.check(arch)
        if setup.steps < self.trials:
            raise ValueError(f"{self.trials} trials need {self.trials} steps at least, the run has {setup.steps}. "
                             "Train longer, or try fewer.")  # fmt: skip
        self.length = setup.steps // self.trials
        self.w = self.descent()
        self.trial: Arch = self.space.smallest()
        self.scores: list[dict[str, Any]] = []  # {"arch", "top1"} of every finished trial
        self.winner = copy.deepcopy(self.net)

    def descent(self) -> Descent:
        return self.weights.descent(self.net.parameters(), self.setup._replace(steps=self.length))

    def passes(self) -> float:
        return 1

    def update(self, draw: Draw, now: Moment) -> Metrics:
        if self.begins(now.step):
            self.trial = self.candidate(now)
            self.net.reset(torch.Generator().manual_seed(now.rng.getrandbits(62)))
            self.w = self.descent()
        rate = self.w.rate
        x, y, _ = draw("train")
        z = self.net(x, self.trial)
        loss = self.setup.loss(z, y)
        self.w.down(loss, norm=True)  # (1)
        found: Metrics = {
            "train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "random/trial": self.index(now.step),
        }  # fmt: skip
        last = now.step + 1 == self.setup.steps or self.begins(now.step + 1)
        return {**found, **(self.finish(draw) if last else {})}

    def index(self, step: int) -> int:
        """The trial that a step belongs to: trial i begins at step ceil(i steps / trials)."""
        return step * self.trials // self.setup.steps

    def begins(self, step: int) -> bool:
        return step == 0 or self.index(step) != self.index(step - 1)

    def candidate(self, now: Moment) -> Arch:
        """The architecture of the trial that begins at this moment."""
        i = self.index(now.step)
        return self.space.canonical(self.given[i]) if i < len(self.given) else self.space.sample(now.rng)

    @torch.no_grad()
    def finish(self, draw: Draw) -> Metrics:
        right = torch.zeros((), dtype=torch.float64)
        for _ in range(self.judge):
            x, y, _ = draw("select")
            with undropped(self.net):
                z = self.net(x, self.trial)
            right += average(top1(z, y)).double().cpu() / self.judge
        if not self.scores or float(right) > max(score["top1"] for score in self.scores):
            self.winner.load_state_dict(self.net.state_dict())
        self.scores.append({"arch": self.trial, "top1": float(right)})
        return {"valid/top1": float(right)}

    def best(self) -> dict[str, Any] | None:
        """The most accurate finished trial, the first of equal ones."""
        return max(self.scores, key=lambda score: score["top1"]) if self.scores else None

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """Of the trial under way; of a trial that begins with this step, what it will be."""
        return self.candidate(now) if self.begins(now.step) else dict(self.trial)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        best = self.best()
        return dict(best["arch"] if best else self.trial)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """The winner's own weights for the winner, the trial's for all others."""
        best = self.best()
        return self.winner if best is not None and dict(arch) == best["arch"] else self.net
