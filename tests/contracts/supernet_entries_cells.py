"""Entries of supernets made of cells: NATS-Bench, DARTS, NASNet."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from supernet_entry import Entry, Part, classifier, named, one_by_one, parts

from search_spaces import nasnet, nats
from search_spaces.space import Arch, Choice, SearchSpace
from supernets.darts import Cells
from supernets.elastic import Normalise
from supernets.nasnet import NASNet
from supernets.nasnet_operations import convolves
from supernets.nats import Sizes, Topology
from supernets.operations import Chained

# -- NATS-Bench ---------------------------------------------------------------------------------------------------------


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
