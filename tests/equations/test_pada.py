"""PA&DA through ``update`` (pada.md, section 2) against the equations written out in numpy, and mutants that must fail; and the
strategies that draw their images as it does. The net: pada_toy.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pada_toy import EPOCH_STEPS, EPOCHS, IMAGES, NAMES, OPTIONS, SEED, B, Draws, N, Ops, ran, setup_of, space_of, weights
from torch import Tensor

from nas import importance
from nas.checkpoint import restore, state_of
from nas.engine import moment
from nas.importance import Importance, image_scores, running, tempered
from nas.strategies.bignas import BigNAS
from nas.strategies.fairnas import FairNAS
from nas.strategies.pada import PADA


def expected(net: Ops, draw: Draws, clip: float, lr: float, *, shared: bool = True, before: bool = False, carry: bool = False,
             reweight: bool = False, floor: float = 0.0) -> list[dict[str, Any]]:  # fmt: skip
    """The page's steps 1-12 in numpy, on the paths that ``net`` ran."""
    fresh = Ops(net.space)
    w = {name: p.detach().numpy().copy() for name, p in fresh.named_parameters()}
    x, y = draw.x.numpy(), draw.y.numpy()
    keys = ["all"] if shared else list(NAMES)
    G = {key: np.zeros(3) for key in keys}
    p = {name: np.full(3, 1 / 3) for name in NAMES}
    s_old, q, met, out = np.zeros(IMAGES), None, [], []
    for step, path in enumerate(net.ran):
        rows, epoch = list(draw.ROWS[step]), step // EPOCH_STEPS
        z = np.zeros((B, N))
        for name, option in path.items():
            if option != "none":
                z += x[rows] * w[f"W_{name}:{option}"] + w[f"b_{name}:{option}"]
        soft = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        error = soft - np.eye(N)[y[rows]]
        met += list(zip(rows, np.sqrt((error**2).sum(1))))  # 3
        factor = 1 / (IMAGES * q[rows]) if reweight and q is not None else np.ones(B)
        dz = error * factor[:, None] / B
        g = {}
        for name, option in path.items():
            if option != "none":
                g[f"W_{name}:{option}"], g[f"b_{name}:{option}"] = (x[rows] * dz).sum(0), dz.sum(0)
        total = math.sqrt(sum((v**2).sum() for v in g.values()))
        factor_of_clip = min(1.0, clip / (total + 1e-6))  # 5
        seen = {k: v if before else v * factor_of_clip for k, v in g.items()}
        for k, option in enumerate(OPTIONS):  # 7, 8
            for key in keys:
                on = [name for name, o in path.items() if o == option and key in ("all", name)]
                norms = [np.linalg.norm(seen[f"{kind}_{name}:{option}"]) for name in on for kind in "Wb" if option != "none"]
                if norms and sum(norms) > 0:
                    G[key][k] = (G[key][k] + sum(norms) / len(on)) / 2
        for k, v in g.items():
            w[k] = w[k] - lr * factor_of_clip * v  # 6
        if (step + 1) % EPOCH_STEPS == 0:
            tau = epoch / EPOCHS
            for name in NAMES:  # 9
                mine = G["all" if shared else name]
                p[name] = tau * mine / mine.sum() + (1 - tau) / 3 if mine.sum() else np.full(3, 1 / 3)
                p[name] = floor + (1 - 3 * floor) * p[name]
            G = {key: np.zeros(3) for key in keys}
            s, first = (s_old.copy() if carry else np.zeros(IMAGES)), set()
            for i, value in met:  # 10
                s[i] = (s[i] + value) / 2 if i in first else value
                first.add(i)
            if carry and epoch == 0:
                s[[i for i in range(IMAGES) if i not in first]] = np.mean([value for _, value in met])
            q, s_old, met = tau * s / s.sum() + (1 - tau) / IMAGES, s, []  # 11
        out.append({"p": {name: row.copy() for name, row in p.items()}, "q": None if q is None else q.copy(),
                    "w": {k: v.copy() for k, v in w.items()}})  # fmt: skip
    return out


def agree(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> bool:
    for a, b in zip(got, want, strict=True):
        if (a["q"] is None) != (b["q"] is None) or (a["q"] is not None and not np.allclose(a["q"], b["q"], rtol=0, atol=1e-12)):
            return False
        if not all(np.allclose(a["p"][name], b["p"][name], rtol=0, atol=1e-12) for name in a["p"]):
            return False
        if not all(np.allclose(a["w"][name], b["w"][name], rtol=0, atol=1e-12) for name in b["w"]):
            return False
    return True


VARIANTS: list[dict[str, Any]] = [{}, {"shared": False}, {"norm_point": "before_clip"}, {"carry": True}, {"reweight": True},
                                  {"floor": 0.2},
                                  {"shared": False, "carry": True, "reweight": True, "norm_point": "before_clip"}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_three_epochs_are_the_page_s_twelve_lines(options: dict[str, Any]) -> None:
    net, draw, after = ran(PADA(**options, weights=weights()))
    known = {k: v for k, v in options.items() if k != "norm_point"}
    want = expected(net, draw, 0.5, 0.1, before="norm_point" in options, **known)
    assert agree(after, want)
    assert draw.asked[:EPOCH_STEPS] == [None, None] and len({tuple(path.values()) for path in net.ran}) > 1
    for step in range(EPOCH_STEPS, len(draw.asked)):
        assert np.array_equal(draw.asked[step].numpy(), after[step // EPOCH_STEPS * EPOCH_STEPS - 1]["q"])


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tau a whole epoch ahead": lambda m: m.setattr(importance, "tempered", lambda s, tau: tempered(s, tau + 1 / EPOCHS)),
    "squares for norms": lambda m: m.setattr(importance, "_norms", lambda ts: [t.square().sum() for t in ts]),
    "one norm of all": lambda m: m.setattr(
        importance, "_norms", lambda ts: [torch.cat([t.flatten() for t in ts]).norm()]),
    "the last value, not the mean": lambda m: m.setattr(
        importance, "running", lambda i, v, s: s.index_put((i,), v)),
    "q from all epochs": lambda m: m.setattr(
        importance, "running", lambda i, v, s, own=running, kept=[None]: _kept(own, kept, i, v, s)),
}  # fmt: skip


def _kept(own: Any, kept: list[Any], i: Tensor, v: Tensor, s: Tensor) -> Tensor:
    kept[0] = own(i, v, s if kept[0] is None else kept[0])
    return kept[0]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    net, draw, after = ran(PADA(weights=weights()))
    assert not agree(after, expected(net, draw, 0.5, 0.1))


def test_halves_draw_the_other_half_uniformly() -> None:
    net, draw, after = ran(PADA(data=False, weights=weights()))
    assert draw.asked == [None] * 6
    want = [{**row, "q": None} for row in expected(net, draw, 0.5, 0.1)]
    assert agree(after, want) and after[-1]["p"]["e0"] != [1 / 3] * 3
    other = PADA(path=False, weights=weights())
    net, draw, after = ran(other)
    rngs = [moment(step, 6, EPOCH_STEPS, SEED).rng for step in range(6)]
    assert other.paths is None and net.ran == [net.space.sample(rng) for rng in rngs]  # SPOS's paths
    assert [row["q"] is None for row in after] == [True] + [False] * 5


@pytest.mark.parametrize("at", [4, 5])  # at the start of the last epoch, and within it
def test_a_resumed_run_draws_as_it_would_have(at: int) -> None:
    _, _, whole = ran(PADA(carry=True, weights=weights()))
    net, draw, first = Ops(space_of()), Draws(), PADA(carry=True, weights=weights())
    first.start(setup_of(net, net.space))
    for step in range(at):
        first.update(draw, moment(step, 6, EPOCH_STEPS, SEED))
    state = state_of(first)
    other, again = Ops(space_of()), PADA(carry=True, weights=weights())
    again.start(setup_of(other, other.space))
    restore(again, copy.deepcopy(state))
    for step in range(at, 6):
        again.update(draw, moment(step, 6, EPOCH_STEPS, SEED))
    assert np.array_equal(again.images.odds.numpy(), whole[-1]["q"]) and again.paths.p == whole[-1]["p"]
    assert all(np.array_equal(p.detach().numpy(), whole[-1]["w"][name]) for name, p in other.named_parameters())


# -- images drawn by importance in other strategies ---------------------------------------------------------------------


def test_fairnas_draws_images_by_the_mean_of_its_paths() -> None:
    space = space_of()
    net, draw = Ops(space), Draws()
    logits: list[Tensor] = []
    net.register_forward_hook(lambda module, given, z: logits.append(z.detach()))
    strategy = FairNAS(weights=weights(), images=Importance())
    strategy.start(setup_of(net, space))
    for step in range(4):
        strategy.update(draw, moment(step, 6, EPOCH_STEPS, SEED))
    scores = np.zeros(IMAGES)
    for step in (2, 3):
        for b, i in enumerate(Draws.ROWS[step]):
            three = [(F.softmax(z, 1)[b] - F.one_hot(draw.y[i], N)).norm().item() for z in logits[3 * step : 3 * step + 3]]
            met = i in [*(Draws.ROWS[2] if step == 3 else ()), *Draws.ROWS[step][:b]]
            scores[i] = (scores[i] + np.mean(three)) / 2 if met else np.mean(three)
    want = scores / scores.sum() / 3 + 2 / 3 / IMAGES
    assert np.allclose(strategy.drawn.odds.numpy(), want, rtol=0, atol=1e-12)
    assert draw.asked[:2] == [None, None] and draw.asked[2].tolist() == pytest.approx([1 / IMAGES] * IMAGES)


def test_bignas_draws_images_by_its_biggest() -> None:
    space = space_of(options=("none", "conv"))
    net, draw = Ops(space), Draws()
    strategy = BigNAS(children=0, drop=0.0, weights=weights(), images=Importance())
    strategy.start(setup_of(net, space))
    for step in range(2):
        strategy.update(draw, moment(step, 6, EPOCH_STEPS, SEED))
    assert strategy.drawn.odds.tolist() == pytest.approx([1 / IMAGES] * IMAGES)
    biggest = net(draw.x[list(Draws.ROWS[2])], space.largest())
    want = image_scores(biggest, draw.y[list(Draws.ROWS[2])])
    strategy.update(draw, moment(2, 6, EPOCH_STEPS, SEED))
    assert torch.allclose(strategy.drawn.met[0][1], want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="Allowed with BigNAS: false"):
        BigNAS(images=Importance(reweight=True))
