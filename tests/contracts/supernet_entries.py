"""The list of supernets whose promises the contract tests check: a new entry inherits every test.

Nets are tiny and float64. Every batch norm has random scales and shifts, or its sets could not be told apart.

To add a kind of supernet: a function like ``topology`` below that makes its Entry, from two functions that say, in the
space's own words, which weights (``used``) and which norms (``norms``) an architecture runs.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_spaces import darts, macro, nasnet, nats, preresnet, vit
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, Choice, SearchSpace
from supernets.darts import Cells
from supernets.elastic import Normalise
from supernets.macro import ConvMacro
from supernets.nasnet import NASNet
from supernets.nasnet_operations import convolves
from supernets.nats import Sizes, Topology
from supernets.operations import Chained
from supernets.preresnet import PreResNet, ScaledNorm
from supernets.resnet import ResNet
from supernets.tokens import TokenNorm
from supernets.vit import ViT

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
    ``gain``: what fresh weights are multiplied by: a chain without norms loses its signal at PyTorch's start.
    ``hard``: choices that refuse mixtures.
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
    gain: float = 1.0
    hard: Callable[[SearchSpace], set[str]] = lambda space: set()

    def net(self) -> Any:
        net = self.make_net(self.make_space(), channels=3, classes=5, **self.settings).double()
        generator = torch.Generator().manual_seed(1)
        net.reset(generator)
        with torch.no_grad():
            for p in net.parameters() if self.gain != 1.0 else ():
                p.mul_(self.gain)
            for module in net.modules():
                for p in module.parameters() if isinstance(module, (Normalise, ScaledNorm, TokenNorm)) else ():
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


def owner(leaf: Any) -> str:
    """The path of the leaf whose weights and norms an operation runs: where operations are entangled, of the largest."""
    return (leaf.whole if isinstance(leaf, Chained) else leaf).name


def topology_operations(net: Any, arch: Arch, edges: list[str]) -> Iterator[tuple[str, int]]:
    """(path of its weights, channels) of every operation with weights on these edges of all cells."""
    for s, stage in enumerate(net.stages):
        for n in range(len(stage)):
            for edge in edges:
                if str(arch[edge]).startswith("nor_conv"):
                    yield owner(net.get_submodule(f"stages.{s}.{n}.{edge}.{arch[edge]}")), net.space.C * 2**s


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


def topology(id: str, make_space: Callable[[], SearchSpace], entangled: bool = False) -> Entry:
    unknown = "node2.from1 = dreamt is not in this space. Allowed: none, skip_connect"
    return Entry(
        id, make_space, Topology, {"entangled": entangled}, "all", topology_used, topology_norms, groups=one_by_one,
        owners=lambda space: set() if entangled else named(space), adopts=False,
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
    """(path, leaf) of all weights that run in the cells. Every node of a genotype is read, and node 2 reads both inputs."""
    for k, cell in enumerate(net.cells):
        for pre in ("pre0", "pre1"):
            yield f"cells.{k}.{pre}", cell.get_submodule(pre)
        for name, option in arch.items():
            kind, _, edge = name.partition(".")
            if kind == cell.kind and option in cell.leaves(name):
                leaf = cell.leaves(name)[option]
                yield owner(leaf), leaf.whole if isinstance(leaf, Chained) else leaf
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


def halvings(space: SearchSpace) -> set[str]:
    """Edges whose skip_connect has weights."""
    return {name for name in named(space) if name.startswith("reduce") and name.endswith(("from0", "from1"))}


def cells(id: str, make_space: Callable[[], SearchSpace], size: int = 8, entangled: bool = False) -> Entry:
    unknown = "normal.node3.from1 = dreamt is not in this space. Allowed: none, max_pool_3x3"
    return Entry(
        id, make_space, Cells, {"entangled": entangled}, "all", darts_used, darts_norms, groups=one_by_one, adopts=False,
        size=size, owners=lambda space: halvings(space) if entangled else named(space),
        refused=lambda space: [
            ({**space.largest(), "normal.node3.from1": "dreamt"}, inherit, unknown) for inherit in (True, False)
        ],
    )  # fmt: skip


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


# -- NASNet -------------------------------------------------------------------------------------------------------------


def nasnet_felt(cell: Any, arch: Arch, widths: list[int]) -> list[bool]:
    """For each state of a cell, whether a shift of it changes anything: what is normalised before the next ReLU loses it."""
    felt, last = [False] * len(widths), len(widths) - 1
    for s in reversed(range(len(widths))):
        same = cell.states[s].level == cell.states[last].level and widths[s] == widths[last]
        found = [same and str(s) in str(arch[nasnet.concat(cell.kind)])]
        for b in cell.blocks:
            for side in nasnet.SIDES:
                if arch[nasnet.choice(cell.kind, b, f"{side}.input")] == s:
                    op = str(arch[nasnet.choice(cell.kind, b, f"{side}.op")])
                    runs = convolves(op, widths[s], cell.F, cell.stride(s))
                    found.append(felt[b + 1] if not runs else "_pool_" not in op)
        felt[s] = any(found)
    return felt


def nasnet_leaves(net: Any, arch: Arch) -> Iterator[tuple[str, Any, int, int, bool]]:
    """(path, leaf, channels that it reads, channels that it makes, whether a shift of the result is felt)."""
    yield "stem", net.stem, 3, net.stem.out[0].full, True
    for k, cell in enumerate(net.cells):
        widths = [source.size.at(arch) for source in cell.states]
        felt, path = nasnet_felt(cell, arch, widths), f"cells.{k}"
        yield f"{path}.squeeze", cell.squeeze, cell.this.size.at(arch), cell.F, felt[0]
        if cell.before is not None:
            c = cell.before.size.at(arch)
            if c != cell.F or cell.before.level != cell.this.level:
                yield f"{path}.adjust", cell.adjust, c, cell.F, felt[1]
        for b in cell.blocks:
            for side in nasnet.SIDES:
                s = int(arch[nasnet.choice(cell.kind, b, f"{side}.input")])
                op = str(arch[nasnet.choice(cell.kind, b, f"{side}.op")])
                if convolves(op, widths[s], cell.F, cell.stride(s)):
                    yield f"{path}.block{b}.{side}.{op}", cell.leaves(b, side)[op], widths[s], cell.F, felt[b + 1]
        for s in map(int, str(arch[nasnet.concat(cell.kind)])):
            if cell.states[s].level != cell.states[-1].level or widths[s] != widths[-1]:
                yield f"{path}.fit{s}", cell.get_submodule(f"fit{s}"), widths[s], widths[-1], True


def nasnet_used(net: Any, arch: Arch) -> Iterator[Part]:
    for path, leaf, c, o, felt in nasnet_leaves(net, arch):
        norms = [name for name, module in leaf.named_modules() if isinstance(module, Normalise)]
        for i, weight in enumerate(leaf.weight):
            deep = weight.shape[1] == 1 and weight.shape[2] > 1  # a depthwise kernel
            made = (o // 2, o - o // 2)[i] if norms == ["norm"] else o
            yield f"{path}.weight.{i}", (slice(c), slice(None)) if deep else (slice(made), slice(c))
            c = c if deep or norms == ["norm"] else o
        for name in norms:
            yield f"{path}.{name}.weight.0", (slice(o),)
            if felt or name != norms[-1]:
                yield f"{path}.{name}.bias.0", (slice(o),)
    yield from classifier(net.cells[-1].out.size.at(arch))


def nasnet_norms(net: Any, arch: Arch) -> dict[str, int]:
    return {f"{path}.{name}": o for path, leaf, _, o, _ in nasnet_leaves(net, arch)
            for name, module in leaf.named_modules() if isinstance(module, Normalise)}


def operations(space: SearchSpace) -> set[str]:
    return {name for name in named(space) if name.endswith(".op")}


def nasnet_cells(id: str, make_space: Callable[[], SearchSpace], size: int = 8) -> Entry:
    name = "reduce.block1.right.op"
    unknown = f"{name} = dreamt is not in this space. Allowed: identity, conv_1x3_3x1"
    return Entry(
        id, make_space, NASNet, {}, "all", nasnet_used, nasnet_norms, groups=lambda space: [operations(space)],
        owners=operations, hard=lambda space: named(space) - operations(space), size=size,
        refused=lambda space: [({**space.largest(), name: "dreamt"}, inherit, unknown) for inherit in (True, False)],
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
]
