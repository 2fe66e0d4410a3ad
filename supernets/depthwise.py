"""Depthwise convolutions whose backward is fast on a CPU: the sums of ``F.conv2d``, asked of kernels that oneDNN has.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width, ``k`` kernel size (odd), ``d`` dilation, ``s`` stride.

oneDNN has a depthwise kernel for weight gradients of at most three columns and no dilation, in channels_last; all else falls
to one for full groups of 16 channels, at up to sixteen times the work. So five columns are three and three that share the
middle one; a dilation of 2 is a dense convolution where pairs of columns are channels and pairs of rows stand one behind
the other; and the gradient of the input, at stride 1, is a convolution with the kernel turned by 180 degrees.
"""
from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LAST = torch.channels_last


def depthwise(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """(B, C, H, W), (C, 1, k, k) -> (B, C, ceil(H / s), ceil(W / s)): ``F.conv2d`` with padding d (k // 2), up to rounding.

    Keeps the layout of ``x``. A dilation of 2 at stride 2 reads the even pixels alone.
    """
    k, channels_last = weight.shape[-1], x.is_contiguous(memory_format=LAST)
    if dilation == 2 and stride == 2:
        x, stride, dilation = x[:, :, ::2, ::2], 1, 1
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, stride=stride, padding=dilation * (k // 2), dilation=dilation, groups=x.shape[1])
    y = _Depthwise.apply(x.contiguous(memory_format=LAST), weight, stride, dilation)
    return y if channels_last else y.contiguous()


class _Depthwise(torch.autograd.Function):
    """``F.conv2d`` of channels_last tensors, with the backward of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        s, d, pad = ctx.stride, ctx.dilation, ctx.dilation * (weight.shape[-1] // 2)
        g = g.contiguous(memory_format=LAST)
        dx = dw = None
        if ctx.needs_input_grad[0] and s == 1:
            dx = F.conv2d(g, weight.flip(2, 3), None, 1, pad, d, x.shape[1])
        elif ctx.needs_input_grad[0]:
            dx = _backward(g, x, weight, s, d, (pad, pad), of_input=True)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(g, x, weight, s, d)
        return dx, dw, None, None


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, s: int, d: int) -> Tensor:
    """dL/dweight (C, 1, k, k) for the gradient ``g`` of the output."""
    k, even = weight.shape[-1], x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    if k not in (3, 5) or d > 2 or (d == 2 and not even):
        return _backward(g, x, weight, s, d, (d * (k // 2), d * (k // 2)))
    if d == 2:  # columns 2i and 2i + 1 are one pixel of 2 C channels; rows 2i and 2i + 1 are one row, with zeros between them
        p, R, pairs = k // 2, max(x.shape[2] // 2, k), torch.cat([weight, weight])
        g, shifts = _spaced("g", g, 2, R, p)[0], _spaced("x", x, 2, R, p, before=p if k == 5 else 0)
    else:
        pairs, shifts = weight, _spaced("x", x, 1, x.shape[2], 2, before=2) if k == 5 else (x, x)
    if k == 3:
        dw = _backward(g, shifts[0], pairs, s, 1, (1, 1))
    else:
        left, right = (_backward(g, shifted, pairs[..., :3], s, 1, (2, 0)) for shifted in shifts)
        dw = torch.cat([left, right[..., 1:]], dim=3)
    return dw if d == 1 else dw.unflatten(0, (2, -1)).sum(0)


def _spaced(name: str, x: Tensor, d: int, R: int, gap: int, before: int = 0) -> tuple[Tensor, Tensor]:
    """The image with d rows in one and d columns in one pixel, ``gap`` pixels of zeros between the rows in one, ``before``
    in front, and rows of zeros up to R (oneDNN's kernel wants no fewer than its own):

    (B, d C, R, W + (d - 1) gap + before), and the same moved left by ``before`` pixels. Both are one buffer: the zeros in
    front of a row are those behind the row above.
    """
    B, C, H, W = x.shape
    h, w, c = H // d, W // d, d * C
    width = d * w + (d - 1) * gap + before
    buffer = _zeros(name, (B, R, width, c, d, h, gap, before), x.dtype)
    n = B * R * width * c
    pixels = buffer.as_strided((B, h, d, w, c), (R * width * c, width * c, (w + gap) * c, c, 1), before * c)
    pixels.copy_(x.permute(0, 2, 3, 1).view(B, h, d, w, c))
    first, second = (buffer[start : start + n].view(B, R, width, c).permute(0, 3, 1, 2) for start in (0, before * c))
    return first, second


class _Kept(threading.local):
    """Buffers of a thread by layout."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[Any, ...], Tensor] = {}


_KEPT = _Kept()


def _zeros(name: str, layout: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer (B R width c + before c,) of zeros and of what was last written between them, kept for the next gradient of
    this layout: fresh memory would cost more than the copy into it. It is read before anyone else writes there."""
    key = (name, dtype, *layout)
    if key not in _KEPT.buffers:
        if len(_KEPT.buffers) >= 64:
            _KEPT.buffers.clear()
        B, R, width, c, *_, before = layout
        _KEPT.buffers[key] = torch.zeros(B * R * width * c + before * c, dtype=dtype)
    return _KEPT.buffers[key]


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, s: int, d: int, pad: tuple[int, int], of_input: bool = False
) -> Tensor:
    """ATen's own gradient of the weight, or of the input."""
    found = torch.ops.aten.convolution_backward(
        g, x, weight, None, [s, s], pad, [d, d], False, [0, 0], x.shape[1], [of_input, not of_input, False]
    )
    return found[0 if of_input else 1]
