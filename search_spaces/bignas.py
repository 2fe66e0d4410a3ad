"""The spaces of BigNAS (Yu et al., ECCV 2020, arXiv 2003.11142) and AttentiveNAS (Wang et al., CVPR 2021, arXiv 2011.09011;
AlphaNet searches the same).

Each stage has one width, depth, kernel and expand for all its blocks; the stem and the head have a width. An architecture is
written stem, stages, head and resolution: 16/16x1k3e1/24x3k3e4/../216x1k3e6/1792@192 (width x depth k kernel e expand).
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from search_spaces.inverted import RESOLUTION, Inverted, Stage, composed, resolution_choice, scaled, whole
from search_spaces.sizes import Size
from search_spaces.space import Arch, Choice, Value

# Published networks of AttentiveNAS's space, named as there; A0, A1 and A3 are AlphaNet's too. A0 is the smallest.
ATTENTIVE = {
    "A0": "16/16x1k3e1/24x3k3e4/32x3k3e4/64x3k3e4/112x3k3e4/192x3k3e6/216x1k3e6/1792@192",
    "A1": "16/16x1k3e1/24x3k3e4/32x3k3e4/64x3k5e4/112x3k3e4/192x3k5e6/216x1k3e6/1984@224",
    "A3": "16/16x2k3e1/24x3k3e4/32x3k3e4/64x4k5e4/112x3k3e4/208x5k3e6/224x1k3e6/1984@224",
    "A5": "16/16x1k3e1/24x3k3e4/32x3k3e5/72x3k5e4/112x4k3e4/192x6k3e6/216x1k3e6/1792@256",
    "AlphaNet-A5": "16/16x1k3e1/24x3k3e4/32x3k3e4/64x4k3e5/112x4k3e4/208x5k5e6/216x1k3e6/1984@256",
}
STAGE = r"(\d+)x(\d+)k(\d+)e(\d+)"
Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int, bool]


class Stagewise(Inverted):
    """What both spaces share: choices of whole stages, vectors and texts. ``TABLE``: widths, depths, kernels, expands, stride,
    squeeze of each stage. ``RESOLUTIONS``: as published."""

    abstract = True
    TABLE: ClassVar[tuple[Row, ...]]
    STEM: ClassVar[tuple[int, ...]]
    HEAD: ClassVar[tuple[int, ...]]
    RESOLUTIONS: ClassVar[tuple[int, ...]]
    per_block = False
    projection = True
    width: float
    small: bool

    def __init__(self, small: bool = False, width: float = 1.0, depths: Sequence[Sequence[int]] | None = None,
                 resolution: Sequence[int] | None = None) -> None:
        """``small``: for small images, the stem's stride is 1 and the images say the resolution unless it is given (no official
        recipe; page, section 4). ``width``: multiplies every width, rounded to 8; 1.0 as published. ``depths``: the options of
        each stage instead of the published ones, for smaller networks. ``resolution``: its options, None the published ones, ()
        where the images say. Raises ValueError for other values."""
        self.stem = scaled(width, self.STEM)
        self.width, self.small, self.act, self.stem_stride = float(width), bool(small), "swish", 1 if small else 2
        usual = tuple(row[1] for row in self.TABLE)
        kept = usual if depths is None else tuple(whole("depths", row) for row in depths)
        if len(kept) != len(usual):
            raise ValueError(f"depths = {list(map(list, kept))}: give {len(usual)} lists, one a stage.")
        self.stages = tuple(Stage(scaled(width, widths), d, kernels, expands, stride, "swish", squeeze)
                            for (widths, _, kernels, expands, stride, squeeze), d in zip(self.TABLE, kept))
        published = () if small else self.RESOLUTIONS
        last = resolution_choice(resolution, published)
        options = last[0].options if last else ()
        args: dict[str, Any] = {"small": self.small, "width": self.width}
        args |= {} if kept == usual else {"depths": [list(row) for row in kept]}
        args |= {} if options == published else {RESOLUTION: list(options)}
        super().__init__([Choice("stem.width", self.stem), *self._stage_choices(),
                          Choice("head.width", scaled(width, self.HEAD)), *last], args)
        self.head = self._heads()

    def _heads(self) -> tuple[Size, Size | None]:
        return self._size("head.width"), None

    # ---- vectors and texts --------------------------------------------------------------------------------------------

    def arch_of(self, width: Sequence[int], depth: Sequence[int], kernel_size: Sequence[int], expand_ratio: Sequence[int],
                resolution: int | None = None) -> Arch:
        """The architecture of the published vectors: ``width`` = [stem, stages .., head], the others an entry a stage.

        ``resolution``: where it is a choice. Raises ValueError for other lengths and values.
        """
        n = len(self.stages)
        for name, values, wanted in (("width", width, n + 2), ("depth", depth, n), ("kernel_size", kernel_size, n),
                                     ("expand_ratio", expand_ratio, n)):
            if len(values) != wanted:
                raise ValueError(f"{name} has {len(values)} entries; {self!r} needs {wanted}.")
        arch: Arch = {"stem.width": width[0]}
        for s in range(n):
            arch |= {f"stage{s}.width": width[s + 1], f"stage{s}.depth": depth[s], f"stage{s}.kernel": kernel_size[s],
                     f"stage{s}.expand": expand_ratio[s]}
        arch |= {"head.width": width[-1]} | self._set(resolution)
        self.root.check(arch)
        return self.canonical(arch)

    def vectors(self, arch: Mapping[str, Value]) -> dict[str, Any]:
        """{"width", "depth", "kernel_size", "expand_ratio"} and, where it is a choice, "resolution": for ``arch_of``."""
        arch = self.canonical(arch)
        found: dict[str, Any] = {name: [arch[f"stage{s}.{of}"] for s in range(len(self.stages))] for name, of in (
            ("width", "width"), ("depth", "depth"), ("kernel_size", "kernel"), ("expand_ratio", "expand"))}
        found["width"] = [arch["stem.width"], *found["width"], arch["head.width"]]
        return found | ({RESOLUTION: arch[RESOLUTION]} if self.resolutions else {})

    def text(self, arch: Mapping[str, Value]) -> str:
        """stem/width x depth k kernel e expand/../head, and @resolution where it is a choice."""
        arch = self.canonical(arch)
        stages = ("{}x{}k{}e{}".format(*(arch[f"stage{s}.{of}"] for of in ("width", "depth", "kernel", "expand")))
                  for s in range(len(self.stages)))
        return "/".join([str(arch["stem.width"]), *stages, str(arch["head.width"])]) + self._resolution(arch)

    def parse(self, text: str) -> Arch:
        """The architecture of such a line. Raises ValueError for another form and what this space does not hold."""
        n = len(self.stages)
        found = re.fullmatch(r"(\d+)/" + (STAGE + "/") * n + r"(\d+)(?:@(\d+))?", text.strip(), re.ASCII)
        if not found:
            raise ValueError(f"{text!r} is not an architecture of {self!r}. It is written stem/width x depth k kernel e expand/"
                             f"../head, {n} stages, the resolution last where it is chosen, such as "
                             f"{self.text(self.root.smallest())}.")
        *words, head, resolution = found.groups()
        stem, numbers = int(words[0]), [int(word) for word in words[1:]]
        return self.arch_of([stem, *numbers[::4], int(head)], numbers[1::4], numbers[2::4], numbers[3::4],
                            None if resolution is None else int(resolution))


class BigNAS(Stagewise):
    """BigNAS: swish and squeeze and excite everywhere; the head is one 1x1 convolution before pooling."""

    TABLE = (
        ((16, 24), (1, 2), (3,), (1,), 1, True),
        ((24, 32), (2, 3), (3,), (6,), 2, True),
        ((40, 48), (2, 3), (3, 5), (6,), 2, True),
        ((80, 88), (2, 3, 4), (3, 5), (6,), 2, True),
        ((112, 120, 128), (2, 3, 4, 5, 6), (3, 5), (6,), 1, True),
        ((192, 200, 208, 216), (2, 3, 4, 5, 6), (3, 5), (6,), 2, True),
        ((320, 328, 336, 344, 352), (1, 2), (3, 5), (6,), 1, True),
    )
    STEM = (32, 40)
    HEAD = tuple(range(1280, 1409, 8))
    RESOLUTIONS = (192, 224, 288, 320)


class AttentiveNAS(Stagewise):
    """AttentiveNAS: the head is a 1x1 convolution to 6 times the last stage's width, pooling, and a 1x1 convolution."""

    TABLE = (
        ((16, 24), (1, 2), (3, 5), (1,), 1, False),
        ((24, 32), (3, 4, 5), (3, 5), (4, 5, 6), 2, False),
        ((32, 40), (3, 4, 5, 6), (3, 5), (4, 5, 6), 2, True),
        ((64, 72), (3, 4, 5, 6), (3, 5), (4, 5, 6), 2, False),
        ((112, 120, 128), (3, 4, 5, 6, 7, 8), (3, 5), (4, 5, 6), 1, True),
        ((192, 200, 208, 216), (3, 4, 5, 6, 7, 8), (3, 5), (6,), 2, True),
        ((216, 224), (1, 2), (3, 5), (6,), 1, True),
    )
    STEM = (16, 24)
    HEAD = (1792, 1984)
    RESOLUTIONS = (192, 224, 256, 288)

    def _heads(self) -> tuple[Size, Size | None]:
        return composed(_sixfold, self.out_size(len(self.stages) - 1)), self._size("head.width")

    def parse(self, text: str) -> Arch:
        """As ``Stagewise.parse``; or one of ``ATTENTIVE`` by its name, at its resolution where that is a choice."""
        line = ATTENTIVE.get(text.strip(), text)
        return super().parse(line if self.resolutions or line is text else line.partition("@")[0])


def _sixfold(width: int) -> int:
    return 6 * width
