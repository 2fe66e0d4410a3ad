"""ResNet supernets of search_spaces.resnet: width of every convolution (or of every stage) and depth of every stage.

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width. Skeleton as in TAS, section 2: post-activation blocks;
a stride-2 shortcut is a 2x2 average pool and a 1x1 convolution (batch norm on ImageNet, none on CIFAR).
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.sizes import Segment, Size
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.elastic import ElasticConv, ElasticLinear, Leaf, ResidualSum
from supernets.layers import Layer, When, known_view
from supernets.mixing import active, blend, interpolate_channels
from supernets.sorting import Moved, sort_chain


class Block(nn.Module):
    """Basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) block; the stride sits on the first 3x3 convolution."""

    def __init__(self, convs: list[ElasticConv], shortcut: ElasticConv | None, add: ResidualSum, pool: bool) -> None:
        super().__init__()
        self.conv0, self.conv1 = convs[:2]
        self.conv2 = convs[2] if len(convs) == 3 else None
        # The last, partial window of an odd size counts only real pixels, so sizes agree with a stride-2 convolution.
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pool else None
        self.shortcut, self.add = shortcut, add

    def convs(self) -> list[ElasticConv]:
        return [self.conv0, self.conv1] + ([self.conv2] if self.conv2 is not None else [])

    def forward(self, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
        y = F.relu(self.conv0(x, arch), inplace=True)
        y = self.conv1(y, arch)
        if self.conv2 is not None:
            y = self.conv2(F.relu(y, inplace=True), arch)
        if self.pool is not None:
            x = self.pool(x)
        if self.shortcut is not None:
            x = self.shortcut(x, arch)
        return F.relu(self.add(x, y, arch), inplace=True)


class ResNet(nn.Module):
    """The supernet of a CifarResNet or ImageNetResNet space.

    ``channels``: of the input image. ``classes``: outputs. ``mixing``: how a mixture of widths blends ("interpolate", TAS's
    CWI, or "sum", zero padding). ``norm``: "separate" scales and shifts per candidate width (TAS), or "shared".
    ``forward(x, arch, drop)``: ``drop`` is the dropout probability before the classifier.
    """

    def __init__(
        self,
        space: CifarResNet | ImageNetResNet,
        channels: int = 3,
        classes: int = 10,
        mixing: str = "interpolate",
        norm: str = "separate",
    ) -> None:
        super().__init__()
        self.space = space
        self.imagenet = isinstance(space.root, ImageNetResNet)
        kind: dict[str, Any] = {"norm": norm, "mixing": mixing}
        image = (Segment(Size((), lambda: channels), channels),)
        stem = Segment(space.stem_size(), space.stem)
        self.stem = ElasticConv(space, image, stem, 7 if self.imagenet else 3, 2 if self.imagenet else 1, **kind)
        self.pool = nn.MaxPool2d(3, 2, 1) if self.imagenet else None
        self.stages = nn.ModuleList()
        source = stem
        for s, stage in enumerate(space.stages):
            blocks = nn.ModuleList()
            for b in range(stage.blocks):
                block, source = self._block(s, b, source, stage.stride if b == 0 else 1, kind)
                blocks.append(block)
            self.stages.append(blocks)
        self.classifier = ElasticLinear((source,), classes)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def _block(self, s: int, b: int, source: Segment, stride: int, kind: dict) -> tuple[Block, Segment]:
        space, width = self.space, self.space.stages[s].width
        bottleneck = space.convs == 3
        kernels, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        convs, into = [], source
        for c, (kernel, step) in enumerate(zip(kernels, strides)):
            full = width * space.expansion if c == space.convs - 1 else width
            out = Segment(space.conv_size(s, b, c), full)
            convs.append(ElasticConv(space, (into,), out, kernel, step, **kind))
            into = out
        # The TAS search net normalises after every shortcut; the CIFAR net that is derived does not.
        norm = kind["norm"] if self.imagenet or space.kind == "tas" else None
        shortcut = None
        if stride == 2 or source.full != into.full:
            shortcut = ElasticConv(space, (source,), into, 1, 1, norm, self.imagenet, kind["mixing"])
        add = ResidualSum(source.size, into, derived_norm=self.imagenet or not bottleneck)
        return Block(convs, shortcut, add, pool=stride == 2), into

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        x = F.relu(self.stem(x, arch), inplace=True)
        if self.pool is not None:
            x = self.pool(x)
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
        """Every additive cost term, for images of ``input_size`` (H, W).

        "derived": the plain network that extraction builds; "searched": the estimator inside TAS's cost loss, (10)-(13):
        a stage reads the width written for the previous stage's LAST block even where depth drops it, and projections of
        unequal widths are not counted; "estimated": the released code's cost of a hard architecture: as "searched", with
        those projections.
        """
        known_view(view)
        hw = _halved(input_size) if self.imagenet else input_size
        records = self.stem.layers(hw)
        if self.pool is not None:
            hw = _halved(hw)
        sources: list[tuple[When | None, Size]] = [(None, self.space.stem_size())]
        for s in range(len(self.stages)):
            before, hw = hw, _halved(hw) if self.space.stages[s].stride == 2 else hw
            for b, block in enumerate(self.blocks(s)):
                there = When((self.space.depth_name(s),), lambda d, b=b: d > b) if b else None
                if b:
                    sources = [(there, self.space.conv_size(s, b - 1, self.space.convs - 1))]
                for when, source in sources:
                    records += self._reading(block, before if b == 0 else hw, hw, when, source, view)
                for conv in block.convs()[1:]:
                    records += conv.layers(hw, there)
            sources = self._outputs(s, view)
        for when, source in sources:
            records += self.classifier.layers((1, 1), when, source)
        return records

    @staticmethod
    def _reading(
        block: Block, before: tuple[int, int], hw: tuple[int, int], when: When | None, source: Size, view: str
    ) -> Iterator[Layer]:
        """The terms of a block that depend on its input; ``before``: the input's size."""
        yield from block.conv0.layers(before if block.conv2 is not None else hw, when, source)
        if block.shortcut is not None:
            yield from block.shortcut.layers(hw, when, source)
        elif view != "searched":
            yield from block.add.layers(hw, when, source)

    def _outputs(self, s: int, view: str) -> list[tuple[When | None, Size]]:
        """What stage ``s`` hands on: one alternative, or one for each depth (listed or not) that ends in a width of its own."""
        name, last = self.space.depth_name(s), self.space.convs - 1
        ends = {d: self.space.conv_size(s, d - 1, last) for d in range(1, len(self.blocks(s)) + 1)}
        if view != "derived" or len({size.on for size in ends.values()}) == 1:
            return [(None, self.space.conv_size(s, len(self.blocks(s)) - 1, last))]
        return [(When((name,), lambda depth, d=d: depth == d), size) for d, size in ends.items()]

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Batch norms of one width; blocks that only the deepest option of a depth runs (any option: that not all run)."""
        for s in range(len(self.stages)):
            if choice == self.space.depth_name(s):
                return only_deeper(self.blocks(s), self.space.root[choice].options, option)
        return [p for leaf in self.modules() if isinstance(leaf, Leaf) for p in leaf.owned(choice, option)]

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts the widths inside each block, from behind (``nas.protocols.Supernet``). The width of a block's last
        convolution keeps its order: the sums tie it to the shortcut, the stage's other blocks and what comes after. Needs norm
        "shared"."""
        blocks = [block for s in range(len(self.stages)) for block in self.blocks(s)]
        return [place for block in blocks for place in sort_chain(block.convs(), trained)]

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def run_stage(blocks: Sequence[Block], depth: Setting, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
    """The first ``depth`` blocks; of a mixture, the taps after each active depth at the widest width (TAS (9)).

    ValueError for depths that ``blocks`` do not have, and for gates.
    """
    if not isinstance(depth, Mixture):
        if not 1 <= int(depth) <= len(blocks):
            raise ValueError(f"a stage cannot keep {depth} blocks. Allowed: 1 to {len(blocks)}.")
        for block in blocks[: int(depth)]:
            x = block(x, arch)
        return x
    if depth.idle == "gate":
        raise ValueError("idle='gate' runs candidates again in the backward pass; the taps of a stage are one pass.")
    taps: dict[int, Tensor] = {}
    wanted = [int(depth.options[j]) for j in active(depth)]
    for b, block in enumerate(blocks[: max(wanted)]):
        x = block(x, arch)
        if b + 1 in wanted:
            taps[b + 1] = x
    C = max(tap.shape[1] for tap in taps.values())
    candidates = [lambda _, w, d=int(d): (interpolate_channels(taps[d], C), w) for d in depth.options]
    return blend(candidates, x, depth)


def only_deeper(blocks: Sequence[nn.Module], depths: Sequence[Any], option: Any = None) -> list[nn.Parameter]:
    """The parameters of blocks that only the depth ``option`` of ``depths`` runs, where it is the deepest (None: that not all
    depths run)."""
    if option is None:
        kept = blocks[min(depths) :]
    else:
        shared = max((d for d in depths if d != option), default=0)
        kept = blocks[shared : max(option, shared)]
    return [p for block in kept for p in block.parameters()]


def _halved(hw: tuple[int, int]) -> tuple[int, int]:
    """The output size of a padded stride-2 layer."""
    return (hw[0] + 1) // 2, (hw[1] + 1) // 2


def build(space: CifarResNet | ImageNetResNet, channels: int, classes: int) -> ResNet:
    """The supernet that serves an arch.json of this module's spaces; what its plain networks look like depends on the
    space alone."""
    return ResNet(space, channels, classes)
