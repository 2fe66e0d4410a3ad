"""Squeeze-excite of elastic width, as MobileNetV3 and its supernets have it (OFA, BigNAS, AttentiveNAS pages, section 2).

Letters: ``B`` batch, ``c C`` channels, ``h`` hidden units, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.inverted import squeeze_width
from search_spaces.sizes import Segment, Size
from search_spaces.space import Mixture
from supernets.elastic import Arch, Leaf, init_conv, prefix
from supernets.layers import Layer, Shape, When, term


class SqueezeExcite(Leaf):
    """x times a gate per channel: mean over H and W, 1x1 convolution to h, ReLU, 1x1 convolution back, relu6(g + 3) / 6.

    ``out``: the channels, before and after. ``hidden``: c -> h, never decreasing, make_divisible(c // 4) by default. A value
    runs the first h units of the first c channels, biases too. ValueError for mixtures: the units of a narrow candidate see
    fewer channels, so their gates do not superpose.
    """

    def __init__(self, out: Segment, hidden: Callable[[int], int] = squeeze_width) -> None:
        super().__init__()
        self.into, self.out, self.hidden = (out,), (out,), hidden
        h = hidden(out.full)
        self.reduce = nn.Parameter(torch.empty(h, out.full, 1, 1))
        self.reduce_bias = nn.Parameter(torch.empty(h))
        self.expand = nn.Parameter(torch.empty(out.full, h, 1, 1))
        self.expand_bias = nn.Parameter(torch.empty(out.full))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Weights N(0, 2 / outputs), biases 0: the start of the other convolutions, gates at 1/2."""
        for weight, bias in ((self.reduce, self.reduce_bias), (self.expand, self.expand_bias)):
            init_conv(weight, generator)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W) -> the same."""
        c = self._width(arch)
        if x.shape[1] != c:
            raise ValueError(f"{self.name}: an input of {x.shape[1]} channels, where this architecture has {c}. "
                             "Check what feeds it.")  # fmt: skip
        h = self.hidden(c)
        z = F.conv2d(F.adaptive_avg_pool2d(x, 1), prefix(prefix(self.reduce, 0, h), 1, c), prefix(self.reduce_bias, 0, h))
        z = F.conv2d(F.relu(z), prefix(prefix(self.expand, 0, c), 1, h), prefix(self.expand_bias, 0, c))
        return x * F.hardsigmoid(z)

    def _width(self, arch: Arch) -> int:
        size = self.out[0].size
        for name in size.on:
            if isinstance(arch[name], Mixture):
                raise ValueError(f"{self.name}: {name} is a mixture, and squeeze-excite does not superpose. Give one option.")
        c = size.at(arch)
        if not 1 <= c <= self.out[0].full:
            raise ValueError(f"{self.name}: width {c} is not in this supernet. Allowed: 1 to {self.out[0].full}.")
        return c

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        c = self._width(arch)
        h = self.hidden(c)
        made = PlainSqueeze(c, h).to(self.reduce)
        mine = ((self.reduce[:h, :c], self.reduce_bias[:h]), (self.expand[:c, :h], self.expand_bias[:c]))
        for conv, (weight, bias) in zip((made.reduce, made.expand), mine):
            assert conv.bias is not None
            with torch.no_grad():
                if inherit:
                    conv.weight.copy_(weight)
                    conv.bias.copy_(bias)
                else:
                    init_conv(conv.weight)
                    conv.bias.zero_()
        return made

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        """Both convolutions, on one pixel whatever ``hw`` is."""
        size, hidden = self.out[0].size, self.hidden
        return [
            term(f"{self.name}.reduce", "conv", (size,), when, lambda c: Shape(c, hidden(c), bias=True)),
            term(f"{self.name}.expand", "conv", (size,), when, lambda c: Shape(hidden(c), c, bias=True)),
        ]

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        for name, weight, bias in (
            ("reduce", self.reduce, self.reduce_bias), ("expand", self.expand, self.expand_bias)
        ):  # fmt: skip
            conv = cast(nn.Conv2d, plain[name])
            assert conv.bias is not None
            weight[: conv.out_channels, : conv.in_channels].copy_(conv.weight)
            bias[: conv.out_channels].copy_(conv.bias)


class PlainSqueeze(nn.Module):
    """The same of fixed width; extraction inlines it."""

    def __init__(self, c: int, h: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(c, h, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(h, c, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))
