"""Residual nets whose widths and depths are chosen (TAS, section 2 of Dong & Yang, NeurIPS 2019, arXiv 1905.09717).

kind "tas": every convolution has a width of its own, as in the paper; the plain network resizes where widths differ.
kind "tied": one residual width a stage, so that every sum meets equal widths and plain networks keep their weights.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from search_spaces.sizes import Size
from search_spaces.space import Choice, SearchSpace, require

KINDS = ("tied", "tas")


class Stage(NamedTuple):
    """``width``: full, before expansion. ``stride``: of the first block; the others have 1."""

    blocks: int
    width: int
    stride: int


def width_options(full: int) -> tuple[int, ...]:
    """The candidate widths of a convolution with ``full`` channels: int(full * r) for r = 0.3, 0.4, .., 1.0.

    In whole numbers, so that no rounding of r decides; at least 1. 16 -> 4 6 8 9 11 12 14 16.
    """
    return tuple(sorted({max(1, full * tenths // 10) for tenths in range(3, 11)}))


def cifar_depths(blocks: int) -> tuple[int, ...]:
    """1, 2, .. ``blocks`` for up to three; 1, 3, 5, .. and ``blocks`` for more."""
    step = 1 if blocks <= 3 else 2
    return tuple(sorted({*range(1, blocks + 1, step), blocks}))


def imagenet_depths(blocks: int, fewest: int) -> tuple[int, ...]:
    """int(blocks * j / fewest) for j = 1 .. ``fewest``, the smallest number of blocks of any stage."""
    return tuple(blocks * j // fewest for j in range(1, fewest + 1))


class Residual:
    """What a residual space knows besides its choices: the skeleton, and the choice that governs each size.

    ``expansion``: 1 (basic blocks, ``convs`` = 2) or 4 (bottleneck blocks, ``convs`` = 3). ``stem``: its full width.
    """

    stages: tuple[Stage, ...]
    expansion: int
    convs: int
    stem: int
    kind: str

    def stem_size(self) -> Size:
        """The out channels of the stem. Tied basic blocks add to them unchanged, so there it is the stage's width."""
        shared = self.kind == "tied" and self.expansion == 1
        return Size(("stage0.width" if shared else "stem.width",), _same)

    def conv_size(self, s: int, b: int, c: int) -> Size:
        """The out channels of convolution ``c`` of block ``b`` of stage ``s``."""
        shared = self.kind == "tied" and c == self.convs - 1
        return Size((f"stage{s}.width" if shared else f"stage{s}.block{b}.conv{c}.width",), _same)

    def depth_name(self, s: int) -> str:
        """The choice that says how many blocks of stage ``s`` are kept, from the first."""
        return f"stage{s}.depth"

    def _skeleton(self, stages: Sequence[Stage], bottleneck: bool, kind: str, depths: Sequence[tuple[int, ...]],
                  ) -> list[Choice]:
        """Sets the attributes; returns the choices: the stem, then width, depth and inner widths of each stage."""
        require("kind", kind, KINDS)
        self.stages, self.kind = tuple(stages), kind
        self.expansion, self.convs = (4, 3) if bottleneck else (1, 2)
        self.stem = stages[0].width
        choices: list[Choice] = []
        if self.stem_size().on == ("stem.width",):
            choices.append(Choice("stem.width", width_options(self.stem)))
        for s, (stage, kept) in enumerate(zip(self.stages, depths)):
            if kind == "tied":
                choices.append(Choice(f"stage{s}.width", width_options(stage.width * self.expansion)))
            choices.append(Choice(self.depth_name(s), kept))
            for b in range(stage.blocks):
                needs = ((self.depth_name(s), tuple(depth for depth in kept if depth > b)),)
                for c in range(self.convs if kind == "tas" else self.convs - 1):
                    full = stage.width * (self.expansion if c == 2 else 1)
                    choices.append(Choice(f"stage{s}.block{b}.conv{c}.width", width_options(full), needs=needs))
        return choices


class CifarResNet(Residual, SearchSpace):
    """ResNet-20 and its kin for small images: three stages, strides 1, 2, 2.

    ``depth``: 6n + 2 layers (n basic blocks a stage), or 164 (18 bottleneck blocks a stage). ``kind``: see the top of
    this file. ``widths``: the full width of each stage; the stem has the first. Raises ValueError for other values.
    """

    BLOCKS = {8: 1, 14: 2, 20: 3, 32: 5, 44: 7, 56: 9, 110: 18, 164: 18}  # noqa: RUF012  a constant table
    WIDTHS = (16, 32, 64)

    def __init__(self, depth: int, kind: str = "tied", widths: Sequence[int] = WIDTHS) -> None:
        require("depth", depth, tuple(self.BLOCKS))
        n = self.BLOCKS[depth]
        stages = [Stage(n, width, stride) for width, stride in zip(_full(widths, self.WIDTHS), (1, 2, 2))]
        choices = self._skeleton(stages, depth == 164, kind, [cifar_depths(n)] * 3)
        super().__init__(choices, _args(depth, kind, widths, self.WIDTHS))


class ImageNetResNet(Residual, SearchSpace):
    """ResNet-18, -34 (basic blocks) and -50 (bottleneck blocks): four stages, strides 1, 2, 2, 2 after the pooled stem.

    Arguments as for ``CifarResNet``.
    """

    BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # noqa: RUF012  a constant table
    WIDTHS = (64, 128, 256, 512)

    def __init__(self, depth: int, kind: str = "tied", widths: Sequence[int] = WIDTHS) -> None:
        require("depth", depth, tuple(self.BLOCKS))
        blocks = self.BLOCKS[depth]
        full = _full(widths, self.WIDTHS)
        stages = [Stage(n, width, stride) for n, width, stride in zip(blocks, full, (1, 2, 2, 2))]
        choices = self._skeleton(stages, depth == 50, kind, [imagenet_depths(n, min(blocks)) for n in blocks])
        super().__init__(choices, _args(depth, kind, widths, self.WIDTHS))


def _same(width: int) -> int:
    return width


def _full(widths: Sequence[int], usual: tuple[int, ...]) -> tuple[int, ...]:
    if len(widths) != len(usual) or any(not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"widths = {list(widths)}: give {len(usual)} positive integers, one a stage, "
                         f"such as {list(usual)}.")
    return tuple(widths)


def _args(depth: int, kind: str, widths: Sequence[int], usual: tuple[int, ...]) -> dict[str, object]:
    """What rebuilds the space; usual widths go unsaid."""
    return {"depth": depth, "kind": kind} | ({} if tuple(widths) == usual else {"widths": list(widths)})
