"""DepS through ``update``: the checks of deps.md, section 6, in float64."""
from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from shrinking import (
    LOSS,
    ByHand,
    Feed,
    Gradients,
    drops,
    gradients,
    mobile,
    noise,
    now,
    parameters,
    run,
    sgd,
    started,
    summed,
    used,
)
from torch import Tensor, nn

from nas import checkpoint
from nas.losses import soft_cross_entropy
from nas.strategies.deps import DepS
from search_spaces.patterns import restricted
from search_spaces.resnet import CifarResNet
from search_spaces.space import SearchSpace
from supernets.resnet import ResNet

STEPS, EPOCH = 24, 3  # eight epochs
SWITCH, WHOLE = 9, 15  # delay 5, ramp 2


def deps(**more: Any) -> DepS:
    return DepS(**{"delay": 5, "ramp": 2, "weights": sgd(), **more})


def begun(**more: Any) -> Any:
    return started(deps(**more), *mobile(), STEPS, EPOCH)


def long(epochs: int, epoch_steps: int, **given: Any) -> Any:
    """A run of published length: nothing of it but its schedule is used."""
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    strategy = DepS(**{"protect": None, **given})
    return started(strategy, space, ResNet(space, channels=1, classes=4, norm="shared"), epochs * epoch_steps, epoch_steps)


# -- beta ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "W", "s", "lr", "nB", "first", "table"), [
    (270, 150, 5, 2.6, 625, 1.0743, 1.0594), (200, 100, 5, 0.1, 390, 0.05, 0.0492)], ids=["imagenet", "cifar"])  # fmt: skip
def test_beta_at_published_epochs(N: int, W: int, s: int, lr: float, nB: int, first: float, table: float) -> None:
    strategy = long(N, nB, delay=W, ramp=s, weights=sgd(lr=lr))

    def cosine(epoch: float) -> float:
        return 0.5 * lr * (1 + math.cos(math.pi * epoch / N))

    assert strategy.lr(W * nB) == pytest.approx(cosine(W), abs=1e-12) == pytest.approx(first, abs=1e-4)
    assert strategy.lr((W + 1) * nB) == pytest.approx(table, abs=1e-4)  # what the released tables hold under W
    start = (W - s) * nB
    assert [strategy.beta(step) for step in (0, 1, start // 2, start - 1)] == [0.0] * 4
    assert strategy.beta(start) == pytest.approx(cosine(W) / cosine(W - s) / (s * nB), rel=1e-12)
    i = 2 * nB + 17  # of the ramp, from 0
    assert strategy.beta(start + i) == pytest.approx(cosine(W) * (i + 1) / (s * nB) / cosine(W - s + i / nB), rel=1e-12)
    last = W * nB - 1
    assert strategy.beta(last) * strategy.lr(last) == pytest.approx(cosine(W), rel=1e-12) and strategy.beta(last) < 1
    assert [strategy.beta(step) for step in (W * nB, W * nB + 1, N * nB - 1)] == [1.0] * 3


@pytest.mark.parametrize("per_epoch", [False, True])
def test_beta_times_the_rate_is_linear_on_the_ramp(per_epoch: bool) -> None:
    strategy = long(20, 7, delay=12, ramp=4, m=0.7, weights=sgd(lr_min=0.01, per_epoch=per_epoch))
    ramp = range(8 * 7, 12 * 7)
    scaled = [strategy.beta(step) * strategy.lr(step) for step in ramp]
    slope = 0.7 * strategy.lr(12 * 7) / len(ramp)
    assert scaled == pytest.approx([slope * (i + 1) for i in range(len(ramp))], rel=1e-12)
    assert strategy.beta(12 * 7) == 0.7


def test_delay_and_ramp_as_shares_of_the_run() -> None:
    for delay, ramp, found in (("50%", "5%", (9, 10)), ("50%", "1%", (9, 10)), ("55.6%", 0, (11, 11)), (12, "20%", (8, 12)),
                               ("100%", "10%", (18, 20)), ("0%", "0%", (0, 0))):  # fmt: skip
        strategy = long(20, 7, delay=delay, ramp=ramp)
        assert (strategy.switch, strategy.whole) == (7 * found[0], 7 * found[1])
        assert strategy.passes() == pytest.approx((found[0] + 4 * (20 - found[0])) / 20)


@pytest.mark.parametrize("given", [
    {"delay": "half"}, {"delay": "101%"}, {"delay": -1}, {"delay": 1.5}, {"ramp": "x%"}, {"delay": True}, {"m": 0.0},
    {"T": 0.0}, {"drop": 1.0}, {"randoms": -1}, {"momentum": "keep"}, {"combine": "max"},
])
def test_what_is_refused_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Allowed"):
        DepS(**given)


@pytest.mark.parametrize("given", [{"delay": 3, "ramp": 4}, {"delay": 21, "ramp": 2}, {"delay": 20, "ramp": 0}])
def test_what_does_not_fit_into_the_run_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Allowed: ramp <= delay <= epochs"):
        long(20, 7, **given)


# -- the step -----------------------------------------------------------------------------------------------------------


def test_before_the_switch_it_is_plain_training_of_the_full_net_bit_for_bit() -> None:
    strategy, (space, net) = begun(), mobile()
    w, largest, draw = sgd().descent(net.parameters(), strategy.setup), space.largest(), Feed()
    metrics = run(strategy, 0, SWITCH)
    for step in range(SWITCH):
        now(strategy, step)  # seeds dropout
        x, y, _ = draw("train")
        w.down(LOSS(net(x, largest, drop=0.1), y))
    assert all(torch.equal(a, b) for a, b in zip(strategy.net.parameters(), net.parameters()))
    assert {m["shrink/epsilon"] for m in metrics} == {0.0} and {m["shrink/phase"] for m in metrics} == {0.0}
    assert "train/loss_smallest" not in metrics[-1]


def by_hand(strategy: Any, net: Any, step: int, factor: float, masked: bool) -> tuple[Gradients, list[float]]:
    """The gradient of a step with subnets, from four separate backwards; with the released code's masks."""
    space, rng = strategy.space, now(strategy, step).rng
    x, y, _ = Feed(step)("train")
    archs = [space.largest(), space.smallest(), space.sample(rng), space.sample(rng)]
    z = net(x, archs[0], drop=0.1)  # first, so that dropout sees the same noise
    losses = [LOSS(z, y)]
    p = torch.softmax(z.detach() / strategy.T, dim=1)
    for arch in archs[1:]:
        losses.append(-strategy.T**2 * (p * torch.log_softmax(net(x, arch) / strategy.T, dim=1)).sum(dim=1).mean())
    parts = [gradients(loss, net) for loss in losses]
    if masked:
        masks = [used(net, arch) for arch in archs]
        parts = [[None if g is None else g * m for g, m in zip(part, mask)] for part, mask in zip(parts, masks)]
    return summed(zip([1.0, factor, factor, factor], parts)), [loss.item() for loss in losses]


@pytest.mark.parametrize(("T", "m"), [(2.0, 0.7), pytest.param(1.0, 1.0, marks=pytest.mark.slow)])
def test_scaled_losses_are_masked_gradient_accumulation(T: float, m: float) -> None:
    """Over the switch, the ramp and beyond: the weights of ours, and of SGD by hand on g_max + beta sum g_i."""
    strategy = begun(T=T, m=m)
    run(strategy, 0, SWITCH)
    theirs = copy.deepcopy(strategy.net)
    hand = ByHand(theirs, strategy.weights)
    order = theirs.sort_channels(trained=restricted(strategy.space, {"*.expand": [4, 6]}))  # before its first step
    for p, q in zip(strategy.net.parameters(), theirs.parameters()):
        hand.sgd.state[q]["momentum_buffer"] = strategy.w.optimizer.state[p]["momentum_buffer"].clone()
    for p, dim, permutation in order:  # momentum goes with the weights
        buffer = hand.sgd.state[p]["momentum_buffer"]
        buffer.copy_(buffer.index_select(dim, permutation))
    for step in range(SWITCH, WHOLE + 3):
        rate, done = 0.025 * (1 + math.cos(math.pi * step / STEPS)), min((step - SWITCH + 1) / 6, 1.0)
        at_whole = 0.025 * (1 + math.cos(math.pi * WHOLE / STEPS))
        factor = m if step >= WHOLE else m * at_whole * done / rate
        found, losses = by_hand(strategy, theirs, step, factor, masked=step == SWITCH + 2)
        (metrics,) = run(strategy, step, step + 1)
        hand.step(found, rate)
        torch.testing.assert_close(parameters(strategy.net), parameters(theirs), rtol=0, atol=1e-11)
        assert metrics["shrink/epsilon"] == pytest.approx(factor, rel=1e-12) and metrics["train/lr"] == pytest.approx(rate)
        assert metrics["train/loss"].item() == pytest.approx(losses[0])
        assert metrics["train/loss_smallest"].item() == pytest.approx(losses[1])
        assert metrics["train/loss_random"].item() == pytest.approx(sum(losses[2:]) / 2)
        assert metrics["shrink/phase"] == (2.0 if step >= WHOLE else 1.0)


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_without_delay_it_is_a_sandwich(combine: str) -> None:
    strategy = begun(delay=0, ramp=0, combine=combine)
    theirs = copy.deepcopy(strategy.net)
    theirs.sort_channels(trained=restricted(strategy.space, {"*.expand": [4, 6]}))
    hand, share = ByHand(theirs, strategy.weights), 1.0 if combine == "sum" else 0.25
    for step in range(3):
        found, _ = by_hand(strategy, theirs, step, 1.0, masked=False)
        run(strategy, step, step + 1)
        hand.step([None if g is None else share * g for g in found], 0.025 * (1 + math.cos(math.pi * step / STEPS)))
        torch.testing.assert_close(parameters(strategy.net), parameters(theirs), rtol=0, atol=1e-12)
    assert strategy.passes() == 4.0


def test_dropout_is_the_largest_networks_alone_and_subnets_are_drawn_as_said() -> None:
    strategy = begun()
    seen, hook = drops(strategy.net)
    run(strategy, SWITCH - 1, SWITCH + 1)
    hook.remove()
    space, rng = strategy.space, now(strategy, SWITCH).rng
    archs = [space.largest(), space.largest(), space.smallest(), space.sample(rng), space.sample(rng)]
    assert seen == [(arch, drop, True) for arch, drop in zip(archs, (0.1, 0.1, 0.0, 0.0, 0.0))]
    assert strategy.arch(now(strategy, SWITCH)) == space.largest()


def test_dropout_modules_rest_in_subnets() -> None:
    strategy = begun()
    seen = noise(strategy.net)
    run(strategy, SWITCH - 1, SWITCH + 1)
    assert seen == [True, True, False, False, False] and strategy.net.noise.training


def test_no_subnet_moves_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits that teach carry no graph, and weights that only the largest network has move as its own loss says."""
    given: list[tuple[Tensor, Tensor]] = []

    def spied(student: Tensor, teacher: Tensor, T: float) -> Tensor:
        given.append((student, teacher))
        return soft_cross_entropy(student, teacher, T)

    monkeypatch.setattr("nas.strategies.deps.soft_cross_entropy", spied)
    strategy = begun(randoms=0)
    run(strategy, SWITCH, SWITCH + 1)
    assert len(given) == 1 and given[0][0].requires_grad and not given[0][1].requires_grad


# -- the sort -----------------------------------------------------------------------------------------------------------


def test_the_sort_comes_once_before_the_first_step_with_subnets(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, sorts = begun(), list[tuple[int, Any]]()
    whole = type(strategy.net).sort_channels

    def spied(net: nn.Module, trained: SearchSpace | None = None) -> Any:
        sorts.append((strategy.w.count, trained))
        return whole(net, trained)  # type: ignore[arg-type]

    monkeypatch.setattr(type(strategy.net), "sort_channels", spied)
    run(strategy, 0, WHOLE + 2)
    ((step, trained),) = sorts
    assert step == SWITCH and trained["stage1.block0.expand"].options == (4, 6)
    assert trained.size == restricted(strategy.space, {"*.expand": [4, 6]}).size


@pytest.mark.parametrize(("protect", "kept"), [({"*.expand": 2}, (6, 4)), (None, (6,)), ({"*.expand": 3}, (6, 4, 3))])
def test_the_sort_leaves_protected_networks_as_they_are(protect: Any, kept: tuple[int, ...]) -> None:
    strategy = begun(protect=protect)
    run(strategy, 0, 3)
    x = Feed(50)("train").x
    archs = {e: restricted(strategy.space, {"*.expand": [e]}).largest() for e in (3, 4, 6)}
    before = {e: strategy.net(x, arch).detach() for e, arch in archs.items()}
    strategy.sort()
    for e, arch in archs.items():
        away = (strategy.net(x, arch) - before[e]).abs().max().item()
        assert away < 1e-10 if e in kept else away > 1e-3


@pytest.mark.parametrize("momentum", ["permute", "reset", "released"])
def test_momentum_at_the_sort(momentum: str) -> None:
    """Permuted with the weights, the full net's next update is the unsorted net's, permuted."""
    strategy, unsorted = begun(momentum=momentum), begun()
    run(strategy, 0, 4), run(unsorted, 0, 4)
    report: list[Any] = []
    whole = strategy.net.sort_channels

    def spied(trained: SearchSpace | None) -> list[Any]:
        report.extend(whole(trained))
        return report

    strategy.net.sort_channels = spied
    strategy.sort()
    x, y, _ = Feed(4)("train")
    for each in (strategy, unsorted):
        each.w.down(LOSS(each.net(x, each.space.largest()), y))
    names = {id(p): name for name, p in strategy.net.named_parameters()}
    theirs = {name: p.detach().clone() for name, p in unsorted.net.named_parameters()}
    for p, dim, order in report:
        theirs[names[id(p)]] = theirs[names[id(p)]].index_select(dim, order)
    away = max((theirs[name] - p).abs().max().item() for name, p in strategy.net.named_parameters())
    assert len(report) > 50 and (away < 1e-12 if momentum == "permute" else away > 1e-4)


def test_a_reset_forgets_all_momentum() -> None:
    strategy = begun(momentum="reset")
    run(strategy, 0, 4)
    strategy.sort()
    assert all(not state["momentum_buffer"].any() for state in strategy.w.optimizer.state.values())


# -- time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [SWITCH - 1, SWITCH, SWITCH + 3])
def test_resumed_it_ends_in_the_same_bits(at: int) -> None:
    first, end = begun(), at + 3
    run(first, 0, at)
    file = io.BytesIO()
    torch.save(checkpoint.state_of(first), file)
    told = run(first, at, end)
    file.seek(0)
    second = begun()
    run(second, 0, 1)
    checkpoint.restore(second, torch.load(file, weights_only=True))
    again = run(second, at, end)
    assert [m["shrink/epsilon"] for m in again] == [m["shrink/epsilon"] for m in told] and len(told) == 3
    for one, other in zip(again, told):
        assert all(torch.equal(torch.as_tensor(one[tag]), torch.as_tensor(other[tag])) for tag in other)
    assert all(torch.equal(a, b) for a, b in zip(second.net.parameters(), first.net.parameters()))


def test_the_ramp_spares_the_full_network_at_the_switch() -> None:
    """The first step with subnets differs from plain training by a hundredth of what it would without a ramp (ramp 1 / 100)."""
    def away(**given: Any) -> float:
        strategy = started(deps(**given), *mobile(), 300, 100)
        alone = started(deps(delay=3, ramp=1), *mobile(), 300, 100)  # nothing enters before step 200
        for each in (strategy, alone):
            each.momentum = "reset"
            each.sort()
            each.switch, each.sort = (0 if each is strategy else 200), lambda: None
        run(strategy, 0, 1), run(alone, 0, 1)
        return sum(((a - b) ** 2).sum().item() for a, b in zip(strategy.net.parameters(), alone.net.parameters())) ** 0.5

    assert away(delay=1, ramp=1) == pytest.approx(away(delay=0, ramp=0) / 100, rel=0.3)
