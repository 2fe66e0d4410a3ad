"""Lays out Python text in lines of at most 120 characters, and writes values and names as source."""
from __future__ import annotations

import json
import keyword
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

WIDTH = 120
INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@",
}


class Call(NamedTuple):
    """``head`` ``items`` ``tail``: a call, a list, a definition. ``tall``: one item a line in any case."""

    head: str
    items: Sequence[str | Call]
    tail: str = ")"
    tall: bool = False

    def flat(self) -> str:
        items = ", ".join(item if isinstance(item, str) else item.flat() for item in self.items)
        return f"{self.head}{items}{self.tail}"


def lines(expression: str | Call, indent: str, end: str = "") -> list[str]:
    """``expression`` at ``indent``, followed by ``end``; broken one item a line where it must be."""
    if isinstance(expression, str):
        return [f"{indent}{expression}{end}"]
    flat = f"{indent}{expression.flat()}{end}"
    if not _tall(expression) and len(flat) <= WIDTH:
        return [flat]
    body = [line for item in expression.items for line in lines(item, indent + "    ", ",")]
    return [indent + expression.head, *body, f"{indent}{expression.tail}{end}"]


def _tall(expression: str | Call) -> bool:
    return isinstance(expression, Call) and (expression.tall or any(_tall(item) for item in expression.items))


def is_name(text: str) -> bool:
    """Whether ``text`` can stand after a dot or before an equals sign."""
    return text.isidentifier() and not keyword.iskeyword(text)


def prefixed(prefix: str, expression: str | Call) -> str | Call:
    """``prefix`` in front of ``expression``, on the same line."""
    return prefix + expression if isinstance(expression, str) else expression._replace(head=prefix + expression.head)


def literal(value: Any, where: str) -> str:
    """``value`` as source. Raises ValueError, naming ``where``, for what has no spelling."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or value is ... or isinstance(value, (bool, int, float)):
        return "..." if value is ... else repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, (tuple, list)):
        items = ", ".join(literal(v, where) for v in value)
        if isinstance(value, list):
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    raise ValueError(f"{where}: {value!r} of type {type(value).__name__} cannot be written into model.py.")


def function(target: Callable[..., Any], where: str) -> str:
    """How a plain file spells a function of torch: "F.pad", "torch.cat". Raises ValueError for any other function."""
    for prefix, module in (("F", F), ("torch", torch), ("operator", operator)):
        names = [getattr(target, "__name__", ""), *sorted(vars(module))]  # boolean dispatch hides some names
        for name in names:
            if name and not name.startswith("_") and vars(module).get(name) is target:
                return f"{prefix}.{name}"
    raise ValueError(f"{where} calls {target!r}. Allowed: functions of torch, torch.nn.functional and operator.")
