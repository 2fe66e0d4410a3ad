"""Tables given by a user, CSV or JSON. A file is data: nothing in it is executed."""
from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUMBERED = ("index", "arch", "architecture", "number", "id")
"""Columns in which whole numbers are looked for where no key is named."""
MISSING = ("", "-", "na", "n/a", "nan", "none", "null")
SAMPLE = 20  # rows that decide what a column holds


class Table(NamedTuple):
    """``columns``: name -> one text a row, all of one length."""

    path: str
    columns: dict[str, list[str]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))

    def require(self, name: str, option: str) -> None:
        """ValueError where there is no column ``name``, which ``option`` of the command line asks for."""
        if name not in self.columns:
            raise ValueError(f"{option} {name}: {self.path} has no such column. Allowed: {', '.join(self.columns)}.")


def read_table(path: str) -> Table:
    """A CSV file with a header, or a JSON file: {key: number or {name: number}} or [{name: value}]. A list of numbers (of
    several seeds) stands for its mean. FileNotFoundError, and ValueError that names the file and the line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file. Give a CSV or JSON file.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        columns = _json(path, text) if Path(path).suffix.lower() == ".json" else _csv(path, text)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as CSV or JSON: {error}.") from None
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"{path} holds no rows. Give a table with a header and one row for each architecture.")
    return Table(path, columns)


def _csv(path: str, text: str) -> dict[str, list[str]]:
    reader = csv.reader(io.StringIO(text), strict=True)
    header = [name.strip() for name in next(reader, [])]
    rows = []
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise ValueError(f"{path}, line {reader.line_num}: {len(row)} cells, but the header names {len(header)} columns.")
        rows.append([cell.strip() for cell in row])
    double = next((name for i, name in enumerate(header) if name and name in header[:i]), None)
    if double is not None:
        raise ValueError(f"{path} has two columns named {double}. Rename one.")
    return {name: [row[i] for row in rows] for i, name in enumerate(header) if name}


def _json(path: str, text: str) -> dict[str, list[str]]:
    content = json.loads(text)
    if isinstance(content, dict):
        content = [{"key": key} | (row if isinstance(row, dict) else {"value": row}) for key, row in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path}: expected an object of architectures, or a list of objects with the same names.")
    names = dict.fromkeys(str(name) for row in content for name in row)
    return {name: [_cell(row.get(name)) for row in content] for name in names}


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return repr(math.fsum(value) / len(value))
    return "" if value is None else str(value)


def numbers(table: Table, name: str) -> np.ndarray:
    """A column as (rows,) float64, nan where it is empty, says so or is infinite. ValueError for other words."""
    found = np.full(table.rows, math.nan)
    for i, cell in enumerate(table.columns[name]):
        if cell.lower() not in MISSING:
            try:
                value = float(cell)
            except ValueError:
                raise ValueError(f"{table.path}, row {i + 1}: {name} = {cell!r} is no number. Allowed: numbers; empty cells or "
                                 "nan where there is none.") from None  # fmt: skip
            found[i] = value if math.isfinite(value) else math.nan
    return found


def value_column(table: Table, name: str | None, option: str, keys: Sequence[str]) -> str:
    """``name``; where it is None, the only column of numbers beside the ``keys``. ValueError where there is none or several."""
    if name is not None:
        return name
    fit = [column for column, cells in table.columns.items()
           if column not in keys and column.lower() not in NUMBERED and _numeric(cells[:SAMPLE])]  # fmt: skip
    if len(fit) != 1:
        raise ValueError(f"{option} is missing: which column of {table.path}? Columns of numbers: {', '.join(fit) or 'none'}.")
    return fit[0]


def _numeric(cells: Iterable[str]) -> bool:
    try:
        return any(cell.lower() not in MISSING and math.isfinite(float(cell)) for cell in cells)
    except ValueError:
        return False
