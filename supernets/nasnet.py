"""The supernet of search_spaces.nasnet: NASNet cells for sampling search, and NASNet-A as published.

Letters: ``B`` batch, ``F`` filters of a cell, ``C`` channels, ``H W`` height and width, ``N`` classes. Cells and skeleton
follow the released code (page nasnet, 2.2 and 2.3). An operation has weights of its own in every cell, block and side, shared
by the states that it may read; where those differ in width, it runs its first channels.

A result that is concatenated has 2 F channels; whoever reads it brings it back to F. A setting of an operation may be a
mixture; inputs, combinations and outputs are hard.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import nasnet
from search_spaces.nasnet import KINDS, OPS, SIDES, choice, concat
from search_spaces.sizes import Size, fixed
from search_spaces.space import Mixture, SearchSpace, Setting, require
from supernets.chains import Conv
from supernets.elastic import Leaf, Normalise
from supernets.extract import DropPath
from supernets.layers import Layer, When, known_view
from supernets.mixing import Scaled, blend
from supernets.nasnet_costs import branch_layers, factorised_layers
from supernets.nasnet_operations import HW, Branch, Factorised, Source, convolves, form, halved
from supernets.operations import Classifier, Operation
from supernets.sorting import Moved

Arch = Mapping[str, Setting]
NORMS = {"cifar": (1e-5, 0.1), "imagenet": (1e-3, 1 - 0.9997)}
"""eps and momentum of the batch norms of plain networks, as published (TensorFlow's decay d is a momentum of 1 - d)."""


class State:
    """A tensor, and what a ReLU makes of it: computed when first asked for, once."""

    def __init__(self, x: Tensor, active: Tensor | None = None) -> None:
        self.x, self._active = x, active

    @cached_property
    def active(self) -> Tensor:
        return F.relu(self.x) if self._active is None else self._active


class Plan(NamedTuple):
    """One cell of a network: its kind and filters, and which of the streams (0: the stem, k + 1: cell k) it reads as h_{i-1}
    (None: there is none) and h_i."""

    kind: str
    F: int
    before: int | None
    this: int


def planned(space: nasnet.NASNet) -> list[Plan]:
    """The cells, in order (page nasnet, 2.3)."""
    filters = space.F
    cells = [Plan("reduce", filters // 4, None, 0), Plan("reduce", filters // 2, 0, 1)] if space.skeleton == "imagenet" else []
    for n in range(3 * space.N):
        this = len(cells)
        before = this - 1 if this else None
        if n in (space.N, 2 * space.N):
            filters *= 2
            cells.append(Plan("reduce", filters, before, this))
            before, this = before if space.skip_reduction_layer_input else this, this + 1
        cells.append(Plan("normal", filters, before, this))
    return cells


class Cell(nn.Module):
    """One cell. ``before``, ``this``: h_{i-1} (None: there is none) and h_i. ``share``: of the strength of drop path.

    ``block3.left.sep_conv_5x5`` is the path of a leaf: a block, a side and an operation. There are leaves for what ``space``,
    restricted or not, allows.
    """

    def __init__(self, space: nasnet.NASNet, plan: Plan, before: Source | None, this: Source, share: float) -> None:
        super().__init__()
        self.kind, self.F, self.before, self.this, self.last = plan.kind, plan.F, before, this, space.blocks + 1
        self.blocks, self.free = space.numbers(), {c.name: c.options for c in space.choices}
        halves = self.kind == "reduce"
        own = Source(fixed(self.F), self.F, this.level)
        self.squeeze, self.states = Branch("conv_1x1", this, own), [own, this if before is None else own]
        for b in self.blocks:
            made, wide = choice(self.kind, b, "combine"), "concat" in self.free[choice(self.kind, b, "combine")]
            size = Size((made,), lambda combine, F=self.F: 2 * F if combine == "concat" else F)
            self.states.append(Source(size, 2 * self.F if wide else self.F, this.level + halves))
        self.adjust = None if before is None else self._fit(before, own)
        for b in self.blocks:
            self.add_module(f"block{b}", nn.ModuleDict({side: self._operations(b, side) for side in SIDES}))
        for s in range(self.last):
            if any(str(s) in str(states) for states in self.free[concat(self.kind)]):
                self.add_module(f"fit{s}", self._fit(self.states[s], self.states[-1]))
        self.drop_path = DropPath(share)
        lists, top = self.free[concat(self.kind)], self.states[-1]
        size = Size((concat(self.kind), *top.size.on), lambda states, *combine: len(str(states)) * top.size.of(*combine))
        self.out = Source(size, max(len(str(states)) for states in lists) * top.full, top.level)

    def _operations(self, b: int, side: str) -> nn.ModuleDict:
        reads = choice(self.kind, b, f"{side}.input")
        into = max((self.states[int(s)] for s in self.free[reads]), key=lambda source: source.full)
        out, strided = Source(fixed(self.F), self.F), (0, 1) if self.kind == "reduce" else ()
        found = nn.ModuleDict()
        for op in map(str, self.free[choice(self.kind, b, f"{side}.op")]):
            projects = any(self._convolves(op, int(s), self.states[int(s)].full) for s in self.free[reads])
            if projects or form(op, 1).pool:
                found[op] = Branch(op, into, out, reads, strided, projects)
        return found

    def _convolves(self, op: str, state: int, c: int) -> bool:
        return convolves(op, c, self.F, self.stride(state))

    def _fit(self, source: Source, to: Source) -> Leaf | None:
        """What brings ``source`` to the size and width of ``to``; None where both are always the same."""
        widths = tuple(sorted(self._widths(to)))
        if source.level != to.level:
            return Factorised(source, to, widths)
        return Branch("identity", source, to, widths=widths) if len({*widths, *self._widths(source)}) > 1 else None

    def _widths(self, source: Source) -> set[int]:
        """All that a source may have of channels."""
        return {int(source.size.of(*values)) for values in itertools.product(*(self.free[name] for name in source.size.on))}

    def stride(self, state: int) -> int:
        """Of the operations that read a state."""
        return 2 if self.kind == "reduce" and state < 2 else 1

    def leaves(self, b: int, side: str) -> Mapping[str, Branch]:
        """The leaves of one side of a block, by operation."""
        modules = cast(nn.ModuleDict, self.get_submodule(f"block{b}.{side}"))
        return cast(Mapping[str, Branch], modules._modules)

    def forward(self, before: State | None, this: State, arch: Arch, drop: Any = None) -> Tensor:
        """h_{i-1} and h_i -> (B, states of the output * width of the last, H', W').

        ``drop``: strength of drop path; None where it does not exist, also in a trace.
        """
        states = [State(self.squeeze(this.active, arch)), self._adjusted(before, this, arch)]
        for b in self.blocks:
            found = [self._side(b, side, states, arch, drop) for side in SIDES]
            joins = arch[choice(self.kind, b, "combine")] == "concat"
            states.append(State(torch.cat(found, dim=1) if joins else found[0] + found[1]))
        last, out = self.states[-1], []
        for s in map(int, str(arch[concat(self.kind)])):
            source = self.states[s]
            same = source.level == last.level and source.size.at(arch) == last.size.at(arch)
            out.append(states[s].x if same else self.get_submodule(f"fit{s}")(states[s].x, arch))
        return torch.cat(out, dim=1) if len(out) > 1 else out[0]

    def _adjusted(self, before: State | None, this: State, arch: Arch) -> State:
        """State 1. In the first cell it is h_i, as it is."""
        if before is None or self.before is None:
            return this
        same = self.before.level == self.this.level and self.before.size.at(arch) == self.F
        return before if same or self.adjust is None else State(self.adjust(before.active, arch))

    def _side(self, b: int, side: str, states: Sequence[State], arch: Arch, drop: Any) -> Tensor:
        s, name = int(cast(int, arch[choice(self.kind, b, f"{side}.input")])), choice(self.kind, b, f"{side}.op")
        setting = arch[name]
        hard = not isinstance(setting, Mixture)
        for op in (setting,) if hard else cast(Mixture, setting).options:
            require(name, op, self.free[name])
        c = self.states[s].size.at(arch)
        run = [partial(self._operate, b, side, op, s, c, states[s], arch, drop) for op in
               ((str(setting),) if hard else map(str, cast(Mixture, setting).options))]  # fmt: skip
        return run[0](states[s].x, None)[0] if hard else blend(run, states[s].x, cast(Mixture, setting))

    def _operate(
        self, b: int, side: str, op: str, s: int, c: int, state: State, arch: Arch, drop: Any, _: Tensor, w: Tensor | None
    ) -> Scaled:
        """One operation on state ``s`` of ``c`` channels, as ``mixing.blend`` calls it."""
        found = form(op, 1)
        if not found.pool and not self._convolves(op, s, c):
            return state.x, w
        leaf, x = self.leaves(b, side)[op], state.x if found.pool else state.active
        y, rest = (leaf(x, arch), None) if w is None else leaf.scaled(x, arch, w)
        # An identity is never dropped, not even where it is a convolution.
        return (y if drop is None or op == "identity" else self.drop_path(y, drop)), rest

    def layers(self, path: str, hw: HW) -> Iterator[Layer]:
        """Its cost terms, for h_i of ``hw``."""
        own, last, there = fixed(self.F), self.states[-1], halved(hw) if self.kind == "reduce" else hw
        yield from branch_layers(f"{path}.squeeze", "conv_1x1", self.this.size, own, hw)
        if self.before is not None and self.before.level != self.this.level:
            yield from factorised_layers(f"{path}.adjust", self.before.size, own, hw)
        elif self.before is not None:
            yield from branch_layers(f"{path}.adjust", "identity", self.before.size, own, hw)
        for b in self.blocks:
            for side in SIDES:
                op = Size((choice(self.kind, b, f"{side}.op"),), OPS.index)  # type: ignore[arg-type]
                for s in range(b + 1):
                    when = When((choice(self.kind, b, f"{side}.input"),), lambda state, s=s: state == s)
                    stride, source = self.stride(s), self.states[s]
                    read = hw if s < 2 else there
                    yield from branch_layers(f"{path}.block{b}.{side}.from{s}", op, source.size, own, read, stride, when)
        for s in range(self.last):
            when = When((concat(self.kind),), lambda states, s=s: str(s) in str(states))
            if self.states[s].level != last.level:
                yield from factorised_layers(f"{path}.fit{s}", self.states[s].size, last.size, there, when)
            else:
                yield from branch_layers(f"{path}.fit{s}", "identity", self.states[s].size, last.size, there, when=when)


class NASNet(nn.Module):
    """The supernet of a NASNet space, or of a restriction of it: that holds weights for what is left alone, while ``layers``
    lists every option.

    ``channels``: of the input image. ``classes``: outputs. ``forward(x, arch, drop)``: ``drop`` is the strength of drop path
    behind the last cell, on the output of every operation but the identity; a cell l of L has (l + 1) / L of it.
    """

    def __init__(self, space: nasnet.NASNet, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.space, self.plan = space, planned(space)
        self.imagenet = space.skeleton == "imagenet"
        C = space.stem_filters if self.imagenet else 3 * space.F
        self.stem = Operation(channels, C, [[Conv(3, 2, valid=True) if self.imagenet else Conv(3)]])
        streams, self.cells = [Source(fixed(C), C)], nn.ModuleList()
        for k, plan in enumerate(self.plan):
            before = None if plan.before is None else streams[plan.before]
            cell = Cell(space, plan, before, streams[plan.this], (k + 1) / len(self.plan))
            self.cells.append(cell)
            streams.append(cell.out)
        self.classifier = Classifier((streams[-1].segment(),), classes)
        self.eps, self.momentum = NORMS[space.skeleton]
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name
            if isinstance(module, Normalise):
                module.eps, module.momentum = self.eps, self.momentum

    def every_cell(self) -> list[Cell]:
        return list(cast(Iterable[Cell], self.cells))

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, N). ValueError for a mixture of anything but operations."""
        return self._run(x, arch, drop if drop and self.training else None)[0]

    def tapped(self, x: Tensor, arch: Arch, drop: float) -> tuple[Tensor, Tensor]:
        """Logits, and the features that an auxiliary head reads: of the last normal cell before the second reduction."""
        return self._run(x, arch, drop)

    def _run(self, x: Tensor, arch: Arch, drop: Any) -> tuple[Tensor, Tensor]:
        self._check(arch)
        x = self.stem(x, arch)
        streams = [State(x, F.relu(x))]
        for plan, cell in zip(self.plan, self.every_cell()):
            x = cell(None if plan.before is None else streams[plan.before], streams[plan.this], arch, drop)
            streams.append(State(x, F.relu(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(streams[-1].active, 1), 1)
        return self.classifier(x, arch), streams[self._tap()].x

    def _tap(self) -> int:
        """The stream that the second reduction of the stages reads."""
        return [plan.this for plan in self.plan if plan.kind == "reduce"][-1]

    def _check(self, arch: Arch) -> None:
        for root in self.space.root.choices:
            if root.name.endswith(".op"):
                continue
            if isinstance(arch[root.name], Mixture):
                raise ValueError(f"{root.name} is a mixture; NASNet cells mix operations alone (.op). Give one of its options, "
                                 "or search by sampling (RSPS, Random).")  # fmt: skip
            require(root.name, arch[root.name], self.space[root.name].options)

    def head(self, features: tuple[int, int, int]) -> nn.Module:
        """The published auxiliary head; maps of less than five pixels, for which it was not made, are averaged to one."""
        C, H, W = features
        pooled = ((H - 5) // 3 + 1, (W - 5) // 3 + 1) if min(H, W) >= 5 else (1, 1)
        pool = nn.AvgPool2d(5, 3) if min(H, W) >= 5 else nn.AdaptiveAvgPool2d(1)
        norms = [nn.BatchNorm2d(c, self.eps, self.momentum) for c in (128, 768)]
        return nn.Sequential(
            nn.ReLU(), pool, nn.Conv2d(C, 128, 1, bias=False), norms[0], nn.ReLU(),
            nn.Conv2d(128, 768, pooled, bias=False), norms[1], nn.ReLU(), nn.Flatten(),
            nn.Linear(768, len(self.classifier.bias)),
        )  # fmt: skip

    # -- readings ---------------------------------------------------------------------------------------------------

    def layers(self, input_size: HW, view: str = "derived") -> list[Layer]:
        """Every additive cost term of the network that is trained alone, for images of ``input_size`` (H, W): the same in
        all views. ValueError where the first convolution of ImageNet has nothing to read."""
        known_view(view)
        if self.imagenet and min(input_size) < 3:
            raise ValueError(f"images of {input_size[0]}x{input_size[1]} are smaller than the first kernel, 3x3.")
        hw = ((input_size[0] - 3) // 2 + 1, (input_size[1] - 3) // 2 + 1) if self.imagenet else input_size
        records, sizes = self.stem.layers(hw), [hw]
        for k, (plan, cell) in enumerate(zip(self.plan, self.every_cell())):
            records += cell.layers(f"cells.{k}", sizes[plan.this])
            sizes.append(halved(sizes[plan.this]) if plan.kind == "reduce" else sizes[plan.this])
        return records + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Of an operation in all its cells: the weights that it always runs. Those that bring an identity or a pool to another
        width or size are not among them; inputs, combinations and outputs own none."""
        kind, _, rest = choice.partition(".")
        name, side, what = [*rest.split("."), "", ""][:3]
        if kind not in KINDS or what != "op":
            return []
        return [
            p
            for cell in self.every_cell() if cell.kind == kind
            for op, leaf in cell.leaves(int(name.removeprefix("block")), side).items()
            if form(op, 1).always and option in (None, op)
            for p in leaf.parameters()
        ]  # fmt: skip

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: no width is a choice here."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def build(space: nasnet.NASNet, channels: int, classes: int) -> NASNet:
    """The supernet that serves an arch.json of this module's space."""
    return NASNet(space, channels, classes)
