"""TAS on two processes (torchrun, gloo) equals one process whose net normalises each rank's share of a batch separately:
the same samples on every rank, gradients averaged, files written by rank 0 alone. Run as a script, it is one rank."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nas import ranks
from nas.cost import CostTable
from nas.data import Data
from nas.feed import Feed
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.ranks import Ranks
from nas.run import Run
from nas.strategies.tas import TAS
from search_spaces.resnet import CifarResNet
from search_spaces.space import Setting
from supernets.resnet import ResNet

ROOT = Path(__file__).parents[2]
STEPS, EPOCH_STEPS, SEED = 10, 5, 3
KINDS = ("tied", "tas")


class Shares(ResNet):
    """One process in place of two: each half of a batch meets its own batch statistics."""

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        return torch.cat([super(Shares, self).forward(half, arch, drop) for half in x.chunk(2)])


class Double(TAS):
    """With alphas in float64, as the weights."""

    def start(self, setup: Setup) -> None:
        super().start(setup)
        self.alpha.double()


class Doubled:
    """The feed in float64; remembers which images it gave out."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.seen = feed, []  # type: ignore[var-annotated]
        self.state_dict, self.load_state_dict = feed.state_dict, feed.load_state_dict

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        x, y, index = self.feed(split, size, odds)
        self.seen.append(index)
        return Batch(x.double(), y, index)


def fit(folder: Path, me: Ranks, kind: str, supernet: type[ResNet]) -> dict[str, Any]:
    """Ten steps of a run in ``folder`` over a space of ``kind``; weights, alphas, the images seen."""
    data = Data("digits", batch_size=16, augment=["crop"], valid_fraction=0.5)
    space = CifarResNet(8, kind, widths=(4, 6, 8))
    net = supernet(space, channels=1, classes=10).double()
    net.reset(torch.Generator().manual_seed(1 + me.rank))  # rank 0's are broadcast
    costs = CostTable(net, (8, 8))
    setup = Setup(net, space, costs, CrossEntropy(), None, STEPS, EPOCH_STEPS, data.count("train"))
    draw = Doubled(data.feed(SEED, "cpu", me.rank, me.world))
    run = Run(folder, {"strategy": "tas"}, ranks=me, period=3)
    try:
        strategy = Double(target="50%", alpha_lr=0.02)
        outcome = run.fit(strategy, setup, draw, seed=SEED)
    finally:
        run.close()
    return {
        "weights": torch.cat([p.detach().flatten() for p in net.parameters()]),
        "alphas": torch.cat([p.detach().flatten() for p in strategy.alpha.parameters()]),
        "seen": torch.stack(draw.seen), "step": outcome.step,
    }  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two ranks ran both kinds of space."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, str(folder)], env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process_with_two_shares(both: Path, tmp_path: Path, kind: str) -> None:
    first, second = (torch.load(both / f"{kind}-{i}.pt", weights_only=True) for i in range(2))
    for name in ("weights", "alphas"):
        assert torch.equal(first[name], second[name])
    one = fit(tmp_path / "one", Ranks(0, 1, 0, True), kind, Shares)
    assert one["step"] == first["step"] == second["step"] == STEPS
    assert torch.equal(torch.cat([first["seen"], second["seen"]], dim=1), one["seen"])  # disjoint shares of one batch
    for name in ("weights", "alphas"):
        assert first[name].dtype == torch.float64 and torch.allclose(first[name], one[name], rtol=0, atol=1e-10)
    whole = fit(tmp_path / "whole", Ranks(0, 1, 0, True), kind, ResNet)  # and the shares matter
    assert not torch.allclose(whole["weights"], one["weights"], rtol=0, atol=1e-4)

    assert f"{kind}/metrics.jsonl" in first["written"] and second["written"] == []
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    mine = {path.relative_to(both / kind) for path in (both / kind).rglob("*") if path.is_file()}
    plain = {path for path in files if not path.name.startswith("events")}
    assert plain == {path for path in mine if not path.name.startswith("events")} and plain
    metrics = [(run / "metrics.jsonl").read_text().count("\n") for run in (tmp_path / "one", both / kind)]
    assert metrics[0] == metrics[1] > 0


def child(folder: Path) -> None:
    """What each of the two processes does; what it writes inside ``folder`` is recorded as it happens."""
    written: list[str] = []

    def note(event: str, args: tuple) -> None:
        paths: list[Any] = []
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
            paths = [args[0]] if (args[2] or 0) & changes else []
        elif event in ("os.mkdir", "os.rename", "os.remove"):
            paths = [path for path in args[:2] if isinstance(path, str | bytes | os.PathLike)]
        for path in map(os.fsdecode, paths):
            if str(folder) in path:
                written.append(os.path.relpath(path, folder))

    sys.addaudithook(note)
    me = ranks.start("cpu")
    for kind in KINDS:
        written.clear()
        found = fit(folder / kind, me, kind, ResNet)
        torch.save({**found, "written": list(written)}, folder / f"{kind}-{me.rank}.pt")
    ranks.stop()


if __name__ == "__main__":
    child(Path(sys.argv[1]).resolve())
