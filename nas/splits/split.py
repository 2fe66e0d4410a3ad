"""What a recipe says of its splits (key ``split``): when a supernet becomes several, of which choice, and what they inherit.

    Few-shot NAS: Zhao, Wang, Tian, Fonseca, Guo. ICML 2021. arXiv 2006.06863.             by: exhaustive
    GM-NAS: Hu, Wang, Hong, Li, Hsieh, Feng. ICLR 2022. arXiv 2203.15207.                  by: gradients

Rules as in the shared page fewshot-gm.md, section 2. A level is one round of splits: every supernet that there is becomes
several. The path from the root to a leaf takes the recipe's ``epochs``.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BY = ("gradients", "exhaustive")
RULES = ("cut", "within")
OTHERS = ("strategy", "sample")
INHERIT = ("all", "weights", "nothing")


@dataclass
class Split:
    """``at``: the epochs after which each level splits, ascending, whole numbers or shares of ``epochs`` ("25%"); none: one
    supernet. ``by``: "gradients", the choice and the groups of its options whose gradients agree; "exhaustive", a child for
    each option of a named choice, or for each of the groups that ``parts`` gives it, a list of them for each level.

    ``choices``: patterns of the names that may be split, each once on the way to a leaf; exhaustive: the name of each level's.
    ``groups``: of each level. ``least``: options in a group at least; ``balanced``: sizes differ by one at most. ``rule``:
    which choice is split, that of the largest "cut", or of the smallest "within".

    ``repeats``: batches over which distances are averaged; ``samples``: draws of the other choices for each. ``others``: where
    these draws come from: the "strategy" (a mixture, a sample, a path: what it would train next), or "sample", a random
    architecture. ``keep_weight``: the tested option keeps its weight of a mixture (released code on DARTS cells), not 1.
    ``leave_out``: patterns of the parameters that are not compared, beside those that only the tested choice uses.

    ``inherit``, of each level: "all" (weights, alphas, optimizers, schedules), "weights" (everything else begins anew), or
    "nothing". One word stands for all levels. ``before``: arguments of the strategy as long as supernets are still to be split.
    """

    by: str = "gradients"
    at: list[int | str] = field(default_factory=list)
    choices: list[str] = field(default_factory=lambda: ["*"])
    parts: list[list[list[Any]]] = field(default_factory=list)
    groups: int | list[int] = 2
    least: int = 1
    balanced: bool = False
    rule: str = "cut"
    repeats: int = 100
    samples: int = 1
    others: str = "strategy"
    keep_weight: bool = False
    leave_out: list[str] = field(default_factory=list)
    inherit: str | list[str] = "all"
    before: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, allowed in (("by", self.by, BY), ("rule", self.rule, RULES), ("others", self.others, OTHERS),
                                     *(("inherit", word, INHERIT) for word in _each(self.inherit, 1))):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"split.{name} = {value!r} is not known. Allowed: {', '.join(allowed)}.")
        for name in ("least", "repeats", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"split.{name} = {getattr(self, name)}. Allowed: 1 or more.")
        if any(n < 2 for n in _each(self.groups, 1)):
            raise ValueError(f"split.groups = {self.groups}. Allowed: 2 or more, one number or one for each level.")
        for name, given in (("groups", self.groups), ("inherit", self.inherit)):
            if isinstance(given, list) and self.at and len(given) != len(self.at):
                raise ValueError(f"split.{name} = {given} for {len(self.at)} levels (split.at = {self.at}). Give one for each, "
                                 "or one for all.")  # fmt: skip
        if self.by == "exhaustive" and self.at and len(self.choices) != len(self.at):
            raise ValueError(f"split.choices = {self.choices} for {len(self.at)} levels. An exhaustive split names the choice "
                             "of each level.")  # fmt: skip
        if self.by == "exhaustive" and self.at and len(set(self.choices)) < len(self.choices):
            raise ValueError(f"split.choices = {self.choices}. Allowed: each once, as an exhaustive split leaves one option.")
        if self.parts and (self.by != "exhaustive" or len(self.parts) != len(self.at)):
            raise ValueError(f"split.parts = {self.parts} for {len(self.at)} levels, by {self.by}. Allowed: groups of the "
                             "options of each level's choice, by exhaustive.")  # fmt: skip

    @property
    def levels(self) -> int:
        return len(self.at)

    def group_count(self, level: int) -> int:
        """Of gradients: the children of one supernet of ``level``."""
        return _each(self.groups, self.levels)[level]

    def groups_of(self, options: Sequence[Any], level: int) -> list[list[Any]]:
        """Exhaustive: which of the ``options`` of its choice each child of a supernet of ``level`` has."""
        return [list(part) for part in self.parts[level]] if self.parts else [[option] for option in options]

    def inherits(self, level: int) -> str:
        return _each(self.inherit, self.levels)[level]

    def epochs(self, epochs: int) -> list[int]:
        """``at`` in epochs of a path of ``epochs``. ValueError where they do not ascend, or nothing is left for the leaves."""
        found = [_epoch(word, epochs) for word in self.at]
        if any(a >= b for a, b in zip(found, [*found[1:], epochs])) or (found and found[0] < 0):
            raise ValueError(f"split.at = {self.at}: epochs {found} of {epochs}. Allowed: ascending, from 0, below {epochs}.")
        return found


def _each(given: Any, levels: int) -> list[Any]:
    return given if isinstance(given, list) else [given] * levels


def _epoch(word: int | str, epochs: int) -> int:
    text = str(word).strip()
    share = text.removesuffix("%")
    try:
        return round(epochs * float(share) / 100) if share != text else int(text)
    except (ValueError, OverflowError):
        raise ValueError(f"split.at: {word!r} is no epoch. Allowed: whole numbers, or shares such as 25%.") from None


def ends(split: Split, epochs: int) -> Sequence[int]:
    """The epoch at which the supernets of each level end, the leaves' last."""
    return [*split.epochs(epochs), epochs]
