"""Mixture on two processes (torchrun, gloo) equals one process on the whole batches, whose nets normalise each rank's share
separately: gradients and rewards are averaged, what is drawn is the same on every rank. Run as a script, it is one rank."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import ALONE, child, fit, flat, of_both, on_two_ranks

from nas.bilevel import Weights
from nas.ranks import Ranks
from nas.strategies.mixture import Mixture
from search_spaces.pooling import PoolingResNet as Space
from supernets.pooling import PoolingResNet


def fit_named(folder: Path, me: Ranks, name: str, shared: bool = False) -> dict[str, Any]:
    strategy = Mixture(2, (1.0, 40.0), weights=Weights(lr=0.1, lr_min=0.02, clip=1.0))
    told = fit(folder, me, strategy, Space((2, 1, 1), 2, (4, 6, 8)), PoolingResNet, shared)
    W = torch.tensor(list(strategy.rewards.values()), dtype=torch.float64)
    return {**told, "copies": flat(strategy.copies[0]), "table": W, "rows": list(strategy.rewards)}


@pytest.mark.slow
def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    """To the last bit between the ranks; W to the precision of an accuracy (float32) with one process."""
    first, second = of_both(on_two_ranks(__file__, tmp_path), "mixture")
    one = fit_named(tmp_path / "one", ALONE, "mixture", shared=True)
    for part, within in (("weights", 1e-10), ("copies", 1e-10), ("winner", 1e-10), ("table", 1e-6)):
        assert torch.equal(first[part], second[part]) and torch.allclose(first[part], one[part], rtol=0, atol=within)
    assert torch.equal(torch.cat([first["seen"], second["seen"]], dim=1), one["seen"])
    assert first["rows"] == second["rows"] == one["rows"] and bool((first["table"] < 1).any(0).all())
    assert not torch.equal(first["weights"], first["copies"])


if __name__ == "__main__":
    child(["mixture"], fit_named, Path(sys.argv[1]))
