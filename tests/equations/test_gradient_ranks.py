"""Second-order DARTS, RARTS and GDAS on two processes (torchrun, gloo) equal one process on the whole batches, whose net
normalises each rank's share separately: gradients of the look-ahead, of both copies and of the alphas are averaged, samples
are the same on every rank. Run as a script, it is one rank."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nas import ranks
from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.cost import CostTable
from nas.data import Data
from nas.feed import Feed
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.ranks import Ranks
from nas.run import Run
from nas.strategies.darts import DARTS
from nas.strategies.drnas import DrNAS
from nas.strategies.gdas import GDAS
from nas.strategies.proxyless import Proxyless
from nas.strategies.random import Random
from nas.strategies.rarts import RARTS
from nas.strategies.rsps import RSPS
from nas.strategies.snas import SNAS
from nas.strategies.tangle import Tangle
from search_spaces.macro import ConvMacro as Macro
from search_spaces.nats import Topology as Cells
from search_spaces.preresnet import PreResNet as Scaled
from search_spaces.space import SearchSpace, Setting
from supernets.layers import Layer
from supernets.macro import ConvMacro
from supernets.nats import Topology
from supernets.preresnet import PreResNet

ROOT = Path(__file__).parents[2]
STEPS, EPOCH_STEPS, SEED = 8, 4, 3
WEIGHTS = Weights(lr=0.1, lr_min=0.02, clip=1.0)
SETTINGS: dict[str, Any] = {"weights": WEIGHTS, "alphas": Alphas(lr=0.05)}


def doubled(strategy: type[Any]) -> Any:
    """The same with alphas in float64, as the weights."""

    class Double(strategy):  # type: ignore[misc]
        def start(self, setup: Setup) -> None:
            super().start(setup)
            self.alpha.double()

    return Double


STRATEGIES: dict[str, Callable[[], Any]] = {
    "darts": lambda: doubled(DARTS)(budget=Budget("40%"), **SETTINGS),
    "first": lambda: doubled(DARTS)(order=1, **SETTINGS), "snas": lambda: doubled(SNAS)(**SETTINGS),
    "rarts": lambda: doubled(RARTS)(lam=2.0, beta=3.0, **SETTINGS),
    "jacobi": lambda: doubled(RARTS)(mode="jacobi", **SETTINGS), "gdas": lambda: doubled(GDAS)(**SETTINGS),
    "drnas": lambda: doubled(DrNAS)(budget=Budget("40%"), **SETTINGS), "tangle": lambda: doubled(Tangle)(**SETTINGS),
    "sparsemax": lambda: doubled(Tangle)("sparsemax", **SETTINGS), "gumbel": lambda: doubled(Tangle)("gumbel", **SETTINGS),
    "macro": lambda: doubled(Tangle)(budget=Budget("60%"), **SETTINGS),
    "proxyless": lambda: doubled(Proxyless)(every=2, budget=Budget("40%"), **SETTINGS),
    "proxyless-two": lambda: doubled(Proxyless)("two", every=2, **SETTINGS),
    "scales": lambda: doubled(RARTS)(kind="scales", l1=1e-2, keep=0.5, beta=3.0, weights=WEIGHTS, alphas=Alphas(lr=0.05)),
    "rsps": lambda: RSPS(archs=10, batches=2, weights=WEIGHTS), "random": lambda: Random(trials=3, judge=2, weights=WEIGHTS),
}  # fmt: skip
NO_ALPHAS = ("rsps", "random")
WITHOUT_NORMS = ("macro",)
COPIES = ("rarts", "jacobi", "scales")


class Enlarged(ConvMacro):
    """Reads the digits at 12 x 12 pixels, the least that its network can."""

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        return super().forward(torch.nn.functional.interpolate(x, (12, 12)), arch, drop)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return super().layers((12, 12), view)


def searched(name: str) -> tuple[SearchSpace, type[Any]]:
    """What the strategy of this name searches: cells, superposed sizes, or the channels of a pre-activation ResNet."""
    if name == "macro":
        return Macro(((2, 3, 4),) * 4, (3, 5), features=4, hidden=(4,), image=12), Enlarged
    return (Scaled(11, widths=(2, 3, 4)), PreResNet) if name == "scales" else (Cells(4, 1), Topology)


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


def fit(folder: Path, me: Ranks, name: str, shared: bool = False) -> dict[str, Any]:
    """Eight steps of a run in ``folder``: weights, copies, alphas, the images seen, what is derived."""
    data = Data("digits", batch_size=16, augment=["crop"], valid_fraction=0.5)
    space, supernet = searched(name)
    net = (shares(supernet) if shared else supernet)(space, channels=1, classes=10).double()
    net.reset(torch.Generator().manual_seed(1 + me.rank))  # rank 0's are broadcast
    setup = Setup(net, space, CostTable(net, (8, 8)), CrossEntropy(), None, STEPS, EPOCH_STEPS, data.count("train"))
    draw = Doubled(data.feed(SEED, "cpu", me.rank, me.world))
    strategy, run = STRATEGIES[name](), Run(folder, {"strategy": name}, ranks=me, period=3)
    try:
        outcome = run.fit(strategy, setup, draw, seed=SEED)
    finally:
        run.close()
    assert outcome.step == STEPS
    copies = [strategy.twin] if isinstance(strategy, RARTS) else []
    return {
        "weights": flat(net), "copies": torch.cat([torch.zeros(0).double(), *map(flat, copies)]),
        "alphas": torch.zeros(0).double() if name in NO_ALPHAS else flat(strategy.alpha),
        "winner": flat(strategy.network(strategy.architecture())), "seen": torch.stack(draw.seen),
        "architecture": strategy.architecture(), "valid": [score["top1"] for score in getattr(strategy, "scores", [])],
    }  # fmt: skip


def flat(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two ranks ran all strategies."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, str(folder)], env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_are_one_process_on_the_whole_batch(both: Path, tmp_path: Path, name: str) -> None:
    first, second = (torch.load(both / f"{name}-{i}.pt", weights_only=True) for i in range(2))
    one = fit(tmp_path / "one", Ranks(0, 1, 0, True), name, shared=True)
    for part in ("weights", "copies", "alphas", "winner"):
        assert torch.equal(first[part], second[part])
        assert first[part].dtype == torch.float64 and torch.allclose(first[part], one[part], rtol=0, atol=1e-10)
    assert torch.equal(torch.cat([first["seen"], second["seen"]], dim=1), one["seen"])  # disjoint shares of one batch
    assert first["architecture"] == second["architecture"] == one["architecture"]
    assert first["valid"] == second["valid"] == pytest.approx(one["valid"])
    assert bool(len(first["alphas"])) == (name not in NO_ALPHAS)
    assert len(first["copies"]) == (len(first["weights"]) if name in COPIES else 0)
    whole = fit(tmp_path / "whole", Ranks(0, 1, 0, True), name)  # and the shares matter
    assert torch.allclose(whole["weights"], one["weights"], rtol=0, atol=1e-4) == (name in WITHOUT_NORMS)


def child(folder: Path) -> None:
    """What each of the two processes does."""
    me = ranks.start("cpu")
    for name in STRATEGIES:
        torch.save(fit(folder / name, me, name), folder / f"{name}-{me.rank}.pt")
    ranks.stop()


if __name__ == "__main__":
    child(Path(sys.argv[1]).resolve())
