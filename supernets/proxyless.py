"""The supernet of search_spaces.proxyless (ProxylessNAS: Cai, Zhu, Han, ICLR 2019, arXiv 1812.00332): every operation of every
block has weights of its own.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width, ``w`` () the weight of an operation in a mixture.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import proxyless as spaces
from search_spaces.inverted import mid_width
from search_spaces.sizes import Segment, fixed
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.elastic import Leaf
from supernets.inverted import ACTIVATIONS, Block, Place, pointwise
from supernets.layers import Layer, When, known_view
from supernets.mixing import Scaled, blend
from supernets.operations import zero
from supernets.resize import halved
from supernets.sorting import Moved
from supernets.superpose import SuperposedLinear

ACT, EPS = "relu6", 1e-3
Arch = Mapping[str, Setting]


class Mixed(nn.Module):
    """A block: one of its operations, beside the identity where the place has a shortcut."""

    def __init__(self, space: SearchSpace, place: spaces.Place) -> None:
        super().__init__()
        self.place = place
        self.operations = nn.ModuleDict({
            option: _block(space, place.c_in, mid_width(place.c_in, expand), place.c_out, kernel, place.stride, True)
            for option, (kernel, expand) in spaces.KERNELS.items()
        })  # fmt: skip

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        setting = arch[self.place.name]
        if isinstance(setting, Mixture):
            candidates = [None if option == spaces.ZERO else partial(self._scaled, str(option)) for option in setting.options]
            y = blend(candidates, x, setting, zero)
        elif setting == spaces.ZERO and self.place.shortcut:
            return x
        elif str(setting) in self.operations:
            y = self.operations[str(setting)](x, arch)
        else:
            allowed = (*self.operations, *([spaces.ZERO] if self.place.shortcut else []))
            raise ValueError(f"{self.place.name} = {setting} is not in this space. Allowed: {', '.join(allowed)}.")
        return x + y if self.place.shortcut else y

    def _scaled(self, option: str, x: Tensor, w: Tensor | None) -> Scaled:
        return self.operations[option](x, {}), w

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """(option, its block)."""
        for option, block in self.operations.items():
            yield option, cast(Block, block)


def _block(space: SearchSpace, c_in: int, mid: int, c_out: int, kernel: int, stride: int, expands: bool) -> Block:
    narrow, inside, wide = (Segment(fixed(c), c) for c in (c_in, mid, c_out))
    place = Place(narrow, inside, wide, fixed(kernel), stride, ACT, squeeze=False, expands=expands, identity=False,
                  projection=False)  # fmt: skip
    return Block(space, place, "crop", EPS)


class ProxylessNAS(nn.Module):
    """Stem, a fixed block (k3, e1, no shortcut), the stages, a 1x1 convolution, pooling, classifier; all of ReLU6.

    ``channels``: of the input image. ``classes``: outputs. ``drop`` of ``forward``: the rate of dropout before the classifier.
    """

    def __init__(self, space: spaces.ProxylessNAS, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.space = space
        image, stem, features = (Segment(fixed(c), c) for c in (channels, space.stem, space.final))
        last = space.places[-1][-1].c_out
        self.stem = pointwise(space, image, stem, EPS, 3, space.stem_stride)
        self.act = ACTIVATIONS[ACT]()
        self.first = _block(space, space.stem, space.stem, space.first, 3, 1, False)
        self.stages = nn.ModuleList(nn.ModuleList(Mixed(space, place) for place in stage) for stage in space.places)
        self.final = pointwise(space, Segment(fixed(last), last), features, EPS)
        self.classifier = SuperposedLinear(space, (features,), Segment(fixed(classes), classes))
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def every_block(self) -> Iterator[Mixed]:
        """The blocks of all stages, in order."""
        for stage in self.stages:
            yield from cast(Any, stage)

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        x = self.first(self.act(self.stem(x, arch)), arch)
        for block in self.every_block():
            x = block(x, arch)
        x = torch.flatten(F.adaptive_avg_pool2d(self.act(self.final(x, arch)), 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term; the same in every view. ``input_size``: of the images (H, W)."""
        known_view(view)

        def at(leaf: Leaf, times: int, when: When | None = None) -> list[Layer]:
            return leaf.layers(halved(input_size, times), when)

        times = int(self.space.stem_stride == 2)
        records = at(self.stem, times) + self.first.layers(at, times, None)
        for mixed in self.every_block():
            for option, block in mixed.blocks():
                records += block.layers(at, times, When((mixed.place.name,), lambda value, option=option: value == option))
            times += mixed.place.stride == 2
        return records + at(self.final, times) + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """The parameters of a block's operation; of all its operations without ``option``."""
        return [p for mixed in self.every_block() if mixed.place.name == choice
                for name, block in mixed.blocks() if option in (None, name) for p in block.parameters()]  # fmt: skip

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: no width is a choice here."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order: convolutions N(0, 2 / (k k outputs)), the
        classifier U(+-1 / sqrt(inputs)), norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def build(space: spaces.ProxylessNAS, channels: int, classes: int) -> ProxylessNAS:
    """The supernet that serves an arch.json of this module's space."""
    return ProxylessNAS(space, channels, classes)
