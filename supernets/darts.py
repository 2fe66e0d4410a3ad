"""The supernet of search_spaces.darts: cells whose edges mix operations, and the networks that genotypes make of them.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width, ``N`` classes. Skeleton as released (page darts, sections 2 to
4): stem, cells with reductions after a third and two thirds, pooling, classifier. Every cell output is read behind a ReLU.
"""
from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial, reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import darts
from search_spaces.sizes import Segment, fixed
from search_spaces.space import Mixture, SearchSpace, Setting, require
from supernets.abreast import Inputs, abreast, columns, fits, spread
from supernets.chains import Chain, Conv
from supernets.elastic import Leaf
from supernets.entangled import entangle, superposed
from supernets.extract import DropPath
from supernets.layers import Layer, When, known_view
from supernets.mixing import Candidate, Scaled, active, blend
from supernets.operations import CandidateLeaf, Chained, Classifier, Halve, Operation, Pool, identity, joined, zero
from supernets.sorting import Moved

Arch = Mapping[str, Setting]
POOLS = {"max_pool_3x3": "max", "avg_pool_3x3": "avg"}
SKIP = "skip_connect"
FAMILIES = ("sep_conv_", "dil_conv_")


def operation(op: str, C: int, stride: int) -> CandidateLeaf | None:
    """The leaf of an operation on one edge; None for pools, which all edges of a state share, and for the identity."""
    if op in POOLS or (op == SKIP and stride == 1):
        return None
    if op == SKIP:
        return Halve(C, C, affine=False)
    if op == "conv_7x1_1x7":
        return Operation(C, C, [(Conv((1, 7), (1, stride)), Conv((7, 1), (stride, 1)))], affine=False)
    kind, _, size = op.partition("_conv_")
    k = int(size[0])
    if kind == "dil":
        return Operation(C, C, [(Conv(k, stride, 2, True), Conv(1))], affine=False)
    return Operation(C, C, [(Conv(k, stride, 1, True), Conv(1)), (Conv(k, 1, 1, True), Conv(1))], affine=False)


def families(ops: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Of the options ``ops``, the operations that can share weights: sep_conv of several sizes, dil_conv of several sizes.

    ValueError for an option that is a sum of two of them, as both would need statistics of one norm.
    """
    single = dict.fromkeys(op for option in ops for op in darts.parts(option))
    found = [tuple(op for op in single if op.startswith(kind)) for kind in FAMILIES]
    for option in ops:
        if any(len(set(darts.parts(option)) & set(family)) > 1 for family in found):
            raise ValueError(
                f"{option} adds two operations that entangled cells give one norm. Leave out entangled, or this option."
            )
    return tuple(family for family in found if len(family) > 1)


class State:
    """One state of a cell and what its readers share: computed when first asked for, once."""

    def __init__(self, x: Tensor, pools: Mapping[str, Pool]) -> None:
        self.x, self.pools = x, pools
        self.fan: Mapping[int, Tensor] = {}  # what its edges give to later nodes, where they are computed side by side
        self._pooled: dict[str, Tensor] = {}

    @cached_property
    def active(self) -> Tensor:
        return F.relu(self.x)

    def pooled(self, op: str) -> Tensor:
        """The pool and its affine-free norm."""
        if op not in self._pooled:
            self._pooled[op] = self.pools[op](self.x, {})
        return self._pooled[op]


class Cell(nn.Module):
    """One cell of ``kind`` "normal" or "reduce", C channels a node.

    ``into``: channels of the two cells before it. ``halved``: whether the first of them has twice the height and width.
    ``node3.from1.sep_conv_3x3`` is the path of a leaf: a choice and its option; ``state1.max_pool_3x3`` of what all edges
    from a state share. ``families``: the operations that share weights, on each edge.
    """

    def __init__(
        self, space: darts.Cells, kind: str, into: tuple[int, int], C: int, halved: bool,
        families: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.families = families
        self.kind, self.C, self.ops = kind, C, space.ops
        self.nodes = range(2, space.nodes + 2)
        self.concat = space.normal_concat if kind == "normal" else space.reduce_concat
        single = [[Conv(1)]]
        self.pre0 = Halve(into[0], C, affine=False) if halved else Operation(into[0], C, single, affine=False)
        self.pre1 = Operation(into[1], C, single, affine=False)
        ops = list(dict.fromkeys(op for option in space.ops for op in darts.parts(option)))
        for state in range(self.nodes[-1]):
            pools = {op: Pool(POOLS[op], C, self.stride(state), norm=True) for op in ops if op in POOLS}
            self.add_module(f"state{state}", nn.ModuleDict(pools))
        for node in self.nodes:
            edges = nn.ModuleDict()
            for source in range(node):
                made = {op: operation(op, C, self.stride(source)) for op in ops}
                leaves = {op: leaf for op, leaf in made.items() if leaf is not None}
                for family in families:
                    leaves = entangle(leaves, family)
                edges[f"from{source}"] = nn.ModuleDict(leaves)
            self.add_module(f"node{node}", edges)
        self.drop_path = DropPath()

    def stride(self, source: int) -> int:
        """Of the edges that leave a state: 2 from the two inputs of a reduction."""
        return 2 if self.kind == "reduce" and source < 2 else 1

    def forward(self, s0: Tensor, s1: Tensor, arch: Arch, drop: Any = None) -> Tensor:
        """Activated outputs of the two cells before -> (B, nodes of the output * C, H', W').

        ``drop``: strength of drop path; None where it does not exist, also in a trace.
        """
        states = [self._state(0, self.pre0(s0, arch), arch, drop), self._state(1, self.pre1(s1, arch), arch, drop)]
        for node in self.nodes:
            states.append(self._state(node, self._node(node, states, arch, drop), arch, drop))
        return torch.cat([states[i].x for i in self.concat], dim=1)

    def _state(self, i: int, x: Tensor, arch: Arch, drop: Any) -> State:
        if i == self.nodes[-1]:
            return State(x, {})
        state = State(x, cast(Mapping[str, Pool], self.get_submodule(f"state{i}")))
        # Paths are dropped one by one, and without gradients recalibration listens at every leaf's own norm.
        if drop is None and self.training and torch.is_grad_enabled():
            state.fan = self._fan(i, state, arch)
        return state

    def _fan(self, source: int, state: State, arch: Arch) -> dict[int, Tensor]:
        """What the mixtures on all edges from ``source`` give their nodes, operations of one form side by side; {} where the
        mixtures are not alike."""
        names = {node: darts.edge(self.kind, node, source) for node in self.nodes if node > source}
        mixtures = {node: setting for node, name in names.items() if isinstance(setting := arch[name], Mixture)}
        leaves = [self.leaves(names[node]) for node in mixtures]
        w: dict[str, Tensor] = {}  # the weights of an operation on all E edges, (E,)
        for option, column in columns(list(mixtures.values())).items():
            require(names[self.nodes[-1]], option, self.ops)
            for op in darts.parts(str(option)):
                w[op] = w[op] + column if op in w else column
        beside = [op for op in w if fits(leaves[0].get(op))]
        if not beside:
            return {}
        inputs, shared = Inputs(state.active, len(leaves)), [op for op in w if op not in leaves[0]]
        mixed = [ops for family in self.families if (ops := [op for op in family if op in w])]
        runs: list[tuple[Sequence[nn.Module | Chain], Tensor | None]] = [
            ([edge[op] for edge in leaves], w[op]) for op in beside if not any(op in ops for ops in mixed)
        ]
        runs += [(self._entangled(ops, leaves, w), None) for ops in mixed]
        sums = reduce(Tensor.add_, (abreast(operations, inputs, column) for operations, column in runs))
        found = spread([self._shared(op, state) for op in shared], [w[op] for op in shared], sums, len(leaves))
        for op in [op for op in w if op not in (*beside, *shared)]:
            found = [y + edge[op].scaled(state.active, v)[0] for y, edge, v in zip(found, leaves, w[op].unbind(0))]
        return dict(zip(mixtures, found))

    @staticmethod
    def _entangled(ops: Sequence[str], leaves: Sequence[Mapping[str, CandidateLeaf]], w: Mapping[str, Tensor]) -> list[Chain]:
        """What the operations ``ops`` of one family run on each of E edges; ``w``: their weights (E,)."""
        rows = zip(*(w[op].unbind(0) for op in ops))
        return [superposed([cast(Chained, edge[op]) for op in ops], row) for edge, row in zip(leaves, rows)]

    @staticmethod
    def _shared(op: str, state: State) -> Tensor:
        """What an operation without weights makes of a state, for all who read it."""
        return state.pooled(op) if op in POOLS else state.x

    def _node(self, node: int, states: Sequence[State], arch: Arch, drop: Any) -> Tensor:
        """The sum of the edges from ``states``. Edges that are mixtures are one mixture of all their candidates."""
        out: list[Tensor] = []
        mixtures: list[Mixture] = []
        mixed: list[Candidate | None] = []
        for source, state in enumerate(states):
            if node in state.fan:
                out.append(state.fan[node])
                continue
            name = darts.edge(self.kind, node, source)
            setting = arch[name]
            options = setting.options if isinstance(setting, Mixture) else (setting,)
            runs = self._superposed(name, setting)
            found = [self._candidate(name, str(option), state, drop, runs) for option in options]
            for chain in runs.values():
                y = chain.run(state.active)
                out.append(y if drop is None else self.drop_path(y, drop))
            if isinstance(setting, Mixture):
                mixtures.append(setting)
                mixed += found
            elif found[0] is not None:
                out.append(found[0](state.x, None)[0])
        empty = partial(zero, stride=self.stride(0))
        if mixtures:
            out.append(blend(mixed, states[0].x, joined(mixtures), empty))
        return reduce(operator.add, out) if out else empty(states[0].x)

    def _superposed(self, name: str, setting: Setting) -> dict[tuple[str, ...], Chain]:
        """What the entangled families of the edge ``name`` run under a mixture, by the operations that run in it. A gate never
        mixes: its candidates stay apart."""
        if not self.families or not isinstance(setting, Mixture) or setting.idle == "gate":
            return {}
        w: dict[str, Tensor] = {}
        for j in active(setting):
            for op in darts.parts(str(setting.options[j])):
                w[op] = w[op] + setting.weights[j] if op in w else setting.weights[j]
        here = [tuple(op for op in family if op in w) for family in self.families]
        leaves = self.leaves(name)
        return {ops: superposed([cast(Chained, leaves[op]) for op in ops], [w[op] for op in ops]) for ops in here if ops}

    def _candidate(self, name: str, option: str, state: State, drop: Any, runs: Iterable[Sequence[str]]) -> Candidate | None:
        """What an option of the edge ``name`` makes of ``state``, without the operations in ``runs``; None for nothing."""
        require(name, option, self.ops)
        elsewhere = {op for ops in runs for op in ops}
        ops = [partial(self._operate, name, op, state, drop) for op in darts.parts(option) if op not in elsewhere]
        return ops[0] if len(ops) == 1 else partial(_sum, ops) if ops else None

    def _operate(self, name: str, op: str, state: State, drop: Any, _: Tensor, w: Tensor | None) -> Scaled:
        """One operation, as ``mixing.blend`` calls it."""
        leaf = self.leaves(name).get(op)
        y, rest = identity(self._shared(op, state), w) if leaf is None else leaf.weighted(state.active, w)
        if op == SKIP and leaf is None:
            return y, rest  # the identity is never dropped
        return (y if drop is None else self.drop_path(y, drop)), rest

    def leaves(self, name: str) -> Mapping[str, CandidateLeaf]:
        """The leaves of the edge ``name`` ("normal.node2.from1"), by operation."""
        modules = cast(nn.ModuleDict, self.get_submodule(name.partition(".")[2]))
        return cast(Mapping[str, CandidateLeaf], modules._modules)

    def layers(self, hw: tuple[int, int]) -> Iterator[Layer]:
        """Its cost terms, for OUTPUTS of the preprocessing of ``hw``."""
        yield from self.pre0.layers(hw)
        yield from self.pre1.layers(hw)
        for node in self.nodes:
            for source in range(node):
                name = darts.edge(self.kind, node, source)
                for op, leaf in self.leaves(name).items():
                    there = When((name,), lambda option, op=op: op in darts.parts(option))
                    yield from leaf.layers(_halved(hw) if self.kind == "reduce" else hw, there)


def _sum(ops: Sequence[Candidate], x: Tensor, w: Tensor | None) -> Scaled:
    """The sum of several operations, as one candidate."""
    found = [op(x, w) for op in ops]
    return reduce(operator.add, [y if rest is None else y * rest for y, rest in found]), None


class Cells(nn.Module):
    """The supernet of a Cells space.

    ``channels``: of the input image. ``classes``: outputs. ``forward(x, arch, drop)``: ``drop`` is the strength of drop path,
    on the output of every operation but the identity.

    ``entangled``: the sep_conv of all sizes on an edge share the depthwise kernels of the largest, of which the smaller ones
    are the centres, its pointwise convolutions and its norms; so do the dil_conv (TangleNAS, page 2.2). A value runs its
    slices. A mixture runs each family once, on depthwise kernels that are the sum of w times the padded slices, weighted in
    front of the norms as released. The norms have no scale, so they divide the size of the weights out again: the weights of
    a family act by their ratio alone, it counts 1 on its edge whatever they sum to, and where one of its operations is
    active its weight gets (but for the norm's eps) no gradient. A gate (idle = "gate") never mixes: every option is its own
    slices. ValueError for an option that adds two operations of one family.
    """

    def __init__(self, space: darts.Cells, channels: int = 3, classes: int = 10, entangled: bool = False) -> None:
        super().__init__()
        shared = families(space.ops) if entangled else ()
        self.space, C = space, space.C
        self.imagenet = space.stem == "imagenet"
        if self.imagenet:
            if C % 2:
                raise ValueError(f"C = {C} is odd, and the stem of ImageNet begins with half of the channels. Give an even C.")
            stem = [Operation(i, o, [[Conv(3, 2)]]) for i, o in ((channels, C // 2), (C // 2, C), (C, C))]
            into, halved = (C, C), True
        else:
            stem = [Operation(channels, 3 * C, [[Conv(3)]])]
            into, halved = (3 * C, 3 * C), False
        self.stem, self.cells = nn.ModuleList(stem), nn.ModuleList()
        for k in range(space.layers):
            kind = "reduce" if k in self.reductions() else "normal"
            C *= 2 if kind == "reduce" else 1
            cell = Cell(space, kind, into, C, halved, shared)
            self.cells.append(cell)
            into, halved = (into[1], len(cell.concat) * C), kind == "reduce"
        self.classifier = Classifier((Segment(fixed(into[1]), into[1]),), classes)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def reductions(self) -> tuple[int, int]:
        """The cells that halve height and width, after a third and two thirds of all."""
        return self.space.layers // 3, 2 * self.space.layers // 3

    def every_cell(self) -> list[Cell]:
        return list(cast(Iterable[Cell], self.cells))

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, N)."""
        return self._run(x, arch, drop if drop and self.training else None)[0]

    def tapped(self, x: Tensor, arch: Arch, drop: float) -> tuple[Tensor, Tensor]:
        """Logits, and the features that an auxiliary head reads: what the second reduction makes."""
        return self._run(x, arch, drop)

    def _run(self, x: Tensor, arch: Arch, drop: Any) -> tuple[Tensor, Tensor]:
        s0, s1 = self._stemmed(x, arch)
        features, cells = s1, self.every_cell()
        for k, cell in enumerate(cells):
            out = cell(s0, s1, arch, drop)
            s0, s1 = s1, out if k == len(cells) - 1 else F.relu(out, inplace=True)
            features = s1 if k == self.reductions()[1] else features
        x = torch.flatten(F.adaptive_avg_pool2d(s1, 1), 1)
        return self.classifier(x, arch), features

    def head(self, features: tuple[int, int, int]) -> nn.Module:
        """The published auxiliary head; its first pool averages maps of a size that it was not made for to 2x2 as well."""
        C, H, W = features
        stride = 2 if self.imagenet else 3
        published = all(n >= 5 and (n - 5) // stride == 1 for n in (H, W))
        pool = nn.AvgPool2d(5, stride, count_include_pad=False) if published else nn.AdaptiveAvgPool2d(2)
        last = [] if self.imagenet else [nn.BatchNorm2d(768)]  # the ImageNet head has none, on purpose
        classes = len(self.classifier.bias)
        return nn.Sequential(
            nn.ReLU(), pool, nn.Conv2d(C, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False), *last, nn.ReLU(), nn.Flatten(), nn.Linear(768, classes),
        )  # fmt: skip

    def _stemmed(self, x: Tensor, arch: Arch) -> tuple[Tensor, Tensor]:
        """What the first cell reads, activated."""
        first, *others = cast(Iterable[Operation], self.stem)
        s0 = s1 = F.relu(first(x, arch), inplace=True)
        for conv in others:
            s0, s1 = s1, F.relu(conv(s1, arch), inplace=True)
        return s0, s1

    # -- readings ---------------------------------------------------------------------------------------------------

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term of the network that is trained alone, for images of ``input_size`` (H, W): the same in
        all views. ValueError where a size to be halved is odd."""
        known_view(view)
        records: list[Layer] = []
        hw = input_size
        for conv in cast(Iterable[Operation], self.stem):
            hw = _halved(hw) if self.imagenet else hw
            records += conv.layers(hw)
        for cell in self.every_cell():
            if cell.kind == "reduce" and (hw[0] % 2 or hw[1] % 2):
                raise ValueError(
                    f"images of {input_size[0]}x{input_size[1]} reach a reduction cell at {hw[0]}x{hw[1]}, which cannot be "
                    f"halved. Allowed: multiples of {32 if self.imagenet else 4}."
                )
            records += cell.layers(hw)
            hw = _halved(hw) if cell.kind == "reduce" else hw
        return records + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Of an edge in all its cells: the weights of operations that this option alone runs (any option: all). Those that
        entangled operations share are of an option only where no other runs one of them."""
        kind, found = self.space.part(choice), list[nn.Parameter]()
        for cell in self.every_cell():
            leaves = cell.leaves(choice) if cell.kind == kind else {}
            for leaf in leaves.values():
                users = {o for o in self.space.root[choice].options if _runs(leaves, darts.parts(str(o)), leaf)}
                found += leaf.parameters() if option is None or users == {option} else ()
        return found

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: no width is a choice here."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def _runs(leaves: Mapping[str, CandidateLeaf], ops: Iterable[str], own: CandidateLeaf) -> bool:
    """Whether one of ``ops`` runs on the weights of ``own``."""
    running = (leaves[op] for op in ops if op in leaves)
    return any((leaf.whole if isinstance(leaf, Chained) else leaf) is own for leaf in running)


def _halved(hw: tuple[int, int]) -> tuple[int, int]:
    """The output size of a padded stride-2 layer."""
    return (hw[0] + 1) // 2, (hw[1] + 1) // 2


def build(space: darts.Cells, channels: int, classes: int) -> Cells:
    """The supernet that serves an arch.json of this module's space."""
    return Cells(space, channels, classes)
