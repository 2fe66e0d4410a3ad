"""Steps of several batches (``Weights.accumulate``) in float64, for every strategy that takes them: as one large batch where
the net looks at each image alone, as the literal loop where batch norms look at their batch; and mutants that must fail.
"""
from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas import checkpoint, ranks
from nas.beside import Beside
from nas.bilevel import Weights, weights_of
from nas.build import gather
from nas.cost import CostTable
from nas.data import Data
from nas.descent import Descent
from nas.engine import moment
from nas.losses import CrossEntropy, means
from nas.protocols import Batch, Setup
from nas.strategies.alphanet import AlphaNet
from nas.strategies.attentive import Attentive
from nas.strategies.bignas import BigNAS
from nas.strategies.darts import DARTS
from nas.strategies.deps import DepS
from nas.strategies.drnas import DrNAS
from nas.strategies.fairnas import FairNAS
from nas.strategies.gdas import GDAS
from nas.strategies.ofa import OFA, Phase
from nas.strategies.plain import Plain
from nas.strategies.proxyless import Proxyless
from nas.strategies.random import Random
from nas.strategies.rarts import RARTS
from nas.strategies.rsps import RSPS
from nas.strategies.snas import SNAS
from nas.strategies.spos import SPOS
from nas.strategies.tangle import Tangle
from search_spaces import nats
from search_spaces.resnet import CifarResNet
from search_spaces.vit import ViT as Tokens
from supernets.nats import Topology
from supernets.resnet import ResNet
from supernets.vit import ViT

STEPS, EPOCH_STEPS, SEED, B, CLASSES, WRONG = 4, 2, 3, 4, 5, "WRONG"
LOSS = CrossEntropy(label_smoothing=0.1)
FAIR = {"depth": (2,)}  # two options in every other choice, all of which count
PHASES = [Phase("full", 1, 1.0, nets=2), Phase("all", 3, 0.5, {"*": 9}, nets=3)]
Mutation = Callable[[Any], Any]

MAKES: dict[str, Callable[[Weights], Any]] = {
    "spos": lambda w: SPOS(w), "rsps": lambda w: RSPS(2, 1, w), "fairnas": lambda w: FairNAS("sum", w),
    "fairnas-mean": lambda w: FairNAS("mean", w), "bignas": lambda w: BigNAS(2, 0.0, weights=w),
    "bignas-mean": lambda w: BigNAS(1, 0.0, "mean", w),
    "attentive": lambda w: Attentive(2, 8, "best", "8%", 500, drop=0.0, weights=w),
    "attentive-worst": lambda w: Attentive(2, 8, "worst", "8%", 500, drop=0.0, combine="mean", weights=w),
    "alphanet": lambda w: AlphaNet(drop=0.0, weights=w),
    "alphanet-mean": lambda w: AlphaNet(1, drop=0.0, combine="mean", weights=w),
    "ofa": lambda w: OFA(PHASES, drop=0.0, weights=w), "ofa-mean": lambda w: OFA(PHASES, drop=0.0, combine="mean", weights=w),
    "deps": lambda w: DepS("50%", "25%", drop=0.0, protect=None, weights=w),
    "deps-mean": lambda w: DepS("50%", "25%", drop=0.0, combine="mean", protect=None, weights=w),
}  # fmt: skip


def weights(accumulate: int) -> Weights:
    """A clip that acts on the whole step, and a rate that falls at every one."""
    return Weights(0.1, 0.01, 0.9, nesterov=True, weight_decay=0.02, clip=0.7, per_epoch=False, accumulate=accumulate)


def tokens() -> nn.Module:
    """Layer norms look at each image alone."""
    return ViT(Tokens((4, 8), (1, 2), (1, 2), (1, 2), 4, 4, 8), 1, CLASSES)


def resnet() -> nn.Module:
    """Batch norms, in training of the batch alone."""
    return ResNet(CifarResNet(14, "tied", widths=(4, 6, 8)), 1, CLASSES, norm="shared")


def started(name: str, accumulate: int, make_net: Callable[[], nn.Module] = tokens) -> Any:
    net: Any = make_net().double()
    net.reset(torch.Generator().manual_seed(1))
    with torch.no_grad():  # zero scales would hide what is behind them
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    space = net.space.restrict(FAIR) if name.startswith("fairnas") else net.space
    strategy = MAKES[name](weights(accumulate))
    strategy.start(Setup(net, space, CostTable(net, (8, 8)), LOSS, None, STEPS, EPOCH_STEPS, B))
    return strategy


class Feed:
    """Batch n of a run, of as many ``parts`` joined. What is read for picks is one part that no run trains on."""

    def __init__(self, parts: int = 1, n: int = 0) -> None:
        self.parts, self.n = parts, n

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        if split == "select":
            return part(1000)
        self.n += self.parts
        x, y, index = zip(*map(part, range(self.n - self.parts, self.n)))
        return Batch(torch.cat(x), torch.cat(y), torch.cat(index))


def part(n: int) -> Batch:
    noise = torch.Generator().manual_seed(100 + n)
    x = torch.randn(B, 1, 8, 8, generator=noise, dtype=torch.float64)
    return Batch(x, torch.randint(CLASSES, (B,), generator=noise), torch.arange(B))


def at(step: int) -> Any:
    return moment(step, STEPS, EPOCH_STEPS, SEED)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any], one: Any, other: Any) -> None:
    assert found.keys() == expected.keys(), WRONG
    for tag in found:  # the share of right images is kept in float32
        assert float(found[tag]) == pytest.approx(float(expected[tag]), rel=1e-6 if "top1" in tag else 1e-11, abs=1e-12), WRONG
    for p, q in zip(one.net.parameters(), other.net.parameters()):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12), WRONG


def check_joined(name: str, k: int = 2, mutate: Mutation = lambda strategy: None) -> None:
    """AssertionError, saying WRONG, where steps of ``k`` batches are not those of one batch ``k`` times as large."""
    one, other = started(name, k), started(name, 1)
    mutate(one)
    parts, joined = Feed(), Feed(k)
    before = [p.detach().clone() for p in one.net.parameters()]
    for step in range(STEPS):
        assert_same(one.update(parts, at(step)), other.update(joined, at(step)), one, other)
    assert parts.n == k * STEPS and (one.w.count, one.w.calls) == (STEPS, k * STEPS), WRONG
    assert one.passes() == k * other.passes(), WRONG
    moved = [not torch.equal(p, q) for p, q in zip(before, one.net.parameters())]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", MAKES)
def test_parts_are_one_large_batch(name: str, k: int) -> None:
    check_joined(name, k)


# -- where norms look at their batch ------------------------------------------------------------------------------------


class Literal:
    """The loop in so many words: for each batch the gradients of a step on that batch alone, by a strategy that accumulates
    nothing; their mean; one step of the descent."""

    def __init__(self, name: str, k: int) -> None:
        self.k, self.strategy = k, started(name, 1, resnet)

    def step(self, step: int) -> dict[str, Tensor]:
        told, found = [], []
        if isinstance(self.strategy, DepS) and step == self.strategy.switch:
            self.strategy.sort()
        for j in range(self.k):
            alone = copy.deepcopy(self.strategy)
            alone.sort = lambda: None  # done
            alone.w.step = lambda norm=False, w=alone.w: setattr(w, "norm", torch.zeros(()))
            told.append(alone.update(Feed(n=step * self.k + j), at(step)))
            found.append([p.grad for p in alone.w.params])
        w = self.strategy.w
        for p, gradients in zip(w.params, zip(*found)):
            some = [g for g in gradients if g is not None]
            p.grad = sum(some) / self.k if some else None
        w.step(norm=True)
        same = {tag: sum(torch.as_tensor(each[tag], dtype=torch.float64) for each in told) / self.k for tag in told[0]}
        return {**same, "train/grad_norm": w.grad_norm}


PATHS = ["spos", "rsps", "bignas", "alphanet-mean", "deps-mean"]  # of the others batches choose, or phases begin anew


@pytest.mark.parametrize("name", PATHS)
def test_with_batch_norms_parts_are_the_literal_loop(name: str) -> None:
    strategy, literal = started(name, 3, resnet), Literal(name, 3)
    for step in range(2):
        found = strategy.update(Feed(n=3 * step), at(step))
        assert_same(found, literal.step(step), strategy, literal.strategy)


def test_batch_norms_tell_parts_from_one_batch() -> None:
    one, other = started("spos", 2, resnet), started("spos", 1, resnet)
    one.update(Feed(), at(0)), other.update(Feed(2), at(0))
    assert any(not torch.allclose(p, q, atol=1e-6) for p, q in zip(one.net.parameters(), other.net.parameters()))


# -- mutants ------------------------------------------------------------------------------------------------------------


def undivided(s: Any) -> None:
    add = s.w.add
    s.w.add = lambda loss: add(s.w.accumulate * loss)


def divided_twice(s: Any) -> None:
    add = s.w.add
    s.w.add = lambda loss: add(loss / s.w.accumulate)


def a_step_each(s: Any) -> None:
    s.w.accumulate = 1


def the_same_batch_again(s: Any) -> None:
    update = s.update

    def again(draw: Feed, now: Any) -> Any:
        batches = [draw("train") for _ in range(s.weights.accumulate)]
        return update(lambda split, **more: batches[0] if split == "train" else draw(split, **more), now)

    s.update = again


def another_architecture(s: Any) -> None:
    """After the first batch of a step others stand in for those that are sampled."""
    update, seen, space = s.update, list[Tensor](), s.net.space

    def forward(net: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, arch, *more = given
        if torch.is_grad_enabled() and x is not seen[0] and arch not in (space.largest(), space.smallest()):
            arch = space.restrict({"embed": [4 if arch["embed"] == 8 else 8]}).largest()
        return (x, arch, *more)

    def watched(draw: Feed, now: Any) -> Any:
        del seen[:]

        def noted(split: str, **more: Any) -> Batch:
            batch = draw(split, **more)
            seen.append(batch.x)
            return batch

        return update(noted, now)

    s.update = watched
    s.net.register_forward_pre_hook(forward)


MUTANTS = [undivided, divided_twice, a_step_each, the_same_batch_again, another_architecture]


EACH = ["spos", "rsps", "fairnas", "bignas", "attentive", "alphanet", "ofa", "deps"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("name", EACH)
def test_a_mutant_fails(name: str, mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check_joined(name, mutate=mutant)


@pytest.mark.parametrize("name", EACH)
def test_telling_the_last_batch_alone_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[type(MAKES[name](weights(2))).__module__], "means", lambda parts: parts[-1])
    with pytest.raises(AssertionError, match=WRONG):
        check_joined(name)


@pytest.mark.parametrize("name", ["attentive", "attentive-worst"])
@pytest.mark.parametrize("which", [0, -1])
def test_candidates_are_judged_by_all_batches(name: str, which: int) -> None:
    """What the first or the last batch alone would choose fails."""

    def by_one(s: Any) -> None:
        attended = s.attended
        s.attended = lambda batches, rng: attended([batches[which]], rng)

    with pytest.raises(AssertionError, match=WRONG):
        check_joined(name, 3, by_one)


# -- a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
def test_a_run_goes_on_where_it_was(name: str) -> None:
    one = started(name, 2)
    for step in range(2):
        one.update(Feed(n=2 * step), at(step))
    file = io.BytesIO()
    torch.save(checkpoint.state_of(one), file)
    file.seek(0)
    other = started(name, 2)
    other.update(Feed(n=50), at(0))  # a state of its own, to be overwritten
    checkpoint.restore(other, torch.load(file, weights_only=True))
    for step in range(2, STEPS):
        told = [s.update(Feed(n=2 * step), at(step)) for s in (one, other)]
        assert {tag: float(value) for tag, value in told[0].items()} == {tag: float(value) for tag, value in told[1].items()}
    assert all(torch.equal(p, q) for p, q in zip(one.net.parameters(), other.net.parameters()))


def test_plain_tells_means_too() -> None:
    nets = [copy.deepcopy(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    one, other = Plain(accumulate=2, schedule="cosine"), Plain(schedule="cosine")
    for strategy, net in zip((one, other), nets):
        strategy.start(Setup(net, None, None, LOSS, None, STEPS, EPOCH_STEPS, B))
    parts, joined = Feed(), Feed(2)
    for step in range(STEPS):
        assert_same(one.update(parts, at(step)), other.update(joined, at(step)), one, other)


def test_means() -> None:
    parts = [{"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, {"a": torch.tensor(4.0), "b": torch.tensor(1.5)}]
    assert {tag: value.item() for tag, value in means(parts).items()} == {"a": 2.5, "b": 1.0}
    assert means(parts[:1]) is parts[0]


def test_an_epoch_is_every_image_once() -> None:
    data = Data("digits", batch_size=10, limit=200, valid_fraction=0.5)
    net = ResNet(CifarResNet(8, widths=(2, 3, 4)), 1, 10)

    def built(strategy: Any) -> Any:
        return gather(data, net, strategy, LOSS, epochs=3, seed=1, device=torch.device("cpu"), group=ranks.Ranks(0, 1, 0, True))

    assert [built(s).setup[5:7] for s in (SPOS(), SPOS(weights(2)), SPOS(weights(3)), SPOS(weights(99)))] == [
        (30, 10), (15, 5), (9, 3), (3, 1)]  # fmt: skip
    strategy, feed, seen = SPOS(weights(2)), data.feed(1, "cpu"), list[Tensor]()
    setup = built(strategy).setup
    strategy.start(setup)

    def draw(split: str, **more: Any) -> Batch:
        batch = feed(split, **more)
        seen.append(batch.index)
        return batch

    for step in range(setup.epoch_steps):
        strategy.update(draw, moment(step, setup.steps, setup.epoch_steps, SEED))
    assert sorted(torch.cat(seen).tolist()) == list(range(data.count("train"))) and strategy.w.count == setup.epoch_steps


# -- who takes one batch ------------------------------------------------------------------------------------------------



@pytest.mark.parametrize("make", [DARTS, RARTS, SNAS, GDAS, Proxyless, DrNAS, Random, Tangle], ids=lambda make: make.__name__)
def test_others_refuse_in_one_line(make: Any) -> None:
    net: Any = Topology(nats.Topology(4, 1), 1, CLASSES)
    setup = Setup(net, net.space, CostTable(net, (8, 8)), LOSS, None, 40, EPOCH_STEPS, B)
    make(weights=weights(1)).start(setup)
    with pytest.raises(ValueError, match=r"^weights: accumulate = 3, but here a step is one batch .* Allowed: 1, [^\n]*$"):
        make(weights=weights(3)).start(setup)


def test_too_few_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights: accumulate = 0 is too few\. Allowed: 1 or more"):
        weights(0)


def test_random_search_beside_it_asks_for_weights_of_its_own() -> None:
    strategy = started("spos", 2)
    assert weights_of(strategy) == weights(2) and weights_of(Plain()) is None
    built: Any = type("Built", (), {"setup": strategy.setup})
    assert Beside(0).length(built, strategy) == 0
    with pytest.raises(ValueError, match=r"^beside\.weights \(the strategy's, where not given\): accumulate = 2"):
        Beside(2).length(built, strategy)
    assert Beside(2, weights(1)).length(built, strategy) == STEPS  # of 2 STEPS passes


def test_a_descent_of_weights_accumulates_only_where_told() -> None:
    setup = Setup(None, None, None, LOSS, None, STEPS, EPOCH_STEPS, B)
    params = [nn.Parameter(torch.ones(2))]
    assert weights(3).descent(params, setup, accumulates=True).accumulate == 3
    assert isinstance(weights(1).descent(params, setup), Descent)
