"""Superposition: a mixture of sizes as ONE layer whose weight is masked (TangleNAS, Sukthanker et al., arXiv 2312.10440).

Every candidate is a slice of the largest weight, and slices are nested: the weighted sum of the zero-padded slices is the
weight times a mask, whose entry is the sum of the weights of the candidates that hold it. ``reach``, ``mask`` and ``window``
are these masks, for outputs, for outputs and inputs together, and for kernels; the leaves multiply by them.

Letters: ``B`` batch, ``C c`` channels, ``H W`` height and width, ``K`` candidates, ``k`` kernel size.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Layout, Segment, Size, candidates, fixed, positions, width
from search_spaces.space import Mixture, SearchSpace, Value
from supernets.elastic import Arch, Leaf, Normalise, init_default, possible_sizes, prefix
from supernets.layers import Layer, Shape, When, inputs, term
from supernets.mixing import active, idle_ones, plus_idle
from supernets.norms import adopt_norm, plain_norm


def tail_sums(weights: Tensor, options: Sequence[Value] | None = None) -> Tensor:  # (K,) -> (C,)
    """s_c = the sum of the weights of the options >= c, for c = 1 .. C, the largest option (1 .. K by default).

    A product and a sum: a matrix product would be rounded under autocast, and torch.cumsum on CUDA varies from run to run.
    """
    widths = range(1, len(weights) + 1) if options is None else options
    return (_reaches(tuple(map(int, widths)), weights.dtype, weights.device) * weights).sum(1)


@lru_cache(maxsize=1024)
def _reaches(options: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, K): 1 where option k reaches channel c."""
    channel = torch.arange(1, max(options) + 1, device=device)
    return (torch.tensor(options, device=device) >= channel[:, None]).to(dtype)


@lru_cache(maxsize=1024)
def _windows(kernels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(k, k, K): 1 where the centred window of kernel K covers (y, x) of the largest."""
    side = (torch.arange(max(kernels)) - max(kernels) // 2).abs()
    ring = torch.maximum(side[:, None], side)[..., None]
    return (ring <= torch.tensor(kernels) // 2).to(dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def _overlaps(
    values: tuple[tuple[int, ...], ...], rows: tuple[int, ...], columns: tuple[int, ...], dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """(rows, columns, K): 1 where candidate K = (out, in) reaches this row and this column."""
    out, into = torch.tensor(values).T
    there = (torch.tensor(rows)[:, None, None] <= out) & (torch.tensor(columns)[:, None] <= into)
    return there.to(dtype=dtype, device=device)


def _joint(sizes: Sequence[Size], arch: Arch) -> tuple[list[tuple[int, ...]], Tensor] | None:
    """What ``sizes`` are together under every combination of active options, and its weights (K,); None without a mixture."""
    on = tuple(dict.fromkeys(name for size in sizes for name in size.on))
    axes: list[list[Value]] = []
    weights: Tensor | None = None
    for setting in (arch[name] for name in on):
        if not isinstance(setting, Mixture):
            axes.append([setting])
            continue
        axes.append([setting.options[j] for j in active(setting)])
        # One by one: an index that is a list would be copied to the device in every pass.
        own = setting.weights if setting.active is None else torch.stack([setting.weights[j] for j in setting.active])
        weights = own if weights is None else (weights[:, None] * own).flatten()
    if weights is None:
        return None
    at = [[on.index(name) for name in size.on] for size in sizes]
    return [tuple(size.of(*(picked[i] for i in own)) for size, own in zip(sizes, at)) for picked in product(*axes)], weights


def reach(size: Size, arch: Arch, like: Tensor) -> Tensor | None:
    """(n,): m[o] = the sum of the weights of the candidates of ``size`` that are > o; n is the widest active candidate.

    None where every choice of ``size`` is hard. dtype and device of ``like``.
    """
    found = _joint([size], arch)
    return None if found is None else tail_sums(found[1], [value for (value,) in found[0]]).to(like)


def mask(out: Size, into: Size, arch: Arch, like: Tensor) -> Tensor | None:
    """(n_out, n_in): m[o, q] = the sum of the joint weights of (out > o, into > q), n the widest active candidates.

    Without a common mixture this is the outer product of both ``reach``. With one (embed x embed, embed x ratio) it is not:
    a shared choice is drawn once. None where every choice is hard. May be an expanded view. dtype and device of ``like``.
    """
    shared = any(isinstance(arch[name], Mixture) for name in set(out.on) & set(into.on))
    if shared:
        return _joint_mask(out, into, arch).to(like)
    rows, columns = reach(out, arch, like), reach(into, arch, like)
    if rows is not None and columns is not None:
        return rows[:, None] * columns
    if rows is not None:
        return rows[:, None].expand(-1, _widest(into, arch))
    return None if columns is None else columns.expand(_widest(out, arch), -1)


def _joint_mask(out: Size, into: Size, arch: Arch) -> Tensor:
    """The sum over the combinations on the grid of distinct sizes, where it is small; then every entry fills its block.

    Blocks are copies side by side: the gradient of an index would be added up in an order that CUDA does not fix.
    """
    found = _joint([out, into], arch)
    assert found is not None
    values, weights = found
    rows, columns = (tuple(sorted({pair[axis] for pair in values})) for axis in (0, 1))
    small = (_overlaps(tuple(values), rows, columns, weights.dtype, weights.device) * weights).sum(2)
    wide = torch.cat([column[:, None].expand(-1, n) for column, n in zip(small.unbind(1), _steps(columns))], dim=1)
    return torch.cat([row.expand(n, -1) for row, n in zip(wide.unbind(0), _steps(rows))])


def _steps(sizes: Sequence[int]) -> list[int]:
    """What each of the ascending ``sizes`` adds to the one before."""
    return [after - before for before, after in pairwise((0, *sizes))]


def window(kernel: Size, arch: Arch, like: Tensor) -> Tensor | None:
    """(k, k) of the widest active kernel: the sum of the weights of the kernels whose centred window holds (y, x).

    None where every choice of ``kernel`` is hard. dtype and device of ``like``.
    """
    found = _joint([kernel], arch)
    if found is None:
        return None
    values, weights = found
    return (_windows(tuple(value for (value,) in values), weights.dtype, weights.device) * weights).sum(2).to(like)


def _widest(size: Size, arch: Arch) -> int:
    return max(value for value, _ in candidates(size, arch))


class Superposed(Leaf):
    """What the two leaves share: a weight (C, c_in, ...), a bias (C,), the masks of both sides, and the slices.

    ``both_sides``: a width scales what a layer gives and what the next one reads, so that the channels beyond the narrow
    candidates count with about w^2 (double weighting, page 7). False masks the outputs alone; inputs are only sliced.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, into: Layout, out: Segment, both_sides: bool) -> None:
        super().__init__()
        self.into, self.out, self.both_sides = into, (out,), both_sides

    def reset(self, generator: torch.Generator | None = None) -> None:
        init_default(self.weight, generator, self.bias)

    def _sizes(self) -> list[Size]:
        """Whose mixtures weigh this layer."""
        return [self.out[0].size, *(segment.size for segment in self.into if self.both_sides)]

    def _rest(self, arch: Arch) -> Tensor | float:
        """What idle options add; ValueError for "gate", which needs candidates that are apart."""
        names = dict.fromkeys(name for size in self._sizes() for name in size.on)
        rest: Tensor | float = 0.0
        for name, setting in ((name, arch[name]) for name in names):
            if not isinstance(setting, Mixture):
                continue
            if not active(setting):
                raise ValueError(f"{self.name}: {name} has no active option: activate at least one")
            if setting.idle == "gate":
                raise ValueError(f"{self.name}: idle='gate' needs separate candidates; superposed ones share one weight")
            rest = rest + idle_ones(setting)
        return rest

    def _width(self, arch: Arch) -> int:
        """The widest active candidate; ValueError where the weight does not have it."""
        n = _widest(self.out[0].size, arch)
        if not 1 <= n <= self.out[0].full:
            raise ValueError(f"{self.name}: width {n} is not in this supernet. Allowed: 1 to {self.out[0].full}.")
        return n

    def _grid(self, out: Size, arch: Arch, like: Tensor) -> Tensor | None:
        """The mask of ``out`` and all input segments side by side, (n_out, n_in); None where nothing is mixed."""
        if not self.both_sides:
            rows = reach(out, arch, like)
            return None if rows is None else rows[:, None]
        parts = [mask(out, segment.size, arch, like) for segment in self.into]
        if all(part is None for part in parts):
            return None
        wide = []
        for part, segment in zip(parts, self.into):
            if part is None:
                part = like.new_ones(_widest(out, arch), _widest(segment.size, arch))
            wide.append(part if segment.repeat == 1 else part[..., None].expand(-1, -1, segment.repeat).flatten(1))
        return wide[0] if len(wide) == 1 else torch.cat(wide, dim=1)

    def _read(self, weight: Tensor, arch: Arch, i: int) -> Tensor:
        """The columns of ``weight`` that ``i`` inputs meet; ValueError where the architecture says another number."""
        n = width(self.into, arch)
        if i != n:
            raise ValueError(f"{self.name}: an input of {i} channels, where this architecture has {n}. Check what feeds it.")
        return prefix(weight, 1, i) if len(self.into) == 1 else weight[:, positions(self.into, arch)]

    def _columns(self, arch: Arch, i: int) -> slice | list[int]:
        return slice(i) if len(self.into) == 1 else positions(self.into, arch)


class SuperposedConv(Superposed):
    """Convolution whose width and kernel are choices, and the batch norm behind it.

    A value runs the slice: first channels, the centre of the kernel, padding d (k - 1) / 2. A mixture runs once, at the
    widest active candidates, with W m and bias m. ``depthwise``: channels are those of ``into``, of one segment, which must
    be sized as ``out`` is. ``padding``: of the largest kernel, where it is not d (k - 1) / 2; smaller ones lose what their
    window does. ``norm``: "shared", one scale and shift for all candidates. Then the outputs are weighed behind the norm,
    which would divide the weight out again: m (gamma z + beta), the mixture of the candidates' zero-padded outputs.
    Expects the channels of the widest active candidate of ``into``. ValueError for even kernels and unknown words.
    """

    def __init__(
        self, space: SearchSpace, into: Layout, out: Segment, kernel: Size, stride: int = 1, dilation: int = 1,
        depthwise: bool = False, bias: bool = True, norm: str | None = None, both_sides: bool = True,
        padding: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(into, out, both_sides)
        if norm not in ("shared", None):
            raise ValueError(f"norm = {norm!r} is not known. Allowed: shared, None.")
        self.kernel, self.stride, self.dilation, self.depthwise = kernel, stride, dilation, depthwise
        sides = possible_sizes(kernel, space)
        for k in sides:
            odd(k)
        c_in = 1 if depthwise else sum(segment.full * segment.repeat for segment in into)
        self.weight = nn.Parameter(torch.empty(out.full, c_in, sides[-1], sides[-1]))
        self.bias = nn.Parameter(torch.empty(out.full)) if bias else None
        self.norm = Normalise((*possible_sizes(out.size, space), out.full), separate=False) if norm else None
        self.padding = dilation * (sides[-1] // 2) if padding is None else padding
        self._padding(sides[0])
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        if self.norm is not None:
            nn.init.ones_(self.norm.weight[0])
            nn.init.zeros_(self.norm.bias[0])

    def _sizes(self) -> list[Size]:
        return [self.out[0].size, self.kernel] if self.depthwise else [*super()._sizes(), self.kernel]

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c_in, H, W) -> (B, widest active width, H', W')."""
        rest, out = self._rest(arch), self.out[0].size
        n, k = self._width(arch), _widest(self.kernel, arch)
        weight = centre(prefix(self.weight, 0, n), k)
        weight = weight if self.depthwise else self._read(weight, arch, x.shape[1])
        bias = None if self.bias is None else prefix(self.bias, 0, n)
        rows = reach(out, arch, weight)
        weighed = out if self.norm is None else fixed(n)
        grid = reach(weighed, arch, weight) if self.depthwise else self._grid(weighed, arch, weight)
        if grid is not None:
            weight = weight * (grid[:, None, None, None] if self.depthwise else grid[:, :, None, None])
        taps = window(self.kernel, arch, weight)
        if taps is not None:
            weight = weight * taps
        if rows is not None and bias is not None and self.norm is None:
            bias = bias * rows
        groups = n if self.depthwise else 1
        z = F.conv2d(x, weight, bias, self.stride, self._padding(k), self.dilation, groups)
        if self.norm is not None:
            gamma, beta = prefix(self.norm.weight[0], 0, n), prefix(self.norm.bias[0], 0, n)
            z = self.norm(z, gamma, beta) if rows is None else self.norm(z, rows * gamma, rows * beta)
        return plus_idle(z, rest)

    def _padding(self, k: int) -> int:
        """Of the kernel ``k``; ValueError where there is no such kernel or it is too small for the given padding."""
        full = self.weight.shape[-1]
        if odd(k) > full:
            raise ValueError(f"{self.name}: kernel {k} is not in this supernet. Allowed: odd, 1 to {full}.")
        padding = self.padding - self.dilation * ((full - k) // 2)
        if padding < 0:
            raise ValueError(f"{self.name}: kernel {k} would have a padding of {padding}. Give a larger padding.")
        return padding

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        """The convolution, and behind it, where there is one, its batch norm."""
        (i,), c, k = c_in, self.out[0].size.at(arch), self.kernel.at(arch)
        groups = i if self.depthwise else 1
        conv = nn.Conv2d(i, c, k, self.stride, self._padding(k), self.dilation, groups, self.bias is not None).to(self.weight)
        if inherit:
            with torch.no_grad():
                conv.weight.copy_(centre(self.weight, k)[:c, slice(1) if self.depthwise else self._columns(arch, i)])
                if self.bias is not None and conv.bias is not None:
                    conv.bias.copy_(self.bias[:c])
        else:
            init_default(conv.weight, bias=conv.bias)
        if self.norm is None:
            return conv
        return nn.Sequential(OrderedDict(conv=conv, norm=plain_norm(self.norm, c, None, inherit)))

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        name, size, bias = self.name if self.norm is None else f"{self.name}.conv", self.out[0].size, self.bias is not None
        sources = [("conv", size)] if self.depthwise else inputs("conv", self.into, into)
        records = [
            term(
                name, op, (source, size, self.kernel), when,
                lambda i, c, k, op=op: Shape(i, c, (k, k), self.stride, self.dilation, i if self.depthwise else 1, hw,
                                             bias and op == "conv"),
            )
            for op, source in sources
        ]  # fmt: skip
        if self.norm is not None:
            records.append(term(f"{self.name}.norm", "norm", (size,), when, lambda c: Shape(c, c, hw=hw)))
        return records

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """The convolution into the centre of its first channels, its bias and batch norm into theirs."""
        conv = cast(nn.Conv2d, plain[""] if self.norm is None else plain["conv"])
        o, i, k, _ = conv.weight.shape
        centre(self.weight, k)[:o, :i].copy_(conv.weight)
        if self.bias is not None and conv.bias is not None:
            self.bias[:o].copy_(conv.bias)
        if self.norm is not None:
            adopt_norm(self.name, self.norm, cast(nn.BatchNorm2d, plain["norm"]))


class SuperposedLinear(Superposed):
    """Linear layer whose numbers of features are choices. A value runs the slice, a mixture W m and bias m, once."""

    def __init__(self, space: SearchSpace, into: Layout, out: Segment, bias: bool = True, both_sides: bool = True) -> None:
        super().__init__(into, out, both_sides)
        self.weight = nn.Parameter(torch.empty(out.full, sum(segment.full * segment.repeat for segment in into)))
        self.bias = nn.Parameter(torch.empty(out.full)) if bias else None
        self.reset()

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(..., c_in) -> (..., widest active width)."""
        rest, out = self._rest(arch), self.out[0].size
        n = self._width(arch)
        weight = self._read(prefix(self.weight, 0, n), arch, x.shape[-1])
        bias = None if self.bias is None else prefix(self.bias, 0, n)
        grid, rows = self._grid(out, arch, weight), reach(out, arch, weight)
        if grid is not None:
            weight = weight * grid
        if rows is not None and bias is not None:
            bias = bias * rows
        return plus_idle(F.linear(x, weight, bias), rest)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        (i,), c = c_in, self.out[0].size.at(arch)
        linear = nn.Linear(i, c, self.bias is not None).to(self.weight)
        if inherit:
            with torch.no_grad():
                linear.weight.copy_(self.weight[:c, self._columns(arch, i)])
                if self.bias is not None:
                    linear.bias.copy_(self.bias[:c])
        else:
            init_default(linear.weight, bias=linear.bias)
        return linear

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        size, bias = self.out[0].size, self.bias is not None
        return [
            term(self.name, op, (source, size), when, lambda i, c, op=op: Shape(i, c, hw=hw, bias=bias and op == "linear"))
            for op, source in inputs("linear", self.into, into)
        ]

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        linear = cast(nn.Linear, plain[""])
        self.weight[: linear.out_features, : linear.in_features].copy_(linear.weight)
        if self.bias is not None:
            self.bias[: linear.out_features].copy_(linear.bias)


def odd(k: int) -> int:
    """``k``; ValueError for an even kernel, which has no centre."""
    if k < 1 or k % 2 == 0:
        raise ValueError(f"kernel = {k} has no centre to share. Allowed: odd kernels.")
    return k


def centre(weight: Tensor, k: int) -> Tensor:
    """(.., K, K) -> (.., k, k), the centred window; the weight itself where k is K."""
    start = (weight.shape[-1] - k) // 2
    return weight if start == 0 else weight[..., start : start + k, start : start + k]
