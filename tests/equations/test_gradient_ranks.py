"""Second-order DARTS, RARTS and GDAS on two processes (torchrun, gloo) equal one process on the whole batches, whose net
normalises each rank's share separately: gradients of the look-ahead, of both copies and of the alphas are averaged, samples
are the same on every rank. Run as a script, it is one rank."""
from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import ALONE, assert_one, child, fit, of_both, on_two_ranks
from torch import Tensor

from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.protocols import Setup
from nas.ranks import Ranks
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


def fit_named(folder: Path, me: Ranks, name: str, shared: bool = False) -> dict[str, Any]:
    return fit(folder, me, STRATEGIES[name](), *searched(name), shared)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two ranks ran all strategies."""
    return on_two_ranks(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_are_one_process_on_the_whole_batch(both: Path, tmp_path: Path, name: str) -> None:
    first, second = of_both(both, name)
    one = fit_named(tmp_path / "one", ALONE, name, shared=True)
    assert_one(first, second, one)
    assert first["valid"] == second["valid"] == pytest.approx(one["valid"])
    assert bool(len(first["alphas"])) == (name not in NO_ALPHAS)
    assert len(first["copies"]) == (len(first["weights"]) if name in COPIES else 0)
    whole = fit_named(tmp_path / "whole", ALONE, name)  # and the shares matter
    assert torch.allclose(whole["weights"], one["weights"], rtol=0, atol=1e-4) == (name in WITHOUT_NORMS)


if __name__ == "__main__":
    child(STRATEGIES, fit_named, Path(sys.argv[1]).resolve())
