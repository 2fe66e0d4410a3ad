"""Tiny runs with splits, for tests of trees and their resumption: NAS-Bench-201 cells of 2 channels, 32 digits to train by."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from nas import ranks
from nas.build import Built, gather
from nas.data import Data
from nas.losses import CrossEntropy
from nas.search import Found, search
from nas.splits import grow
from nas.splits.split import Split
from nas.splits.tree import Node, Tree
from nas.strategies.darts import DARTS
from search_spaces import nats
from supernets.nats import Topology

EPOCHS, EPOCH_STEPS, SEED = 3, 2, 5
DATA = Data("digits", limit=64, batch_size=16, valid_fraction=0.5)
EDGES = ["node1.from0", "node2.from1"]


class Enough(Exception):
    """What stops a run where a test wants it."""


def net() -> Topology:
    made = Topology(nats.Topology(2, 1), channels=1, classes=10)
    made.reset(torch.Generator().manual_seed(1))
    return made


def gm(at: list[int | str], inherit: str | list[str] = "all", **more: Any) -> Split:
    """By gradients, of two edges, two batches."""
    return Split(at=at, inherit=inherit, **{"choices": EDGES, "repeats": 2, **more})


def go(out: Path, split: Split | None, strategy: Any = None, pictures: bool = False, **more: Any) -> Found:
    """``pictures``: whether TensorBoard gets any; to draw them takes longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr(SummaryWriter, "add_figure", lambda *given: None)
        return search(DATA, net(), strategy or DARTS(order=1), out=out, split=split,
                      **{"epochs": EPOCHS, "seed": SEED, "device": "cpu", "gap": False, "every": 2, **more})  # fmt: skip


def built(split: Split, strategy: Any = None, epochs: int = EPOCHS, data: Any = DATA, **more: Any) -> Built:
    """What ``go`` makes of its arguments."""
    return gather(data, net(), strategy or DARTS(order=1), CrossEntropy(), epochs=epochs, seed=SEED,
                  device=torch.device("cpu"), group=ranks.Ranks(0, 1, 0, True), split=split, **more)  # fmt: skip


def tree(out: Path, split: Split, strategy: Any = None, epochs: int = EPOCHS) -> Tree:
    """The tree of the run that ``go`` left in ``out``."""
    return Tree(built(split, strategy, epochs), split, out, epochs, SEED)


def split_only(out: Path, split: Split, strategy: Any = None, **more: Any) -> Tree:
    """``go``, and the tree of a run that stopped before the first child of the first split was trained."""
    work = grow._work

    def until(tree: Tree, node: Node, *rest: Any) -> str:
        if node.path:
            raise Enough
        return work(tree, node, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(grow, "_work", until)
        go(out, split, strategy, **more)
    return tree(out, split, strategy)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a resumed run must have in common with one that nobody touched: of every node the checkpoints (but for what is
    left of measuring), metrics, the architecture and the split; the report."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("last.pt", "previous.pt"):
            found[name] = torch.load(path, weights_only=True)
        elif path.name in ("metrics.jsonl", "config.yaml", "report.md", "pareto.csv"):
            found[name] = path.read_text().replace(str(folder), "RUN")
        elif path.suffix == ".json" and path.name != "env.json":
            said = json.loads(path.read_text())
            said.pop("seconds", None)
            found[name] = said
    return found


def same(a: Any, b: Any, name: str = "") -> list[str]:
    """The paths at which ``a`` and ``b`` differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        odd = [f"{name}/{key}" for key in sorted(a.keys() ^ b.keys(), key=str)]
        return odd + [path for key in a.keys() & b.keys() for path in same(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [path for i, (x, y) in enumerate(zip(a, b)) for path in same(x, y, f"{name}/{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if type(a) is type(b) and a == b else [name]


def breaking(call: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """``call``, but for the time of which ``when`` says so: then nothing is done but to raise ``Enough``."""

    def broken(*given: Any, **named: Any) -> Any:
        if when(*given, **named):
            raise Enough
        return call(*given, **named)

    return broken
