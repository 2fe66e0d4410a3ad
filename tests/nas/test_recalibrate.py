"""Recalibrated statistics are those of torch.nn.BatchNorm2d(momentum=None), reset, on the extracted network."""
from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nas.recalibrate import install, recalibrate
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, Mixture
from supernets.extract import extract
from supernets.resnet import ResNet


def supernet() -> ResNet:
    net = ResNet(CifarResNet(14, "tied", widths=(4, 6, 8)), classes=3).double()
    net.reset(torch.Generator().manual_seed(1))
    return net


def archs(n: int) -> list[Arch]:
    rng = random.Random(2)
    return [supernet().space.sample(rng) for _ in range(n)]


def images(batches: int = 3) -> list[Tensor]:
    """Batches of unequal size and scale, so that a mean over batches is not a mean over images."""
    generator = torch.Generator().manual_seed(4)
    return [(1 + i) * torch.randn(5 - i, 3, 8, 8, generator=generator, dtype=torch.float64) for i in range(batches)]


def test_it_is_reset_and_cumulative_on_the_plain_net() -> None:
    net, found = supernet(), archs(3)
    for arch, statistics in zip(found, recalibrate(net, found, images())):
        plain = extract(net, arch, images()[0]).train()
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        for x in images():
            plain(x)
        norms = {path: module for path, module in plain.named_modules() if isinstance(module, nn.BatchNorm2d)}
        assert norms.keys() == statistics.keys() and len(norms) > 3
        for path, (mean, var) in statistics.items():
            assert torch.allclose(mean, norms[path].running_mean, rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]
            assert torch.allclose(var, norms[path].running_var, rtol=1e-12, atol=1e-14)  # type: ignore[arg-type]
        install(net, statistics)
        assert torch.allclose(net.eval()(images()[1], arch), plain.eval()(images()[1]), rtol=1e-10, atol=1e-12)


def test_many_subnets_in_one_pass_are_many_passes() -> None:
    net, found, read = supernet(), archs(3), []

    def batches() -> Iterator[Tensor]:
        for i, x in enumerate(images()):
            read.append(i)
            yield x

    together = recalibrate(net, found, batches())
    assert read == [0, 1, 2]
    for arch, statistics in zip(found, together):
        (alone,) = recalibrate(net, [arch], images())
        assert alone.keys() == statistics.keys()
        assert all(torch.equal(a, b) for path in alone for a, b in zip(alone[path], statistics[path]))
    assert any(together[0].keys() != other.keys() or not torch.equal(together[0]["stem.norm"][0], other["stem.norm"][0])
               for other in together[1:])


@pytest.mark.parametrize("training", [True, False])
def test_the_net_is_left_as_it_was(training: bool) -> None:
    net = supernet().train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recalibrate(net, archs(2), images())
    assert net.training is training and all(module.training is training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_hooks_and_mode_are_restored_after_a_failure() -> None:
    net = supernet().eval()
    with pytest.raises(RuntimeError):
        recalibrate(net, archs(1), [images()[0], torch.zeros(2, 9, 8, 8, dtype=torch.float64)])
    assert not net.training and not any(module._forward_pre_hooks for module in net.modules())


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="recalibration was given no batches: name a split with images"):
        recalibrate(supernet(), archs(1), [])
    assert recalibrate(supernet(), [], images()) == []


def test_installing_leaves_the_other_channels_alone() -> None:
    net = supernet()
    net.stem.norm.running_mean.fill_(7.0)  # type: ignore[union-attr]
    install(net, {"stem.norm": (torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double())})
    assert net.stem.norm.running_mean.tolist() == [1.0, 2.0, 7.0, 7.0]  # type: ignore[union-attr]
    assert net.stem.norm.running_var.tolist() == [3.0, 4.0, 1.0, 1.0]  # type: ignore[union-attr]


def test_a_mixture_has_statistics_of_its_own() -> None:
    """Convolved once at the widest candidate, so statistics are those of the widest."""
    net = supernet()
    wide = net.space.largest()
    pair = Mixture((2, 4), torch.tensor([0.5, 0.5], dtype=torch.float64))
    (hard, mixed) = recalibrate(net, [wide, {**wide, "stage0.width": pair}], images())
    assert torch.equal(hard["stem.norm"][0], mixed["stem.norm"][0])
    assert not torch.equal(hard["stages.0.0.conv0.norm"][0], mixed["stages.0.0.conv0.norm"][0])


def test_half_precision_features_are_summed_in_float32() -> None:
    net = supernet().float()
    x = [x.float() for x in images()]
    with torch.autocast("cpu", torch.bfloat16):
        (low,) = recalibrate(net, [net.space.largest()], x)
    (full,) = recalibrate(net, [net.space.largest()], x)
    for path, (mean, var) in low.items():
        assert mean.dtype == var.dtype == torch.float32
        assert torch.allclose(var, full[path][1], rtol=0.1, atol=1e-3), path
