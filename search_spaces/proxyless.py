"""The space of ProxylessNAS (Cai, Zhu, Han, ICLR 2019, arXiv 1812.00332): a chain of blocks, each one of six mobile
convolutions with weights of their own, or nothing but its shortcut. GM-NAS (arXiv 2203.15207) splits it.

Widths, strides and blocks are those of OFA-ProxylessNAS (``mobilenet.OFAProxyless``), whose kernels and expands share weights.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from search_spaces.choice import positive
from search_spaces.inverted import scaled
from search_spaces.space import Choice, SearchSpace

ZERO = "zero"
KERNELS = {f"mbconv{expand}_{kernel}x{kernel}": (kernel, expand) for kernel in (3, 5, 7) for expand in (3, 6)}
"""Operation -> its kernel and expand."""
STRIDES = (2, 2, 2, 1, 2, 1)


class Place(NamedTuple):
    """Where a block stands. ``shortcut``: it adds the identity, so it may be ``ZERO``."""

    name: str
    c_in: int
    c_out: int
    stride: int
    shortcut: bool


class ProxylessNAS(SearchSpace):
    """Which operation each block ``stage{s}.block{b}`` is.

    ``width``: the multiplier. ``small``: the form for 32 x 32 images, stem stride 1 and first stage stride 1 (ours).
    ``blocks``: of each of the six stages; the first of them sets width and stride. Raises ValueError for other values.
    """

    nones = (ZERO,)

    def __init__(self, width: float = 1.0, small: bool = False, blocks: Sequence[int] = (4, 4, 4, 4, 4, 1)) -> None:
        if len(blocks) != len(STRIDES):
            raise ValueError(f"blocks = {list(blocks)}: give a number for each of the {len(STRIDES)} stages.")
        self.blocks = tuple(positive("blocks", n) for n in blocks)
        self.width, self.small = float(width), bool(small)
        self.stem, self.first, *widths, self.final = (scaled(width, [c])[0] for c in (32, 16, 24, 40, 80, 96, 192, 320, 1280))
        self.stem_stride = 1 if small else 2
        self.places: list[list[Place]] = []
        c_in = self.first
        for s, (n, c_out, stride) in enumerate(zip(self.blocks, widths, (1 if small else STRIDES[0], *STRIDES[1:]))):
            self.places.append([])
            for b in range(n):
                step = 1 if b else stride
                self.places[s].append(Place(f"stage{s}.block{b}", c_in, c_out, step, step == 1 and c_in == c_out))
                c_in = c_out
        flat = [place for stage in self.places for place in stage]
        args = {"width": self.width, "small": self.small, "blocks": self.blocks}
        usual = {"small": False, "blocks": (4, 4, 4, 4, 4, 1)}
        super().__init__(
            [Choice(place.name, (*KERNELS, *([ZERO] if place.shortcut else [])), ordered=False) for place in flat],
            {name: value for name, value in args.items() if name not in usual or value != usual[name]},
            dear={place.name: "mbconv6_7x7" for place in flat}, cheap={place.name: "mbconv3_3x3" for place in flat},
        )  # fmt: skip
