"""A search under a latency budget names its milliseconds, their share of the target and the table wherever it names MACs."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import DATA, SPACE, ok

from nas.cost import CostTable, macs
from nas.latency import Row, read_latency, write_latency
from search_spaces.arch import read_arch
from search_spaces.resnet import CifarResNet
from supernets.layers import Shape
from supernets.resnet import ResNet


@pytest.fixture
def net() -> ResNet:
    return ResNet(CifarResNet(14, "tied", widths=(4, 6, 8)), channels=1, classes=10)


def test_a_latency_budget_is_reported_in_milliseconds(tmp_path: Path, net: ResNet) -> None:
    asked: dict[tuple[str, Shape], float] = {}
    CostTable(net, (8, 8), lambda op, shape: asked.setdefault((op, shape), 0.003 + 1e-5 * macs(op, shape)))
    table = tmp_path / "table.csv"
    write_latency(table, [Row(op, shape, ms) for (op, shape), ms in asked.items()])
    costs = CostTable(net, (8, 8), read_latency(table))
    done = ok("search", "rarts-digits", "--epochs", "1", *DATA, *SPACE, "--threads", "1", "--json", "--out", tmp_path / "run",
              "--strategy.budget.price", table, "--strategy.budget.target", "70%")  # fmt: skip
    file = read_arch(tmp_path / "run" / "arch.json")
    ms, full = costs.of(file.arch), costs.of(net.space.largest())
    assert file.costs["latency_ms"] == pytest.approx(ms, rel=1e-12) == json.loads(done.last)["latency_ms"]
    words = (f"Budget: {ms:.4g} ms by {table}, {ms / full / 0.7:.1%} of the target of {0.7 * full:.4g} ms "
             "(70% of the largest)")  # fmt: skip
    text = (tmp_path / "run" / "report.md").read_text()
    assert words in done.err and f"{words}.\n" in text
    assert f"| ms by the budget's table | {ms:.4g} | {100 * ms / full:.1f}% |" in text.splitlines()
    bundle = Path(ok("extract", tmp_path / "run", "--out", tmp_path / "bundle").last)
    assert read_arch(bundle / "arch.json").costs == file.costs


def test_other_budgets_are_reported_in_their_unit(tmp_path: Path) -> None:
    done = ok("search", "rarts-digits", "--epochs", "1", *DATA, *SPACE, "--threads", "1", "--out", tmp_path / "run",
              "--strategy.budget.price", "params", "--strategy.budget.target", "3000")  # fmt: skip
    file = read_arch(tmp_path / "run" / "arch.json")
    assert "latency_ms" not in file.costs
    said = f"Budget: {file.costs['params']:,} parameters, {file.costs['params'] / 3000:.1%} of the target of 3,000 parameters"
    assert said in done.err and f"{said}." in (tmp_path / "run" / "report.md").read_text()
