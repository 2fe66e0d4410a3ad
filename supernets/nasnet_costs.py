"""What the layers of NASNet cells cost: of every option of the root space, whichever leaves a net has."""
from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from search_spaces.nasnet import OPS
from search_spaces.sizes import Size, fixed
from supernets.layers import Layer, Shape, When, term
from supernets.nasnet_operations import HW, convolves, form, halved


@cache
def shapes(op: str, kind: str, c: int, o: int, read: HW, stride: int) -> tuple[Shape, ...]:
    """The layers of ``kind`` "conv" or "norm" of an operation that reads maps of ``read``."""
    if not convolves(op, c, o, stride):
        return ()
    found: list[Shape] = []
    hw, pooled = read, form(op, stride).pool and stride == 2
    hw = halved(hw) if pooled else hw
    for unit in form(op, stride).units:
        for conv in unit:
            wide = c if conv.depthwise else o
            hw = -(-hw[0] // conv.steps()[0]), -(-hw[1] // conv.steps()[1])
            if kind == "conv":
                groups = c if conv.depthwise else 1
                found.append(Shape(c, wide, conv.sides(), max(conv.steps()), conv.dilation, groups, hw))
            c = wide
        if kind == "norm":
            found.append(Shape(c, c, hw=hw))
    return tuple(found)


def branch_layers(
    path: str, op: str | Size, into: Size, out: Size, read: HW, stride: int = 1, when: When | None = None
) -> Iterator[Layer]:
    """The cost terms of an operation, or of a choice among all of them (its position in ``OPS``)."""
    ops = OPS if isinstance(op, Size) else (op,)
    for kind in ("conv", "norm"):
        for k in range(max(len(shapes(name, kind, 1, 2, read, stride)) for name in ops)):

            def shape(at: int, i: int, o: int, kind: str = kind, k: int = k) -> Shape | None:
                there = shapes(OPS[at], kind, i, o, read, stride)
                return there[k] if k < len(there) else None

            at = op if isinstance(op, Size) else fixed(OPS.index(op))
            yield term(f"{path}.{kind}{k}", kind, (at, into, out), when, shape)


def factorised_layers(path: str, into: Size, out: Size, hw: HW, when: When | None = None) -> Iterator[Layer]:
    """The cost terms of a factorised reduction to maps of ``hw``."""
    yield term(f"{path}.even", "conv", (into, out), when, lambda i, o: Shape(i, o // 2, stride=2, hw=hw))
    yield term(f"{path}.odd", "conv", (into, out), when, lambda i, o: Shape(i, o - o // 2, stride=2, hw=hw))
    yield term(f"{path}.norm", "norm", (out,), when, lambda o: Shape(o, o, hw=hw))
