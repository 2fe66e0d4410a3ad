"""OFA-ResNet50D: the residual space of once-for-all (Cai, Gan, Wang, Zhang, Han, ICLR 2020, arXiv 1908.09791).

Bottleneck blocks, strides 1, 2, 2, 2; elastic depth, mid width of each block (``expand`` times its OUTPUT width) and width of
each stage. Stem: 3x3 convolution of stride 2, a residual 3x3 convolution that may be skipped, a 3x3 convolution, max pooling.
The first block of every stage has a projection: average pooling by the stride (ceil), 1x1 convolution, norm.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search_spaces.choice import listed, require
from search_spaces.inverted import RESOLUTION, make_divisible, mid_width, resolution_choice, resolutions, scaled, whole
from search_spaces.sizes import Size
from search_spaces.space import Arch, Choice, SearchSpace, Value


class OFAResNet50D(SearchSpace):
    """``width``: multiplies every width; 1.0 as published. ``base``: the fewest blocks of each stage; up to two more are kept.
    ``resolution``: its options; None and () where the images say (none are published). Raises ValueError for other values.

    ``stem.depth``: how many residual convolutions the stem has, 0 or 1. Widths are channels; where two ratios round to the same
    number there is one option. ``slots``: the most blocks of each stage.
    """

    BASE = (2, 2, 4, 2)
    CHANNELS = (256, 512, 1024, 2048)
    RATIOS = (0.65, 0.8, 1.0)
    EXPANDS = (0.2, 0.25, 0.35)
    MORE = (0, 1, 2)
    STRIDES = (1, 2, 2, 2)

    def __init__(self, width: float = 1.0, base: Sequence[int] = BASE, resolution: Sequence[int] | None = None) -> None:
        scaled(width, self.CHANNELS)  # refuses a width that is no multiplier
        fewest = whole("base", base)
        if len(fewest) != len(self.CHANNELS):
            raise ValueError(f"base = {listed(fewest)}: give four numbers of blocks, one a stage, such as {listed(self.BASE)}.")
        self.width, self.base = float(width), fewest
        self.slots = tuple(n + self.MORE[-1] for n in fewest)
        choices = [Choice("stem.mid", self._options(32)), Choice("stem.depth", (0, 1)), Choice("stem.width", self._options(64))]
        for s, (n, channels) in enumerate(zip(fewest, self.CHANNELS)):
            kept = tuple(n + more for more in self.MORE)
            choices += [Choice(f"stage{s}.width", self._options(channels)), Choice(self.depth_name(s), kept)]
            for b in range(self.slots[s]):
                deep = tuple(depth for depth in kept if depth > b)
                needs = ((self.depth_name(s), deep),) if deep != kept else ()
                choices.append(Choice(self.expand_name(s, b), self.EXPANDS, needs=needs))
        args: dict[str, Any] = {"width": self.width}
        args |= {} if fewest == self.BASE else {"base": list(fewest)}
        args |= {RESOLUTION: list(resolution)} if resolution else {}
        super().__init__([*choices, *resolution_choice(resolution, ())], args)

    def _widths(self, channels: int) -> tuple[int, ...]:
        """Of each ratio: make_divisible(channels * ratio), channels scaled."""
        return tuple(make_divisible(channels * self.width * ratio) for ratio in self.RATIOS)

    def _options(self, channels: int) -> tuple[int, ...]:
        return tuple(sorted(set(self._widths(channels))))

    # ---- names and sizes ----------------------------------------------------------------------------------------------

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The options of the choice ``resolution``; () where the images say."""
        return resolutions(self)

    def depth_name(self, s: int) -> str:
        """The choice that says how many blocks of stage ``s`` are kept, from the first."""
        return f"stage{s}.depth"

    def expand_name(self, s: int, b: int) -> str:
        return f"stage{s}.block{b}.expand"

    def stem_mid_size(self) -> Size:
        """The out channels of the stem's first and residual convolutions."""
        return self._size("stem.mid")

    def stem_size(self) -> Size:
        """The out channels of the stem."""
        return self._size("stem.width")

    def in_size(self, s: int, b: int) -> Size:
        """The channels that block ``b`` of stage ``s`` reads."""
        return self.out_size(s if b else s - 1) if s or b else self.stem_size()

    def mid_size(self, s: int, b: int) -> Size:
        """The out channels of the 1x1 and 3x3 convolutions of a block: make_divisible(round(out * e))."""
        return Size((f"stage{s}.width", self.expand_name(s, b)), mid_width)

    def out_size(self, s: int) -> Size:
        """The out channels of every block of stage ``s``, of its last 1x1 convolution and of the projection."""
        return self._size(f"stage{s}.width")

    def _size(self, name: str) -> Size:
        return Size((name,), int)

    # ---- vectors ------------------------------------------------------------------------------------------------------

    def arch_of(self, d: Sequence[int], e: Sequence[float], w: Sequence[int], resolution: int | None = None) -> Arch:
        """The canonical architecture of the published vectors. ``d``: 5 entries of 0, 1, 2; the first keeps the stem's residual
        convolution where it is 2, the others are blocks beyond the base. ``e``: an entry a slot. ``w``: 6 positions in
        ``RATIOS``, of stem.mid, stem.width and the stages. Raises ValueError for other lengths and values."""
        for name, values, wanted in (("d", d, 5), ("e", e, sum(self.slots)), ("w", w, 6)):
            if len(values) != wanted:
                raise ValueError(f"{name} has {len(values)} entries; {self!r} needs {wanted}.")
        for name, values, allowed in (("d", d, self.MORE), ("w", w, range(len(self.RATIOS)))):
            for i, value in enumerate(values):
                require(f"{name}[{i}]", value, tuple(allowed))
        if (resolution is None) == bool(self.resolutions):
            raise ValueError(f"resolution = {resolution}. Allowed: {listed(self.resolutions) or 'none, the images say'}.")
        widths = [self._widths(channels)[k] for channels, k in zip((32, 64, *self.CHANNELS), w)]
        arch: Arch = {"stem.mid": widths[0], "stem.width": widths[1], "stem.depth": int(d[0] == self.MORE[-1])}
        slot = 0
        for s, blocks in enumerate(self.slots):
            arch |= {f"stage{s}.width": widths[s + 2], self.depth_name(s): self.base[s] + d[s + 1]}
            for b in range(blocks):
                arch[self.expand_name(s, b)] = e[slot]
                slot += 1
        arch |= {} if resolution is None else {RESOLUTION: resolution}
        self.root.check(arch)
        return self.canonical(arch)

    def vectors(self, arch: Mapping[str, Value]) -> dict[str, Any]:
        """{"d", "e", "w"} and, where it is a choice, "resolution": for ``arch_of``. Of ratios that round to one width, the
        first; inert entries are the first expand."""
        arch = self.canonical(arch)
        names = ("stem.mid", "stem.width", *(f"stage{s}.width" for s in range(len(self.slots))))
        found: dict[str, Any] = {
            "d": [self.MORE[-1] * int(arch["stem.depth"]),
                  *(int(arch[self.depth_name(s)]) - n for s, n in enumerate(self.base))],
            "e": [arch[self.expand_name(s, b)] for s, blocks in enumerate(self.slots) for b in range(blocks)],
            "w": [self._widths(channels).index(int(arch[name])) for name, channels in zip(names, (32, 64, *self.CHANNELS))],
        }
        return found | ({RESOLUTION: arch[RESOLUTION]} if self.resolutions else {})
