"""Which architecture the rows of a table are about, and tables joined by architecture.

A row names its architecture by the text of its space, by the choices' own names as columns, or by a number, which the space
or another table resolves.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nas.ranking.tables import NUMBERED, SAMPLE, Table, numbers
from search_spaces.space import Arch, SearchSpace, require

_WHOLE = re.compile(r"\d+(\.0+)?")


class Rows(NamedTuple):
    """``names``: of each row, what its architecture is called, None where that cannot be read. ``archs``: by that name,
    empty without a space. ``rule``: in words, how the names were found. ``numbers``: whether they are numbers of another
    table. ``unread``: the first name that could not be read, and why."""

    names: list[str | None]
    archs: dict[str, Arch]
    rule: str
    numbers: bool = False
    unread: str = ""


class Known(NamedTuple):
    """A file's ``values`` by architecture, nan where it gives none; and what is ``said`` about the file."""

    values: dict[str, float]
    said: dict[str, Any]


def match(
    files: Mapping[str, Table], space: SearchSpace | None, key: str | None, columns: Mapping[str, str]
) -> tuple[dict[str, Arch], dict[str, Known]]:
    """Of all ``files``, "truth" first: the architectures by name, empty where nothing says what a name means; and of each file
    its values by name. ``columns``: of the values, by file; a table may be there several times, for several of its columns.
    ValueError where names cannot be found."""
    if key is None and space is None:
        key = common_key(files["truth"], next(files[name] for name in files if name != "truth"), list(columns.values()))
    rows: dict[str, Rows] = {}
    for name, table in files.items():
        there = name == "truth" or space is None or all(part in table.columns for part in split(key))
        twin = next((rows[other] for other in rows if files[other] is table), None)
        rows[name] = named(table, space, key if there else None) if twin is None else twin
    plain = next((name for name in rows if not rows[name].numbers), None)
    if plain is not None:
        for name in [name for name in rows if rows[name].numbers]:
            rows[name] = renamed(rows[name], files[plain], rows[plain], counted=plain == "truth")
    known = {}
    for name, table in files.items():
        column = columns.get(name)
        values = np.zeros(table.rows) if column is None else numbers(table, column)
        known[name] = gathered(table, rows[name], values, column)
    return {name: arch for found in rows.values() for name, arch in found.archs.items()}, known


def gathered(table: Table, rows: Rows, values: np.ndarray, column: str | None) -> Known:
    """``values`` (rows,) by the names of ``rows``; the finite ones of a name that comes again are averaged."""
    found: dict[str, list[float]] = {}
    for name, value in zip(rows.names, values.tolist()):
        if name is not None:
            found.setdefault(name, []).append(value)
    finite = {name: [v for v in several if not math.isnan(v)] for name, several in found.items()}
    means = {name: math.fsum(several) / len(several) if several else math.nan for name, several in finite.items()}
    read = sum(map(len, found.values()))
    said = {"file": table.path, "key": rows.rule, "value": column, "rows": table.rows, "architectures": len(found),
            "unread": table.rows - read, "first_unread": rows.unread, "repeated": read - len(found),
            "without_value": sum(map(math.isnan, means.values()))}  # fmt: skip
    return Known(means, said)


def named(table: Table, space: SearchSpace | None, key: str | None) -> Rows:
    """What each row of ``table`` is about. ``key``: its column, or several (comma-separated); None to look for it.

    With a space, names are its canonical texts. ValueError, in one line, where no rule fits.
    """
    columns = split(key) or list(table.columns)
    for name in columns:
        table.require(name, "--key")
    if space is None:
        return _raw(table, columns)
    root = space.root
    for name in columns:
        if any(_parses(root, cell) for cell in table.columns[name][:SAMPLE]):
            return _read(table.columns[name], root.parse, space, f"column {name}, as {root.name} writes architectures")
    if all(choice.name in columns for choice in root.choices if len(choice.options) > 1):
        names = [choice.name for choice in root.choices if choice.name in columns]
        settings = [dict(zip(names, row)) for row in zip(*(table.columns[name] for name in names))]
        return _read(settings, partial(_arch, root), space, f"columns named like the choices of {root.name}")
    whole = [name for name in columns if (key or name.lower() in NUMBERED) and _whole(table.columns[name])]
    if whole:
        cells = [str(int(float(cell))) for cell in table.columns[whole[0]]]
        if not hasattr(root, "numbered"):
            return Rows(list(cells), {}, f"column {whole[0]}, numbers", numbers=True)
        return _read(cells, lambda cell: root.numbered(int(cell)), space, f"column {whole[0]}, numbers of {root.name}")  # type: ignore[attr-defined]
    holds = f"--key {key}: there, {table.path} holds" if key else f"--key is missing, and {table.path} holds"
    first = ", ".join(repr(table.columns[name][0]) for name in columns[:3])
    text = root.text(root.smallest())
    raise ValueError(f"{holds} no architectures of {root.name} (first row: {first}). Allowed: columns named like its choices; "
                     f"whole numbers (a column index); or its texts: {text[:90]}{'...' * (len(text) > 90)}")  # fmt: skip


def split(key: str | None) -> list[str]:
    """The columns that ``--key`` names."""
    return [name.strip() for name in key.split(",")] if key else []


def common_key(truth: Table, other: Table, values: Sequence[str]) -> str:
    """The key of two tables whose space is not known: the first column that both have, beside the ``values``, and that names
    every row of ``truth`` differently; failing that, all of them together. ValueError where they share none."""
    both = [name for name in truth.columns if name in other.columns and name not in values]
    alone = [name for name in both if len(set(truth.columns[name])) == truth.rows]
    if not both:
        raise ValueError(f"--key is missing: {truth.path} ({', '.join(truth.columns)}) and {other.path} "
                         f"({', '.join(other.columns)}) share no column that could name an architecture.")  # fmt: skip
    return alone[0] if alone else ",".join(both)


def renamed(rows: Rows, table: Table, given: Rows, counted: bool) -> Rows:
    """``rows`` that are numbers, called as ``table`` (whose rows are ``given``) calls the architectures of these numbers: by
    its own column of numbers; failing that, if ``counted``, by its row numbers from 0. ValueError where neither is there."""
    column = next((name for name in table.columns if name.lower() in NUMBERED and _whole(table.columns[name])), None)
    if column is None and not counted:
        raise ValueError(f"{table.path} names architectures, another file has their numbers ({rows.rule}). "
                         f"Give {table.path} a column index that joins them.")  # fmt: skip
    cells = [str(int(float(cell))) for cell in table.columns[column]] if column else map(str, range(table.rows))
    known = dict(zip(cells, given.names))
    odd = next((name for name in rows.names if name is not None and name not in known), None)
    rule = f"{rows.rule}: {f'column {column}' if column else 'row numbers from 0'} of {table.path}"
    return Rows([known.get(name or "") for name in rows.names], given.archs, rule,
                unread="" if odd is None else f"number {odd} is not in {table.path}")  # fmt: skip


def _raw(table: Table, columns: list[str]) -> Rows:
    """Names as they stand in the file: without a space nothing else is known about them."""
    cells = zip(*(table.columns[name] for name in columns))
    if len(columns) == 1:
        names = [cell or None for (cell,) in cells]
    else:
        names = [",".join(f"{name}={cell}" for name, cell in zip(columns, row)) for row in cells]
    return Rows(names, {}, f"{', '.join(columns)}, as written", unread="an empty cell" if None in names else "")


def _whole(cells: Sequence[str]) -> bool:
    return all(map(_WHOLE.fullmatch, cells))


def _parses(space: SearchSpace, cell: str) -> bool:
    try:
        space.parse(cell)
    except ValueError:
        return False
    return True


def _arch(space: SearchSpace, texts: Mapping[str, str]) -> Arch:
    """The architecture of settings as they are written. Inert ones, and choices of one option, may be empty or missing."""
    arch = {choice.name: choice.options[0] for choice in space.choices}
    for name, text in texts.items():
        options = {str(option): option for option in space[name].options}
        whole = str(int(float(text))) if _WHOLE.fullmatch(text) else text  # 8.0, as programs write a column with gaps
        if text:
            require(name, whole, tuple(options))
            arch[name] = options[whole]
    unset = next((name for name in space.counting(arch) if texts.get(name) == ""), None)
    if unset is not None:
        raise ValueError(f"{unset} is empty where it counts. Allowed: {', '.join(map(str, space[unset].options))}.")
    return space.canonical(arch)


def _read(cells: Sequence[Any], read: Callable[[Any], Arch], space: SearchSpace, rule: str) -> Rows:
    """``read`` of every cell; what it or ``space`` refuses gets no name."""
    names: list[str | None] = []
    archs: dict[str, Arch] = {}
    unread = ""
    for cell in cells:
        try:
            arch = read(cell)
            space.check(arch)
        except ValueError as error:
            names.append(None)
            unread = unread or str(error)
            continue
        name = space.text(arch)
        archs[name] = space.canonical(arch)
        names.append(name)
    return Rows(names, archs, rule, unread=unread)
