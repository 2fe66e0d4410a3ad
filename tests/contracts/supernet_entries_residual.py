"""Entry of OFA-ResNet50D: depths, expands and widths of a residual net."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from supernet_entry import Entry, Part, Refused, classifier, parts

from search_spaces.resnet50d import OFAResNet50D as Space
from search_spaces.space import Arch, SearchSpace
from supernets.resnet50d import OFAResNet50D


class Shallow(Space):
    """At most one block more than the fewest."""

    MORE = (0, 1)


def convs(net: Any, arch: Arch) -> Iterator[tuple[str, int, int]]:
    """(path, out channels, in channels) of every convolution that runs; last, of the classifier."""
    space = net.space
    mid, x = space.stem_mid_size().at(arch), space.stem_size().at(arch)
    yield "stem.conv0", mid, 3
    if arch["stem.depth"]:
        yield "stem.residual", mid, mid
    yield "stem.conv1", x, mid
    for s in range(4):
        out = space.out_size(s).at(arch)
        for b in range(int(arch[f"stage{s}.depth"])):
            path, inner = f"stages.{s}.{b}", space.mid_size(s, b).at(arch)
            yield from ((f"{path}.conv0", inner, x), (f"{path}.conv1", inner, inner), (f"{path}.conv2", out, inner))
            if b == 0:
                yield f"{path}.shortcut", out, x
            x = out
    yield "classifier", 5, x


def used(net: Any, arch: Arch) -> Iterator[Part]:
    for path, o, i in convs(net, arch):
        yield from classifier(i) if path == "classifier" else parts(net, path, o, i)


def norms(net: Any, arch: Arch) -> dict[str, int]:
    return {f"{path}.norm": o for path, o, _ in convs(net, arch) if path != "classifier"}


def depths(space: SearchSpace) -> set[str]:
    return {choice.name for choice in space.choices if choice.name.endswith(".depth")}


def refused(space: SearchSpace) -> list[Refused]:
    largest = space.largest()
    return [
        ({**largest, "stage0.depth": 9}, True, r"stage0\.depth = 9 is not in this space"),
        ({**largest, "stage0.depth": 9}, False, r"a stage cannot keep 9 blocks\. Allowed: 1 to 2"),
        ({**largest, "stem.depth": 2}, False, r"the stem cannot keep 2 residual convolutions\. Allowed: 0, 1"),
    ]


def resnet50d(id: str, make_space: Callable[[], SearchSpace], hard: Callable[[SearchSpace], set[str]] = lambda space: set()
              ) -> Entry:  # fmt: skip
    return Entry(
        id, make_space, OFAResNet50D, {}, "all", used, norms,
        groups=lambda space: [depths(space), set(space.largest()) - depths(space) - hard(space)], owners=depths,
        structure=depths, refused=refused, size=32, hard=hard,
    )  # fmt: skip


RESIDUAL = [
    resnet50d("resnet50d", lambda: Shallow(0.125, (1, 1, 1, 1))),
    resnet50d("resnet50d-sizes", lambda: Shallow(0.125, (1, 1, 1, 1), (32, 40)), lambda space: {"resolution"}),
]
