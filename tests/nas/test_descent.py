"""Descent against updates computed by hand, in float64."""
from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from pytest import approx
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam

from nas.descent import Descent
from nas.schedules import constant, cosine, cosine_per_epoch, linear

momentum_sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
nesterov_sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
adam = partial(Adam, lr=0.1, betas=(0.5, 0.999), weight_decay=0.01)
OPTIMIZERS = [momentum_sgd, nesterov_sgd, adam]


def param(*values: float) -> Parameter:
    return Parameter(torch.tensor(values, dtype=torch.float64))


def grad_of(p: Parameter) -> float:
    assert p.grad is not None
    return p.grad.item()


def square(p: Tensor) -> Tensor:
    return 0.5 * (p**2).sum()


def snapshot(descent: Descent) -> tuple[list[Tensor], Any]:
    return [p.detach().clone() for p in descent.params], copy.deepcopy(descent.state_dict())


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov: bool) -> None:
    p, x, v = param(2.0), 2.0, 0.0
    w = Descent([p], nesterov_sgd if nesterov else momentum_sgd)
    for _ in range(3):
        w.down(square(p))
        g = x + 0.01 * x
        v = 0.9 * v + g
        x -= 0.1 * (g + 0.9 * v if nesterov else v)
        assert p.item() == approx(x, abs=1e-14)
    assert p.grad is None and w.count == 3


def test_adam_by_hand() -> None:
    p, x, m, v = param(2.0), 2.0, 0.0, 0.0
    w = Descent([p], adam)
    for t in range(1, 4):
        w.down(square(p))
        g = x + 0.01 * x
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g * g
        x -= 0.1 * (m / (1 - 0.5**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert p.item() == approx(x, abs=1e-12)


def test_add_reaches_self_and_also_and_nothing_else() -> None:
    a, b, c = param(1.0), param(2.0), param(3.0)
    A, B = Descent([a], momentum_sgd), Descent([b], adam)
    A.add((a * b * c).sum(), B)
    assert (grad_of(a), grad_of(b), c.grad) == (6.0, 3.0, None)
    A.add((a * c).sum())
    assert (grad_of(a), grad_of(b)) == (9.0, 3.0)
    A.step()
    assert a.grad is None and b.grad is not None and B.count == 0


def test_down_steps_also() -> None:
    a, b = param(1.0), param(2.0)
    A, B = Descent([a], partial(SGD, lr=0.1)), Descent([b], partial(SGD, lr=0.5))
    A.down((a * b).sum(), B)
    assert (a.item(), b.item(), A.count, B.count) == (approx(0.8), approx(1.5), 1, 1)


def test_accumulate_is_the_mean_and_acts_every_other_call() -> None:
    p, q = param(2.0, -1.0), param(2.0, -1.0)
    w, one = Descent([p], momentum_sgd, accumulate=2), Descent([q], momentum_sgd)
    w.down(square(p))
    assert p.tolist() == [2.0, -1.0] and w.count == 0
    w.down(3 * square(p))
    one.down(2 * square(q))
    assert w.count == 1 and torch.equal(p, q)
    with pytest.raises(ValueError, match="accumulate = 2"), w.ahead(square(p)):
        pass
    with pytest.raises(ValueError, match="same accumulate"):
        w.add(square(p), one)


def test_pending_gradients_are_saved() -> None:
    p, q = param(2.0), param(2.0)
    first, second = Descent([p], adam, accumulate=2), Descent([q], adam, accumulate=2)
    first.down(square(p))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.down(square(p))
    second.down(square(q))
    assert torch.equal(p, q) and p.item() != 2.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rate", [None, 0.37])
def test_ahead_is_a_real_step_and_leaves_no_trace(optimizer: Any, rate: float | None) -> None:
    p, idle = param(2.0, -1.0), param(5.0)
    w = Descent([p, idle], optimizer, linear(1.0, 0.0, 10), ema=0.9)
    w.down(square(p))
    p.grad = torch.ones_like(p)  # a pending gradient, not part of the look-ahead
    before = snapshot(w)
    with w.ahead(3 * square(p), rate):
        inside = p.detach().clone()
        assert not torch.equal(inside, before[0][0]) and idle.item() == before[0][1].item()
    assert_same(before[0] + [before[1]["average"]], snapshot(w)[0] + [snapshot(w)[1]["average"]])
    assert_same(before[1]["optimizer"]["state"], snapshot(w)[1]["optimizer"]["state"])
    assert_same(before[1]["pending"], snapshot(w)[1]["pending"])
    assert w.rate == 0.1 * 0.9 and w.count == 1
    p.grad = None
    if rate is not None:
        w.bases, w.schedule = [rate], constant()
    w.down(3 * square(p))
    assert torch.equal(p, inside)


def test_ahead_by_the_formula_of_darts() -> None:
    p = param(2.0)
    w = Descent([p], momentum_sgd)
    w.down(square(p))
    x = 2.0 - 0.1 * 2.02
    with w.ahead(square(p)):
        assert p.item() == approx(x - 0.1 * (0.9 * 2.02 + x + 0.01 * x), abs=1e-14)  # (2): mu v + grad + wd w
    assert p.item() == approx(x, abs=1e-14)


def test_ahead_restores_after_an_error() -> None:
    p = param(2.0)
    w = Descent([p], momentum_sgd)
    with pytest.raises(RuntimeError, match="inside"), w.ahead(square(p)):
        raise RuntimeError("inside")
    assert p.item() == 2.0


def test_second_order_darts_of_the_paper_file() -> None:
    """grad_a of L_val at w' in one backward: L_train = a w^2 / 2, L_val = a w'^2 / 2 + a."""
    p, a = param(2.0), param(3.0)
    w, alpha = Descent([p], partial(SGD, lr=0.1)), Descent([a], partial(SGD, lr=1.0))
    with w.ahead((a * square(p)).sum()):  # w' = 2 - 0.1 * 3 * 2 = 1.4
        g = w.grad((a * square(p) + a).sum(), alpha)
    assert g[0].item() == approx(4.2, abs=1e-14) and grad_of(a) == approx(1.98, abs=1e-14)
    assert p.grad is None


def test_grad_accumulates_nothing_and_is_zero_for_the_idle() -> None:
    p, idle = param(2.0), param(5.0, 6.0)
    w = Descent([p, idle], momentum_sgd)
    p.grad = torch.full_like(p, 7.0)
    assert [g.tolist() for g in w.grad(square(p))] == [[2.0], [0.0, 0.0]]
    assert grad_of(p) == 7.0 and idle.grad is None


@pytest.mark.parametrize("by", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_shifted(by: Any) -> None:
    p = param(0.1, 0.2)
    w = Descent([p], momentum_sgd)
    before = p.detach().clone()
    with w.shifted([torch.tensor([2.0, -4.0], dtype=torch.float64)], by):
        assert p.tolist() == [approx(1.1), approx(-1.8)]
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="0 tensors for 1"), w.shifted([], 1.0):
        pass


def test_frozen_passes_give_the_others_the_same_gradient_and_self_none() -> None:
    p, q = param(2.0), param(3.0)
    w, a = Descent([p], momentum_sgd), Descent([q], momentum_sgd)
    with pytest.raises(KeyError), w.frozen():
        assert not p.requires_grad and q.requires_grad
        a.add((p * p * q).sum())
        raise KeyError
    assert p.requires_grad and p.grad is None and grad_of(q) == 4.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_permute_follows_sorted_channels(optimizer: Any) -> None:
    """Permuting and then stepping equals stepping and then permuting."""
    start, order = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64), torch.tensor([2, 0, 1])
    scale = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    p, q = Parameter(start.clone()), Parameter(start.clone())
    moved, still = Descent([p], optimizer, ema=0.5), Descent([q], optimizer, ema=0.5)
    for w, x in ((moved, p), (still, q)):
        w.down(square(scale * x))
    with torch.no_grad():
        p.copy_(p.index_select(0, order))
    moved.permute([(p, 0, order), (q, 0, order)])  # q is another descent's: passed over
    moved.down(square(scale[order] * p))
    still.down(square(scale * q))
    assert torch.equal(p, q[order]) and torch.equal(moved.average[0], still.average[0][order])


def test_idle_skip_and_zeros() -> None:
    for idle, expected in (("skip", 2.0), ("zeros", 2.0 - 0.1 * 0.02)):
        p, late = param(1.0), param(2.0)
        w = Descent([p, late], momentum_sgd, idle=idle)
        w.down(square(p))
        assert late.item() == approx(expected, abs=1e-14)
    v, x = 0.02, 2.0 - 0.1 * 0.02  # then a gradient, then none: the momentum goes on
    w.down(square(late))
    v = 0.9 * v + 1.01 * x
    x -= 0.1 * v
    w.down(square(p))
    v = 0.9 * v + 0.01 * x
    assert late.item() == approx(x - 0.1 * v, abs=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_sgd_with_late_first_gradients_equals_the_plain_loop(nesterov: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(64, generator=generator, dtype=dtype) for _ in range(2)]  # whole vectors: see _fill_momentum
    results = []
    for fused in (False, True):
        a, b = (Parameter(value.clone()) for value in values)
        sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov, fused=fused, foreach=False)
        w = Descent([a, b], sgd)
        w.down(square(a) + a.sin().sum())
        for _ in range(3):
            w.down(square(a * b) + b.sin().sum())
        results.append(torch.cat([a, b]).detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("nesterov", [False, True])
def test_zero_momentum_buffers_change_no_bit_of_fused_sgd(nesterov: bool) -> None:
    sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov, fused=True)
    start = torch.randn(50, generator=torch.Generator().manual_seed(0))
    p, q = Parameter(start.clone()), Parameter(start.clone())
    w, bare = Descent([p], sgd), sgd([q])
    for _ in range(3):
        w.down(p.sin().sum())
        q.sin().sum().backward()
        bare.step()
        bare.zero_grad()
    assert torch.equal(p, q)


def test_fused_sgd_refuses_dampening() -> None:
    with pytest.raises(ValueError, match="dampening"):
        Descent([param(1.0)], partial(SGD, lr=0.1, momentum=0.9, dampening=0.5, fused=True))


def test_clip_and_norm() -> None:
    p, q = param(3.0), param(4.0)
    w = Descent([p, q], partial(SGD, lr=1.0), clip=1.0)
    w.down(square(p) + square(q))
    assert w.norm is not None and w.norm.item() == approx(5.0)
    assert (p.item(), q.item()) == (approx(2.4, abs=1e-5), approx(3.2, abs=1e-5))
    free = Descent([p], partial(SGD, lr=1.0))
    free.down(square(p))
    assert free.norm is None
    free.down(7 * p.sum(), norm=True)
    assert free.norm is not None and free.norm.item() == approx(7.0)


def test_schedules() -> None:
    assert constant()(7) == 1.0
    assert [linear(1.0, 0.0, 4)(s) for s in (0, 1, 4, 9)] == [1.0, 0.75, 0.0, 0.0]
    factor = cosine(12, floor=0.2, warmup=2)
    assert [factor(s) for s in (0, 1, 2, 7, 12, 20)] == approx([0.5, 1.0, 1.0, 0.6, 0.2, 0.2])
    epochs = cosine_per_epoch(5, epoch_steps=3, warmup_epochs=1)
    quarter = 0.5 * (1 + math.cos(math.pi / 4))
    assert [epochs(s) for s in (0, 2, 3, 5, 6, 9, 14)] == approx([1 / 3, 1, 1, 1, quarter, 0.5, 1 - quarter])
    for bad in (lambda: cosine(2, warmup=2), lambda: linear(1, 0, 0), lambda: cosine_per_epoch(0, 1)):
        with pytest.raises(ValueError, match="Allowed"):
            bad()


def test_the_schedule_is_a_function_of_its_own_steps() -> None:
    p = param(2.0)
    w = Descent([p], partial(SGD, lr=0.5), linear(1.0, 0.0, 2))
    assert w.rate == 0.5
    w.down(p.sum())
    assert w.rate == 0.25 and p.item() == 1.5
    w.down(p.sum())
    assert w.rate == 0.0 and p.item() == 1.25


def test_moving_average() -> None:
    p = param(1.0)
    w = Descent([p], partial(SGD, lr=1.0), ema=0.75)
    w.down(p.sum())  # 0
    w.down(p.sum())  # -1
    expected = 0.75 * (0.75 * 1.0 + 0.25 * 0.0) + 0.25 * -1.0
    with w.averaged():
        assert p.item() == approx(expected, abs=1e-15)
    assert p.item() == -1.0
    with pytest.raises(ValueError, match="ema = None"), Descent([p], momentum_sgd).averaged():
        pass


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_dict_goes_on_bit_for_bit(optimizer: Any) -> None:
    p = param(2.0, -3.0)
    w = Descent([p], optimizer, cosine(9), ema=0.9)
    w.down(square(p))
    q = Parameter(p.detach().clone())
    other = Descent([q], optimizer, cosine(9), ema=0.9)
    other.load_state_dict(copy.deepcopy(w.state_dict()))
    for _ in range(2):
        w.down(square(p))
        other.down(square(q))
    assert torch.equal(p, q) and torch.equal(w.average[0], other.average[0]) and w.rate == other.rate
    with pytest.raises(ValueError, match="averages 1 parameters, here 0"):
        Descent([q], optimizer).load_state_dict(w.state_dict())


def test_refusals() -> None:
    p = param(1.0)
    frozen = Parameter(torch.ones(2), requires_grad=False)
    for params, options, message in [
        ([], {}, "no parameters"),
        ([p, frozen], {}, "parameter 1 of shape"),
        ([p], {"clip": 0.0}, "clip"),
        ([p], {"idle": "maybe"}, "idle = 'maybe'"),
        ([p], {"accumulate": 0}, "accumulate"),
        ([p], {"ema": 1.5}, "ema"),
    ]:
        with pytest.raises(ValueError, match=message):
            Descent(params, momentum_sgd, **options)  # type: ignore[arg-type]


def test_a_norm_that_no_step_kept_is_refused() -> None:
    p = Parameter(torch.tensor([3.0, 4.0]))
    w = Descent([p], partial(SGD, lr=0.1))
    w.down((p**2).sum() / 2)
    with pytest.raises(RuntimeError, match="no step kept a norm"):
        _ = w.grad_norm
    expected = p.detach().norm()
    w.down((p**2).sum() / 2, norm=True)
    assert torch.equal(w.grad_norm, expected)
