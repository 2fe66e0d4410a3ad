"""How configurations are shared out among several models, so that all are equally used: the pure functions of the balanced
mixture of supernets (Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982), and what a configuration of a space is.

    P(m|a) = softmax over m of T W[a, m];   pi_m = the mean over a of P(m|a)
    while KL(pi || uniform) > 1e-4:  keep pi;  P(m|a) <- (P(m|a) / pi_m) / sum over m' of (P(m'|a) / pi_m')

All in float64 and by logarithms: at a high T a probability may be less than the smallest number. Letters: ``K`` configurations,
``M`` models, ``D`` divisions that were kept.
"""
from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_spaces.space import SearchSpace, Value

TOLERANCE = 1e-4
ROUNDS = 100_000  # divisions; a few dozen are usual
MOST = 4096  # configurations: each needs visits of its own, by every model

Divisions = list[list[float]]
"""(D, M): log pi of every division, in the order in which they are made."""


class Balance(NamedTuple):
    """``divisions``: that make all models equally used; ``kl``: KL(pi || uniform) before the first of them."""

    divisions: Divisions
    kl: float


def assignment(rewards: Tensor, T: float, divisions: Sequence[Sequence[float]] = ()) -> Tensor:  # (.., M) -> (.., M)
    """P(m|a) of rows of W: the softmax, then the divisions in their order, renormalised after each.

    The renormalisations cancel, so one by the product of all pi does for all of them.
    """
    logits = T * rewards
    if len(divisions):
        logits = logits - torch.tensor(divisions, dtype=logits.dtype, device=logits.device).sum(0)
    return logits.softmax(-1)


def balance(rewards: Tensor, T: float, odds: Tensor) -> Balance:
    """The divisions that bring pi to within ``TOLERANCE`` of uniform. ``rewards``: W (K, M). ``odds`` (K,): how often a is
    drawn, 1/K each where all are drawn alike. ValueError where ``ROUNDS`` divisions do not."""
    log_p, log_odds = (T * rewards).log_softmax(1), odds.log()[:, None]
    found, first = Divisions(), math.nan
    for _ in range(ROUNDS):
        log_pi = (log_odds + log_p).logsumexp(0)
        kl = divergence(log_pi)
        first = kl if not found else first
        if kl <= TOLERANCE:
            return Balance(found, first)
        found.append(log_pi.tolist())
        log_p = (log_p - log_pi).log_softmax(1)
    raise ValueError(f"after {ROUNDS:,} divisions the models are not equally used (KL = {kl:.2g}). Lower the temperature.")


def divergence(log_pi: Tensor) -> float:  # (M,) -> nats
    """KL(pi || uniform)."""
    return float((log_pi.exp() * (log_pi + math.log(len(log_pi)))).sum())


class Configurations:
    """Of a space, what the choices that ``patterns`` name can be set to together; inert settings do not tell two apart.

    ``names``: these choices, but for followers of others and what a rule of the family sets: the same in a space and all its
    restrictions. ``odds``: configuration -> how often ``space.sample`` draws it (in cell spaces by the named choices alone).
    Raises ValueError where a pattern matches no choice, where there are more than ``MOST``, and where a choice that is not
    named decides whether a named one counts.
    """

    def __init__(self, space: SearchSpace, patterns: Sequence[str]) -> None:
        self.space, self.names = space, _named(space, patterns)
        settings = math.prod(len(space[name].options) for name in self.names)
        if settings > MOST:
            open_ = [name for name in self.names if len(space[name].options) > 1]
            raise ValueError(f"choices = {list(patterns)} are {settings:,} configurations of {len(open_)} choices, and every "
                             f"model is to visit each of them. Allowed: up to {MOST:,}. Name fewer choices, such as "
                             f"[{open_[0]}]; the others are drawn uniformly.")  # fmt: skip
        counts: dict[str, int] = {}
        for key in self._drawn():
            counts[key] = counts.get(key, 0) + 1
        total = sum(counts.values())
        self.odds = {key: n / total for key, n in counts.items()}

    def _drawn(self) -> Iterator[str]:
        """The configuration of every joint setting that ``sample`` may draw, in the order of the options."""
        for values in itertools.product(*(self.space[name].options for name in self.names)):
            try:
                arch = self.space.restrict({name: (value,) for name, value in zip(self.names, values)}).sample(random.Random(0))
            except ValueError:  # no cell of this family has them
                continue
            if self.space.lawful(self.space.encode([arch])).all():
                yield self.of(arch)

    def of(self, arch: Mapping[str, Any]) -> str:
        """The configuration of an architecture, as text."""
        canonical: Mapping[str, Value] = self.space.canonical(arch)
        return ",".join(f"{name}={canonical[name]}" for name in self.names)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the space says it all, to a part of it other things than to the whole."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing changes."""


def _named(space: SearchSpace, patterns: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for pattern in patterns:
        found = [choice.name for choice in space.choices if fnmatchcase(choice.name, pattern)]
        if not found:
            raise ValueError(f"choices: {pattern!r} matches no choice of {space.name}, whose first is {space.choices[0].name}.")
        names += found
    kept = [c.name for c in space.choices if c.name in names and c.name not in (*space.ties, *space.root.ruled)]
    if not kept:
        raise ValueError(f"choices = {list(patterns)}: all that these name follows from other choices. Name the others.")
    for name in kept:
        for needed, values in space.conditions(name).items():
            decided = needed in kept or (needed in space.ties and space.ties[needed].leader in kept)
            left = set(space[needed].options)
            if not decided and not left <= values and not left.isdisjoint(values):
                lead = space.ties[needed].leader if needed in space.ties else needed
                raise ValueError(f"choices = {list(patterns)}: {needed} decides whether {name} counts. Name {lead} too, or "
                                 f"leave {name} out.")  # fmt: skip
    return tuple(kept)
