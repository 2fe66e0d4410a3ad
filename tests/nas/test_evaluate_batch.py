"""Scores by the statistics of each batch: equal, mixed batches, and nothing written."""
from __future__ import annotations

import copy
import random

import pytest
import torch

from nas.data import Data, Split
from nas.evaluate import mixed_batches, score, score_archs
from search_spaces.resnet import CifarResNet
from supernets.resnet import ResNet

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Data:
    return Data("digits", batch_size=16, valid_fraction=0.5, limit=200)  # 100 images of valid


@pytest.fixture(scope="module")
def by_class(data: Data) -> Data:
    """The same with the images of valid class by class, as a folder lists them."""
    images, rows, labels = data.splits["valid"]
    order = labels.argsort(stable=True)
    data = copy.copy(data)
    data.splits = {**data.splits, "valid": Split(images, rows[order], labels[order])}
    return data


def test_batches_are_equally_large_and_mix_the_classes(by_class: Data) -> None:
    assert [len(set(batch.y.tolist())) for batch in by_class.batches("select", CPU)][:2] == [2, 3]
    mixed = list(mixed_batches(by_class, "select", CPU))
    assert [len(batch.x) for batch in mixed] == [16] * 6 and min(len(set(batch.y.tolist())) for batch in mixed) >= 5
    pool = {image.numpy().tobytes(): int(y) for batch in by_class.batches("valid", CPU) for image, y in zip(batch.x, batch.y)}
    found = {image.numpy().tobytes(): int(y) for batch in mixed for image, y in zip(batch.x, batch.y)}
    assert len(found) == 96 and found.items() <= pool.items()  # other places, the same images with their labels
    again = list(mixed_batches(by_class, "select", CPU))
    assert all(torch.equal(a.x, b.x) for a, b in zip(mixed, again))
    assert [len(batch.x) for batch in mixed_batches(by_class, "select", CPU, limit=40)] == [16, 16]
    assert [len(batch.x) for batch in mixed_batches(by_class, "select", CPU, limit=10)] == [10]


@pytest.mark.parametrize("training", [True, False])
def test_each_batch_is_normalised_by_itself(data: Data, training: bool) -> None:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=10).train(training)
    net.reset(torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    archs = [space.sample(random.Random(seed)) for seed in range(3)]
    found = score_archs(net, archs, data, "select", CPU, bn="batch")
    assert all(module.training is training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.train()
    for arch, scores in zip(archs, found):
        assert scores == score(lambda x, a=arch: net(x, a), mixed_batches(data, "select", CPU), 10)  # type: ignore[misc]
        assert scores.n == 96
    assert len({scores.loss for scores in found}) == 3
    assert found != score_archs(net, archs, data, "select", CPU)


def test_other_modes_are_refused(data: Data) -> None:
    net = ResNet(CifarResNet(8, "tied", widths=(4, 6, 8)), channels=1, classes=10)
    with pytest.raises(ValueError, match=r"bn = 'none' is not known. Allowed: recalibrated, batch"):
        score_archs(net, [net.space.largest()], data, "select", CPU, bn="none")
    with pytest.raises(ValueError, match="split 'select' holds no image"):
        score_archs(net, [net.space.largest()], Data("digits", batch_size=64, limit=100), "select", CPU, bn="batch")
    assert net.training
