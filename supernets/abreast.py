"""Operations of one form side by side: E of them as one tensor of E C channels, with one call where each alone needs its own.

Letters: ``B`` batch, ``C O`` channels of one operation, ``H W`` height and width, ``E`` operations, ``K`` features.

In training the statistics of a batch norm are each channel's own, so the operations give what each gives alone, up to rounding.
Everything here is dense in memory as channels_last, whatever layout came in: (B, H, W, E, C).
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from search_spaces.space import Mixture, Value
from supernets.chains import Chain, Conv
from supernets.depthwise import depthwise
from supernets.elastic import Normalise
from supernets.mixing import active
from supernets.operations import Chained, Halve


def fits(leaf: nn.Module | None) -> bool:
    """Whether operations of the form of ``leaf`` can stand side by side: halvings, and pairs of a depthwise and a pointwise
    convolution, with norms without scale and shift."""
    if isinstance(leaf, Halve):
        return not len(leaf.norm.weight)
    return isinstance(leaf, Chained) and not any(len(norm.weight) for norm in leaf.norms()) and all(
        len(unit) == 2 and unit[0].depthwise and unit[1] == Conv(1) for unit in leaf.units
    )  # fmt: skip


def columns(mixtures: Sequence[Mixture]) -> dict[Value, Tensor]:
    """Active option -> its weights in all E mixtures, (E,); {} where they differ in options or in what is active, and where
    idle options add something."""
    if len({(m.options, m.active, m.idle) for m in mixtures}) != 1 or mixtures[0].idle != "absent":
        return {}
    weights = torch.stack([m.weights for m in mixtures]).unbind(1)
    return {mixtures[0].options[j]: weights[j] for j in active(mixtures[0])}


class Inputs:
    """One activated state (B, C, H, W) as E operations read it, each form made when first asked for, once."""

    def __init__(self, x: Tensor, E: int) -> None:
        self.x, self.E = x, E

    @cached_property
    def repeated(self) -> Tensor:  # (B, E C, H, W)
        return repeated(self.x, self.E)

    @cached_property
    def even(self) -> Tensor:  # (B, C, H / 2, W / 2): even rows and columns
        return self.x[:, :, ::2, ::2]

    @cached_property
    def even_repeated(self) -> Tensor:  # (B, E C, H / 2, W / 2)
        return repeated(self.even, self.E)


def abreast(operations: Sequence[nn.Module | Chain], inputs: Inputs, w: Tensor | None) -> Tensor:
    """w_e f_e(x) of E operations that ``fits``, or chains of such, that differ in their numbers alone; w: (E,), for chains
    also None, where weights are in the kernels. In training.

    -> (B, E O, H', W').
    """
    if isinstance(operations[0], Halve):
        assert w is not None
        return _halves([cast(Halve, operation) for operation in operations], inputs, w)
    alike = [operation if isinstance(operation, Chain) else cast(Chained, operation).chain() for operation in operations]
    k, units, norms = 0, alike[0].units, alike[0].norms
    scale = None if w is None else _scale(w, norms[0], len(alike[0].weights[-1]))
    x: Tensor | None = None
    for u, (unit, norm) in enumerate(zip(units, norms)):
        first, second = ([chain.weights[i] for chain in alike] for i in (k, k + 1))
        stride, dilation = unit[0].steps()[0], unit[0].dilation
        if x is None and stride == dilation == 2:  # reads even pixels alone
            x, stride, dilation = inputs.even_repeated, 1, 1
        x = depthwise(inputs.repeated if x is None else x, torch.cat(first), stride, dilation)
        x = pointwise(x, torch.stack(second).flatten(2))
        k, last = k + 2, u == len(units) - 1
        x = F.batch_norm(x, None, None, scale if last else None, None, training=True, eps=norm.eps)
        x = x if last else F.relu(x, inplace=True)
    assert x is not None
    return x


def _halves(operations: Sequence[Halve], inputs: Inputs, w: Tensor) -> Tensor:
    parts = []
    for i, pixels in enumerate((inputs.even, inputs.x[:, :, 1::2, 1::2])):
        weight = torch.cat([operation.weight[i] for operation in operations]).flatten(1)
        parts.append(F.linear(pixels.permute(0, 2, 3, 1), weight).unflatten(3, (inputs.E, -1)))
    z = torch.stack(parts, dim=4).flatten(3).permute(0, 3, 1, 2)  # of each operation the even half, then the odd one
    norm = operations[0].norm
    scale = _scale(w, norm, operations[0].out[0].full)
    return F.batch_norm(z, None, None, scale, None, training=True, eps=norm.eps)


def _scale(w: Tensor, norm: Normalise, c: int) -> Tensor:
    """Each weight for all its channels, (E,) -> (E c,), in real numbers: see ``operations.filled``."""
    return w.to(norm.running_mean.dtype)[:, None].expand(-1, c).contiguous().view(-1)  # reshape: of one operation, a view


def repeated(x: Tensor, E: int) -> Tensor:  # (B, C, H, W) -> (B, E C, H, W)
    """``x`` once for each of E operations."""
    return _Repeated.apply(x, E)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolutions of E groups: (B, E C, H, W), (E, O, C) -> (B, E O, H, W)."""
    if torch.is_autocast_enabled(x.device.type):
        return F.conv2d(x, weight.flatten(0, 1)[:, :, None, None], groups=len(weight))
    return _Pointwise.apply(x, weight)


def spread(features: Sequence[Tensor], weights: Sequence[Tensor], sums: Tensor, E: int) -> Sequence[Tensor]:
    """For each of E readers a weighted sum of K features, and its own part of ``sums``.

    K times (B, C, H, W) and (E,); (B, E C, H, W) -> E times (B, C, H, W).
    """
    if not features:
        return sums.chunk(E, dim=1)
    dense = [feature.to(sums.dtype).contiguous(memory_format=torch.channels_last) for feature in features]
    return _Spread.apply(torch.stack(list(weights), dim=1), sums, *dense)


class _Repeated(torch.autograd.Function):
    """``x.repeat(1, E, 1, 1)`` in channels_last. Its backward adds E slices, which is faster than a sum over an inner axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, E: int) -> Tensor:
        ctx.E = E
        B, C, H, W = x.shape
        return x.permute(0, 2, 3, 1)[..., None, :].expand(B, H, W, E, C).reshape(B, H, W, E * C).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        parts = g.chunk(ctx.E, dim=1)
        total = torch.add(parts[0], parts[1]).contiguous(memory_format=torch.channels_last) if ctx.E > 1 else parts[0]
        for part in parts[2:]:
            total.add_(part)
        return total, None


class _Pointwise(torch.autograd.Function):
    """A product for each group, read from and written into the channels where they stand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _products(x, weight.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = _products(g, weight) if ctx.needs_input_grad[0] else None
        dw = torch.bmm(_groups(g, len(weight)).transpose(1, 2), _groups(x, len(weight))) if ctx.needs_input_grad[1] else None
        return dx, dw


def _groups(x: Tensor, E: int) -> Tensor:
    """(B, E C, H, W) -> (E, B H W, C), a view where ``x`` is channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    B, c, H, W = x.shape
    return x.as_strided((E, B * H * W, c // E), (c // E, c, 1))


def _products(x: Tensor, weight: Tensor) -> Tensor:
    """(B, E C, H, W), (E, C, O) -> (B, E O, H, W)."""
    B, _, H, W = x.shape
    E, _, o = weight.shape
    out = torch.empty((B, E * o, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    torch.bmm(_groups(x, E), weight, out=_groups(out, E))
    return out


class _Spread(torch.autograd.Function):
    """Weighted sums that pass over the features once for each weight, forward and backward, without temporaries."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, sums: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weights, *features)
        found, w = [], weights.to(sums.dtype)
        for row, out in zip(w.unbind(0), sums.chunk(len(w), dim=1)):
            out = torch.addcmul(out, features[0], row[0])
            for feature, v in zip(features[1:], row[1:]):
                out.addcmul_(feature, v)
            found.append(out)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> Any:  # type: ignore[override]
        weights, *features = ctx.saved_tensors
        dw, back = None, []
        for column in weights.to(gs[0].dtype).unbind(1):
            total = gs[0] * column[0]
            for g, v in zip(gs[1:], column[1:]):
                total.addcmul_(g, v)
            back.append(total)
        if ctx.needs_input_grad[0]:
            dw = torch.stack([torch.stack([(feature * g).sum() for feature in features]) for g in gs]).to(weights)
        return dw, torch.cat(gs, dim=1), *back
