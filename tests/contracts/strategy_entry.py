"""What the contract tests of strategies know of one strategy, and the kinds of space that strategies search. The lists are in
strategy_entries and in the files that it names."""
from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nas.cost import CostTable
from search_spaces import bignas, darts, macro, mobilenet, nasnet, nats, pooling, preresnet, vit
from search_spaces.resnet import CifarResNet
from search_spaces.space import SearchSpace, Setting, Value
from supernets.bignas import AttentiveNAS
from supernets.darts import Cells
from supernets.layers import Layer
from supernets.macro import ConvMacro
from supernets.mobilenet import OFAMobileNetV3
from supernets.nasnet import NASNet
from supernets.nats import Sizes, Topology
from supernets.pooling import PoolingResNet
from supernets.preresnet import PreResNet
from supernets.resnet import ResNet
from supernets.vit import ViT

EPOCH_STEPS, STEPS, SEED = 3, 6, 4
Restriction = Mapping[str, tuple[Value, ...]]


class Kind(NamedTuple):
    """A space, its supernet, and restrictions of it by name."""

    space: Callable[[], SearchSpace]
    net: Callable[..., Any]
    restrictions: Mapping[str, Restriction]

    def made(self) -> tuple[SearchSpace, Any, CostTable]:
        """Space, net in float64 and cost table, which never change."""
        space = self.space()
        net = self.net(space, channels=1, classes=10).double()
        net.reset(torch.Generator().manual_seed(1))
        return space, net, CostTable(net, (8, 8))


def resnet(kind: str) -> Kind:
    space = CifarResNet(14, kind, widths=(4, 6, 8))
    widest = {choice.name: choice.options[-1:] for choice in space.choices if choice.name.endswith("width")}
    some = {"stage0.depth": (1,), "stage1.block0.conv0.width": (2, 4, 6), "stage2.block1.conv0.width": (3, 4)}
    shallow: Restriction = {f"stage{s}.depth": (2,) for s in range(3)}
    restrictions = {"free": {}, "width-only": shallow, "depth-only": widest, "some": some}
    return Kind(partial(CifarResNet, 14, kind, widths=(4, 6, 8)), ResNet, restrictions)  # type: ignore[arg-type]


class Enlarged(ConvMacro):
    """Reads the digits at 12 x 12 pixels, the least that its network can."""

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        return super().forward(nn.functional.interpolate(x, (12, 12)), arch, drop)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return super().layers((12, 12), view)


def mobile(resolution: tuple[int, ...]) -> Kind:
    """A small OFA-MobileNetV3; ``resolution``: its options, () where the images say."""
    some = {"stage0.depth": (2,), "stage2.depth": (1,), "stage1.block1.kernel": (5,), "stage4.block0.expand": (2,)}
    space = partial(mobilenet.OFAMobileNetV3, 0.1, True, (3, 5), (2, 3), (1, 2), resolution)
    return Kind(space, OFAMobileNetV3, {"free": {}, "some": some})


KINDS = {
    "tied": resnet("tied"), "tas": resnet("tas"),
    "tied-shared": resnet("tied")._replace(net=partial(ResNet, norm="shared")),  # channels can be sorted
    "cells": Kind(partial(nats.Topology, 4, 1), Topology, {
        "free": {}, "no-none": dict.fromkeys(nats.NAMES, nats.OPS[1:]),
        "one-edge": dict.fromkeys(nats.NAMES[1:], ("nor_conv_1x1",)),
        "some": {"node1.from0": ("none", "skip_connect"), "node2.from1": ("avg_pool_3x3",), "node3.from0": nats.OPS[::2]},
    }),
    "sizes": Kind(nats.Sizes, Sizes, {"free": {}, "some": {"c1": (56, 64), "c3": (8, 56), "c4": (8,)}}),
    "darts": Kind(partial(darts.Cells, 4, 3, nodes=2), Cells, {
        "free": {}, "no-none": {f"{kind}.node{n}.from{s}": darts.OPS[1:] for kind in ("normal", "reduce")
                                for n in (2, 3) for s in range(n)},
        "some": {"normal.node2.from0": ("none", "skip_connect"), "reduce.node3.from2": ("max_pool_3x3", "sep_conv_3x3")},
    }),
    "nasnet": Kind(partial(nasnet.NASNet, 1, 4, blocks=2), NASNet, {
        "free": {}, "some": {"normal.block1.left.op": ("identity", "sep_conv_5x5"), "reduce.block2.combine": ("concat",),
                             "normal.block2.left.input": (2,), "reduce.concat": ("123",)},
    }),
    "scales": Kind(partial(preresnet.PreResNet, 11, widths=(2, 3, 4)), PreResNet, {
        "free": {}, "some": {"stage0.block0.norm1.width": (2,), "stage2.block0.norm2.width": (1, 3)},
    }),
    "pooling": Kind(partial(pooling.PoolingResNet, (2, 1, 1), 2, (4, 6, 8)), PoolingResNet, {
        "free": {}, "some": {pooling.POOLING: ("1-2-2", "2-1-2", "3-1-1")},
    }),
    "macro": Kind(partial(macro.ConvMacro, ((2, 3, 4),) * 4, (3, 5, 7), 4, (4,), 12), Enlarged, {
        "free": {}, "some": {"c1": (2, 4), "c4": (4,), "k1": (3,), "k3": (5, 7)},
    }),
    "vit": Kind(partial(vit.ViT, (4, 8), (1, 2, 3), (1, 2), (1, 2), 4, 4, 8), ViT, {
        "free": {}, "some": {"embed": (8,), "depth": (1, 3), "layer1.heads": (1,), "layer2.ratio": (2.0,)},
    }),
    "mobile": mobile(()), "mobile-sized": mobile((6, 8)),
    "attentive": Kind(partial(bignas.AttentiveNAS, True, 0.1, ((1, 2), *((1,),) * 4, (1, 2), (1,)), (6, 8)), AttentiveNAS, {
        "free": {}, "some": {"stage0.depth": (2,), "stage1.expand": (4, 6), "stage5.kernel": (3,), "resolution": (8,)},
    }),
}  # fmt: skip


@functools.cache
def made(kind: str) -> tuple[SearchSpace, Any, CostTable]:
    return KINDS[kind].made()


class Entry(NamedTuple):
    """``make``: a strategy that has not started. ``kind``: of its space; None where it trains a plain network.
    ``moves``: the attributes that are Descents, and what they train. ``runs``: what a weight step runs, a "mixture" of the
    alphas, a "sample" of its own for every pass, a plain "path", or a "sandwich" of several, the first of which ``arch`` says.
    ``first``: which Descent moves first. ``asks``: the splits of an ordinary step. ``shared``: one backward serves several
    Descents. ``slow``: runs with the slow tests. ``legal``: whether paths are drawn by ``space.sample`` (and the extremes),
    canonical and without dead cells; otherwise every choice for itself. ``refuses``: restrictions that it cannot search."""

    id: str
    make: Callable[[], Any]
    kind: str | None
    moves: Mapping[str, str]
    taught: bool = False
    runs: str = "sample"
    first: str = "w"
    asks: tuple[str, ...] = ("train", "valid")
    shared: bool = False
    slow: bool = False
    legal: bool = True
    refuses: tuple[str, ...] = ()


BOTH = {"w": "weights", "a": "alphas"}
THREE = {"w": "weights", "y": "copies", "a": "alphas"}
ALONE = {"w": "weights"}
