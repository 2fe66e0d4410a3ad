"""The supernets of search_spaces.channelbench: seven widths, each a prefix of the largest (Channel-Bench-Macro, Su et al.,
arXiv 2203.13714; page spaces-nb201-nats-macro, section 5).

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.channelbench import ChannelMobileNet as MobileSpace
from search_spaces.channelbench import ChannelResNet as ResidualSpace
from search_spaces.channelbench import Channels
from search_spaces.sizes import Segment, candidates, fixed
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.depthwise import depthwise
from supernets.elastic import Arch, ElasticConv, ElasticLinear, Leaf, ResidualSum
from supernets.kernels import ElasticDepthwise
from supernets.layers import Layer, known_view
from supernets.mixing import fold, plus_idle
from supernets.resize import halved
from supernets.resnet import Block
from supernets.sorting import Moved, sort_chain, sort_channels, trained_widths


class ChannelNet(nn.Module):
    """What both supernets share: pooling and classifier behind ``features``, and what a net says of its leaves."""

    classifier: ElasticLinear

    def __init__(self, space: Channels) -> None:
        super().__init__()
        self.space = space

    def _named(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def features(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, channels, H, W) -> (B, C, ceil(H / 4), ceil(W / 4)), what is pooled."""
        raise TypeError(f"{type(self).__name__} must say what it pools")

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes). ``drop``: dropout probability before the classifier."""
        x = torch.flatten(F.adaptive_avg_pool2d(self.features(x, arch), 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Batch norms of one width, where every width has its own."""
        return [p for leaf in self.modules() if isinstance(leaf, Leaf) for p in leaf.owned(choice, option)]

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


class ChannelResNet(ChannelNet):
    """The supernet of a ChannelResNet space. The residual widths c0 and c4 are one choice for all that is added, so that plain
    networks keep their weights.

    ``channels``: of the input image. ``classes``: outputs. ``mixing``: how a mixture of widths blends ("interpolate" or
    "sum"). ``norm``: "separate" scales and shifts per candidate width, or "shared".
    """

    def __init__(
        self, space: ResidualSpace, channels: int = 3, classes: int = 10, mixing: str = "interpolate", norm: str = "separate"
    ) -> None:
        super().__init__(space)
        kind: dict[str, Any] = {"mixing": mixing, "norm": norm}
        c0, c1, c2, c3, c4, c5, c6 = (space.segment(i) for i in range(7))

        def block(stream: Segment, inner: Segment) -> Block:
            convs = [ElasticConv(space, (stream,), inner, **kind), ElasticConv(space, (inner,), stream, **kind)]
            return Block(convs, None, ResidualSum(stream.size, stream), pool=False)

        self.stem = ElasticConv(space, (Segment(fixed(channels), channels),), c0, 3, 2, **kind)
        self.stage0 = nn.ModuleList([block(c0, c1), block(c0, c2)])
        self.reduction = nn.ModuleList([ElasticConv(space, (c0,), c3, 3, 2, **kind), ElasticConv(space, (c3,), c4, **kind)])
        self.stage1 = nn.ModuleList([block(c4, c5), block(c4, c6)])
        self.classifier = ElasticLinear((c4,), classes)
        self._named()

    def features(self, x: Tensor, arch: Arch) -> Tensor:
        x = F.relu(self.stem(x, arch), inplace=True)
        for block in self.stage0:
            x = block(x, arch)
        for conv in self.reduction:  # the block without a shortcut
            x = F.relu(conv(x, arch), inplace=True)
        for block in self.stage1:
            x = block(x, arch)
        return x

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term, for images of ``input_size`` (H, W); the same in every view."""
        known_view(view)
        half, quarter = halved(input_size, 1), halved(input_size, 2)
        behind = [(conv, half) for block in _blocks(self.stage0) for conv in block.convs()]
        behind += [(cast(ElasticConv, conv), quarter) for conv in self.reduction]
        behind += [(conv, quarter) for block in _blocks(self.stage1) for conv in block.convs()]
        records = [record for conv, hw in [(self.stem, half), *behind] for record in conv.layers(hw)]
        return records + self.classifier.layers((1, 1))

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts c6, c5, c3, c2, c1, which lie between two convolutions (``nas.protocols.Supernet``). c0 and c4 keep their
        order: sums tie them together. Needs norm "shared"."""
        chains = [block.convs() for stage in (self.stage0, self.stage1) for block in _blocks(stage)]
        chains.insert(2, [cast(ElasticConv, conv) for conv in self.reduction])
        return [place for chain in reversed(chains) for place in sort_chain(chain, trained)]


def _blocks(stage: nn.ModuleList) -> list[Block]:
    return list(cast(Iterable[Block], stage))


class MixedDepthwise(ElasticDepthwise):
    """A depthwise 3x3 convolution whose mixtures of widths blend by ``mixing``, as those of ``ElasticConv`` do.

    "interpolate": candidate k keeps its first channels behind the norm, is interpolated to the widest and weighted, all in one
    1x1 convolution (``fold``). "sum": zero padding, which is the superposition of ``ElasticDepthwise``.
    """

    def __init__(self, space: SearchSpace, out: Segment, stride: int, mixing: str) -> None:
        super().__init__(space, out, fixed(3), stride)
        self.mixing = mixing

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W) -> (B, c, ceil(H / stride), ceil(W / stride)); of a mixture, c is the widest active width."""
        size = self.out[0].size
        setting = arch[size.on[0]]
        if self.mixing == "sum" or not isinstance(setting, Mixture):
            return super().forward(x, arch)
        rest, n, norm = self._rest(arch), self._width(arch), self.norm
        assert norm is not None
        found, w = candidates(size, arch), setting.weights.unbind(0)
        sizes, weights = [c for c, _ in found], [w[j] for _, (j,) in found]
        z = depthwise(x, self.kernels(n, 3), self.stride)
        scales, shifts = zip(*(norm.affine(c) for c in sizes))
        if len(sizes) == 1:  # one candidate: no interpolation, so its weight scales the affine
            v = weights[0].to(scales[0].dtype)
            return plus_idle(norm(z, v * scales[0], v * shifts[0]), rest)
        M, b = fold(sizes, weights, scales, shifts, self.mixing)
        return plus_idle(F.conv2d(norm(z), M[:, :, None, None], b), rest)


class InvertedBlock(nn.Module):
    """1x1 convolution to ``hidden``, depthwise 3x3 convolution, 1x1 convolution to ``out``, each with its norm, ReLU behind the
    first two. A shortcut, the identity, where the shape is kept: ``stride`` 1 and one width for input and output."""

    def __init__(self, space: SearchSpace, into: Segment, hidden: Segment, out: Segment, stride: int, mixing: str) -> None:
        super().__init__()
        self.expand = ElasticConv(space, (into,), hidden, 1, norm="shared", mixing=mixing)
        self.depthwise = MixedDepthwise(space, hidden, stride, mixing)
        self.project = ElasticConv(space, (hidden,), out, 1, norm="shared", mixing=mixing)
        self.stride, self.residual = stride, stride == 1 and into.size == out.size

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, c, H, W) -> (B, c', H', W')
        y = F.relu(self.expand(x, arch), inplace=True)
        y = F.relu(self.depthwise(y, arch), inplace=True)
        y = self.project(y, arch)
        return x + y if self.residual else y

    def layers(self, hw: tuple[int, int]) -> list[Layer]:
        """Its terms, for inputs of ``hw``."""
        after = halved(hw, self.stride // 2)
        return self.expand.layers(hw) + self.depthwise.layers(after) + self.project.layers(after)


class ChannelMobileNet(ChannelNet):
    """The supernet of a ChannelMobileNet space. c0 and c4 are one choice for all that is added.

    ``channels``: of the input image. ``classes``: outputs. ``mixing``: how a mixture of widths blends ("interpolate" or
    "sum"). All widths of a norm share its scales and shifts.
    """

    def __init__(self, space: MobileSpace, channels: int = 3, classes: int = 10, mixing: str = "interpolate") -> None:
        super().__init__(space)
        kind: dict[str, Any] = {"norm": "shared", "mixing": mixing}
        c0, c1, c2, c3, c4, c5, c6 = (space.segment(i) for i in range(7))
        self.stem = ElasticConv(space, (Segment(fixed(channels), channels),), c0, 3, 2, **kind)
        places = ((c0, c1, c0, 1), (c0, c2, c0, 1), (c0, c3, c4, 2), (c4, c5, c4, 1))
        self.blocks = nn.ModuleList(InvertedBlock(space, *place, mixing) for place in places)
        self.final = ElasticConv(space, (c4,), c6, 1, **kind)
        self.classifier = ElasticLinear((c6,), classes)
        self._named()

    def every_block(self) -> list[InvertedBlock]:
        return list(cast(Iterable[InvertedBlock], self.blocks))

    def features(self, x: Tensor, arch: Arch) -> Tensor:
        x = F.relu(self.stem(x, arch), inplace=True)
        for block in self.blocks:
            x = block(x, arch)
        return F.relu(self.final(x, arch), inplace=True)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term, for images of ``input_size`` (H, W); the same in every view."""
        known_view(view)
        hw = halved(input_size, 1)
        records = self.stem.layers(hw)
        for block in self.every_block():
            records += block.layers(hw)
            hw = halved(hw, block.stride // 2)
        return records + self.final.layers(hw) + self.classifier.layers((1, 1))

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts c6 by what the classifier reads, and the channels inside every block by what its second 1x1 convolution reads
        (``nas.protocols.Supernet``). c0 and c4 keep their order: sums tie them together."""
        moved = sort_chain([self.final, self.classifier], trained)
        for block in reversed(self.every_block()):
            keep = trained_widths(block.depthwise.out[0], trained)
            moved += sort_channels([block.expand, block.depthwise], block.project, keep)
        return moved


def build(space: ResidualSpace | MobileSpace, channels: int, classes: int) -> ChannelResNet | ChannelMobileNet:
    """The supernet that serves an arch.json of this module's spaces."""
    if isinstance(space, MobileSpace):
        return ChannelMobileNet(space, channels, classes)
    return ChannelResNet(space, channels, classes)
