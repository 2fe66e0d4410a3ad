"""Is a search deciding, and on something that can learn? Pure functions on probabilities and a derived architecture.

Gradient-based search has known bad ends: cells of parameter-free skips (DARTS on NAS-Bench-201 always ends there, arXiv
2001.00326; arXiv 1909.06035 stops at two skips a cell), empty cells, everything at its narrowest, logits that freeze before
the weights have learned, and mixtures whose accuracy is gone once all but one option is cut away (arXiv 1909.09656).

    health = read(space, arch, strategy.probabilities())
    for kind, words in warnings(health, progress=0.5, gap=mixture_top1 - derived_top1).items(): ...

Only free choices that count in the architecture are read. Parts are those of ``space.part``; "" is the whole network.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import torch

from search_spaces.space import Choice, Mixture, SearchSpace, Setting, Value

SKIPS = 0.5  # above: more than half of what a cell keeps has nothing to learn with
NONES = 2 / 3  # from: a DARTS cell leaves 43% of its edges empty by design, so half would not tell
NARROWEST = 0.9  # from: a tight budget narrows many choices, only a runaway cost term nearly all
LEAN = 1.02  # times an even chance: below, what is derived is the noise of the start (logits of std 1e-3 give 1.002)
DECIDED = 0.1  # entropy below: two options at 1.3% and 98.7%; a logit is 4 ahead, which takes Adam some 7,000 steps at 3e-4
EARLY = 0.25  # of the run: until then weights are near their start and ease of training is all that alphas see
LATE = 0.75  # of the run: before, a mixture beats any one of its undecided options, and should
GAP = 0.3  # of accuracy: beyond what a derived network lacks for want of its own training alone
GONE = 1e-3  # of the largest gradient norm read so far: Adam's step still moves, but by noise
CHANCE, LEARNT = 1.2, 2.0  # times chance: a subnet is there again, and had left it
KINDS = ("skip", "none", "narrowest")


class Share(NamedTuple):
    """How often an option of one kind was derived: ``hits`` ``of`` that many choices.

    ``belief``: the mean probability of such options where they are offered, None where nothing is believed; ``even``: what
    it would be if all options were equally probable.
    """

    hits: int
    of: int
    belief: float | None
    even: float

    @property
    def share(self) -> float:
        return self.hits / self.of


class Health(NamedTuple):
    """``entropy``: part -> normalised entropy, 1 undecided, 0 decided; empty where nothing is believed.
    ``shares``: part -> kind -> Share, only kinds that the space offers."""

    entropy: dict[str, float]
    shares: dict[str, dict[str, Share]]

    def tags(self) -> dict[str, float]:
        """What goes to TensorBoard and metrics.jsonl; a part's figures carry its name."""
        found = {_tag("entropy", part): value for part, value in self.entropy.items()}
        for part, kinds in self.shares.items():
            for kind, share in kinds.items():
                found[_tag(f"share_{kind}", part)] = share.share
                if share.belief is not None:
                    found[_tag(f"mean_{kind}", part)] = share.belief
        return found


def read(space: SearchSpace, arch: Mapping[str, Value], probabilities: Mapping[str, Sequence[float]]) -> Health:
    """The health of ``arch`` and of the ``probabilities`` (over the root's options, may be empty) that it was derived from."""
    counting = space.counting(arch)
    names = [name for name in space.free if name in counting]
    parts: dict[str, list[str]] = {"": names}
    for name in names:
        if space.part(name):
            parts.setdefault(space.part(name), []).append(name)
    entropies = {part: entropy(space, probabilities, own) for part, own in parts.items() if own and probabilities}
    shares = {part: {kind: found for kind in KINDS if (found := share(space, arch, probabilities, kind, own)) is not None}
              for part, own in parts.items()}  # fmt: skip
    return Health(entropies, shares)


def entropy(space: SearchSpace, probabilities: Mapping[str, Sequence[float]], names: Collection[str]) -> float:
    """Mean over ``names`` (free choices, at least one) of H(p) / log(options), over the remaining options."""
    rows = [_odds(space, probabilities, name) for name in names]
    return mean(-sum(p * math.log(p) for p in row.values() if p > 0) / math.log(len(row)) for row in rows)


def share(
    space: SearchSpace, arch: Mapping[str, Value], probabilities: Mapping[str, Sequence[float]], kind: str,
    names: Collection[str],
) -> Share | None:  # fmt: skip
    """How many of the choices ``names`` derived an option of ``kind``; None where none could have.

    "skip" and "none": ``space.skips`` and ``space.nones`` of unordered choices, skips among those that are not empty;
    "narrowest": the first remaining option of ordered choices.
    """
    options = {name: _of_kind(space, space[name], kind) for name in names}
    able = [name for name in names if options[name]]
    asked = [name for name in able if kind != "skip" or arch[name] not in space.nones]
    if not asked:
        return None
    beliefs = []
    for name in able if probabilities else ():
        odds = _odds(space, probabilities, name)
        beliefs.append(sum(odds[option] for option in options[name]))
    even = mean(len(options[name]) / len(space[name].options) for name in able)
    hits = sum(arch[name] in options[name] for name in asked)
    return Share(hits, len(asked), mean(beliefs) if beliefs else None, even)


def relaxed(
    space: SearchSpace, probabilities: Mapping[str, Sequence[float]], device: torch.device | str = "cpu"
) -> dict[str, Setting]:
    """The mixture that a strategy believes in: every free choice mixes its remaining options by their probabilities (over
    the root's options), followers as their leaders, all else as it must be."""
    out: dict[str, Setting] = {choice.name: choice.options[0] for choice in space.choices}
    for name in space.free:
        options, allowed = space.root[name].options, space[name].options
        weights = torch.tensor(list(probabilities[name]), dtype=torch.float32, device=device)
        active = None if len(allowed) == len(options) else tuple(options.index(option) for option in allowed)
        out[name] = Mixture(options, weights, active)
    for name, (leader, values) in space.ties.items():
        leads = out[leader]
        if isinstance(leads, Mixture):  # what forbidden options of the leader ask for is never computed
            out[name] = leads._replace(options=tuple(values.get(option, space[name].options[0]) for option in leads.options))
        else:
            out[name] = values[leads]
    return out


def warnings(
    health: Health, *, progress: float, gap: float | None = None, norm: float | None = None, peak: float | None = None
) -> dict[str, str]:
    """Kind -> what is wrong, why that is bad and what to do, in one line; empty while the search is healthy.

    ``progress``: share of the run, 0 to 1. ``gap``: accuracy of the mixture less that of its derived architecture.
    ``norm``: of the gradient of the alphas, ``peak``: the largest so far. Nothing is said of a strategy without beliefs.
    """
    if not health.entropy:
        return {}
    parts = [part for part in health.shares if part] or [""]
    found = {f"{kind}/{part}" if part else kind: words for part in parts for kind, share in health.shares[part].items()
             if (words := _collapse(kind, share, f"the {part} cell" if part else "the network"))}  # fmt: skip
    undecided = health.entropy[""]
    if undecided < DECIDED and progress <= EARLY:
        found["entropy"] = (
            f"the alphas have decided (entropy {undecided:.3f} of 1) after {progress:.0%} of the run, before the weights could "
            "learn, so the choice is one of early ease. Hold them back with alphas.warmup_epochs, or lower alphas.lr."
        )
    if gap is not None and gap >= GAP and progress >= LATE:
        found["gap"] = (
            f"the mixture is {100 * gap:.0f} points above its derived architecture after {progress:.0%} of the run, so "
            f"what derivation cuts away carries the accuracy (entropy {undecided:.2f} of 1). Train longer or raise alphas.lr "
            "until the alphas decide, and judge the result by nas retrain, not by its accuracy in the supernet."
        )
    if norm is not None and norm <= GONE * (peak or 0.0) and undecided >= DECIDED:
        found["gradient"] = (
            f"the gradient of the alphas has all but vanished (norm {norm:.2g}, {peak or 0.0:.2g} at its largest) while they "
            f"are undecided (entropy {undecided:.2f} of 1): more epochs change nothing. Stop early, raise alphas.lr, or end "
            "the temperature higher where the strategy has one."
        )
    return found


def collapsed(history: Sequence[Mapping[str, float]], row: Mapping[str, float], classes: int) -> dict[str, str]:
    """What to say of subnets (tags subnet/<name>/top1) that are at chance in ``row`` and were not before: a supernet may
    collapse in the middle of a run (AttentiveNAS, issue 5 of the released code)."""
    chance = 1.0 / classes
    fallen = [tag.split("/")[1] for tag, top1 in row.items() if tag.startswith("subnet/") and top1 <= CHANCE * chance
              and max((before.get(tag, 0.0) for before in history), default=0.0) >= LEARNT * chance]  # fmt: skip
    if not fallen:
        return {}
    return {"collapse": f"collapse of the supernet: {' and '.join(fallen)} fell to chance ({chance:.0%}), where accuracy was "
                        f"{LEARNT:g} times that before. Go back to an earlier checkpoint; lower weights.lr, clip "
                        "(weights.clip) or warm up (weights.warmup_epochs)."}  # fmt: skip


def _collapse(kind: str, share: Share, where: str) -> str | None:
    """What to say of one kind of option in one part; None where it is healthy."""
    assert share.belief is not None
    if share.belief < LEAN * share.even:
        return None
    odds = f"mean probability {share.belief:.2f}, by chance {share.even:.2f}"
    counted = f"all {share.of}" if share.hits == share.of else f"{share.hits} of the {share.of}"
    if kind == "skip" and share.share > SKIPS:
        known = " DARTS on NAS-Bench-201 is known to end like this." if share.hits == share.of else ""
        return (f"collapse to skips: {counted} operations that {where} keeps have no weights ({odds}), so it can learn little."
                f"{known} Hold the alphas back (alphas.warmup_epochs), cap skips (alphas.skip_limit: 2), stop earlier, or "
                "raise weights.weight_decay.")  # fmt: skip
    if kind == "none" and share.share >= NONES:
        return (f"collapse to none: {counted} choices of {where} are empty ({odds}), so hardly anything reaches its output. "
                "Hold the alphas back (alphas.warmup_epochs), stop earlier, or leave none out (--restrict).")  # fmt: skip
    if kind == "narrowest" and share.share >= NARROWEST:
        return (f"collapse to the narrowest: {counted} ordered choices of {where} are at their smallest ({odds}), so the cost "
                "term or early ease outweighs accuracy. Raise the budget's target or lower its weight; without a budget, hold "
                "the alphas back (alphas.warmup_epochs).")  # fmt: skip
    return None


def _odds(space: SearchSpace, probabilities: Mapping[str, Sequence[float]], name: str) -> dict[Value, float]:
    """The remaining options' probabilities; they sum to 1. All equal where they are all 0."""
    allowed = space[name].options
    row = {option: float(p) for option, p in zip(space.root[name].options, probabilities[name]) if option in allowed}
    total = sum(row.values())
    return {option: p / total if total else 1 / len(row) for option, p in row.items()}


def _of_kind(space: SearchSpace, choice: Choice, kind: str) -> tuple[Value, ...]:
    if choice.ordered:
        return choice.options[:1] if kind == "narrowest" else ()
    wanted = {"skip": space.skips, "none": space.nones, "narrowest": ()}[kind]
    return tuple(option for option in choice.options if option in wanted)


def _tag(name: str, part: str) -> str:
    return f"health/{name}/{part}" if part else f"health/{name}"
