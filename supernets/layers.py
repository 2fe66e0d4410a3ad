"""The records that a supernet lists once, and that every cost is a reading of (DESIGN.md law 5)."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from search_spaces.sizes import Layout, Size

VIEWS = ("derived", "searched", "estimated")


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

    ``op``: "conv", "linear", "norm" (0 MACs, 2c parameters), "more" (a further input segment of the convolution or
    linear layer before it: products and weights, no outputs) or "table" (c_in rows of c_out numbers that are added to as many
    tokens or looked up: parameters alone), constant per record.
    ``on``: the choices the term depends on, at most four. ``shape``: their values, in that order -> Shape,
    or None where the layer is absent.
    """

    name: str
    op: str
    on: tuple[str, ...]
    shape: Callable[..., Shape | None]


class When(NamedTuple):
    """The condition under which a layer is there: ``holds(values of on)``."""

    on: tuple[str, ...]
    holds: Callable[..., bool]


def term(name: str, op: str, sizes: Sequence[Size], when: When | None, shape: Callable[..., Shape | None]) -> Layer:
    """A Layer whose ``shape`` is told the values of ``sizes`` and is asked only where ``when`` holds.

    Choices that several sizes (or the condition) share are named once.
    """
    asked = [*(when.on if when else ()), *itertools.chain.from_iterable(size.on for size in sizes)]
    on = tuple(dict.fromkeys(asked))

    def evaluate(*values: Any) -> Shape | None:
        of = dict(zip(on, values))
        if when is not None and not when.holds(*(of[name] for name in when.on)):
            return None
        return shape(*(size.of(*(of[name] for name in size.on)) for size in sizes))

    return Layer(name, op, on, evaluate)


def known_view(view: str) -> None:
    """ValueError for a cost view that is not one of ``VIEWS``."""
    if view not in VIEWS:
        raise ValueError(f"view = {view!r} is not known. Allowed: {', '.join(VIEWS)}.")


def inputs(op: str, into: Layout, source: Size | None) -> list[tuple[str, Size]]:
    """The input sizes of one layer, one cost term each: ``op`` for the first segment, "more" for further segments of a
    concatenation, which add products and weights but no outputs. ``source`` stands for a single segment."""
    if source is not None:
        return [(op, source)]
    sizes = [Size(s.size.on, lambda *values, s=s: s.repeat * s.size.of(*values)) if s.repeat > 1 else s.size for s in into]
    return [(op if i == 0 else "more", size) for i, size in enumerate(sizes)]
