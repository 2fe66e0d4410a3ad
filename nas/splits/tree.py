"""The supernets of a run with splits: what each of them searches, where its run is, and which serves an architecture.

    RUN/                       the root: the folder of an ordinary run; its split.json says into what it was split
    RUN/nodes/0, RUN/nodes/1   its children, ordinary runs too
    RUN/nodes/0.1              a child of the first

Every node is built for the recipe's whole space and searches a restriction of it, so weights, alphas and optimizers of all
have one shape. Nodes that were not split are the leaves; each architecture belongs to exactly one (``nas.splits.regions``).
"""
from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

from nas import checkpoint
from nas.build import Built
from nas.engine import seed_from
from nas.explain import section_of
from nas.protocols import Setup, Strategy
from nas.splits.regions import divide, holder, holds
from nas.splits.split import Split, ends
from search_spaces.space import Arch, SearchSpace, Setting, Value

NODES, SPLIT, CHECKPOINTS = "nodes", "split.json", "checkpoints"
FORMAT, VERSION = "nas-split", 1
SAYS: dict[str, Any] = {"choice": str, "groups": list, "measured": dict, "children": list, "inherit": str, "epoch": int,
                        "step": int, "repeats": int, "samples": int, "passes": int, "images": int,
                        "seconds": int | float}  # fmt: skip
"""What is read of a split.json."""


class Node(NamedTuple):
    """One supernet. ``path``: which child of which, () for the root. ``began``, ``ends``: epochs of the path from the root,
    those at which its weights or schedules began anew, and at which its own training ends. ``inherits``: what it took from its
    parent. ``cut``: the choices that were split on the way to it."""

    path: tuple[int, ...]
    space: SearchSpace
    folder: Path
    began: int
    ends: int
    last: bool
    inherits: str
    cut: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """"0.1"; "" for the root."""
        return ".".join(map(str, self.path))

    @property
    def called(self) -> str:
        return f"supernet {self.name}" if self.path else "the root supernet"

    @property
    def level(self) -> int:
        return len(self.path)


class Tree:
    """All nodes of the run in ``folder``, as far as there are any; and what is read of a trained strategy (``Served``).

    ``built``: the parts of the root, whose net and strategy stay as they are: every node has copies. ``split``, ``epochs``,
    ``seed``: of the recipe. ValueError for levels or arguments that do not fit (``Split``), and for a damaged split.json.
    """

    def __init__(self, built: Built, split: Split, folder: Path, epochs: int, seed: int) -> None:
        self.built, self.split, self.folder, self.seed = built, split, folder, seed
        self.epochs = ends(split, epochs)
        self.begins = [0]  # at which epoch the schedules of each level began
        for level, end in enumerate(self.epochs[:-1]):
            self.begins.append(self.begins[-1] if split.inherits(level) == "all" else end)
        self.until = [self._end(level) for level in range(split.levels + 1)]  # at which epoch they end
        self.searching = before(built.strategy, split.before)
        self._opened: dict[str, Built] = {}
        self._children: dict[str, list[Node]] = {}  # a split never changes

    def _end(self, level: int) -> int:
        """The end of the schedules of ``level``: of the run, or the first split from which only weights are taken over, which
        are trained to an end (page, section 2a)."""
        for number in range(level, self.split.levels):
            inherits = self.split.inherits(number)
            if inherits == "weights" and self.epochs[number] > self.begins[level]:
                return self.epochs[number]
            if inherits != "all":
                break
        return self.epochs[-1]

    # -- structure --------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Node:
        return Node((), self.built.space, self.folder, self.begins[0], self.epochs[0], self.split.levels == 0, "nothing")

    def children(self, node: Node) -> list[Node]:
        """What ``node`` was split into; none where it has not been split yet, or is a leaf. ValueError for a damaged file."""
        path = node.folder / SPLIT
        if node.name in self._children:
            return self._children[node.name]
        if node.last or not path.is_file():
            return []
        said = read_split(path)
        try:
            self._children[node.name] = self.born(node, said)
        except ValueError as error:
            raise ValueError(f"{path} is not a split of this run: {error} Delete it, and resume the run.") from None
        return self._children[node.name]

    def born(self, node: Node, said: Mapping[str, Any]) -> list[Node]:
        """The children that a split of ``node`` makes. ValueError where the space has no such choice and groups."""
        spaces = divide(node.space, said["choice"], said["groups"])
        inherits, level = self.split.inherits(node.level), node.level + 1
        began, end, last = self.begins[level], self.epochs[level], level == self.split.levels
        paths = [(*node.path, i) for i in range(len(spaces))]
        cut = (*node.cut, said["choice"])
        return [Node(path, space, self.folder / NODES / ".".join(map(str, path)), began, end, last, inherits, cut)
                for path, space in zip(paths, spaces)]  # fmt: skip

    def level(self, number: int) -> list[Node]:
        """The nodes after so many rounds of splits, in order."""
        nodes = [self.root]
        for _ in range(number):
            nodes = [child for node in nodes for child in self.children(node)]
        return nodes

    def nodes(self) -> Iterator[Node]:
        """All there are, each before its children."""
        waiting = [self.root]
        while waiting:
            node = waiting.pop(0)
            yield node
            waiting = self.children(node) + waiting

    def parent(self, node: Node) -> Node:
        return next(other for other in self.level(node.level - 1) if other.path == node.path[:-1])

    def leaf(self, arch: Mapping[str, Value]) -> Node:
        """The node that serves ``arch``: the leaf that holds its normal form, or what there is of it so far. So architectures
        that stand for one network have one leaf; where the root does not hold that form, the leaf that holds ``arch``."""
        space, node = self.built.space, self.root
        form = space.normal(arch)
        arch = form if holds(space, form) else space.root.canonical(arch)
        while children := self.children(node):
            node = children[holder([child.space for child in children], arch)]
        return node

    # -- one node ---------------------------------------------------------------------------------------------------

    def steps(self, node: Node) -> int:
        """At which step of its schedules the training of ``node`` ends."""
        return (node.ends - node.began) * self.built.setup.epoch_steps

    def seed_of(self, node: Node) -> int:
        """The root has the run's own."""
        return seed_from(self.seed, "node", node.name) if node.path else self.seed

    def config(self, node: Node, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the run of ``node`` computes, of the ``config`` of the whole: a search of its own in a part of the space."""
        if not node.path:
            return dict(config)
        part = {choice.name: list(choice.options) for choice, whole in zip(node.space.choices, self.built.net.space.choices)
                if choice.options != whole.options and choice.name not in node.space.ties}  # fmt: skip
        own = {**config, "seed": self.seed_of(node), "epochs": self.until[node.level] - node.began, "part": part}
        own.pop("split", None)
        if not node.last and "init_args" in config.get("strategy", {}):
            own["strategy"] = _merged(config["strategy"], {"init_args": self.split.before})
        return json.loads(json.dumps(own))

    def build(self, node: Node) -> Built:
        """Fresh parts for ``node``, whose strategy has not started. Its weights are those of the run's begin, or new ones."""
        net = copy.deepcopy(self.built.net)
        if node.inherits == "nothing" and node.path:
            net.reset(torch.Generator().manual_seed(seed_from(self.seed_of(node), "weights")))
        strategy, setup = self.parts(node.level)
        setup = setup._replace(net=net, space=node.space)
        return dataclasses.replace(self.built, net=net, space=node.space, strategy=strategy, setup=setup)

    def parts(self, level: int) -> tuple[Strategy, Setup]:
        """A strategy that has not started, and what it starts with: as of every supernet of ``level``, but for the root's net
        and space."""
        steps = (self.until[level] - self.begins[level]) * self.built.setup.epoch_steps
        strategy = self.built.strategy if level == self.split.levels else self.searching
        return _fresh(strategy, {}, ""), self.built.setup._replace(steps=steps)

    def open(self, node: Node) -> Built:
        """The parts of ``node``, started and as its last checkpoint has them. FileNotFoundError where it has none, ValueError
        where none is readable."""
        payload, _ = checkpoint.load(node.folder / CHECKPOINTS, self.built.device)
        built = self.build(node)
        torch.manual_seed(seed_from(self.seed_of(node), "start"))
        built.strategy.start(built.setup)
        checkpoint.restore(built.strategy, payload["strategy"], node.folder / CHECKPOINTS)
        return dataclasses.replace(built, step=payload["step"])

    def begun(self, node: Node) -> int:
        """At which step of its schedules ``node`` goes on with what its parent did."""
        before = self.epochs[node.level - 1] if node.path else 0
        return max(before - node.began, 0) * self.built.setup.epoch_steps

    def done(self, node: Node) -> int:
        """The steps that ``node`` has behind it, those of a parent whose schedules it went on with included."""
        return int(checkpoint.load(node.folder / CHECKPOINTS)[0]["step"]) if saved(node.folder) else 0

    def trained(self) -> Built:
        """The parts of the root, in the place of whose strategy the tree serves. ``step``: of all supernets together."""
        leaves = self.level(self.split.levels)
        finished = bool(leaves) and all(self.done(leaf) == self.steps(leaf) for leaf in leaves)
        step = sum(self.done(node) - (self.begun(node) if self.done(node) else 0) for node in self.nodes())
        return dataclasses.replace(self.built, tree=self, step=step, finished=finished)

    # -- readings ---------------------------------------------------------------------------------------------------

    def server(self, arch: Mapping[str, Value]) -> Node:
        """The node whose weights serve ``arch``: its leaf, or the last node on the way there that has been trained."""
        return self._trained(self.leaf(arch))

    def servers(self) -> list[Node]:
        """All nodes whose weights serve, in order: of a finished run its leaves."""
        found = [self._trained(node) for node in self.nodes() if not self.children(node)]
        return list({node.path: node for node in found}.values())

    def _trained(self, node: Node) -> Node:
        while node.path and not saved(node.folder):
            node = self.parent(node)
        return node

    def serving(self, arch: Mapping[str, Value]) -> Built:
        """The trained parts of the ``server`` of ``arch``."""
        node = self.server(arch)
        if node.name not in self._opened:
            self._opened[node.name] = self.open(node)
        return self._opened[node.name]

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """The weights that serve ``arch``, which is hard: those of its leaf."""
        return self.serving(arch).strategy.network(arch)  # type: ignore[arg-type]

    def fits(self, arch: Mapping[str, Value]) -> bool:
        return self.serving(arch).strategy.fits(arch)

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """Nothing: every leaf believes for itself."""
        return {}

    def architecture(self) -> Arch:
        """The largest network; ``nas.splits.grow`` chooses among what the leaves derive."""
        return self.built.space.largest()


def before(strategy: Strategy, changes: Mapping[str, Any]) -> Strategy:
    """A copy of ``strategy``, not started, with other arguments, also of arguments that are dataclasses: {"alphas": {"lr": 0}}.
    ValueError for unknown names and for values that do not fit."""
    try:
        return _fresh(strategy, changes, "split.before")
    except TypeError as error:
        raise ValueError(f"split.before = {dict(changes)} does not fit {type(strategy).__name__}: {error}.") from error


def _fresh(part: Any, changes: Mapping[str, Any], where: str) -> Any:
    """``part`` made anew of its arguments and ``changes``, with what is made of them (a budget that has started, an alpha) in
    none of the two."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        if changes:
            raise ValueError(f"{where}: {type(part).__name__} has no arguments to change. Give a value.")
        return copy.copy(part)
    fields = [field.name for field in dataclasses.fields(part) if field.init]
    for name in changes:
        if name not in fields:
            raise ValueError(f"{where}.{name} is not an argument of {type(part).__name__}. Allowed: {', '.join(fields)}.")
    values = {}
    for name in fields:
        old, new = getattr(part, name), changes.get(name)
        if dataclasses.is_dataclass(old) and (name not in changes or isinstance(new, Mapping)):
            values[name] = _fresh(old, new or {}, f"{where}.{name}")
        elif isinstance(new, Mapping) and (kind := section_of(get_type_hints(type(part))[name])):
            values[name] = kind(**new)
        elif name in changes:
            values[name] = new
    return dataclasses.replace(part, **values)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, section by section."""
    deep = {key: _merged(base[key], value) for key, value in changes.items()
            if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)}  # fmt: skip
    return {**base, **changes, **deep}


def saved(folder: Path) -> bool:
    """Whether the run in ``folder`` has a checkpoint."""
    return any((folder / CHECKPOINTS / name).exists() for name in ("last.pt", "previous.pt"))


def read_split(path: Path) -> dict[str, Any]:
    """A split.json. ValueError where it is none."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Delete it, and resume the run.") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT or said.get("version") != VERSION:
        raise ValueError(f"{path} is not a {FORMAT} of version {VERSION}. Delete it, and resume the run.")
    wrong = [name for name, kind in SAYS.items() if not isinstance(said.get(name), kind)]
    if wrong or not all(isinstance(group, list) and all(isinstance(option, Value) for option in group)
                        for group in said["groups"]):  # fmt: skip
        raise ValueError(f"{path}: {', '.join(wrong or ['groups'])} is missing or damaged. Delete it, and resume the run.")
    return said
