"""The mobile spaces of once-for-all (OFA: Cai, Gan, Wang, Zhang, Han, ICLR 2020, arXiv 1908.09791), the 32 x 32 form of
delayed epsilon-shrinking (DepS: Annavajjala et al., ECCV 2024, arXiv 2407.06167), and the coupling of CompOFA (Sahni et al.,
ICLR 2021, arXiv 2104.12642).

Every block has its own kernel and expand, every stage its depth; the widths are fixed. An architecture is written stage by
stage, a word a block, kernel e expand, and the resolution where it is a choice: 3e3,3e3/5e3,5e3/7e4,3e3/5e3,3e4/3e6,7e6@152.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from search_spaces.choice import listed, require
from search_spaces.inverted import RESOLUTION, Inverted, Stage, resolution_choice, scaled, whole
from search_spaces.sizes import fixed
from search_spaces.space import Arch, Value

KERNELS, EXPANDS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
COMPOUND = {2: 3, 3: 4, 4: 6}  # CompOFA: depth -> expand of all its blocks
COMPOUND_KERNELS = (3, 5, 3, 3, 5)  # CompOFA: of each stage
UNIFORM = ((3, 2), (3, 3), (3, 4), (4, 4), (6, 3), (6, 4))  # DepS: (expand, depth) of the six nets it plots, smallest first


class Specialised(NamedTuple):
    """A published network: of the space of this ``width``, at this ``resolution``, its blocks as in a text."""

    width: float
    resolution: int
    blocks: str


# Picked for a Pixel 1 and fine-tuned; latency in the name. ImageNet top-1 80.1, 78.7, 74.9, 71.4.
SPECIALISED = {
    "pixel1-143ms": Specialised(
        1.2, 240, "5e3,3e6,3e3/5e6,5e6,3e6,5e3/7e6,5e6,3e6,3e4/5e6,3e6,5e6,3e4/3e6,3e6,5e6,3e3"),
    "pixel1-79ms": Specialised(1.2, 224, "3e3,3e3/5e3,3e4/7e4,5e4,3e3/5e6,3e4,3e4,3e3/3e6,3e6,3e6,3e3"),
    "pixel1-40ms": Specialised(1.0, 172, "5e3,3e4/5e4,3e4,7e4/7e4,7e3,3e4/3e4,3e6,3e4/3e6,5e6,3e6,5e4"),
    "pixel1-20ms": Specialised(1.0, 152, "3e3,3e3/5e3,5e3/7e4,3e3/5e3,3e4/3e6,7e6"),
}  # fmt: skip


class Mobile(Inverted):
    """What both spaces share: fixed widths, per-block choices, vectors and texts.

    ``width``: the multiplier. ``slots``: the most blocks of each stage, so the length of ks and e is their sum.
    """

    abstract = True
    per_block = True
    projection = False
    width: float
    small: bool

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(stage.blocks for stage in self.stages)

    # ---- vectors and texts --------------------------------------------------------------------------------------------

    def arch_of(
        self, ks: int | Sequence[int], e: int | Sequence[int], d: int | Sequence[int], resolution: int | None = None
    ) -> Arch:
        """The canonical architecture of the published vectors: ``ks`` and ``e`` an entry a slot, ``d`` an entry a stage; one
        number stands for all entries. ``resolution``: where it is a choice. Raises ValueError for other lengths and, where
        an entry counts, other values."""
        kernels, expands = (self._entries(name, v, sum(self.slots)) for name, v in (("ks", ks), ("e", e)))
        depths = self._entries("d", d, len(self.slots))
        arch: Arch = {}
        slot = 0
        for s, blocks in enumerate(self.slots):
            arch[self.depth_name(s)] = depths[s]
            for b in range(blocks):
                arch |= {self.kernel_name(s, b): kernels[slot], self.expand_name(s, b): expands[slot]}
                slot += 1
        arch |= self._set(resolution)
        self.root.check(arch)
        return self.canonical(arch)

    def vectors(self, arch: Mapping[str, Value]) -> dict[str, Any]:
        """{"ks", "e", "d"} and, where it is a choice, "resolution": what ``arch_of`` takes. Inert entries: the first option."""
        arch = self.canonical(arch)
        slots = [(s, b) for s, blocks in enumerate(self.slots) for b in range(blocks)]
        found: dict[str, Any] = {"ks": [arch[self.kernel_name(s, b)] for s, b in slots],
                                 "e": [arch[self.expand_name(s, b)] for s, b in slots],
                                 "d": [arch[self.depth_name(s)] for s in range(len(self.stages))]}
        return found | ({RESOLUTION: arch[RESOLUTION]} if self.resolutions else {})

    def _entries(self, name: str, values: int | Sequence[int], n: int) -> list[int]:
        entries = [values] * n if isinstance(values, int) else list(values)
        if len(entries) != n:
            raise ValueError(f"{name} has {len(entries)} entries; {self!r} needs {n}, or one number for all.")
        return entries

    def text(self, arch: Mapping[str, Value]) -> str:
        """3e3,3e3/5e3,5e3/..: the kept blocks of each stage; @152 behind it where the resolution is a choice."""
        arch = self.canonical(arch)
        stages = (",".join(f"{arch[self.kernel_name(s, b)]}e{arch[self.expand_name(s, b)]}"
                           for b in range(int(arch[self.depth_name(s)]))) for s in range(len(self.stages)))
        return "/".join(stages) + self._resolution(arch)

    def parse(self, text: str) -> Arch:
        """The architecture of such a line. Raises ValueError for another form and what this space does not hold."""
        body, at, end = text.strip().partition("@")
        stages = [stage.split(",") for stage in body.split("/")]
        if not all(re.fullmatch(r"\d+e\d+", word, re.ASCII) for stage in stages for word in stage) or (
                at and not re.fullmatch(r"\d+", end, re.ASCII)):
            raise ValueError(f"{text!r} is not a chain of blocks. It is written kernel e expand, a word a block, stages apart "
                             "by /, the resolution last where it is chosen: 3e3,5e4/3e3,3e6,7e4/..@160.")
        if len(stages) != len(self.stages):
            raise ValueError(f"{text!r} has {len(stages)} stages; {self!r} has {len(self.stages)}.")
        arch: Arch = {choice.name: choice.options[0] for choice in self.root.choices}
        for s, words in enumerate(stages):
            require(self.depth_name(s), len(words), self.root[self.depth_name(s)].options)
            arch[self.depth_name(s)] = len(words)
            for b, word in enumerate(words):
                arch[self.kernel_name(s, b)], arch[self.expand_name(s, b)] = map(int, word.split("e"))
        arch |= self._set(int(end) if at else None)
        self.root.check(arch)
        return self.canonical(arch)

    # ---- building -----------------------------------------------------------------------------------------------------

    def _build(self, rows: Sequence[tuple[int, int, str, bool]], last: bool, said: Mapping[str, Any],
               published: Sequence[int]) -> None:
        """``rows``: width, stride, activation, squeeze of each stage. ``last``: whether the last stage has one block only.
        ``said``: the arguments; usual ones go unsaid in ``args``."""
        kernels = whole("kernels", said["kernels"], odd=True)
        expands, depths = whole("expands", said["expands"], 2), whole("depths", said["depths"])
        self.stages = tuple(Stage((c,), (1,) if last and s == len(rows) - 1 else depths, kernels, expands, stride, act, se)
                            for s, (c, stride, act, se) in enumerate(rows))
        resolution = resolution_choice(said["resolution"], published)
        options = resolution[0].options if resolution else ()
        args = {"width": float(self.width), "small": said["small"]} | {
            name: list(values) for name, values, usual in (
                ("kernels", kernels, KERNELS), ("expands", expands, EXPANDS), ("depths", depths, DEPTHS),
                (RESOLUTION, options, tuple(published))) if values != usual}
        super().__init__([*self._stage_choices(), *resolution], args)


class OFAMobileNetV3(Mobile):
    """OFA-MobileNetV3. ``width``: 1.0 and 1.2 are published (DepS runs are compared at 0.35 too); any number above 0.

    ``small``: the form for 32 x 32 images (DepS, mbv3_32): stem stride 1, stage strides 1, 2, 2, 1, 2 and no resolution unless
    given. ``kernels``: (7,) is DepS. ``kernels``, ``expands``, ``depths``: ascending options of every block and stage.
    ``resolution``: its options; None the published ones, 128, 132 .. 224 (from 160 at width 1.2), () where the images say.
    Raises ValueError for other values.
    """

    def __init__(
        self, width: float = 1.0, small: bool = False, kernels: Sequence[int] = KERNELS, expands: Sequence[int] = EXPANDS,
        depths: Sequence[int] = DEPTHS, resolution: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        stem, *widths, final, mix = (scaled(width, [c])[0] for c in (16, 24, 40, 80, 112, 160, 960, 1280))
        self.width, self.small, self.act = float(width), bool(small), "h_swish"
        self.stem_stride = 1 if small else 2
        self.stem, self.head = (stem,), (fixed(final), fixed(mix))
        self.first, self.first_act, self.first_residual = stem, "relu", True
        rows = zip(widths, (1, 2, 2, 1, 2) if small else (2, 2, 2, 1, 2),
                   ("relu", "relu", "h_swish", "h_swish", "h_swish"), (False, True, False, True, True))
        published = () if small else tuple(range(160 if width == 1.2 else 128, 225, 4))
        self._build(list(rows), False, {"small": self.small, "kernels": kernels, "expands": expands, "depths": depths,
                                        "resolution": resolution}, published)

    def parse(self, text: str) -> Arch:
        """As ``Mobile.parse``; or one of ``SPECIALISED`` by its name, at its resolution where that is a choice."""
        known = SPECIALISED.get(text.strip())
        if known is None:
            return super().parse(text)
        if known.width != self.width or self.small:
            raise ValueError(f"{text.strip()} is a network of OFAMobileNetV3(width={known.width}), not of {self!r}.")
        return super().parse(known.blocks + (f"@{known.resolution}" if self.resolutions else ""))


class OFAProxyless(Mobile):
    """OFA-ProxylessNAS. ``width``: published at 1.3. The last stage has one block: 21 slots, and the last of the six entries
    of ``d`` is inert. Arguments as for ``OFAMobileNetV3``; ``small``: stem stride 1 and first stage stride 1, as there (ours).
    ``resolution``: the page names none, so None is ().
    """

    def __init__(
        self, width: float = 1.3, small: bool = False, kernels: Sequence[int] = KERNELS, expands: Sequence[int] = EXPANDS,
        depths: Sequence[int] = DEPTHS, resolution: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        stem, first, *widths, final = (scaled(width, [c])[0] for c in (32, 16, 24, 40, 80, 96, 192, 320, 1280))
        self.width, self.small, self.act = float(width), bool(small), "relu6"
        self.stem_stride = 1 if small else 2
        self.stem, self.head = (stem,), (fixed(final), None)
        self.first, self.first_act, self.first_residual = first, "relu6", False
        strides = (1 if small else 2, 2, 2, 1, 2, 1)
        self._build([(c, stride, "relu6", False) for c, stride in zip(widths, strides)], True, {
            "small": self.small, "kernels": kernels, "expands": expands, "depths": depths, "resolution": resolution}, ())

    def arch_of(
        self, ks: int | Sequence[int], e: int | Sequence[int], d: int | Sequence[int], resolution: int | None = None
    ) -> Arch:
        """As ``Mobile.arch_of``; whatever the last entry of ``d`` says, the last stage has its one block."""
        return super().arch_of(ks, e, [*self._entries("d", d, len(self.slots))[:-1], 1], resolution)

    def vectors(self, arch: Mapping[str, Value]) -> dict[str, Any]:
        """As ``Mobile.vectors``; the inert last entry of d is the first depth of the other stages."""
        found = super().vectors(arch)
        return found | {"d": [*found["d"][:-1], self.stages[0].depths[0]]}


def compound(space: Mobile, elastic_kernel: bool = False) -> Mobile:
    """CompOFA's coupling: the expand of every block of a stage follows the stage's depth (2: 3, 3: 4, 4: 6), and the kernels
    are 3, 5, 3, 3, 5 by stage unless elastic. 243 networks of five stages. Raises ValueError for spaces with other stages."""
    if len(space.stages) != len(COMPOUND_KERNELS) or any(d not in COMPOUND for stage in space.stages for d in stage.depths):
        raise ValueError(f"{space!r} is not five stages of depths {listed(COMPOUND)}, which CompOFA couples. "
                         "Take OFAMobileNetV3.")
    places = [(s, b) for s, stage in enumerate(space.stages) for b in range(stage.blocks)]
    for s, b in places:
        space = space.tie(space.expand_name(s, b), space.depth_name(s), COMPOUND)
    return space if elastic_kernel else space.restrict({space.kernel_name(s, b): [COMPOUND_KERNELS[s]] for s, b in places})
