"""The section ``select``: file names of its limits, and limits of MACs and parameters in whole numbers."""
from __future__ import annotations

import math
import re
from typing import Any

import pytest

from nas.cost import CostTable
from nas.limits import Select
from nas.searchers.evolution import Evolution
from search_spaces.resnet import CifarResNet
from supernets.resnet import ResNet

SPACE = CifarResNet(14, widths=[2, 3, 4])
COSTS = CostTable(ResNet(SPACE, 1, 10), (8, 8))


@pytest.mark.parametrize("given, name", [
    ({}, "best"), ({"latency": "t.csv"}, "best"),
    ({"macs_at_most": "12M", "macs_at_least": 7, "params_at_most": " 0.5k", "params_at_least": "10%"},
     "macs_at_most-12M__macs_at_least-7__params_at_most-0.5k__params_at_least-10pct"),
    ({"macs_at_most": "1%", "latency": "a/b é:1.csv", "latency_at_most": "+2e-1"},
     "macs_at_most-1pct__latency_at_most-_2e-1__by-b___1"),
    ({"macs_at_most": "3."}, "macs_at_most-3"),
])  # fmt: skip
def test_names_of_picks_are_file_names_everywhere(given: dict[str, Any], name: str) -> None:
    """Letters, digits, dots, dashes and underscores of ASCII."""
    assert Select(**given).named() == name and re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]", name)


class Price:
    """A cost table of which the largest network alone is asked."""

    def __init__(self, cost: float) -> None:
        self.cost = cost

    def of(self, arch: Any) -> float:
        return self.cost


@pytest.mark.parametrize("amount, whole, most, least", [
    ("40%", 537_312, 214_924, 214_925), ("50%", 10, 5, 5), ("29%", 100, 29, 29), ("33.3%", 1000, 333, 333),
    ("70%", 110, 77, 77), ("0.1k", 5, 100, 100), (7.5, 5, 7, 8), ("99.9%", 10**12 + 1, 999_000_000_000, 999_000_000_001),
])  # fmt: skip
def test_limits_of_macs_and_parameters_are_whole(amount: Any, whole: int, most: int, least: int) -> None:
    tables: Any = {price: Price(whole) for price in ("macs", "params", "latency_ms")}
    for price in ("macs", "params"):
        found = Select(**{f"{price}_at_most": amount}).limits(tables, SPACE)
        assert found == [(price, 0.0, most)] and type(found[0][2]) is int
        assert Select(**{f"{price}_at_least": amount}).limits(tables, SPACE) == [(price, least, math.inf)]
    [(_, low, high)] = Select(latency="t.csv", latency_at_most=amount).limits(tables, SPACE)
    assert low == 0.0 and 0 <= high - most < 1 and (high == most) is (most == least)


def test_refusals_speak_of_whole_macs() -> None:
    searcher, limits = Evolution(), Select(macs_at_most="1.03%")
    full = COSTS.of(SPACE.largest())
    assert not (0.0103 * full).is_integer()
    with pytest.raises(ValueError, match=f"macs at most {math.floor(0.0103 * full):,} .smallest network") as error:
        tables = limits.tables(COSTS)
        searcher.start(SPACE, tables, limits.limits(tables, SPACE))
    assert not re.search(r"\d\.\d(?!\d*%)", str(error.value))
    with pytest.raises(ValueError, match=r"limit on macs: from 12,345,678,901 to 3 allows nothing"):
        searcher.start(SPACE, tables, [("macs", 12_345_678_901, 3)])
