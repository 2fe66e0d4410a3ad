"""Descents with several parameter groups, with clipping by value, with RMSProp, and what ``forget`` leaves; schedules that fall
exponentially; all by hand, in float64."""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest import approx
from test_descent import assert_same, param, snapshot, square
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, RMSprop

from nas.bilevel import Weights
from nas.descent import Descent
from nas.losses import CrossEntropy, soft_cross_entropy
from nas.optimizers import OPTIMIZERS, optimizer
from nas.protocols import Setup
from nas.schedules import exponential, linear

EPOCH_STEPS, EPOCHS = 10, 300


def setup(epochs: int = EPOCHS) -> Setup:
    return Setup(None, None, None, CrossEntropy(), None, epochs * EPOCH_STEPS, EPOCH_STEPS, 0)


def grouped(name: str, **more: Any) -> Any:
    """A list of parameters -> an optimizer that does not decay norms."""
    return optimizer(name, 0.1, 0.5, momentum=0.9, nesterov=False, betas=(0.9, 0.99), norm_decay=False, **more)


def two(*rates: float) -> Callable[[list[Parameter]], SGD]:
    """Two parameters, a group and a rate each."""

    def make(given: list[Parameter]) -> SGD:
        groups: list[dict[str, Any]] = [{"params": [p], "lr": rate} for p, rate in zip(given, rates)]
        return SGD(groups)

    return make


def pair() -> list[Parameter]:
    """A bias, then a weight of two channels of three: the order of the groups is the other one."""
    bias = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    return [bias, Parameter(torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3))]


def loss_of(params: list[Parameter]) -> Tensor:
    return sum((i + 1.0) * square(p) for i, p in enumerate(params))  # type: ignore[return-value]


# -- groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_weights_decay(name: str) -> None:
    """Zero gradients: coupled decay moves the weight as its optimizer would on 0.5 w, decoupled by rate * decay; the bias
    stays where it is."""
    bias, weight = params = pair()
    w = Descent(params, grouped(name))
    assert [[p.ndim for p in group["params"]] for group in w.optimizer.param_groups] == [[2], [1]]
    before = [p.detach().clone() for p in params]
    w.down(0.0 * loss_of(params))
    assert torch.equal(bias.detach(), before[0])
    g = 0.5 * before[1]
    moved = {"sgd": 0.1 * g, "adamw": 0.1 * 0.5 * before[1], "adam": 0.1 * g / (g.abs() + 1e-8),
             "rmsprop": 0.1 * g / ((0.1 * g**2).sqrt() + 1e-3)}[name]  # fmt: skip
    assert torch.allclose(before[1] - weight.detach(), moved, rtol=1e-12, atol=0)


def test_a_group_that_would_be_empty_is_none() -> None:
    for params in (pair()[:1], pair()[1:]):
        w = Descent(params, grouped("sgd"))
        assert len(w.optimizer.param_groups) == 1 and w.optimizer.param_groups[0]["weight_decay"] == 0.5 * (params[0].ndim - 1)


def test_every_group_follows_the_schedule_by_its_own_rate() -> None:
    p, q = param(1.0), param(1.0)
    w = Descent([p, q], two(0.1, 0.02), linear(1, 0, 4))
    at = [1.0, 1.0]
    for step in range(3):
        factor = 1 - step / 4
        assert w.rate == approx(0.1 * factor)
        w.down(square(p) + square(q))
        at = [at[0] * (1 - 0.1 * factor), at[1] * (1 - 0.02 * factor)]
        assert [p.item(), q.item()] == approx(at, rel=1e-14)
    with w.ahead(square(p) + square(q), rate=0.5):  # the ratio holds for a given rate too
        assert [p.item(), q.item()] == approx([at[0] * 0.5, at[1] * 0.9], rel=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ahead_is_a_real_step_of_all_groups_and_leaves_no_trace(name: str) -> None:
    params = pair()
    w = Descent(params, grouped(name), linear(1.0, 0.1, 5))
    for _ in range(2):
        before, twin = snapshot(w), copy.deepcopy(w)
        with w.ahead(loss_of(params)):
            ahead = [p.detach().clone() for p in params]
        assert_same(before[0], snapshot(w)[0])
        assert_same(before[1]["optimizer"]["state"], snapshot(w)[1]["optimizer"]["state"])
        twin.down(loss_of(twin.params))
        assert_same(ahead, [p.detach() for p in twin.params])
        w.down(loss_of(params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_bit_for_bit(name: str) -> None:
    params = pair()
    w = Descent(params, grouped(name), linear(1.0, 0.1, 9), ema=0.9, clip_value=2.0)
    for _ in range(3):
        w.down(loss_of(params))
    values, state = snapshot(w)
    others = pair()
    again = Descent(others, grouped(name), linear(1.0, 0.1, 9), ema=0.9, clip_value=2.0)
    again.load_state_dict(state)
    with torch.no_grad():
        for p, value in zip(others, values):
            p.copy_(value)
    for descent in (w, again):
        descent.down(loss_of(descent.params))
    assert_same(snapshot(w), snapshot(again))
    assert not torch.equal(values[1], w.params[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_follows_sorted_channels(name: str) -> None:
    """Sorted, then a step = a step, then sorted: momentum, moments, average and pending gradients of both groups moved."""
    order = torch.tensor([1, 0])
    found = []
    for first in (True, False):
        params = pair()
        w = Descent(params, grouped(name), ema=0.5)
        w.down(loss_of(params))
        w.add(loss_of(params))
        moved = [(params[1], 0, order), (params[0], 0, order), (params[1], 1, torch.tensor([2, 0, 1]))]

        def sort(w: Descent = w, moved: Any = moved) -> None:
            with torch.no_grad():
                for p, dim, at in moved:
                    p.copy_(p.index_select(dim, at))
            w.permute(moved)

        for act in ((sort, w.step) if first else (w.step, sort)):
            act()
        state = [t for p in params for t in w.optimizer.state[p].values() if isinstance(t, Tensor)]
        found.append([p.detach() for p in params] + state + w.average)
    assert len(found[0]) > 4 and all(torch.allclose(a, b, rtol=1e-14, atol=0) for a, b in zip(*found))  # fused tails round


def test_fused_momentum_of_both_groups_is_there_before_the_first_gradient() -> None:
    bias, weight = params = pair()
    w = Descent(params, grouped("sgd"))
    x, y, u, v = 1.0, 1.0, 0.0, 0.0  # the first entries and their momentum
    for a, b in ((1, 0), (0, 1), (1, 1)):  # fused SGD raises where one comes late
        if a:
            u = 0.9 * u + x
            x -= 0.1 * u
        if b:
            v = 0.9 * v + 1.5 * y
            y -= 0.1 * v
        w.down(sum((square(p) for p, moves in ((bias, a), (weight, b)) if moves), torch.zeros(())))
        assert [bias[0].item(), weight[0, 0].item()] == approx([x, y], rel=1e-14)


def test_groups_that_are_not_the_parameters_are_refused() -> None:
    p, q = param(1.0), param(1.0)
    for make in (lambda given: SGD(given[:1], lr=0.1), lambda given: SGD([given[0], param(1.0)], lr=0.1)):
        with pytest.raises(ValueError, match="do not hold each parameter once"):
            Descent([p, q], make)
    with pytest.raises(ValueError, match=r"rates \[0.0, 0.1\] of the groups keep no ratio"):
        Descent([p, q], two(0.0, 0.1))


# -- clipping by value --------------------------------------------------------------------------------------------------


def test_clip_value_by_hand() -> None:
    p = param(3.0, -0.5, -4.0)
    w = Descent([p], partial(SGD, lr=0.1), clip_value=1.0)
    w.add(square(p))
    w.add(square(p))  # the sum is clipped, not each
    w.step()
    assert p.tolist() == approx([2.9, -0.4, -3.9], abs=1e-15)
    assert w.norm is not None and w.norm.item() == approx(2 * math.sqrt(9 + 0.25 + 16))  # before clipping


@pytest.mark.parametrize("wrong", [{"clip_value": 0.0}, {"clip_value": -1.0}, {"clip": 1.0, "clip_value": 1.0}])
def test_one_clipping_above_zero(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Allowed: a value above 0 without clip, or None"):
        Descent([param(1.0)], partial(SGD, lr=0.1), **wrong)


# -- forget -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forget_is_a_fresh_optimizer_on_the_same_schedule(name: str) -> None:
    params = pair()
    w = Descent(params, grouped(name), linear(1.0, 0.1, 9), ema=0.9)
    for _ in range(3):
        w.down(loss_of(params))
    w.add(loss_of(params))
    average, count = [value.clone() for value in w.average], w.count
    w.forget()
    assert w.count == count == 3 and w.rate == approx(0.1 * (1 - 0.9 * 3 / 9)) and params[0].grad is not None
    assert_same(average, w.average)
    fresh_params = [Parameter(p.detach().clone()) for p in params]
    fresh = Descent(fresh_params, grouped(name), lambda step: w.rate / 0.1)
    fresh.down(loss_of(fresh_params))
    w.step()
    assert_same([p.detach() for p in params], [p.detach() for p in fresh_params])


# -- RMSProp ------------------------------------------------------------------------------------------------------------


def test_rmsprop_by_hand() -> None:
    """s = a s + (1 - a) g^2;  v = mu v + g / (sqrt(s) + eps);  w <- w - lr v, the decay part of g."""
    p, x, s, v = param(2.0), 2.0, 0.0, 0.0
    weights = Weights(lr=0.1, lr_min=0.1, optimizer="rmsprop", momentum=0.5, alpha=0.8, eps=0.01, weight_decay=0.3, clip=None)
    w = weights.descent([p], setup())
    for _ in range(4):
        w.down(square(p))
        g = 1.3 * x
        s = 0.8 * s + 0.2 * g * g
        v = 0.5 * v + g / (math.sqrt(s) + 0.01)
        x -= 0.1 * v
        assert p.item() == approx(x, abs=1e-14)
    assert type(w.optimizer) is RMSprop


def test_what_is_no_rmsprop_is_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"alpha": 1.0}, {"alpha": -0.1}, {"eps": 0.0}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="Allowed: alpha from 0, below 1; eps above 0"):
            Weights(optimizer="rmsprop", **wrong)


# -- schedules ----------------------------------------------------------------------------------------------------------


def rates(weights: Weights, epochs: int = EPOCHS) -> list[float]:
    w = weights.descent([param(1.0)], setup(epochs))
    found = []
    for _ in range(epochs * EPOCH_STEPS):
        found.append(w.rate)
        w.count += 1
    return found


BIGNAS: dict[str, Any] = {"lr": 0.256, "lr_min": 0.05 * 0.256, "schedule": "exponential", "per_epoch": False}


def test_the_published_floor_is_reached_between_epochs_236_and_237() -> None:
    """bignas.md section 6, check 4: lr0 max(0.97^(t / 2.4), 0.05), t in epochs."""
    found = rates(Weights(**BIGNAS))
    assert found[0] == 0.256 and found[24] == approx(0.256 * 0.97) and found[12] == approx(0.256 * 0.97**0.5)
    floor = 0.05 * 0.256
    assert found[236 * EPOCH_STEPS] > floor * 1.0001 and found[237 * EPOCH_STEPS] == approx(floor, rel=1e-15)
    assert min(found) == approx(floor, rel=1e-15) and found == sorted(found, reverse=True)
    assert found[2359] > found[2360] and found[2370:] == [found[-1]] * len(found[2370:])


def test_exponential_within_and_after_the_warm_up() -> None:
    by_epoch = rates(Weights(**{**BIGNAS, "per_epoch": True, "warmup_epochs": 5}))
    assert by_epoch[:50] == approx([0.256 * (n + 1) / 50 for n in range(50)])
    assert by_epoch[50:80] == approx([0.256 * 0.97 ** (n / 2.4) for n in range(3) for _ in range(10)])
    with pytest.raises(ValueError, match="exponential: length = 0"):
        exponential(0, 0.97)


def test_a_warm_up_beside_the_fall() -> None:
    """AttentiveNAS: lr0 * warm * (1 + cos(pi t / T)) / 2, warm from 0.001 to 1 in 5 epochs."""
    found = rates(Weights(0.8, 0.0, per_epoch=False, warmup_epochs=5, warmup_start=0.001), epochs=20)
    for step in range(200):
        warm = 0.001 + 0.999 * min(step / 50, 1.0)
        assert found[step] == approx(0.8 * warm * 0.5 * (1 + math.cos(math.pi * step / 200)))


@pytest.mark.parametrize("wrong, words", [
    ({"schedule": "step"}, "schedule = 'step' is not known. Allowed: cosine, exponential"),
    ({"warmup_start": 0.1}, "warmup_start = 0.1, warmup_epochs = 0"),
    ({"warmup_start": 2.0, "warmup_epochs": 1}, "Allowed: 0 to 1"), ({"decay_epochs": 0.0}, "decay_epochs = 0"),
    ({"decay_rate": 0.0}, "decay_rate = 0.0"), ({"decay_rate": 1.1}, "decay_rate = 1.1"),
    ({"clip_value": 1.0}, "clip = 5.0, clip_value = 1.0. Allowed: one of the two"),
])  # fmt: skip
def test_what_is_not_known_of_weights_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Weights(**wrong)


def test_the_settings_reach_the_descent() -> None:
    w = Weights(clip=None, clip_value=0.5, norm_decay=False, optimizer="adam").descent(pair(), setup())
    assert w.clip_value == 0.5 and w.clip is None and len(w.optimizer.param_groups) == 2 and type(w.optimizer) is Adam


# -- soft cross-entropy -------------------------------------------------------------------------------------------------


def test_soft_cross_entropy_by_hand() -> None:
    student = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0], [math.log(4.0), 0.0]], dtype=torch.float64, requires_grad=True)
    loss = soft_cross_entropy(student, teacher)
    assert loss.item() == approx((0.5 * math.log(4) + 0.5 * math.log(4 / 3) + math.log(2)) / 2)
    loss.backward()
    assert teacher.grad is None and student.grad is not None
    assert student.grad[0].tolist() == approx([(0.25 - 0.5) / 2, (0.75 - 0.5) / 2])
    p = (teacher.detach() / 2).softmax(1)
    warm = -(p * (student.detach() / 2).log_softmax(1)).sum(1).mean() * 4
    assert soft_cross_entropy(student, teacher, T=2.0).item() == approx(warm.item())
    with pytest.raises(ValueError, match=r"T = 0\. Allowed: above 0"):
        soft_cross_entropy(student, teacher, T=0)
