"""Entries of supernets of inverted residual blocks: once-for-all, BigNAS, AttentiveNAS."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from supernet_entry import Entry, Part, Refused, classifier, parts

from search_spaces import bignas, mobilenet
from search_spaces.inverted import Inverted, mid_width, squeeze_width
from search_spaces.space import Arch, SearchSpace
from supernets.bignas import AttentiveNAS, BigNAS
from supernets.mobilenet import OFAMobileNetV3, OFAProxyless

WHOLE = slice(None)
SIDE = 8


class Run(NamedTuple):
    """A block that runs: its path, channels (read, between, given), kernel, and the side of the images that it reads."""

    path: str
    i: int
    mid: int
    o: int
    kernel: int
    side: int


def running(net: Any, arch: Arch) -> Iterator[Run]:
    space, side = net.space, int(arch.get("resolution", SIDE))
    x = int(arch.get("stem.width", space.stem[-1]))
    if space.first is not None:
        yield Run("first", x, x, space.first, 3, side)
        x = space.first
    for s, stage in enumerate(space.stages):
        c = int(arch.get(f"stage{s}.width", stage.widths[-1]))
        for b in range(int(arch[f"stage{s}.depth"])):
            mid = mid_width(x, int(arch[space.expand_name(s, b)]))
            yield Run(f"stages.{s}.{b}", x, mid, c, int(arch[space.kernel_name(s, b)]), side)
            x, side = c, -(-side // (1 if b else stage.stride))


def inverted_used(net: Any, arch: Arch) -> Iterator[Part]:
    space = net.space
    x = int(arch.get("stem.width", space.stem[-1]))
    yield from parts(net, "stem", x, 3)
    for path, i, mid, o, k, side in running(net, arch):
        block = net.get_submodule(path)
        if block.expand is not None:
            yield from parts(net, f"{path}.expand", mid, i)
        yield f"{path}.depthwise.weight", (slice(mid), WHOLE)
        yield f"{path}.depthwise.norm.weight.0", (slice(mid),)
        yield f"{path}.depthwise.norm.bias.0", (slice(mid),)
        yield from matrices(path, k, side, block.depthwise)
        if block.squeeze is not None:
            h = squeeze_width(mid)
            yield f"{path}.squeeze.reduce", (slice(h), slice(mid))
            yield f"{path}.squeeze.reduce_bias", (slice(h),)
            yield f"{path}.squeeze.expand", (slice(mid), slice(h))
            yield f"{path}.squeeze.expand_bias", (slice(mid),)
        shifts = path in shifted(net, arch)
        yield from (part for part in parts(net, f"{path}.project", o, mid) if shifts or ".norm.bias." not in part[0])
        if space.projection and i != o:
            yield from parts(net, f"{path}.shortcut", o, i)
        x = o
    final = space.final_size().at(arch)
    yield from parts(net, "final", final, x)
    if net.mix is not None:
        final, before = space.mix_size().at(arch), final
        yield from parts(net, "mix", final, before)
    yield from classifier(final)


def shifted(net: Any, arch: Arch) -> set[str]:
    """The blocks whose last shift counts: elsewhere only 1x1 convolutions with a norm behind them read it, which subtract it.
    What sees the border of an image as well: depthwise convolutions of blocks of expand 1, and pools of odd sides."""
    found: set[str] = set()
    before: list[str] = []
    for run in running(net, arch):
        block = net.get_submodule(run.path)
        if run.side > 1 and (block.expand is None or (block.pool is not None and run.side % 2)):
            found |= set(before)
        before.append(run.path)
    return found


def matrices(path: str, k: int, side: int, leaf: Any) -> Iterator[Part]:
    """Of the matrices that a kernel passes through, the rows that make what is used: taps that meet a pixel of an
    image of this ``side``; of the matrix before, those that the identity behind it, the start, hands on."""
    for n, size in enumerate(leaf.sides[1:][: len(leaf.matrices)]):
        smaller = max((other for other in leaf.sides[n + 2 :] if other >= k), default=None)
        if k > size:
            return
        offsets = range(-(size // 2), size // 2 + 1)
        starts = range(0, side, leaf.stride)
        for y, x in itertools.product(offsets, offsets):
            met = all(any(0 <= start + tap < side for start in starts) for tap in (y, x))
            if met and (smaller is None or max(abs(y), abs(x)) <= smaller // 2):
                row = (y + size // 2) * size + x + size // 2
                yield f"{path}.depthwise.matrices.{n}", (slice(row, row + 1), WHOLE)


def inverted_norms(net: Any, arch: Arch) -> dict[str, int]:
    space = net.space
    found = {"stem.norm": int(arch.get("stem.width", space.stem[-1])), "final.norm": space.final_size().at(arch)}
    for path, _, mid, o, *_ in running(net, arch):
        if net.get_submodule(path).expand is not None:
            found[f"{path}.expand.norm"] = mid
        found |= {f"{path}.depthwise.norm": mid, f"{path}.project.norm": o}
    return found


def ending(space: SearchSpace, *words: str) -> set[str]:
    """Choices of more than one option."""
    return {c.name for c in space.choices if len(c.options) > 1 and c.name.rpartition(".")[2] in words}


def inverted_refused(space: SearchSpace) -> list[Refused]:
    largest = space.largest()
    return [
        ({**largest, "stage0.depth": 9}, True, r"stage0\.depth = 9 is not in this space"),
        ({**largest, "stage0.depth": 9}, False, r"a stage cannot keep 9 blocks\. Allowed: 1 to [12]"),
        ({**largest, "stage1.depth": 0}, False, r"a stage cannot keep 0 blocks"),
    ]


def inverted(id: str, make_space: Callable[[], Inverted], make_net: Any, matrices: bool = False, **settings: Any) -> Entry:
    """``matrices``: whether kernels have some; they own these, and refuse mixtures then."""
    owners = ("depth", "kernel") if matrices else ("depth",)
    crop = make_net(make_space(), **settings).mode == "crop"
    return Entry(
        id, make_space, make_net, settings, "all", inverted_used, inverted_norms,
        groups=lambda space: [ending(space, word) for word in owners],
        owners=lambda space: ending(space, *owners),
        structure=lambda space: ending(space, *owners),
        refused=inverted_refused, words=("mode",), constants=(".matrices.",),
        hard=lambda space: {choice.name for choice in space.choices} - (ending(space, "kernel") if crop else set()),
    )  # fmt: skip


ENTRIES = [
    inverted("mobilenet-transform", lambda: mobilenet.OFAMobileNetV3(0.2, True, expands=(2, 3), depths=(1, 2)),
             OFAMobileNetV3, matrices=True),
    inverted("mobilenet-crop", lambda: mobilenet.OFAMobileNetV3(0.2, True, (3, 5), (2, 3), (1, 2), (8, 9, 12)),
             OFAMobileNetV3, mode="crop"),
    inverted("mobilenet-7", lambda: mobilenet.OFAMobileNetV3(0.2, True, (7,), (2, 3), (1, 2)), OFAMobileNetV3,
             drop_path_stages=1),
    inverted("proxyless", lambda: mobilenet.OFAProxyless(0.2, True, (3, 5), (2, 3), (1, 2)), OFAProxyless, matrices=True),
    inverted("bignas", lambda: bignas.BigNAS(True, 0.3, [(1,), (1, 2), *[(1,)] * 4, (1, 2)]), BigNAS, zero_gamma=False),
    inverted("attentive", lambda: bignas.AttentiveNAS(True, 0.25, [(1, 2), (1, 2), *[(1,)] * 4, (1, 2)], (8, 9)),
             AttentiveNAS, zero_gamma=False),
]  # fmt: skip
