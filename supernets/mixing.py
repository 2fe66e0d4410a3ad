"""How candidates that share weights are mixed: pure functions, tested without any network.

Letters: ``B`` batch, ``C c`` channels, ``H W`` height and width, ``K`` candidates.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.space import Mixture

MIXINGS = ("interpolate", "sum")


@lru_cache(maxsize=4096)
def averaging(c: int, channels: int, mixing: str = "interpolate") -> Tensor:  # -> (channels, c) float64
    """The matrix that brings ``c`` channels up (or down) to ``channels``.

    ``interpolate``: adaptive average pooling along channels (CWI; TAS, section 3): output ``o`` averages the inputs
    ``floor(o c / channels) .. ceil((o + 1) c / channels) - 1``. ``sum``: the narrow tensor padded with zeros.
    """
    matrix = torch.zeros(channels, c, dtype=torch.float64)
    for o in range(channels):
        if mixing == "interpolate":
            low, high = o * c // channels, -(-(o + 1) * c // channels)
            matrix[o, low:high] = 1.0 / (high - low)
        elif o < c:
            matrix[o, o] = 1.0
    return matrix


@lru_cache(maxsize=4096)
def _averaging(c: int, channels: int, mixing: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return averaging(c, channels, mixing).to(dtype=dtype, device=device)


def interpolate_channels(x: Tensor, channels: int, mixing: str = "interpolate") -> Tensor:
    """(B, c, H, W) -> (B, channels, H, W), by ``averaging``; ``x`` itself where the widths agree."""
    c = x.shape[1]
    if c == channels:
        return x
    return F.conv2d(x, _averaging(c, channels, mixing, x.dtype, x.device)[:, :, None, None])


def fold(
    sizes: Sequence[int], weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor], mixing: str
) -> tuple[Tensor, Tensor]:
    """One 1x1 convolution that is affine, interpolation and mixing at once.

    Candidate k keeps the first ``sizes[k]`` channels of the normalised features z, scales and shifts them
    (``scales[k]``, ``shifts[k]``: (sizes[k],)), is brought to the widest width and weighted by ``weights[k]``; the
    candidates are added (TAS (5)-(8)). All of it is linear in z, so it is M z + b.

    Returns M (C, C) and b (C,), with C the widest size. Exact: every candidate sees the same z, because batch
    statistics are per channel.
    """
    C = max(sizes)
    M, b = [], []
    for c, v, gamma, beta in zip(sizes, weights, scales, shifts):
        A, v = _averaging(c, C, mixing, gamma.dtype, gamma.device), v.to(gamma.dtype)
        M.append(F.pad(A * (v * gamma), (0, C - c)) if c < C else A * (v * gamma))
        b.append(A @ (v * beta) if c < C else v * beta)
    return reduce(torch.add, M), reduce(torch.add, b)


def active(mixture: Mixture) -> tuple[int, ...]:
    """The positions of a mixture that are computed."""
    return tuple(range(len(mixture.options))) if mixture.active is None else tuple(mixture.active)


def plus_idle(out: Tensor, rest: Tensor | float) -> Tensor:
    """``out`` and what ``idle_ones`` found; ``out`` itself where that is a plain 0.0, as adding it would copy every number."""
    return out + rest if isinstance(rest, Tensor) else out


def idle_ones(mixture: Mixture) -> Tensor | float:
    """What the candidates that are not computed add under ``idle="ones"``: the sum of their weights, whose value is 0
    for a straight-through sample and whose gradient is 1 (GDAS); 0.0 for the other kinds."""
    if mixture.idle != "ones" or mixture.active is None:
        return 0.0
    rest = [j for j in range(len(mixture.options)) if j not in mixture.active]
    return mixture.weights[rest].sum() if rest else 0.0


class _Gate(torch.autograd.Function):
    """Identity on ``out``; the gradient of weight j is <f_j(x), dL/dout>, with f_j run in the backward pass without a
    graph (ProxylessNAS, full_v2)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weights: Tensor, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        ctx.run = run
        ctx.count = len(weights)
        ctx.save_for_backward(x, weights)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weights = ctx.saved_tensors
        with torch.no_grad():
            dots = torch.stack([(ctx.run(j, x) * grad).sum() for j in range(ctx.count)])
        return grad, dots.to(weights.dtype), None, None


Scaled = tuple[Tensor, Tensor | None]
"""(y, rest): what a candidate makes of x, and the weight that is still to be multiplied (None: it is in y already)."""

Candidate = Callable[[Tensor, Tensor | None], Scaled]
"""f(x, w) -> (y, rest): a candidate that ends in a batch norm takes the weight w () in as its scale, at no cost; others
hand it back. w None: y is f(x)."""


def blend(
    candidates: Sequence[Candidate | None], x: Tensor, mixture: Mixture, empty: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """sum over the active candidates of w_j f_j(x), and what ``idle`` says of the others.

    The only place that reads ``active`` and ``idle`` for candidate operations; ``fold`` has the same duty for widths.
    ``candidates[j]`` belongs to ``mixture.options[j]`` and is called only if it counts. A candidate None is zero: it is
    never computed, its weight gets no gradient; ``empty(x)`` is the zero of a mixture that computes nothing else.
    ValueError where no option is active.
    """
    if not active(mixture):
        raise ValueError(f"a mixture over {mixture.options} has no active option: activate at least one")
    counting = [j for j in active(mixture) if candidates[j] is not None]
    if not counting:
        if empty is None:
            raise ValueError(f"a mixture over {mixture.options} computes nothing here, and no zero is given")
        return plus_idle(empty(x), idle_ones(mixture))

    def alone(j: int, x: Tensor) -> Tensor:
        candidate = candidates[j]
        return candidate(x, None)[0] if candidate is not None else torch.zeros((), dtype=x.dtype, device=x.device)

    if mixture.idle == "gate":
        return _Gate.apply(reduce(torch.add, [alone(j, x) for j in counting]), mixture.weights, x.detach(), alone)
    w = mixture.weights.to(x.dtype).unbind(0)
    out: Tensor | None = None
    for j in counting:
        candidate = candidates[j]
        assert candidate is not None
        y, rest = candidate(x, w[j])
        if out is None:
            out = y if rest is None else y * rest
        else:
            out = out + y if rest is None else torch.addcmul(out, rest, y)  # one pass over the features, not two
    assert out is not None
    return plus_idle(out, idle_ones(mixture))
