"""NAS-Bench-Macro (Su, Huang, Li, You, Wang, Qian, Zhang, Xu, CVPR 2021, arXiv 2103.11922): which of three operations each
layer of a chain is. All 6,561 networks of CIFAR-10 were trained alone by their authors, three times.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from search_spaces.choice import listed, positive
from search_spaces.space import Arch, Choice, SearchSpace, Value

IDENTITY = "identity"
MBCONVS = {"mbconv3_3x3": (3, 3), "mbconv6_5x5": (5, 6)}
"""Operation -> its kernel and expansion."""
OPTIONS = (IDENTITY, *MBCONVS)
"""In the order of the table's digits."""
LAYERS = (2, 3, 3)


class Place(NamedTuple):
    """Where a layer stands. ``name``: of its choice."""

    name: str
    c_in: int
    c_out: int
    stride: int


class NASBenchMacro(SearchSpace):
    """Which operation each layer ``stage{s}.layer{l}`` is; 3^8 as published. The first layer of a stage halves the image and
    doubles the channels, where the identity is a 1x1 convolution; in the others it is nothing at all.

    ``width``: the multiplier of all widths but the head's; the stem has round(32 width) channels. ``layers``: of each stage.
    ``features``: of the head. ``compact``: whether strings that stand for one network are one to a supernet too (``normal``);
    without, every layer has its own place. Raises ValueError for other values.

    The table has 3,969 distinct networks under its 6,561 names: behind the first layer of a stage, an identity commutes with
    its neighbours. ``key`` tells these networks, ``text`` the names.
    """

    skips = (IDENTITY,)

    def __init__(
        self, width: float = 1.0, layers: Sequence[int] = LAYERS, features: int = 1280, compact: bool = True
    ) -> None:
        if isinstance(width, bool) or not isinstance(width, int | float) or not math.isfinite(width) or round(32 * width) < 1:
            raise ValueError(f"width = {width}: give a number, 1/32 or more, such as 1.0.")
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
            raise ValueError(f"layers = {layers}: give the number of layers of each stage, such as {list(LAYERS)}.")
        self.width, self.layers, self.compact = float(width), tuple(positive("layers", n) for n in layers), bool(compact)
        self.stem, self.features = round(32 * self.width), positive("features", features)
        self.places = [
            [Place(f"stage{s}.layer{i}", c if i else c // 2, c, 1 if i else 2) for i in range(n)]
            for s, n in enumerate(self.layers) for c in [self.stem * 2 ** (s + 1)]
        ]  # fmt: skip
        names = [place.name for place in itertools.chain.from_iterable(self.places)]
        args = {"width": self.width, "layers": self.layers, "features": features, "compact": self.compact}
        usual = {"width": 1.0, "layers": LAYERS, "features": 1280, "compact": True}
        super().__init__(
            [Choice(name, OPTIONS, ordered=False) for name in names],
            {name: value for name, value in args.items() if value != usual[name]},
            dear=dict.fromkeys(names, OPTIONS[-1]), cheap=dict.fromkeys(names, IDENTITY),
        )  # fmt: skip

    def running(self, s: int, options: Mapping[str, Value]) -> list[str]:
        """What stands at the places of stage ``s``: the names of its layers, of which those behind the first that are no
        identities have moved forward. ``options``: of these layers. In the order of the names without ``compact``."""
        first, *others = (place.name for place in self.places[s])
        if self.compact:
            others.sort(key=lambda name: options[name] == IDENTITY)  # stable: the others stay in their order
        return [first, *others]

    def normal(self, arch: Mapping[str, Value]) -> Arch:
        """``arch`` with the identities of every stage, but for its first layer, behind the layers that compute something;
        ``arch`` itself without ``compact``."""
        arch = self.canonical(arch)
        return {place.name: arch[name] for s, stage in enumerate(self.places)
                for place, name in zip(stage, self.running(s, arch))}  # fmt: skip

    def text(self, arch: Mapping[str, Value]) -> str:
        """The name in the published table: a digit for each layer, such as 02012100. Raises ValueError for other options."""
        return "".join(map(str, self.encode([self.canonical(arch)])[0]))

    def parse(self, text: str) -> Arch:
        """The architecture of 02012100. Raises ValueError for another number of digits and for others than 0, 1 and 2."""
        digits, n, last = text.strip(), len(self.choices), len(OPTIONS) - 1
        if len(digits) != n or not set(digits) <= set("012"):
            raise ValueError(f"{text!r} is not an architecture of {self.name}: it is written in {n} digits, each 0 to {last} "
                             f"({listed(OPTIONS)}), such as {'2' * n}.")
        return {choice.name: OPTIONS[int(digit)] for choice, digit in zip(self.root.choices, digits)}
