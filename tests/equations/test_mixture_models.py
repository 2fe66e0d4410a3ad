"""The models of a mixture: what they are rewarded by (batch statistics, no dropout), and that a run's seed sets them."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.heads import Head
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.mixture import Mixture
from search_spaces.pooling import PoolingResNet
from supernets.pooling import PoolingResNet as Net


def started(seed: int = 1, models: int = 2, drop: float = 0.0) -> Mixture:
    space = PoolingResNet((2, 1), 1, (4, 6))
    net = Net(space, channels=1, classes=10).double()
    net.reset(torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.classifier.weight.mul_(50)  # images are told apart from the start
    if drop:
        Head(drop, 1).attach(net)
    strategy = Mixture(models, weights=Weights(lr=0.01, lr_min=0.01, clip=None))
    torch.manual_seed(seed)
    strategy.start(Setup(net, space, CostTable(net, (8, 8)), CrossEntropy(), None, 4, 2, 40))
    return strategy


def batches() -> Any:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 200, 1, 8, 8, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randint(10, (2, 200), generator=generator)
    return lambda split, *_, **__: Batch(x[int(split == "valid")], y[int(split == "valid")], torch.arange(200))


@pytest.mark.parametrize("drop", [0.0, 0.9])
def test_the_reward_is_read_by_the_statistics_of_its_batch_and_without_dropout(drop: float) -> None:
    strategy, draw = started(drop=drop), batches()
    metrics = strategy.update(draw, moment(0, 4, 2, 5))
    (a, row), = strategy.rewards.items()
    m = next(m for m, count in enumerate(strategy.visits[a]) if count)
    arch = next(arch for arch in map(strategy.space.parse, strategy.space["pooling"].options)
                if strategy.configurations.of(arch) == a)  # fmt: skip
    net = copy.deepcopy(strategy.nets[m])
    x, y, _ = draw("valid")
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        by_batch = (net.train()(x, arch).argmax(1) == y).double().mean().item()
        by_running = (net.eval()(x, arch).argmax(1) == y).double().mean().item()
    assert metrics["valid/top1"] == pytest.approx(by_batch, abs=1e-6) and abs(by_batch - by_running) > 1e-3
    assert row[m] == pytest.approx(0.9 + 0.1 * by_batch, abs=1e-7)


def test_the_seed_of_a_run_sets_its_other_models() -> None:
    first, again, other = started(1), started(1), started(2)
    weights = [torch.cat([p.detach().flatten() for p in strategy.copies[0].parameters()]) for strategy in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
