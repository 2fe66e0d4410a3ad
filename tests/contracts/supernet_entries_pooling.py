"""The entries of the pooling supernet: one chain of units, all of whose weights serve wherever it pools."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from supernet_entry import Entry, Part, classifier, named, one_by_one

from search_spaces.pooling import POOLING, PoolingResNet
from search_spaces.space import Arch, SearchSpace
from supernets import pooling as supernets

WHOLE = slice(None)


def convs(net: Any) -> Iterator[tuple[str, int]]:
    """(path, out channels) of every convolution: all run, in every architecture."""
    units = net.space.units
    yield "stem", units[0]
    for b, (c_in, c) in enumerate(pairwise(units)):
        yield from ((f"blocks.{b}.conv0", c), (f"blocks.{b}.conv1", c))
        if c != c_in:
            yield f"blocks.{b}.shortcut", c


def used(net: Any, arch: Arch) -> Iterator[Part]:
    for path, _ in convs(net):
        yield f"{path}.weight.0", (WHOLE, WHOLE)
    yield from classifier(net.space.units[-1])


def norms(net: Any, arch: Arch) -> dict[str, int]:
    return {f"{path}.norm.0": c for path, c in convs(net)}


def pooling(id: str, *arguments: Any) -> Entry:
    words = rf"{POOLING} = 9-9-9 is not in this space\. Allowed: 1-"

    def space() -> SearchSpace:
        return PoolingResNet(*arguments)

    return Entry(
        id, space, supernets.PoolingResNet, {}, "all", used, norms, groups=one_by_one, owners=lambda space: set(),
        refused=lambda space: [({POOLING: "9-9-9"}, inherit, words) for inherit in (True, False)],
        adopts=False, scales=False, hard=named,
    )  # fmt: skip


ENTRIES = [pooling("pooling", (2, 1, 1), 2, (4, 6, 8)), pooling("pooling-once", (2, 3), 1, (4, 6))]
