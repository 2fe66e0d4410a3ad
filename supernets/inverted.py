"""The supernet of chains of inverted residual blocks (MBConv): elastic depth, width, expand, kernel, resolution.

One block and one net serve every ``search_spaces.inverted.Inverted`` space; supernets.mobilenet and supernets.bignas say what
is particular to a paper. Sources: Cai et al., ICLR 2020, arXiv 1908.09791 (OFA); Wang et al., CVPR 2021, arXiv 2011.09011
(AttentiveNAS). Letters: ``B`` batch, ``C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.inverted import RESOLUTION, Inverted
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture, SearchSpace, Setting, Value
from supernets.elastic import Arch, ElasticConv, Leaf, possible_sizes
from supernets.extract import DropPath
from supernets.kernels import ElasticDepthwise
from supernets.layers import Layer, When, known_view
from supernets.resize import Resize, followed, halved
from supernets.sorting import Moved, sort_channels, trained_widths
from supernets.squeeze import SqueezeExcite
from supernets.superpose import SuperposedLinear

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    # In place where the gradient needs no more than the output; the others would keep a copy of their input.
    "relu": lambda: nn.ReLU(inplace=True), "relu6": lambda: nn.ReLU6(inplace=True), "h_swish": nn.Hardswish, "swish": nn.SiLU,
}  # fmt: skip
At = Callable[[Leaf, int, "When | None"], list[Layer]]
"""(leaf, how often its output was halved, condition) -> its terms."""


class AveragePool(Leaf):
    """Average of squares of ``stride`` x ``stride`` pixels (2); an odd side has one row or column of zeros on both ends
    (AttentiveNAS), so that sides are ceil(side / 2). Neither weights nor cost."""

    def __init__(self, out: Segment, stride: int) -> None:
        super().__init__()
        self.into, self.out, self.stride = (out,), (out,), stride

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        return F.avg_pool2d(x, self.stride, self.stride, _odd_sides(x))

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        """Padded as the first images that go through it, those of the extraction, ask for: a plain network has one size."""
        pool = nn.AvgPool2d(self.stride)

        def pad(module: nn.Module, given: tuple[Tensor]) -> None:
            pool.padding = _odd_sides(given[0])
            once.remove()

        once = pool.register_forward_pre_hook(pad)
        return pool

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return []


def _odd_sides(x: Tensor) -> tuple[int, int]:
    return x.shape[2] % 2, x.shape[3] % 2


class Place(NamedTuple):
    """Where a block stands. ``narrow``: what it reads; ``wide``: what it gives; ``mid``: between; ``identity``: it has a
    shortcut where stride and widths allow the identity; ``projection``: it has one in any case. ``share``: its part of the
    strength of drop path."""

    narrow: Segment
    mid: Segment
    wide: Segment
    kernel: Size
    stride: int
    act: str
    squeeze: bool
    expands: bool
    identity: bool
    projection: bool
    share: float = 0.0


class Block(nn.Module):
    """[1x1 convolution,] depthwise convolution, each with norm and activation, [squeeze and excite,] 1x1 convolution and norm.

    Shortcut: the identity where the stride is 1 and the widths are equal. With ``projection`` others have one too: the
    average pool by the stride, then, where the widths differ, a 1x1 convolution without norm.
    """

    def __init__(self, space: SearchSpace, place: Place, mode: str, eps: float) -> None:
        super().__init__()
        narrow, mid, wide = place.narrow, place.mid, place.wide
        self.place = place
        self.expand = pointwise(space, narrow, mid, eps) if place.expands else None
        self.depthwise = ElasticDepthwise(space, mid, place.kernel, place.stride, mode, eps)
        self.squeeze = SqueezeExcite(mid) if place.squeeze else None
        self.project = pointwise(space, mid, wide, eps)
        self.act = ACTIVATIONS[place.act]()
        widths = {*possible_sizes(narrow.size, space), *possible_sizes(wide.size, space)}
        differ = narrow.size != wide.size and len(widths) > 1  # may they, in any architecture?
        self.pool = AveragePool(narrow, place.stride) if place.projection and place.stride > 1 else None
        self.shortcut = ElasticConv(space, (narrow,), wide, 1, norm=None) if place.projection and differ else None
        self.residual = place.projection or (place.identity and place.stride == 1 and not differ)
        self.drop_path = DropPath(place.share)

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, narrow, H, W) -> (B, wide, H', W'). ``drop``: the strength of drop path, on identity shortcuts alone."""
        y = x if self.expand is None else self.act(self.expand(x, arch))
        y = self.act(self.depthwise(y, arch))
        if self.squeeze is not None:
            y = self.squeeze(y, arch)
        y = self.project(y, arch)
        if not self.residual:
            return y
        same = self.shortcut is None or self.place.narrow.size.at(arch) == self.place.wide.size.at(arch)
        if drop and same and self.pool is None:
            y = self.drop_path(y, drop)
        if self.pool is not None:
            x = self.pool(x, arch)
        if self.shortcut is not None and not same:
            x = self.shortcut(x, arch)
        return x + y

    def layers(self, at: At, times: int, when: When | None) -> list[Layer]:
        """Its terms, for images that were halved so many ``times`` before it; ``when`` it is there."""
        after = times + (self.place.stride == 2)
        records = [] if self.expand is None else at(self.expand, times, when)
        records += at(self.depthwise, after, when)
        if self.squeeze is not None:
            records += self.squeeze.layers((1, 1), when)
        records += at(self.project, after, when)
        if self.shortcut is not None:  # of the first block of a stage, which is always there
            narrow, wide = self.place.narrow.size, self.place.wide.size
            n = len(narrow.on)
            differ = When((*narrow.on, *wide.on), lambda *v: narrow.of(*v[:n]) != wide.of(*v[n:]))
            records += at(self.shortcut, after, differ)
        return records

    def weights(self) -> list[nn.Parameter]:
        """All parameters but the matrices, which are the kernel choice's."""
        matrices = {id(p) for p in self.depthwise.matrices}
        return [p for p in self.parameters() if id(p) not in matrices]


def pointwise(space: SearchSpace, into: Segment, out: Segment, eps: float, kernel: int = 1, stride: int = 1) -> ElasticConv:
    """A convolution and its batch norm, whose scale and shift all widths share."""
    conv = ElasticConv(space, (into,), out, kernel, stride, norm="shared")
    assert conv.norm is not None
    conv.norm.eps = eps
    return conv


class InvertedNet(nn.Module):
    """The supernet of a space of inverted residual blocks.

    ``channels``: of the input image. ``classes``: outputs. ``mode``: how smaller kernels follow from the largest, "crop" or
    "transform" (``supernets.kernels``); plain networks do not tell. ``zero_gamma``: ``reset`` gives the last norm of every
    block with a shortcut the scale 0. ``eps``: of every norm. ``drop_path_stages``: blocks of so many last stages drop their
    identity shortcut's branch.

    ``forward(x, arch, drop)``: ``drop`` is the rate of dropout before the classifier, and the strength of drop path: block i
    of n (of the deepest network) drops its branch for a sample with the rate drop * i / n. Kernels may be mixtures in mode
    "crop"; ``hard`` names the choices that refuse them.
    """

    def __init__(
        self, space: Inverted, channels: int = 3, classes: int = 10, mode: str = "crop", zero_gamma: bool = False,
        eps: float = 1e-5, drop_path_stages: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= drop_path_stages <= len(space.stages):
            raise ValueError(f"drop_path_stages = {drop_path_stages}. Allowed: 0 to {len(space.stages)}, all stages.")
        self.space, self.zero_gamma, self.drop_path_stages, self.mode = space, zero_gamma, drop_path_stages, mode
        image, stem = Segment(fixed(channels), channels), self._segment(space.stem_size())
        self.resize = Resize(Size((RESOLUTION,), int), channels) if space.resolutions else None
        self.stem = pointwise(space, image, stem, eps, 3, space.stem_stride)
        self.act = ACTIVATIONS[space.act]()
        self.first = None if space.first is None else Block(space, self._first_place(stem, space.first), mode, eps)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(space, self._place(s, b), mode, eps) for b in range(stage.blocks))
            for s, stage in enumerate(space.stages)
        )
        last, final, mix = self._segment(space.out_size(len(space.stages) - 1)), space.final_size(), space.mix_size()
        self.final = pointwise(space, last, self._segment(final), eps)
        features = self._segment(final if mix is None else mix)
        self.mix = None if mix is None else ElasticConv(space, (self._segment(final),), features, 1, norm=None)
        self.classifier = SuperposedLinear(space, (features,), Segment(fixed(classes), classes))
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name
        self._zero()

    def _segment(self, size: Size) -> Segment:
        return Segment(size, possible_sizes(size, self.space)[-1])

    def _first_place(self, stem: Segment, width: int) -> Place:
        space = self.space
        return Place(stem, stem, self._segment(fixed(width)), fixed(3), 1, space.first_act, squeeze=False, expands=False,
                     identity=space.first_residual, projection=False)  # fmt: skip

    def _place(self, s: int, b: int) -> Place:
        space, stage = self.space, self.space.stages[s]
        before, n = sum(earlier.blocks for earlier in space.stages[:s]), sum(each.blocks for each in space.stages)
        dropped = s >= len(space.stages) - self.drop_path_stages
        return Place(
            self._segment(space.in_size(s, b)), self._segment(space.mid_size(s, b)), self._segment(space.out_size(s)),
            space.kernel_size(s, b), 1 if b else stage.stride, stage.act, stage.squeeze, space.expands(s), identity=True,
            projection=space.projection, share=(before + b) / n if dropped else 0.0,
        )  # fmt: skip

    @property
    def hard(self) -> frozenset[str]:
        """The names of the choices that refuse mixtures."""
        kernels = {self.space.kernel_name(s, b) for s, stage in enumerate(self.space.stages) for b in range(stage.blocks)}
        soft = {name for name in kernels if self.mode == "crop" and len(self.space.root[name].options) > 1}
        return frozenset(choice.name for choice in self.space.choices if choice.name not in soft)

    def blocks(self, s: int) -> list[Block]:
        """All blocks of stage ``s``."""
        return list(cast(Iterable[Block], self.stages[s]))

    def every_block(self) -> Iterator[Block]:
        """The fixed block, where there is one, and those of all stages."""
        if self.first is not None:
            yield self.first
        for s in range(len(self.stages)):
            yield from self.blocks(s)

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        self._refuse_mixtures(arch)
        if self.resize is not None:
            x = self.resize(x, arch)
        x = self.act(self.stem(x, arch))
        if self.first is not None:
            x = self.first(x, arch)
        for s in range(len(self.stages)):
            blocks, depth = self.blocks(s), int(cast(Value, arch[self.space.depth_name(s)]))
            if not 1 <= depth <= len(blocks):
                raise ValueError(f"a stage cannot keep {depth} blocks. Allowed: 1 to {len(blocks)}.")
            for block in blocks[:depth]:
                x = block(x, arch, drop if block.place.share else 0.0)
        x = F.adaptive_avg_pool2d(self.act(self.final(x, arch)), 1)
        if self.mix is not None:
            x = self.act(self.mix(x, arch))
        x = torch.flatten(x, 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def _refuse_mixtures(self, arch: Mapping[str, Setting]) -> None:
        mixed = [name for name, setting in arch.items() if isinstance(setting, Mixture)]
        wrong = next((name for name in mixed if name in self.hard), None) if mixed else None
        if wrong is not None:
            raise ValueError(f"{wrong} is a mixture, and this supernet mixes elastic kernels alone, in mode 'crop'. "
                             "Give one option.")

    # -- readings ---------------------------------------------------------------------------------------------------

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term; the same in every view. ``input_size``: of the images (H, W), read where the space does
        not choose the resolution; where it does, sizes follow the choice."""
        known_view(view)

        def at(leaf: Leaf, times: int, when: When | None = None) -> list[Layer]:
            records = leaf.layers(halved(input_size, times), when)
            return records if self.resize is None else [followed(record, RESOLUTION, times) for record in records]

        times = int(self.space.stem_stride == 2)
        records = at(self.stem, times)
        if self.first is not None:
            records += self.first.layers(at, times, None)
        for s, stage in enumerate(self.space.stages):
            for b, block in enumerate(self.blocks(s)):
                there = When((self.space.depth_name(s),), lambda d, b=b: d > b) if b else None
                records += block.layers(at, times, there)
                times += b == 0 and stage.stride == 2
        records += at(self.final, times)
        if self.mix is not None:
            records += self.mix.layers((1, 1))
        return records + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Of a depth: the blocks, without matrices, that only its deepest option runs (any option: that not all run); of a
        kernel: matrices that only it needs, of blocks that are there."""
        for s in range(len(self.stages)):
            if choice == self.space.depth_name(s):
                blocks, options = self.blocks(s), [int(d) for d in self.space.root[choice].options]
                if option is None:
                    return [p for block in blocks[options[0] :] for p in block.weights()]
                shared = max((d for d in options if d != option), default=option)
                return [p for block in blocks[shared : max(option, shared)] for p in block.weights()]
        return [p for leaf in self.modules() if isinstance(leaf, Leaf) for p in leaf.owned(choice, option)]

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts the channels inside every block and the hidden units of its squeeze and excite, by what the second 1x1
        convolution reads (``nas.protocols.Supernet``). Blocks of expand 1 stay: their channels are the stream's."""
        moved: Moved = []
        for block in self.every_block():
            if block.expand is not None:
                keep = trained_widths(block.place.mid, trained)
                moved += sort_channels([block.expand, block.depthwise], block.project, keep, block.squeeze)
        return moved

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order: convolutions N(0, 2 / (k k outputs)), the
        classifier U(+-1 / sqrt(inputs)), matrices the identity, norms 1 and 0, with ``zero_gamma`` 0 where it says."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)
        self._zero()

    def _zero(self) -> None:
        for block in self.every_block() if self.zero_gamma else ():
            if block.residual and block.project.norm is not None:
                nn.init.zeros_(block.project.norm.weight[0])
