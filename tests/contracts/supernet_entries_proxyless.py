"""The entry of the ProxylessNAS supernet: a chain of blocks, each one of several mobile convolutions, or its shortcut alone."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from supernet_entry import Entry, Part, classifier, named, one_by_one, parts

from search_spaces.inverted import mid_width
from search_spaces.proxyless import KERNELS, ZERO, ProxylessNAS
from search_spaces.space import Arch
from supernets import proxyless as supernets

WHOLE = slice(None)


def running(net: Any, arch: Arch) -> Iterator[tuple[str, int, int, int]]:
    """(path, channels read, between, given) of every block that computes something."""
    space = net.space
    yield "first", space.stem, space.stem, space.first
    for s, stage in enumerate(space.places):
        for b, place in enumerate(stage):
            option = str(arch[place.name])
            if option != ZERO:
                path = f"stages.{s}.{b}.operations.{option}"
                yield path, place.c_in, mid_width(place.c_in, KERNELS[option][1]), place.c_out


def used(net: Any, arch: Arch) -> Iterator[Part]:
    """Of a block's last norm no shift: the stream is read by 1x1 convolutions with a norm behind them, which subtracts it."""
    space = net.space
    yield from parts(net, "stem", space.stem, 3)
    for path, i, mid, o in running(net, arch):
        if path != "first":
            yield from parts(net, f"{path}.expand", mid, i)
        yield f"{path}.depthwise.weight", (slice(mid), WHOLE)
        yield f"{path}.depthwise.norm.weight.0", (slice(mid),)
        yield f"{path}.depthwise.norm.bias.0", (slice(mid),)
        yield from (part for part in parts(net, f"{path}.project", o, mid) if ".norm.bias." not in part[0])
    yield from parts(net, "final", space.final, space.places[-1][-1].c_out)
    yield from classifier(space.final)


def norms(net: Any, arch: Arch) -> dict[str, int]:
    found = {"stem.norm": net.space.stem, "final.norm": net.space.final}
    for path, _, mid, o in running(net, arch):
        found |= {f"{path}.depthwise.norm": mid, f"{path}.project.norm": o}
        if path != "first":
            found[f"{path}.expand.norm"] = mid
    return found


def proxyless(id: str) -> Entry:
    odd = {("stage1.block1", "dreamt"): r"stage1\.block1 = dreamt is not in this space\. Allowed: mbconv3_3x3, .*, zero",
           ("stage1.block0", ZERO): r"stage1\.block0 = zero is not in this space\. Allowed: mbconv3_3x3, .*, mbconv6_7x7"}
    return Entry(
        id, lambda: ProxylessNAS(0.2, True, (1, 2, 1, 1, 1, 1)), supernets.ProxylessNAS, {}, "all", used, norms,
        groups=one_by_one, owners=named,
        refused=lambda space: [({**space.largest(), name: value}, inherit, words)
                               for inherit in (True, False) for (name, value), words in odd.items()],
    )  # fmt: skip
