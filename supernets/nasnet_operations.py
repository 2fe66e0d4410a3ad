"""The leaves of NASNet cells, as wide as what they read: operations (page nasnet, table of 2.2) and factorised reductions.

Letters: ``B`` batch, ``c`` channels that are read, ``o`` channels that are made, ``H W`` height and width, ``w`` () the
weight of an operation in a mixture. A leaf holds the widest kernels and runs their first channels.

Strided layers pad evenly and give ceil(H / 2). TensorFlow's SAME pads even maps at one end alone: the same counts, other
outputs.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Segment, Size
from search_spaces.space import Setting
from supernets.chains import Chain, Conv, Unit
from supernets.elastic import Leaf, Normalise, init_default, prefix
from supernets.mixing import Scaled
from supernets.norms import adopt_norm, plain_norm
from supernets.operations import adopt_chain, plain_chain

Arch = Mapping[str, Setting]
HW = tuple[int, int]


class Form(NamedTuple):
    """What an operation is made of: a pool, convolutions, or both. ``always``: whether the convolutions are there even where
    they would only pass on what they read."""

    pool: str
    side: int
    units: tuple[Unit, ...]
    always: bool


@lru_cache
def form(op: str, stride: int) -> Form:
    """Of one of the 13 operations. All but pools read what a ReLU makes of a state."""
    kind, _, size = op.partition("_pool_" if "_pool_" in op else "_conv_")
    if op == "identity":
        return Form("", 0, ((Conv(1, stride),),), False)
    if kind in ("avg", "max"):
        return Form(kind, int(size[0]), ((Conv(1),),), False)
    if kind == "sep":
        k = int(size[0])
        return Form("", 0, ((Conv(k, stride, 1, True), Conv(1)), (Conv(k, 1, 1, True), Conv(1))), True)
    if kind == "dil":
        return Form("", 0, ((Conv(3, stride, 2),),), True)
    k, second = int(op[len("conv_1x")]), op.count("x") > 1
    if second:
        return Form("", 0, ((Conv((1, k), (1, stride)), Conv((k, 1), (stride, 1))),), True)
    return Form("", 0, ((Conv(k, stride),),), True)


def convolves(op: str, c: int, o: int, stride: int) -> bool:
    """Whether the convolutions of an operation are there: those of an identity where it is strided or the widths differ,
    those of a pool where the widths differ."""
    found = form(op, stride)
    return found.always or c != o or (stride > 1 and not found.pool)


class Source(NamedTuple):
    """What a layer may read: its channels, the most that there are of them, and how often height and width were halved."""

    size: Size
    full: int
    level: int = 0

    def segment(self) -> Segment:
        return Segment(self.size, self.full)


def halved(hw: HW) -> HW:
    """The output size of a padded layer of stride 2."""
    return (hw[0] + 1) // 2, (hw[1] + 1) // 2


class Branch(Leaf):
    """One operation. ``into``: the widest source that it may read. ``reads``: the choice of its input; ``strided``: the options
    of it that are read with stride 2. ``projects``: whether a pool or an identity ever needs its convolution.
    ``widths``: all that ``out`` may have, the widest its ``full``."""

    def __init__(self, op: str, into: Source, out: Source, reads: str = "", strided: tuple[int, ...] = (),
                 projects: bool = True, widths: tuple[int, ...] = ()) -> None:  # fmt: skip
        super().__init__()
        self.op, self.reads, self.strided = op, reads, strided
        self.into, self.out = (into.segment(),), (out.segment(),)
        self.weight, self.norm = nn.ParameterList(), nn.ModuleList()
        c, found = into.full, form(op, 1)
        for unit in found.units if found.always or projects else ():
            for conv in unit:
                o = c if conv.depthwise else out.full
                self.weight.append(nn.Parameter(torch.empty(o, 1 if conv.depthwise else c, *conv.sides())))
                c = o
            self.norm.append(Normalise(widths or (out.full,), separate=False))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        for weight in self.weight:
            init_default(weight, generator)
        for norm in self.norm:
            reset_norm(norm)  # type: ignore[arg-type]

    def stride(self, arch: Arch) -> int:
        return 2 if self.strided and arch[self.reads] in self.strided else 1

    def chain(self, c: int, o: int, stride: int) -> Chain:
        """Its convolutions and norms from ``c`` to ``o`` channels: views of the first ones."""
        units, weights, kernels = form(self.op, stride).units, [], iter(self.weight)
        for conv in (conv for unit in units for conv in unit):
            if conv.depthwise:
                weights.append(prefix(next(kernels), 0, c))
            else:
                weights.append(prefix(prefix(next(kernels), 0, o), 1, c))
                c = o
        return Chain(units, weights, [], list(self.norm))  # type: ignore[arg-type]

    def scaled(self, x: Tensor, arch: Arch, w: Tensor | None) -> Scaled:
        """As ``mixing.blend`` wants it: w f(x) and None where the weight w () is in the last norm, else f(x) and w."""
        c, o, stride = x.shape[1], self.out[0].size.at(arch), self.stride(arch)
        found = form(self.op, stride)
        if found.pool == "avg":
            x = F.avg_pool2d(x, found.side, stride, found.side // 2, count_include_pad=False)
        elif found.pool:
            x = F.max_pool2d(x, found.side, stride, found.side // 2)
        if not convolves(self.op, c, o, stride):
            return x, w
        return self.chain(c, o, stride).run(x, w), None

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W) -> (B, o, H', W')."""
        return self.scaled(x, arch, None)[0]

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        (c,), o, stride = c_in, self.out[0].size.at(arch), self.stride(arch)
        found = form(self.op, stride)
        chain = plain_chain(self.chain(c, o, stride), inherit) if convolves(self.op, c, o, stride) else nn.Sequential()
        if not found.pool:
            return chain
        pool: nn.Module = nn.MaxPool2d(found.side, stride, found.side // 2)
        if found.pool == "avg":
            pool = nn.AvgPool2d(found.side, stride, found.side // 2, count_include_pad=False)
        if not len(chain):
            return pool
        both = nn.Sequential()
        both.add_module("pool", pool)
        for name, module in chain.named_children():
            both.add_module(name, module)
        return both

    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        convs = [module for module in plain.values() if isinstance(module, nn.Conv2d)]
        if convs:
            adopt_chain(self.name, self.chain(convs[0].in_channels, convs[-1].out_channels, 1), plain)


class Factorised(Leaf):
    """Two 1x1 convolutions of stride 2, the second on the map moved by one pixel (zeros at its end), half of the channels
    each (of an odd number one more in the second), side by side, then a batch norm. Maps may be odd."""

    def __init__(self, into: Source, out: Source, widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.into, self.out = (into.segment(),), (out.segment(),)
        shapes = ((o, into.full, 1, 1) for o in (out.full // 2, out.full - out.full // 2))
        self.weight = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])
        self.norm = Normalise(widths or (out.full,), separate=False)
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        for weight in self.weight:
            init_default(weight, generator)
        reset_norm(self.norm)

    def halves(self, c: int, o: int) -> list[Tensor]:
        """Views of both kernels, (o / 2, c, 1, 1)."""
        return [prefix(prefix(w, 0, n), 1, c) for w, n in zip(self.weight, (o // 2, o - o // 2))]

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W) -> (B, o, ceil(H / 2), ceil(W / 2))."""
        o = self.out[0].size.at(arch)
        even, odd = self.halves(x.shape[1], o)
        y = torch.cat([F.conv2d(x, even, stride=2), F.conv2d(F.pad(x, (-1, 1, -1, 1)), odd, stride=2)], dim=1)
        return self.norm(y, *self.norm.affine(o))

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        (c,), o = c_in, self.out[0].size.at(arch)
        own = PlainFactorised(c, o, plain_norm(self.norm, o, None, inherit)).to(self.weight[0])
        for conv, weight in zip((own.even, own.odd), self.halves(c, o)):
            if inherit:
                with torch.no_grad():
                    conv.weight.copy_(weight)
            else:
                init_default(conv.weight)
        return own

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        even, odd, norm = plain["even"], plain["odd"], plain["norm"]
        assert isinstance(even, nn.Conv2d) and isinstance(odd, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        for mine, conv in zip(self.halves(even.in_channels, norm.num_features), (even, odd)):
            mine.copy_(conv.weight)
        adopt_norm(self.name, self.norm, norm)


class PlainFactorised(nn.Module):
    """A factorised reduction of c to o channels; extraction inlines it."""

    def __init__(self, c: int, o: int, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.even = nn.Conv2d(c, o // 2, 1, 2, bias=False)
        self.moved = nn.ZeroPad2d((-1, 1, -1, 1))
        self.odd = nn.Conv2d(c, o - o // 2, 1, 2, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.even(x), self.odd(self.moved(x))], dim=1))


def reset_norm(norm: Normalise) -> None:
    for gamma, beta in zip(norm.weight, norm.bias):
        nn.init.ones_(gamma)
        nn.init.zeros_(beta)

