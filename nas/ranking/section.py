"""What a recipe says of ranking as the training goes on (key ``rank``): by which known accuracies, how often, how it is read.

    rank: {truth: accuracies.csv, value: test, archs: 100, every: 10}
"""
from __future__ import annotations

from dataclasses import dataclass

from nas.evaluate import BN_MODES

SPLITS = ("select", "valid", "test")


@dataclass
class Rank:
    """``truth``: a CSV or JSON file of known accuracies, as ``nas rank --truth`` takes it; null: nothing is ranked. ``key``,
    ``value``: its columns that name an architecture and its accuracy. ``archs``: how many of them, drawn by ``seed`` like those
    of ``nas rank --archs``, or "all". ``every``: epochs between readings, the last of which is at the end.

    Each is read on ``images`` of ``split`` (null: all), with batch norms recalibrated on ``bn_images`` training images, or by
    the statistics of each batch (``bn``: "batch"). Nothing of this changes the training.
    """

    truth: str | None = None
    key: str | None = None
    value: str | None = None
    archs: int | str = 100
    every: int = 10
    split: str = "select"
    images: int | None = None
    bn: str = "recalibrated"
    bn_images: int = 2000
    seed: int = 1

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value != getattr(Rank, name)]
        if self.truth is None and given:
            raise ValueError(f"rank.truth is missing, so rank.{given[0]} says nothing. Give a CSV or JSON file of accuracies.")
        for name, value, allowed in (("split", self.split, SPLITS), ("bn", self.bn, BN_MODES)):
            if value not in allowed:
                raise ValueError(f"rank.{name} = {value!r} is not known. Allowed: {', '.join(allowed)}.")
        for name in ("every", "images", "bn_images"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"rank.{name} = {count} is too few. Allowed: 1 or more.")
        if self.archs != "all" and (isinstance(self.archs, str) or self.archs < 3):
            raise ValueError(f"rank.archs = {self.archs!r}. Allowed: 3 or more, or all.")


UNRANKED = Rank()
