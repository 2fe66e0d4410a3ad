"""What the hyper-parameters of alphas and weights promise in every strategy that has them."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategy_entries import Draws, equal, plainly, run, started, values
from strategy_entry import BOTH, EPOCH_STEPS, SEED, STEPS, Entry

from nas.bilevel import Alphas, Weights
from nas.engine import moment
from nas.strategies.darts import DARTS
from nas.strategies.drnas import DrNAS
from nas.strategies.gdas import GDAS
from nas.strategies.proxyless import Proxyless
from nas.strategies.rarts import RARTS
from nas.strategies.snas import SNAS
from nas.strategies.tangle import Tangle
from search_spaces import nats

WARM: list[tuple[Callable[[Alphas], Any], tuple[str, ...]]] = [
    (lambda alphas: DARTS(alphas=alphas), ("train",)), (lambda alphas: DARTS(order=1, alphas=alphas), ("train",)),
    (lambda alphas: SNAS(alphas=alphas), ("train",)), (lambda alphas: GDAS(alphas=alphas), ("train",)),
    (lambda alphas: RARTS(alphas=alphas), ("train", "valid")),
    (lambda alphas: RARTS(mode="jacobi", alphas=alphas), ("train", "valid")),
    (lambda alphas: DrNAS(alphas=alphas), ("train",)), (lambda alphas: Tangle(alphas=alphas), ("train",)),
    (lambda alphas: Tangle("gumbel", alphas=alphas), ("train",)),
    (lambda alphas: Proxyless(every=1, alphas=alphas), ("train",)),
]  # fmt: skip


@pytest.mark.parametrize("make, asks", WARM, ids=["darts-2", "darts-1", "snas", "gdas", "rarts", "rarts-jacobi", "drnas",
                                                  "tangle", "tangle-gumbel", "proxyless"])  # fmt: skip
def test_alphas_wait_for_their_warm_up(make: Callable[[Alphas], Any], asks: tuple[str, ...]) -> None:
    """One epoch: the weights learn, the logits stay; what arch announces is what they run. Then the logits move."""
    entry = Entry("warm", lambda: make(Alphas(warmup_epochs=1)), "cells", BOTH)
    strategy, draw = started(entry), Draws()
    w, a = values(strategy.w), values(strategy.a)
    announced, ran = plainly(strategy.arch(moment(0, STEPS, EPOCH_STEPS, SEED))), list[dict[str, Any]]()
    hook = strategy.net.register_forward_pre_hook(lambda net, given: ran.append(plainly(given[1])))
    metrics = run(strategy, draw, end=1)[0]
    hook.remove()
    assert ran == [announced] and draw.asked == list(asks) and "alpha/grad_norm" not in metrics
    assert not equal(values(strategy.w), w) and equal(values(strategy.a), a)
    (metrics,) = run(strategy, draw, start=3, end=4)
    assert not equal(values(strategy.a), a) and "alpha/grad_norm" in metrics


@pytest.mark.parametrize("make", [make for make, _ in (*WARM[1:5], *WARM[6:8])],
                         ids=["darts", "snas", "gdas", "rarts", "drnas", "tangle"])  # fmt: skip
def test_the_skip_limit_holds_in_what_is_derived(make: Callable[[Alphas], Any]) -> None:
    for limit, expected in ((None, 6), (2, 2), (0, 0)):
        strategy = started(Entry("skips", lambda limit=limit: make(Alphas(skip_limit=limit)), "cells", BOTH))  # type: ignore[misc]
        with torch.no_grad():
            strategy.alpha.logits["5"][:, nats.OPS.index("skip_connect")] += 3.0
        assert list(strategy.architecture().values()).count("skip_connect") == expected


@pytest.mark.parametrize("wrong", [{"warmup_epochs": -1}, {"skip_limit": -1}])
def test_negative_waits_and_limits_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Allowed: 0 or more"):
        Alphas(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.1, 0.2), (-0.1, -0.1), (0.1, -0.1)])
def test_rates_that_do_not_fall_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Allowed: 0 <= lr_min <= lr, lr above 0"):
        Weights(*rates)
