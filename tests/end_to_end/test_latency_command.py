"""nas latency: every shape that a search can ask for is in the table, and bad usage is one line."""
from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from cli import DATA, SPACE, nas, ok

from nas.budget import Budget
from nas.commands.latency import doubt
from nas.cost import CostTable
from nas.latency import read_latency
from search_spaces.resnet import CifarResNet
from supernets.layers import Shape
from supernets.resnet import ResNet

QUICK = ("--repeats", "2", "--threads", "1", "--device", "cpu")


@pytest.mark.parametrize("kind", ["tied", "tas"])
def test_a_table_prices_every_architecture_and_a_budget_reads_it(tmp_path: Path, kind: str) -> None:
    table = tmp_path / "new" / "table.csv"
    done = ok("latency", "tas-digits", *DATA, *SPACE, "--space.kind", kind, "--batch", "3", *QUICK, "--out", table)
    assert done.out == f"{table}\n" and done.errors == []
    notes = [line for line in table.read_text().splitlines() if line.startswith("#")]
    assert "nas latency tas-digits" in notes[0] and "batch 3" in notes[1] and torch.__version__ in notes[1]
    assert "1 threads" in notes[1] and "ms by the table" in done.err and "ms measured as a whole" in done.err
    net = ResNet(CifarResNet(14, kind, widths=(4, 6, 8)), channels=1, classes=10)
    costs = CostTable(net, (8, 8), read_latency(table))
    rng = random.Random(0)
    assert all(costs.of(net.space.sample(rng)) > 0 for _ in range(20))
    cheap, dear = costs.of(net.space.smallest()), costs.of(net.space.largest())
    if cheap < dear:  # so few microseconds may be noise alone
        budget = Budget((cheap + dear) / 2, price=str(table))
        budget.start(CostTable(net, (8, 8)), net.space)
        assert cheap < budget.R < dear


def test_the_table_holds_each_shape_once_and_the_summary_counts_them(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    found = json.loads(ok("latency", "tas-digits", *DATA, *SPACE, *QUICK, "--out", table, "--json").last)
    rows = [line.rpartition(",")[0] for line in table.read_text().splitlines() if not line.startswith("#")][1:]
    assert len(set(rows)) == len(rows) == found["shapes"] > 30
    assert found["table"] == str(table) and found["sum_ms"] > 0 and found["whole_ms"] > 0


@pytest.mark.parametrize("added, words", [
    (1.0, ""), (1.29, ""), (0.71, ""), (2.0, "the table says 100% more than the largest network takes"), (0.5, "50% less than"),
])  # fmt: skip
def test_a_table_far_from_the_whole_network_is_doubted(added: float, words: str) -> None:
    assert words in doubt(added, 1.0) and bool(doubt(added, 1.0)) == bool(words)


def test_the_doubt_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.commands.latency.compared", lambda *_: (3.0, 2.0))
    monkeypatch.setattr("nas.commands.latency.shapes_of", lambda _: [("norm", Shape(4, 4, hw=(2, 2)))])
    done = ok("latency", "tas-digits", *DATA, *SPACE, *QUICK, "--out", tmp_path / "table.csv")
    assert "the largest network: 3 ms by the table, 2 ms measured as a whole" in done.err and doubt(3.0, 2.0) in done.err


@pytest.mark.parametrize("words, message", [
    (("latency",), "recipe"),
    (("latency", "tas-digit"), "recipe 'tas-digit' is not known. Nearest: tas-digits. Allowed: "),
    (("latency", "tas-digits", "--batch", "0"), "--batch 0, --repeats 20: too few. Allowed: 1 or more"),
    (("latency", "tas-digits", "--out", "table.txt"), "a latency table ends in .csv"),
    (("latency", "tas-digits", "--out", "there.csv"), "there.csv is there already: choose another name"),
    (("latency", "tas-digits", "--data.limti", "200"), "data.limti is not a known key. Nearest: data.limit."),
])  # fmt: skip
def test_bad_usage_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("mine")
    result = nas(*words)
    lines = result.err.strip().splitlines()
    assert result.code == 2 and len(lines) == 1 and lines[0].startswith("nas latency: ") and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["there.csv"] and (tmp_path / "there.csv").read_text() == "mine"
