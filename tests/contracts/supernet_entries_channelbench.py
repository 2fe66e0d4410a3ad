"""Entries of Channel-Bench-Macro: seven widths of a residual network and of one of inverted residual blocks."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from supernet_entry import Entry, Part, classifier, named, one_by_one, parts

from search_spaces import channelbench
from search_spaces.space import Arch
from supernets.channelbench import ChannelMobileNet, ChannelResNet

WIDTHS = (6, 9, 3, 6, 9, 12, 6)


def residual_convs(arch: Arch) -> Iterator[tuple[str, int, int]]:
    """(path, out channels, in channels) of every convolution."""
    c0, c1, c2, c3, c4, c5, c6 = (int(arch[name]) for name in channelbench.NAMES)
    yield from (("stem", c0, 3), ("reduction.0", c3, c0), ("reduction.1", c4, c3))
    for path, stream, inner in (("stage0.0", c0, c1), ("stage0.1", c0, c2), ("stage1.0", c4, c5), ("stage1.1", c4, c6)):
        yield f"{path}.conv0", inner, stream
        yield f"{path}.conv1", stream, inner


def residual_used(net: Any, arch: Arch) -> Iterator[Part]:
    for path, o, i in residual_convs(arch):
        yield from parts(net, path, o, i)
    yield from classifier(int(arch["c4"]))


def residual(id: str, **settings: str) -> Entry:
    return Entry(
        id, lambda: channelbench.ChannelResNet(WIDTHS, 3), ChannelResNet, settings, "all", residual_used,
        norms=lambda net, arch: {f"{path}.norm": o for path, o, _ in residual_convs(arch)}, groups=one_by_one,
        owners=lambda space: set() if settings.get("norm") == "shared" else named(space), words=("mixing", "norm"),
    )  # fmt: skip


def mobile_blocks(arch: Arch) -> Iterator[tuple[str, int, int, int]]:
    """(path, in, hidden, out channels) of every block."""
    c0, c1, c2, c3, c4, c5, _ = (int(arch[name]) for name in channelbench.NAMES)
    for b, widths in enumerate(((c0, c1, c0), (c0, c2, c0), (c0, c3, c4), (c4, c5, c4))):
        yield f"blocks.{b}", *widths


def mobile_used(net: Any, arch: Arch) -> Iterator[Part]:
    yield from parts(net, "stem", int(arch["c0"]), 3)
    for path, i, hidden, o in mobile_blocks(arch):
        yield from parts(net, f"{path}.expand", hidden, i)
        yield f"{path}.depthwise.weight", (slice(hidden), slice(None))
        yield f"{path}.depthwise.norm.weight.0", (slice(hidden),)
        yield f"{path}.depthwise.norm.bias.0", (slice(hidden),)
        # Every reader of the stream is a 1x1 convolution whose norm subtracts what a shift adds.
        yield from (part for part in parts(net, f"{path}.project", o, hidden) if ".norm.bias." not in part[0])
    yield from parts(net, "final", int(arch["c6"]), int(arch["c4"]))
    yield from classifier(int(arch["c6"]))


def mobile_norms(net: Any, arch: Arch) -> dict[str, int]:
    found = {"stem.norm": int(arch["c0"]), "final.norm": int(arch["c6"])}
    for path, _, hidden, o in mobile_blocks(arch):
        found |= {f"{path}.expand.norm": hidden, f"{path}.depthwise.norm": hidden, f"{path}.project.norm": o}
    return found


def mobile(id: str, **settings: str) -> Entry:
    return Entry(
        id, lambda: channelbench.ChannelMobileNet(WIDTHS, 3), ChannelMobileNet, settings, "all", mobile_used, mobile_norms,
        groups=one_by_one, owners=lambda space: set(), words=("mixing",),
    )  # fmt: skip


CHANNELS = [
    residual("channel-resnet"),
    residual("channel-resnet-shared-sum", norm="shared", mixing="sum"),
    mobile("channel-mobilenet"),
    mobile("channel-mobilenet-sum", mixing="sum"),
]
