"""Latency tables: milliseconds of every layer shape of a supernet on one device, as a file and as a price.

    nas latency RECIPE --out table.csv              measures each distinct shape of the recipe's supernet
    budget: {price: table.csv, target: 60%}         searches under the table

The latency of a network is the SUM of its rows. That layers add up is an ASSUMPTION: pools, activations, additions and
concatenations have no row, a compiler fuses layers, a device overlaps them, and caches serve a chain of layers better than
one alone. It orders architectures on one device well enough to search; measure the found network itself before you quote
a time (``nas latency`` compares the two for one architecture). A row is the time of one pass of a whole batch.
"""
from __future__ import annotations

import csv
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from supernets.layers import Shape

if TYPE_CHECKING:
    from nas.cost import Price

OPS = ("conv", "linear", "norm", "more", "table")
COLUMNS = ("op", "c_in", "c_out", "kernel_h", "kernel_w", "stride", "dilation", "groups", "height", "width", "bias", "ms")
WARM_UP = 5
"""Passes before those that count: the first ones choose kernels and fill caches."""
ROUNDS = 3
"""How often all layers are measured, one after another: what else the machine did then does not stay in a row."""


class Row(NamedTuple):
    """``ms``: milliseconds of one pass of a batch through one layer. ``shape.hw`` is the OUTPUT size."""

    op: str
    shape: Shape
    ms: float


# -- the file -------------------------------------------------------------------------------------------------------------


def read_latency(path: str | Path) -> Price:
    """The table at ``path`` as a price, exact for its rows.

    The price raises ValueError for a shape without a row. Raises FileNotFoundError, and ValueError that names row (as an
    editor counts lines) and column of what is wrong.
    """
    found: dict[tuple[str, Shape], float] = {}
    for number, cells in _records(Path(path)):
        row = _row(cells, f"{path}, row {number}")
        if (row.op, row.shape) in found:
            raise ValueError(f"{path}, row {number}: a second row of {_words(row.op, row.shape)}. Delete one of the two.")
        found[row.op, row.shape] = row.ms

    def latency(op: str, s: Shape) -> float:
        try:
            return found[op, s]
        except KeyError:
            raise ValueError(
                f"{path} has no row for {_words(op, s)}. Measure every shape of this supernet: nas latency RECIPE --out NEW.csv"
            ) from None

    return latency


def write_latency(path: str | Path, rows: Iterable[Row], note: str = "") -> None:
    """A CSV file of ``COLUMNS``; ``note`` (device, batch, versions) goes before it, each line behind a #."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {line}\n" for line in note.splitlines())
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for op, s, ms in rows:
            out.writerow([op, s.c_in, s.c_out, *s.kernel, s.stride, s.dilation, s.groups, *s.hw, int(s.bias), f"{ms:.6g}"])


def _records(path: Path) -> Iterable[tuple[int, Mapping[str, str | None]]]:
    """Line number and cells of every row, comments and empty lines left out."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such latency table. Make one: nas latency RECIPE --out {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text. Give a latency table: a CSV file that nas latency wrote.") from None
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    try:
        reader = csv.DictReader([line for _, line in lines])
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}. Give a latency table that nas latency wrote.") from None
    lacks = ", ".join(name for name in COLUMNS if name not in (reader.fieldnames or ()))
    if lacks:
        raise ValueError(f"{path}, row {lines[0][0] if lines else 1}: no column {lacks}. Needed: {','.join(COLUMNS)}")
    return zip((number for number, _ in lines[1:]), rows)


def _row(cells: Mapping[str, str | None], where: str) -> Row:
    def cell(name: str, allowed: str, value: float, good: bool) -> float:
        if not good:
            raise ValueError(f"{where}, column {name}: {cells[name]!r} is not valid. Allowed: {allowed}.")
        return value

    def count(name: str) -> int:
        text = (cells[name] or "").strip()
        value = int(text) if text.isdecimal() else 0
        return int(cell(name, "a whole number of 1 or more", value, value >= 1))

    op, bias = (cells["op"] or "").strip(), (cells["bias"] or "").strip()
    cell("op", ", ".join(OPS), 0, op in OPS)
    cell("bias", "0 or 1", 0, bias in ("0", "1"))
    ms = _number(cells["ms"])
    cell("ms", "milliseconds, 0 or more", ms, 0 <= ms < math.inf)
    shape = Shape(count("c_in"), count("c_out"), (count("kernel_h"), count("kernel_w")), count("stride"), count("dilation"),
                  count("groups"), (count("height"), count("width")), bias == "1")  # fmt: skip
    return Row(op, shape, ms)


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _words(op: str, s: Shape) -> str:
    """A shape as the columns of its row say it, in one line."""
    values = (op, s.c_in, s.c_out, *s.kernel, s.stride, s.dilation, s.groups, *s.hw, int(s.bias))
    return " ".join(f"{name}={value}" for name, value in zip(COLUMNS, values))


# -- measuring ------------------------------------------------------------------------------------------------------------


def measure(
    shapes: Iterable[tuple[str, Shape]], device: torch.device | str = "cpu", repeats: int = 20, batch: int = 1
) -> list[Row]:
    """One row for each distinct (op, shape), in the given order: the least of ``ROUNDS`` times by ``milliseconds``, which lie
    as far apart as the measuring of all others takes.

    Each layer is measured alone, in float32, by ``plain_layer``. Raises ValueError for repeats or batch below 1.
    """
    if repeats < 1 or batch < 1:
        raise ValueError(f"repeats = {repeats}, batch = {batch}. Allowed: 1 or more of each.")
    least = dict.fromkeys(shapes, math.inf)
    for _ in range(ROUNDS):
        for op, shape in least:
            layer, size = plain_layer(op, shape)
            x = torch.ones(batch, *size, device=device)
            least[op, shape] = min(least[op, shape], milliseconds(layer.to(device), x, repeats))
    return [Row(op, shape, ms) for (op, shape), ms in least.items()]


def plain_layer(op: str, s: Shape) -> tuple[nn.Module, tuple[int, ...]]:
    """The torch layer of a term, and the size of one input such that its output has ``s.hw``.

    A convolution is padded as usual for odd kernels ("same"), not at all for even ones; a norm is a batch norm. What a
    "more" term adds to the layer before it cannot be measured alone: it is taken for a layer of its own on that input
    segment (linear where kernel and output are 1x1, else a convolution), which counts the start of a layer once too often.
    A table is added to as many tokens as it has rows.
    Raises ValueError for an unknown ``op``.
    """
    if op not in OPS:
        raise ValueError(f"op = {op!r} is not known. Allowed: {', '.join(OPS)}.")
    if op == "norm":
        return nn.BatchNorm2d(s.c_out), (s.c_out, *s.hw)
    if op == "table":
        return _Added(s.c_in, s.c_out), (s.c_in, s.c_out)
    if op == "linear" or (op == "more" and s.kernel == s.hw == (1, 1)):
        positions = s.hw[0] * s.hw[1]
        return nn.Linear(s.c_in, s.c_out, s.bias), ((s.c_in,) if positions == 1 else (positions, s.c_in))
    padding = [s.dilation * (k // 2) if k % 2 else 0 for k in s.kernel]
    size = [n * s.stride if k % 2 else (n - 1) * s.stride + s.dilation * (k - 1) + 1 for n, k in zip(s.hw, s.kernel)]
    conv = nn.Conv2d(s.c_in, s.c_out, s.kernel, s.stride, (padding[0], padding[1]), s.dilation, s.groups, s.bias)
    return conv, (s.c_in, *size)


class _Added(nn.Module):
    """x (B, rows, c) + a table (rows, c)."""

    def __init__(self, rows: int, c: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, c))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def milliseconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    """The time of ``layer(x)`` in eval mode without gradients: the median of the faster half of the passes, since what else a
    machine does only ever adds to a time. On a GPU between events, so passes may queue up."""
    layer.eval()
    with torch.no_grad():
        for _ in range(WARM_UP):
            layer(x)
        times = sorted(_on_gpu(layer, x, repeats) if x.is_cuda else _on_cpu(layer, x, repeats))
    return statistics.median(times[: (len(times) + 1) // 2])


def _on_cpu(layer: nn.Module, x: Tensor, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        layer(x)
        times.append(1000 * (time.perf_counter() - began))
    return times


def _on_gpu(layer: nn.Module, x: Tensor, repeats: int) -> list[float]:
    with torch.cuda.device(x.device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            layer(x)
            mark.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
