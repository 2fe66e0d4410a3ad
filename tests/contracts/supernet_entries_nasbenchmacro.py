"""The entries of the NAS-Bench-Macro supernet: a chain of layers, each one of two mobile convolutions or an identity. Compact,
and with every layer at its own place, where the choices own their operations under every architecture."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from supernet_entry import Entry, Part, classifier, named, one_by_one, parts

from search_spaces.nasbenchmacro import IDENTITY, MBCONVS, NASBenchMacro
from search_spaces.space import Arch
from supernets import nasbenchmacro as supernets

WHOLE = slice(None)


def running(net: Any, arch: Arch) -> Iterator[tuple[str, int, int, int]]:
    """(path, channels read, between, given) of every operation that computes something; 0 between of a 1x1 convolution.
    Those of a compact stage stand before its identities."""
    space = net.space
    for s, stage in enumerate(space.places):
        options = [str(arch[place.name]) for place in stage]
        moved = [option for option in options[1:] if option != IDENTITY]
        if space.compact:
            options[1:] = moved + [IDENTITY] * (len(stage) - 1 - len(moved))
        for i, (place, option) in enumerate(zip(stage, options)):
            if option != IDENTITY or i == 0:
                mid = 0 if option == IDENTITY else MBCONVS[option][1] * place.c_in
                yield f"stages.{s}.{i}.operations.{option}", place.c_in, mid, place.c_out


def used(net: Any, arch: Arch) -> Iterator[Part]:
    """Of an operation's last norm no shift: 1x1 convolutions read the stream, and the norm behind them subtracts it."""
    space = net.space
    yield from parts(net, "stem", space.stem, 3)
    for path, i, mid, o in running(net, arch):
        last = parts(net, path, o, i)
        if mid:
            yield from parts(net, f"{path}.expand", mid, i)
            yield f"{path}.depthwise.weight", (slice(mid), WHOLE)
            yield f"{path}.depthwise.norm.weight.0", (slice(mid),)
            yield f"{path}.depthwise.norm.bias.0", (slice(mid),)
            last = parts(net, f"{path}.project", o, mid)
        yield from (part for part in last if ".norm.bias." not in part[0])
    yield from parts(net, "final", space.features, space.places[-1][-1].c_out)
    yield from classifier(space.features)


def norms(net: Any, arch: Arch) -> dict[str, int]:
    found = {"stem.norm": net.space.stem, "final.norm": net.space.features}
    for path, _, mid, o in running(net, arch):
        if mid:
            found |= {f"{path}.expand.norm": mid, f"{path}.depthwise.norm": mid, f"{path}.project.norm": o}
        else:
            found[f"{path}.norm"] = o
    return found


def nasbenchmacro(id: str, compact: bool) -> Entry:
    words = r"stage1\.layer2 = dreamt is not in this space\. Allowed: identity, mbconv3_3x3, mbconv6_5x5"
    return Entry(
        id, lambda: NASBenchMacro(0.125, (2, 3), 8, compact), supernets.NASBenchMacro, {}, "all", used, norms,
        groups=one_by_one, owners=named,
        refused=lambda space: [({**space.largest(), "stage1.layer2": "dreamt"}, inherit, words) for inherit in (True, False)],
    )  # fmt: skip


ENTRIES = [nasbenchmacro("nasbenchmacro", True), nasbenchmacro("nasbenchmacro-places", False)]
