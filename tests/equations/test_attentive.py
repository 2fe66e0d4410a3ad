"""AttentiveNAS and AlphaNet through ``update`` in float64: steps against networks differentiated one by one, what is scored,
what is dropped, and mutants that must fail. On tiny supernets of AttentiveNAS (with resolutions) and of ResNets.
"""
from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.divergence import alpha_divergence
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies import alphanet, attentive
from nas.strategies.alphanet import AlphaNet
from nas.strategies.attentive import Attentive
from search_spaces.bignas import AttentiveNAS as MobileSpace
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch
from supernets.bignas import AttentiveNAS as MobileNet
from supernets.resnet import ResNet

STEPS, EPOCH_STEPS, SEED, B, WRONG = 8, 4, 3, 6, "WRONG"
CLIP = 0.02  # of many gradients the sum is clipped, and of some not one of its parts
WEIGHTS = Weights(lr=0.1, lr_min=0.0, nesterov=True, weight_decay=0.03, norm_decay=False, clip=None, clip_value=CLIP,
                  per_epoch=False, warmup_epochs=1, warmup_start=0.001)  # fmt: skip
BINS: dict[str, Any] = {"bin_width": "5%", "samples": 2000}
LOSS = CrossEntropy(label_smoothing=0.1)
Mutation = Callable[[Any], Any]


def mobile() -> nn.Module:
    depths = [[1], [1, 2], [1], [1], [1, 2], [2, 3], [1, 2]]
    return MobileNet(MobileSpace(small=True, width=0.1, depths=depths, resolution=[5, 8]), 1, 4)


def resnet() -> nn.Module:
    return ResNet(CifarResNet(14, "tied", widths=(4, 6, 8)), 1, 4)


NETS = {"mobile": mobile, "resnet": resnet}


def made(kind: str) -> Any:
    net: Any = NETS[kind]().double()
    net.reset(torch.Generator().manual_seed(1))
    with torch.no_grad():  # zero scales would hide what is behind them
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    return net


def started(make: Callable[..., Any], kind: str = "mobile", net: Any = None, **given: Any) -> Any:
    net = made(kind) if net is None else net
    own = {**(BINS if make is Attentive else {}), "weights": WEIGHTS, **given}
    strategy = make(**own)
    strategy.start(Setup(net, net.space, CostTable(net, (8, 8)), LOSS, None, STEPS, EPOCH_STEPS, B))
    return strategy


def batch(step: int) -> Batch:
    rng = torch.Generator().manual_seed(100 + step)
    x = torch.randn(B, 1, 8, 8, generator=rng, dtype=torch.float64)
    return Batch(x, torch.randint(4, (B,), generator=rng), torch.arange(B))


def at(step: int) -> Any:
    return moment(step, STEPS, EPOCH_STEPS, SEED)


# -- the step, network by network ---------------------------------------------------------------------------------------


def soft_ce(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()


def adaptive(student: Tensor, teacher: Tensor) -> Tensor:
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0))
    return torch.stack([a if c > d else b for a, b, c, d in zip(low.G, high.G, low.D, high.D)]).mean()


class Hand:
    """The step again: each network on its own copy of the weights, its gradient alone; their sum, clipping and SGD written out.
    """

    def __init__(self, s: Any) -> None:
        self.s, self.net = s, copy.deepcopy(s.net)
        self.params = list(self.net.parameters())
        self.buffers = [torch.zeros_like(p) for p in self.params]

    def children(self, x: Tensor, y: Tensor, rng: random.Random) -> Iterator[Arch]:
        s = self.s
        for _ in range(s.children):
            if isinstance(s, AlphaNet):
                yield s.space.sample(rng)
                continue
            candidates = s.bins.draw(rng, s.candidates)
            with torch.no_grad():
                scores = [-float(LOSS(self.net(x, arch), y)) for arch in candidates]
            yield candidates[scores.index(max(scores) if s.pick == "best" else min(scores))]

    def step(self, step: int) -> dict[str, float]:
        s, now = self.s, at(step)
        x, y, _ = batch(step)
        z = self.net(x, s.space.largest(), s.drop)
        loss = LOSS(z, y)
        gradients, teacher = [self.gradient(loss)], z.detach().clone()
        losses = []
        for arch in (*self.children(x, y, now.rng), s.space.smallest()):
            z = self.net(x, arch)
            losses.append(adaptive(z, teacher) if isinstance(s, AlphaNet) else soft_ce(z, teacher))
            gradients.append(self.gradient(losses[-1]))
        share = 1 / len(gradients) if s.combine == "mean" else 1.0
        total = [share * sum(each) for each in zip(*gradients)]
        rate = 0.1 * min(0.001 + 0.999 * step / EPOCH_STEPS, 1) * (1 + math.cos(math.pi * step / STEPS)) / 2
        with torch.no_grad():
            for p, g, m in zip(self.params, total, self.buffers):
                d = g.clamp(-CLIP, CLIP) + (0.03 * p if p.ndim > 1 else 0)
                m.mul_(0.9).add_(d)
                p.sub_(rate * (d + 0.9 * m))  # Nesterov
        norm = sum(float((g**2).sum()) for g in total) ** 0.5
        return {"train/loss": loss.item(), "train/lr": rate, "train/grad_norm": norm, "train/loss_smallest": losses[-1].item(),
                "train/loss_children": sum(each.item() for each in losses[:-1]) / (len(losses) - 1)}  # fmt: skip

    def gradient(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found)]


def check(make: Callable[..., Any], kind: str = "mobile", mutate: Mutation = lambda s: None, steps: int = 4,
          **given: Any) -> None:  # fmt: skip
    """AssertionError, saying WRONG, where anything differs."""
    strategy = started(make, kind, **given)
    hand = Hand(copy.copy(strategy))
    hand.s.space = copy.deepcopy(strategy.space)
    mutate(strategy)
    for step in range(steps):
        asked: list[str] = []
        metrics = strategy.update(lambda split, step=step, asked=asked: asked.append(split) or batch(step), at(step))
        expected = hand.step(step)
        assert asked == ["train"], WRONG
        assert {tag: float(metrics[tag]) for tag in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12), WRONG
        for p, q in zip(strategy.net.parameters(), hand.params):
            assert torch.allclose(p, q, rtol=1e-8, atol=1e-11), WRONG


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "attentive": (Attentive, "mobile", {}), "attentive-resnet": (Attentive, "resnet", {}),
    "worst-up": (Attentive, "mobile", {"pick": "worst", "candidates": 4, "children": 1}),
    "one-candidate": (Attentive, "mobile", {"candidates": 1}), "attentive-mean": (Attentive, "resnet", {"combine": "mean"}),
    "alphanet": (AlphaNet, "mobile", {}), "alphanet-resnet": (AlphaNet, "resnet", {"children": 3}),
    "alphanet-mean": (AlphaNet, "mobile", {"combine": "mean"}),
}  # fmt: skip


@pytest.mark.parametrize("make, kind, given", CASES.values(), ids=CASES)
def test_a_step_is_the_sum_of_separate_gradients(make: Any, kind: str, given: dict[str, Any]) -> None:
    check(make, kind, **given)


def test_the_clip_of_the_test_acts_on_the_sum() -> None:
    """Some entries of the sum exceed it, and some of these in no single gradient."""
    strategy = started(Attentive)
    hand, found = Hand(strategy), list[list[Tensor]]()
    gradient = hand.gradient
    hand.gradient = lambda loss: found.append(gradient(loss)) or found[-1]  # type: ignore[method-assign, func-returns-value]
    hand.step(1)
    flat = torch.stack([torch.cat([g.flatten() for g in each]) for each in found])
    above = flat.sum(0).abs() > CLIP
    assert 0.05 < float(above.double().mean()) < 0.95 and bool((above & (flat.abs() < CLIP).all(0)).any())
    assert len(flat) == 4 and bool((flat[0] != 0).any()) and bool((flat[3] == 0).any())


# -- mutants ------------------------------------------------------------------------------------------------------------


def no_clip(s: Any) -> None:
    s.w.clip_value = None


def clip_by_norm(s: Any) -> None:
    s.w.clip_value, s.w.clip = None, CLIP


def each_clipped(s: Any) -> None:
    add = s.w.add

    def clipped(loss: Tensor) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in s.w.params]
        s.w.optimizer.zero_grad()
        add(loss)
        clip_grad_value_(s.w.params, CLIP / 4)
        for p, g in zip(s.w.params, before):
            p.grad = g if p.grad is None else p.grad if g is None else p.grad + g

    s.w.add = clipped


def averaged(s: Any) -> None:
    s.combine = "mean"


def all_dropped(s: Any) -> None:
    net = s.net

    class Dropped(nn.Module):
        def forward(self, x: Tensor, arch: Any, drop: float = 0.0) -> Tensor:
            return net(x, arch, s.drop)

    s.net = Dropped()


def never_dropped(s: Any) -> None:
    s.drop = 0.0


def no_smallest(s: Any) -> None:
    s.space.smallest = lambda: s.space.sample(random.Random(1))


def no_largest(s: Any) -> None:
    largest = s.space.largest()
    s.space.largest = lambda: {**largest, "stage5.depth": 2}


def a_step_each(s: Any) -> None:
    add, step = s.w.add, s.w.step

    def down(loss: Tensor) -> None:
        add(loss)
        step(norm=True)

    s.w.add, s.w.step = down, lambda norm: None


def decayed_norms(s: Any) -> None:
    for group in s.w.optimizer.param_groups:
        group["weight_decay"] = 0.03


SHARED = [no_clip, clip_by_norm, each_clipped, averaged, all_dropped, never_dropped, no_smallest, no_largest, a_step_each,
          decayed_norms]  # fmt: skip


@pytest.mark.parametrize("make", [Attentive, AlphaNet])
@pytest.mark.parametrize("mutant", SHARED, ids=lambda mutant: mutant.__name__)
def test_a_mutant_fails(make: Any, mutant: Mutation) -> None:
    def apart(s: Any) -> None:
        s.space = copy.copy(s.space)
        mutant(s)

    with pytest.raises(AssertionError, match=WRONG):
        check(make, mutate=apart)


def worst(s: Any) -> None:
    s.pick = "worst"


def fewer(s: Any) -> None:
    s.candidates = 2


def first_candidate(s: Any) -> None:
    s.attended = lambda batches, rng: s.bins.draw(rng, s.candidates)[0]


def uniform(s: Any) -> None:
    s.bins.draw = lambda rng, k: [s.space.sample(rng) for _ in range(k)]


@pytest.mark.parametrize("mutant", [worst, fewer, first_candidate, uniform], ids=lambda mutant: mutant.__name__)
def test_another_way_to_sample_fails(mutant: Mutation) -> None:
    def apart(s: Any) -> None:
        s.bins = copy.copy(s.bins)
        mutant(s)

    with pytest.raises(AssertionError, match=WRONG):
        check(Attentive, mutate=apart)


def test_a_teacher_that_learns_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses at the same weights, but their gradients reach the largest network: only the weights differ."""
    for module, make, name in ((attentive, Attentive, "soft_cross_entropy"), (alphanet, AlphaNet, "adaptive_divergence")):
        def mutate(s: Any, module: Any = module, name: str = name) -> None:
            def taught(student: Tensor, teacher: Tensor, *more: Any) -> Tensor:
                z = s.net(batch(0).x, s.space.largest())  # with a graph of its own
                assert torch.allclose(z, teacher)
                p, teacher = z.softmax(1), teacher.detach()
                exact = soft_ce(student, teacher) if name == "soft_cross_entropy" else adaptive(student, teacher)
                return exact - ((p - p.detach()) * student.log_softmax(1)).sum(1).mean()

            monkeypatch.setattr(module, name, taught)

        check(make, steps=1, drop=0.0)
        with pytest.raises(AssertionError, match=WRONG):
            check(make, mutate=mutate, steps=1, drop=0.0)
        monkeypatch.undo()


@pytest.mark.parametrize("alphas, clip", [((-1.0, 0.5), 5.0), ((1.0, 1.0), 5.0), ((-1.0, 1.0), 1.01)])
def test_another_divergence_fails(alphas: tuple[float, float], clip: float) -> None:
    def changed(s: Any) -> None:
        s.alphas, s.clip = alphas, clip

    with pytest.raises(AssertionError, match=WRONG):
        check(AlphaNet, mutate=changed)
