"""Finds the distinct blocks of a tree of modules, and the numbers in which the instances of one block differ.

Two groups are the same block if they are equal once their numbers are erased. A number that all instances share stays a
literal; numbers that differ become constructor parameters, one for all that are equal in every instance.
"""
from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from supernets.printer_tree import Group, Leaf, Step, Weight

CHANNELS = ("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "groups",
            "normalized_shape", "num_parameters", "embed_dim")
RESERVED = ("Network", "OrderedDict", "DTYPES", "F", "nn", "torch", "json", "operator", "model", "load", "holder")


class Hole(NamedTuple):
    """A number of a block. ``path``: of the member (relative to the block), or the function; ``arg``: its argument."""

    path: str
    arg: str
    unit: str  # holes are merged with holes of the same unit only: "channels", "stride", ...
    value: Any


@dataclass
class Block:
    """A class to print. ``named``: (path, arg) of each hole that varies -> the parameter that fills it."""

    name: str
    groups: list[Group]
    named: dict[tuple[str, str], str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)  # parameter -> unit, in order of first use
    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # path of the instance -> parameter -> value
    attributes: list[str] = field(default_factory=list)  # parameters that the forward needs


def is_number(value: Any) -> bool:
    """Whether ``value`` may differ between the instances of a block: a number, or a tuple or list of numbers."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(v) in (int, float) for v in value)
    return type(value) in (int, float)


def fill(value: Any, hole: Callable[[Any], Any]) -> Any:
    """``value`` with each number in it replaced by ``hole(number)``, in order; nodes and other literals stay."""
    if is_number(value):
        return hole(value)
    if isinstance(value, (tuple, list)):
        return [fill(v, hole) for v in value] if isinstance(value, list) else tuple(fill(v, hole) for v in value)
    if isinstance(value, dict):
        return {key: fill(v, hole) for key, v in value.items()}
    if isinstance(value, slice):
        return slice(*(fill(v, hole) for v in (value.start, value.stop, value.step)))
    return value


def relative(path: str, group: Group) -> str:
    """``path`` as seen from ``group``."""
    return path[len(group.path) + 1:] if group.path else path


def fill_step(step: Step, hole: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments of a step, each filled: several numbers in a row are separate arguments."""
    return tuple(fill(value, hole) for value in step.args), {name: fill(v, hole) for name, v in step.kwargs.items()}


def step_name(step: Step) -> str:
    """The plain name of what a step calls."""
    target = step.path or step.node.target
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", "value").strip("_")


class Blocks:
    """The distinct blocks of ``root``. ``ordered``: classes to print, every class after those that it uses."""

    def __init__(self, root: Group) -> None:
        self._seen: dict[int, str] = {}
        self.root = root
        groups = list(_groups(root))
        count = Counter(self.key(group) for group in groups)
        found: dict[str, Block] = {}
        for group in groups:
            key = self.key(group)
            if group.kind == "block" or (_large_chain(group) and count[key] > 1):
                found.setdefault(key, Block(group.name, [])).groups.append(group)
        self.of = {group.path: block for block in found.values() for group in block.groups}
        self.ordered = list(found.values())
        taken = Counter(RESERVED)
        for block in self.ordered:  # members come before their owners, so theirs are settled
            if block.groups != [root]:
                taken[block.name] += 1
                block.name += str(taken[block.name]) if taken[block.name] > 1 else ""
            self._name_parameters(block)

    def key(self, member: Leaf | Weight | Group) -> str:
        """Equal for members that differ in numbers only."""
        if isinstance(member, Leaf):
            return f"{member.kind}({fill(member.arguments, _erased)})"
        if isinstance(member, Weight):
            return f"weight({member.dtype} {member.parameter} {member.grad})"
        if id(member) not in self._seen:
            children = {name: self.key(child) for name, child in member.children.items()}
            steps = _signature(member) if member.kind == "block" else ""
            self._seen[id(member)] = f"{member.kind}({children} {steps})"
        return self._seen[id(member)]

    def holes(self, group: Group) -> list[Hole]:
        """The numbers of one instance, in an order that all instances of its block share."""
        found = list(self._member_holes(group, group))
        for index, step in enumerate(group.steps if group.kind == "block" else ()):
            numbers: list[Any] = []
            fill_step(step, numbers.append)
            name = step_name(step)
            found += [Hole(f"{name}()", f"{index}.{i}", name, value) for i, value in enumerate(numbers)]
        return found

    def _member_holes(self, member: Group, block: Group) -> Iterator[Hole]:
        for child in member.children.values():
            path = relative(child.path, block)
            if isinstance(child, Leaf):
                for arg, value in child.arguments.items():
                    if is_number(value):
                        yield Hole(path, arg, "channels" if arg in CHANNELS else arg, value)
            elif isinstance(child, Weight):
                yield Hole(path, "shape", "shape", child.shape)
            elif child.path in self.of:
                inner = self.of[child.path]
                for parameter, value in inner.values[child.path].items():
                    yield Hole(path, parameter, inner.units[parameter], value)
            else:
                yield from self._member_holes(child, block)

    def _name_parameters(self, block: Block) -> None:
        """Merge the holes that vary together, and name each set once."""
        table = list(zip(*(self.holes(group) for group in block.groups)))
        sets: dict[tuple[str, str], list[tuple[Hole, ...]]] = {}
        for row in table:
            if len({repr(hole.value) for hole in row}) > 1:
                sets.setdefault((row[0].unit, repr([hole.value for hole in row])), []).append(row)
        units = Counter(unit for unit, _ in sets)
        entry = next((row[0].path for row in table if row[0].unit == "channels"), "")
        for (unit, _), rows in sorted(sets.items(), key=lambda item: item[0][0] != "channels"):  # widths come first
            holes = [row[0] for row in rows]
            name = _channels_name(holes, entry) if unit == "channels" else _plain_name(holes[0], units[unit])
            used = any(hole.path.endswith("()") for hole in holes)  # becomes an attribute, so must not hide one
            plain, number = name, 2
            while name in block.units or keyword.iskeyword(name) or (used and _hides(name, block.groups[0])):
                name, number = f"{plain}{number}", number + 1
            block.units[name] = unit
            block.named.update({(hole.path, hole.arg): name for hole in holes})
            block.attributes += [name] * used
            for group, hole in zip(block.groups, rows[0]):
                block.values.setdefault(group.path, {})[name] = hole.value
        for group in block.groups:
            block.values.setdefault(group.path, {})


def _groups(group: Group) -> Iterator[Group]:
    for child in group.children.values():
        if isinstance(child, Group):
            yield from _groups(child)
    yield group


def _large_chain(group: Group) -> bool:
    """Chains of chains and chains of four or more modules are worth a class if they occur twice."""
    nested = any(isinstance(child, Group) for child in group.children.values())
    return group.kind == "chain" and not group.numbered and (nested or len(group.children) > 3)


def _erased(_: Any) -> str:
    return "#"


def _signature(group: Group) -> str:
    """The forward of a block with its numbers erased and its values counted instead of named."""
    names = {node: f"%{i}" for i, node in enumerate(group.inputs)}
    lines = []
    for step in group.steps:
        def name(node: fx.Node, names: dict[fx.Node, str] = names) -> str:
            return names.get(node) or f"self.{relative(str(node.target), group)}"

        args = fx.node.map_arg(fill_step(step, _erased), name)
        called = relative(step.path, group) if step.path else f"{step.node.op} {step.node.target!r}"
        lines.append(f"{called}{args}")
        names[step.node] = f"%{len(names)}"
    return f"{lines} {fx.node.map_arg(group.output, lambda node: names.get(node, '?'))}"


def _hides(name: str, group: Group) -> bool:
    """Whether an attribute of this name would hide a member of the block or something of ``nn.Module``."""
    return name in group.children or hasattr(nn.Module, name)


def _label(path: str) -> str:
    parts = path.removesuffix("()").split(".")
    while len(parts) > 1 and (parts[-1] in ("conv", "linear", "norm") or parts[-1].isdigit()):
        parts.pop()
    label = re.sub(r"\W+", "_", "_".join(parts)).strip("_")
    return label if label.isidentifier() else f"at_{label}"


def _channels_name(holes: list[Hole], entry: str) -> str:
    """"channels" or "in_channels" for what enters the block's first member, "conv0_channels" for what conv0 returns."""
    outs = [h for h in holes if h.arg.startswith("out_") or (h.arg.endswith("channels") and h.arg != "in_channels")]
    if any(hole.path == entry and hole.arg in ("in_channels", "in_features", "channels") for hole in holes):
        return "channels" if outs else "in_channels"
    if outs and not outs[0].arg.startswith("out_"):
        return f"{_label(outs[0].path)}_{outs[0].arg}"
    return f"{_label((outs or holes)[0].path)}_channels"


def _plain_name(hole: Hole, count: int) -> str:
    """"stride" where the block has one stride to choose, "conv0_stride" where it has several."""
    if hole.path.endswith("()"):
        return f"{hole.unit}_value" if count == 1 else f"{hole.unit}_{hole.arg.replace('.', '_')}"
    return hole.arg if count == 1 and len(hole.arg) > 1 else f"{_label(hole.path)}_{hole.arg}"
