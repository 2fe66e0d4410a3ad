"""Elastic leaves: layers that slice themselves for a value and blend themselves for a mixture.

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width, ``K`` candidates. A leaf takes ``(x, arch)``, knows the
names of its own choices, and depends on nothing else of the surrounding forward pass.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Layout, Segment, Size, candidates, positions
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.layers import Layer, Shape, When, inputs, term
from supernets.mixing import MIXINGS, averaging, fold, idle_ones, plus_idle
from supernets.norms import Normalise, plain_norm, prefix

Arch = Mapping[str, Setting]


def sliced(weight: Tensor, into: Layout, x: Tensor, arch: Arch) -> Tensor:
    """The columns (dimension 1) of ``weight`` that the channels of ``x`` meet."""
    return prefix(weight, 1, x.shape[1]) if len(into) == 1 else weight[:, positions(into, arch)]


def possible_sizes(size: Size, space: SearchSpace) -> tuple[int, ...]:
    """Every value that ``size`` takes over the root space's options, ascending."""
    options = [space.root[name].options for name in size.on]
    return tuple(sorted({int(size.of(*values)) for values in itertools.product(*options)}))


class Leaf(nn.Module):
    """What every elastic layer answers. ``name`` is its path in the supernet, for records and messages."""

    into: Layout
    out: Layout
    name: str = ""

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        """The same layer in ``torch.nn`` alone, for a hard ``arch`` and inputs of ``c_in`` channels: copies of its
        slices, or fresh weights of the same form (``inherit=False``)."""
        raise TypeError(f"{type(self).__name__} must say how it becomes a plain layer")

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        """Its additive cost terms for an OUTPUT of ``hw``; ``into`` where the input depends on more than its layout."""
        raise TypeError(f"{type(self).__name__} must list its layers")

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """Parameters that only this choice (option) uses."""
        return []

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights."""

    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """Takes over the weights of its plain modules ("" where it is one module itself): the inverse of ``plain``."""


def init_conv(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Kaiming normal, fan-out, ReLU gain, drawn on the CPU (the same numbers on every device)."""
    fan_out = weight.shape[0] * math.prod(weight.shape[2:])
    with torch.no_grad():
        weight.copy_(torch.empty(weight.shape).normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator))


def init_linear(layer: nn.Linear | ElasticLinear, generator: torch.Generator | None = None) -> None:
    """Weights N(0, 0.01), bias 0."""
    with torch.no_grad():
        layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0.0, 0.01, generator=generator))
        layer.bias.zero_()


def init_default(weight: Tensor, generator: torch.Generator | None = None, bias: Tensor | None = None) -> None:
    """PyTorch's own start of convolutions and linear layers, U(+-1 / sqrt(fan-in)), drawn on the CPU (the same numbers on
    every device); of the ``bias`` beside ``weight`` too, after it."""
    bound = 1.0 / math.sqrt(weight[0].numel())
    with torch.no_grad():
        for p in (weight,) if bias is None else (weight, bias):
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))


class ElasticConv(Leaf):
    """Convolution (no bias) and batch norm as one leaf that owns its width choice.

    A value runs the slice. A mixture of widths convolves once at the widest active candidate, normalises once, and
    folds affine, interpolation and mixing weights into one 1x1 convolution (``fold``), which equals the paper's form:
    each candidate keeps its first channels, has its own batch norm, is interpolated to the widest and weighted.

    ``norm``: "separate" (one scale and shift per candidate width, TAS), "shared", or None. ``derived_norm``: whether the
    derived network has a batch norm here (the TAS search net has one on every shortcut, the CIFAR net none).
    """

    def __init__(
        self,
        space: SearchSpace,
        into: Layout,
        out: Segment,
        kernel: int = 3,
        stride: int = 1,
        norm: str | None = "separate",
        derived_norm: bool | None = None,
        mixing: str = "interpolate",
    ) -> None:
        super().__init__()
        if mixing not in MIXINGS:
            raise ValueError(f"mixing = {mixing!r} is not known. Allowed: {', '.join(MIXINGS)}.")
        if norm not in ("separate", "shared", None):
            raise ValueError(f"norm = {norm!r} is not known. Allowed: separate, shared, None.")
        self.into, self.out, self.mixing = into, (out,), mixing
        self.stride, self.padding = stride, kernel // 2
        self.widths = possible_sizes(out.size, space)
        c_in = sum(segment.full * segment.repeat for segment in into)
        self.weight = nn.Parameter(torch.empty(out.full, c_in, kernel, kernel))
        self.norm = Normalise(self.widths, norm == "separate") if norm else None
        self.derived_norm = (norm is not None) if derived_norm is None else derived_norm
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        init_conv(self.weight, generator)
        if self.norm is not None:
            with torch.no_grad():
                for gamma, beta in zip(self.norm.weight, self.norm.bias):
                    gamma.fill_(1.0)
                    beta.zero_()

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c_in, H, W) -> (B, widest active width, H', W')."""
        sizes, weights, rest = self._candidates(arch)
        weight = sliced(prefix(self.weight, 0, max(sizes)), self.into, x, arch)
        if self.norm is None:
            if weights is not None:
                weight = self._fold_into(weight, sizes, weights)
            return plus_idle(F.conv2d(x, weight, stride=self.stride, padding=self.padding), rest)
        z = F.conv2d(x, weight, stride=self.stride, padding=self.padding)
        if weights is None:
            return self.norm(z, *self._affine(sizes[0]))
        scales, shifts = zip(*(self._affine(c) for c in sizes))
        if len(sizes) == 1:  # one candidate: no interpolation, so its weight scales the affine
            v = weights[0].to(scales[0].dtype)
            return plus_idle(self.norm(z, v * scales[0], v * shifts[0]), rest)
        M, b = fold(sizes, weights, scales, shifts, self.mixing)
        return plus_idle(F.conv2d(self.norm(z), M[:, :, None, None], b), rest)

    def _candidates(self, arch: Arch) -> tuple[list[int], list[Tensor] | None, Tensor | float]:
        """Widths, their weights (None for a hard setting), and what idle candidates add."""
        size = self.out[0].size
        mixtures = [setting for setting in (arch[name] for name in size.on) if isinstance(setting, Mixture)]
        if not mixtures:
            return [size.at(arch)], None, 0.0
        if any(mixture.idle == "gate" for mixture in mixtures):
            raise ValueError(f"{self.name}: idle='gate' needs separate candidates; widths share one convolution")
        rows = [mixture.weights.unbind(0) for mixture in mixtures]
        sizes, weights = [], []
        for c, at in candidates(size, arch):
            sizes.append(c)
            weights.append(math.prod((row[j] for row, j in zip(rows[1:], at[1:])), start=rows[0][at[0]]))
        return sizes, weights, sum((idle_ones(mixture) for mixture in mixtures), start=0.0)

    def _affine(self, c: int) -> tuple[Tensor, Tensor]:
        assert self.norm is not None
        try:
            return self.norm.affine(c)
        except KeyError:
            allowed = ", ".join(map(str, self.widths))
            raise ValueError(f"{self.name}: width {c} has no batch norm in this supernet. Allowed: {allowed}.") from None

    def _fold_into(self, weight: Tensor, sizes: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
        """Without a norm the whole mixture is linear in the filters: M W."""
        C = max(sizes)
        if len(sizes) == 1:
            return weights[0].to(weight.dtype) * weight
        M = sum(
            F.pad(averaging(c, C, self.mixing).to(weight) * v.to(weight.dtype), (0, C - c)) for c, v in zip(sizes, weights)
        )
        return torch.einsum("oc,cikl->oikl", M, weight)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        (i,), c = c_in, self.out[0].size.at(arch)
        conv = nn.Conv2d(i, c, self.weight.shape[2], self.stride, self.padding, bias=False)
        conv.to(self.weight)
        norm = None
        if self.derived_norm:
            norm = nn.BatchNorm2d(c).to(self.weight) if self.norm is None else plain_norm(self.norm, c, None, inherit)
        if inherit:
            if (self.norm is None) != (norm is None):
                raise ValueError(
                    f"{self.name}: the derived network has no batch norm here but the supernet has one, so weights cannot "
                    "be inherited from this kind of supernet. Extract fresh weights (--from scratch) and retrain."
                )
            kept = slice(i) if len(self.into) == 1 else positions(self.into, arch)
            with torch.no_grad():
                conv.weight.copy_(self.weight[:c, kept])
        else:
            init_conv(conv.weight)
        return _named(conv=conv, norm=norm)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        size, kernel = self.out[0].size, (self.weight.shape[2], self.weight.shape[3])
        records = [
            term(
                f"{self.name}.conv", op, (source, size), when,
                lambda i, c: Shape(i, c, kernel, self.stride, hw=hw),
            )
            for op, source in inputs("conv", self.into, into)
        ]
        if self.derived_norm:
            records.append(term(f"{self.name}.norm", "norm", (size,), when, lambda c: Shape(c, c, hw=hw)))
        return records

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """The convolution into its slice; the batch norm into its width's and, cut short, into narrower widths' sets."""
        conv, norm = plain["conv"], plain.get("norm")
        assert isinstance(conv, nn.Conv2d)
        self.weight[: conv.out_channels, : conv.in_channels].copy_(conv.weight)
        if isinstance(norm, nn.BatchNorm2d) and self.norm is not None:
            c = norm.num_features
            for gamma, beta in zip(self.norm.weight, self.norm.bias):
                if len(gamma) <= c or len(self.norm.weight) == 1:
                    gamma[:c].copy_(norm.weight[: len(gamma)])
                    beta[:c].copy_(norm.bias[: len(beta)])
            self.norm.running_mean[:c].copy_(norm.running_mean)  # type: ignore[arg-type]
            self.norm.running_var[:c].copy_(norm.running_var)  # type: ignore[arg-type]

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        size = self.out[0].size
        if self.norm is None or size.on != (choice,) or len(self.norm.weight) == 1:
            return []
        ks = range(len(self.widths)) if option is None else [self.norm.index[size.of(option)]]
        return [parameters[k] for k in ks for parameters in (self.norm.weight, self.norm.bias)]


def _named(**modules: nn.Module | None) -> nn.Sequential:
    """A Sequential whose children carry names; absent ones are left out."""
    chain = nn.Sequential()
    for name, module in modules.items():
        if module is not None:
            chain.add_module(name, module)
    return chain


class ElasticLinear(Leaf):
    """Classifier with bias: fewer features use the first columns of its weight."""

    def __init__(self, into: Layout, classes: int) -> None:
        super().__init__()
        self.into, self.out = into, (Segment(Size((), lambda: classes), classes),)
        self.weight = nn.Parameter(torch.empty(classes, sum(s.full * s.repeat for s in into)))
        self.bias = nn.Parameter(torch.empty(classes))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        init_linear(self, generator)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, c) -> (B, classes)
        return F.linear(x, sliced(self.weight, self.into, x, arch), self.bias)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        (i,) = c_in
        linear = nn.Linear(i, self.weight.shape[0]).to(self.weight)
        if inherit:
            kept = slice(i) if len(self.into) == 1 else positions(self.into, arch)
            with torch.no_grad():
                linear.weight.copy_(self.weight[:, kept])
                linear.bias.copy_(self.bias)
        else:
            init_linear(linear)
        return linear

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        linear = plain[""]
        assert isinstance(linear, nn.Linear)
        self.weight[:, : linear.in_features].copy_(linear.weight)
        self.bias.copy_(linear.bias)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        classes = self.weight.shape[0]
        return [
            term(self.name, op, (source,), when, lambda i, op=op: Shape(i, classes, hw=hw, bias=op == "linear"))
            for op, source in inputs("linear", self.into, into)
        ]


class ResidualSum(Leaf):
    """shortcut + features, of widths that may differ.

    In the search net the first min(C) channels are added and the rest of the wider tensor is kept (TAS, section 3). The
    derived network projects the shortcut with a 1x1 convolution (and a batch norm, ``derived_norm``) where the widths
    differ, so those weights are always fresh.
    """

    def __init__(self, shortcut: Size, features: Segment, derived_norm: bool = True) -> None:
        super().__init__()
        self.into, self.out, self.derived_norm = (Segment(shortcut, features.full), features), (features,), derived_norm

    def forward(self, shortcut: Tensor, features: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W), (B, C, H, W) -> (B, max(c, C), H, W)."""
        c, C = shortcut.shape[1], features.shape[1]
        if c == C:
            return shortcut + features
        wide, narrow = (shortcut, features) if c > C else (features, shortcut)
        # Padding, not slices of the wide one and a concatenation: its gradient then passes through without a copy.
        return wide + F.pad(narrow, (0, 0, 0, 0, 0, abs(c - C)))

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        c, C = c_in
        if c == C:
            return PlainSum()
        if inherit:
            raise ValueError(
                f"{self.name}: the derived network needs a projection {c} -> {C} that the supernet does not have, so weights "
                "cannot be inherited. Extract fresh weights (--from scratch) and retrain, or search a space of kind 'tied'."
            )
        conv = nn.Conv2d(c, C, 1, bias=False)
        init_conv(conv.weight)
        return ProjectedSum(_named(conv=conv, norm=nn.BatchNorm2d(C) if self.derived_norm else None))

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        source, size = self.into[0].size if into is None else into, self.out[0].size
        if source.on and source.on == size.on:
            return []
        records = [
            term(f"{self.name}.projection.conv", "conv", (source, size), when,
                 lambda i, c: None if i == c else Shape(i, c, (1, 1), hw=hw))
        ]
        if self.derived_norm:
            records.append(
                term(f"{self.name}.projection.norm", "norm", (source, size), when,
                     lambda i, c: None if i == c else Shape(c, c, hw=hw))
            )
        return records


class PlainSum(nn.Module):
    """shortcut + features; extraction inlines it."""

    def forward(self, shortcut: Tensor, features: Tensor) -> Tensor:
        return shortcut + features


class ProjectedSum(nn.Module):
    """projection(shortcut) + features; extraction inlines it."""

    def __init__(self, projection: nn.Sequential) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, shortcut: Tensor, features: Tensor) -> Tensor:
        return self.projection(shortcut) + features
