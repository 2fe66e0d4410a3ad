"""What a searcher picks under: the recipe's section ``select``.

    select: {macs_at_most: 40%, params_at_most: 3M, evaluations: 1000}
"""
from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from nas.budget import read_amount
from nas.cost import PRICES, CostTable, params
from nas.latency import read_latency
from search_spaces.space import SearchSpace

Amount = str | float | None
"""A share of the largest network ("40%"), a number in the price's unit (12000000, "12M", "0.3G"), or no limit."""
UNSET = {"at_most": math.inf, "at_least": 0.0}


@dataclass
class Select:
    """Limits that the pick meets, and how many subnets are scored for it.

    ``*_at_most``, ``*_at_least``: MACs and parameters of the plain network for one image, at its own resolution where that is a
    choice; ``latency``: the path of a latency table (.csv, ``nas latency``), in whose milliseconds ``latency_*`` are.
    ``evaluations``: at most so many subnets are scored (null: until the searcher ends), each on ``images`` of the select split
    (null: all) after ``bn_images`` training images recalibrated its batch norms.
    """

    macs_at_most: Amount = None
    macs_at_least: Amount = None
    params_at_most: Amount = None
    params_at_least: Amount = None
    latency: str | None = None
    latency_at_most: Amount = None
    latency_at_least: Amount = None
    evaluations: int | None = 1000
    images: int | None = None
    bn_images: int = 2000

    def __post_init__(self) -> None:
        for name, amount in self.given().items():
            number, _ = read_amount(amount, f"select.{name}")
            if not number >= 0:
                raise ValueError(f"select.{name} = {amount} limits nothing. Allowed: 0 or more.")
            if name.startswith("latency") and self.latency is None:
                raise ValueError(f"select.{name} = {amount}: by which table? Give select.latency = TABLE.csv (nas latency).")
        for name in ("evaluations", "images", "bn_images"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"select.{name} = {count} is too few. Allowed: 1 or more.")

    def given(self) -> dict[str, str | float]:
        """The limits that are set, by name: macs_at_most -> "40%"."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: amount for name, amount in pairs if "_at_" in name and amount is not None}

    def named(self) -> str:
        """The limits as a file name of every system: macs_at_most-40pct__params_at_most-3M; "best" where there is none."""
        given = {name: str(amount).strip().replace("%", "pct") for name, amount in self.given().items()}
        if self.latency is not None and any(name.startswith("latency") for name in given):
            given["by"] = Path(self.latency).stem
        words = "__".join(f"{name}-{amount}" for name, amount in given.items())
        return re.sub(r"[^A-Za-z0-9._-]", "_", words).rstrip(".") or "best"

    def tables(self, costs: CostTable) -> dict[str, CostTable]:
        """Price -> cost table: macs and params, latency_ms where a latency table is named. ValueError for its bad rows."""
        found = {"macs": costs, "params": costs.priced(params)}
        return found if self.latency is None else {**found, "latency_ms": costs.priced(read_latency(self.latency))}

    def limits(self, tables: dict[str, CostTable], space: SearchSpace) -> list[tuple[str, float, float]]:
        """(price, low, high) of every price that is limited; shares are of the largest network of the root space. MACs and
        parameters are whole: the most and the least of them that the amounts allow."""
        ends: dict[str, dict[str, float]] = {}
        for name, amount in self.given().items():
            price, side = name.split("_", 1)
            price = "latency_ms" if price == "latency" else price
            number, share = read_amount(amount, f"select.{name}")
            whole = float(tables[price].of(space.root.largest())) if share else 1.0
            value = float(f"{number * whole:.15g}")  # 0.29 * 100 is 29, not 28.999999999999996
            if price in PRICES and value < math.inf:
                value = math.floor(value) if side == "at_most" else math.ceil(value)
            ends.setdefault(price, dict(UNSET))[side] = value
        return [(price, end["at_least"], end["at_most"]) for price, end in ends.items()]
