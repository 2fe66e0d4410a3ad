"""Resolution as a choice: one crop is loaded a batch and brought to each child's size (AttentiveNAS page, section 3)."""
from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture
from supernets.elastic import Arch, Leaf
from supernets.layers import Layer, Shape, When


class Resize(Leaf):
    """Images (B, C, H, W) at the square ``side`` of the architecture, in pixels: bicubic, corners not aligned, no
    antialiasing. Images that have this size pass as they are. Neither weights nor cost.

    ValueError for a mixture of sides (their features have different sizes) and sides below 1.
    """

    def __init__(self, side: Size, channels: int = 3) -> None:
        super().__init__()
        self.side = side
        self.into = self.out = (Segment(fixed(channels), channels),)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, C, H, W) -> (B, C, side, side)."""
        side = self._side(arch)
        if x.shape[2] == side == x.shape[3]:
            return x
        return F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)

    def _side(self, arch: Arch) -> int:
        for name in self.side.on:
            if isinstance(arch[name], Mixture):
                raise ValueError(f"{self.name}: {name} is a mixture, and images have one size. Give one option.")
        side = self.side.at(arch)
        if side < 1:
            raise ValueError(f"{self.name}: a side of {side} pixels. Allowed: 1 and more.")
        return side

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        """Part of the plain network, which so takes images of any size as the supernet does."""
        side = self._side(arch)
        return nn.Upsample(size=(side, side), mode="bicubic", align_corners=False)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return []


def halved(hw: tuple[int, int], times: int) -> tuple[int, int]:
    """The size behind ``times`` layers of stride 2: half, rounded up, each time."""
    for _ in range(times):
        hw = (hw[0] + 1) // 2, (hw[1] + 1) // 2
    return hw


def followed(record: Layer, name: str, times: int) -> Layer:
    """``record`` with the output size that images of the side that the choice ``name`` says have behind ``times`` halvings."""

    def shape(*values: Any) -> Shape | None:
        found = record.shape(*values[:-1])
        return None if found is None else found._replace(hw=halved((values[-1], values[-1]), times))

    return Layer(record.name, record.op, (*record.on, name), shape)
