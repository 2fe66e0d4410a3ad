"""The list of supernets whose promises the contract tests check: a new entry inherits every test.

Nets are tiny and float64. Every batch norm has random scales and shifts, or its sets could not be told apart.

To add a kind of supernet: a function like ``scaled_preresnet`` below (of cells, superposed sizes or inverted blocks: in
supernet_entries_cells, supernet_entries_superposed or supernet_entries_once) that makes its Entry, from two functions that
say, in the space's own words, which weights (``used``) and which norms (``norms``) an architecture runs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from supernet_entries_cells import cells, nasnet_cells, sizes, topology
from supernet_entries_channelbench import CHANNELS
from supernet_entries_nasbenchmacro import ENTRIES as NASBENCHMACRO
from supernet_entries_once import ENTRIES as ONCE
from supernet_entries_pooling import ENTRIES as POOLING
from supernet_entries_proxyless import proxyless
from supernet_entries_residual import RESIDUAL
from supernet_entries_superposed import conv_macro, vision
from supernet_entry import Entry, Part, Refused, classifier, named, parts

from search_spaces import darts, nasnet, nats, preresnet, vit
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, SearchSpace
from supernets.preresnet import PreResNet
from supernets.resnet import ResNet

# -- ResNet -------------------------------------------------------------------------------------------------------------


class Bottleneck(CifarResNet):
    """ResNet-164 with two blocks a stage instead of eighteen."""

    BLOCKS = {164: 2}  # noqa: RUF012  a constant table


def resnet_convs(net: Any, arch: Arch) -> Iterator[tuple[str, int, int]]:
    """(path, out channels, in channels) of every convolution that runs; last, of the classifier. A sum of unequal widths
    keeps the wider one's channels."""
    space = net.space
    x = space.stem_size().at(arch)
    yield "stem", x, 3
    for s in range(len(net.stages)):
        for b in range(int(arch[space.depth_name(s)])):
            path, block, i = f"stages.{s}.{b}", net.stages[s][b], x
            for c in range(space.convs):
                o = space.conv_size(s, b, c).at(arch)
                yield f"{path}.conv{c}", o, i
                i = o
            if block.shortcut is not None:
                yield f"{path}.shortcut", i, x
                x = i
            x = max(x, i)
    yield "classifier", 5, x


def resnet_used(net: Any, arch: Arch) -> Iterator[Part]:
    for path, o, i in resnet_convs(net, arch):
        yield from classifier(i) if path == "classifier" else parts(net, path, o, i)


def resnet_norms(net: Any, arch: Arch) -> dict[str, int]:
    convs = [(path, o) for path, o, _ in resnet_convs(net, arch) if path != "classifier"]
    return {f"{path}.norm": o for path, o in convs if net.get_submodule(path).norm is not None}


def depths(space: SearchSpace) -> set[str]:
    return {choice.name for choice in space.choices if choice.name.endswith(".depth")}


def resnet_refused(space: SearchSpace) -> list[Refused]:
    largest, depth = space.largest(), sorted(depths(space))[0]
    return [
        ({**largest, depth: 9}, True, f"{depth} = 9 is not in this space"),
        ({**largest, depth: 9}, False, r"a stage cannot keep 9 blocks\. Allowed: 1 to [23]"),
        ({**largest, depth: 0}, False, r"a stage cannot keep 0 blocks"),
    ]


def resnet(
    id: str, make_space: Callable[[], SearchSpace], inherits: str, size: int = 8, **settings: str
) -> Entry:
    return Entry(
        id, make_space, ResNet, settings, inherits, resnet_used, resnet_norms,
        groups=lambda space: [depths(space), set(space.largest()) - depths(space)],
        owners=lambda space: depths(space) if settings.get("norm") == "shared" else set(space.largest()),
        structure=depths, refused=resnet_refused, words=("mixing", "norm"), size=size,
    )  # fmt: skip


# -- PreResNet ----------------------------------------------------------------------------------------------------------


def preresnet_norms(net: Any, arch: Arch) -> dict[str, int]:
    space, found = net.space, {"final.norm": int(arch["final.width"])}
    for s, stage in enumerate(space.stages):
        for b in range(stage.blocks):
            found |= {f"stages.{s}.{b}.norm{c}.norm": space.norm_size(s, b, c).at(arch) for c in range(space.norms)}
    return found


def preresnet_used(net: Any, arch: Arch) -> Iterator[Part]:
    space, kept = net.space, preresnet_norms(net, arch)
    for norm, c in kept.items():
        yield f"{norm.removesuffix('.norm')}.shift", (slice(c),)
    x = space.stem
    yield from parts(net, "stem", x, 3)
    for s, stage in enumerate(space.stages):
        for b in range(stage.blocks):
            path, last = f"stages.{s}.{b}", s == len(space.stages) - 1
            # Of the stream, projections read all and norms their first channels; the last stage has no projection behind it.
            later = [kept["final.norm"], *(kept[f"stages.{s}.{n}.norm0.norm"] for n in range(b + 1, stage.blocks))]
            read = max(later) if last else space.stream(s)
            widths = [kept[f"{path}.norm{c}.norm"] for c in range(space.norms)]
            for c, (i, o) in enumerate(zip(widths, [*widths[1:], read])):
                yield from parts(net, f"{path}.conv{c}", o, i)
            if b == 0:
                yield from parts(net, f"{path}.shortcut", read, x)
                x = space.stream(s)
    yield from classifier(kept["final.norm"])


def scaled_preresnet(id: str, depth: int, widths: tuple[int, int, int]) -> Entry:
    name = "stage0.block0.norm1.width"
    words = rf"{name} cannot keep \d+ channels\. Allowed: 1 to {widths[0]}\."
    return Entry(
        id, lambda: preresnet.PreResNet(depth, widths), PreResNet, {}, "all", preresnet_used, preresnet_norms,
        groups=lambda space: [named(space)], owners=lambda space: set(), scales=False,
        refused=lambda space: [({**space.largest(), name: off}, False, words) for off in (0, widths[0] + 1)],
    )  # fmt: skip


def tied() -> SearchSpace:
    return CifarResNet(20, "tied", widths=(8, 12, 16))


def tas() -> SearchSpace:
    return CifarResNet(20, "tas", widths=(8, 12, 16))


SUPERNETS = [
    resnet("cifar20-tied", tied, "all"),
    resnet("cifar20-tied-shared", tied, "all", norm="shared"),
    resnet("cifar20-tied-sum", tied, "all", mixing="sum"),
    resnet("cifar20-tas", tas, "none"),
    resnet("cifar20-tas-shared-sum", tas, "none", norm="shared", mixing="sum"),
    resnet("bottleneck-tied", lambda: Bottleneck(164, "tied", widths=(4, 6, 8)), "all"),
    resnet("bottleneck-tas", lambda: Bottleneck(164, "tas", widths=(4, 6, 8)), "none"),
    resnet("imagenet18-tied", lambda: ImageNetResNet(18, "tied", widths=(4, 6, 8, 12)), "all", 32),
    resnet("imagenet18-tas", lambda: ImageNetResNet(18, "tas", widths=(4, 6, 8, 12)), "largest", 32),
    scaled_preresnet("preresnet20", 20, (2, 3, 5)),
    topology("topology", lambda: nats.Topology(4, 1)),
    topology("topology-entangled", lambda: nats.Topology(4, 1), entangled=True),
    sizes("sizes"),
    cells("darts", lambda: darts.Cells(C=4, layers=3, nodes=2)),
    nasnet_cells("nasnet", lambda: nasnet.NASNet(N=1, F=4, blocks=2)),
    cells("darts-entangled", lambda: darts.Cells(C=4, layers=3, nodes=2), entangled=True),
    sizes("sizes-shared-sum", norm="shared", mixing="sum"),
    conv_macro("conv-macro"),
    conv_macro("conv-macro-outputs", both_sides=False),
    vision("vit", lambda: vit.ViT([6, 8, 12], [1, 2, 3], [1, 2, 3], [1, 1.5, 2], head_dim=4, patch=2, image=8)),
    vision("vit-full", lambda: vit.ViT([4, 8], [2, 3], [1, 2], [1, 2.5], 4, 4, 8, relative_position=False, pool="token"),
           norm="full", both_sides=False),
    *ONCE,
    *RESIDUAL,
    *CHANNELS,
    proxyless("proxyless-operations"),
    *NASBENCHMACRO,
    *POOLING,
]
