"""Candidate operations of cells as leaves of fixed width: convolutions, pools, halvings and zero.

Letters: ``B`` batch, ``C c`` channels, ``H W`` height and width, ``w`` () the weight of a candidate in a mixture.

Every operation is called as ``op(x, arch)``, or as ``op.scaled(x, w) -> (y, rest)`` by ``mixing.blend``: one that ends in
a batch norm takes w in as the norm's scale, which costs nothing. Operations that begin with a ReLU in their paper are
given ``relu(x)`` here: the cell computes it once for all that read one state.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture, Setting, Value
from supernets.chains import Chain, Conv, Unit, filled
from supernets.elastic import ElasticLinear, Leaf, Normalise, init_default
from supernets.layers import Layer, Shape, When, term
from supernets.mixing import Scaled, active
from supernets.norms import adopt_norm, plain_norm

Arch = Mapping[str, Setting]


class CandidateLeaf(Leaf):
    """A leaf that can be one candidate of a mixture."""

    def scaled(self, x: Tensor, w: Tensor | None) -> Scaled:
        """(y, rest) as ``mixing.blend`` wants them: w f(x) and None where the weight w () is in y, else f(x) and w."""
        raise TypeError(f"{type(self).__name__} must say how it takes a weight in")

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H', W')."""
        return self.scaled(x, None)[0]

    def weighted(self, x: Tensor, w: Tensor | None) -> Scaled:
        """``scaled``, but without a weight by a call of the module, which is what extraction traces."""
        return (self(x, {}), None) if w is None else self.scaled(x, w)


def plain_chain(own: Chain, inherit: bool) -> nn.Sequential:
    """The same convolutions and norms of ``torch.nn``: copies of the weights of ``own``, or fresh ones."""
    (units, weights, biases, norms), chain, k = own, nn.Sequential(), 0
    last = len(units) - 1
    for u, (unit, norm) in enumerate(zip(units, norms)):
        mark = str(u) if last else ""
        for i, conv in enumerate(unit):
            weight = weights[k]
            groups = weight.shape[0] if conv.depthwise else 1
            made = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], conv.kernel, conv.stride,
                             conv.padding(), conv.dilation, groups, bias=False).to(weight)  # fmt: skip
            if inherit:
                with torch.no_grad():
                    made.weight.copy_(weight)
            else:
                init_default(made.weight)
            chain.add_module(f"conv{mark}" if len(unit) == 1 else f"{'depthwise' if conv.depthwise else 'pointwise'}{mark}"
                             if len(unit) == 2 and unit[0].depthwise else f"conv{mark}_{i}", made)  # fmt: skip
            k += 1
        bias = biases[k - 1] if biases else None
        chain.add_module(f"norm{mark}", plain_norm(norm, weights[k - 1].shape[0], bias, inherit))
        if u < last:
            chain.add_module(f"relu{mark}", nn.ReLU())
    return chain


@torch.no_grad()
def adopt_chain(name: str, own: Chain, plain: Mapping[str, nn.Module]) -> None:
    """Puts the weights and norms of ``plain`` into those of ``own``, a chain of the leaf ``name``."""
    norms = [module for module in plain.values() if isinstance(module, nn.BatchNorm2d)]
    convs = [module for module in plain.values() if isinstance(module, nn.Conv2d)]
    for weight, conv in zip(own.weights, convs, strict=True):
        weight.copy_(conv.weight)
    for mine, theirs in zip(own.norms, norms, strict=True):
        adopt_norm(name, mine, theirs)


class Chained(CandidateLeaf):
    """A leaf that runs a chain: an ``Operation``, or a window of one (supernets.entangled)."""

    units: tuple[tuple[Conv, ...], ...]

    @property
    def whole(self) -> Chained:
        """The leaf that has the weights."""
        return self

    def chain(self) -> Chain:
        """What it runs: its parameters, or views of them."""
        raise TypeError(f"{type(self).__name__} must say what it runs")

    def norms(self) -> Sequence[Normalise]:
        return self.chain().norms

    def scaled(self, x: Tensor, w: Tensor | None) -> Scaled:
        return self.chain().run(x, w), None

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        return plain_chain(self.chain(), inherit)

    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """ValueError where the norms are affine-free: a plain network's scales and shifts would be lost."""
        adopt_chain(self.name, self.chain(), plain)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        records, weights, k = [], self.chain().weights, 0
        nothing, at = Size((), lambda: 0), [hw]  # output sizes, found from the last convolution's
        for conv in reversed([conv for unit in self.units for conv in unit][1:]):
            at.insert(0, (at[0][0] * conv.steps()[0], at[0][1] * conv.steps()[1]))
        for u, unit in enumerate(self.units):
            for i, conv in enumerate(unit):
                o, per_group, *_ = weights[k].shape
                groups = o if conv.depthwise else 1
                shape = Shape(per_group * groups, o, conv.sides(), max(conv.steps()), conv.dilation, groups, at[k])
                records.append(term(f"{self.name}.conv{u}_{i}", "conv", (nothing,), when, lambda _, s=shape: s))
                k += 1
            c = weights[k - 1].shape[0]
            records.append(term(f"{self.name}.norm{u}", "norm", (nothing,), when, lambda _, c=c: Shape(c, c, hw=hw)))
        return records


class Operation(Chained):
    """Units of convolutions and batch norms: conv-BN, sep_conv, dil_conv, preprocessing, stems.

    ``affine``: whether the norms of the search net have scale and shift (those of plain networks always have).
    ``bias``: whether its convolutions have one (the NAS-Bench-201 search net); a plain network's never have: with
    inherited weights it is folded into the running mean, which is exact.
    """

    def __init__(self, c_in: int, c_out: int, units: Sequence[Unit], affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.into = (Segment(fixed(c_in), c_in),)
        self.out = (Segment(fixed(c_out), c_out),)
        self.units = tuple(tuple(unit) for unit in units)
        self.weight, self.bias, self.norm = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        c, last = c_in, len(self.units) - 1
        for u, unit in enumerate(self.units):
            for i, conv in enumerate(unit):
                # sep_conv keeps c_in channels until its last unit
                o = c if conv.depthwise else c_out if u == last and i == len(unit) - 1 else c_in
                self.weight.append(nn.Parameter(torch.empty(o, 1 if conv.depthwise else c, *conv.sides())))
                if bias:
                    self.bias.append(nn.Parameter(torch.empty(o)))
                c = o
            self.norm.append(Normalise((c,), separate=False, affine=affine))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        for k, weight in enumerate(self.weight):
            init_default(weight, generator, self.bias[k] if len(self.bias) else None)
        for norm in self.norms():
            for gamma, beta in zip(norm.weight, norm.bias):
                nn.init.ones_(gamma)
                nn.init.zeros_(beta)

    def chain(self) -> Chain:
        return Chain(self.units, list(self.weight), list(self.bias), [cast(Normalise, norm) for norm in self.norm])


class Halve(CandidateLeaf):
    """FactorizedReduce: two 1x1 convolutions of stride 2, the second offset by one pixel, half of the channels each, side
    by side, then a batch norm (DARTS, page section 2). Its input is activated; H and W must be even."""

    def __init__(self, c_in: int, c_out: int, affine: bool = True) -> None:
        super().__init__()
        if c_out % 2:
            raise ValueError(f"a halving gives two equal halves of channels: {c_out} is odd. Choose an even C.")
        self.into, self.out = (Segment(fixed(c_in), c_in),), (Segment(fixed(c_out), c_out),)
        self.weight = nn.ParameterList([nn.Parameter(torch.empty(c_out // 2, c_in, 1, 1)) for _ in range(2)])
        self.norm = Normalise((c_out,), separate=False, affine=affine)
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        for weight in self.weight:
            init_default(weight, generator)
        for gamma, beta in zip(self.norm.weight, self.norm.bias):
            nn.init.ones_(gamma)
            nn.init.zeros_(beta)

    def scaled(self, x: Tensor, w: Tensor | None) -> Scaled:
        y = torch.cat([F.conv2d(x, self.weight[0], stride=2), F.conv2d(x[:, :, 1:, 1:], self.weight[1], stride=2)], dim=1)
        gamma, beta = self.norm.affine(y.shape[1]) if len(self.norm.weight) else (None, None)
        if w is not None:
            gamma = filled(w, self.norm) if gamma is None else w.to(gamma.dtype) * gamma
            beta = None if beta is None else w.to(beta.dtype) * beta
        return self.norm(y, gamma, beta), None

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        half, c = self.weight[0].shape[:2]
        own = PlainHalve(c, half, plain_norm(self.norm, 2 * half, None, inherit)).to(self.weight[0])
        for conv, weight in zip((own.even, own.odd), self.weight):
            if inherit:
                with torch.no_grad():
                    conv.weight.copy_(weight)
            else:
                init_default(conv.weight)
        return own

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """ValueError where the norm is affine-free."""
        for weight, name in zip(self.weight, ("even", "odd")):
            weight.copy_(cast(nn.Conv2d, plain[name]).weight)
        adopt_norm(self.name, self.norm, cast(nn.BatchNorm2d, plain["norm"]))

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        half, c = self.weight[0].shape[:2]
        nothing = Size((), lambda: 0)
        conv, norm = Shape(c, half, stride=2, hw=hw), Shape(2 * half, 2 * half, hw=hw)
        return [
            term(f"{self.name}.even", "conv", (nothing,), when, lambda _: conv),
            term(f"{self.name}.odd", "conv", (nothing,), when, lambda _: conv),
            term(f"{self.name}.norm", "norm", (nothing,), when, lambda _: norm),
        ]


class PlainHalve(nn.Module):
    """Two offset 1x1 convolutions of stride 2 and a batch norm; extraction inlines it."""

    def __init__(self, c_in: int, half: int, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.even = nn.Conv2d(c_in, half, 1, 2, bias=False)
        self.odd = nn.Conv2d(c_in, half, 1, 2, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


class Pool(CandidateLeaf):
    """3x3 average (padding not counted) or maximum pooling; ``norm``: an affine-free batch norm after it, as in the DARTS
    search net. A plain network has that norm only where it inherits weights."""

    def __init__(self, kind: str, channels: int, stride: int = 1, norm: bool = False) -> None:
        super().__init__()
        if kind not in ("avg", "max"):
            raise ValueError(f"kind = {kind!r} is not a pool. Allowed: avg, max.")
        self.kind, self.stride = kind, stride
        self.into = self.out = (Segment(fixed(channels), channels),)
        self.norm = Normalise((channels,), separate=False, affine=False) if norm else None

    def scaled(self, x: Tensor, w: Tensor | None) -> Scaled:
        if self.kind == "avg":
            y = F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
        else:
            y = F.max_pool2d(x, 3, self.stride, 1)
        if self.norm is None:
            return y, w
        return self.norm(y, None if w is None else filled(w, self.norm)), None

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        pool: nn.Module
        if self.kind == "avg":
            pool = nn.AvgPool2d(3, self.stride, 1, count_include_pad=False)
        else:
            pool = nn.MaxPool2d(3, self.stride, 1)
        if self.norm is None or not inherit:
            return pool
        chain = nn.Sequential()
        chain.add_module("pool", pool)
        chain.add_module("norm", plain_norm(self.norm, self.out[0].full, None, inherit, affine=False))
        return chain

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return []


def identity(x: Tensor, w: Tensor | None) -> Scaled:
    """skip_connect of stride 1, as a candidate."""
    return x, w


def zero(x: Tensor, stride: int = 1) -> Tensor:
    """none: zeros of the size that an operation of ``stride`` would give."""
    return (x if stride == 1 else x[:, :, ::stride, ::stride]) * 0.0


def joined(mixtures: Sequence[Mixture]) -> Mixture:
    """Several mixtures whose outputs are added, as one over all their candidates, in order: a sum of sums is one sum.

    ValueError where one has no active option or they differ in ``idle``.
    """
    if len(mixtures) == 1:
        return mixtures[0]
    idles = {mixture.idle for mixture in mixtures}
    if len(idles) > 1:
        raise ValueError(f"mixtures of one sum have idle = {', '.join(sorted(idles))}: give all of them one kind")
    options: list[Value] = []
    computed: list[int] = []
    for mixture in mixtures:
        if not active(mixture):
            raise ValueError(f"a mixture over {mixture.options} has no active option: activate at least one")
        computed += [len(options) + j for j in active(mixture)]
        options += mixture.options
    return Mixture(tuple(options), torch.cat([mixture.weights for mixture in mixtures]), tuple(computed), idles.pop())


class Classifier(ElasticLinear):
    """A classifier that starts as PyTorch's own, U(+-1 / sqrt(features)), bias included."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        init_default(self.weight, generator, self.bias)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        linear = cast(nn.Linear, super().plain(arch, *c_in, inherit=inherit))
        if not inherit:
            init_default(linear.weight, bias=linear.bias)
        return linear
