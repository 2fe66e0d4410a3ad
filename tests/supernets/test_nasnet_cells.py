"""Skeleton and cells of NASNet: who reads what, the operations layer by layer, combinations, restrictions, extraction."""
from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces.nasnet import NASNET_A, OPS
from search_spaces.nasnet import NASNet as Space
from search_spaces.sizes import fixed
from search_spaces.space import Arch
from supernets.extract import extract, training_form
from supernets.nasnet import NASNet, Plan, planned
from supernets.nasnet_operations import Branch, Factorised, Source, convolves, halved
from supernets.printer import check, source


def images(hw: int = 8, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, hw, hw, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(space: Space) -> NASNet:
    net = NASNet(space, 3, 5).double()
    net.reset(torch.Generator().manual_seed(0))
    return net


# -- skeleton -----------------------------------------------------------------------------------------------------------------


def test_who_reads_what_on_cifar() -> None:
    """[N normal]; [R, N normal]; [R, N normal]. After a reduction (stream 3 of cell 2), h_{i-1} is the reduction's input."""
    assert planned(Space(2, 4)) == [
        Plan("normal", 4, None, 0), Plan("normal", 4, 0, 1), Plan("reduce", 8, 1, 2), Plan("normal", 8, 2, 3),
        Plan("normal", 8, 3, 4), Plan("reduce", 16, 4, 5), Plan("normal", 16, 5, 6), Plan("normal", 16, 6, 7),
    ]  # fmt: skip


def test_who_reads_what_on_imagenet() -> None:
    """Two stem reductions at F/4 and F/2. Large: the cell after a reduction reads what the reduction read as h_{i-1}."""
    plan = planned(Space(1, 8, "imagenet", 96, True))
    assert plan == [
        Plan("reduce", 2, None, 0), Plan("reduce", 4, 0, 1), Plan("normal", 8, 1, 2), Plan("reduce", 16, 2, 3),
        Plan("normal", 16, 2, 4), Plan("reduce", 32, 4, 5), Plan("normal", 32, 4, 6),
    ]  # fmt: skip
    assert planned(Space(1, 8, "imagenet"))[4].before == 3 and planned(Space(1, 8, "imagenet"))[6].before == 5


def test_stems() -> None:
    cifar, mobile, large = (made(Space(1, 8, *more)) for more in ((), ("imagenet",), ("imagenet", 96)))
    shapes = [tuple(net.stem(images(33).double(), {}).shape[1:]) for net in (cifar, mobile, large)]
    assert shapes == [(24, 33, 33), (32, 16, 16), (96, 16, 16)]  # VALID: (33 - 3) / 2 + 1
    with pytest.raises(ValueError, match="smaller than the first kernel") as error:
        mobile.layers((2, 32))
    assert "\n" not in str(error.value)


def test_the_first_cell_reads_its_input_before_the_squeeze() -> None:
    """On CIFAR state 1 then has 3 F channels: identity, pools and the output bring it to F by 1x1 convolutions."""
    net = made(Space(1, 4))
    arch = net.space.arch_of(NASNET_A)
    graph = extract(net, arch, images(), inherit=False)
    convs = {name: m for name, m in graph.named_modules() if isinstance(m, nn.Conv2d)}
    assert "cells.0.adjust.conv" not in convs and convs["cells.0.squeeze.conv"].in_channels == 12
    for path in ("block3.right.identity", "block4.left.avg_pool_3x3", "block4.right.avg_pool_3x3", "fit1"):
        assert (convs[f"cells.0.{path}.conv"].in_channels, convs[f"cells.0.{path}.conv"].out_channels) == (12, 4)
        assert f"cells.2.{path}.conv" not in convs
    assert convs["cells.1.adjust.conv"].in_channels == 12 and convs["cells.2.adjust.even"].in_channels == 24


# -- operations ---------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, list[tuple[Any, ...]]] = {
    "identity": [(4, 6, 1, 1, 1)], "conv_1x1": [(4, 6, 1, 1, 1)], "conv_3x3": [(4, 6, 3, 1, 1)],
    "dil_conv_3x3": [(4, 6, 3, 1, 2)],
    "conv_1x3_3x1": [(4, 6, (1, 3), 1, 1), (6, 6, (3, 1), 1, 1)], "conv_1x7_7x1": [(4, 6, (1, 7), 1, 1), (6, 6, (7, 1), 1, 1)],
    **{f"sep_conv_{k}x{k}": [(4, 4, k, 4, 1), (4, 6, 1, 1, 1), (6, 6, k, 6, 1), (6, 6, 1, 1, 1)] for k in (3, 5, 7)},
    **{pool: [(4, 6, 1, 1, 1)] for pool in ("avg_pool_3x3", "max_pool_3x3", "max_pool_5x5", "max_pool_7x7")},
}  # fmt: skip
"""Of 4 channels to 6: (in, out, kernel, groups, dilation) of every convolution."""


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_the_layers_of_an_operation(op: str, stride: int) -> None:
    """Twice ReLU, depthwise, pointwise, norm; one norm behind the rest; no ReLU in front of a pool's 1x1. The stride stands
    in the first layer, of a pair in both."""
    leaf = Branch(op, Source(fixed(4), 4), Source(fixed(6), 6), "read", (1,)).double()
    arch: Any = {"read": stride - 1}
    x = images(9)[:, :1].expand(-1, 4, -1, -1) * torch.arange(1, 5).view(1, 4, 1, 1)
    plain: Any = leaf.plain(arch, 4)
    kinds = [type(m).__name__ for m in plain]
    convs = [m for m in plain if isinstance(m, nn.Conv2d)]
    wanted = [(i, o, k if isinstance(k, tuple) else (k, k), g, (d, d)) for i, o, k, g, d in LAYERS[op]]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.groups, c.dilation) for c in convs] == wanted
    assert all(conv.bias is None for conv in convs)
    pool = ["AvgPool2d" if op.startswith("avg") else "MaxPool2d"] if "pool" in op else []
    unit = ["Conv2d", "Conv2d", "BatchNorm2d"]
    assert kinds == pool + {4: [*unit, "ReLU", *unit], 2: unit, 1: unit[1:]}[len(convs)]
    first = plain[0].stride
    assert first in (stride, (stride, stride), (1, stride))
    assert leaf(x, arch).shape == (4, 6, *((9, 9) if stride == 1 else (5, 5)))
    assert torch.allclose(plain.train()(x), leaf(x, arch), atol=1e-12)


def test_what_needs_no_convolution_has_none() -> None:
    """An identity of stride 1 between equal widths, and a pool between equal widths, strided or not."""
    assert not convolves("identity", 4, 4, 1) and convolves("identity", 4, 4, 2) and convolves("identity", 4, 8, 1)
    assert not convolves("avg_pool_3x3", 4, 4, 2) and convolves("max_pool_7x7", 4, 8, 1) and convolves("conv_1x1", 4, 4, 1)
    pool: Any = Branch("max_pool_5x5", Source(fixed(4), 4), Source(fixed(4), 4), "read", (0,), projects=False)
    assert not list(pool.parameters())
    own = pool.plain({"read": 0}, 4)
    assert isinstance(own, nn.MaxPool2d) and (own.kernel_size, own.stride, own.padding) == (5, 2, 2)
    x = torch.full((1, 4, 6, 6), 2.0)
    average: Any = Branch("avg_pool_3x3", Source(fixed(4), 4), Source(fixed(4), 4), projects=False)
    assert torch.equal(average(x, {}), x)  # padding is not counted


@pytest.mark.parametrize("hw, o", [(8, 6), (7, 6), (7, 5)])
def test_a_factorised_reduction_reads_all_pixels(hw: int, o: int) -> None:
    """The second half sees the map moved by one pixel, zeros at its end; of an odd number the second half has one more."""
    leaf, x = Factorised(Source(fixed(3), 3), Source(fixed(o), o)).double().train(), images(hw)
    n = halved((hw, hw))[0]
    moved = torch.zeros_like(x)
    moved[:, :, :-1, :-1] = x[:, :, 1:, 1:]
    y = torch.cat([F.conv2d(x, leaf.weight[0], stride=2), F.conv2d(moved, leaf.weight[1], stride=2)], dim=1)
    wanted = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert leaf(x, {}).shape == (4, o, n, n) and [len(w) for w in leaf.weight] == [o // 2, o - o // 2]
    assert torch.allclose(leaf(x, {}), wanted, atol=1e-10)
    assert torch.allclose(leaf.plain({}, 3).train()(x), wanted, atol=1e-10)


# -- cells --------------------------------------------------------------------------------------------------------------------


def test_a_concatenation_is_twice_as_wide_and_its_readers_bring_it_back() -> None:
    space = Space(1, 4, blocks=3)
    net = made(space)
    arch = space.parse("normal: identity(0)|sep_conv_3x3(1) identity(2)+max_pool_3x3(2) conv_3x3(2)+identity(0) "
                       "reduce: identity(0)+conv_1x1(1) identity(2)+identity(2) conv_1x1(3)|identity(0)")
    assert [source.size.at(arch) for source in net.every_cell()[2].states] == [8, 8, 16, 8, 8]
    graph = extract(net, arch, images(), inherit=False)
    convs = {name: (m.in_channels, m.out_channels) for name, m in graph.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs["cells.2.block2.left.identity.conv"] == convs["cells.2.block2.right.max_pool_3x3.conv"] == (16, 8)
    assert convs["cells.2.block3.left.conv_3x3.conv"] == (16, 8)
    assert arch["normal.concat"] == "34" and net.every_cell()[2].out.size.at(arch) == 2 * 8
    assert arch["reduce.concat"] == "4" and net.every_cell()[1].out.size.at(arch) == 16
    assert convs["cells.2.squeeze.conv"] == (16, 8)


def test_the_output_is_brought_to_the_size_and_width_of_the_last_state() -> None:
    """Section 2.2, 4: a 1x1 convolution at equal size, a factorised reduction else; no ReLU in front of either."""
    space = Space(1, 4, blocks=2)
    net = made(space)
    arch = space.parse("normal: identity(0)+conv_1x1(0) conv_1x1(0)|conv_1x1(0) =0,1,2,3 "
                       "reduce: conv_1x1(0)+conv_1x1(0) conv_1x1(0)+conv_1x1(0) =0,1,2,3")
    graph = extract(net, arch, images(), inherit=False)
    convs = {name: (m.in_channels, m.out_channels) for name, m in graph.named_modules()
             if "fit" in name and isinstance(m, nn.Conv2d)}
    assert {name: convs[name] for name in convs if name.startswith("cells.2")} == {
        f"cells.2.fit{s}.conv": (8, 16) for s in (0, 1, 2)}
    assert {name: convs[name] for name in convs if name.startswith("cells.1")} == {
        f"cells.1.fit{s}.{half}": (8, 4) for s in (0, 1) for half in ("even", "odd")}
    source_of = {node.target: node.args[0] for node in graph.graph.nodes if node.op == "call_module"}
    assert "relu" not in str(source_of["cells.2.fit2.conv"]) and "relu" in str(source_of["cells.2.squeeze.conv"])


def test_the_adjustment_is_left_out_where_nothing_is_to_adjust() -> None:
    """A chain leaves one state, so its cells are as wide as F: h_{i-1} is read as it is within a stage."""
    space = Space(2, 4)
    graph = extract(made(space), space.smallest(), images(), inherit=False)
    names = {name for name, m in graph.named_modules() if isinstance(m, nn.Conv2d) and "adjust" in name}
    assert names == {"cells.1.adjust.conv", "cells.2.adjust.conv", "cells.5.adjust.conv",
                     *(f"cells.{k}.adjust.{half}" for k in (3, 6) for half in ("even", "odd"))}  # fmt: skip


def test_a_restricted_space_makes_a_smaller_net_of_the_same_cost() -> None:
    space, x = Space(1, 4), images()
    arch = space.arch_of(NASNET_A)
    alone = made(space.restrict({name: [value] for name, value in arch.items()}))
    whole = made(space)
    assert sum(p.numel() for p in alone.parameters()) == CostTable(whole, (8, 8), params).of(arch)
    assert sum(p.numel() for p in whole.parameters()) > 20 * sum(p.numel() for p in alone.parameters())
    for price in (macs, params):
        tables = [CostTable(net, (8, 8), price) for net in (alone, whole)]
        for other in (arch, space.largest(), space.sample(random.Random(0))):
            assert tables[0].of(other) == tables[1].of(other)
    first, second = (extract(net, arch, x, inherit=False, seed=2).state_dict() for net in (alone, whole))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for name, option in (("normal.block1.left.op", "conv_1x1"), ("reduce.block2.right.input", 2), ("normal.concat", "6")):
        with pytest.raises(ValueError, match=f"{name} = {option} is not in this space. Allowed: ") as error:
            alone(x, arch | {name: option})
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("space, hw", [
    (Space(1, 4, "imagenet", blocks=3), 33), (Space(2, 4, skip_reduction_layer_input=True, blocks=3), 7),
])  # fmt: skip
def test_other_skeletons_and_odd_maps_are_extracted(space: Space, hw: int) -> None:
    net, x, rng = made(space), images(hw), random.Random(5)
    tables = [CostTable(net, (hw, hw), price) for price in (macs, params)]
    found: list[Arch] = [space.sample(rng) for _ in range(3)]
    for arch, statistics in zip(found, recalibrate(net, found, [x])):
        install(net, statistics)
        graph = extract(net.eval(), arch, x)
        assert (graph(x) - net(x, arch)).abs().max() < 1e-10
        assert counted(graph, x) == tuple(table.of(arch) for table in tables)
    check(graph, source(graph), x)


# -- training form ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inherit", [False, True])
def test_the_training_form_is_the_plain_network_with_a_head(inherit: bool) -> None:
    space, x = Space(1, 4, blocks=2), images()
    net = made(space).train()
    arch = space.sample(random.Random(3))
    plain, form = extract(net, arch, x, inherit, seed=5), training_form(net, arch, x, inherit, seed=5)
    weights = plain.state_dict()
    assert {key: True for key in weights} == {k: torch.equal(v, weights[k]) for k, v in form.network.state_dict().items()}
    logits, auxiliary = form(x)
    assert torch.equal(logits, plain(x)) and auxiliary.shape == logits.shape == (4, 5)
    _, features = form.network(x)
    assert features.shape[2:] == (4, 4)
    text = source(plain.eval(), tuple(x.shape))
    check(plain, text, x)
    assert "DropPath" not in text


@pytest.mark.parametrize("skeleton, hw", [("cifar", 16), ("imagenet", 14)])
def test_heads_are_the_published_ones(skeleton: str, hw: int) -> None:
    head: Any = made(Space(1, 4, skeleton)).head((12, hw, hw))
    assert [type(m).__name__ for m in head] == ["ReLU", "AvgPool2d", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d",
                                                "ReLU", "Flatten", "Linear"]  # fmt: skip
    assert (head[1].kernel_size, head[1].stride, head[1].padding) == (5, 3, 0)
    assert head[5].kernel_size == ((hw - 5) // 3 + 1,) * 2 and (head[2].out_channels, head[5].out_channels) == (128, 768)
    assert head[3].eps == head[6].eps == {"cifar": 1e-5, "imagenet": 1e-3}[skeleton]
    assert head(torch.zeros(2, 12, hw, hw)).shape == (2, 5)
