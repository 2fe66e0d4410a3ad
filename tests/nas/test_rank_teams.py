"""Several runs side by side: ranks in teams, whose collectives stay among themselves; a tree of supernets on two ranks."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split_runs import DATA, EPOCHS, SEED, gm, net, outcome, same
from test_split_measuring import trained
from torch import Tensor, nn

from nas import ranks
from nas.protocols import Batch
from nas.search import search
from nas.splits.gradients import match
from nas.splits.measure import measure
from nas.splits.split import Split
from nas.strategies.darts import DARTS
from search_spaces import nats
from supernets.nats import Topology

ROOT = Path(__file__).parents[2]
OPTIONS = (0, 1, 2)


@pytest.mark.parametrize("tasks, world, expected", [
    (1, 1, [1]), (1, 4, [4]), (2, 4, [2, 2]), (4, 4, [1] * 4), (7, 4, [1] * 4), (3, 4, [1, 1, 2]), (3, 8, [2, 3, 3]),
    (5, 8, [1, 2, 1, 2, 2]),
])  # fmt: skip
def test_sizes_of_teams(tasks: int, world: int, expected: list[int]) -> None:
    """As many as tasks, or one for each rank; all ranks are in one, none is twice as large as another."""
    assert ranks.sizes(tasks, world) == expected and sum(expected) == world


def test_children_of_a_team_are_within_it() -> None:
    """Every supernet of a level has equally many children: the teams of the next level divide its own."""
    for world in range(1, 17):
        for tasks in range(1, 9):
            for groups in (2, 3, 5):
                ends, finer = ({sum(found[: i + 1]) for i in range(len(found))}
                               for found in (ranks.sizes(tasks, world), ranks.sizes(tasks * groups, world)))  # fmt: skip
                assert ends <= finer


def test_alone_a_team_is_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with ranks.team(3) as team:
        assert team == ranks.Team(0, 1, ranks.Ranks(0, 1, 0, True)) and list(team.share(3)) == [0, 1, 2]
        assert ranks.world() == 1 and ranks.share("here") == "here"
    with pytest.raises(KeyError), ranks.team(1):
        raise KeyError


def on_ranks(n: int, part: str, folder: Path) -> list[dict[str, Any]]:
    """What ``n`` processes came to, each of which ran the function ``part`` of this file."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    done = subprocess.run([*command, __file__, part, str(folder)], env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{part}-{i}.pt", weights_only=True) for i in range(n)]


# -- collectives --------------------------------------------------------------------------------------------------------


def seen(me: int) -> dict[str, Any]:
    """What the collectives give here: of numbers that say whose they are."""
    average, broadcast = torch.tensor([1.0 + me, 10.0 * me]), torch.tensor([7 + me])
    ranks.average_([average])
    ranks.broadcast_([broadcast])
    ranks.wait()
    anywhere = ranks.anywhere([me == i for i in range(4)], ranks.device())
    return {"rank": ranks.rank(), "world": ranks.world(), "average": average.tolist(), "broadcast": broadcast.item(),
            "share": ranks.share(f"from {me}"), "anywhere": anywhere}  # fmt: skip


def collectives(folder: Path, me: ranks.Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {"before": seen(me.rank)}
    for tasks in (1, 2, 3):
        with ranks.team(tasks) as team:
            found[str(tasks)] = {**seen(me.rank), "number": team.number, "of": team.of, "main": team.ranks.main,
                                 "local": team.ranks.local_rank, "share of tasks": list(team.share(tasks))}  # fmt: skip
            assert (team.ranks.rank, team.ranks.world) == (ranks.rank(), ranks.world())
    try:
        with ranks.team(2):
            raise KeyError
    except KeyError:
        ranks.wait()
    return found | {"after": seen(me.rank)}


def whole(me: int, n: int) -> dict[str, Any]:
    return group(me, list(range(n)))


def group(me: int, of: list[int]) -> dict[str, Any]:
    """What ``seen`` gives to rank ``me`` among the ranks ``of``."""
    return {"rank": of.index(me), "world": len(of), "average": [1 + sum(of) / len(of), 10 * sum(of) / len(of)],
            "broadcast": 7 + of[0], "share": f"from {of[0]}", "anywhere": [i in of for i in range(4)]}  # fmt: skip


def teamed(me: int, of: list[int], number: int, count: int, tasks: list[int]) -> dict[str, Any]:
    return {**group(me, of), "number": number, "of": count, "main": me == of[0], "local": me, "share of tasks": tasks}


@pytest.mark.slow
def test_two_ranks_in_teams(tmp_path: Path) -> None:
    for me, found in enumerate(on_ranks(2, "collectives", tmp_path)):
        assert found["before"] == found["after"] == whole(me, 2)
        assert found["1"] == teamed(me, [0, 1], 0, 1, [0])
        assert found["2"] == teamed(me, [me], me, 2, [me])
        assert found["3"] == teamed(me, [me], me, 2, [[0, 2], [1]][me])


@pytest.mark.slow
def test_four_ranks_in_teams(tmp_path: Path) -> None:
    for me, found in enumerate(on_ranks(4, "collectives", tmp_path)):
        assert found["before"] == found["after"] == whole(me, 4)
        assert found["1"] == teamed(me, [0, 1, 2, 3], 0, 1, [0])
        assert found["2"] == teamed(me, [[0, 1], [2, 3]][me // 2], me // 2, 2, [me // 2])
        assert found["3"] == teamed(me, [2, 3] if me > 1 else [me], min(me, 2), 3, [min(me, 2)])


# -- gradients ----------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Three ways from one layer to the next, without norms: a mean over a batch is one over its halves."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(5, 4, generator=draws, dtype=torch.float64))
        self.last = nn.Parameter(torch.randn(4, 3, generator=draws, dtype=torch.float64))

    def forward(self, x: Tensor, arch: Mapping[str, Any]) -> Tensor:
        z = x @ self.first
        return (z, z.tanh(), z * z)[arch["way"]] @ self.last


def compared(rank: int = 0, world: int = 1) -> np.ndarray:
    """D of the three ways, over this rank's share of eight images."""
    net, draws = Toy(), torch.Generator().manual_seed(4)
    x, y = torch.randn(8, 5, generator=draws, dtype=torch.float64), torch.arange(8) % 3
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    batch = Batch(x[mine], y[mine], torch.arange(8)[mine])
    return match(net, nn.functional.cross_entropy, batch, lambda way: {"way": way}, OPTIONS, list(net.parameters()))


def gradients(folder: Path, me: ranks.Ranks) -> dict[str, Any]:
    """Of all ranks together, and of each for itself; then what a whole node measures."""
    found = {"all": torch.from_numpy(compared(me.rank, me.world))}
    with ranks.team(2):
        found["alone"] = torch.from_numpy(compared(me.rank, me.world))
    split = gm([1])
    node = trained(split)
    node.ranks = me
    measured = measure(node, split, 0, folder, SEED, 2, lambda: None)
    assert not isinstance(measured, str)
    return found | {"sums": measured.sums}


@pytest.mark.slow
def test_gradients_are_averaged_before_they_are_compared(tmp_path: Path) -> None:
    first, second = on_ranks(2, "gradients", tmp_path)
    one = compared()
    assert torch.equal(first["all"], second["all"]) and np.allclose(first["all"], one, rtol=0, atol=1e-13)
    assert np.abs(one - np.diag(np.diag(one))).max() > 0.1
    for half, found in ((0, first), (1, second)):
        assert np.array_equal(found["alone"], compared(half, 2)) and not np.allclose(found["alone"], one, rtol=0, atol=1e-3)
    assert first["sums"].keys() == second["sums"].keys() and len(first["sums"]) == 2
    saved = torch.load(tmp_path / "split.pt", weights_only=True)
    for name, sums in first["sums"].items():
        assert torch.equal(sums, second["sums"][name]) and torch.equal(sums, saved["sums"][name]) and sums.max() > 0.1
    assert saved["repeats"] == 2 and saved["feed"] == {"train": 2}


# -- a tree -------------------------------------------------------------------------------------------------------------


def grown(out: Path) -> dict[str, Any]:
    """A run whose root is not trained, and whose two leaves take its weights."""
    space = nats.Topology(2, 1).restrict({"node2.from0": nats.OPS[1:3]})
    made = Topology(space, channels=1, classes=10)
    made.load_state_dict({key: value for key, value in net().state_dict().items() if key in made.state_dict()})
    split = Split(by="exhaustive", at=[0], choices=["node2.from0"], inherit="weights")
    search(DATA, made, DARTS(order=1), epochs=EPOCHS, seed=SEED, out=out, device="cpu", gap=False, every=2, split=split)
    return outcome(out)


def side_by_side(folder: Path, me: ranks.Ranks) -> dict[str, Any]:
    return {"ended": grown(folder / "run")["arch.json"]["arch"]}


@pytest.mark.slow
def test_leaves_side_by_side_are_those_of_one_process(tmp_path: Path) -> None:
    first, second = on_ranks(2, "side_by_side", tmp_path)
    one = grown(tmp_path / "alone" / "run")
    assert first == second and same(outcome(tmp_path / "run"), one) == []
    assert {f"nodes/{i}/checkpoints/last.pt" for i in (0, 1)} < one.keys()
    weights = [one[f"nodes/{i}/checkpoints/last.pt"]["strategy"]["setup"]["net"] for i in (0, 1)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


if __name__ == "__main__":
    me = ranks.start("cpu")
    part, place = sys.argv[1], Path(sys.argv[2])
    torch.save({"collectives": collectives, "gradients": gradients, "side_by_side": side_by_side}[part](place, me),
               place / f"{part}-{me.rank}.pt")  # fmt: skip
    ranks.stop()
