"""The supernet of search_spaces.preresnet: widths whose mixtures are scales of channels.

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width, ``K`` options.

A mixture of the widths 1 .. C with weights w, of which each keeps its first channels, is every channel once, scaled by
the tail sum s_c = sum over k >= c of w_k. So the scales of a batch norm (Network Slimming's gamma, RARTS's alpha) are
architecture variables and no weights: the norms here have a shift of their own and take their scale from ``arch``.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.preresnet import PreResNet as Space
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture, SearchSpace, Setting, Value
from supernets.elastic import Arch, ElasticConv, ElasticLinear, Leaf, Normalise, prefix
from supernets.layers import Layer, Shape, When, known_view, term
from supernets.mixing import idle_ones, plus_idle
from supernets.sorting import Moved
from supernets.superpose import tail_sums


class ScaledNorm(Leaf):
    """Batch norm of the first c of C channels, with a shift but no scale of its own.

    A value c: the first c channels, scale 1. A mixture of widths: the channels of its widest active option, scaled by the
    tail sums of the active options' weights. An input of more channels is cut.
    """

    def __init__(self, into: Segment, size: Size) -> None:
        super().__init__()
        self.into, self.out = (into,), (Segment(size, into.full),)
        self.norm = Normalise((into.full,), separate=False, affine=False)
        self.shift = nn.Parameter(torch.zeros(into.full))

    def reset(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            self.shift.zero_()

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c or more, H, W) -> (B, c, H, W)."""
        scale, rest = self._scale(arch[self.out[0].size.on[0]])
        c = len(scale)
        return plus_idle(self.norm(prefix(x, 1, c), scale.to(self.shift.dtype), prefix(self.shift, 0, c)), rest)

    def _scale(self, setting: Setting) -> tuple[Tensor, Tensor | float]:
        """The scales (c,), and what idle options add."""
        if not isinstance(setting, Mixture):
            return self.shift.new_ones(int(setting)), 0.0
        if setting.idle == "gate":
            raise ValueError(f"{self.name}: idle='gate' needs separate candidates; widths share one batch norm")
        if setting.active is None:
            return tail_sums(setting.weights, setting.options), 0.0
        at = list(setting.active)
        return tail_sums(setting.weights[at], [setting.options[k] for k in at]), idle_ones(setting)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        """A BatchNorm2d of scale 1, behind a slice where the input has more channels."""
        (i,), c = c_in, self.out[0].size.at(arch)
        norm = nn.BatchNorm2d(c).to(self.shift)
        if inherit:
            with torch.no_grad():
                norm.bias.copy_(self.shift[:c])
                norm.running_mean.copy_(self.norm.running_mean[:c])  # type: ignore[union-attr]
                norm.running_var.copy_(self.norm.running_var[:c])  # type: ignore[union-attr]
        return FirstChannels(norm, cut=c < i)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return [term(f"{self.name}.norm", "norm", (self.out[0].size,), when, lambda c: Shape(c, c, hw=hw))]

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """Takes shift and statistics. Raises ValueError for scales other than 1: there is no place for them here."""
        norm = plain["norm"]
        assert isinstance(norm, nn.BatchNorm2d)
        if not bool((norm.weight == 1).all()):
            raise ValueError(
                f"{self.name}: this batch norm was trained with scales of its own, but here the scales are the architecture's. "
                "Start from fresh weights, or from a network whose batch norms have scale 1."
            )
        c = norm.num_features
        self.shift[:c].copy_(norm.bias)
        self.norm.running_mean[:c].copy_(norm.running_mean)  # type: ignore[arg-type]
        self.norm.running_var[:c].copy_(norm.running_var)  # type: ignore[arg-type]


class FirstChannels(nn.Module):
    """norm(the first channels of x); extraction inlines it."""

    def __init__(self, norm: nn.BatchNorm2d, cut: bool) -> None:
        super().__init__()
        self.norm, self.cut = norm, cut

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:, : self.norm.num_features] if self.cut else x)


class Block(nn.Module):
    """Norm, ReLU and convolution three times (1x1, 3x3, 1x1), added to the stream or to its projection.

    The stride sits on the 3x3 convolution and on the projection, which reads the stream as it is.
    """

    def __init__(self, norms: list[ScaledNorm], convs: list[ElasticConv], shortcut: ElasticConv | None) -> None:
        super().__init__()
        self.norm0, self.conv0 = norms[0], convs[0]
        self.norm1, self.conv1 = norms[1], convs[1]
        self.norm2, self.conv2 = norms[2], convs[2]
        self.shortcut = shortcut

    def forward(self, x: Tensor, arch: Arch, widest: Mapping[str, Value]) -> Tensor:
        y = self.conv0(F.relu(self.norm0(x, arch), inplace=True), widest)
        y = self.conv1(F.relu(self.norm1(y, arch), inplace=True), widest)
        y = self.conv2(F.relu(self.norm2(y, arch), inplace=True), widest)
        return y + (x if self.shortcut is None else self.shortcut(x, widest))

    def layers(self, before: tuple[int, int], hw: tuple[int, int]) -> list[Layer]:
        """Its cost terms; ``before``: the input's size, ``hw``: the output's."""
        records = self.norm0.layers(before) + self.conv0.layers(before) + self.norm1.layers(before)
        records += self.conv1.layers(hw) + self.norm2.layers(hw) + self.conv2.layers(hw)
        return records + (self.shortcut.layers(hw) if self.shortcut is not None else [])


class PreResNet(nn.Module):
    """The supernet of a PreResNet space. ``channels``: of the input image. ``classes``: outputs.

    ``forward(x, arch, drop)``: ``drop`` is the dropout probability before the classifier. A hard architecture runs with
    scale 1: the scales that a search has learnt are its architecture's, so a network is retrained after the search.
    """

    def __init__(self, space: Space, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.space = space
        self.full = {choice.name: len(choice.options) for choice in space.root.choices}
        conv = partial(ElasticConv, space, norm=None)
        self.stem = conv((Segment(fixed(channels), channels),), Segment(fixed(space.stem), space.stem))
        self.stages = nn.ModuleList()
        source = self.stem.out[0]
        for s, stage in enumerate(space.stages):
            blocks = nn.ModuleList()
            for b in range(stage.blocks):
                stride, out = stage.stride if b == 0 else 1, Segment(fixed(space.stream(s)), space.stream(s))
                inner = [Segment(space.norm_size(s, b, c), stage.width) for c in (1, 2)]
                norms = [ScaledNorm(into, space.norm_size(s, b, c)) for c, into in enumerate((source, *inner))]
                read = [norm.out[0] for norm in norms]
                convs = [conv((read[0],), read[1], 1), conv((read[1],), read[2], 3, stride), conv((read[2],), out, 1)]
                blocks.append(Block(norms, convs, conv((source,), out, 1, stride) if b == 0 else None))
                source = out
            self.stages.append(blocks)
        self.final = ScaledNorm(source, space.final_size())
        self.classifier = ElasticLinear(self.final.out, classes)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        widest = {name: self._widest(name, arch[name]) for name in self.full}
        x = self.stem(x, widest)
        for s in range(len(self.stages)):
            for block in self.blocks(s):
                x = block(x, arch, widest)
        x = F.relu(self.final(x, arch), inplace=True)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, widest)

    def blocks(self, s: int) -> list[Block]:
        """All blocks of stage ``s``."""
        return [cast(Block, block) for block in cast(nn.ModuleList, self.stages[s])]

    def _widest(self, name: str, setting: Setting) -> int:
        """The width that convolutions compute: norms scale behind them, so a mixture is its widest active option there."""
        if isinstance(setting, Mixture):
            options = setting.options if setting.active is None else [setting.options[k] for k in setting.active]
            setting = max(options, default=0)
        if setting not in range(1, self.full[name] + 1):
            raise ValueError(f"{name} cannot keep {setting} channels. Allowed: 1 to {self.full[name]}.")
        return int(setting)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term, for images of ``input_size`` (H, W); the same in every view."""
        known_view(view)
        hw = input_size
        records = self.stem.layers(hw)
        for s, stage in enumerate(self.space.stages):
            for b, block in enumerate(self.blocks(s)):
                before, hw = hw, hw if b or stage.stride == 1 else ((hw[0] + 1) // 2, (hw[1] + 1) // 2)
                records += block.layers(before, hw)
        return records + self.final.layers(hw) + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """None: narrower options are prefixes of wider ones."""
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: the scales of channels are the architecture's (alphas, one a channel), which a sort would leave behind."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def build(space: Space, channels: int, classes: int) -> PreResNet:
    """The supernet that serves an arch.json of this module's spaces."""
    return PreResNet(space, channels, classes)
