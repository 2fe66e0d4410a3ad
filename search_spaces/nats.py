"""The two spaces of NATS-Bench: cells of NAS-Bench-201 (Dong & Yang, ICLR 2020, arXiv 2001.00326) and five widths
(Dong, Liu, Musial, Gabrys, TPAMI 2021, arXiv 2009.00437); and the index that their tables use.

Every network of both spaces was trained alone by their authors, so that a search can be judged without training.
"""
from __future__ import annotations

import csv
import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from search_spaces.choice import listed, positive
from search_spaces.space import Arch, Choice, SearchSpace, Value, require

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))  # (node, the node it reads), in the order of the strings
FORM = "|op~0|+|op~0|op~1|+|op~0|op~1|op~2|"


def edge(node: int, source: int) -> str:
    """The choice of the operation that leads from ``source`` to ``node``."""
    return f"node{node}.from{source}"


NAMES = tuple(edge(node, source) for node, source in EDGES)


def cell_text(arch: Mapping[str, Value]) -> str:
    """The published string of a cell."""
    return "+".join("|" + "".join(f"{arch[edge(node, source)]}~{source}|" for source in range(node))
                    for node in (1, 2, 3))


def cell_arch(text: str) -> Arch:
    """The cell of a published string. Raises ValueError for another form and unknown operations."""
    words = [word.partition("~") for node in text.strip().split("+") for word in node.strip("|").split("|")]
    arch: Arch = {name: word[0] for name, word in zip(NAMES, words)}
    if len(words) != len(NAMES) or cell_text(arch) != text.strip():
        raise ValueError(f"{text!r} is not a cell of NAS-Bench-201. A cell is written {FORM}.")
    for name, op in arch.items():
        require(name, op, OPS)
    return arch


class Topology(SearchSpace):
    """NAS-Bench-201: which operation leads from each node of a cell to each later one; all cells are the same.

    ``C``: channels of the first stage. ``N``: cells a stage; both 1 or more. ``check`` accepts all 15,625 cells of the
    tables. ``sample`` and ``random_codes`` draw only cells in which every node receives something (RSPS: uniform, each
    node redrawn while all its operations are none).
    """

    skips = ("skip_connect",)
    nones = ("none",)

    def __init__(self, C: int = 16, N: int = 5) -> None:
        self.C, self.N = positive("C", C), positive("N", N)
        super().__init__([Choice(name, OPS, ordered=False) for name in NAMES], {"C": C, "N": N},
                         dear=dict.fromkeys(NAMES, "nor_conv_3x3"), cheap=dict.fromkeys(NAMES, "skip_connect"))

    def text(self, arch: Mapping[str, Value]) -> str:
        """The published string, such as ``|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|``."""
        return cell_text(self.canonical(arch))

    def parse(self, text: str) -> Arch:
        """The cell of a published string. Raises ValueError for another form and unknown operations."""
        return cell_arch(text)

    def key(self, arch: Mapping[str, Value]) -> str:
        """The published isomorphism string: equal for 6,466 classes of cells, whose members compute the same function.

        What reaches node 3, in words, the terms of each sum sorted. A skip stands for what it passes on, an edge with
        none or from # for #. As published, a sum that a skip passes on stays one term: some isomorphic cells differ.
        """
        arch = self.canonical(arch)
        words = ["0"]
        for node in (1, 2, 3):
            terms = []
            for source in range(node):
                op, word = arch[edge(node, source)], words[source]
                if op == "none" or word == "#":
                    terms.append("#")
                else:
                    terms.append(word if op == "skip_connect" else f"({word})@{op}")
            words.append("+".join(sorted(terms)))
        return words[3]

    def sample(self, rng: random.Random) -> Arch:
        """Uniform among the cells of this restriction in which every node receives something.

        Raises ValueError where some node has none on all its edges in every cell.
        """
        at = rng.randrange(len(self._alive))
        return self.decode(self._alive[at:at + 1])[0]

    def random_codes(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, 6) int16: ``sample`` for many."""
        return self._alive[rng.integers(len(self._alive), size=n)]

    def lawful(self, codes: np.ndarray) -> np.ndarray:
        """(N, 6) -> (N,) bool: cells in which every node receives something."""
        gives = codes != OPS.index("none")
        into = [[i for i, ends in enumerate(EDGES) if ends[0] == node] for node in (1, 2, 3)]
        return np.all([gives[:, edges].any(axis=1) for edges in into], axis=0)

    @functools.cached_property
    def _alive(self) -> np.ndarray:
        """(cells, 6) int16: the codes of what ``sample`` draws from; with so few, no draw is ever rejected."""
        left = [np.array([OPS.index(str(option)) for option in choice.options], dtype=np.int16) for choice in self.choices]
        codes = np.stack(np.meshgrid(*left, indexing="ij"), axis=-1).reshape(-1, len(NAMES))
        codes = codes[(self._follow_codes(codes) == codes).all(axis=1)]
        for node in (1, 2, 3):
            into = [i for i, ends in enumerate(EDGES) if ends[0] == node]
            if not (codes[:, into] != OPS.index("none")).any():
                raise ValueError(f"This restriction of {self.name} leaves node {node} nothing but none on "
                                 f"{listed(NAMES[i] for i in into)}. Allow another operation on one of them.")
        alive = codes[self.lawful(codes)]
        if not len(alive):
            raise ValueError(f"This restriction of {self.name} has no cell in which every node receives something: the choices "
                             f"that follow others ({listed(self.ties)}) are none wherever nothing else is left.")
        return alive


class Numbering:
    """The official index of every NAS-Bench-201 cell: its row in the published list, which is a shuffle.

    ``strings``: all 15,625 cells, in that order. ``codes``: (15625, 6) int16, row i the cell of index i. Raises
    ValueError where a cell is missing, double or misspelt.
    """

    SIZE = len(OPS) ** len(EDGES)

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(text.strip() for text in strings)
        self._index = {text: i for i, text in enumerate(self.strings)}
        place = {op: k for k, op in enumerate(OPS)}
        codes = []
        for i, text in enumerate(self.strings):
            try:
                codes.append([place[str(op)] for op in cell_arch(text).values()])
            except ValueError as error:
                raise ValueError(f"row {i}: {error}") from None
            if self._index[text] != i:
                raise ValueError(f"rows {i} and {self._index[text]} hold the same cell, {text}: each stands once.")
        if len(codes) != self.SIZE:
            raise ValueError(f"{len(codes)} cells; an index needs all {self.SIZE} of the space, one a row.")
        self.codes = np.array(codes, dtype=np.int16)

    @classmethod
    def read(cls, path: str | Path, column: str | None = None) -> Numbering:
        """From a CSV file with a header and one cell a row, in index order.

        ``column``: the one with the strings; None: the first whose first entry is a cell. Raises FileNotFoundError, or
        ValueError as the class does.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file. Give a CSV table with one NAS-Bench-201 cell a row.")
        try:
            with open(path, newline="", encoding="utf-8") as stream:
                header, *rows = [row for row in csv.reader(stream) if row] or [[]]
            at = _column(header, rows, column)
            return cls([row[at] if at < len(row) else "" for row in rows])
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from None

    def of(self, arch: Mapping[str, Value]) -> int:
        """The index of a cell. Raises ValueError for what is none."""
        try:
            return self._index[cell_text(arch)]
        except KeyError:
            raise ValueError(f"{dict(arch)} is not a cell of NAS-Bench-201: it sets {listed(NAMES)}, each to one of "
                             f"{listed(OPS)}.") from None

    def arch(self, i: int) -> Arch:
        """The cell of index ``i``. Raises ValueError outside 0 to 15624."""
        return cell_arch(self.strings[_within(i, self.SIZE)])


def _column(header: Sequence[str], rows: Sequence[Sequence[str]], name: str | None) -> int:
    """Which column has the cells. Raises ValueError where none has."""
    if name is not None:
        require("column", name, header)
        return list(header).index(name)
    for at, entry in enumerate(rows[0] if rows else ()):
        if entry.strip().startswith("|") and "~0|" in entry:
            return at
    raise ValueError(f"no column holds cells written {FORM}. Columns: {listed(header)}.")


def _within(i: int, size: int) -> int:
    if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < size:
        raise ValueError(f"index = {i} is not in this space. Allowed: integers, 0 to {size - 1}.")
    return int(i)


WIDTHS = tuple(range(8, 65, 8))


class Sizes(SearchSpace):
    """NATS-Bench's size space: five widths c1..c5 of 8, 16, .., 64 channels, 32,768 networks.

    Stem 3 -> c1; cell c1 -> c1; residual block of stride 2, c1 -> c2; cell c2 -> c3; residual block c3 -> c4; cell
    c4 -> c5. ``cell``: the cell of all three stages, fixed, an architecture of ``Topology``.
    """

    NAMES = ("c1", "c2", "c3", "c4", "c5")
    CELL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"

    def __init__(self) -> None:
        self.cell = cell_arch(self.CELL)
        super().__init__([Choice(name, WIDTHS) for name in self.NAMES], {})

    def text(self, arch: Mapping[str, Value]) -> str:
        """c1:c2:c3:c4:c5, such as 8:8:8:16:32."""
        return ":".join(str(width) for width in self.canonical(arch).values())

    def parse(self, text: str) -> Arch:
        """The widths of 8:8:8:16:32. Raises ValueError for another form and other widths."""
        words = text.strip().split(":")
        if len(words) != len(self.NAMES) or not all(word.isdecimal() for word in words):
            raise ValueError(f"{text!r} is not five widths. They are written c1:c2:c3:c4:c5, such as 8:8:8:16:32.")
        arch: Arch = {name: int(word) for name, word in zip(self.NAMES, words)}
        self.root.check(arch)
        return arch

    def number(self, arch: Mapping[str, Value]) -> int:
        """The official index: the sum of (c_i / 8 - 1) * 8^(5 - i). Raises ValueError for other widths."""
        return int(functools.reduce(lambda index, place: index * 8 + int(place), self.encode([arch])[0], 0))

    def numbered(self, i: int) -> Arch:
        """The architecture of index ``i``. Raises ValueError outside 0 to 32767."""
        _within(i, self.root.size)
        return {name: WIDTHS[i // 8 ** (4 - k) % 8] for k, name in enumerate(self.NAMES)}
