"""The supernet of search_spaces.resnet50d: OFA-ResNet50D, elastic depth, expand and width (Cai, Gan, Wang, Zhang, Han,
ICLR 2020, arXiv 1908.09791; page ofa, section 2).

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width. Bottleneck blocks with ReLU; the first block of a stage averages
its input by the stride (partial windows too) and projects it.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.inverted import RESOLUTION
from search_spaces.resnet50d import OFAResNet50D as Space
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.elastic import ElasticConv, Leaf, ResidualSum, possible_sizes
from supernets.layers import Layer, When, known_view
from supernets.mixing import Scaled, blend
from supernets.operations import Classifier
from supernets.resize import Resize, followed, halved
from supernets.resnet import Block, only_deeper, run_stage
from supernets.sorting import Moved, sort_chain

STEM_DEPTH = "stem.depth"


class Stem(nn.Module):
    """3x3 convolution of stride 2, a residual 3x3 convolution that may be skipped, 3x3 convolution, max pooling of stride 2.

    Each convolution has a norm and a ReLU; nothing follows the residual sum.
    """

    def __init__(self, space: Space, image: Segment, mid: Segment, out: Segment) -> None:
        super().__init__()
        conv = partial(ElasticConv, space, kernel=3, norm="shared", mixing="sum")
        self.conv0 = conv((image,), mid, stride=2)
        self.residual = conv((mid,), mid)
        self.conv1 = conv((mid,), out)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
        """(B, channels, H, W) -> (B, C, H / 4, W / 4)."""
        x = F.relu(self.conv0(x, arch), inplace=True)
        x = self._deepened(x, arch)
        return self.pool(F.relu(self.conv1(x, arch), inplace=True))

    def _deepened(self, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
        """x, or x and the residual convolution of it; of a mixture, both."""
        depth = arch[STEM_DEPTH]

        def kept(n: Any, x: Tensor, w: Tensor | None) -> Scaled:
            return x + F.relu(self.residual(x, arch), inplace=True) if n else x, w

        for n in depth.options if isinstance(depth, Mixture) else (depth,):
            if n not in (0, 1):
                raise ValueError(f"the stem cannot keep {n} residual convolutions. Allowed: 0, 1.")
        if isinstance(depth, Mixture):
            return blend([partial(kept, n) for n in depth.options], x, depth)
        return kept(depth, x, None)[0]


class OFAResNet50D(nn.Module):
    """The supernet of an OFAResNet50D space.

    ``channels``: of the input image. ``classes``: outputs. ``zero_gamma``: whether ``reset`` gives the last norm of every
    block the scale 0; not published. ``forward(x, arch, drop)``: ``drop`` is the dropout probability before the classifier.
    """

    def __init__(self, space: Space, channels: int = 3, classes: int = 10, zero_gamma: bool = False) -> None:
        super().__init__()
        self.space, self.zero_gamma = space, zero_gamma
        image = Segment(fixed(channels), channels)
        self.resize = Resize(Size((RESOLUTION,), int), channels) if space.resolutions else None
        mid, source = (self._segment(size) for size in (space.stem_mid_size(), space.stem_size()))
        self.stem = Stem(space, image, mid, source)
        self.stages = nn.ModuleList()
        for s, slots in enumerate(space.slots):
            out = self._segment(space.out_size(s))
            self.stages.append(nn.ModuleList(self._block(s, b, out if b else source, out) for b in range(slots)))
            source = out
        self.classifier = Classifier((source,), classes)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name
        self._zero()

    def _segment(self, size: Size) -> Segment:
        return Segment(size, possible_sizes(size, self.space)[-1])

    def _block(self, s: int, b: int, source: Segment, out: Segment) -> Block:
        conv = partial(ElasticConv, self.space, norm="shared", mixing="sum")
        mid, stride = self._segment(self.space.mid_size(s, b)), 1 if b else self.space.STRIDES[s]
        convs = [conv((source,), mid, 1), conv((mid,), mid, 3, stride), conv((mid,), out, 1)]
        return Block(convs, None if b else conv((source,), out, 1), ResidualSum(out.size, out), pool=stride == 2)

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        if self.resize is not None:
            x = self.resize(x, arch)
        x = self.stem(x, arch)
        for s in range(len(self.stages)):
            x = run_stage(self.blocks(s), arch[self.space.depth_name(s)], x, arch)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def blocks(self, s: int) -> list[Block]:
        """All blocks of stage ``s``."""
        return list(cast(Iterable[Block], self.stages[s]))

    # -- readings ---------------------------------------------------------------------------------------------------

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term; the same in every view. ``input_size``: of the images (H, W), read where the space does
        not choose the resolution; where it does, sizes follow the choice."""
        known_view(view)

        def at(leaf: ElasticConv, times: int, when: When | None = None) -> list[Layer]:
            records = leaf.layers(halved(input_size, times), when)
            return records if self.resize is None else [followed(record, RESOLUTION, times) for record in records]

        deepened = When((STEM_DEPTH,), lambda n: n == 1)
        records = at(self.stem.conv0, 1) + at(self.stem.residual, 1, deepened) + at(self.stem.conv1, 1)
        times = 2
        for s, stride in enumerate(self.space.STRIDES):
            for b, block in enumerate(self.blocks(s)):
                there = When((self.space.depth_name(s),), lambda d, b=b: d > b) if b else None
                records += at(block.conv0, times, there)
                times += b == 0 and stride == 2
                after = (*block.convs()[1:], block.shortcut)
                records += [record for conv in after if conv is not None for record in at(conv, times, there)]
        return records + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """What only the deepest option of a depth runs (any option: that not all run): blocks, the stem's residual."""
        if choice == STEM_DEPTH:
            return only_deeper([self.stem.residual], self.space.root[choice].options, option)
        for s in range(len(self.stages)):
            if choice == self.space.depth_name(s):
                return only_deeper(self.blocks(s), self.space.root[choice].options, option)
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts the channels inside every block, from behind: those of the 3x3 convolution by what the last 1x1 reads, then
        those of the first 1x1 by what the 3x3 reads (``nas.protocols.Supernet``). The widths of stem and stages keep their
        order: sums tie them together."""
        blocks = [block for s in range(len(self.stages)) for block in self.blocks(s)]
        return [place for block in blocks for place in sort_chain(block.convs(), trained)]

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order: convolutions N(0, 2 / (k k outputs)), the
        classifier U(+-1 / sqrt(inputs)), norms 1 and 0; with ``zero_gamma`` the last norm of every block 0 and 0."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)
        self._zero()

    def _zero(self) -> None:
        for s in range(len(self.stages)) if self.zero_gamma else ():
            for block in self.blocks(s):
                assert block.conv2 is not None and block.conv2.norm is not None
                nn.init.zeros_(block.conv2.norm.weight[0])


def build(space: Space, channels: int, classes: int) -> OFAResNet50D:
    """The supernet that serves an arch.json of this module's space."""
    return OFAResNet50D(space, channels, classes)
