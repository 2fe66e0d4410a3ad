"""Scores by hand: per class, over uneven batches, of plain networks and of subnets with their own statistics."""
from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from nas.data import Data
from nas.evaluate import score, score_archs, score_plain, statistics_of
from nas.protocols import Batch
from nas.recalibrate import install, recalibrate
from search_spaces.resnet import CifarResNet
from search_spaces.space import Setting
from supernets.extract import extract
from supernets.resnet import ResNet

CPU = torch.device("cpu")
Z = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 0.0, 1.0], [0.0, 0.0, 4.0], [1.0, 0.0, 0.0]])
Y = torch.tensor([0, 1, 2, 2, 0])


def batches(*sizes: int, soft: bool = False) -> list[Batch]:
    y = torch.eye(3)[Y] if soft else Y
    return [Batch(z, t, t) for z, t in zip(Z.split(sizes), y.split(sizes))]


def test_scores_by_hand() -> None:
    found = score(lambda x: x, batches(5), 4)
    losses = [math.log(sum(math.exp(v) for v in z.tolist())) - z[y].item() for z, y in zip(Z, Y)]
    assert found.top1 == 4 / 5 and found.n == 5
    assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-12)
    assert found.right == (2, 1, 1, 0) and found.count == (2, 1, 2, 0)


@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1), (4, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("soft", [False, True])
def test_an_uneven_last_batch_weighs_its_images(sizes: tuple[int, ...], soft: bool) -> None:
    whole, found = score(lambda x: x, batches(5), 3), score(lambda x: x, batches(*sizes, soft=soft), 3)
    assert found.loss == pytest.approx(whole.loss, rel=1e-12)
    assert found._replace(loss=0.0) == whole._replace(loss=0.0)


def test_soft_labels_cost_their_own_cross_entropy() -> None:
    soft = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.0, 0.2, 0.8], [0.0, 0.0, 1.0], [0.7, 0.1, 0.2]])  # argmax Y
    found = score(lambda x: x, [Batch(z, y, y) for z, y in zip(Z.split(2), soft.split(2))], 3)
    total = sum(q * (math.log(sum(math.exp(v) for v in z)) - z[k])
                for z, y in zip(Z.tolist(), soft.tolist()) for k, q in enumerate(y))  # fmt: skip
    assert found.loss == pytest.approx(total / 5, rel=1e-6)
    assert found._replace(loss=0.0) == score(lambda x: x, batches(5), 3)._replace(loss=0.0)


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no images to evaluate"):
        score(lambda x: x, [], 3)


class Modes(nn.Module):
    """Remembers the modes that it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.modes = nn.Linear(64, 10), []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.linear(x.flatten(1))


@pytest.fixture(scope="module")
def data() -> Data:
    return Data("digits", batch_size=64, valid_fraction=0.2, limit=300)


@pytest.mark.parametrize("training", [True, False])
def test_a_plain_net_runs_in_eval_mode_without_gradient(data: Data, training: bool) -> None:
    net = Modes().train(training)
    found = score_plain(net, data, "valid", CPU)
    assert set(net.modes) == {(False, False)} and net.training is training
    assert found.n == data.count("valid") == sum(found.count) and found.top1 == sum(found.right) / found.n
    assert score_plain(net, data, "valid", CPU, limit=20).n == 20


def test_each_subnet_has_its_own_statistics(data: Data) -> None:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=10)
    net.reset(torch.Generator().manual_seed(1))
    archs = [space.sample(random.Random(seed)) for seed in range(3)]
    found = score_archs(net.train(), archs, data, "valid", CPU, bn_images=150)
    assert net.training and len(found) == 3
    for arch, scores in zip(archs, found):
        (statistics,) = statistics_of(net, [arch], data, CPU, 150)
        install(net, statistics)
        alone = score(lambda x, a=arch: net.eval()(x, a), data.batches("valid", CPU), 10)  # type: ignore[misc]
        assert alone == scores
        net.train()
    assert len({scores.loss for scores in found}) == 3
    last = statistics_of(net, archs[-1:], data, CPU, 150)[0]["stem.norm"][0]
    assert torch.equal(net.stem.norm.running_mean[: len(last)], last)  # type: ignore[union-attr]


@pytest.mark.parametrize("images, batches_read", [(10, 1), (64, 1), (150, 2), (10_000, 4)])
def test_statistics_read_whole_batches_of_the_training_view(data: Data, images: int, batches_read: int) -> None:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=10)
    found = statistics_of(net, [space.largest()], data, CPU, images)
    read = [batch.x for batch in data.batches("train", CPU, augmented=True)][:batches_read]
    assert len(read) == batches_read
    (expected,) = recalibrate(net, [space.largest()], read)
    assert all(torch.equal(found[0][path][0], expected[path][0]) for path in expected)


class Doubled(ResNet):
    """Float64 whatever the images are."""

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        return super().forward(x.double(), arch, drop)


@pytest.mark.parametrize("training", [True, False])
def test_subnets_score_as_the_extracted_networks(data: Data, training: bool) -> None:
    """Each plain network with torch's own cumulative statistics over the same images."""
    net = Doubled(CifarResNet(8, "tied", widths=(8, 12, 16)), channels=1, classes=10).double().train(training)
    net.reset(torch.Generator().manual_seed(1))
    archs = [net.space.smallest(), net.space.sample(random.Random(4)), net.space.largest()]
    found = score_archs(net, archs, data, "select", CPU, bn_images=150)
    assert all(module.training is training for module in net.modules())
    view = [batch.x for batch in data.batches("train", CPU, augmented=True)][:2]
    for arch, scores in zip(archs, found):
        plain = extract(net, arch, view[0]).train()
        for norm in plain.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
                norm.momentum = None
        with torch.no_grad():
            for x in view:
                plain(x)
        theirs = score_plain(plain, data, "select", CPU)
        assert scores._replace(loss=0.0) == theirs._replace(loss=0.0) and scores.n == 60
        assert scores.loss == pytest.approx(theirs.loss, rel=1e-10)
    last = score_plain(extract(net, archs[-1], view[0]), data, "select", CPU)  # its statistics are those that stay
    assert last.loss == pytest.approx(found[-1].loss, rel=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_a_failure_leaves_the_mode_as_it_was(data: Data, training: bool) -> None:
    net = ResNet(CifarResNet(8, "tied", widths=(4, 6, 8)), channels=1, classes=10).train(training)
    with pytest.raises(ValueError, match="split 'select' holds no image"):
        score_archs(net, [net.space.largest()], Data("digits", batch_size=64, limit=100), "select", CPU)
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(3, 10)).train(training)
    with pytest.raises(RuntimeError):
        score_plain(wrong, data, "valid", CPU)
    assert all(module.training is training for module in (*net.modules(), *wrong.modules()))
