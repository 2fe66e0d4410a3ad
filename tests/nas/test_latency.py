"""Latency tables: the file's round trip, exact look-up, what is refused where, and what is measured."""
from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from nas import latency
from nas.budget import Budget
from nas.budget import budget as cost_budget
from nas.cost import CostTable, macs, params
from nas.latency import COLUMNS, OPS, ROUNDS, WARM_UP, Row, measure, milliseconds, plain_layer, read_latency, write_latency
from search_spaces.resnet import CifarResNet
from search_spaces.space import Mixture
from supernets.layers import Shape
from supernets.resnet import ResNet

CONV = Shape(8, 16, (3, 5), 2, 1, 4, (6, 7), True)
ROWS = [Row("conv", CONV, 0.25), Row("conv", CONV._replace(bias=False), 0.125), Row("linear", Shape(16, 10, bias=True), 1e-3),
        Row("norm", Shape(16, 16, hw=(6, 7)), 0.5), Row("more", Shape(4, 16, hw=(6, 7)), 0.0)]  # fmt: skip


# -- the file -------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.csv"
    write_latency(path, ROWS, "one cpu\nbatch 1")
    lines = path.read_text().splitlines()
    assert lines[:3] == ["# one cpu", "# batch 1", ",".join(COLUMNS)]
    assert lines[3] == "conv,8,16,3,5,2,1,4,6,7,1,0.25" and len(lines) == 8
    price = read_latency(path)
    assert [price(op, shape) for op, shape, _ in ROWS] == [ms for *_, ms in ROWS]


def test_a_shape_without_a_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_latency(path, ROWS)
    price = read_latency(path)
    for op, shape in (("conv", CONV._replace(stride=1)), ("more", CONV), ("conv", CONV._replace(hw=(7, 6)))):
        with pytest.raises(ValueError) as error:
            price(op, shape)
        text = str(error.value)
        assert str(path) in text and "nas latency" in text and f"op={op} c_in=8 c_out=16 kernel_h=3 kernel_w=5" in text
        assert f"stride={shape.stride}" in text and f"height={shape.hw[0]} width={shape.hw[1]}" in text and "\n" not in text


GOOD = "conv,8,16,3,5,2,1,4,6,7,1,0.25"


@pytest.mark.parametrize("column, cell", [
    ("op", "pool"), ("op", ""), ("c_in", "0"), ("c_in", "1.5"), ("c_out", "-3"), ("kernel_h", "x"), ("kernel_w", ""),
    ("stride", "0"), ("dilation", "0"), ("groups", "0"), ("height", "0"), ("width", "7 7"), ("bias", "yes"), ("bias", "2"),
    ("ms", "fast"), ("ms", "nan"), ("ms", "inf"), ("ms", "-1"), ("ms", ""),
])  # fmt: skip
def test_a_bad_cell_is_named_by_row_and_column(tmp_path: Path, column: str, cell: str) -> None:
    path = tmp_path / "table.csv"
    cells = GOOD.split(",")
    cells[COLUMNS.index(column)] = cell
    path.write_text("\n".join(["# a note", ",".join(COLUMNS), "linear,4,4,1,1,1,1,1,1,1,0,1", "", ",".join(cells)]))
    with pytest.raises(ValueError, match=rf"table\.csv, row 5, column {column}: '{cell}' is not valid. Allowed: ") as error:
        read_latency(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, words", [
    ("", r"row 1: no column op, c_in, .*, ms. Needed: op,c_in,"),
    ("# note\nop,c_in\nconv,3\n", "row 2: no column c_out, .*, ms. Needed"),
    (",".join(COLUMNS) + "\nconv,8,16\n", "row 2, column bias: None is not valid"),
    ("\n".join([",".join(COLUMNS), GOOD, GOOD]), "row 3: a second row of op=conv c_in=8 .* bias=1. Delete one"),
])  # fmt: skip
def test_a_damaged_table_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_latency(path)


def test_what_is_no_text_and_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="is not text"):
        read_latency(path)
    with pytest.raises(FileNotFoundError, match=r"other\.csv: there is no such latency table"):
        read_latency(tmp_path / "other.csv")


def test_columns_may_stand_in_any_order_and_others_beside(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    cells = dict(zip(COLUMNS, GOOD.split(","))) | {"spread": "0.01"}
    path.write_text(f"{','.join(reversed(cells))}\r\n{','.join(reversed(cells.values()))}\r\n")
    assert read_latency(path)("conv", CONV) == 0.25


# -- as a price -----------------------------------------------------------------------------------------------------------


def test_a_network_costs_the_sum_of_its_rows_and_a_budget_reads_the_file(tmp_path: Path) -> None:
    net = ResNet(CifarResNet(8, "tied", widths=(4, 4, 6)), classes=5)
    asked: dict[tuple[str, Shape], float] = {}

    def ask(op: str, shape: Shape) -> float:
        return asked.setdefault((op, shape), 0.003 + 1e-5 * macs(op, shape))

    expected = CostTable(net, (8, 8), ask)
    path = tmp_path / "table.csv"
    write_latency(path, [Row(op, shape, ms) for (op, shape), ms in asked.items()])
    costs = CostTable(net, (8, 8))
    budget = Budget("70%", price=str(path))
    budget.start(costs, costs.root)
    codes = costs.root.random_codes(np.random.default_rng(0), 50)
    assert budget.table.batch(codes).tolist() == approx(expected.batch(codes).tolist(), rel=1e-12)
    large = costs.root.largest()
    assert budget.R == approx(0.7 * expected.of(large), rel=1e-12) and not budget.fits(large)
    soft: Any = {c.name: Mixture(c.options, torch.full((len(c.options),), 1 / len(c.options))) for c in costs.root.choices}
    assert budget.loss(soft).item() == approx(abs(np.log(expected.expected(soft).item() / budget.R)), rel=1e-9)
    with pytest.raises(ValueError, match=r"budget.target = 0.001 \(0.001\) cannot be reached .* Smallest cost: 0\.\d+ \("):
        Budget(0.001, price=str(path)).start(costs, costs.root)
    # rows that are noise: what is small is dear
    noise = CostTable(net, (8, 8), lambda op, shape: 1.0 / (1 + macs(op, shape)))
    with pytest.raises(ValueError, match=r"smallest network costs more \(\d.*\) than the largest \(\d.* are noise: measure"):
        cost_budget("60%", noise, net.space)


# -- measuring ------------------------------------------------------------------------------------------------------------


def shapes() -> Iterator[tuple[str, Shape]]:
    for kernel in ((1, 1), (3, 3), (5, 5), (7, 1), (2, 2), (2, 3)):
        for stride in (1, 2):
            for dilation in (1, 2):
                for groups in (1, 4):
                    yield "conv", Shape(4, 8, kernel, stride, dilation, groups, (5, 3), groups == 1)
    yield "more", Shape(4, 8, (1, 1), hw=(5, 3))
    yield "more", Shape(4, 8, (3, 3), hw=(1, 1))


@pytest.mark.parametrize("op, shape", list(shapes()))
def test_the_measured_convolution_is_that_shape(op: str, shape: Shape) -> None:
    layer, size = plain_layer(op, shape)
    assert isinstance(layer, nn.Conv2d) and layer(torch.ones(2, *size)).shape == (2, shape.c_out, *shape.hw)
    assert sum(p.numel() for p in layer.parameters()) == params(op, shape)
    assert layer.weight.numel() * shape.hw[0] * shape.hw[1] == macs(op, shape)


def test_the_measured_linear_layers_and_norms() -> None:
    for op in ("linear", "more"):
        layer, size = plain_layer(op, Shape(6, 5, bias=True))
        assert isinstance(layer, nn.Linear) and size == (6,) and layer(torch.ones(2, 6)).shape == (2, 5)
        assert layer.bias is not None
    layer, size = plain_layer("linear", Shape(6, 5, hw=(2, 3)))  # tokens
    assert size == (6, 6) and layer(torch.ones(2, *size)).shape == (2, 6, 5) and layer.bias is None
    layer, size = plain_layer("norm", Shape(6, 6, hw=(2, 3)))
    assert isinstance(layer, nn.BatchNorm2d) and size == (6, 2, 3)
    layer, size = plain_layer("table", Shape(5, 6))  # positions, added to five tokens
    assert size == (5, 6) and layer(torch.ones(2, *size)).shape == (2, 5, 6)
    assert sum(p.numel() for p in layer.parameters()) == params("table", Shape(5, 6)) == 30
    with pytest.raises(ValueError, match=r"op = 'pool' is not known\. Allowed: conv, linear, norm, more"):
        plain_layer("pool", Shape(6, 6))


def test_each_distinct_shape_is_measured_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Shape(4, 4, hw=(2, 2))
    given = [("norm", norm), ("conv", CONV), ("norm", norm), ("conv", CONV._replace(stride=1))]
    rows = measure(given, repeats=2, batch=3)
    assert [(row.op, row.shape) for row in rows] == [given[0], given[1], given[3]]
    assert all(0 < row.ms < 10_000 for row in rows)
    seen: list[tuple[tuple[int, ...], int]] = []
    times = iter([0.3, 9.0, 7.0, 0.4, 0.2, 0.5])  # two layers in each of three rounds, of which one was disturbed

    def timed(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
        seen.append((tuple(x.shape), repeats))
        return next(times)

    monkeypatch.setattr(latency, "milliseconds", timed)
    assert [row.ms for row in measure(given[:2], batch=3, repeats=7)] == [0.2, 0.4]
    assert seen == [((3, 4, 2, 2), 7), ((3, 8, 12, 14), 7)] * ROUNDS
    for repeats, batch in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="Allowed: 1 or more of each"):
            measure(given, repeats=repeats, batch=batch)


def test_the_median_of_the_faster_half_of_passes_in_eval_mode_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            self.calls += 1
            return x

    ticks = iter([0.0, 9.0, 10.0, 10.002, 20.0, 20.003, 30.0, 30.001, 40.0, 44.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    layer = Watched()
    assert milliseconds(layer, torch.ones(1), 5) == approx(2.0)  # of 9000, 2, 3, 1 and 4000 the lower half: 1, 2, 3
    assert layer.calls == WARM_UP + 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_on_a_gpu() -> None:
    rows = measure([(op, Shape(4, 4, hw=(1, 1))) for op in OPS], "cuda", repeats=3)
    assert [row.op for row in rows] == list(OPS) and all(0 < row.ms < 10_000 for row in rows)
