"""The descent on the weights: optimizers by name, warm-up, exact resume; where one of them is refused."""
from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.bilevel import Weights
from nas.descent import Descent
from nas.losses import CrossEntropy
from nas.optimizers import optimizer
from nas.protocols import Setup
from nas.strategies.darts import DARTS
from nas.strategies.plain import Plain
from nas.strategies.rarts import unstable

EPOCH_STEPS, EPOCHS = 5, 8


def setup(net: nn.Module | None = None) -> Setup:
    return Setup(net, None, None, CrossEntropy(), None, EPOCHS * EPOCH_STEPS, EPOCH_STEPS, 0)


def rates(weights: Weights) -> list[float]:
    """Of every step of the run."""
    w = weights.descent([nn.Parameter(torch.ones(1))], setup())
    found = []
    for _ in range(EPOCHS * EPOCH_STEPS):
        found.append(w.rate)
        w.count += 1
    return found


def fall(at: int, length: int) -> float:
    return 0.02 + 0.08 * (1 + math.cos(math.pi * at / length)) / 2


def test_the_rate_by_hand() -> None:
    assert rates(Weights(0.1, 0.02)) == pytest.approx([fall(n // 5, 8) for n in range(40)])
    assert rates(Weights(0.1, 0.02, per_epoch=False)) == pytest.approx([fall(n, 40) for n in range(40)])
    warm = [0.1 * (n + 1) / 10 for n in range(10)]  # two epochs in equal steps, whatever per_epoch says
    assert rates(Weights(0.1, 0.02, warmup_epochs=2)) == pytest.approx([*warm, *(fall(n // 5, 6) for n in range(30))])
    stepwise = Weights(0.1, 0.02, warmup_epochs=2, per_epoch=False)
    assert rates(stepwise) == pytest.approx([*warm, *(fall(n, 30) for n in range(30))])


def by_hand(name: str, w: Tensor, g: Tensor, state: dict[str, Any], lr: float, wd: float) -> Tensor:
    b1, b2 = 0.8, 0.95
    if name == "sgd":
        state["v"] = 0.7 * state.get("v", 0.0) + g + wd * w
        return w - lr * state["v"]
    if name == "adam":
        g = g + wd * w
    else:
        w = w - lr * wd * w
    n = state["n"] = state.get("n", 0) + 1
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["s"] = b2 * state.get("s", 0.0) + (1 - b2) * g**2
    return w - lr * (state["m"] / (1 - b1**n)) / ((state["s"] / (1 - b2**n)).sqrt() + 1e-8)


SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.3, "betas": (0.8, 0.95), "clip": None}


def quadratic(p: Tensor) -> Tensor:
    return (torch.arange(1.0, 5.0, dtype=torch.float64) * p**2).sum()


def descent(of: str, name: str) -> tuple[nn.Parameter, Descent]:
    """Of Weights or of Plain, on four numbers."""
    net = nn.ParameterList([nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))])
    if of == "weights":
        return net[0], Weights(**SETTINGS, lr_min=0.02, optimizer=name).descent(net.parameters(), setup())
    strategy = Plain(**SETTINGS, nesterov=False, optimizer=name)
    strategy.start(setup(net))
    return net[0], strategy.w


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("of", ["weights", "plain"])
def test_six_steps_by_hand_and_resumed(of: str, name: str) -> None:
    p, w = descent(of, name)
    at, state = p.detach().clone(), dict[str, Any]()
    for step in range(6):
        if step == 3:  # a new process goes on
            kept, value = copy.deepcopy(w.state_dict()), p.detach().clone()
            p, w = descent(of, name)
            w.load_state_dict(kept)
            with torch.no_grad():
                p.copy_(value)
        g = 2 * torch.arange(1.0, 5.0, dtype=torch.float64) * at
        at = by_hand(name, at, g, state, w.rate, SETTINGS["weight_decay"])
        w.down(quadratic(p))
        assert p.tolist() == pytest.approx(at.tolist(), rel=1e-12)
    others = [descent(of, other)[1] for other in ("sgd", "adam", "adamw") if other != name]
    assert all(type(other.optimizer) is not type(w.optimizer) for other in others)


def test_moments_go_on_where_a_weight_rests() -> None:
    """idle = zeros, with Adam: a step on another weight still moves one that has momentum."""
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    for idle, moves in (("zeros", True), ("skip", False)):
        w = Weights(lr=0.1, weight_decay=0.0, optimizer="adam", idle=idle).descent([p, q], setup())
        w.down(quadratic(torch.cat([p, q[:1]])))
        before = q.detach().clone()
        w.down((p**2).sum())
        assert torch.equal(q.detach(), before) is not moves


@pytest.mark.parametrize("make, words", [
    (lambda: Weights(optimizer="lion"), "optimizer = 'lion' is not known. Allowed: sgd, adam, adamw"),
    (lambda: Plain(optimizer="lion"), "optimizer = 'lion' is not known. Allowed: sgd, adam, adamw"),
    (lambda: Weights(betas=(0.9, 1.0)), r"betas = \[0.9, 1.0\] are no decay rates. Allowed: from 0, below 1"),
    (lambda: Plain(betas=(-0.1, 0.9)), "are no decay rates"), (lambda: Weights(warmup_epochs=-1), "Allowed: 0 or more"),
    (lambda: Weights(warmup_epochs=EPOCHS).descent([nn.Parameter(torch.ones(1))], setup()), "are the whole run"),
    (lambda: DARTS(weights=Weights(optimizer="adamw")), "Allowed with order 2: sgd"),
])  # fmt: skip
def test_what_is_not_known_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_what_takes_any_optimizer() -> None:
    assert DARTS(order=1, weights=Weights(optimizer="adam")).passes() == 2
    assert type(optimizer("adamw", 1e-3, 0.0, momentum=0.0, nesterov=False, betas=(0.9, 0.999))([nn.Parameter(torch.ones(1))])
                ) is torch.optim.AdamW  # fmt: skip
    assert unstable(1.0, 5.0, 0.1, 0.9) and not unstable(1.0, 5.0, 0.1, 0.0)  # which RARTS says but for sgd
