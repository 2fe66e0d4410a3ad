"""Where a residual network pools: the space of the balanced mixture of supernets (Javan, Toews, Pedersoli, AutoML 2023,
arXiv 2306.11982). Widths stay with the units; only the places of the poolings, and so the resolution of each unit, are chosen.

A network is written as the number of units at each resolution, 4-3-3: four at that of the image, three at a half, three at a
quarter. It is numbered from 1, in the order of these numbers of units.
"""
from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

from search_spaces.choice import listed, positive
from search_spaces.space import Arch, Choice, Mixture, SearchSpace, Setting, Value, require

POOLING = "pooling"
MOST = 100_000  # options of the one choice


class PoolingResNet(SearchSpace):
    """Before which units of a chain the 2x2 poolings stand: one choice, ``pooling``, 36 networks as published (ResNet-20).

    Unit 0 is the stem, of width ``widths[0]``; then ``blocks[s]`` residual blocks of width ``widths[s]``, group by group.
    ``pools``: how many poolings, each before another unit, never before the stem. Raises ValueError for other values.
    """

    BLOCKS = (3, 3, 3)
    WIDTHS = (16, 32, 64)

    def __init__(self, blocks: Sequence[int] = BLOCKS, pools: int = 2, widths: Sequence[int] = WIDTHS) -> None:
        self.blocks = tuple(positive("blocks", n) for n in blocks)
        self.widths = tuple(positive("widths", width) for width in widths)
        self.pools = positive("pools", pools)
        if len(self.blocks) != len(self.widths) or not self.blocks:
            raise ValueError(f"blocks = {list(blocks)} and widths = {list(widths)}: give as many of both, such as "
                             f"{list(self.BLOCKS)} and {list(self.WIDTHS)}.")
        if pools > sum(self.blocks):
            raise ValueError(f"pools = {pools}: each stands before a block of its own, and there are {sum(self.blocks)}. "
                             "Give fewer poolings or more blocks.")  # fmt: skip
        if math.comb(sum(self.blocks), pools) > MOST:
            raise ValueError(f"pools = {pools} among {sum(self.blocks)} blocks are {math.comb(sum(self.blocks), pools):,} "
                             f"placements, and one choice lists them all: at most {MOST:,}. Give fewer blocks or poolings.")
        self.units = (self.widths[0], *(c for n, c in zip(self.blocks, self.widths) for _ in range(n)))
        """The width of every unit."""
        places = itertools.combinations(range(1, len(self.units)), pools)
        self._places = {"-".join(map(str, self._counts(at))): at for at in places}
        self._numbers = {form: number for number, form in enumerate(self._places, 1)}
        options = tuple(self._places)
        args = {"blocks": self.blocks, "pools": pools, "widths": self.widths}
        usual = {"blocks": self.BLOCKS, "pools": 2, "widths": self.WIDTHS}
        super().__init__(
            [Choice(POOLING, options, ordered=False)],
            {name: value for name, value in args.items() if value != usual[name]},
            dear={POOLING: options[-1]}, cheap={POOLING: options[0]},  # units at a high resolution cost more
        )  # fmt: skip

    def _counts(self, at: Sequence[int]) -> list[int]:
        """Units at each resolution, of poolings before the units ``at``."""
        return [end - start for start, end in itertools.pairwise((0, *at, len(self.units)))]

    def places(self, setting: Setting) -> tuple[int, ...]:
        """The units that a pooling stands before, ascending. ``setting``: of ``pooling``. ValueError for another one, and for a
        mixture: the units of two placements have other sizes."""
        if isinstance(setting, Mixture):
            raise ValueError(f"{POOLING} is a mixture, and placements of poolings do not blend: give one of its options "
                             "(sampling strategies do).")  # fmt: skip
        require(POOLING, setting, self.root[POOLING].options)
        return self._places[str(setting)]

    # ---- numbers and texts ------------------------------------------------------------------------------------------------

    def number(self, arch: Mapping[str, Value]) -> int:
        """The published number, from 1. Raises ValueError for what is not in this space."""
        self.root.check(arch)
        return self._numbers[str(arch[POOLING])]

    def numbered(self, i: int) -> Arch:
        """The architecture of the published number ``i``. Raises ValueError outside 1 to the number of placements."""
        options = self.root[POOLING].options
        if isinstance(i, bool) or not isinstance(i, int) or not 1 <= i <= len(options):
            raise ValueError(f"number {i} is not in this space. Allowed: 1 to {len(options)}.")
        return {POOLING: options[i - 1]}

    def code(self, arch: Mapping[str, Value]) -> str:
        """A digit a unit, 1 where a pooling stands before it: 0000100100. Raises ValueError as ``places``."""
        at = self.places(arch[POOLING])
        return "".join(str(int(unit in at)) for unit in range(len(self.units)))

    def text(self, arch: Mapping[str, Value]) -> str:
        """The units at each resolution: 4-3-3."""
        return str(self.canonical(arch)[POOLING])

    def parse(self, text: str) -> Arch:
        """The architecture of its units at each resolution (4-3-3, [4, 3, 3]), of its published number (24), or of its code
        (0000100100, with or without commas). Raises ValueError for another form, and what this space does not hold."""
        digits = re.fullmatch(r"\[?\s*(\d+(?:\s*[-,]\s*\d+)*)\s*\]?", text.strip(), re.ASCII)
        words = re.findall(r"\d+", digits[1]) if digits else []
        n = len(self.units)
        if len(words) == 1 and not words[0].startswith("0"):
            return self.numbered(int(words[0]))
        bits = "".join(words)
        if words and len(bits) == n and bits[0] == "0" and set(bits) <= {"0", "1"} and len(words) in (1, n):
            at = [unit for unit, bit in enumerate(bits) if bit == "1"]
            words = [str(count) for count in self._counts(at)]
        elif len(words) != self.pools + 1:
            counts = listed(self.root[POOLING].options[:1])
            raise ValueError(f"{text!r} places no poolings. Write the units at each resolution ({counts}), a number (1 to "
                             f"{len(self._places)}), or the code ({self.code(self.numbered(1))}).")  # fmt: skip
        form = "-".join(words)
        require(POOLING, form, self.root[POOLING].options)
        return {POOLING: form}
