"""The supernet of search_spaces.pooling (Javan, Toews, Pedersoli, AutoML 2023, arXiv 2306.11982): a residual network whose
weights are the same wherever it pools.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.pooling import POOLING
from search_spaces.pooling import PoolingResNet as Space
from search_spaces.sizes import Segment, fixed
from search_spaces.space import SearchSpace, Setting
from supernets.chains import Conv
from supernets.elastic import Leaf
from supernets.layers import Layer, When, known_view
from supernets.operations import Classifier, Operation
from supernets.sorting import Moved

Arch = Mapping[str, Setting]


class Block(nn.Module):
    """Two 3x3 convolutions beside the identity, or beside a 1x1 convolution where the width changes; nothing has a stride."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = (_normed(c, c_out, 3) for c in (c_in, c_out))
        self.shortcut = None if c_in == c_out else _normed(c_in, c_out, 1)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W)."""
        y = self.conv1(F.relu(self.conv0(x, arch), inplace=True), arch)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x, arch)), inplace=True)

    def leaves(self) -> list[Operation]:
        """Its convolutions, each with its norm."""
        return [self.conv0, self.conv1, *([] if self.shortcut is None else [self.shortcut])]


def _normed(c_in: int, c_out: int, kernel: int) -> Operation:
    return Operation(c_in, c_out, [[Conv(kernel)]], affine=False)


class PoolingResNet(nn.Module):
    """Stem, residual blocks, global average pooling, classifier; a 2x2 max pooling before the units that ``pooling`` names.

    ``channels``: of the input image. ``classes``: outputs. ``drop`` of ``forward``: the rate of dropout before the classifier.
    Batch norms have no scale and shift here, as published; those of plain networks, which the authors train with both kinds,
    have. Mixtures of placements are refused.
    """

    def __init__(self, space: Space, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.space = space
        widths = space.units
        self.stem = _normed(channels, widths[0], 3)
        self.blocks = nn.ModuleList(Block(c_in, c_out) for c_in, c_out in pairwise(widths))
        self.pool = nn.MaxPool2d(2)
        self.classifier = Classifier((Segment(fixed(widths[-1]), widths[-1]),), classes)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def every_block(self) -> list[Block]:
        """The blocks, units 1, 2, ..."""
        return [cast(Block, block) for block in self.blocks]

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes). ValueError for a mixture, and for another placement."""
        at = self.space.places(arch[POOLING])
        x = F.relu(self.stem(x, arch), inplace=True)
        for unit, block in enumerate(self.every_block(), 1):
            x = block(self.pool(x) if unit in at else x, arch)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term, for images of ``input_size`` (H, W); the same in every view. A layer is a record for each
        number of poolings that may stand before it. ValueError where the images are too small for all of them."""
        known_view(view)
        sizes = [(input_size[0] >> n, input_size[1] >> n) for n in range(self.space.pools + 1)]
        if 0 in sizes[-1]:
            raise ValueError(f"images of {input_size[0]}x{input_size[1]}: {self.space.pools} poolings leave nothing of them. "
                             "Give larger images, or the space fewer pools.")  # fmt: skip
        records = self.stem.layers(sizes[0])
        for unit, block in enumerate(self.every_block(), 1):
            for n, hw in enumerate(sizes):
                when = When((POOLING,), lambda value, unit=unit, n=n: sum(at <= unit for at in self.space.places(value)) == n)
                records += [record for leaf in block.leaves() for record in leaf.layers(hw, when)]
        return records + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """None: all placements use all weights."""
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: no width is a choice here."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order, as PyTorch's own start."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def build(space: Space, channels: int, classes: int) -> PoolingResNet:
    """The supernet that serves an arch.json of this module's space."""
    return PoolingResNet(space, channels, classes)
