"""What a network may cost: amounts, the term of the expected cost that gradient-based strategies share, and architectures that
are brought to a budget.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nas.cost import PRICES, CostTable
from nas.latency import read_latency
from search_spaces.space import Arch, Mixture, SearchSpace, Setting, Value

Rule = Callable[[Mapping[str, Sequence[float]]], Arch]
"""Probabilities of the options -> the architecture that is derived from them."""
EXACT = 20_000
"""A space of at most so many architectures is searched whole for what meets a budget."""
UNITS = {"%": (1, 100), "k": (1000, 1), "M": (10**6, 1), "G": (10**9, 1)}
"""What may stand behind a number: a factor and a divisor (35 / 100 is 0.35, 35 * 0.01 is not)."""


def budget(amount: str | float, costs: CostTable, space: SearchSpace, name: str = "target") -> float:
    """A budget in the table's unit: "55%" of the largest architecture of the root space, or an absolute number.

    Raises ValueError for what is neither, and for a budget outside the smallest and largest cost in ``space``.
    """
    full = costs.of(space.root.largest())
    number, share = read_amount(amount, name)
    value = number * full if share else number
    low, high = costs.of(space.smallest()), costs.of(space.largest())
    if low > high:
        raise ValueError(
            f"{name}: by this price the smallest network costs more ({figure(low)}) than the largest ({figure(high)}). Where "
            "a latency table says so, its rows are noise: measure again on a machine left in peace, with a larger --batch."
        )
    if not low <= value <= high:
        percent = f" A share needs a %: did you mean {100 * number:g}%?" if not share and 0 < number < 1 else ""
        raise ValueError(
            f"{name} = {amount} ({figure(value)}) cannot be reached in this space.{percent} Smallest cost: {figure(low)} "
            f"({low / (full or 1):.1%}), largest: {figure(high)} ({high / (full or 1):.1%}). Choose a budget between them."
        )
    return value


def read_amount(amount: str | float, name: str) -> tuple[float, bool]:
    """"55%" -> (0.55, True), a share; a number, also as "12M", -> (number, False). ValueError for what is neither."""
    text = str(amount).strip()
    factor, divisor = UNITS.get(text[-1:], (1, 1))
    try:
        number = float(text[:-1] if text[-1:] in UNITS else text) * factor / divisor
    except ValueError:
        raise ValueError(f"{name} = {amount!r} is not a budget. Allowed: a share (55%), or a number (12M).") from None
    return number, text.endswith("%")


def figure(cost: float) -> str:
    """Whole numbers whole (MACs), others short (milliseconds)."""
    return f"{cost:,.0f}" if float(cost).is_integer() or abs(cost) >= 1000 else f"{cost:.4g}"


def log_ratio(ratio: Tensor, least: float = 1e-3) -> Tensor:
    """log ``ratio``; below ``least`` its tangent there, so that a ratio of 0 has a finite value and slope (1 / ``least``).

    A cell of free operations alone costs nothing. There log is -inf, and its slope 1 / 0, times the slope 0 of a decided
    softmax, is nan. The tangent still pulls upwards, as a floor would not; from ``least`` on this is log to the last bit.
    """
    tangent = math.log(least) + (ratio / least - 1)
    return torch.where(ratio < least, tangent, ratio.clamp(min=least).log())


@dataclass
class Budget:
    """The cost term that every gradient-based strategy takes: ``budget: {price: macs, target: 55%, weight: 1.0}``.

        E = expected cost of the mixtures (``CostTable.expected``, followers tied), R = the target
        side "both":     loss = weight * |log(E / R)|
        side "at_most":  loss = weight * max(0, log(E / R))         nothing to pay for less than R

    in float64, with ``log_ratio`` for log: exact from E = R / 1000 on. In the logits of one choice the slope of log E is
    p_k (c_k - E) / E: it needs no scale of its own, whatever the unit of the price.

    E counts every choice as independent: of a DARTS cell all edges, though two a node are kept; ``derive`` makes up for that.

    ``target``: "55%" of the largest architecture of the root space, or a number in the price's unit (for a latency table
    milliseconds a batch). ``price``: macs, params, activations, or the path of a latency table (.csv, ``nas latency``).
    ``tolerance``: what ``fits`` allows, as a share of R. ``weight`` 0 only watches.
    """

    target: str | float
    price: str = "macs"
    weight: float = 1.0
    side: str = "both"
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        read_amount(self.target, "budget.target")
        if self.price not in PRICES and not self.price.endswith(".csv"):
            known = ", ".join(PRICES)
            raise ValueError(f"budget.price = {self.price!r} is not known. Allowed: {known}, or a latency table's path (.csv).")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"budget.weight = {self.weight} is no weight. Allowed: 0 or more; 0 only watches the cost.")
        if self.side not in ("both", "at_most"):
            raise ValueError(f"budget.side = {self.side!r} is not known. Allowed: both, at_most.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"budget.tolerance = {self.tolerance} is not a share. Allowed: 0 up to 1.")

    def start(self, costs: CostTable, space: SearchSpace) -> None:
        """Prices the net of ``costs`` (a table at any price) and finds R, which ``space`` must be able to reach.

        ``table``, ``space`` and ``R`` are no fields: a strategy holds a budget as a hyper-parameter, so a checkpoint leaves
        all of it out, and resuming calls this again. Raises ValueError (``budget``, ``read_latency``) or FileNotFoundError.
        """
        price = PRICES[self.price] if self.price in PRICES else read_latency(self.price)
        self.table, self.space = costs.priced(price), space
        self.R = budget(self.target, self.table, space, "budget.target")
        if not self.R > 0:
            raise ValueError(f"budget.target = {self.target} is free, and no ratio to it is known. Allowed: above 0.")
        self._reachable()

    def _reachable(self) -> None:
        """ValueError where nothing that ``space`` derives meets R: a DARTS cell keeps two edges a node, so no network of
        that space costs what all its edges would."""
        shares = {name: [1.0 / len(self.space[name].options) if option in self.space[name].options else 0.0
                         for option in self.space.root[name].options] for name in self.space.free}  # fmt: skip
        tilted = self._tilted(shares)
        low, high = sorted(self.table.of(self.space.derive(tilted(sign * 2.0**20))) for sign in (1, -1))
        if self.R * (1 + self.tolerance) < low or (self.side == "both" and self.R * (1 - self.tolerance) > high):
            raise ValueError(
                f"budget.target = {self.target} ({figure(self.R)}) is out of reach: what this space derives costs from "
                f"{figure(low)} to {figure(high)}. Choose a budget between them."
            )

    def loss(self, soft: Mapping[str, Setting]) -> Tensor:
        """The term to add to the architecture's loss: () float64, differentiable in the weights of ``soft``."""
        distance = log_ratio(self.table.expected(soft, self.space) / self.R)
        return self.weight * (distance.abs() if self.side == "both" else distance.relu())

    def metrics(self, soft: Mapping[str, Setting], arch: Mapping[str, Value]) -> dict[str, float | Tensor]:
        """E of ``soft``, the true cost of ``arch`` and R, in the price's unit. Strategies give the most probable ``arch``, as
        it is before ``derive`` brings it to the budget: how far the two lie apart says how much that has to change."""
        with torch.no_grad():
            E = self.table.expected(soft, self.space)
        return {"cost/expected": E, "cost/current": float(self.table.of(arch)), "cost/target": self.R}

    def derive(self, probabilities: Mapping[str, Sequence[float]], rule: Rule) -> Arch:
        """What ``rule`` derives, brought to the budget: a mixture may cost R in expectation while its most probable options
        together cost anything.

            p'_ck ~ p_ck exp(-m E_ck / R),   E_ck: the expected cost where choice c takes option k

        with the m nearest to 0 whose derived architecture fits. Where the cost jumps over the budget there, one choice more is
        decided for another option (at m, then around it): the most probable of what then fits. ``rule(probabilities)``
        itself where it fits. A space of at most ``EXACT`` architectures is searched whole instead. Where nothing fits, what
        comes nearest to R.
        """
        arch = rule(probabilities)
        if self.fits(arch):
            return arch
        exact = self._of_all(probabilities, rule)
        if exact is not None:
            return exact
        tilted = self._tilted(probabilities)
        sign = 1.0 if self.table.of(arch) > self.R else -1.0

        def short(arch: Arch) -> bool:
            """Whether the tilt must grow: the cost is still on the first side of the budget."""
            return not self.fits(arch) and sign * (self.table.of(arch) - self.R) > 0

        low, high = 0.0, 2.0**-10
        while short(rule(tilted(sign * high))) and high < 2.0**20:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            candidate = rule(tilted(sign * middle))
            low, high = (middle, high) if short(candidate) else (low, middle)
        nearby = [sign * low, *(sign * high * 2.0**k for k in (0, -1, 1, -2, 2, -3, 3))]
        nearest = arch
        for candidates in ([rule(tilted(sign * high))], *(map(rule, self._one_decided(tilted(m))) for m in nearby)):
            tried = list(candidates)
            fitting = [candidate for candidate in tried if self.fits(candidate)]
            if fitting:
                return max(fitting, key=lambda found: self._odds(found, probabilities))
            nearest = min([nearest, *tried], key=lambda found: abs(self.table.of(found) - self.R))
        return nearest

    def _of_all(self, probabilities: Mapping[str, Sequence[float]], rule: Rule) -> Arch | None:
        """``derive`` by looking at every architecture that ``rule`` leaves as it is; None where they are too many."""
        space, names = self.space, [name for name in self.space.free if name in probabilities]
        if math.prod(len(space[name].options) for name in names) > EXACT:
            return None
        column = {choice.name: i for i, choice in enumerate(space.root.choices)}
        axes = [[space.root[name].options.index(option) for option in space[name].options] for name in names]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(names))
        codes = np.repeat(space.encode([space.smallest()]), len(grid), axis=0)
        codes[:, [column[name] for name in names]] = grid
        for name, tie in space.ties.items():
            follows = [space.root[name].options.index(tie.values[option]) if option in tie.values else 0
                       for option in space.root[tie.leader].options]  # fmt: skip
            codes[:, column[name]] = np.array(follows)[codes[:, column[tie.leader]]]
        cost = self.table.batch(codes).astype(float)
        odds = sum(np.log(np.maximum(probabilities[name], 1e-300))[grid[:, i]] for i, name in enumerate(names))
        slack = self.tolerance * self.R
        short = (cost > self.R + slack) | ((cost < self.R - slack) if self.side == "both" else False)
        for i in np.lexsort((-odds, np.where(short, np.abs(cost - self.R), 0.0))):
            arch = space.decode(codes[i : i + 1])[0]
            certain = {name: [float(option == arch[name]) for option in space.root[name].options] for name in probabilities}
            if rule(certain) == arch:
                return arch
        return None

    def _one_decided(self, p: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Sequence[float]]]:
        """``p`` with one choice decided, for each open choice and each option that it may take."""
        for name in (name for name in self.space.free if name in p):
            yield from ({**p, name: [float(k == j) for k in range(len(p[name]))]} for j, q in enumerate(p[name]) if q > 0)

    def _odds(self, arch: Mapping[str, Value], probabilities: Mapping[str, Sequence[float]]) -> float:
        """log of the probability of ``arch`` under independent choices."""
        at = {name: self.space.root[name].options.index(arch[name]) for name in self.space.free if name in probabilities}
        return sum(math.log(max(probabilities[name][k], 1e-300)) for name, k in at.items())

    def _tilted(self, probabilities: Mapping[str, Sequence[float]]) -> Callable[[float], dict[str, Sequence[float]]]:
        """m -> p' of ``derive``. E is linear in the weights of each choice, so E_ck is its derivative."""
        p = {name: torch.tensor(probabilities[name], dtype=torch.float64) for name in self.space.free if name in probabilities}
        soft: dict[str, Setting] = {choice.name: choice.options[0] for choice in self.space.choices}
        for name, row in p.items():
            soft[name] = Mixture(self.space.root[name].options, row.clone().requires_grad_())
        rows = [setting.weights for setting in soft.values() if isinstance(setting, Mixture)]
        with torch.enable_grad():
            found = torch.autograd.grad(self.table.expected(soft, self.space), rows, allow_unused=True, materialize_grads=True)
        slopes = dict(zip((name for name, setting in soft.items() if isinstance(setting, Mixture)), found))
        return lambda m: {
            **probabilities,
            **{name: torch.softmax(row.log() - m * slopes[name] / self.R, 0).tolist() for name, row in p.items()},
        }

    def fits(self, arch: Mapping[str, Value]) -> bool:
        """Whether the cost of ``arch`` is R within the tolerance; with "at_most", whether it is no more than that."""
        cost, slack = self.table.of(arch), self.tolerance * self.R
        return cost <= self.R + slack and (self.side == "at_most" or cost >= self.R - slack)
