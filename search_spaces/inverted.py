"""What spaces of inverted residual blocks (MBConv) share: the skeleton, and the choice that governs each size.

A block of ``e`` times its own input: 1x1 convolution to the mid width, depthwise k x k, squeeze and excite where the stage has
it, 1x1 convolution to the stage's width. Channels are the first ones, blocks beyond the depth are inert.
Sources: Cai et al., ICLR 2020, arXiv 1908.09791 (rounding, once for all); Wang et al., CVPR 2021, arXiv 2011.09011.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from search_spaces.choice import listed, positive
from search_spaces.sizes import Size, fixed
from search_spaces.space import Choice, SearchSpace

DIVISOR = 8
RESOLUTION = "resolution"


class Stage(NamedTuple):
    """``widths``, ``depths``, ``kernels``, ``expands``: ascending options. ``stride``: of the first block; the others have 1.

    ``act``: "relu", "relu6", "h_swish" or "swish", of every block. ``squeeze``: whether its blocks squeeze and excite.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    expands: tuple[int, ...]
    stride: int
    act: str
    squeeze: bool

    @property
    def blocks(self) -> int:
        """Of the deepest network."""
        return self.depths[-1]


def make_divisible(v: float) -> int:
    """The multiple of 8 nearest to ``v`` (halves up), 8 at least, and one more step where that loses over a tenth of ``v``."""
    n = max(DIVISOR, int(v + DIVISOR / 2) // DIVISOR * DIVISOR)
    return n + DIVISOR if n < 0.9 * v else n


def mid_width(c_in: int, expand: float) -> int:
    """Channels inside a block of ``c_in`` (residual networks: of its output), ``expand`` times as wide."""
    return make_divisible(round(c_in * expand))


def squeeze_width(mid: int) -> int:
    """Hidden channels of squeeze and excite inside a block of ``mid`` channels."""
    return make_divisible(mid // 4)


def composed(of: Callable[..., int], *sizes: Size) -> Size:
    """The size ``of`` other sizes: it names every choice that they name, once."""
    on = tuple(dict.fromkeys(itertools.chain.from_iterable(size.on for size in sizes)))
    return Size(on, functools.partial(_composed, of, sizes, on))


def _composed(of: Callable[..., int], sizes: Sequence[Size], on: Sequence[str], *values: Any) -> int:
    said = dict(zip(on, values))
    return of(*(size.of(*(said[name] for name in size.on)) for size in sizes))


class Inverted(SearchSpace):
    """Sizes of a space whose ``stages`` are chains of MBConv blocks.

    ``per_block``: whether each block has its own kernel and expand (``stage{s}.block{b}.kernel``); else the stage has
    (``stage{s}.kernel``). ``act``: of the stem and the head. ``stem_stride``: 2, or 1 for small images. ``first``: the width of
    the fixed block (k3, e1) before the first stage, None where there is none; ``first_residual``: whether it has a shortcut.
    ``projection``: False where only blocks of stride 1 and equal width have a shortcut, the identity; True where all have one:
    average pooling by the stride (padding 1 if the side is odd), a 1x1 convolution without norm where the widths differ.
    """

    abstract = True  # what several spaces share: none itself
    stages: tuple[Stage, ...]
    per_block: bool
    projection: bool
    act: str
    stem: tuple[int, ...]
    stem_stride: int
    head: tuple[Size, Size | None]
    first: int | None = None
    first_act: str = "relu"
    first_residual: bool = False

    # ---- names of choices ---------------------------------------------------------------------------------------------

    def depth_name(self, s: int) -> str:
        """The choice that says how many blocks of stage ``s`` are kept, from the first."""
        return f"stage{s}.depth"

    def kernel_name(self, s: int, b: int) -> str:
        return self._place(s, b) + ".kernel"

    def expand_name(self, s: int, b: int) -> str:
        return self._place(s, b) + ".expand"

    def _place(self, s: int, b: int) -> str:
        return f"stage{s}.block{b}" if self.per_block else f"stage{s}"

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The options of the choice ``resolution``; () where the images say."""
        return resolutions(self)

    # ---- sizes --------------------------------------------------------------------------------------------------------

    def stem_size(self) -> Size:
        """The out channels of the stem, a 3x3 convolution."""
        return fixed(self.stem[0]) if self.per_block else self._size("stem.width")

    def final_size(self) -> Size:
        """The out channels of the 1x1 convolution (with norm) after the last stage."""
        return self.head[0]

    def mix_size(self) -> Size | None:
        """The out channels of the 1x1 convolution after pooling (no norm, no bias); None where there is none."""
        return self.head[1]

    def in_size(self, s: int, b: int) -> Size:
        """The channels that block ``b`` of stage ``s`` reads."""
        if b or s:
            return self.out_size(s if b else s - 1)
        return self.stem_size() if self.first is None else fixed(self.first)

    def mid_size(self, s: int, b: int) -> Size:
        """The channels between the two 1x1 convolutions: make_divisible(round(in * e))."""
        return composed(mid_width, self.in_size(s, b), self._size(self.expand_name(s, b)))

    def squeeze_size(self, s: int, b: int) -> Size | None:
        """The hidden channels of squeeze and excite: make_divisible(mid // 4); None where the stage has none."""
        return composed(squeeze_width, self.mid_size(s, b)) if self.stages[s].squeeze else None

    def expands(self, s: int) -> bool:
        """Whether blocks of stage ``s`` begin with a 1x1 convolution: not where their only expand is 1."""
        return self.stages[s].expands != (1,)

    def kernel_size(self, s: int, b: int) -> Size:
        return self._size(self.kernel_name(s, b))

    def out_size(self, s: int) -> Size:
        """The out channels of every block of stage ``s``."""
        return fixed(self.stages[s].widths[0]) if self.per_block else self._size(f"stage{s}.width")

    def _size(self, name: str) -> Size:
        """A choice's own value; of a choice with one option, a fixed one, so that no term of the cost names it."""
        options = self.root[name].options
        return fixed(int(options[0])) if len(options) == 1 else Size((name,), int)

    # ---- building -----------------------------------------------------------------------------------------------------

    def _stage_choices(self) -> list[Choice]:
        """Stage by stage: width (shared only), depth, then kernel and expand, of the stage or of each block."""
        choices: list[Choice] = []
        for s, stage in enumerate(self.stages):
            if not self.per_block:
                choices.append(Choice(f"stage{s}.width", stage.widths))
            choices.append(Choice(self.depth_name(s), stage.depths))
            for b in range(stage.blocks if self.per_block else 1):
                kept = tuple(depth for depth in stage.depths if depth > b)
                needs = ((self.depth_name(s), kept),) if kept != stage.depths else ()
                choices.append(Choice(self.kernel_name(s, b), stage.kernels, needs=needs))
                choices.append(Choice(self.expand_name(s, b), stage.expands, needs=needs))
        return choices

    def _resolution(self, arch: Mapping[str, Any]) -> str:
        """The end of a text: @172, or nothing where the images say."""
        return f"@{arch[RESOLUTION]}" if self.resolutions else ""

    def _set(self, resolution: int | None) -> dict[str, int]:
        """``resolution`` as a part of an arch. Raises ValueError where it is missing, or no choice of this space."""
        if self.resolutions and resolution is None:
            raise ValueError(f"This architecture says no resolution. Allowed: {listed(self.resolutions)}.")
        if not self.resolutions and resolution is not None:
            raise ValueError(f"resolution = {resolution} is no choice of {self!r}: its images say. Leave it out.")
        return {} if resolution is None else {RESOLUTION: resolution}


def scaled(width: float, channels: Sequence[int]) -> tuple[int, ...]:
    """``channels`` times ``width``, divisible, ascending, each once. Raises ValueError for a width that is not above 0."""
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < float("inf"):
        raise ValueError(f"width = {width}: give a number above 0, such as 1.0.")
    return tuple(sorted({make_divisible(c * width) for c in channels}))


def whole(name: str, options: Sequence[int], least: int = 1, odd: bool = False) -> tuple[int, ...]:
    """``options`` as a tuple; ValueError where it is empty or holds what is not a whole (odd) number of ``least`` or more."""
    if isinstance(options, str) or not isinstance(options, Sequence) or not options:
        raise ValueError(f"{name} = {options}: give a list of at least one option.")
    for value in options:
        if positive(name, value) < least or (odd and value % 2 == 0):
            raise ValueError(f"{name} = {listed(options)}: give {'odd ' if odd else ''}integers, {least} or more.")
    return tuple(options)


def resolution_choice(resolution: Sequence[int] | None, published: Sequence[int]) -> list[Choice]:
    """The choice ``resolution``, inert for weights; [] where the images say. ``resolution``: None means ``published``."""
    options = published if resolution is None else resolution
    return [Choice(RESOLUTION, whole(RESOLUTION, options))] if len(options) else []


def resolutions(space: SearchSpace) -> tuple[int, ...]:
    """The options of the choice ``resolution`` of the unrestricted space; () where it has none."""
    return tuple(int(r) for choice in space.root.choices if choice.name == RESOLUTION for r in choice.options)
