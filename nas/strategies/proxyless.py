"""ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware. Han Cai, Ligeng Zhu, Song Han. ICLR 2019.
arXiv 1812.00332. The form that learns by gradients; its REINFORCE form is left out.

    p = softmax(a);  i ~ p;  g = onehot(i);  out = sum_j g_j f_j(x) = f_i(x)        one operation of every choice runs

    (1) w <- SGD on grad_w L_train(w, g)                                            every step
    (2) dL/dg_j = <f_j(x), dL/dout>
    (3) dL/da_i = sum_j dL/dg_j p_j (delta_ij - p_i)
    (4) a <- Adam on (3) of L_val(w, g), a fresh g                                  after every ``every``-th weight step

``mode``, where (2) and (3) are for all options:

    full     every operation runs with a graph, and autograd finds (2): the memory of a mixture. For reference.
    full_v2  only f_i runs with a graph; the other f_j run in the backward pass, without one: the memory of one path, and of
             the inputs and outputs of its operations.
    two      two options are drawn without replacement, from p + 1e-7 as in TAS (published: from p); in (2) to (4) p is the
             softmax of these two, i of it. Then log(sum exp a_new / sum exp a_old), over the two, is subtracted from both: no
             other probability changes.

With a ``budget``, E is the expected cost under p (in ``two``: of each pair) at any price, R the target:

    (5) mul_log     L = cost_a L_val (log E / log R)^cost_b
    (6) add_linear  L = L_val + cost_c (E - R) / R

Both always pull downwards; "budget" is the house's own term (nas.budget.Budget), which can hold E at R.

Rules as in the released code (shared page single-path.md). There operations that are not drawn get no weight decay either
(``weights.idle``: skip), and where the drawn option is zero, the choice learns nothing (``zero_rests``). Adam's moments of such
a choice see a zero gradient here, as all logits of one size are one parameter; what took no part stays as it was to the bit.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nas.bilevel import Alphas, Weights, space_and_costs
from nas.budget import Budget
from nas.losses import top1
from nas.protocols import Batch, Draw, Metrics, Moment, Setup
from search_spaces.space import Arch, Mixture, SearchSpace, Setting, Value

MODES = ("full_v2", "two", "full")
COST_LOSSES = ("mul_log", "add_linear", "budget")
Settings = Mapping[str, Setting]


@dataclass
class Proxyless:
    """``mode``, ``every``, ``cost_loss``, ``cost_a``, ``cost_b``, ``cost_c``: see the module. ``zero_rests``: whether a choice
    whose drawn option gives nothing ("none") learns nothing in that step, as released; else it learns by (2) too."""

    mode: str = "full_v2"
    every: int = 5
    zero_rests: bool = True
    cost_loss: str = "mul_log"
    cost_a: float = 1.0
    cost_b: float = 0.6
    cost_c: float = 0.2
    weights: Weights = field(default_factory=lambda: Weights(idle="skip"))
    alphas: Alphas = field(default_factory=lambda: Alphas(lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0))
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode = {self.mode!r} is not known. Allowed: {', '.join(MODES)}.")
        if self.every < 1:
            raise ValueError(f"every = {self.every} is no number of weight steps. Allowed: 1 or more.")
        if self.cost_loss not in COST_LOSSES:
            raise ValueError(f"cost_loss = {self.cost_loss!r} is not known. Allowed: {', '.join(COST_LOSSES)}.")
        for name, value in (("cost_a", self.cost_a), ("cost_b", self.cost_b), ("cost_c", self.cost_c)):
            if not 0 <= value < math.inf or (value == 0 and name == "cost_a"):
                raise ValueError(f"{name} = {value}. Allowed: {'above 0' if name == 'cost_a' else '0 or more'}.")
        if self.budget is not None and self.cost_loss != "budget" and self.budget.weight not in (0, 1):
            raise ValueError(f"budget.weight = {self.budget.weight} belongs to cost_loss = budget; {self.cost_loss} has "
                             f"{'cost_a and cost_b' if self.cost_loss == 'mul_log' else 'cost_c'}. "
                             "Allowed: 1, or 0 to only watch the cost.")  # fmt: skip

    def start(self, setup: Setup) -> None:
        self.setup, self.net = setup, setup.net
        self.space, self.costs = space_and_costs(setup, "Proxyless")
        _operations_alone(self.space)
        self.w = self.weights.descent(self.net.parameters(), setup)
        self.alpha = self.alphas.alpha(setup)
        self.a = self.alphas.descent(self.alpha)
        if self.budget is not None:
            self.budget.start(self.costs, self.space)
            if self.cost_loss == "mul_log" and self.budget.weight:
                _above_one(self.budget)

    def passes(self) -> float:
        """2: of a step that moves both. With ``every`` > 1 the others have one."""
        return 2

    def update(self, draw: Draw, now: Moment) -> Metrics:
        rate, found = self.w.rate, dict[str, float | Tensor]()
        x, y, _ = draw("train")
        z = self.net(x, self.arch(now))
        loss = self.setup.loss(z, y)
        self.w.down(loss, norm=True)  # (1)
        if (now.step + 1) % self.every == 0 and not self.alphas.rest(now):
            found = self.search(draw("valid"), now)
        return {
            "train/loss": loss.detach(), "train/top1": top1(z, y), "train/lr": rate, "train/grad_norm": self.w.grad_norm,
            "alpha/entropy": self.alpha.entropy().detach(), **found,
        }  # fmt: skip

    def search(self, valid: Batch, now: Moment) -> dict[str, float | Tensor]:
        soft, gates = self.sample(now)
        with self.w.frozen():
            z = self.net(valid.x, self.ran(gates))
            loss = self.setup.loss(z, valid.y)
            self.a.add(self.priced(loss, soft))  # (2), (3)
        self.step(gates)
        costs = {} if self.budget is None else self.budget.metrics(self.alpha.soft(), self.alpha.architecture())
        return {"valid/loss": loss.detach(), "valid/top1": top1(z, valid.y), "alpha/grad_norm": self.a.grad_norm, **costs}

    def sample(self, now: Moment) -> tuple[Settings, Settings]:
        """p, of all options or of two, and the gates that are drawn from it."""
        soft = self.alpha.gumbel(0.0, now.noise, count=2) if self.mode == "two" else self.alpha.soft()
        return soft, self.alpha.gates(soft, now.noise)

    def ran(self, gates: Settings) -> Settings:
        """What the net is given: the gates; in "full" a mixture of all operations, which the gates weigh."""
        if self.mode != "full":
            return gates
        return {name: s._replace(active=None, idle="absent") if isinstance(s, Mixture) else s for name, s in gates.items()}

    def priced(self, loss: Tensor, soft: Settings) -> Tensor:
        """(5), (6) or the house's term; () tensor."""
        if self.budget is None or self.budget.weight == 0:
            return loss
        if self.cost_loss == "budget":
            return loss + self.budget.loss(soft)
        E, R = self.budget.table.expected(soft, self.space), self.budget.R
        if self.cost_loss == "mul_log":
            return self.cost_a * loss * (E.log() / math.log(R)) ** self.cost_b
        return loss + self.cost_c * (E - R) / R

    def step(self, gates: Settings) -> None:
        """(4), for the logits that took part alone; in "two" the sum of exp of each pair stays as it was."""
        parts = self.parts(gates)
        before = [a.detach().clone() for a, _ in parts]
        for a, part in parts:
            if a.grad is not None:
                a.grad.masked_fill_(~part, 0.0)
        self.a.step(norm=True)
        with torch.no_grad():
            for (a, part), old in zip(parts, before):
                new = a - (_pooled(a, part) - _pooled(old, part)) if self.mode == "two" else a
                a.copy_(torch.where(part, new, old))

    def parts(self, gates: Settings) -> list[tuple[nn.Parameter, Tensor]]:
        """Logits and which of them took part, (n, K) each."""
        found = []
        for K, names in self.alpha.groups.items():
            rows = []
            for name in names:
                s = gates[name]
                learns = isinstance(s, Mixture) and name not in self.space.ties and not self._rests(s)
                took = s.options if isinstance(s, Mixture) and learns else ()
                rows.append([option in took for option in self.space.root[name].options])
            a = self.alpha.logits[str(K)]
            found.append((a, torch.tensor(rows).to(a.device)))
        return found

    def _rests(self, gate: Mixture) -> bool:
        assert gate.active is not None
        return self.zero_rests and gate.options[gate.active[0]] in self.space.nones

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """The path of the weight step: g as a plain architecture."""
        with torch.no_grad():
            gates = self.alpha.gates(self.alpha.soft(), now.noise)
        return {name: s.options[s.active[0]] if isinstance(s, Mixture) and s.active else s for name, s in gates.items()}

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        return self.alpha.probabilities()

    def architecture(self) -> Arch:
        return self.alphas.derive(self.alpha, self.budget)

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.budget is None or self.budget.fits(arch)

    def network(self, arch: Mapping[str, Setting]) -> Any:
        return self.net


def _pooled(a: Tensor, part: Tensor) -> Tensor:
    """log of the sum of exp over ``part`` of every row: (n, K) -> (n, 1)."""
    return a.masked_fill(~part, -math.inf).logsumexp(dim=1, keepdim=True)


def _operations_alone(space: SearchSpace) -> None:
    """ValueError where an open choice is a size, whose options are slices of one tensor and no operations of their own."""
    sizes = [name for name in space.free if space[name].ordered]
    if sizes:
        raise ValueError(
            f"Proxyless opens a gate to one of several operations, and {sizes[0]} is a size, whose options share one. "
            "Restrict sizes to one option each, or search them with TAS, SNAS or GDAS."
        )


def _above_one(budget: Budget) -> None:
    """ValueError where a logarithm of (5) may be 0 or less."""
    space, cheap = budget.space, budget.space.smallest()  # which computes something at every choice
    nothing = {c.name: option for c in space.choices for option in c.options if option in space.nones}
    least = min(budget.table.of(arch) for arch in (cheap, cheap | nothing))
    if not min(least, budget.R) > 1:
        raise ValueError(
            f"cost_loss = mul_log takes logarithms, and here costs go down to {least:.4g}, the target is {budget.R:.4g}. "
            "Allowed: costs above 1. Take cost_loss add_linear, or a price in a smaller unit."
        )
