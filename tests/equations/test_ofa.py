"""OFA through ``update``: the checks of ofa.md, sections 3, 4 and 6, that are about training, in float64."""
from __future__ import annotations

import copy
import functools
import io
import math
import random
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
)
from torch import nn

from nas import checkpoint
from nas.cost import CostTable
from nas.protocols import Setup
from nas.strategies.deps import DepS
from nas.strategies.ofa import OFA, PHASES, Phase, Plan, opened
from search_spaces.mobilenet import OFAMobileNetV3, OFAProxyless, compound
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, SearchSpace
from supernets import mobilenet
from supernets.resnet import ResNet

# The published phases with other lengths: full 3, kernel 1 + 3, depth 1 2, depth 2 1 + 2, expand 1 3, expand 2 1 + 3.
SHORT = [Phase(p.name, epochs, p.lr, p.opens, p.nets, int(p.warmup > 0), p.sort)
         for p, epochs in zip(PHASES, (3, 3, 2, 2, 3, 3))]  # fmt: skip
STARTS = [0, 3, 7, 9, 12, 15, 19]
STEPS = STARTS[-1]


def ofa(**more: Any) -> OFA:
    return OFA(**{"phases": list(SHORT), "weights": sgd(lr=0.026), **more})


def begun(**more: Any) -> Any:
    return started(ofa(**more), *mobile((3, 5, 7), (6, 8)), STEPS, 1)


def options(space: SearchSpace, kind: str) -> set[tuple[Any, ...]]:
    return {choice.options for choice in space.choices if choice.name.endswith(kind)}


# -- phases -------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "full": ((7,), (4,), (6,), 180, 0, 2.6, 1, False), "kernel": ((3, 5, 7), (4,), (6,), 120, 5, 0.96, 1, False),
    "depth 1": ((3, 5, 7), (3, 4), (6,), 25, 0, 0.08, 2, False),
    "depth 2": ((3, 5, 7), (2, 3, 4), (6,), 120, 5, 0.24, 2, False),
    "expand 1": ((3, 5, 7), (2, 3, 4), (4, 6), 25, 0, 0.08, 4, True),
    "expand 2": ((3, 5, 7), (2, 3, 4), (3, 4, 6), 120, 5, 0.24, 4, True),
}  # fmt: skip


def test_phases_open_exactly_the_published_options() -> None:
    spaces = opened(OFAMobileNetV3(), PHASES)
    assert [phase.name for phase in PHASES] == list(PUBLISHED) and sum(phase.length for phase in PHASES) == 605
    for phase, space in zip(PHASES, spaces):
        kernels, depths, expands, *rest = PUBLISHED[phase.name]
        found = [options(space, kind) for kind in (".kernel", ".depth", ".expand")]
        assert found == [{kernels}, {depths}, {expands}]
        assert [phase.epochs, phase.warmup, phase.lr, phase.nets, phase.sort] == rest
        assert len(space["resolution"].options) == 25  # elastic in all of them
    assert spaces[-1].choices == OFAMobileNetV3().choices
    assert opened(OFAProxyless(), PHASES)[2]["stage5.depth"].options == (1,)


def test_compofa_opens_the_tied_space() -> None:
    space = compound(OFAMobileNetV3(resolution=()))
    phases = [Phase("full", 180, 2.6), Phase("compound", 25, 0.08, {"*.depth": 3}, nets=4, sort=True)]
    assert [each.size for each in opened(space, phases)] == [1, 243]


@pytest.mark.parametrize(("opens", "words"), [
    ({"*.width": 2}, "matches no choice"), ({"*.kernel": [9]}, "is not in this space")])
def test_a_phase_that_opens_nothing_is_refused(opens: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        started(OFA([Phase("full", 1, 1.0), Phase("more", 1, 1.0, opens)], weights=sgd()), *mobile(), 4)


@pytest.mark.parametrize("given", [
    {"phases": []}, {"kd_ratio": -1}, {"drop": 1.0}, {"warmup_from": 2}, {"combine": "max"}, {"weights": sgd(warmup_epochs=1)}])
def test_what_is_refused_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Allowed|at least one phase"):
        OFA(**given)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"nets": 0}, {"warmup": -1}])
def test_what_a_phase_cannot_be(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"name": "p", "epochs": 1, "lr": 1.0, **wrong}
    with pytest.raises(ValueError, match="phase p: "):
        Phase(**given)


def test_a_run_too_short_for_its_phases_is_refused() -> None:
    with pytest.raises(ValueError, match="phase depth 1: 25 of 605 epochs are 0 of the run's 8 steps"):
        started(OFA(weights=sgd()), *mobile(), 8, 1)


def planned(epochs: int, epoch_steps: int, phases: Any = PHASES, **more: Any) -> Plan:
    space = OFAMobileNetV3(0.1, True)
    setup = Setup(nn.Linear(1, 1), space, None, LOSS, None, epochs * epoch_steps, epoch_steps, 0)
    return Plan(phases, sgd(lr=2.6, **more), 1 / 32, setup)


def test_the_schedule_of_each_published_phase() -> None:
    """Warm-up from the rate of one GPU of 32, then the page's formula, whose clock begins after the warm-up; per iteration."""
    nB, plan, start = 7, planned(605, 7), 0
    for k, (epochs, warmup, lr) in enumerate(row[3:6] for row in PUBLISHED.values()):
        assert plan.starts[k] == start and plan.at(start) == k and plan.at(max(start - 1, 0)) == max(k - 1, 0)
        for i in range(warmup * nB):
            assert 2.6 * plan.factor(start + i) == pytest.approx(lr / 32 + (i + 1) / (warmup * nB) * (lr - lr / 32), rel=1e-12)
        for ep, i in ((0, 0), (0, 1), (1, 3), (epochs // 2, 0), (epochs - 1, nB - 1)):
            expected = 0.5 * lr * (1 + math.cos(math.pi * (ep * nB + i) / (epochs * nB)))
            assert 2.6 * plan.factor(start + (warmup + ep) * nB + i) == pytest.approx(expected, rel=1e-12)
        start += (epochs + warmup) * nB
    assert plan.starts[-1] == start == 605 * nB and plan.at(start) == plan.at(start - 1) == 5


def test_another_length_is_shared_out_in_proportion() -> None:
    plan = planned(121, 10)  # a fifth
    assert plan.starts == [0, 360, 610, 660, 910, 960, 1210]
    assert plan.factor(360 + 9) == pytest.approx(0.96 / 2.6)  # the last of ten steps of warm-up
    assert planned(12, 10).starts[1] == round(120 * 180 / 605)
    plan = planned(605, 3, lr_min=0.05, per_epoch=True)  # the floor is a rate
    assert 2.6 * plan.factor(604 * 3) == 2.6 * plan.factor(605 * 3 - 1) == pytest.approx(0.05, abs=1e-4)
    assert OFA().passes() == pytest.approx((180 + 125 + 2 * 150 + 4 * 150) / 605)


# -- the step -----------------------------------------------------------------------------------------------------------


def drawn(strategy: Any, k: int, step: int) -> list[Arch]:
    rng = now(strategy, step).rng  # seeds dropout, too
    archs = [opened(strategy.space, SHORT)[k].sample(rng) for _ in range(SHORT[k].nets)]
    return [arch | {"resolution": archs[0]["resolution"]} for arch in archs]


def phase_at(step: int) -> int:
    return max(k for k in range(6) if STARTS[k] <= step)


@pytest.mark.parametrize(("kd_ratio", "combine"), [(1.0, "sum"), pytest.param(0.5, "mean", marks=pytest.mark.slow)])
def test_the_whole_run_is_what_the_page_says(kd_ratio: float, combine: str) -> None:
    """Another run by hand: separate backwards, summed; a phase has SGD as new, its own rate, its sort, the first teacher."""
    strategy = begun(kd_ratio=kd_ratio, combine=combine)
    space, net = mobile((3, 5, 7), (6, 8))
    teacher: Any = None
    hand = ByHand(net, strategy.weights)
    feed, theirs = Feed(), Feed()
    for step in range(STEPS):
        k = phase_at(step)
        phase, done = SHORT[k], step - STARTS[k]
        if done == 0 and k:
            teacher = copy.deepcopy(net) if k == 1 else teacher
            if k >= 4:
                net.sort_channels(trained=opened(space, SHORT)[k - 1])
            hand.forget()
        peak = phase.lr / 100
        lr = (peak if done < phase.warmup else 0.5 * peak * (1 + math.cos(math.pi * (done - phase.warmup) / phase.epochs)))
        archs = drawn(strategy, k, step)
        R = archs[0]["resolution"]
        x, y, _ = theirs("train")
        parts: list[Gradients] = []
        losses = []
        for arch in archs:
            z = net(x, arch, drop=0.1)
            loss = LOSS(z, y)
            if k:
                with torch.no_grad():
                    p = torch.softmax(teacher(x, space.largest() | {"resolution": R}), dim=1)
                loss = loss - kd_ratio * (p * torch.log_softmax(z, dim=1)).sum(dim=1).mean()
            losses.append(loss.item())
            parts.append(gradients(loss, net))
        share = 1.0 if combine == "sum" else 1 / phase.nets
        hand.step(summed((share, part) for part in parts), lr)
        (metrics,) = run(strategy, step, step + 1, feed)
        torch.testing.assert_close(parameters(strategy.net), parameters(net), rtol=0, atol=1e-10)
        assert metrics["shrink/phase"] == k and metrics["train/lr"] == pytest.approx(lr, abs=1e-15)
        assert metrics["train/loss"].item() == pytest.approx(sum(losses) / len(losses))
    assert set(feed.sizes) == {None}  # the net brings the crop to R


def test_dropout_modules_rest_in_the_teacher() -> None:
    strategy = begun()
    learns, taught = noise(strategy.net), noise(strategy.teacher)
    run(strategy, 0, STARTS[1] + 1)
    assert all(learns) and taught == [False] and strategy.teacher.noise.training


def test_nets_of_a_step_their_resolution_and_what_arch_announces() -> None:
    strategy, feed = begun(), Feed()
    seen, hook = drops(strategy.net)
    taught, other = drops(strategy.teacher)
    for step in range(STEPS):
        announced = strategy.arch(now(strategy, step))
        del seen[:], taught[:]
        run(strategy, step, step + 1, feed)
        k = phase_at(step)
        archs = drawn(strategy, k, step)
        R = archs[0]["resolution"]
        assert announced == archs[0] and {arch["resolution"] for arch in archs} == {R}
        assert seen == [(arch, 0.1, True) for arch in archs] and len(archs) == SHORT[k].nets
        assert taught == ([(strategy.space.largest() | {"resolution": R}, 0.0, False)] if k else [])
        for arch in archs:
            opened(strategy.space, SHORT)[k].check(arch)
    hook.remove(), other.remove()
    assert len({arch["stage3.block1.expand"] for step in range(15, 19) for arch in drawn(strategy, 5, step)}) > 1
    assert strategy.passes() == pytest.approx((3 + 4 + 2 * 2 + 2 * 3 + 4 * 3 + 4 * 4) / 19)


def test_the_teacher_is_the_full_net_of_the_first_phase_and_stays() -> None:
    strategy = begun()
    run(strategy, 0, 3)
    end = {name: value.clone() for name, value in strategy.net.state_dict().items()}
    run(strategy, 3, STEPS)
    assert all(torch.equal(value, end[name]) for name, value in strategy.teacher.state_dict().items())
    assert any(not torch.equal(value, end[name]) for name, value in strategy.net.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in strategy.teacher.parameters())
    assert not {id(p) for p in strategy.teacher.parameters()} & {id(p) for p in strategy.w.params}
    assert strategy.teacher.training  # normalises with the statistics of the batch


def test_without_distillation_there_is_no_teacher() -> None:
    strategy = begun(kd_ratio=0.0)
    assert strategy.teacher is None
    run(strategy, 2, 5)


def test_sorted_exactly_once_in_each_expand_phase_with_a_fresh_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, sorts, fresh = begun(), list[tuple[int, Any]](), list[int]()
    whole, forget = type(strategy.net).sort_channels, strategy.w.forget

    def spied(net: Any, trained: SearchSpace | None = None) -> Any:
        sorts.append((strategy.w.count, trained))
        return whole(net, trained)

    def forgetting() -> None:
        fresh.append(strategy.w.count)
        forget()
        assert not any(t.any() for state in strategy.w.optimizer.state.values() for t in state.values())

    monkeypatch.setattr(type(strategy.net), "sort_channels", spied)
    monkeypatch.setattr(strategy.w, "forget", forgetting)
    run(strategy, 0, STEPS)
    assert [step for step, _ in sorts] == [12, 15] and fresh == STARTS[1:-1]
    assert [options(trained, ".expand") for _, trained in sorts] == [{(6,)}, {(4, 6)}]
    assert [options(trained, ".depth") for _, trained in sorts] == [{(1, 2)}] * 2


@pytest.mark.parametrize(("k", "changed"), [(4, 4), (5, 3)])
def test_the_sort_leaves_every_network_trained_so_far_as_it_was(k: int, changed: int) -> None:
    strategy = begun()
    with torch.no_grad():  # weights whose channels have no order
        for p in strategy.net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x, rng = Feed(99)("train").x, random.Random(1)
    spaces = opened(strategy.space, SHORT)
    known = [spaces[k - 1].sample(rng) for _ in range(8)]
    other = strategy.space.restrict({name: [changed] for name in spaces[k]._at if name.endswith("expand")}).largest()
    before = [strategy.net(x, arch).detach() for arch in (*known, other)]
    strategy.begin(k)
    away = [(strategy.net(x, arch) - z).abs().max().item() for arch, z in zip((*known, other), before)]
    assert max(away[:-1]) < 1e-10 and away[-1] > 1e-3


def test_parameters_that_no_network_of_a_step_uses_rest() -> None:
    """At k3 e3 d2, 134 of 283 tensors get no gradient (page, section 6); the step accepts that, and they stay bit for bit."""
    space = OFAMobileNetV3(0.1, True)
    net = mobilenet.build(space, 1, 4).double()
    net.reset(torch.Generator().manual_seed(1))
    least = space.restrict({c.name: c.options[:1] for c in space.choices})
    strategy = OFA([Phase("least", 1, 1.0)], weights=sgd())
    strategy.start(Setup(net, least, CostTable(net, (8, 8)), LOSS, None, 2, 1, 0))
    before = parameters(net)
    run(strategy, 0, 1)
    still = [torch.equal(a, b) for a, b in zip(before, parameters(net))]
    assert (len(still), sum(still)) == (283, 134)


# -- time ---------------------------------------------------------------------------------------------------------------


@functools.cache
def unbroken() -> tuple[list[dict[str, Any]], list[bytes]]:
    """The metrics of every step of a run, and its state before every step and at the end."""
    strategy, feed, told, states = begun(), Feed(), list[dict[str, Any]](), list[bytes]()
    for step in range(STEPS + 1):
        file = io.BytesIO()
        torch.save(checkpoint.state_of(strategy), file)
        states.append(file.getvalue())
        told += run(strategy, step, step + 1, feed) if step < STEPS else []
    return told, states


@pytest.mark.parametrize("at", [2, 3, 5, 8, 11, 12, 14, 17])
def test_resumed_in_any_phase_it_ends_in_the_same_bits(at: int) -> None:
    """From before the last step of a phase, its first, or amid it, into the next phase."""
    told, states = unbroken()
    strategy, end = begun(), min(at + 4, STEPS)
    run(strategy, 2, 4)  # a teacher and momentum of its own to overwrite
    checkpoint.restore(strategy, torch.load(io.BytesIO(states[at]), weights_only=True))
    for one, other in zip(run(strategy, at, end), told[at:end], strict=True):
        assert all(torch.equal(torch.as_tensor(one[tag]), torch.as_tensor(other[tag])) for tag in other)
    expected = torch.load(io.BytesIO(states[end]), weights_only=True)
    found = checkpoint.state_of(strategy)
    for mine, theirs in ((found["setup"]["net"], expected["setup"]["net"]), (found["teacher"], expected["teacher"])):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    momenta = [state["w"]["optimizer"]["state"] for state in (found, expected)]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(torch.equal(each[tag], momenta[1][p][tag]) for p, each in momenta[0].items() for tag in each)


def test_a_checkpoint_of_other_phases_is_refused() -> None:
    state = checkpoint.state_of(begun())
    other = begun(phases=[*SHORT[:4], SHORT[5]])
    with pytest.raises(ValueError, match=r"its phases begin at steps \[0, 3, 7, 9, 12, 15, 19\], here"):
        checkpoint.restore(other, state)


def test_a_net_that_cannot_be_sorted_is_refused_before_the_first_step() -> None:
    """Norms with a scale per width cannot follow; a phase without the sort takes them."""
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    for strategy in (OFA([Phase("full", 1, 1.0), Phase("all", 1, 1.0, {"*": 9}, sort=True)]), DepS("50%", 1, protect=None)):
        with pytest.raises(ValueError, match="a scale per width, which cannot follow a sort"):
            started(strategy, space, ResNet(space, channels=1, classes=4), 4, 2)
    started(OFA([Phase("full", 1, 1.0), Phase("all", 1, 1.0, {"*": 9})]), space, ResNet(space, channels=1, classes=4), 4, 2)
    with pytest.raises(ValueError, match="none opens all of stage0"):
        started(OFA([Phase("full", 1, 1.0)]), space, ResNet(space, channels=1, classes=4), 4, 2)
