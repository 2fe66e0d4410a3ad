"""Elastic leaves on tokens: patch embedding, linear layer, layer norm.

Letters: ``B`` batch, ``N`` tokens (the class token first), ``e`` embed, ``i o`` input and output channels, ``K`` candidates.
A value runs the slice, first channels each. A mixture runs once at the widest active candidate, on weights under the masks of
``superpose`` (TangleNAS, page section 2.3).
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Mixture
from supernets.elastic import Arch, Leaf, prefix
from supernets.layers import Layer, Shape, When, term
from supernets.mixing import active, plus_idle
from supernets.superpose import Superposed, reach, tail_sums

NORMS = ("masked", "full")


def draw(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Truncated normal of deviation 0.02, drawn on the CPU (the same numbers on every device)."""
    with torch.no_grad():
        weight.copy_(nn.init.trunc_normal_(torch.empty(weight.shape), std=0.02, generator=generator))


class Patches(Superposed):
    """Image -> tokens: a convolution of the patches, the class token before them, and the absolute positions of all.

    ``image``, ``patch``: pixels of a side. ValueError for images of another size: every position has its own weights.
    """

    bias: nn.Parameter

    def __init__(self, channels: int, out: Segment, image: int, patch: int) -> None:
        super().__init__((Segment(fixed(channels), channels),), out, both_sides=True)
        self.image, self.tokens = image, (image // patch) ** 2 + 1
        self.weight = nn.Parameter(torch.empty(out.full, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(out.full))
        self.token = nn.Parameter(torch.empty(out.full))
        self.position = nn.Parameter(torch.empty(self.tokens, out.full))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """As released: the convolution as torch's own, uniform within 1 / sqrt(inputs); the rest truncated normal."""
        bound = 1.0 / math.sqrt(math.prod(self.weight.shape[1:]))
        with torch.no_grad():
            for p in (self.weight, self.bias):
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        draw(self.token, generator)
        draw(self.position, generator)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, channels, image, image) -> (B, N, e)
        if x.shape[2:] != (self.image, self.image):
            h, w = x.shape[2:]
            raise ValueError(f"{self.name}: an image of {h} x {w} pixels, but positions for {self.image} x {self.image}.")
        rest, e, m = self._rest(arch), self._width(arch), reach(self.out[0].size, arch, self.weight)
        weight, bias, token = (prefix(p, 0, e) for p in (self.weight, self.bias, self.token))
        position = prefix(self.position, 1, e)
        if m is not None:
            weight, bias, token, position = weight * m[:, None, None, None], bias * m, token * m, position * m
        y = rearrange(F.conv2d(x, weight, bias, stride=self.weight.shape[2]), "b e h w -> b (h w) e")
        y = torch.cat([token.expand(len(y), 1, -1), y], 1) + position
        return plus_idle(y, rest)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        e = self.out[0].size.at(arch)
        _, channels, patch, _ = self.weight.shape
        made = PlainPatches(nn.Conv2d(channels, e, patch, patch), self.tokens).to(self.weight)
        with torch.no_grad():
            if inherit:
                made.conv.weight.copy_(self.weight[:e])
                made.conv.bias.copy_(self.bias[:e])  # type: ignore[union-attr]  # it has one
                made.token.copy_(self.token[:e])
                made.position.copy_(self.position[:, :e])
            else:
                draw(made.token)
                draw(made.position)
        return made

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        conv, own = plain["conv"], plain[""]
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        e = conv.out_channels
        self.weight[:e].copy_(conv.weight)
        self.bias[:e].copy_(conv.bias)
        self.token[:e].copy_(own.get_parameter("token"))
        self.position[:, :e].copy_(own.get_parameter("position"))

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        _, channels, patch, _ = self.weight.shape
        size, kernel = (self.out[0].size,), (patch, patch)
        return [
            term(f"{self.name}.conv", "conv", size, when, lambda e: Shape(channels, e, kernel, patch, hw=hw, bias=True)),
            term(f"{self.name}.token", "table", size, when, lambda e: Shape(1, e)),
            term(f"{self.name}.position", "table", size, when, lambda e: Shape(self.tokens, e)),
        ]


class PlainPatches(nn.Module):
    """The plain form of ``Patches``; extraction inlines it."""

    def __init__(self, conv: nn.Conv2d, tokens: int) -> None:
        super().__init__()
        self.conv = conv
        self.token = nn.Parameter(torch.empty(conv.out_channels))
        self.position = nn.Parameter(torch.empty(tokens, conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(x.shape[0], 1, -1), x], 1) + self.position


class TokenLinear(Superposed):
    """Linear layer with bias on the last dimension. ``stack``: so many of them side by side (q, k and v), each of which keeps
    the first channels of its own. Unlike ``SuperposedLinear`` it takes its sizes from the architecture alone, as dimension 1 of
    its input are tokens.
    """

    bias: nn.Parameter

    def __init__(self, into: Segment, out: Segment, stack: int = 1, both_sides: bool = True) -> None:
        super().__init__((into,), out, both_sides)
        self.stack = stack
        self.weight = nn.Parameter(torch.empty(stack * out.full, into.full))
        self.bias = nn.Parameter(torch.empty(stack * out.full))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        draw(self.weight, generator)
        with torch.no_grad():
            self.bias.zero_()

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (..., i) -> (..., stack * o)
        rest, size, i = self._rest(arch), self.out[0].size, x.shape[-1]
        weight, bias = self._slices(self._width(arch), i)
        grid, rows = self._grid(size, arch, weight), reach(size, arch, weight)
        if grid is not None:
            weight = weight * grid
        if rows is not None:
            bias = bias * rows
        return plus_idle(F.linear(x, weight.reshape(-1, i), bias.reshape(-1)), rest)

    def _slices(self, o: int, i: int) -> tuple[Tensor, Tensor]:
        """(stack, o, i) and (stack, o): views."""
        weight, bias = self.weight.view(self.stack, -1, self.weight.shape[1]), self.bias.view(self.stack, -1)
        return prefix(prefix(weight, 1, o), 2, i), prefix(bias, 1, o)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        i, o = self.into[0].size.at(arch), self.out[0].size.at(arch)
        linear = nn.Linear(i, self.stack * o).to(self.weight)
        if inherit:
            weight, bias = self._slices(o, i)
            with torch.no_grad():
                linear.weight.copy_(weight.reshape(-1, i))
                linear.bias.copy_(bias.reshape(-1))
        else:
            draw(linear.weight)
            nn.init.zeros_(linear.bias)
        return linear

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        linear = plain[""]
        assert isinstance(linear, nn.Linear)
        weight, bias = self._slices(linear.out_features // self.stack, linear.in_features)
        weight.copy_(linear.weight.view_as(weight))
        bias.copy_(linear.bias.view_as(bias))

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        sizes = (self.into[0].size if into is None else into, self.out[0].size)
        return [term(self.name, "linear", sizes, when, lambda i, o: Shape(i, self.stack * o, hw=hw, bias=True))]


def prefix_norms(
    x: Tensor, widths: Sequence[int], weights: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:  # (..., e) -> (..., e)
    """sum_k w_k LN_k(x): candidate k normalises its own first ``widths[k]`` channels and leaves the others zero.

    ``widths``: ascending, the last one e. ``weights`` (K,), ``gamma`` and ``beta`` (e,). With mean mu_k and deviation sigma_k
    of candidate k, channel c is gamma_c (x_c R - M) + beta_c m_c: R, M and m sum w_k / sigma_k, w_k mu_k / sigma_k and w_k over
    the candidates wider than c. Half precision is computed in float32, as torch's autocast runs a layer norm.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    m = tail_sums(weights, widths).to(x.dtype)
    return _PrefixNorms.apply(x, weights.to(x.dtype), gamma, tuple(widths), eps) + beta * m


class _PrefixNorms(torch.autograd.Function):
    """gamma (x R - M), by sums over the segments between two widths: a few passes over x where K norms are 4 K.

    z, the layer norm of the whole width, has the same candidates: LN_k(x) = (z - mu_k) / s_k with the moments of z and
    s_k^2 = var_k + eps rstd^2. They are sums of z and z^2, whose size does not depend on x's.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weights: Tensor, gamma: Tensor, widths: tuple[int, ...], eps: float
    ) -> Tensor:
        z, _, rstd = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
        mus, rest = _means(z, widths), eps * rstd.square()
        squares = _means(z.square(), widths)
        inverses = [torch.rsqrt((square - mu.square()).clamp_(min=0.0) + rest) for square, mu in zip(squares, mus)]  # 1 / s
        ctx.save_for_backward(z, rstd, weights, gamma, *mus, *inverses)
        ctx.widths = widths
        rs = [w * inverse for w, inverse in zip(weights, inverses)]
        return _scaled(z, widths, _tails(rs), _tails([r * mu for r, mu in zip(rs, mus)])).mul_(gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """With u = gamma grad, A_k = mean_k(u) and B_k = mean_k(u LN_k): dx = sum_k w_k / sigma_k (u - A_k - LN_k B_k)."""
        z, rstd, weights, gamma, *saved = ctx.saved_tensors
        widths, K = ctx.widths, len(weights)
        mus, inverses = saved[:K], saved[K:]
        u = grad * gamma
        As = _means(u, widths)
        Bs = [(uz - mu * A) * inverse for uz, mu, A, inverse in zip(_means(u * z, widths), mus, As, inverses)]
        rs = [w * inverse for w, inverse in zip(weights, inverses)]
        Rs, slopes = _tails(rs), [r * inverse * B for r, inverse, B in zip(rs, inverses, Bs)]
        Ms = _tails([r * mu for r, mu in zip(rs, mus)])
        shifts = _tails([r * A - slope * mu for r, A, slope, mu in zip(rs, As, slopes, mus)])
        dx = _scaled(u, widths, Rs, shifts).sub_(_scaled(z, widths, _tails(slopes))).mul_(rstd)
        dgamma = _scaled(z, widths, Rs, Ms).mul_(grad).flatten(0, -2).sum(0)
        return dx, torch.stack([w * B.sum() for w, B in zip(widths, Bs)]), dgamma, None, None


def _parts(x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The segments between two widths."""
    return x.split([end - start for start, end in pairwise((0, *widths))], -1)


def _means(x: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """(..., 1) of each candidate. Running sums, not matrix products, which autocast would round."""
    return [total / w for total, w in zip(accumulate(part.sum(-1, keepdim=True) for part in _parts(x, widths)), widths)]


def _tails(values: Sequence[Tensor]) -> list[Tensor]:
    """Of each segment: the sum over the candidates that hold it."""
    return list(accumulate(reversed(values)))[::-1]


def _scaled(x: Tensor, widths: tuple[int, ...], Rs: Sequence[Tensor], Ms: Sequence[Tensor] = ()) -> Tensor:
    """x R - M: (..., e) and, of each segment, (..., 1)."""
    out = torch.empty_like(x)
    for k, (part, segment) in enumerate(zip(_parts(out, widths), _parts(x, widths))):
        torch.mul(segment, Rs[k], out=part)
        if Ms:
            part.sub_(Ms[k])
    return out


class TokenNorm(Leaf):
    """Layer norm over the first channels. ``norm`` says what a mixture does: "masked", every candidate normalises over its own
    channels (``prefix_norms``), as the networks that are derived do; "full", one norm over the widest with superposed scale and
    shift, as released: the statistics are those of no network."""

    eps = 1e-5

    def __init__(self, out: Segment, norm: str = "masked") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm = {norm!r} is not known. Allowed: {', '.join(NORMS)}.")
        self.into, self.out, self.norm = (out,), (out,), norm
        self.weight, self.bias = nn.Parameter(torch.empty(out.full)), nn.Parameter(torch.empty(out.full))
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, N, e) -> (B, N, e)
        e = x.shape[-1]
        gamma, beta = prefix(self.weight, 0, e), prefix(self.bias, 0, e)
        (choice,) = self.out[0].size.on
        mixture = arch[choice]
        if not isinstance(mixture, Mixture):
            return F.layer_norm(x, (e,), gamma, beta, self.eps)
        m = reach(self.out[0].size, arch, gamma) if self.norm == "full" else None
        if m is not None:
            return F.layer_norm(x, (e,), gamma * m, beta * m, self.eps)
        at = sorted(active(mixture), key=lambda j: self.out[0].size.of(mixture.options[j]))
        widths = [self.out[0].size.of(mixture.options[j]) for j in at]
        weights = mixture.weights if mixture.active is None else torch.stack([mixture.weights[j] for j in at])
        return prefix_norms(x, widths, weights, gamma, beta, self.eps)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        e = self.out[0].size.at(arch)
        norm = nn.LayerNorm(e, self.eps).to(self.weight)
        if inherit:
            with torch.no_grad():
                norm.weight.copy_(self.weight[:e])
                norm.bias.copy_(self.bias[:e])
        return norm

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        norm = plain[""]
        assert isinstance(norm, nn.LayerNorm)
        self.weight[: len(norm.weight)].copy_(norm.weight)
        self.bias[: len(norm.bias)].copy_(norm.bias)

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return [term(self.name, "norm", (self.out[0].size,), when, lambda e: Shape(e, e, hw=hw))]
