"""The cells of NASNet (Zoph, Vasudevan, Shlens, Le, CVPR 2018, arXiv 1707.07012) and NASNet-A as published.

A cell reads states 0 (the output of the cell before it, squeezed to F channels) and 1 (of the one before that, adjusted).
Block b makes state b + 1: one operation on each of two earlier states, and the two results added or concatenated. Some of
the states, concatenated, are the output. All normal cells are the same, and all reduction cells.
"""
from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from search_spaces.choice import positive
from search_spaces.count import count
from search_spaces.space import Arch, Choice, SearchSpace, Value, require

KINDS = ("normal", "reduce")
SKELETONS = ("cifar", "imagenet")
SIDES = ("left", "right")
COMBINES = ("add", "concat")
OPS = ("identity", "conv_1x3_3x1", "conv_1x7_7x1", "dil_conv_3x3", "avg_pool_3x3", "max_pool_3x3", "max_pool_5x5",
       "max_pool_7x7", "conv_1x1", "conv_3x3", "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7")
SIGNS = dict(zip(COMBINES, "+|"))
WORD = re.compile(r"(\w+)\((\d)\)([+|])(\w+)\((\d)\)", re.ASCII)


class Block(NamedTuple):
    """Two operations, the states that they read, and how the results become one state."""

    left: str
    left_input: int
    right: str
    right_input: int
    combine: str = "add"


class Genotype(NamedTuple):
    """A pair of cells as it is published. ``normal_concat``, ``reduce_concat``: the states that form the output."""

    normal: Sequence[Block]
    normal_concat: Sequence[int]
    reduce: Sequence[Block]
    reduce_concat: Sequence[int]


def block(word: str) -> Block:
    """The block that is written ``sep_conv_5x5(0)+sep_conv_3x3(1)``, with | for a concatenation. ValueError for other forms."""
    found = WORD.fullmatch(word)
    if not found:
        raise ValueError(f"{word!r} is not a block. It is written op(state)+op(state), or with | for a concatenation.")
    left, i, sign, right, j = found.groups()
    return Block(left, int(i), right, int(j), next(name for name in COMBINES if SIGNS[name] == sign))


def _blocks(text: str) -> tuple[Block, ...]:
    return tuple(map(block, text.split()))


NASNET_A = Genotype(  # its lists hold a state that is read besides (1, and 3 of the reduction): by the rule, 5F and 3F
    _blocks("sep_conv_5x5(0)+sep_conv_3x3(1) sep_conv_5x5(1)+sep_conv_3x3(1) avg_pool_3x3(0)+identity(1) "
            "avg_pool_3x3(1)+avg_pool_3x3(1) sep_conv_3x3(0)+identity(0)"), (1, 2, 3, 4, 5, 6),
    _blocks("sep_conv_5x5(0)+sep_conv_7x7(1) max_pool_3x3(0)+sep_conv_7x7(1) avg_pool_3x3(0)+sep_conv_5x5(1) "
            "identity(3)+avg_pool_3x3(2) sep_conv_3x3(2)+max_pool_3x3(0)"), (3, 4, 5, 6))
PUBLISHED = {"NASNET_A": NASNET_A}
CIFAR: Mapping[str, Any] = {"N": 6, "F": 32}
MOBILE: Mapping[str, Any] = {"N": 4, "F": 44, "skeleton": "imagenet"}
LARGE: Mapping[str, Any] = {"N": 6, "F": 168, "skeleton": "imagenet", "stem_filters": 96, "skip_reduction_layer_input": True}


def choice(kind: str, b: int, what: str) -> str:
    """The name of a choice of block b, ``what``: left.input, left.op, right.input, right.op or combine."""
    return f"{kind}.block{b}.{what}"


def concat(kind: str) -> str:
    """The name of the choice of the states that form the output of cells of ``kind``."""
    return f"{kind}.concat"


class NASNet(SearchSpace):
    """Two inputs, two operations and a combination for each block of normal and of reduction cells, and the output.

    ``N``: normal cells a stage. ``F``: channels of the first stage, even; on ImageNet divisible by 4. ``skeleton``: "cifar",
    or "imagenet" with ``stem_filters`` channels in its first convolution (32 mobile, 96 large) and two stem cells.
    ``skip_reduction_layer_input``: the cell after a reduction reads, as state 1, what the reduction read so (large).
    ``blocks``: of a cell. Raises ValueError.

    The output is a choice too, written as the digits of its states: a published list may hold states that are read besides.
    Where all lists are allowed, ``sample``, ``derive`` and the extremes set it to the states that no block reads, and ``size``
    counts these networks alone. A restriction of it names the lists, one of which is drawn. ``check`` accepts any list.
    """

    skips = ("identity",)

    def __init__(self, N: int = 6, F: int = 32, skeleton: str = "cifar", stem_filters: int | None = None,
                 skip_reduction_layer_input: bool = False, blocks: int = 5) -> None:
        require("skeleton", skeleton, SKELETONS)
        self.N, self.F, self.skeleton = positive("N", N), positive("F", F), skeleton
        self.blocks, step = positive("blocks", blocks), 2 if skeleton == "cifar" else 4
        if F % step:
            raise ValueError(f"F = {F} cannot be halved as this skeleton asks. Allowed: multiples of {step}.")
        if blocks > 8:
            raise ValueError(f"blocks = {blocks}: states are written as one digit. Allowed: 1 to 8.")
        if stem_filters is not None and skeleton == "cifar":
            raise ValueError(f"stem_filters = {stem_filters}: the stem of CIFAR has 3 F = {3 * F} channels. Leave it out.")
        self.stem_filters = 32 if stem_filters is None else positive("stem_filters", stem_filters)
        self.skip_reduction_layer_input = bool(skip_reduction_layer_input)
        unusual = {"stem_filters": (stem_filters, None), "blocks": (blocks, 5),
                   "skip_reduction_layer_input": (self.skip_reduction_layer_input, False)}
        args = {"N": N, "F": F, "skeleton": skeleton, **{name: v for name, (v, usual) in unusual.items() if v != usual}}
        choices, dear, cheap = [], dict[str, Value](), dict[str, Value]()
        for kind in KINDS:
            free = "identity" if kind == "normal" else "max_pool_3x3"  # a strided identity is a convolution
            for b in self.numbers():
                for i, side in enumerate(SIDES):
                    read, op = choice(kind, b, f"{side}.input"), choice(kind, b, f"{side}.op")
                    choices += [Choice(read, tuple(range(b + 1)), ordered=False), Choice(op, OPS, ordered=False)]
                    dear |= {read: i, op: "conv_1x7_7x1"}
                    cheap |= {read: b if b > 1 else i, op: free}  # a chain: one state is left for the output
                choices.append(Choice(choice(kind, b, "combine"), COMBINES, ordered=False))
                dear[choices[-1].name], cheap[choices[-1].name] = "concat", "add"
            choices.append(Choice(concat(kind), self._lists(), ordered=False))
        super().__init__(choices, args, dear=dear, cheap=cheap)

    def numbers(self) -> range:
        """The blocks, 1, 2, ...; block b makes state b + 1."""
        return range(1, self.blocks + 1)

    def _lists(self) -> tuple[str, ...]:
        """Every output: the last state, which nothing can read, and any of the others."""
        others = [itertools.combinations(range(self.blocks + 1), n) for n in range(self.blocks + 2)]
        return tuple("".join(map(str, (*states, self.blocks + 1))) for states in itertools.chain.from_iterable(others))

    def part(self, name: str) -> str:
        """"normal" or "reduce"."""
        return self[name].name.partition(".")[0]

    # ---- size, drawing, deriving ------------------------------------------------------------------------------------

    @functools.cached_property
    def size(self) -> int:  # type: ignore[override]
        """How many networks there are, left and right told apart, outputs by the rule where all are allowed."""
        decided = {*self.ruled, *(name for name, tie in self.ties.items() if tie.leader in self.ruled)}
        return count([c for c in self.choices if c.name not in decided], self.ties)

    @property
    def ruled(self) -> tuple[str, ...]:
        """The outputs of which all lists are allowed and that follow no other choice."""
        return tuple(self._ruled())

    @property
    def pairs(self) -> int:
        """How many pairs of cells the unrestricted space holds, left and right not told apart."""
        inputs = (len(OPS) * (b + 1) for b in self.numbers())
        return math.prod(len(COMBINES) * math.comb(n + 1, 2) for n in inputs) ** len(KINDS)

    def _ruled(self) -> dict[str, str]:
        """The outputs that the rule decides: name -> kind."""
        return {concat(kind): kind for kind in KINDS if concat(kind) not in self.ties
                and self[concat(kind)].options == self.root[concat(kind)].options}

    def unread(self, arch: Mapping[str, Value], kind: str) -> str:
        """The digits of the states that no block reads."""
        read = {arch[choice(kind, b, f"{side}.input")] for b in self.numbers() for side in SIDES}
        return "".join(str(state) for state in range(self.blocks + 2) if state not in read)

    def _closed(self, arch: Arch) -> Arch:
        """``arch`` with the outputs that the rule decides."""
        return self._follow(arch | {name: self.unread(arch, kind) for name, kind in self._ruled().items()})

    def largest(self) -> Arch:
        return self._closed(super().largest())

    def smallest(self) -> Arch:
        return self._closed(super().smallest())

    def sample(self, rng: random.Random) -> Arch:
        """Uniform in every free choice, followers set, outputs by the rule."""
        return self._closed(super().sample(rng))

    def derive(self, probabilities: Mapping[str, Sequence[float]]) -> Arch:
        """As ``SearchSpace.derive``; outputs by the rule."""
        return self._closed(super().derive(probabilities))

    def random_codes(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, M) int16: ``sample`` for many."""
        return self._closed_codes(super().random_codes(rng, n))

    def lawful(self, codes: np.ndarray) -> np.ndarray:
        """(N, M) -> (N,) bool: outputs by the rule."""
        return (self._closed_codes(codes.copy()) == codes).all(axis=1)

    def _closed_codes(self, codes: np.ndarray) -> np.ndarray:
        """``_closed`` for codes (N, M), which it may change."""
        for name, kind in self._ruled().items():
            read = np.zeros((len(codes), self.blocks + 2), dtype=bool)
            for b in self.numbers():
                for side in SIDES:
                    read[np.arange(len(codes)), codes[:, self._at[choice(kind, b, f"{side}.input")]]] = True
            keys = (~read[:, :-1]) @ 2 ** np.arange(self.blocks + 1)
            codes[:, self._at[name]] = self._positions[keys]
        return self._follow_codes(codes)

    @functools.cached_property
    def _positions(self) -> np.ndarray:
        """Sum of 2^state of the states of a list before the last -> its position among the lists."""
        found = np.zeros(2 ** (self.blocks + 1), dtype=np.int16)
        for at, states in enumerate(self._lists()):
            found[sum(2 ** int(state) for state in states[:-1])] = at
        return found

    def key(self, arch: Mapping[str, Value]) -> tuple:
        """Equal for architectures that differ in what is left and what is right alone: the order of a sum, or of the
        channels of a concatenation."""
        genotype = self.genotype(arch)
        return tuple(
            (tuple((tuple(sorted(((g.left_input, g.left), (g.right_input, g.right)))), g.combine) for g in blocks), tuple(out))
            for blocks, out in (genotype[:2], genotype[2:]))

    # ---- genotypes and text -----------------------------------------------------------------------------------------

    def arch_of(self, genotype: Genotype) -> Arch:
        """The architecture of ``genotype``. Raises ValueError where this space does not hold it."""
        return self._arch({"normal": genotype[:2], "reduce": genotype[2:]})

    def _arch(self, cells: Mapping[str, tuple[Any, Any]]) -> Arch:
        """Kind -> (blocks, output; None: by the rule)."""
        arch: Arch = {}
        for kind, (blocks, out) in cells.items():
            if len(blocks) != self.blocks:
                raise ValueError(f"{kind} has {len(blocks)} blocks, this space has {self.blocks}.")
            for b, found in zip(self.numbers(), blocks):
                for what, value in zip(("left.op", "left.input", "right.op", "right.input", "combine"), found):
                    arch[choice(kind, b, what)] = value
            arch[concat(kind)] = self.unread(arch, kind) if out is None else "".join(map(str, out))
        for root in self.root.choices:
            require(root.name, arch[root.name], root.options)
        return self.canonical(arch)

    def genotype(self, arch: Mapping[str, Value]) -> Genotype:
        """``arch`` in published form. Raises ValueError for settings that the unrestricted space does not have."""
        self.root.check(arch)
        return Genotype(self._cell(arch, "normal"), self.states(arch, "normal"), self._cell(arch, "reduce"),
                        self.states(arch, "reduce"))

    def _cell(self, arch: Mapping[str, Value], kind: str) -> tuple[Block, ...]:
        parts = ("left.op", "left.input", "right.op", "right.input", "combine")
        return tuple(Block(*(arch[choice(kind, b, what)] for what in parts)) for b in self.numbers())  # type: ignore[arg-type]

    def states(self, arch: Mapping[str, Value], kind: str) -> tuple[int, ...]:
        """The states that form the output of cells of ``kind``."""
        return tuple(map(int, str(arch[concat(kind)])))

    def text(self, arch: Mapping[str, Value]) -> str:
        """One line: ``normal: op(state)+op(state) .. =2,5,6 reduce: ..``: blocks, with | for a concatenation, and output."""
        genotype = self.genotype(arch)
        return " ".join(
            f"{kind}: {' '.join(map(_word, blocks))} ={','.join(map(str, out))}"
            for kind, blocks, out in (("normal", *genotype[:2]), ("reduce", *genotype[2:])))

    def parse(self, text: str) -> Arch:
        """The architecture of such a line, or of a published name (NASNET_A). Without = the output is what no block reads.

        Raises ValueError for another form and what this space does not hold.
        """
        if text.strip() in PUBLISHED:
            return self.arch_of(PUBLISHED[text.strip()])
        found = re.fullmatch(r"normal:(.*?)(?:\s=(\d(?:,\d)*))?\s+reduce:(.*?)(?:\s=(\d(?:,\d)*))?", text.strip(), re.ASCII)
        if not found:
            raise ValueError(f"{text!r} is not a pair of cells. They are written normal: op(state)+op(state) .. =5,6 "
                             f"reduce: op(state)|op(state) .. =5,6, or by name: {', '.join(PUBLISHED)}.")
        normal, first, reduce, second = found.groups()
        return self._arch({"normal": (_blocks(normal), first and first.split(",")),
                           "reduce": (_blocks(reduce), second and second.split(","))})


def _word(found: Block) -> str:
    return f"{found.left}({found.left_input}){SIGNS[found.combine]}{found.right}({found.right_input})"

