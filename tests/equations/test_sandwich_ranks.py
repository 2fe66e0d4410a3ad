"""Strategies that train several children a step, and those that train sampled paths, on two processes (torchrun, gloo) equal
one process on the whole batches, whose net normalises each rank's share separately: every rank draws the same children, and the
sum of their gradients is averaged once. Run as a script, it is one rank. Dropout is off: each rank has its own noise.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rank_runs import ALONE, EPOCH_STEPS, assert_one, child, fit, of_both, on_two_ranks

from nas.bilevel import Weights
from nas.ranks import Ranks
from nas.strategies.alphanet import AlphaNet
from nas.strategies.attentive import Attentive
from nas.strategies.bignas import BigNAS
from nas.strategies.deps import DepS
from nas.strategies.fairnas import FairNAS
from nas.strategies.ofa import OFA, Phase
from nas.strategies.pada import PADA
from nas.strategies.spos import SPOS
from search_spaces.bignas import AttentiveNAS as Stagewise
from search_spaces.mobilenet import OFAMobileNetV3 as Mobile
from search_spaces.nats import Topology as Cells
from search_spaces.space import SearchSpace
from supernets.bignas import AttentiveNAS
from supernets.mobilenet import OFAMobileNetV3
from supernets.nats import Topology

WEIGHTS = Weights(lr=0.05, lr_min=0.01, clip=1.0)
VALUES = Weights(lr=0.05, lr_min=0.01, clip=None, clip_value=0.02, norm_decay=False)


class Entry(NamedTuple):
    """A strategy, the space it searches, the supernet that holds it, and the steps of an epoch."""

    make: Callable[[], Any]
    space: Callable[[], SearchSpace]
    supernet: type[Any]
    epoch_steps: int = EPOCH_STEPS


def mobile() -> SearchSpace:
    return Mobile(0.1, True, (3, 5), (2, 3), (1, 2), ())


def sized() -> SearchSpace:
    return Mobile(0.1, True, (3, 5), (2, 3), (1, 2), (6, 8))


def stagewise() -> SearchSpace:
    return Stagewise(True, 0.1, ((1, 2), *((1,),) * 4, (1, 2), (1,)), (6, 8))


PHASES = [Phase("full", 2, 1.0), Phase("kernel", 2, 1.0, {"*.kernel": 2, "*.depth": 2}, nets=2),
          Phase("expand", 4, 1.0, {"*.expand": 2}, nets=3, sort=True)]  # fmt: skip

STRATEGIES = {
    "bignas": Entry(lambda: BigNAS(drop=0.0, weights=WEIGHTS), mobile, OFAMobileNetV3),
    "bignas-sized": Entry(lambda: BigNAS(drop=0.0, combine="mean", weights=VALUES), stagewise, AttentiveNAS),
    "attentive": Entry(lambda: Attentive(bin_width="5%", samples=1000, drop=0.0, weights=VALUES), stagewise, AttentiveNAS),
    "alphanet": Entry(lambda: AlphaNet(drop=0.0, weights=VALUES), mobile, OFAMobileNetV3),
    "deps": Entry(lambda: DepS(1, 1, drop=0.0, protect=None, weights=VALUES), mobile, OFAMobileNetV3),
    "ofa": Entry(lambda: OFA(PHASES, drop=0.0, weights=VALUES), sized, OFAMobileNetV3),
    "spos": Entry(lambda: SPOS(WEIGHTS), mobile, OFAMobileNetV3),
    "fairnas": Entry(lambda: FairNAS(weights=WEIGHTS), lambda: Cells(4, 1), Topology),
    "pada": Entry(lambda: PADA(weights=WEIGHTS), lambda: Cells(4, 1), Topology, 2),
}


def fit_named(folder: Path, me: Ranks, name: str, shared: bool = False) -> dict[str, Any]:
    entry = STRATEGIES[name]
    return fit(folder, me, entry.make(), entry.space(), entry.supernet, shared, entry.epoch_steps)


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
    whole = fit_named(tmp_path / "whole", ALONE, name)  # and the shares matter
    assert not torch.allclose(whole["weights"], one["weights"], rtol=0, atol=1e-4)


if __name__ == "__main__":
    child(STRATEGIES, fit_named, Path(sys.argv[1]).resolve())
