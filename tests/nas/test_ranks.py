"""One process without torchrun; two by torchrun on gloo, whose averaged step equals one process on the whole batch."""
from __future__ import annotations

import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.optim import SGD

from nas import ranks
from nas.descent import Descent

ROOT = Path(__file__).parents[2]
X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25], [2.0, 2.0]], dtype=torch.float64)


def steps(x: torch.Tensor, late: bool) -> torch.Tensor:
    """Four descents of mean((x.p)^2) and, where ``late`` holds, of a parameter that only some ranks use."""
    p = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    q = Parameter(torch.tensor([3.0], dtype=torch.float64))
    r = Parameter(torch.tensor([5.0], dtype=torch.float64))  # nobody uses it
    w = Descent([p, q, r], partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1), clip=1.0)
    for _ in range(4):
        loss = ((x @ p) ** 2).mean()
        with w.ahead(loss):
            direction = w.grad(((x @ p) ** 2).mean())
        with w.shifted(direction, 0.1):
            loss = ((x @ p) ** 2).mean() + (2.0 * q.sum() if late else 0.0)
            w.add(loss)
        w.step()
    return torch.cat([p, q, r]).detach()


def one_process() -> torch.Tensor:
    """The same by hand: only half of the ranks use q, so its mean gradient is 1 where theirs is 2."""
    p = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    q = Parameter(torch.tensor([3.0], dtype=torch.float64))
    w = Descent([p, q], partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.1), clip=1.0)
    for _ in range(4):
        with w.ahead(((X @ p) ** 2).mean()):
            direction = w.grad(((X @ p) ** 2).mean())
        with w.shifted(direction, 0.1):
            w.add(((X @ p) ** 2).mean() + 1.0 * q.sum())
        w.step()
    return torch.cat([p, q, torch.tensor([5.0], dtype=torch.float64)]).detach()


def test_alone_nothing_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.start("cpu") == ranks.Ranks(0, 1, 0, True)
    assert not ranks.active() and (ranks.rank(), ranks.world()) == (0, 1)
    t = torch.tensor([1.0, 2.0])
    ranks.average_([t])
    ranks.broadcast_([t])
    assert t.tolist() == [1.0, 2.0] and ranks.share("here") == "here"
    assert ranks.anywhere([True, False], ranks.device()) == [True, False]
    ranks.stop()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK set but not WORLD_SIZE, LOCAL_RANK"):
        ranks.start("cpu")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], env=env, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert torch.equal(first["params"], second["params"])
    assert torch.allclose(first["params"], one_process(), rtol=0, atol=1e-14)
    assert first["params"][3].item() == 5.0  # without a gradient anywhere: not even weight decay
    for i, found in enumerate((first, second)):
        assert found["average"].tolist() == [[0.0, 10.0], [20.0, 30.0]] and found["other"].tolist() == [3.5]
        assert found["broadcast"].tolist() == [7.0] and found["counts"].tolist() == [70]
        assert found["text"] == "from 0" and found["anywhere"] == [True, True, False] and found["rank"] == i
        assert (tmp_path / f"{i}.left").read_text() == "nothing"
        assert found["reasons"] == [*[None] * 9, "terminated"]


def child(folder: Path) -> None:
    """What each of the two processes does."""
    from nas.engine import Stop

    me = ranks.start("cpu")
    group = weakref.ref(dist.group.WORLD)
    average = torch.tensor([[0.0, 20.0], [40.0, 60.0]]).T.contiguous().T * me.rank  # a transposed layout
    other = torch.tensor([3.0 + me.rank], dtype=torch.float64)
    ranks.average_([average, other])
    broadcast, counts = torch.tensor([7.0 + me.rank]), torch.tensor([70 + me.rank])
    ranks.broadcast_([broadcast, counts])
    stop = Stop()
    stop.reason = "terminated" if me.rank == 1 else None  # one rank's signal stops both, at the same step
    found = {
        "params": steps(X[2 * me.rank : 2 * me.rank + 2], late=me.rank == 1),
        "average": average,
        "other": other,
        "broadcast": broadcast,
        "counts": counts,
        "text": ranks.share(f"from {me.rank}"),
        "anywhere": ranks.anywhere([me.rank == 0, me.rank == 1, False], ranks.device()),
        "rank": ranks.rank(),
        "reasons": [stop() for _ in range(10)],
    }
    torch.save(found, folder / f"{me.rank}.pt")
    ranks.stop()
    (folder / f"{me.rank}.left").write_text("nothing" if group() is None else "the group, and its threads")


if __name__ == "__main__":
    child(Path(sys.argv[1]))
