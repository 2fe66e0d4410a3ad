"""What drawing by importance refuses before a folder is made."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nas.data import Data, from_loaders
from nas.importance import Importance
from nas.search import search
from nas.strategies.fairnas import FairNAS
from nas.strategies.pada import PADA
from search_spaces.nats import Topology
from supernets.nats import Topology as Net


def loaders() -> Any:
    part = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
    return from_loaders(train=DataLoader(part, 10, drop_last=True), valid=DataLoader(part, 10, drop_last=True))


@pytest.mark.parametrize(("data", "strategy", "words"), [
    (loaders, PADA(), "your own loaders"), (loaders, FairNAS(images=Importance()), "images: null"),
    (lambda: Data("digits", batch_size=64, valid_fraction=0.2, subset=0.1), PADA(), "carry: true"),
])  # fmt: skip
def test_what_would_fail_after_an_epoch_is_refused_before(data: Any, strategy: Any, words: str, tmp_path: Path) -> None:
    net = Net(Topology(C=4, N=1), channels=1, classes=10)
    with pytest.raises(ValueError, match=words):
        search(data(), net, strategy, epochs=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("data", "strategy"), [
    (loaders, PADA(data=False)), (lambda: Data("digits", batch_size=64, valid_fraction=0.2, subset=0.1), PADA(carry=True)),
])  # fmt: skip
def test_what_can_be_drawn_is_trained(data: Any, strategy: Any, tmp_path: Path) -> None:
    net = Net(Topology(C=4, N=1), channels=1, classes=10)
    found = search(data(), net, strategy, epochs=2, out=tmp_path / "run")
    assert (found.folder / "arch.json").is_file()
