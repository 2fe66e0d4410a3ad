"""Architectures that tests of nas rank use, and tables of them."""
from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search_spaces.resnet import CifarResNet

NET = CifarResNet(14, "tied", [4, 6, 8])
ARCHS = [NET.sample(random.Random(seed)) for seed in range(12)]
TEXTS = [NET.text(arch) for arch in ARCHS]
QUICK = ("--images", "48", "--bn-images", "32")


def save(name: str, columns: Mapping[str, Sequence[Any]]) -> str:
    """A CSV file in the current folder."""
    with open(name, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*columns.values()))
    return name


def rows(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
