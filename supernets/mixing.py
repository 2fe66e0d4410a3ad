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
from torch.autograd.function import once_differentiable

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
    """The sum of ``outs``, which are f_j(x) of j in ``at``; the gradient of weight j is <f_j(x), dL/dout> for every j. The
    other f_j are found by ``run`` in the backward pass, without a graph and under the autocast of the forward, None for zero
    (ProxylessNAS, full_v2). Where nothing is active, ``outs`` is one zero and ``at`` is empty.

    One backward alone: ``run`` is let go after it, and with it what it read, cell by cell; RuntimeError in a second one."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weights: Tensor, run: Callable[[int], Tensor | None], at: Sequence[int], *outs: Tensor
    ) -> Tensor:
        kind = outs[0].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.run, ctx.at = run, at
        ctx.save_for_backward(weights, *outs)
        return reduce(torch.add, outs) if len(outs) > 1 else outs[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weights, *outs = ctx.saved_tensors
        dots, known, run = None, dict(zip(ctx.at, outs)), ctx.run
        if ctx.needs_input_grad[0]:
            if run is None:
                raise RuntimeError("gates run their candidates in one backward pass; a second one (retain_graph) cannot.")
            ctx.run, dots = None, torch.zeros_like(weights)
            kind, dtype, enabled = ctx.autocast
            with torch.no_grad(), torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
                for j in range(len(weights)):
                    y = known[j] if j in known else run(j)
                    if y is not None:
                        dots[j] = (y * grad).sum(dtype=weights.dtype)
        return dots, None, None, *[grad] * len(outs)


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
    if not counting and empty is None:
        raise ValueError(f"a mixture over {mixture.options} computes nothing here, and no zero is given")
    nothing = [empty(x)] if empty is not None and not counting else []

    def alone(j: int) -> Tensor | None:
        candidate = candidates[j]
        return None if candidate is None else candidate(x, None)[0]

    if mixture.idle == "gate":
        outs = nothing or [y for j in counting if (y := alone(j)) is not None]
        return _Gate.apply(mixture.weights, alone, counting, *outs)
    if nothing:
        return plus_idle(nothing[0], idle_ones(mixture))
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
