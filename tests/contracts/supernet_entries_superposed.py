"""Entries of supernets whose sizes are superposed: conv-macro, vision transformers."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from supernet_entry import Entry, Part, classifier, named

from search_spaces import macro
from search_spaces.space import Arch, SearchSpace
from supernets.macro import ConvMacro
from supernets.vit import ViT

# -- conv-macro ---------------------------------------------------------------------------------------------------------


def macro_used(net: Any, arch: Arch) -> Iterator[Part]:
    channels = [3, *(int(arch[f"c{i}"]) for i in (1, 2, 3, 4)), net.space.features]
    for i, (into, out) in enumerate(pairwise(channels), 1):
        yield f"conv{i}.weight", (slice(out), slice(into))
        yield f"conv{i}.bias", (slice(out),)
    for i in range(len(net.hidden)):
        yield f"hidden.{i}.weight", (slice(None),)
        yield f"hidden.{i}.bias", (slice(None),)
    yield from classifier(net.space.hidden[-1])


def conv_macro(id: str, **settings: Any) -> Entry:
    widths = ((2, 3), (2, 3, 5), (3, 4), (2, 4, 6))
    return Entry(
        id, lambda: macro.ConvMacro(widths, (3, 5), features=5, hidden=(7, 6), image=12), ConvMacro, settings, "all",
        macro_used, norms=lambda net, arch: {}, groups=lambda space: [named(space)], owners=lambda space: set(), size=12,
        gain=2.5,
    )  # fmt: skip


# -- vision transformers ------------------------------------------------------------------------------------------------


def vit_used(net: Any, arch: Arch) -> Iterator[Part]:
    space, e = net.space, int(arch["embed"])
    far, whole = space.grid - 1, slice(None)
    for name in ("weight", "bias", "token"):
        yield f"patches.{name}", (slice(e), whole)[: 2 if name == "weight" else 1]
    yield "patches.position", (whole, slice(e))
    for i in range(int(arch["depth"])):
        path, n, hidden = f"blocks.{i}", space.heads_size(i).at(arch), space.hidden_size(i).at(arch)
        full = net.blocks[i].attention.heads.full
        for part in range(3):
            rows = slice(part * full, part * full + n)
            yield f"{path}.attention.qkv.weight", (rows, slice(e))
            if part != 1:  # what is added to every key alike, the softmax subtracts
                yield f"{path}.attention.qkv.bias", (rows,)
        for table in ("keys", "values") if space.relative_position else ():
            for start in (0, 30):
                yield f"{path}.attention.{table}", (slice(start, start + 1), whole)
                yield f"{path}.attention.{table}", (slice(start + 15 - far, start + 16 + far), whole)
        for leaf, o, c in (("attention.proj", e, n), ("mlp.fc0", hidden, e), ("mlp.fc1", e, hidden)):
            yield f"{path}.{leaf}.weight", (slice(o), slice(c))
            yield f"{path}.{leaf}.bias", (slice(o),)
    for norm in ("norm", *(f"blocks.{i}.norm{k}" for i in range(int(arch["depth"])) for k in (0, 1))):
        yield f"{norm}.weight", (slice(e),)
        yield f"{norm}.bias", (slice(e),)
    yield from classifier(e)


def vision(id: str, make_space: Callable[[], SearchSpace], **settings: Any) -> Entry:
    return Entry(
        id, make_space, ViT, settings, "all", vit_used, lambda net, arch: {}, groups=lambda space: [{"depth"}],
        owners=lambda space: {"depth"}, words=("norm",), gain=10.0,
        refused=lambda space: [({**space.largest(), "depth": 9}, False, r"cannot keep 9 layers\. Allowed: 1 to 3")],
    )  # fmt: skip
