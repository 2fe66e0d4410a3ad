"""What coupled copies of the weights ask of a Descent: exact look-ahead, the pull of one towards another, means over ranks.

Against updates computed by hand, in float64.
"""
from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx
from test_descent import OPTIMIZERS, adam, assert_same, grad_of, momentum_sgd, param, snapshot, square
from torch.optim import SGD

from nas import ranks
from nas.descent import Descent, average
from nas.schedules import linear

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rate", [None, 0.25])
def test_ahead_is_exact_at_any_step_and_any_rate(fused: bool, rate: float | None) -> None:
    """DARTS (2): w' = w - xi (mu v + grad + wd w), xi given or the next step's rate; v is 0 before the first step. Late
    parameters have their first gradient, and their first v, in a later step."""
    p, late = param(2.0, -1.0), param(3.0)
    w = Descent([p, late], partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused), linear(1.0, 0.0, 10))
    v = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    for step in range(3):
        xi = w.rate if rate is None else rate
        expected = [q.detach() - xi * (0.9 * u + 3 * q.detach() + 0.01 * q.detach()) for q, u in zip((p, late), v)]
        before = snapshot(w)
        with w.ahead(3 * square(p) + 3 * square(late), rate):
            assert [q.tolist() for q in (p, late)] == [approx(e.tolist(), abs=1e-15) for e in expected]
        assert_same(before[0], snapshot(w)[0])
        assert_same(before[1]["optimizer"]["state"], snapshot(w)[1]["optimizer"]["state"])
        moving = [0, 1] if step == 1 else [0]
        for i in moving:
            v[i] = 0.9 * v[i] + 1.01 * (p, late)[i].detach()
        w.down(square(p) + (square(late) if step == 1 else 0.0))


def test_ahead_lends_copies_of_what_moves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    p, idle = param(2.0), param(5.0)
    w = Descent([p, idle], adam)
    w.down(square(p) + square(idle))
    lent: list[Any] = []
    move = w._move

    def watched(rate: float) -> None:
        lent.append((w.optimizer.state, {q: set(s) for q, s in w.optimizer.state.items()}))
        move(rate)

    monkeypatch.setattr(w, "_move", watched)
    own = w.optimizer.state
    with w.ahead(square(p)):
        assert w.optimizer.state is own
    assert lent[0][0] is not own and lent[0][1] == {p: {"step", "exp_avg", "exp_avg_sq"}}
    assert not any(lent[0][0][p][key] is own[p][key] for key in own[p])


def test_pull_by_hand() -> None:
    """RARTS (2): v <- mu v + (grad + beta (p - q) + wd p); once without a gradient of the loss."""
    p, q, x, v = param(2.0), param(-1.0), 2.0, 0.0
    w = Descent([p], momentum_sgd)
    for step in range(3):
        loss_grad = x if step != 1 else 0.0
        if step != 1:
            w.add(square(p))
        w.pull([q], 0.5)
        w.step()
        v = 0.9 * v + loss_grad + 0.5 * (x + 1.0) + 0.01 * x
        x -= 0.1 * v
        assert p.item() == approx(x, abs=1e-14)
    assert q.item() == -1.0 and q.grad is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pull_is_the_gradient_of_the_coupling(optimizer: Any, accumulate: int) -> None:
    """Before or after the losses; clipped together with them; once a step that acts, whatever ``accumulate``."""
    values, others = [[0.3, -0.7], [2.0]], [[1.1, 0.2], [-0.5]]
    q = [torch.tensor(v, dtype=torch.float64) for v in others]
    ps, twins = [param(*v) for v in values], [param(*v) for v in values]
    w = Descent(ps, optimizer, clip=0.9, accumulate=accumulate)
    one = Descent(twins, optimizer, clip=0.9)
    for first in (True, False):
        for _ in range(accumulate):
            if first:
                w.pull(q, 0.7)
            w.add(square(ps[0]))  # ps[1] has no gradient but the pull's
            if not first:
                w.pull(q, 0.7)
            w.step()
        one.down(square(twins[0]) + 0.7 * sum(square(a - b) for a, b in zip(twins, q)))
        assert w.count == one.count and w.norm is not None and one.norm is not None
        assert w.norm.item() == approx(one.norm.item(), rel=1e-14) and w.norm.item() > 0.9
        for a, b in zip(ps, twins):
            assert a.tolist() == approx(b.tolist(), abs=1e-14) and a.tolist() != values[0]


def test_pull_builds_no_graph_and_wants_one_tensor_a_parameter() -> None:
    p, q = param(2.0), param(5.0)
    w = Descent([p], momentum_sgd)
    w.pull([q], 2.0)
    assert grad_of(p) == -6.0 and p.grad is not None and not p.grad.requires_grad
    w.pull([q], 2.0)
    assert grad_of(p) == -12.0
    with pytest.raises(ValueError, match=r"Descent\.pull: 0 tensors for 1"):
        w.pull([], 1.0)


def test_average_alone_is_the_tensor_itself() -> None:
    x = param(1.0, 2.0)
    assert average(x) is x


@pytest.mark.slow
def test_average_and_pull_of_two_processes(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], env=env, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    for found in (first, second):
        assert found["scalar"].item() == 1.5 and found["scalar"].shape == () and found["matrix"].tolist() == [[5.0, 15.0]]
        # the mean of the ranks' gradients 1 and 3, and the pull, once: 2 - 0.1 (2 + 0.5 (2 - 1))
        assert found["pulled"].item() == approx(1.75, abs=1e-15)
    assert (first["kept"].item(), second["kept"].item()) == (1.0, 2.0)


def child(folder: Path) -> None:
    """What each of the two processes does."""
    me = ranks.start("cpu")
    x, matrix = param(1.0 + me.rank)[0], torch.tensor([[0.0, 10.0]]) + 10.0 * me.rank  # x has a graph
    mean = average(x)
    p = param(2.0)
    w = Descent([p], partial(SGD, lr=0.1))
    w.add((1.0 + 2.0 * me.rank) * p.sum())
    w.pull([torch.tensor([1.0], dtype=torch.float64)], 0.5)
    w.step()
    assert not mean.requires_grad
    found = {"scalar": mean, "matrix": average(matrix), "kept": x.detach(), "pulled": p.detach()}
    torch.save(found, folder / f"{me.rank}.pt")
    ranks.stop()


if __name__ == "__main__":
    child(Path(sys.argv[1]))
