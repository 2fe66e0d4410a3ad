"""Who judges a path in training mode, by the statistics of its own batches, judges it without dropout."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nas.bilevel import undropped
from nas.cost import CostTable
from nas.engine import moment
from nas.evaluate import score_archs
from nas.losses import CrossEntropy, top1
from nas.protocols import Batch, Setup
from nas.strategies.random import Random
from nas.strategies.rsps import RSPS
from search_spaces.macro import ConvMacro as Space
from supernets.macro import ConvMacro

STEPS = 2


def images(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 1, 12, 12, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(4, (64,), generator=generator), torch.arange(64))


class Images:
    """The same two batches, whoever asks."""

    classes = tuple("abcd")

    def batches(self, split: str, device: torch.device, limit: int | None = None) -> Iterator[Batch]:
        yield from (images(0), images(1))

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        return images()


@pytest.fixture
def net() -> ConvMacro:
    space = Space(((3, 4),) * 4, (3,), features=6, hidden=(6,), image=12, drop=0.5)
    net = ConvMacro(space, channels=1, classes=4).double().train()
    net.reset(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)  # at PyTorch's start a chain without norms is almost deaf
    return net


def started(strategy: Any, net: ConvMacro) -> Any:
    strategy.start(Setup(net, net.space, CostTable(net, (12, 12)), CrossEntropy(), None, STEPS, STEPS, 64))
    return strategy


def test_dropout_alone_rests_and_comes_back(net: ConvMacro) -> None:
    """In a net of any mode, after an error too."""
    assert net.dropout5 is not None
    net.dropout5.eval()
    before = {name: module.training for name, module in net.named_modules()}
    for error in (False, True):
        try:
            with undropped(net):
                off = {name for name, module in net.named_modules() if not module.training}
                assert off == {"dropout3", "dropout5"}
                assert torch.equal(net(images().x, net.space.largest()), net(images().x, net.space.largest()))
                if error:
                    raise KeyError
        except KeyError:
            assert error
        assert {name: module.training for name, module in net.named_modules()} == before
    mixed = nn.Sequential(nn.Dropout(), nn.AlphaDropout(), nn.BatchNorm2d(2))
    with undropped(mixed):
        assert [module.training for module in mixed] == [False, False, True]


def test_with_dropout_a_verdict_changes_by_chance(net: ConvMacro) -> None:
    """What the tests below would see."""
    (x, y, _), arch = images(), net.space.largest()
    torch.manual_seed(0)
    assert len({float(top1(net(x, arch), y)) for _ in range(4)}) > 1


def test_rsps_judges_equally(net: ConvMacro) -> None:
    strategy, now = started(RSPS(archs=4, batches=1), net), [moment(1, STEPS, STEPS, 3) for _ in range(4)]
    torch.manual_seed(0)
    found = [(strategy.select(Images(), at)["valid/top1"], strategy.architecture()) for at in now]
    assert found == found[:1] * 4
    assert all(module.training for module in net.modules())


def test_random_judges_equally(net: ConvMacro) -> None:
    strategy = started(Random(trials=2, judge=1), net)
    torch.manual_seed(0)
    assert len({float(strategy.finish(Images())["valid/top1"]) for _ in range(4)}) == 1
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("training", [True, False])
def test_scores_by_batch_are_equal(net: ConvMacro, training: bool) -> None:
    net.train(training)
    torch.manual_seed(0)
    one, two = score_archs(net, [net.space.largest()] * 2, Images(), "select", torch.device("cpu"), bn="batch")  # type: ignore[arg-type]
    assert one == two and one.n == 128
    assert all(module.training is training for module in net.modules())
