"""Supernets of search_spaces.nats: NAS-Bench-201 cells (Topology) and the widths of the NATS size space (Sizes).

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import cached_property, partial, reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import nats
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture, SearchSpace, Setting, require
from supernets.chains import Chain, together
from supernets.elastic import prefix
from supernets.entangled import entangle, superposed
from supernets.layers import Layer, Shape, When, term
from supernets.mixing import Candidate, Scaled, active, averaging, blend, fold, plus_idle
from supernets.nats_skeleton import Convolution, Residual, Skeleton
from supernets.operations import Chained, Conv, Operation, identity, joined, zero
from supernets.sorting import Moved, sort_chain, sort_channels, trained_widths

Arch = Mapping[str, Setting]
KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
SIZED = (*KERNELS, "skip_connect")


Run = tuple[Chain, Tensor | None]
"""What runs, and the weight of what it gives; None where the weights are in its kernels already."""
Leaving = Mapping[str, Mapping[str, Run]]
"""What runs under mixtures that read one state: option -> edge -> ..; an entangled family stands under its largest option."""


class State:
    """One state of a cell and what its readers share: computed when first asked for, once."""

    def __init__(self, x: Tensor, pool: nn.Module | None = None, leaving: Leaving | None = None) -> None:
        self.x, self.pool, self.leaving = x, pool, leaving or {}
        self._mixed: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def active(self) -> Tensor:
        return F.relu(self.x)

    @cached_property
    def pooled(self) -> Tensor:
        assert self.pool is not None
        return self.pool(self.x)

    def mixed(self, option: str, edge: str) -> Tensor:
        """What an operation under a mixture gives, times its weight. Those of one option are one convolution."""
        if option not in self._mixed:
            group = self.leaving[option]
            chains, weights = zip(*group.values())
            self._mixed[option] = dict(zip(group, together(chains, self.active, weights)))
        return self._mixed[option][edge]


class Cell(nn.Module):
    """A NAS-Bench-201 search cell: nodes 0 to 3, each the sum of its edges from all nodes before it.

    Norms have no scale and shift (published). ``node2.from1.nor_conv_3x3`` is the path of a leaf: a choice, an option.
    ``entangled``: whether the convolutions of an edge share their weights.
    """

    def __init__(self, C: int, bias: bool, entangled: bool = False) -> None:
        super().__init__()
        self.entangled = entangled
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        for node in (1, 2, 3):
            self.add_module(f"node{node}", nn.ModuleDict({f"from{i}": _operations(C, bias, entangled) for i in range(node)}))

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, C, H, W) -> the same
        states = [State(x, self.pool, self._leaving(0, arch))]
        for node in (1, 2):
            states.append(State(self._node(node, states, arch), self.pool, self._leaving(node, arch)))
        return self._node(3, states, arch)

    def _node(self, node: int, states: Sequence[State], arch: Arch) -> Tensor:
        """The sum of the edges from ``states``. Edges that are mixtures are one mixture of all their candidates."""
        out: list[Tensor] = []
        mixtures: list[Mixture] = []
        mixed: list[Candidate | None] = []
        for source, state in enumerate(states):
            name = nats.edge(node, source)
            setting = arch[name]
            known = self._candidates(name, setting, state)
            options = setting.options if isinstance(setting, Mixture) else (setting,)
            for option in options:
                require(name, option, nats.OPS)
            found = [known[str(option)] for option in options]
            if isinstance(setting, Mixture):
                mixtures.append(setting)
                mixed += found
            elif found[0] is not None:
                out.append(found[0](state.x, None)[0])
        if mixtures:
            out.append(blend(mixed, states[0].x, joined(mixtures), zero))
        return reduce(operator.add, out) if out else zero(states[0].x)

    def _candidates(self, edge: str, setting: Setting, state: State) -> dict[str, Candidate | None]:
        """What each option of ``edge`` makes of ``state``. Of an entangled family under a mixture the largest active option
        stands for all, the others add nothing to it."""
        found: dict[str, Candidate | None] = {
            "none": None,
            "skip_connect": lambda _, w: identity(state.x, w),
            "avg_pool_3x3": lambda _, w: identity(state.pooled, w),
        }
        grouped = {option: partial(_in_group, state, option, edge) for option, group in state.leaving.items() if edge in group}
        if self.entangled and isinstance(setting, Mixture) and setting.idle != "gate":
            own = {} if grouped else self._runs(edge, setting)
            alone = {option: partial(_superposed, state, chain) for option, (chain, _) in own.items()}
            return found | dict.fromkeys(KERNELS) | grouped | alone
        return found | {option: partial(_alone, state, leaf) for option, leaf in self.operations(edge).items()} | grouped

    def _leaving(self, source: int, arch: Arch) -> Leaving:
        """What reads state ``source`` under a mixture. Without gradients nothing is grouped: recalibration listens at
        every leaf's own norm."""
        found: dict[str, dict[str, Run]] = {option: {} for option in KERNELS}
        for node in range(source + 1, 4) if self.training and torch.is_grad_enabled() else ():
            edge = nats.edge(node, source)
            setting = arch[edge]
            if isinstance(setting, Mixture) and setting.idle != "gate":
                for option, run in self._runs(edge, setting).items():
                    found[option][edge] = run
        return found

    def _runs(self, edge: str, mixture: Mixture) -> dict[str, Run]:
        """What the active operations of ``edge`` run under ``mixture``."""
        leaves, w = self.operations(edge), mixture.weights.unbind(0)
        here = {option: w[j] for j in active(mixture) if (option := str(mixture.options[j])) in KERNELS}
        if self.entangled and here:
            return {max(here, key=KERNELS.__getitem__): (superposed([leaves[op] for op in here], [*here.values()]), None)}
        return {option: (leaves[option].chain(), weight) for option, weight in here.items()}

    def operations(self, edge: str) -> dict[str, Chained]:
        """The leaves of ``edge`` ("node2.from1"), by option."""
        return {option: cast(Chained, leaf) for option, leaf in cast(nn.ModuleDict, self.get_submodule(edge)).items()}

    def layers(self, hw: tuple[int, int]) -> list[Layer]:
        return [
            record
            for edge in nats.NAMES
            for option, operation in self.operations(edge).items()
            for record in operation.layers(hw, When((edge,), lambda value, option=option: value == option))
        ]


def _alone(state: State, operation: Chained, _: Tensor, w: Tensor | None) -> Scaled:
    return operation.weighted(state.active, w)


def _in_group(state: State, option: str, edge: str, _: Tensor, w: Tensor | None) -> Scaled:
    """The weight is in the group's batch norm already."""
    return state.mixed(option, edge), None


def _superposed(state: State, chain: Chain, _: Tensor, w: Tensor | None) -> Scaled:
    """The weights are in the kernels already."""
    return chain.run(state.active), None


def _operations(C: int, bias: bool, share: bool) -> nn.ModuleDict:
    made = {option: Operation(C, C, [[Conv(kernel)]], affine=False, bias=bias) for option, kernel in KERNELS.items()}
    return nn.ModuleDict(entangle(made, tuple(KERNELS)) if share else made)


class Topology(Skeleton):
    """The supernet of a Topology space: every cell has weights of its own, all follow the same architecture.

    ``channels``: of the input image. ``classes``: outputs. ``bias``: whether the cells' convolutions have one, as
    published. The norms subtract it again, so that it never gets a gradient nor changes an output, and costs 5%.

    ``entangled``: nor_conv_1x1 and nor_conv_3x3 of an edge share one 3x3 kernel, of which the 1x1 is the centre, and one
    norm (TangleNAS, page 2.2). A value runs its slice. Under a mixture the edge is w_skip x + w_pool pool(x) + BN(W x), one
    convolution with W = w_3x3 K + w_1x1 centre(K), weighted in front of the norm as released. That norm has no scale, so
    it divides the size of both weights out again: they act by their ratio alone, the convolution of an edge counts 1 whatever
    they sum to, and where one of the two is active its weight gets (but for the norm's eps) no gradient.
    A gate (idle = "gate") never mixes: every option is its own slice.
    """

    def __init__(
        self, space: nats.Topology, channels: int = 3, classes: int = 10, bias: bool = False, entangled: bool = False
    ) -> None:
        c1, c2, c3 = (Segment(fixed(width), width) for width in (space.C, 2 * space.C, 4 * space.C))

        def cells(_: Segment, out: Segment) -> list[nn.Module]:
            return [Cell(out.full, bias, entangled) for _ in range(space.N)]

        super().__init__(space, channels, classes, (c1, c2, c2, c3, c3), cells, norm="shared", mixing="sum")
        self.entangled = entangled

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """The convolutions of an edge of all cells (``option``: of that operation alone, none where they are entangled)."""
        if choice not in nats.NAMES or (option is not None and self.entangled):
            return []
        return [
            p
            for s in range(3)
            for cell in self.cells(s)
            for name, operation in cell.operations(choice).items()
            if option is None or name == option
            for p in operation.parameters()
        ]

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: no width is a choice here."""
        return []


class Skip(Convolution):
    """skip_connect between widths that may differ: a 1x1 convolution and a batch norm, without ReLU; nothing where they agree.

    Under mixtures, u of the input's width and v of the output's, it is the mixture of both kinds over all pairs (a, c):
    the sum over c of v_c A_c ((sum over a != c of u_a) BN_c(W x) + u_c x[:c]), with A_c as in ``ElasticConv``.
    """

    def __init__(self, space: SearchSpace, into: Segment, out: Segment, **kind: Any) -> None:
        super().__init__(space, (into,), out, 1, **kind)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W) -> (B, widest active width, H, W)."""
        sizes, v, rest = self._candidates(arch)
        u = self._sources(arch)
        if v is None and u is None:
            return x if x.shape[1] == sizes[0] else super().forward(x, arch)
        one = x.new_ones(())
        u, v = {x.shape[1]: one} if u is None else u, [one] if v is None else v
        out = []
        if set(sizes) != u.keys() or len(u) > 1:
            others = [sum((w for a, w in u.items() if a != c), start=0.0) for c in sizes]
            out.append(self._projected(x, sizes, [v_c * other for v_c, other in zip(v, others)]))
        same = {c: v_c * u[c] for c, v_c in zip(sizes, v) if c in u}
        if same:
            out.append(self._kept(x, same, max(sizes)))
        return plus_idle(reduce(operator.add, out), rest)

    def _sources(self, arch: Arch) -> dict[int, Tensor] | None:
        """The active widths of the input and their weights; None for a hard setting."""
        (name,) = self.into[0].size.on
        setting = arch[name]
        if not isinstance(setting, Mixture):
            return None
        w = setting.weights.unbind(0)
        return {int(setting.options[j]): w[j] for j in active(setting)}

    def _projected(self, x: Tensor, sizes: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
        """The mixture of projections to ``sizes``, as ``ElasticConv`` folds it."""
        assert self.norm is not None
        z = F.conv2d(x, prefix(prefix(self.weight, 0, max(sizes)), 1, x.shape[1]))
        scales, shifts = zip(*(self._affine(c) for c in sizes))
        if len(sizes) == 1:
            w = weights[0].to(scales[0].dtype)
            return self.norm(z, w * scales[0], w * shifts[0])
        M, b = fold(sizes, weights, scales, shifts, self.mixing)
        return F.conv2d(self.norm(z), M[:, :, None, None], b)

    def _kept(self, x: Tensor, same: Mapping[int, Tensor], C: int) -> Tensor:
        """sum over c of same_c A_c x[:c]: (B, c, H, W) -> (B, C, H, W)."""
        if list(same) == [C]:
            return same[C].to(x.dtype) * prefix(x, 1, C)
        M = [F.pad(averaging(c, C, self.mixing).to(x) * w.to(x.dtype), (0, x.shape[1] - c)) for c, w in same.items()]
        return F.conv2d(x, reduce(operator.add, M)[:, :, None, None])

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        return Same() if c_in[0] == self.out[0].size.at(arch) else super().plain(arch, *c_in, inherit=inherit)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        sizes = (self.into[0].size, self.out[0].size)
        return [
            term(f"{self.name}.conv", "conv", sizes, when, lambda i, c: None if i == c else Shape(i, c, hw=hw)),
            term(f"{self.name}.norm", "norm", sizes, when, lambda i, c: None if i == c else Shape(c, c, hw=hw)),
        ]


class Same(nn.Module):
    """x; extraction inlines it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class SizedCell(nn.Module):
    """The fixed cell of a Sizes space. Edges that leave node 0 change the width from ``into`` to ``out``.

    ``node2.from1`` is the leaf of an edge; a skip between equal widths has none.
    """

    def __init__(self, space: nats.Sizes, into: Segment, out: Segment, **kind: Any) -> None:
        super().__init__()
        self.skips = [ends for ends in nats.EDGES if space.cell[nats.edge(*ends)] == "skip_connect"]
        for node in (1, 2, 3):
            leaves: dict[str, nn.Module] = {}
            for source in range(node):
                op, given = str(space.cell[nats.edge(node, source)]), out if source else into
                if op in KERNELS:
                    leaves[f"from{source}"] = Convolution(space, (given,), out, KERNELS[op], **kind)
                elif op != "skip_connect":
                    raise ValueError(f"{op} is not in the cell of the NATS size space. Allowed: {', '.join(SIZED)}.")
                elif given is not out:
                    leaves[f"from{source}"] = Skip(space, given, out, **kind)
            self.add_module(f"node{node}", nn.ModuleDict(leaves))

    def edge(self, node: int, source: int) -> Convolution | None:
        """The leaf of an edge, None where it has none."""
        leaves = cast(nn.ModuleDict, self.get_submodule(f"node{node}"))
        return cast(Convolution, leaves[f"from{source}"]) if f"from{source}" in leaves else None

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, c, H, W) -> (B, c', H, W)
        states = [State(x)]
        for node in (1, 2, 3):
            states.append(State(reduce(operator.add, [self._along(node, i, states[i], arch) for i in range(node)])))
        return states[3].x

    def _along(self, node: int, source: int, state: State, arch: Arch) -> Tensor:
        leaf = self.edge(node, source)
        if leaf is None:
            return state.x
        return leaf(state.x if (node, source) in self.skips else state.active, arch)

    def layers(self, hw: tuple[int, int]) -> list[Layer]:
        leaves = [self.edge(*ends) for ends in nats.EDGES]
        return [record for leaf in leaves if leaf is not None for record in leaf.layers(hw)]

    def sort_channels(self, trained: SearchSpace | None) -> Moved:
        """Sorts nodes 2 and 1 by what all their readers read, where no skip ties their channels to another node's."""
        moved: Moved = []
        for node in (2, 1):
            ends = [pair for pair in nats.EDGES if node in pair]
            if not set(ends) & set(self.skips):
                makers, readers = ([self._conv(*pair) for pair in ends if pair[axis] == node] for axis in (0, 1))
                moved += sort_channels(makers, readers, trained_widths(makers[0].out[0], trained))
        return moved

    def _conv(self, node: int, source: int) -> Convolution:
        leaf = self.edge(node, source)
        assert leaf is not None, "only skips have no leaf"
        return leaf


class Sizes(Skeleton):
    """The supernet of a Sizes space: five widths, each a prefix of the widest.

    ``channels``: of the input image. ``classes``: outputs. ``mixing``: how a mixture of widths blends ("interpolate" or
    "sum"). ``norm``: "separate" scales and shifts per candidate width, or "shared".
    """

    def __init__(
        self, space: nats.Sizes, channels: int = 3, classes: int = 10, mixing: str = "interpolate", norm: str = "separate",
    ) -> None:  # fmt: skip
        widths = [
            Segment(Size((choice.name,), int), max(int(option) for option in choice.options)) for choice in space.root.choices
        ]
        kind = {"norm": norm, "mixing": mixing}
        super().__init__(
            space, channels, classes, widths, lambda into, out: [SizedCell(space, into, out, **kind)], **kind
        )

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """Sorts what lies between the convolutions of a residual block, and nodes of cells that no skip touches
        (``nas.protocols.Supernet``). Sums tie the channels between cells and blocks together: they stay. Needs norm
        "shared"."""
        moved: Moved = []
        for s in range(3):
            if s:
                block = cast(Residual, self.reductions[s - 1])
                moved += sort_chain([block.conv0, block.conv1], trained)
            for cell in self.cells(s):
                moved += cell.sort_channels(trained)
        return moved


def build(space: nats.Topology | nats.Sizes, channels: int, classes: int) -> Topology | Sizes:
    """The supernet that serves an arch.json of this module's spaces."""
    if isinstance(space, nats.Sizes):
        return Sizes(space, channels, classes)
    return Topology(space, channels, classes)
