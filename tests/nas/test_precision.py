"""Precision belongs to the net: what autocast does to its forward, its copies and its weights."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nas.precision import in_precision
from search_spaces.resnet import CifarResNet
from search_spaces.space import Mixture
from supernets.extract import extract
from supernets.resnet import ResNet

SPACE = CifarResNet(8, "tied", widths=(4, 6, 8))
ARCH = SPACE.largest()


def supernet() -> ResNet:
    net = ResNet(SPACE, classes=3)
    net.reset(torch.Generator().manual_seed(1))
    return net


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_float32_is_the_net_itself() -> None:
    net = supernet()
    before = dict(vars(net))
    assert in_precision(net, "float32") is net and vars(net) == before


def test_bfloat16_answers_float32_from_float32_weights() -> None:
    plain, net = supernet(), in_precision(supernet(), "bfloat16")
    z, expected = net(images(), ARCH), plain(images(), ARCH)
    assert z.dtype == torch.float32 and {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.allclose(z, expected, atol=0.05) and not torch.equal(z, expected)
    z.square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_takes_mixtures_and_keywords() -> None:
    net = in_precision(supernet(), "bfloat16")
    w = torch.tensor([0.3, 0.7], requires_grad=True)
    z = net(images(), arch={**ARCH, "stage0.width": Mixture((2, 4), w)}, drop=0.0)
    assert z.dtype == torch.float32 and z.shape == (4, 3)
    z.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32 and bool(w.grad.any())


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_deep_copy_binds_its_own_net(channels_last: bool) -> None:
    net = in_precision(supernet(), "bfloat16", channels_last)
    twin = copy.deepcopy(net)
    z = net(images(), ARCH)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(twin(images(), ARCH), z) and twin(images(), ARCH).dtype == torch.float32
    assert not torch.equal(net(images(), ARCH), z)
    assert twin.forward.__self__ is twin  # type: ignore[attr-defined]


def test_an_update_inside_a_step_is_seen_by_the_next_forward() -> None:
    net = in_precision(supernet(), "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):  # a surrounding context caches casts of whole parameters
        first = net(images(), ARCH)
        with torch.no_grad():
            net.classifier.bias.add_(1.0)  # type: ignore[union-attr, operator]
            net.stem.weight.mul_(-1.0)  # type: ignore[union-attr, operator]
        second = net(images(), ARCH)
    assert not torch.allclose(first + 1.0, second, atol=1e-3)
    assert torch.equal(second, net(images(), ARCH))


def test_channels_last_lays_out_weights_and_images() -> None:
    seen = []
    net = in_precision(supernet(), "float32", channels_last=True)
    net.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # type: ignore[union-attr, operator]
    z = net(images(), ARCH)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]
    assert torch.allclose(z, supernet()(images(), ARCH), atol=1e-5)


def test_extraction_ignores_the_wrapping() -> None:
    net = in_precision(supernet(), "bfloat16").eval()
    graph = extract(net, ARCH, images())
    assert torch.allclose(graph(images()), supernet().eval()(images(), ARCH), atol=1e-6)


def test_a_plain_network_too() -> None:
    graph = extract(supernet(), ARCH, images())
    plain = copy.deepcopy(graph).eval()
    net = in_precision(graph.eval(), "bfloat16")
    z = net(images())
    assert z.dtype == torch.float32 and torch.allclose(z, plain(images()), atol=0.05) and not torch.equal(z, plain(images()))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.allclose(twin(images()), plain(images()), atol=0.05)  # of its own weights, whatever its precision


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"precision = 'float16' is not known\. Allowed: float32, bfloat16"):
        in_precision(supernet(), "float16")
