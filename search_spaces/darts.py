"""The cells of DARTS (Liu, Simonyan, Yang, ICLR 2019, arXiv 1806.09055) and the genotypes that others publish for them.

A cell reads states 0 and 1, the outputs of the two cells before it, and makes states 2, 3, ..: each node sums what the
operations on its incoming edges make of earlier states. All normal cells are the same, and all reduction cells.
"""
from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from search_spaces.choice import likeliest, listed, positive
from search_spaces.space import Arch, Choice, SearchSpace, Value, require

KINDS = ("normal", "reduce")
STEMS = ("cifar", "imagenet")
NONE = "none"
OPS = (NONE, "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
       "dil_conv_5x5")
KNOWN = (*OPS, "sep_conv_7x7", "conv_7x1_1x7")
Pairs = Sequence[tuple[str, int]]


class Genotype(NamedTuple):
    """A derived network as it is published. ``normal``, ``reduce``: (operation, state it reads), two a node, in node order.

    ``normal_concat``, ``reduce_concat``: the states that are concatenated into the cell's output.
    """

    normal: Pairs
    normal_concat: Sequence[int]
    reduce: Pairs
    reduce_concat: Sequence[int]


def _pairs(text: str) -> Pairs:
    return tuple((op, int(state)) for op, _, state in (word.partition("~") for word in text.split()))


_FOUR = (2, 3, 4, 5)
DARTS_V1 = Genotype(
    _pairs("sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~0 sep_conv_3x3~1 "
           "skip_connect~0 sep_conv_3x3~1 sep_conv_3x3~0 skip_connect~2"), _FOUR,
    _pairs("max_pool_3x3~0 max_pool_3x3~1 skip_connect~2 max_pool_3x3~0 "
           "max_pool_3x3~0 skip_connect~2 skip_connect~2 avg_pool_3x3~0"), _FOUR)
DARTS_V2 = Genotype(
    _pairs("sep_conv_3x3~0 sep_conv_3x3~1 sep_conv_3x3~0 sep_conv_3x3~1 "
           "sep_conv_3x3~1 skip_connect~0 skip_connect~0 dil_conv_3x3~2"), _FOUR,
    _pairs("max_pool_3x3~0 max_pool_3x3~1 skip_connect~2 max_pool_3x3~1 "
           "max_pool_3x3~0 skip_connect~2 skip_connect~2 max_pool_3x3~1"), _FOUR)
NASNET = Genotype(
    _pairs("sep_conv_5x5~1 sep_conv_3x3~0 sep_conv_5x5~0 sep_conv_3x3~0 avg_pool_3x3~1 skip_connect~0 "
           "avg_pool_3x3~0 avg_pool_3x3~0 sep_conv_3x3~1 skip_connect~1"), (2, 3, 4, 5, 6),
    _pairs("sep_conv_5x5~1 sep_conv_7x7~0 max_pool_3x3~1 sep_conv_7x7~0 avg_pool_3x3~1 sep_conv_5x5~0 "
           "skip_connect~3 avg_pool_3x3~2 sep_conv_3x3~2 max_pool_3x3~1"), (4, 5, 6))
AMOEBANET = Genotype(
    _pairs("avg_pool_3x3~0 max_pool_3x3~1 sep_conv_3x3~0 sep_conv_5x5~2 sep_conv_3x3~0 avg_pool_3x3~3 "
           "sep_conv_3x3~1 skip_connect~1 skip_connect~0 avg_pool_3x3~1"), (4, 5, 6),
    _pairs("avg_pool_3x3~0 sep_conv_3x3~1 max_pool_3x3~0 sep_conv_7x7~2 sep_conv_7x7~0 avg_pool_3x3~1 "
           "max_pool_3x3~0 max_pool_3x3~1 conv_7x1_1x7~0 sep_conv_3x3~5"), (3, 4, 6))


def edge(kind: str, node: int, source: int) -> str:
    """The choice of the operation that leads from state ``source`` to state ``node`` in cells of ``kind``."""
    return f"{kind}.node{node}.from{source}"


def parts(option: str) -> tuple[str, ...]:
    """The operations whose sum an option is: none for "none", two for "sep_conv_5x5+sep_conv_3x3", else itself."""
    return () if option == NONE else tuple(option.split("+"))


class Cells(SearchSpace):
    """Which operation leads from each state of a cell to each later node, in normal and in reduction cells.

    ``C``: channels of the first cell. ``layers``: cells. ``stem``: "cifar" or "imagenet". ``nodes``: nodes of a cell,
    states 2, 3, ... ``ops``: the options of every edge, "none" among them; known are the eight of the paper (default),
    sep_conv_7x7, conv_7x1_1x7, and sums of two such as "sep_conv_5x5+sep_conv_3x3" (published cells may read one state
    twice). ``normal_concat``, ``reduce_concat``: the nodes that form the output, None = all. Raises ValueError.

    Where all but two edges of each node are none, an architecture is a genotype; ``sample`` and ``derive`` give those,
    ``check`` accepts all. A restriction that forbids none on an edge keeps that edge always.
    """

    skips = ("skip_connect",)
    nones = (NONE,)

    def __init__(self, C: int = 16, layers: int = 8, stem: str = "cifar", nodes: int = 4, ops: Sequence[str] = OPS,
                 normal_concat: Sequence[int] | None = None, reduce_concat: Sequence[int] | None = None) -> None:
        self.C, self.layers = positive("C", C), positive("layers", layers)
        self.nodes, self.stem, self.ops = positive("nodes", nodes), stem, tuple(map(str, ops))
        require("stem", stem, STEMS)
        self._option = _by_parts(self.ops)  # what a set of operations on one edge is called here
        self.normal_concat = self._concat("normal_concat", normal_concat)
        self.reduce_concat = self._concat("reduce_concat", reduce_concat)
        names = [edge(kind, node, source) for kind in KINDS for node in self._states() for source in range(node)]
        args = {"C": C, "layers": layers, "stem": stem, "nodes": nodes}
        unusual = {"ops": (self.ops, OPS), "normal_concat": (self.normal_concat, self._states()),
                   "reduce_concat": (self.reduce_concat, self._states())}
        args |= {name: list(value) for name, (value, usual) in unusual.items() if value != usual}
        super().__init__([Choice(name, self.ops, ordered=False) for name in names], args,
                         dear=dict.fromkeys(names, "sep_conv_5x5") if "sep_conv_5x5" in self.ops else None,
                         cheap=dict.fromkeys(names, "skip_connect") if "skip_connect" in self.ops else None)

    @classmethod
    def of(cls, genotype: Genotype, C: int = 36, layers: int = 20, stem: str = "cifar") -> Cells:
        """A space that holds ``genotype``: its nodes and output, the paper's options and those that it uses besides."""
        ops = list(OPS)
        for pairs in (genotype.normal, genotype.reduce):
            for node in _grouped(pairs):
                for found in node.values():
                    if sorted(found) not in (sorted(parts(op)) for op in ops):
                        ops.append("+".join(found))
        return cls(C, layers, stem, len(genotype.normal) // 2, ops, genotype.normal_concat, genotype.reduce_concat)

    def _states(self) -> tuple[int, ...]:
        return tuple(range(2, self.nodes + 2))

    def _concat(self, name: str, given: Sequence[int] | None) -> tuple[int, ...]:
        states = self._states() if given is None else tuple(given)
        if not states or len(set(states)) < len(states) or not set(states) <= set(self._states()):
            raise ValueError(f"{name} = {list(states)}: give some of the nodes, each once: {listed(self._states())}.")
        return tuple(map(int, states))

    @property
    def genotypes(self) -> int:
        """How many genotypes the unrestricted space holds: two inputs a node, an operation on each, both kinds of cell.

        With sums among the options, one input with a sum of two counts too.
        """
        single, double = (sum(len(parts(op)) == n for op in self.ops) for n in (1, 2))
        return math.prod(math.comb(node, 2) * single**2 + node * double for node in self._states()) ** len(KINDS)

    def part(self, name: str) -> str:
        """"normal" or "reduce"."""
        return self[name].name.partition(".")[0]

    # ---- drawing and deriving -------------------------------------------------------------------------------------

    def sample(self, rng: random.Random) -> Arch:
        """Two distinct inputs a node, uniformly, each with a uniform operation other than none; followers set after.

        In a restriction, an input where none is forbidden is always among them (more than two stay more than two).
        """
        return self._cells(lambda edges: rng.sample(edges, len(edges)),
                           lambda choice: rng.choice(_some(choice.options)))

    def derive(self, probabilities: Mapping[str, Sequence[float]]) -> Arch:
        """Section 2.4 of the paper: each node keeps the two inputs whose strongest operation other than none is most
        probable, each with that operation; equal ones: the first. The others become none.

        ``probabilities``: softmax values, none in their denominator; not logits, which do not compare across edges.
        In a restriction, forbidden options are not read, an input where none is forbidden is always kept, and a node
        keeps fewer than two where no more can be kept.
        Followers are set after and take no part. Raises ValueError as ``SearchSpace.derive`` does.
        """
        odds = {name: {option: p for option, p in row.items() if option != NONE}
                for name, row in self._odds(probabilities).items()}
        return self._cells(
            lambda edges: sorted(edges, key=lambda choice: -max(odds[choice.name].values())),
            lambda choice: likeliest(odds[choice.name]) if choice.name in odds else choice.options[0])

    def _cells(self, rank: Callable[[list[Choice]], list[Choice]], pick: Callable[[Choice], Value]) -> Arch:
        """Each node with the edges that it must keep, filled up to two with the first that ``rank`` gives."""
        arch: Arch = dict.fromkeys(self._at, NONE)
        for at in self._nodes():
            edges = [choice for choice in self.choices[at] if choice.name not in self.ties]
            forced = [choice for choice in edges if NONE not in choice.options]
            spare = [choice for choice in edges if NONE in choice.options and len(choice.options) > 1]
            kept = forced + rank(spare)[:max(0, 2 - len(forced))]
            arch.update((choice.name, pick(choice)) for choice in kept)
        return self.canonical(self._follow(arch))

    def random_codes(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, M) int16: ``sample`` for many."""
        none = self.ops.index(NONE)
        codes = np.full((n, len(self.choices)), none, dtype=np.int16)
        for at in self._nodes():
            open_ = [i for i in range(at.start, at.stop)
                     if self.choices[i].name not in self.ties and self.choices[i].options != (NONE,)]
            forced = [NONE not in self.choices[i].options for i in open_]
            order = rng.random((n, len(open_))) - np.array(forced)  # forced ones lie below 0, so they come first
            kept = order.argsort(axis=1).argsort(axis=1) < max(2, sum(forced))
            for i, keeps in zip(open_, kept.T):
                places = np.array([self.ops.index(str(op)) for op in _some(self.choices[i].options)], dtype=np.int16)
                codes[:, i] = np.where(keeps, places[rng.integers(len(places), size=n)], none)
        return self._follow_codes(codes)

    def lawful(self, codes: np.ndarray) -> np.ndarray:
        """(N, M) -> (N,) bool: cells whose nodes have as many inputs as ``sample`` gives them, followers not counted."""
        met = np.ones(len(codes), dtype=bool)
        for at in self._nodes():
            free = [i for i in range(at.start, at.stop) if self.choices[i].name not in self.ties]
            open_ = [i for i in free if self.choices[i].options != (NONE,)]
            forced = sum(NONE not in self.choices[i].options for i in open_)
            met &= (codes[:, free] != self.ops.index(NONE)).sum(axis=1) == min(len(open_), max(2, forced))
        return met

    def _nodes(self) -> Iterator[slice]:
        """Where the edges of each node stand among the choices."""
        start = 0
        for _ in KINDS:
            for node in self._states():
                yield slice(start, start + node)
                start += node

    # ---- genotypes and text ---------------------------------------------------------------------------------------

    def arch_of(self, genotype: Genotype) -> Arch:
        """The architecture of ``genotype``. Raises ValueError where this space does not hold it: see ``of``."""
        arch: Arch = {}
        for kind, pairs, concat, mine in (("normal", genotype.normal, genotype.normal_concat, self.normal_concat),
                                          ("reduce", genotype.reduce, genotype.reduce_concat, self.reduce_concat)):
            if tuple(concat) != mine:
                raise ValueError(f"{kind}_concat = {list(concat)}, here it is {list(mine)}. Use Cells.of(genotype).")
            arch |= self._wired(kind, _grouped(pairs))
        return arch

    def genotype(self, arch: Mapping[str, Value]) -> Genotype:
        """``arch`` in published form, the inputs of each node ascending (published ones stand in order of strength).

        Raises ValueError where a node does not have exactly two operations.
        """
        self.root.check(arch)
        flat: dict[str, list[tuple[str, int]]] = {}
        for kind in KINDS:
            flat[kind] = []
            for node in self._states():
                pairs = self._entries(arch, kind, node)
                if len(pairs) != 2:
                    raise ValueError(f"{kind}.node{node} has {len(pairs)} operations; a genotype has two a node. "
                                     "derive and sample give such architectures.")
                flat[kind] += pairs
        return Genotype(tuple(flat["normal"]), self.normal_concat, tuple(flat["reduce"]), self.reduce_concat)

    def text(self, arch: Mapping[str, Value]) -> str:
        """One line: ``normal:|op~0|op~1|+|op~0|op~2|+.. reduce:|..``, for each node its operations and what they read.

        Edges with none are left out; a node without any is ``|``.
        """
        arch = self.canonical(arch)
        return " ".join(f"{kind}:" + "+".join(
            "|" + "".join(f"{op}~{source}|" for op, source in self._entries(arch, kind, node))
            for node in self._states()) for kind in KINDS)

    def parse(self, text: str) -> Arch:
        """The architecture of such a line. Raises ValueError for another form and what this space does not hold."""
        found = re.fullmatch(r"normal:(\S+)\s+reduce:(\S+)", text.strip())
        cells = [cell.split("+") for cell in found.groups()] if found else []
        if not cells or not all(re.fullmatch(r"\|(\w+~\d+\|)*", node, re.ASCII) for cell in cells for node in cell):
            raise ValueError(f"{text!r} is not a pair of cells. They are written normal:|op~0|op~1|+|op~0|op~2| "
                             "reduce:|op~0|op~1|+|op~1|op~2|, here with two nodes each.")
        arch: Arch = {}
        for kind, cell in zip(KINDS, cells):
            arch |= self._wired(kind, [_by_source(_pairs(node.replace("|", " "))) for node in cell])
        return arch

    def _entries(self, arch: Mapping[str, Value], kind: str, node: int) -> list[tuple[str, int]]:
        """(operation, state it reads) of one node, by state."""
        return [(op, source) for source in range(node) for op in parts(str(arch[edge(kind, node, source)]))]

    def _wired(self, kind: str, nodes: Sequence[Mapping[int, Sequence[str]]]) -> Arch:
        """One kind of cell; ``nodes``: for each, the operations on every state that it reads."""
        if len(nodes) != self.nodes:
            raise ValueError(f"{kind} has {len(nodes)} nodes, this space has {self.nodes}.")
        arch: Arch = {}
        for node, read in zip(self._states(), nodes):
            arch |= dict.fromkeys((edge(kind, node, source) for source in range(node)), NONE)
            for source, ops in read.items():
                if not 0 <= source < node:
                    raise ValueError(f"{kind}.node{node} cannot read state {source}. Allowed: 0 to {node - 1}.")
                some = [op for op in ops if op != NONE]
                option = self._option.get(tuple(sorted(some)), "+".join(some))
                require(edge(kind, node, source), option, self.ops)
                arch[edge(kind, node, source)] = option
        return arch


def _some(options: Sequence[Value]) -> list[Value]:
    return [option for option in options if option != NONE]


def _by_parts(ops: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Operations, sorted -> the option that is their sum. Raises ValueError for what ``Cells`` does not take."""
    found: dict[tuple[str, ...], str] = {}
    for option in ops:
        single = option.split("+")
        if len(single) > 2 or (NONE in single and len(single) > 1):
            raise ValueError(f"ops holds {option}. Allowed: one operation, or a sum of two other than none.")
        for op in single:
            require("ops", op, KNOWN)
        if tuple(sorted(parts(option))) in found:
            raise ValueError(f"ops lists {option} twice: {listed(ops)}.")
        found[tuple(sorted(parts(option)))] = option
    if () not in found or len(found) < 2:
        raise ValueError(f"ops = {listed(ops)}: give none and at least one other operation.")
    return found


def _by_source(pairs: Pairs) -> dict[int, list[str]]:
    """State that is read -> the operations that read it."""
    found: dict[int, list[str]] = {}
    for op, source in pairs:
        found.setdefault(source, []).append(op)
    return found


def _grouped(pairs: Pairs) -> list[dict[int, list[str]]]:
    """The entries of a genotype by node, two each. Raises ValueError for an odd number of them."""
    if len(pairs) % 2:
        raise ValueError(f"A genotype has two entries a node; here are {len(pairs)} in a cell.")
    return [_by_source(pairs[i:i + 2]) for i in range(0, len(pairs), 2)]
