"""Reads a flat, plain ``torch.fx`` graph back as the tree of modules that its names and scopes describe.

Words: a *leaf* is one ``torch.nn`` module; a *group* is an inner path ("stages.0.1") with everything below it. A group
is a ``chain`` (calls its members one after the other), a ``block`` (has one output, so it can have its own forward)
or a ``holder`` (anything else: it only keeps names, and its steps belong to the nearest block above).
"""
from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

UNREAD = ("device", "dtype")  # constructor arguments that the weights decide


@dataclass
class Leaf:
    """One ``torch.nn`` module. ``arguments``: all that its constructor takes, in the order of its signature."""

    path: str
    kind: str
    arguments: dict[str, Any]
    defaults: dict[str, Any]


@dataclass
class Weight:
    """A parameter or buffer that the graph reads directly."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: bool
    grad: bool


@dataclass
class Step:
    """One line of a forward. ``path``: the leaf or group that is called; None: a function or method."""

    node: fx.Node
    path: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Group:
    """An inner path. ``inputs``: the nodes its forward takes, in order of first use; ``output``: the one it returns."""

    path: str
    kind: str  # "chain" | "block" | "holder"
    name: str  # what a class printed for it would be called
    children: dict[str, Leaf | Weight | Group] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    output: Any = None

    @property
    def numbered(self) -> bool:
        """Whether the members are called 0, 1, 2, ... as in ``nn.Sequential``."""
        return list(self.children) == [str(i) for i in range(len(self.children))]


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes of nested arguments, in order."""
    found: list[fx.Node] = []
    map_arg(value, lambda node: found.append(node))
    return found


def read_leaf(path: str, module: nn.Module) -> Leaf:
    """The constructor call that makes ``module``: read from its attributes, then proven by making it once more.

    Raises ValueError where the class is not one of ``torch.nn`` or an argument cannot be read back.
    """
    kind = type(module).__name__
    if getattr(nn, kind, None) is not type(module):
        raise ValueError(f"{path} is a {type(module).__module__}.{kind}. model.py holds torch.nn modules only: "
                         "let its leaf return plain torch.nn modules.")
    arguments: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in UNREAD or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if not hasattr(module, name):
            if parameter.default is parameter.empty:
                raise ValueError(f"{path}: nn.{kind} does not keep its argument {name!r}, so it cannot be printed.")
            continue  # the proof below fails if the default is not what the module was made with
        value = getattr(module, name)
        if isinstance(value, Tensor) or name in module._parameters:
            value = value is not None
        arguments[name] = value
        if parameter.default is not parameter.empty:
            defaults[name] = parameter.default
    difference = _difference(module, arguments)
    if difference:
        raise ValueError(f"{path}: nn.{kind} cannot be printed, its constructor does not give {difference!r} back.")
    for name, value in arguments.items():
        if isinstance(value, tuple) and value and type(value[0]) is int and len(set(value)) == 1:
            shorter = {**arguments, name: value[0]}  # kernel_size=(3, 3) is written 3 where the module cannot tell
            if not _difference(module, shorter):
                arguments = shorter
    return Leaf(path, kind, arguments, defaults)


def _difference(module: nn.Module, arguments: dict[str, Any]) -> str:
    """The first attribute or state-dict key in which ``module`` differs from one made of ``arguments``; "" if none."""
    try:
        with torch.device("meta"):
            again = type(module)(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    for name, value in vars(again).items():
        if name == "training" or name in ("_parameters", "_buffers", "_modules"):
            continue
        mine = vars(module).get(name)
        if name.startswith("_") and name.endswith("_hooks"):
            if bool(mine) != bool(value):
                return name
        elif isinstance(value, (int, float, str, tuple, list)) and (mine != value or type(mine) is not type(value)):
            return name
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (module, again)]
    return next((key for key in [*shapes[0], *shapes[1]] if shapes[0].get(key) != shapes[1].get(key)), "")


def read_tree(graph: fx.GraphModule) -> Group:
    """The root group of ``graph``; its steps are the forward of the whole network.

    Raises ValueError for modules other than ``torch.nn``'s, and where the graph keeps weights that it never uses.
    """
    tree = _Reading(graph).group("")
    tree.kind, tree.name = "block", "Network"
    printed = set(_keys(tree, graph))
    unused = [key for key in graph.state_dict() if key not in printed]
    if unused:
        raise ValueError(f"{unused[0]} is in the state dict but no node uses it. "
                         "Call graph.delete_all_unused_submodules() before printing.")
    return tree


def _keys(member: Leaf | Weight | Group, graph: fx.GraphModule) -> Iterable[str]:
    if isinstance(member, Group):
        for child in member.children.values():
            yield from _keys(child, graph)
    elif isinstance(member, Weight):
        yield member.path
    else:
        yield from (f"{member.path}.{key}" for key in graph.get_submodule(member.path).state_dict())


class _Reading:
    """One pass over a graph: which nodes count, who owns them, and the groups made of that."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        order = list(graph.graph.nodes)
        self.output = order[-1]
        # Modules whose result nobody reads count: their weights are in the state dict. Other dead nodes would give a group
        # outputs that nobody reads.
        alive = {self.output, *(node for node in order if node.op == "call_module")}
        for node in reversed(order):
            if node in alive:
                alive.update(node.all_input_nodes)
        self.nodes = [n for n in order if n in alive and n.op not in ("placeholder", "output")]
        self.position = {node: i for i, node in enumerate(order)}
        self.placeholders = [n for n in order if n.op == "placeholder"]
        targets = [str(n.target) for n in self.nodes if n.op in ("call_module", "get_attr")]
        self.inner = {""} | {path.rsplit(".", i)[0] for path in targets for i in range(1, path.count(".") + 1)}
        self.classes: dict[str, str] = {}
        self.owner: dict[fx.Node, str] = {}
        prefix = self._prefix(targets)
        self.scoped = any("nn_module_stack" in node.meta for node in self.nodes)
        for node in reversed(self.nodes):  # users first: where no scopes were kept, a node belongs to where it is used
            self.owner[node] = self._owner(node, prefix)
        self.below: dict[str, list[fx.Node]] = {path: [] for path in self.inner}
        for node in self.nodes:
            path = self.owner[node]
            for inner in {path, *(path.rsplit(".", i)[0] for i in range(1, path.count(".") + 1)), ""}:
                self.below[inner].append(node)

    def _prefix(self, targets: list[str]) -> str:
        """"net." where the net was traced inside a module that holds it as ``net`` and the targets lost that name."""
        scopes = [key for node in self.nodes for key in node.meta.get("nn_module_stack", {})]
        first = {key.split(".")[0].split("@")[0] for key in scopes}
        if len(first) == 1 and not first & {path.split(".")[0] for path in targets}:
            return next(iter(first)) + "."
        return ""

    def _owner(self, node: fx.Node, prefix: str) -> str:
        stack = node.meta.get("nn_module_stack", {})
        scopes = []
        for key, entry in stack.items():
            path = f"{key.split('@')[0]}.".removeprefix(prefix).removesuffix(".")  # "block@1": called a second time
            kind = entry[1] if isinstance(entry, tuple) else ""
            self.classes[path] = kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]
            scopes.append(path)
        if node.op in ("call_module", "get_attr"):
            return str(node.target).rpartition(".")[0]
        if self.scoped:  # tracing gives the nodes of the root no scope
            return next((path for path in reversed(scopes) if path in self.inner), "")
        users = [self.owner[user].split(".") if user in self.owner else [] for user in node.users if self.alive(user)]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*users))
        return ".".join(parts[0] for parts in shared)

    def alive(self, node: fx.Node) -> bool:
        return node is self.output or node in self.owner

    def group(self, path: str) -> Group:
        """The group at ``path``, with the groups inside it."""
        group = Group(path, "holder", self._class_name(path))
        inside = set(self.below[path])
        groups: list[Group] = []
        steps: list[Step] = []
        for node in self.below[path]:
            if node.op in ("call_module", "get_attr"):
                name, _, rest = str(node.target)[len(path) + bool(path):].partition(".")
                if name not in group.children:
                    full = f"{path}.{name}" if path else name
                    group.children[name] = self.group(full) if rest else self.member(full)
                    if rest:
                        groups.append(group.children[name])  # type: ignore[arg-type]
            if self.owner[node] == path and node.op != "get_attr":
                called = str(node.target) if node.op == "call_module" else None
                steps.append(Step(node, called, node.args, dict(node.kwargs)))
        for child in groups:
            if child.kind == "holder":
                steps.extend(child.steps)
            else:
                steps.append(Step(child.output, child.path, tuple(child.inputs), {}))
        # A group with one output is complete when that output is: this order is a topological one.
        group.steps = sorted(steps, key=lambda step: self.position[step.node])
        if path == "":
            group.inputs, group.output = self.placeholders, self.output.args[0]
            return group
        used = [node for step in group.steps for node in nodes_in((step.args, step.kwargs))]
        group.inputs = list(dict.fromkeys(node for node in used if node not in inside))
        leaving = [n for n in self.below[path] if any(self.alive(user) and user not in inside for user in n.users)]
        if len(leaving) == 1 and group.inputs:
            group.output = leaving[0]
            group.kind = "chain" if _is_chain(group) else "block"
        return group

    def member(self, path: str) -> Leaf | Weight | Group:
        """What the graph calls or reads at ``path``; an ``nn.Sequential`` called whole is a chain of its modules."""
        parent, _, name = path.rpartition(".")
        value = getattr(self.graph.get_submodule(parent), name)
        if isinstance(value, Tensor):
            if not name.isidentifier():
                raise ValueError(f"{path}: a weight needs a name that is a Python identifier.")
            is_parameter = isinstance(value, nn.Parameter)
            return Weight(path, tuple(value.shape), value.dtype, is_parameter, value.requires_grad)
        if type(value) is nn.Sequential:
            children = {key: self.member(f"{path}.{key}") for key in value._modules}
            return Group(path, "chain", self._class_name(path), children)
        return read_leaf(path, value)

    def _class_name(self, path: str) -> str:
        name = self.classes.get(path, "")
        if name and not hasattr(nn, name) and name.isidentifier():
            return name
        words = [part for part in path.split(".") if not part.isdigit()]
        letters = "".join(c if c.isalnum() else "_" for c in words[-1]) if words else "Block"
        name = "".join(word[:1].upper() + word[1:] for word in letters.split("_"))
        return name if name.isidentifier() else f"Block{name}"


def _is_chain(group: Group) -> bool:
    """Whether the group calls each of its members once, each on what the one before returned."""
    if len(group.inputs) != 1 or len(group.steps) != len(group.children):
        return False
    last = group.inputs[0]
    for step, (name, child) in zip(group.steps, group.children.items()):
        called = f"{group.path}.{name}"
        if step.path != called or step.args != (last,) or step.kwargs or isinstance(child, Weight):
            return False
        last = step.node
    return True
