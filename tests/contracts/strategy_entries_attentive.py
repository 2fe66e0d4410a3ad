"""Sandwiches whose children are attended to, or taught by the alpha-divergence: AttentiveNAS and AlphaNet."""
from __future__ import annotations

from typing import Any

from strategy_entry import ALONE, Entry

from nas.strategies.alphanet import AlphaNet
from nas.strategies.attentive import Attentive


def attentive(name: str, kind: str, slow: bool = False, **given: Any) -> Entry:
    return Entry(f"attentive{name}-{kind}", lambda: Attentive(bin_width="5%", samples=1000, **given), kind, ALONE,
                 runs="sandwich", asks=("train",), slow=slow)  # fmt: skip


def alphanet(name: str, kind: str, slow: bool = False, **given: Any) -> Entry:
    return Entry(f"alphanet{name}-{kind}", lambda: AlphaNet(**given), kind, ALONE, runs="sandwich", asks=("train",), slow=slow)


ENTRIES = [
    attentive("", "attentive"), attentive("-worst", "mobile-sized", pick="worst", candidates=2, slow=True),
    attentive("-mean", "tied", candidates=1, combine="mean", slow=True),
    alphanet("", "attentive", slow=True), alphanet("-mean", "mobile", combine="mean", alphas=(0.0, 2.0), slow=True),
    alphanet("", "tied", children=3, slow=True),
]  # fmt: skip
