"""The list of supernets whose promises the contract tests check: a new entry inherits every test.

Nets are tiny and float64. Every batch norm has random scales and shifts, or its sets could not be told apart.

To add a kind of supernet: a function like ``topology`` below that makes its Entry, from two functions that say, in the
space's own words, which weights (``used``) and which norms (``norms``) an architecture runs.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_spaces import darts, nats, preresnet
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, Choice, SearchSpace
from supernets.darts import Cells
from supernets.elastic import Normalise
from supernets.nats import Sizes, Topology
from supernets.preresnet import PreResNet, ScaledNorm
from supernets.resnet import ResNet

Part = tuple[str, tuple[slice, ...]]
"""A parameter and the part of it that an architecture uses; of a convolution: its (out, in) channels."""
Refused = tuple[Arch, bool, str]
"""An architecture that extraction refuses, with weights inherited or not, and the pattern of its message."""


class Entry(NamedTuple):
    """``make_net(space, channels=, classes=, **settings)``. ``used``, ``norms`` (net, arch): the parameters an
    architecture's gradients reach; the path of each norm that runs, and its channels.

    ``inherits``: which architectures can take the supernet's weights over: "all", "largest" or "none"; ``adopts``: whether
    it takes over those of a plain network; ``scales``: whether its batch norms have scales of their own (where scales are
    the architecture's, it takes over a plain network whose scales are 1). ``groups``: choices that the test of ``owned``
    fixes together while all others are mixtures (one by one where one can cut another off). ``owners``: choices that own
    parameters. ``structure``: choices that must be hard while others are mixtures of two options. ``words``: settings that
    refuse an unknown word. ``refused``: what extraction refuses beside what all refuse.
    """

    id: str
    make_space: Callable[[], SearchSpace]
    make_net: Callable[..., Any]
    settings: Mapping[str, Any]
    inherits: str
    used: Callable[[Any, Arch], Iterator[Part]]
    norms: Callable[[Any, Arch], dict[str, int]]
    groups: Callable[[SearchSpace], list[set[str]]]
    owners: Callable[[SearchSpace], set[str]]
    structure: Callable[[SearchSpace], set[str]] = lambda space: set()
    refused: Callable[[SearchSpace], list[Refused]] = lambda space: []
    adopts: bool = True
    scales: bool = True
    words: tuple[str, ...] = ()
    size: int = 8

    def net(self) -> Any:
        net = self.make_net(self.make_space(), channels=3, classes=5, **self.settings).double()
        generator = torch.Generator().manual_seed(1)
        net.reset(generator)
        with torch.no_grad():
            for module in net.modules():
                for p in module.parameters() if isinstance(module, (Normalise, ScaledNorm)) else ():
                    p.copy_(torch.empty_like(p).uniform_(0.5, 1.5, generator=generator))
        return net

    def images(self, seed: int = 0, batch: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)


def archs(space: SearchSpace, n: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def parts(net: Any, path: str, o: int, i: int) -> Iterator[Part]:
    """Of an elastic convolution (its norm included) that runs with ``o`` output and ``i`` input channels."""
    leaf = net.get_submodule(path)
    yield f"{path}.weight", (slice(o), slice(i))
    if leaf.norm is not None:
        k = leaf.widths.index(o) if len(leaf.norm.weight) > 1 else 0
        yield f"{path}.norm.weight.{k}", (slice(o),)
        yield f"{path}.norm.bias.{k}", (slice(o),)


def classifier(c: int) -> Iterator[Part]:
    yield "classifier.weight", (slice(None), slice(c))
    yield "classifier.bias", (slice(None),)


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


# -- NATS-Bench ---------------------------------------------------------------------------------------------------------


def one_by_one(space: SearchSpace) -> list[set[str]]:
    return [{choice.name} for choice in space.choices]


def named(space: SearchSpace) -> set[str]:
    return {choice.name for choice in space.choices}


def reduction_convs(s: int, into: int, out: int) -> Iterator[tuple[str, int, int]]:
    yield f"reductions.{s}.conv0", out, into
    yield f"reductions.{s}.conv1", out, out
    yield f"reductions.{s}.shortcut", out, into


def topology_live(arch: Arch) -> list[str]:
    """Edges that compute something that reaches node 3. Every node receives something, as ``sample`` sees to."""
    reaching: set[int] = {3}
    for node, source in reversed(nats.EDGES):
        if node in reaching and arch[nats.edge(node, source)] != "none":
            reaching.add(source)
    return [nats.edge(*ends) for ends in nats.EDGES if ends[0] in reaching]


def topology_operations(net: Any, arch: Arch, edges: list[str]) -> Iterator[tuple[str, int]]:
    """(path, channels) of every operation with weights on these edges of all cells."""
    for s, stage in enumerate(net.stages):
        for n in range(len(stage)):
            for edge in edges:
                if str(arch[edge]).startswith("nor_conv"):
                    yield f"stages.{s}.{n}.{edge}.{arch[edge]}", net.space.C * 2**s


def topology_used(net: Any, arch: Arch) -> Iterator[Part]:
    C = net.space.C
    yield from parts(net, "stem", C, 3)
    operations = list(topology_operations(net, arch, topology_live(arch)))
    for s in range(2):
        for path, o, i in reduction_convs(s, C * 2**s, 2 * C * 2**s):
            # Without any convolution behind it, the last shift of a reduction ends in the last norm, which subtracts it.
            yield from (part for part in parts(net, path, o, i) if operations or s == 0 or part[0] != f"{path}.norm.bias.0")
    for path, c in operations:
        yield f"{path}.weight.0", (slice(c), slice(c))
    yield "norm.norm.weight.0", (slice(None),)
    yield "norm.norm.bias.0", (slice(None),)
    yield from classifier(4 * C)


def topology_norms(net: Any, arch: Arch) -> dict[str, int]:
    C = net.space.C
    found = {"stem.norm": C, "norm.norm": 4 * C}
    found |= {f"reductions.{s}.conv{c}.norm": 2 * C * 2**s for s in range(2) for c in range(2)}
    return found | {f"{path}.norm.0": c for path, c in topology_operations(net, arch, list(nats.NAMES))}


def topology(id: str, make_space: Callable[[], SearchSpace]) -> Entry:
    unknown = "node2.from1 = dreamt is not in this space. Allowed: none, skip_connect"
    return Entry(
        id, make_space, Topology, {}, "all", topology_used, topology_norms, groups=one_by_one, owners=named, adopts=False,
        refused=lambda space: [({**space.largest(), "node2.from1": "dreamt"}, inherit, unknown) for inherit in (True, False)],
    )  # fmt: skip


class Small(nats.Sizes):
    """The size space with fewer and narrower options."""

    def __init__(self) -> None:
        self.cell = nats.cell_arch(self.CELL)
        SearchSpace.__init__(self, [Choice(name, (3, 4, 6)) for name in self.NAMES], {})


def sizes_convs(net: Any, arch: Arch) -> Iterator[tuple[str, int, int]]:
    c1, c2, c3, c4, c5 = (int(arch[name]) for name in nats.Sizes.NAMES)
    yield "stem", c1, 3
    for s, (into, out) in enumerate(((c1, c1), (c2, c3), (c4, c5))):
        for edge in ("node1.from0", "node2.from0", "node2.from1", "node3.from0", "node3.from1", "node3.from2"):
            i = into if edge.endswith("0") else out
            if edge != "node3.from0" or i != out:
                yield f"stages.{s}.0.{edge}", out, i
    yield from reduction_convs(0, c1, c2)
    yield from reduction_convs(1, c3, c4)


def sizes_used(net: Any, arch: Arch) -> Iterator[Part]:
    c5 = int(arch["c5"])
    for path, o, i in sizes_convs(net, arch):
        # A shift that is only added to the last state is subtracted by the last norm.
        last = path.startswith("stages.2.0.node3")
        yield from (part for part in parts(net, path, o, i) if not (last and ".norm.bias" in part[0]))
    yield "norm.norm.weight.0", (slice(c5),)
    yield "norm.norm.bias.0", (slice(c5),)
    yield from classifier(c5)


def sizes_norms(net: Any, arch: Arch) -> dict[str, int]:
    convs = {f"{path}.norm": o for path, o, _ in sizes_convs(net, arch) if not path.endswith("shortcut")}
    return convs | {"norm.norm": int(arch["c5"])}


def sizes(id: str, **settings: str) -> Entry:
    return Entry(
        id, Small, Sizes, settings, "all", sizes_used, sizes_norms, groups=one_by_one,
        owners=lambda space: set() if settings.get("norm") == "shared" else named(space), words=("mixing", "norm"),
    )  # fmt: skip


# -- DARTS --------------------------------------------------------------------------------------------------------------


def darts_leaves(net: Any, arch: Arch) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything that runs in the cells. Every node of a genotype is read, and node 2 reads both inputs."""
    for k, cell in enumerate(net.cells):
        for pre in ("pre0", "pre1"):
            yield f"cells.{k}.{pre}", cell.get_submodule(pre)
        for name, option in arch.items():
            kind, _, edge = name.partition(".")
            if kind == cell.kind and option in cell.leaves(name):
                yield f"cells.{k}.{edge}.{option}", cell.leaves(name)[option]
            elif kind == cell.kind and str(option).endswith("pool_3x3"):
                path = f"state{edge.rpartition('from')[2]}.{option}"
                yield f"cells.{k}.{path}", cell.get_submodule(path)


def darts_used(net: Any, arch: Arch) -> Iterator[Part]:
    for path, leaf in (("stem.0", net.stem[0]), *darts_leaves(net, arch)):
        yield from ((f"{path}.{name}", (slice(None),)) for name, _ in leaf.named_parameters())
    yield from classifier(net.classifier.weight.shape[1])


def darts_norms(net: Any, arch: Arch) -> dict[str, int]:
    return {
        f"{path}.{name}": len(norm.running_mean)
        for path, leaf in (("stem.0", net.stem[0]), *darts_leaves(net, arch))
        for name, norm in leaf.named_modules() if isinstance(norm, Normalise)
    }  # fmt: skip


def cells(id: str, make_space: Callable[[], SearchSpace], size: int = 8) -> Entry:
    unknown = "normal.node3.from1 = dreamt is not in this space. Allowed: none, max_pool_3x3"
    return Entry(
        id, make_space, Cells, {}, "all", darts_used, darts_norms, groups=one_by_one, owners=named, adopts=False, size=size,
        refused=lambda space: [
            ({**space.largest(), "normal.node3.from1": "dreamt"}, inherit, unknown) for inherit in (True, False)
        ],
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
    sizes("sizes"),
    cells("darts", lambda: darts.Cells(C=4, layers=3, nodes=2)),
    sizes("sizes-shared-sum", norm="shared", mixing="sum"),
]
