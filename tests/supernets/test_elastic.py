"""Leaves by themselves: slices of concatenated inputs, costs a segment, refusals."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.bundle import counted
from nas.cost import activations, macs, params
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Choice, Mixture, SearchSpace
from supernets.elastic import ElasticConv, ElasticLinear


class Two(SearchSpace):
    def __init__(self) -> None:
        super().__init__([Choice("a", (2, 3, 5)), Choice("b", (1, 4)), Choice("c", (2, 6))], {})


def width(name: str, full: int, repeat: int = 1) -> Segment:
    return Segment(Size((name,), lambda v: v), full, repeat)


CONCATENATED = (width("a", 5), width("b", 4))


def total(layers: list, price, arch: dict) -> int:
    shapes = [(layer.op, layer.shape(*(arch[name] for name in layer.on))) for layer in layers]
    return sum(price(op, shape) for op, shape in shapes)


@pytest.mark.parametrize("arch", [{"a": 2, "b": 4, "c": 2}, {"a": 5, "b": 1, "c": 6}])
def test_convolution_of_a_concatenation(arch: dict) -> None:
    leaf = ElasticConv(Two(), CONCATENATED, width("c", 6), 3).double()
    x = torch.randn(2, arch["a"] + arch["b"], 4, 4, dtype=torch.float64)
    kept = [*range(arch["a"]), *range(5, 5 + arch["b"])]  # the second segment starts behind the full first
    z = torch.nn.functional.conv2d(x, leaf.weight[: arch["c"]][:, kept], padding=1)
    expected = (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(leaf(x, arch), expected, atol=1e-12)
    plain = leaf.plain(arch, x.shape[1])
    assert torch.allclose(plain(x), leaf(x, arch), atol=1e-12)
    found = counted(plain, x)
    records = leaf.layers((4, 4))
    assert [record.op for record in records] == ["conv", "more", "norm"]
    assert all(len(record.on) <= 2 for record in records)
    assert (total(records, macs, arch), total(records, params, arch)) == found
    assert total(records, activations, arch) == arch["c"] * 16


def test_linear_after_a_flatten_of_two_segments() -> None:
    arch = {"a": 3, "b": 4, "c": 2}
    leaf = ElasticLinear((width("a", 5, repeat=4), width("b", 4, repeat=4)), 7)
    x = torch.randn(3, 28)
    kept = [*range(12), *range(20, 36)]
    assert torch.equal(leaf(x, arch), torch.nn.functional.linear(x, leaf.weight[:, kept], leaf.bias))
    plain = leaf.plain(arch, 28)
    assert isinstance(plain, nn.Linear) and torch.equal(plain(x), leaf(x, arch))
    records = leaf.layers((1, 1))
    assert total(records, macs, arch) == 28 * 7
    assert total(records, params, arch) == 28 * 7 + 7
    assert total(records, activations, arch) == 7


def test_a_width_without_a_norm_is_refused() -> None:
    leaf = ElasticConv(Two(), (Segment(fixed(3), 3),), width("c", 6))
    leaf.name = "stem"
    with pytest.raises(ValueError, match=r"stem: width 4 has no batch norm.*Allowed: 2, 6"):
        leaf(torch.randn(2, 3, 4, 4), {"c": 4})
    with pytest.raises(ValueError, match="idle='gate'"):
        leaf(torch.randn(2, 3, 4, 4), {"c": Mixture((2, 6), torch.ones(2), (0,), "gate")})
    with pytest.raises(ValueError, match=r"mixing = 'mean' is not known. Allowed: interpolate, sum"):
        ElasticConv(Two(), (Segment(fixed(3), 3),), width("c", 6), mixing="mean")
    with pytest.raises(ValueError, match=r"norm = 'group' is not known"):
        ElasticConv(Two(), (Segment(fixed(3), 3),), width("c", 6), norm="group")
