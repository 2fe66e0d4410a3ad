"""The balanced mixture of supernets, over cells, widths and depths, and placements of poolings."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from strategy_entry import Entry

from nas.strategies.mixture import Mixture, published

MODELS = {"w": "models"}
ASKS = ("train", "valid")


def mixture(id: str, kind: str, choices: Sequence[str], make: Callable[..., Mixture] = Mixture, slow: bool = False) -> Entry:
    made = partial(make, models=2, choices=choices)
    return Entry(f"mixture-{id}{kind}", made, kind, MODELS, runs="path", asks=ASKS, slow=slow)


def two_batches(**given: object) -> Mixture:
    return Mixture(weights=replace(published(), accumulate=2), **given)  # type: ignore[arg-type]


ENTRIES = [
    mixture("", "pooling", ["*"]), mixture("", "cells", ["node[12].*"]), mixture("", "tied", ["stage*.depth"]),
    mixture("two-batches-", "pooling", ["*"], two_batches, slow=True)._replace(asks=("train", "train", "valid")),
]
