"""Precision belongs to the net: strategies are handed a net whose forward autocasts and answers float32 logits."""
from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

PRECISIONS = ("float32", "bfloat16")


def in_precision(net: nn.Module, precision: str, channels_last: bool = False) -> nn.Module:
    """``net`` itself, its forward under autocast to ``precision``, its weights and inputs channels_last if asked.

    Weights stay float32, so a loss needs no scaler; float16 is not offered for that reason. Each forward has its own
    context and caches no casts (an in-place update of a weight must be seen by the next forward).
    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision = {precision!r} is not known. Allowed: {', '.join(PRECISIONS)}.")
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision == "float32" and not channels_last:
        return net
    dtype = getattr(torch, precision)

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype, enabled=precision != "float32", cache_enabled=False):
            out = type(self).forward(self, x, *args, **kwargs)
        return out.float() if out.dtype == torch.bfloat16 else out

    net.forward = MethodType(forward, net)  # type: ignore[method-assign]  # a bound method: a deep copy binds its own net
    return net
