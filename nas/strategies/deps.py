"""DepS: Delayed epsilon-Shrinking for Faster Once-For-All Training. Annavajjala, Khare, Agrawal, Fedorov, Latapie, Lee,
Tumanov. ECCV 2024. arXiv 2407.06167. Rules as in the released code (shared page deps.md, sections 3 and 4).

The largest network learns alone; past the middle of the run all its subnets join at once, taught by it as it stands. Their
gradients are ramped up from nothing, so that the largest network does not suffer when they enter. N epochs, delay W, ramp s:

    (1) epochs 0 .. W-s-1: w <- SGD on grad CE(z_max, labels)
    (2) once, before the first step of epoch W-s: the hidden channels sorted by L1 norm, momentum with them
    (3) from then on: g = g_max + beta(t) [g_min + g_1 + g_2],  z_max of labels, g_i of T^2 CE(softmax(z_max / T), z_i / T)
    (4) beta(t) = m lr(W) (steps into the ramp + 1) / (steps of the ramp) / lr(t) on the ramp, m after it

so that beta(t) lr(t) grows by equal steps to m lr(W), lr(W) being the first rate of epoch W. One schedule of lr for the whole
run, never begun anew. Dropout for the largest only; z_max is a constant in (3); subnets 1 and 2 are uniform, fresh each step.

beta scales each loss before its backward: the gradients are those of the released code, which copies them for each network
and weights the copies (its 0/1 masks change nothing in a sum). Not done as there: lr(W) from tables, which hold the value of a
cosine to 0 one epoch later (ImageNet: 1.0594; with the floor of its recipe the formula gives 1.0757); momentum left where it
was at the sort (``momentum`` "released" does that).
"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs, undropped
from nas.losses import means, soft_cross_entropy, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.patterns import fitted, restricted
from search_spaces.space import Arch, Setting, Value

MOMENTA = ("permute", "reset", "released")
COMBINE = ("sum", "mean")
PUBLISHED = partial(Weights, lr=2.6, lr_min=2.5e-3, nesterov=True, weight_decay=3e-5, norm_decay=False, clip=None,
                    per_epoch=False, idle="skip")  # fmt: skip


@dataclass
class DepS:
    """``delay`` (W), ``ramp`` (s): epochs, or a share of the run such as "50%", to whole epochs (a ramp above 0% has one at
    least). ``m``: the factor of the subnets after the ramp. ``T``: the temperature. ``randoms``: subnets a step beside the
    smallest. ``drop``: dropout of the largest. ``combine``: "sum", or "mean": the sum divided by the networks of the step.

    ``protect``: patterns (search_spaces.patterns) of the subnets that the sort leaves as they are, but for the order of their
    channels: published, all but the smallest expand; null: none but the largest. ``momentum`` at the sort: "permute" with the
    channels, "reset" to nothing, or "released", left where it is.
    """

    delay: int | str = 150
    ramp: int | str = 5
    m: float = 1.0
    T: float = 1.0
    randoms: int = 2
    drop: float = 0.1
    combine: str = "sum"
    protect: dict[str, Any] | None = field(default_factory=lambda: {"*.expand": 2})
    momentum: str = "permute"
    weights: Weights = field(default_factory=PUBLISHED)

    def __post_init__(self) -> None:
        if self.momentum not in MOMENTA or self.combine not in COMBINE:
            raise ValueError(f"momentum = {self.momentum!r}, combine = {self.combine!r}. Allowed: {', '.join(MOMENTA)}; "
                             f"{', '.join(COMBINE)}.")  # fmt: skip
        if not (self.m > 0 and self.T > 0 and self.randoms >= 0 and 0 <= self.drop < 1):
            raise ValueError(f"m = {self.m}, T = {self.T}, randoms = {self.randoms}, drop = {self.drop}. Allowed: m and T "
                             "above 0, randoms from 0, drop from 0, below 1.")  # fmt: skip
        _epochs("delay", self.delay, 100), _epochs("ramp", self.ramp, 100)
        self.mean_passes = self.weights.accumulate * (2.0 + self.randoms)  # until a run is known: of its dearest step

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "DepS")
        epochs = -(-setup.steps // setup.epoch_steps)
        delay, ramp = _epochs("delay", self.delay, epochs), _epochs("ramp", self.ramp, epochs)
        if not (ramp <= delay <= epochs and delay - ramp < epochs):
            raise ValueError(f"delay = {self.delay}, ramp = {self.ramp}: {delay} and {ramp} of {epochs} epochs. Allowed: ramp "
                             "<= delay <= epochs, the ramp beginning before the end.")  # fmt: skip
        self.switch, self.whole = (delay - ramp) * setup.epoch_steps, delay * setup.epoch_steps  # first steps of (3), of m
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)
        copy.deepcopy(self.net).sort_channels(trained=self.protected())  # refuses before step 0 what it would refuse later
        nets = 1.0 + (1 + self.randoms) * (setup.steps - self.switch) / setup.steps
        self.mean_passes = self.weights.accumulate * nets

    def passes(self) -> float:
        return self.mean_passes

    def beta(self, step: int) -> float:
        """The factor of the subnets' gradients at ``step`` of the run. (4)"""
        if step < self.switch:
            return 0.0
        if step >= self.whole:
            return self.m
        done = (step - self.switch + 1) / (self.whole - self.switch)
        return self.m * self.lr(self.whole) * done / self.lr(step)

    def lr(self, step: int) -> float:
        """The rate of ``step``, in closed form."""
        return self.w.bases[0] * self.w.schedule(step)

    def update(self, draw: Draw, now: Moment) -> Metrics:
        if now.step == self.switch:
            self.sort()  # (2)
        rate, beta = self.w.rate, self.beta(now.step)
        subnets = [self.space.smallest(), *self.drawn(now)] if now.step >= self.switch else []
        share, parts = 1.0 if self.combine == "sum" else 1.0 / (1 + len(subnets)), list[dict[str, Tensor]]()
        for _ in range(self.weights.accumulate):
            x, y, _ = draw("train")
            z = self.net(x, self.space.largest(), drop=self.drop)
            loss = self.setup.loss(z, y)
            self.w.add(share * loss)  # (1), and g_max of (3)
            z = z.detach()
            taught = list[Tensor]()
            for arch in subnets:
                with undropped(self.net):
                    taught.append(soft_cross_entropy(self.net(x, arch), z, self.T))
                self.w.add(share * beta * taught[-1])  # (3)
                taught[-1] = taught[-1].detach()
            self.w.step(norm=True)
            parts.append({
                "train/loss": loss.detach(), "train/top1": top1(z, y),
                **({"train/loss_smallest": taught[0]} if taught else {}),
                **({"train/loss_random": torch.stack(taught[1:]).mean()} if taught[1:] else {}),
            })  # fmt: skip
        return {
            **means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "shrink/phase": float((now.step >= self.switch) + (now.step >= self.whole)), "shrink/epsilon": beta,
        }  # fmt: skip

    def drawn(self, now: Moment) -> list[Arch]:
        return [self.space.sample(now.rng) for _ in range(self.randoms)]

    def sort(self) -> None:
        moved = self.net.sort_channels(trained=self.protected())
        if self.momentum == "permute":
            self.w.permute(moved)
        elif self.momentum == "reset":
            self.w.forget()

    def protected(self) -> Any:
        """The space of the subnets whose channels the sort keeps; None where nothing is protected."""
        try:
            return None if self.protect is None else restricted(self.space, fitted(self.protect, self.space, self.net.space))
        except ValueError as error:
            raise ValueError(f"protect = {self.protect}: {error} Set protect: null, or name a choice that leads.") from None

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        return self.space.largest()

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net


def _epochs(name: str, said: int | str, epochs: int) -> int:
    """Whole epochs of a number of them, or of a share of ``epochs``; of a share above 0%, at least 1. ValueError otherwise."""
    if isinstance(said, str) and said.strip().endswith("%"):
        try:
            share = float(said.strip()[:-1]) / 100
        except ValueError:
            share = -1.0
        if 0 <= share <= 1:
            return max(round(share * epochs), int(share > 0))
    elif isinstance(said, int) and not isinstance(said, bool) and said >= 0:
        return said
    raise ValueError(f'{name} = {said}. Allowed: whole epochs from 0, or a share of the run, "0%" to "100%".')
