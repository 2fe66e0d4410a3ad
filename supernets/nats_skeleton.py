"""The skeleton that both NATS-Bench supernets share (page spaces-nb201-nats-macro, sections 1 and 2): stem, three stages of
cells with a residual block of stride 2 between them, BN-ReLU, pooling, classifier. All weights start as PyTorch's do.

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import SearchSpace, Setting
from supernets.elastic import ElasticConv, Leaf, Normalise, init_default, possible_sizes
from supernets.layers import Layer, Shape, When, known_view, term
from supernets.norms import adopt_norm, plain_norm
from supernets.operations import Classifier

Arch = Mapping[str, Setting]


class Convolution(ElasticConv):
    """An elastic convolution that starts as PyTorch's do."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        init_default(self.weight, generator)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        chain = cast(nn.Sequential, super().plain(arch, *c_in, inherit=inherit))
        if not inherit:
            init_default(cast(nn.Conv2d, chain[0]).weight)
        return chain


class Norm(Leaf):
    """Batch norm of a state: one scale and shift for each channel, whatever the width."""

    def __init__(self, space: SearchSpace, out: Segment) -> None:
        super().__init__()
        self.into = self.out = (out,)
        self.norm = Normalise(possible_sizes(out.size, space), separate=False)

    def reset(self, generator: torch.Generator | None = None) -> None:
        nn.init.ones_(self.norm.weight[0])
        nn.init.zeros_(self.norm.bias[0])

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, c, H, W) -> the same
        return self.norm(x, *self.norm.affine(x.shape[1]))

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        return plain_norm(self.norm, c_in[0], None, inherit)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return [term(self.name, "norm", (self.out[0].size,), when, lambda c: Shape(c, c, hw=hw))]

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        adopt_norm(self.name, self.norm, cast(nn.BatchNorm2d, plain[""]))


class Residual(nn.Module):
    """Two pre-activated 3x3 convolutions, the first of stride 2, beside a 2x2 average pool and a 1x1 convolution."""

    def __init__(self, space: SearchSpace, into: Segment, out: Segment, **kind: Any) -> None:
        super().__init__()
        self.conv0 = Convolution(space, (into,), out, 3, 2, **kind)
        self.conv1 = Convolution(space, (out,), out, 3, **kind)
        # The last, partial window of an odd size counts only real pixels, so sizes agree with a stride-2 convolution.
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.shortcut = Convolution(space, (into,), out, 1, norm=None, mixing=kind["mixing"])

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, c, H, W) -> (B, c', H / 2, W / 2)
        y = self.conv0(F.relu(x), arch)
        y = self.conv1(F.relu(y, inplace=True), arch)
        return self.shortcut(self.pool(x), arch) + y

    def layers(self, hw: tuple[int, int]) -> list[Layer]:
        return [record for leaf in (self.conv0, self.conv1, self.shortcut) for record in leaf.layers(hw)]


class Skeleton(nn.Module):
    """What both nets share. ``widths``: of the stem, the first reduction, the second cell's output, and so on (c1..c5);
    ``cells``: those of one stage, given its input's and output's width."""

    def __init__(
        self, space: SearchSpace, channels: int, classes: int, widths: Sequence[Segment],
        cells: Callable[[Segment, Segment], Iterable[nn.Module]], **kind: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.space = space
        c1, c2, c3, c4, c5 = widths
        self.stem = Convolution(space, (Segment(fixed(channels), channels),), c1, 3, **kind)
        stages = ((c1, c1), (c2, c3), (c4, c5))
        self.stages = nn.ModuleList(nn.ModuleList(cells(into, out)) for into, out in stages)
        self.reductions = nn.ModuleList([Residual(space, c1, c2, **kind), Residual(space, c3, c4, **kind)])
        self.norm = Norm(space, c5)
        self.classifier = Classifier((c5,), classes)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes). ``drop``: dropout probability before the classifier."""
        x = self.stem(x, arch)
        for s in range(3):
            if s:
                x = self.reductions[s - 1](x, arch)
            for cell in self.cells(s):
                x = cell(x, arch)
        x = F.relu(self.norm(x, arch), inplace=True)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def cells(self, s: int) -> list[Any]:
        """All cells of stage ``s``."""
        return list(cast(Iterable[nn.Module], self.stages[s]))

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term of the network that is trained alone, for images of ``input_size`` (H, W): the same in
        all views. Operations on states that reach nothing count, as in the published figures."""
        known_view(view)
        hw = input_size
        records = self.stem.layers(hw)
        for s in range(3):
            if s:
                hw = (hw[0] + 1) // 2, (hw[1] + 1) // 2
                records += cast(Residual, self.reductions[s - 1]).layers(hw)
            for cell in self.cells(s):
                records += cell.layers(hw)
        return records + self.norm.layers(hw) + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Batch norms of one width."""
        return [p for leaf in self.modules() if isinstance(leaf, Leaf) for p in leaf.owned(choice, option)]

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)
