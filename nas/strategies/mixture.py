"""Mixture: Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture. Mehraveh Javan, Matthew Toews, Marco
Pedersoli. AutoML 2023. arXiv 2306.11982. Rules as in the authors' code (shared page pooling-mixture.md, section 2).

M supernets of independent weights, and a table W of rewards for every configuration a and model m, 1 at the start: better than
any accuracy, so that what was not visited looks best. At the start of an epoch, T the inverse temperature, linear over them:

    (1) P(m|a) = softmax over m of T W[a, m]
    (2) pi_m = the mean of P(m|a) over a
    (3) unless KL(pi || uniform) <= 1e-4: keep pi;  P(m|a) <- (P(m|a) / pi_m) / sum over m' of (P(m'|a) / pi_m')
    (4) go to (2)

One step:

    (5) a ~ uniform
    (6) r0 = softmax over m of T W[a, m] with the W of now, divided by every pi that was kept, renormalised after each
    (7) m ~ r0
    (8) w_m <- SGD on grad L_train(w_m, a)
    (9) r = the accuracy of w_m at a on a batch of the validation split, by the batch's own statistics
    (10) W[a, m] <- 0.9 W[a, m] + 0.1 r

A configuration is what the named ``choices`` are set to, canonically; by default of all choices, the architecture itself. The
others are drawn with it: uniform is what ``space.sample`` draws, so with one model this is SPOS to the last bit. Where that
draws some configurations more often than others (one that many settings write, because they are inert), (2) weighs them so.

Each model has an optimizer of its own in effect: nothing of another moves with it, momentum included; the rate follows the
steps of all. The models differ by their initial weights, drawn from the run's seed; the first has the run's own (also where
they are given by init, which the others are not). Afterwards a searcher picks, as for SPOS; published: the best of all pairs.

Not done: images of (9) without the training view's crops and flips (as for alphas, the validation split has them here).
"""
from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.balance import Configurations, Divisions, assignment, balance
from nas.bilevel import Weights, space_and_costs, temperature, undropped
from nas.descent import average
from nas.losses import means, top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Setting, Value

ASSIGNED = "assigned"
KEEP = 0.9  # of W in (10)


def published() -> Weights:
    """Of CIFAR-10: SGD with momentum, a cosine over the epochs, neither decay nor clipping."""
    return Weights(lr=0.1, lr_min=0.001, momentum=0.9, weight_decay=0.0, clip=None)


@dataclass
class Mixture:
    """``models``: M. ``temperature``: T in the first and in the last epoch. ``choices``: patterns of names (``*``, ``?``,
    ``[abc]``). ``serve``: which model answers for an architecture, "assigned", the one of the largest P(m|a), or the number of
    one, from 0, to read their maximum by: nas rank RUN --strategy.serve 2."""

    models: int = 4
    temperature: tuple[float, float] = (1.0, 100.0)
    choices: Sequence[str] = ("*",)
    serve: int | str = ASSIGNED
    weights: Weights = field(default_factory=published)

    def __post_init__(self) -> None:
        if self.models < 1:
            raise ValueError(f"models = {self.models} is too few. Allowed: 1 or more.")
        if len(self.temperature) != 2 or not all(0 <= T < math.inf for T in self.temperature):
            raise ValueError(f"temperature = {list(self.temperature)}: give two, of the first and last epoch, each 0 or more.")
        if isinstance(self.choices, str) or not self.choices:
            raise ValueError(f"choices = {self.choices!r}: give a list of names or patterns, such as ['*'].")
        numbered = isinstance(self.serve, int) and not isinstance(self.serve, bool) and 0 <= self.serve < self.models
        if not numbered and self.serve != ASSIGNED:
            raise ValueError(f"serve = {self.serve!r}. Allowed: {ASSIGNED}, or the number of a model, 0 to {self.models - 1}.")

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "Mixture")
        self.configurations = Configurations(self.space, self.choices)
        self.copies = [copy.deepcopy(self.net) for _ in range(self.models - 1)]
        for net in self.copies:
            net.reset(torch.Generator().manual_seed(int(torch.randint(2**62, ()))))  # seeded alike on every rank
        mine = replace(self.weights, idle="skip")  # an idle model's momentum rests, whatever an idle weight's does
        self.w = mine.descent([p for net in self.nets for p in net.parameters()], setup, accumulates=True)
        self.rewards: dict[str, list[float]] = {}  # W, of the configurations that were visited; 1 elsewhere
        self.visits: dict[str, list[int]] = {}
        self.divisions = Divisions()  # log pi of every one that is kept
        self.T, self.used = float(self.temperature[0]), [0] * self.models

    @property
    def nets(self) -> list[Any]:
        """The models, by number."""
        return [self.net, *self.copies]

    @property
    def ones(self) -> list[float]:
        """The row of W of what was never visited."""
        return [1.0] * self.models

    def passes(self) -> float:
        """The forward pass of (9) has no backward: about a third of a pass, not counted, as elsewhere."""
        return self.weights.accumulate

    def update(self, draw: Draw, now: Moment) -> Metrics:
        batches, valid = [draw("train") for _ in range(self.weights.accumulate)], draw("valid")
        found = self.rebalance(now) if now.first else {}
        arch = self.space.sample(now.rng)  # (5)
        a = self.configurations.of(arch)
        m = now.rng.choices(range(self.models), self.assigned(a).tolist())[0]  # (6), (7)
        found |= self.down(self.nets[m], arch, batches)  # (8)
        r = self.reward(self.nets[m], arch, valid)  # (9)
        row = self.rewards.setdefault(a, self.ones)
        row[m] = KEEP * row[m] + (1 - KEEP) * r  # (10)
        self.visits.setdefault(a, [0] * self.models)[m] += 1
        self.used[m] += 1
        found |= {f"mixture/use_{i}": n / sum(self.used) for i, n in enumerate(self.used)}
        return {**found, "valid/top1": r}

    def rebalance(self, now: Moment) -> dict[str, Any]:
        """(1) to (4): what an epoch begins with; how far the use of the models would have been from equal (in nats), and the
        fewest visits of a pair."""
        self.T, self.used = temperature(now, *self.temperature), [0] * self.models
        odds = self.configurations.odds
        W = torch.tensor([self.rewards.get(a, self.ones) for a in odds], dtype=torch.float64)
        self.divisions, kl = balance(W, self.T, torch.tensor(list(odds.values()), dtype=torch.float64))
        fewest = min(min(self.visits.get(a, [0])) for a in odds)
        return {"mixture/kl": kl, "mixture/divisions": len(self.divisions), "mixture/temperature": self.T,
                "mixture/fewest_visits": fewest}  # fmt: skip

    def assigned(self, a: str) -> Tensor:
        """P(m|a) (M,) by the W of now."""
        return assignment(torch.tensor(self.rewards.get(a, self.ones), dtype=torch.float64), self.T, self.divisions)

    def down(self, net: nn.Module, arch: Arch, batches: Sequence[Batch]) -> dict[str, Any]:
        rate, parts = self.w.rate, list[dict[str, Tensor]]()
        for x, y, _ in batches:
            z = net(x, arch)
            loss = self.setup.loss(z, y)
            self.w.add(loss)
            for p in net.parameters() if self.weights.idle == "zeros" else ():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.w.step(norm=True)
            parts.append({"train/loss": loss.detach(), "train/top1": top1(z, y)})
        return {**means(parts), "train/lr": rate, "train/grad_norm": self.w.grad_norm}

    @torch.no_grad()
    def reward(self, net: nn.Module, arch: Arch, batch: Batch) -> float:
        """Accuracy, 0 to 1, over the shares of all ranks."""
        with undropped(net):
            return float(average(top1(net(batch.x, arch), batch.y)))

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        return self.space.sample(now.rng)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing is believed of any choice: W compares models, not configurations, until all of it was visited often."""
        return {}

    def architecture(self) -> Arch:
        """The largest; a searcher picks."""
        return self.space.largest()

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return True

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """The model that ``serve`` says; of equally probable ones the first."""
        if isinstance(self.serve, int):
            return self.nets[self.serve]
        return self.nets[int(self.assigned(self.configurations.of(arch)).argmax())]
