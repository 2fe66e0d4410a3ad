"""A short run of any strategy on one process or on two ranks (torchrun, gloo), for tests that compare the two."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas import ranks
from nas.cost import CostTable
from nas.data import Data
from nas.feed import Feed
from nas.importance import importances
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.ranks import Ranks
from nas.run import Run
from search_spaces.space import SearchSpace, Setting

ROOT = Path(__file__).parents[2]
STEPS, EPOCH_STEPS, SEED = 8, 4, 3
ALONE = Ranks(0, 1, 0, True)


def shares(supernet: type[Any]) -> type[Any]:
    """One process in place of two: each half of a batch meets its own batch statistics."""

    class Shares(supernet):  # type: ignore[misc]
        def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
            return torch.cat([super(Shares, self).forward(half, arch, drop) for half in x.chunk(2)])

    return Shares


class Doubled:
    """The feed in float64; remembers which images it gave out."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.seen = feed, []  # type: ignore[var-annotated]
        self.state_dict, self.load_state_dict = feed.state_dict, feed.load_state_dict

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        x, y, index = self.feed(split, size, odds)
        self.seen.append(index)
        return Batch(x.double(), y, index)


def fit(
    folder: Path, me: Ranks, strategy: Any, space: SearchSpace, supernet: type[Any], shared: bool = False,
    epoch_steps: int = EPOCH_STEPS,
) -> dict[str, Any]:  # fmt: skip
    """Eight steps of a run in ``folder``: weights, copies, alphas, the images seen, what they and paths are drawn by, what is
    derived."""
    data = Data("digits", batch_size=16, augment=["crop"], valid_fraction=0.5)
    net = (shares(supernet) if shared else supernet)(space, channels=1, classes=10).double()
    net.reset(torch.Generator().manual_seed(1 + me.rank))  # rank 0's are broadcast
    setup = Setup(net, space, CostTable(net, (8, 8)), CrossEntropy(), None, STEPS, epoch_steps, data.count("train"))
    draw = Doubled(data.feed(SEED, "cpu", me.rank, me.world))
    run = Run(folder, {"strategy": folder.name}, ranks=me, period=3)
    try:
        outcome = run.fit(strategy, setup, draw, seed=SEED)
    finally:
        run.close()
    assert outcome.step == STEPS
    paths, images = importances(strategy)
    drawn = [torch.tensor(row) for row in paths.p.values()] if paths is not None else []
    drawn += [images.odds, images.scores] if images is not None and images.odds is not None else []
    copies = [strategy.twin] if hasattr(strategy, "twin") else []
    return {
        "weights": flat(net), "copies": torch.cat([torch.zeros(0).double(), *map(flat, copies)]),
        "alphas": flat(strategy.alpha) if hasattr(strategy, "alpha") else torch.zeros(0).double(),
        "drawn": torch.cat([torch.zeros(0).double(), *(row.double() for row in drawn)]),
        "winner": flat(strategy.network(strategy.architecture())), "seen": torch.stack(draw.seen),
        "architecture": strategy.architecture(), "valid": [score["top1"] for score in getattr(strategy, "scores", [])],
    }  # fmt: skip


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def on_two_ranks(script: str, folder: Path) -> Path:
    """``folder``, where two processes of ``script`` (each calls ``child``) left what their runs came to."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, script, str(folder)], env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def child(names: Iterable[str], fit_named: Any, folder: Path) -> None:
    """What each of the two processes does: ``fit_named(folder, ranks, name)`` of every name, saved as name-rank.pt."""
    me = ranks.start("cpu")
    for name in names:
        torch.save(fit_named(folder / name, me, name), folder / f"{name}-{me.rank}.pt")
    ranks.stop()


def of_both(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both ranks came to."""
    first, second = (torch.load(folder / f"{name}-{i}.pt", weights_only=True) for i in range(2))
    return first, second


def assert_one(first: dict[str, Any], second: dict[str, Any], one: dict[str, Any]) -> None:
    """Both ranks agree to the last bit, and with one process on whole batches (disjoint shares of them)."""
    for part in ("weights", "copies", "alphas", "winner", "drawn"):
        assert torch.equal(first[part], second[part])
        assert first[part].dtype == torch.float64 and torch.allclose(first[part], one[part], rtol=0, atol=1e-10)
    assert torch.equal(torch.cat([first["seen"], second["seen"]], dim=1), one["seen"])
    assert first["architecture"] == second["architecture"] == one["architecture"]
