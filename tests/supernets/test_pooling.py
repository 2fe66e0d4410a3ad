"""The pooling supernet against a network written down by hand, and what a placement costs (page pooling-mixture.md, sections 1
and 5)."""
from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.cost import CostTable, macs, params
from search_spaces.pooling import POOLING, PoolingResNet
from supernets import pooling as supernets
from supernets.extract import extract


def net(*arguments: object, classes: int = 10) -> supernets.PoolingResNet:
    made = supernets.PoolingResNet(PoolingResNet(*arguments), classes=classes)  # type: ignore[arg-type]
    made.reset(torch.Generator().manual_seed(1))
    return made


def by_hand(weights: dict[str, Tensor], x: Tensor, widths: list[int], at: tuple[int, ...]) -> Tensor:
    """Section 1, in training: batch norms without scale and shift."""

    def conv(name: str, x: Tensor) -> Tensor:
        w = weights[f"{name}.weight.0"]
        z = F.conv2d(x, w, padding=w.shape[2] // 2)
        mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), unbiased=False, keepdim=True)
        return (z - mean) / (var + 1e-5).sqrt()

    x = conv("stem", x).relu()
    for unit, (c_in, c) in enumerate(itertools.pairwise(widths), 1):
        if unit in at:
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
        y = conv(f"blocks.{unit - 1}.conv1", conv(f"blocks.{unit - 1}.conv0", x).relu())
        x = (y + (conv(f"blocks.{unit - 1}.shortcut", x) if c != c_in else x)).relu()
    return F.linear(x.mean((2, 3)), weights["classifier.weight"], weights["classifier.bias"])


def test_the_network_is_that_of_the_page() -> None:
    made = net((2, 1, 1), 2, (4, 6, 8)).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = {name: p.detach() for name, p in made.named_parameters()}
    for option in made.space.choices[0].options:
        z = by_hand(weights, x, [4, 4, 4, 6, 8], made.space.places(option))  # type: ignore[operator]
        assert torch.allclose(made(x, {POOLING: option}), z, atol=1e-10)
    default = net()
    shapes = {name: tuple(p.shape) for name, p in default.named_parameters()}
    assert [n for n in shapes if "shortcut" in n] == ["blocks.3.shortcut.weight.0", "blocks.6.shortcut.weight.0"]
    assert sum(p.numel() for p in default.parameters()) == 270_906 and not any("norm" in name for name in shapes)


def test_all_placements_have_the_same_parameters_and_later_poolings_cost_more() -> None:
    """Page, check 7; the most and the least by hand: 9 c_in c_out H W of every convolution."""
    made = net()
    costs, sizes = CostTable(made, (32, 32), macs), CostTable(made, (32, 32), params)
    space = made.space
    archs = [space.numbered(i) for i in range(1, 37)]  # type: ignore[operator]
    assert len({sizes.of(arch) for arch in archs}) == 1
    by_places = {space.places(arch[POOLING]): costs.of(arch) for arch in archs}  # type: ignore[operator]
    later = 0
    for at, cost in by_places.items():
        for i in (0, 1):
            moved = tuple(place + (j == i) for j, place in enumerate(at))
            if moved in by_places:
                assert by_places[moved] > cost
                later += 1
    assert later == 56 and costs.of(space.largest()) == max(by_places.values()) == by_places[8, 9]
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]

    def counted(at: tuple[int, ...]) -> int:
        total = 9 * 3 * 16 * 32**2 + 64 * 10
        for unit, (c_in, c) in enumerate(itertools.pairwise(widths), 1):
            pixels = (32 >> sum(place <= unit for place in at)) ** 2
            total += (9 * c_in * c + 9 * c * c + (c_in * c if c != c_in else 0)) * pixels
        return total

    assert all(by_places[at] == counted(at) for at in by_places)
    assert by_places[4, 7] == 40_813_184


def test_plain_networks_pool_where_they_should_and_have_ordinary_norms() -> None:
    made = net((2, 1, 1), 2, (4, 6, 8), classes=4).eval()
    x = torch.randn(2, 3, 16, 16)
    for option in ("1-1-3", "3-1-1"):
        plain = extract(made, {POOLING: option}, x)
        assert torch.allclose(plain(x), made(x, {POOLING: option}), atol=1e-5)
        calls = [str(node.target) for node in plain.graph.nodes if node.op == "call_module" and "norm" not in str(node.target)]
        before = [calls[i + 1].split(".")[1] for i, name in enumerate(calls) if name == "pool"]
        assert before == [str(place - 1) for place in made.space.places(option)]  # type: ignore[operator]
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.affine and norm.track_running_stats for norm in norms)


def test_images_too_small_for_the_poolings_are_refused() -> None:
    made = net((2, 1, 1), 3, (4, 6, 8))
    assert made.layers((8, 9))
    with pytest.raises(ValueError, match=r"images of 32x7: 3 poolings leave nothing of them\. Give larger images") as error:
        made.layers((32, 7))
    assert "\n" not in str(error.value)
    odd, x = net((2, 1, 1), 2, (4, 6, 8)), torch.zeros(2, 3, 9, 11)
    plain = extract(odd, odd.space.smallest(), x, inherit=False)
    assert plain(x).shape == (2, 10)
