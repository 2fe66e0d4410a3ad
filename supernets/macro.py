"""The supernets of search_spaces.macro: chains whose widths and kernels are superposed, as TangleNAS does (arXiv 2312.10440).

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.macro import ConvMacro as Space
from search_spaces.sizes import Segment, fixed
from search_spaces.space import SearchSpace, Setting
from supernets.elastic import Leaf
from supernets.layers import Layer, known_view
from supernets.sorting import Moved, sort_chain
from supernets.superpose import SuperposedConv, SuperposedLinear


class ConvMacro(nn.Module):
    """The supernet of a ConvMacro space: conv1, conv2, pool, conv3, pool, conv4, conv5 (7x7), linear layers; ReLU between
    them but not behind conv5; a bias everywhere, no batch norm.

    ``channels``: of the input image. ``classes``: outputs. ``drop``: the rate of dropout of whole channels behind conv3 and
    conv5 in the search, and in the networks extracted from this net; None: as the space says (0 unless it is told more).
    Published trainings had 0.5. A rate given to ``forward`` stands for it. ``both_sides``: whether a width weighs what the
    next layer reads as well as what its own gives (``supernets.superpose``: double weighting).
    """

    def __init__(
        self, space: Space, channels: int = 3, classes: int = 10, drop: float | None = None, both_sides: bool = True
    ) -> None:
        super().__init__()
        self.space = space
        self.drop = space.drop if drop is None else drop
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"drop = {drop} is not a rate. Allowed: 0 up to 1.")
        conv = partial(SuperposedConv, space, both_sides=both_sides)
        linear = partial(SuperposedLinear, space, both_sides=both_sides)
        widths = [Segment(space.width_size(i), int(space.root[f"c{i}"].options[-1])) for i in (1, 2, 3, 4)]
        image, c1, c2, c3, c4 = (_segment(channels), *widths)
        self.conv1 = conv((image,), c1, space.kernel_size(1))
        self.conv2 = conv((c1,), c2, space.kernel_size(2))
        self.conv3 = conv((c2,), c3, space.kernel_size(3))
        self.conv4 = conv((c3,), c4, space.kernel_size(4))
        self.conv5 = conv((c4,), _segment(space.features), fixed(7), padding=2)
        self.pool = nn.MaxPool2d(2)
        self.dropout3, self.dropout5 = (nn.Dropout2d(self.drop) if self.drop else None for _ in range(2))
        sides = [_segment(space.features, repeat=(space.image // 4 - 2) ** 2), *map(_segment, space.hidden)]
        self.hidden = nn.ModuleList([linear((into,), out) for into, out in pairwise(sides)])
        self.classifier = linear((sides[-1],), _segment(classes))
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        x = F.relu(self.conv1(x, arch), inplace=True)
        x = self.pool(F.relu(self.conv2(x, arch), inplace=True))
        x = F.relu(self.conv3(x, arch), inplace=True)
        x = self.pool(self._dropped(x, drop, self.dropout3))
        x = F.relu(self.conv4(x, arch), inplace=True)
        x = torch.flatten(self._dropped(self.conv5(x, arch), drop, self.dropout5), 1)
        for linear in self.hidden:
            x = F.relu(linear(x, arch), inplace=True)
        return self.classifier(x, arch)

    def _dropped(self, x: Tensor, drop: float, own: nn.Module | None) -> Tensor:
        if drop:
            return F.dropout2d(x, drop, self.training)
        return x if own is None else own(x)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term, for images of ``input_size`` (H, W); the same in every view. ValueError where the images
        are not of the space's size, which the first linear layer is made for."""
        known_view(view)
        side = self.space.image
        if tuple(input_size) != (side, side):
            given, least = input_size[0], max(input_size[0], 12)
            both = "" if given == least else f" and the images the same size (data.size: {least})"
            raise ValueError(f"images of {given}x{input_size[1]}, but this space's are {side}x{side}. Give the space "
                             f"image: {least}{both}, or bring the images to {side} (data.size: {side}).")  # fmt: skip
        hw, half, quarter = ((side // n, side // n) for n in (1, 2, 4))
        records = self.conv1.layers(hw) + self.conv2.layers(hw) + self.conv3.layers(half) + self.conv4.layers(quarter)
        records += self.conv5.layers((side // 4 - 2, side // 4 - 2))
        linears = [cast(SuperposedLinear, linear) for linear in (*self.hidden, self.classifier)]
        return records + [record for linear in linears for record in linear.layers((1, 1))]

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """None: smaller options are slices of larger ones."""
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts c1 .. c4 by what the next convolution reads, from behind (``nas.protocols.Supernet``)."""
        return sort_chain([self.conv1, self.conv2, self.conv3, self.conv4, self.conv5], trained)

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def _segment(n: int, repeat: int = 1) -> Segment:
    return Segment(fixed(n), n, repeat)


def build(space: Space, channels: int, classes: int) -> ConvMacro:
    """The supernet that serves an arch.json of this module's spaces."""
    return ConvMacro(space, channels, classes)
