"""The records that a supernet lists once, and that every cost is a reading of (DESIGN.md law 5)."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Shape(NamedTuple):
    """One plain layer. ``hw`` is the OUTPUT size (1, 1 for a linear layer on pooled features)."""

    c_in: int
    c_out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    hw: tuple[int, int] = (1, 1)
    bias: bool = False


class Layer(NamedTuple):
    """One additive TERM of the cost.

    ``op``: "conv", "linear", "norm" (0 MACs, 2c parameters) or "more" (a further input segment of the convolution or
    linear layer before it: products and weights, no outputs), constant per record.
    ``on``: the choices the term depends on, at most four. ``shape``: their values, in that order -> Shape,
    or None where the layer is absent.
    """

    name: str
    op: str
    on: tuple[str, ...]
    shape: Callable[..., Shape | None]
