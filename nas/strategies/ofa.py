"""Once-for-All: Train One Network and Specialize it for Efficient Deployment. Cai, Gan, Wang, Zhang, Han. ICLR 2020.
arXiv 1908.09791. Rules as in the released code (shared page ofa.md, sections 3 and 4); CompOFA (Sahni, Varshini, Khare,
Tumanov, ICLR 2021, arXiv 2104.12642) is another list of phases, on a space whose choices are tied.

"Progressive shrinking": the largest network learns, then the space is opened phase by phase, the largest as the teacher p:

    (1) a_1 .. a_n uniform and independent in the phase's space, one resolution R for all of them and for the batch
    (2) p = softmax(teacher(x)), without gradient and dropout, normalised by the batch as the released code does
    (3) g = sum over j of grad [kd_ratio CE(p, net(x, a_j)) + CE(labels, net(x, a_j))],  one step, no division by n

All phases are one run with one descent: what a step does follows from its number alone. A phase begins with a fresh optimizer
and its own rate: warm-up by equal steps, then half a cosine. Where it says so, it first sorts the hidden channels by L1 norm,
which leaves every network of the phase before as it was. The teacher is the largest network as the first phase left it, of a
split's child too: the one that its parent was taught by, where the first phase was the parent's.

Resolution is open in all phases; one crop is loaded, and the supernet brings it to R as it does when it is read and extracted
(the released code loads at R). Not done as there: the first phase (never released) is the same net, not one without kernel
matrices, and weights that no network of a step uses rest (``idle`` of the weights; else matrices would decay before their first
use); CompOFA's second sort keeps all networks of the phase before, where the released code keeps those of two expands.
"""
from __future__ import annotations

import bisect
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nas.bilevel import Weights, space_and_costs, undropped
from nas.losses import means, soft_cross_entropy, top1
from nas.protocols import Draw, Metrics, Moment, Setup
from search_spaces.inverted import RESOLUTION
from search_spaces.patterns import fitted, restricted
from search_spaces.space import Arch, SearchSpace, Setting, Value

COMBINE = ("sum", "mean")


@dataclass(frozen=True)
class Phase:
    """``opens``: patterns (search_spaces.patterns) of choices and what is open of them from this phase on; choices that no
    phase opened yet have their largest option. ``epochs`` and, before them, ``warmup``: proportions, so that the published
    numbers serve a run of any length. ``lr``: a proportion too, the first phase's stands for the run's ``weights.lr``.
    ``nets``: networks a step. ``sort``: whether it begins with the channel sort.
    """

    name: str
    epochs: float
    lr: float
    opens: dict[str, Any] = field(default_factory=dict)
    nets: int = 1
    warmup: float = 0
    sort: bool = False

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.lr > 0 and self.warmup >= 0 and self.nets >= 1):
            raise ValueError(f"phase {self.name}: epochs = {self.epochs}, warmup = {self.warmup}, lr = {self.lr}, nets = "
                             f"{self.nets}. Allowed: epochs and lr above 0, warmup from 0, nets from 1.")  # fmt: skip

    @property
    def length(self) -> float:
        return self.epochs + self.warmup


PHASES = (
    Phase("full", 180, 2.6),
    Phase("kernel", 120, 0.96, {"*.kernel": 3}, warmup=5),
    Phase("depth 1", 25, 0.08, {"*.depth": 2}, nets=2),
    Phase("depth 2", 120, 0.24, {"*.depth": 3}, nets=2, warmup=5),
    Phase("expand 1", 25, 0.08, {"*.expand": 2}, nets=4, sort=True),
    Phase("expand 2", 120, 0.24, {"*.expand": 3}, nets=4, warmup=5, sort=True),
)
PUBLISHED = partial(Weights, lr=2.6, lr_min=0.0, nesterov=True, weight_decay=3e-5, norm_decay=False, clip=None, per_epoch=False,
                    idle="skip")  # fmt: skip


@dataclass
class OFA:
    """``phases``: in order; null: ``PHASES``, as published. ``kd_ratio``: weight of the teacher's labels, 0 for none.
    ``drop``: dropout of the networks that learn. ``warmup_from``: the share of a phase's rate that its warm-up begins at
    (published: the rate of one GPU of 32). ``combine``: "sum", or "mean": the sum divided by the networks of the step.
    """

    phases: list[Phase] | None = None
    kd_ratio: float = 1.0
    drop: float = 0.1
    warmup_from: float = 1 / 32
    combine: str = "sum"
    weights: Weights = field(default_factory=PUBLISHED)

    def __post_init__(self) -> None:
        if self.phases is not None:
            self.phases = [phase if isinstance(phase, Phase) else Phase(**phase) for phase in self.phases]
        if self.phases == []:
            raise ValueError("phases = []. Give at least one phase, or null for the published ones.")
        if self.combine not in COMBINE:
            raise ValueError(f"combine = {self.combine!r} is not known. Allowed: {', '.join(COMBINE)}.")
        if not (self.kd_ratio >= 0 and 0 <= self.drop < 1 and 0 <= self.warmup_from <= 1):
            raise ValueError(f"kd_ratio = {self.kd_ratio}, drop = {self.drop}, warmup_from = {self.warmup_from}. Allowed: "
                             "kd_ratio from 0, drop from 0, below 1, warmup_from 0 to 1.")  # fmt: skip
        if self.weights.warmup_epochs:
            raise ValueError(f"weights.warmup_epochs = {self.weights.warmup_epochs}. Allowed: 0, the phases have warm-ups.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "OFA")
        self.plan = Plan(self.phases or list(PHASES), self.weights, self.warmup_from, setup, self.net.space)
        self.w = self.weights.descent(self.net.parameters(), setup, accumulates=True)
        self.w.schedule = self.plan.factor
        teaches = self.kd_ratio > 0 and len(self.plan.phases) > 1
        self.teacher = copy.deepcopy(self.net).requires_grad_(False) if teaches else None
        if any(phase.sort for phase in self.plan.phases):  # a net that cannot be sorted is refused before step 0
            copy.deepcopy(self.net).sort_channels(trained=self.plan.spaces[0])

    def passes(self) -> float:
        phases = self.phases or PHASES
        nets = sum(phase.nets * phase.length for phase in phases) / sum(phase.length for phase in phases)
        return nets * self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        k = self.plan.at(now.step)
        phase, space = self.plan.phases[k], self.plan.spaces[k]
        if k and now.step == self.plan.starts[k]:
            self.begin(k)
        if not k:
            self.plan.full = self.space.largest()
        rate, archs = self.w.rate, drawn(space, phase.nets, now)  # (1)
        share, parts = 1.0 if self.combine == "sum" else 1.0 / phase.nets, list[dict[str, Tensor]]()
        for _ in range(self.weights.accumulate):
            x, y, _ = draw("train")
            p = self.taught(x, archs[0]) if k else None  # (2)
            for arch in archs:
                z = self.net(x, arch, drop=self.drop)
                loss = self.setup.loss(z, y)
                if p is not None:
                    loss = self.kd_ratio * soft_cross_entropy(z, p) + loss
                self.w.add(share * loss)  # (3)
                parts.append({"train/loss": loss.detach(), "train/top1": top1(z, y)})
            self.w.step(norm=True)
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm, "shrink/phase": float(k)}

    def begin(self, k: int) -> None:
        """Of phase ``k`` after the first, before its first step."""
        if k == 1 and self.teacher is not None:
            self.teacher.load_state_dict(self.net.state_dict())
        if self.plan.phases[k].sort:
            self.net.sort_channels(trained=self.plan.spaces[k - 1])
        self.w.forget()

    @torch.no_grad()
    def taught(self, x: Tensor, arch: Arch) -> Tensor | None:
        """The teacher's logits at the resolution of ``arch``; None where there is no teacher."""
        if self.teacher is None:
            return None
        full = self.plan.full
        with undropped(self.teacher):
            return self.teacher(x, full | {RESOLUTION: arch[RESOLUTION]} if RESOLUTION in full else full)

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        return drawn(self.plan.spaces[self.plan.at(now.step)], 1, now)[0]

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice."""
        return {}

    def architecture(self) -> Arch:
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net


class Plan:
    """The phases of a run: their ``starts`` in steps, their ``spaces``, and the rate at every step. Follows from the recipe and
    the length of the run; its state makes sure of that. ``full``: the network that the first phase trains, the teacher's; it is
    state, as a part of the space may go on where the whole was taught."""

    def __init__(self, phases: Sequence[Phase], weights: Weights, warmup_from: float, setup: Setup,
                 written_for: SearchSpace | None = None) -> None:  # fmt: skip
        assert setup.space is not None
        self.phases = list(phases)
        whole, ends = sum(phase.length for phase in phases), accumulate(phase.length for phase in phases)
        self.starts = [0, *(round(setup.steps * end / whole) for end in ends)]
        self.spaces, self.full = opened(setup.space, phases, written_for), setup.space.largest()
        self.factors = []
        for phase, begin, end in zip(phases, self.starts, self.starts[1:]):
            steps, warmup = end - begin, round((end - begin) * phase.warmup / phase.length)
            if steps - warmup < 1:
                raise ValueError(f"phase {phase.name}: {phase.length:g} of {whole:g} epochs are {steps} of the run's "
                                 f"{setup.steps:,} steps, too few. Give more epochs.")  # fmt: skip
            ratio = phase.lr / phases[0].lr
            fall = replace(weights, lr=weights.lr * ratio).factor(setup._replace(steps=steps - warmup))
            self.factors.append((ratio, warmup, fall))
        self.warmup_from = warmup_from

    def at(self, step: int) -> int:
        """The phase of a step."""
        return min(bisect.bisect_right(self.starts, step), len(self.phases)) - 1

    def factor(self, step: int) -> float:
        """Of the run's rate, at ``step``: the warm-up of its phase, then its cosine, whose clock begins after the warm-up."""
        k = self.at(step)
        ratio, warmup, fall = self.factors[k]
        done = step - self.starts[k]
        if done < warmup:
            return ratio * (self.warmup_from + (1 - self.warmup_from) * (done + 1) / warmup)
        return ratio * fall(done - warmup)

    def state_dict(self) -> dict[str, Any]:
        return {"starts": list(self.starts), "full": dict(self.full)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError where the phases of the checkpoint began at other steps."""
        if state["starts"] != self.starts:
            raise ValueError(f"checkpoint: its phases begin at steps {state['starts']}, here {self.starts}. Resume with the "
                             "phases that it was written with.")  # fmt: skip
        self.full = dict(state.get("full", self.full))


def opened(space: SearchSpace, phases: Sequence[Phase], whole: SearchSpace | None = None) -> list[SearchSpace]:
    """The space of each phase: what it and those before it opened, the largest option of all other choices; followers follow,
    resolution is always open. ``whole``: what the phases were written for, where ``space`` is a part of that (a split's).
    ValueError where a pattern matches nothing, and where the last leaves shut what the space has."""
    patterns: dict[str, Any] = {}
    found = []
    for phase in phases:
        patterns |= phase.opens
        shut = {name: "largest" for name in space.free
                if name != RESOLUTION and not any(fnmatchcase(name, pattern) for pattern in patterns)}  # fmt: skip
        found.append(restricted(space, shut | fitted(patterns, space, whole or space)))
    unopened = [name for name in space.free if found[-1][name].options != space[name].options]
    if unopened:
        raise ValueError(f"phases: none opens all of {unopened[0]} (and of {len(unopened) - 1} more), so untrained networks "
                         "would be picked. Open it in a phase, or restrict the space.")  # fmt: skip
    return found


def drawn(space: SearchSpace, n: int, now: Moment) -> list[Arch]:
    """``n`` uniform, independent architectures, all at the resolution of the first."""
    archs = [space.sample(now.rng) for _ in range(n)]
    return [arch | {RESOLUTION: archs[0][RESOLUTION]} if RESOLUTION in arch else arch for arch in archs]

