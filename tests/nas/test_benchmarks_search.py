"""The benchmarks of searches: what is planned at equal cost, what is looked up, and that each runs on something tiny."""
from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from nas.benchmarks import cells, entangled, gates, pairs, quality
from nas.benchmarks.quality import CELLS, WIDTHS, Contestant, accuracies, legal, markdown, picture, plan, uniform
from search_spaces.arch import ArchFile
from search_spaces.nats import NAMES, OPS, Topology
from search_spaces.resnet import CifarResNet

DIGITS = ["--data.name=digits", "--data.root=null", "--data.augment=[crop]", "--data.limit=128", "--data.batch_size=32"]
SKIP = "|skip_connect~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"


def test_every_contestant_gets_as_many_whole_epochs_as_fit(tmp_path: Path) -> None:
    """250,000 passes of 78 batches of 64: 25 epochs of two passes a step, 10 of five, 12 of four, 50 of one."""
    jobs = plan(CELLS, [1, 2], [], 250_000, 5_000, tmp_path)
    assert [job.seed for job in jobs] == [1, 2] * len(CELLS)
    epochs = {job.contestant.name: (job.passes, job.epochs) for job in jobs}
    assert epochs == {
        "DARTS, first order": (2, 25), "DARTS, second order": (5, 10), "RARTS, Gauss-Seidel": (4, 12), "RARTS, Jacobi": (2, 25),
        "SNAS": (2, 25), "GDAS": (2, 25), "RSPS": (1, 50), "random search": (1, 50),
    }  # fmt: skip
    assert all(job.image_passes == job.passes * job.epochs * 4_992 <= 250_000 for job in jobs)
    assert plan(WIDTHS[:1], [1], [], 250_000, 5_000, tmp_path)[0].image_passes == 2 * 25 * 4_864  # TAS: batches of 256


def test_a_budget_of_less_than_an_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="less than one epoch"):
        plan(CELLS[:1], [1], [], 9_000, 5_000, tmp_path)


def test_a_cell_is_legal_where_every_node_receives_something() -> None:
    assert legal("|nor_conv_1x1~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|")
    assert not legal(SKIP)


def test_the_table_is_found_by_its_strings(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"n,acc,cell\n0,54.5,{SKIP}\n")
    assert accuracies(path, "acc", Topology()) == {SKIP: 54.5}
    with pytest.raises(ValueError, match=r"no such column\. Allowed: n, acc, cell"):
        accuracies(path, "score", Topology())


def test_uniform_widths_are_the_nearest_to_the_share() -> None:
    """Of the eight places, the one whose MACs come nearest; depths stay whole."""
    space = CifarResNet(20, "tied")
    file = ArchFile.of(space, space.largest(), input=(3, 32, 32), classes=("a", "b"), preprocess={}, costs={}, metrics={},
                       provenance={"strategy": "tas"})  # fmt: skip
    even = uniform(file, 0.5)
    assert even.arch["stage2.width"] == 44 and even.arch["stage0.width"] == 11 and even.arch["stage1.depth"] == 3
    assert even.provenance["strategy"] == "uniform"


@pytest.mark.slow
def test_searches_run_and_are_looked_up(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    space = Topology()
    cells = (dict(zip(NAMES, ops)) for ops in itertools.product(OPS, repeat=6))
    rows = [f"{i % 97},{space.text(arch)}" for i, arch in enumerate(cells)]
    table.write_text("\n".join(["acc,cell", *rows]) + "\n")
    out = tmp_path / "runs"
    figures = quality.main(["cells", "--out", str(out), "--table", str(table), "--column", "acc", "--passes", "64", "--images",
                            "64", "--seeds", "1", "--only", "random", "--C", "2", "--json", str(tmp_path / "figures.json"),
                            "--picture", str(tmp_path / "figures.png"), "--strategy.trials=1", *DIGITS])  # fmt: skip
    (row,) = figures["rows"]
    assert row["image_passes"] == 64 and 1 <= row["place"] <= 15625
    assert row["accuracy"] == accuracies(table, "acc", space)[row["found"]]
    assert json.loads((tmp_path / "figures.json").read_text())["rows"][0] == row
    assert (tmp_path / "figures.png").stat().st_size > 5_000
    assert "random search" in markdown("cells", figures)


def test_the_widths_picture_and_table(tmp_path: Path) -> None:
    rows = [{"strategy": "TAS", "top1": 0.6 + seed / 10, "macs": 5_310_000, "image_passes": 10} for seed in (1, 2)]
    figures = {"rows": [*rows, {"strategy": "uniform widths", "seed": 1, "top1": 0.5, "macs": 1e6}]}
    assert "| TAS | 10 | 70.00, 80.00 | 75.00 | 5.31 M, 5.31 M |" in markdown("widths", figures)
    assert "| uniform widths | - | 50.00 | 50.00 | 1.00 M |" in markdown("widths", figures)
    picture("widths", figures, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_contestants_are_chosen_by_a_part_of_their_names() -> None:
    assert [c.name for c in quality.chosen(CELLS, ["rarts", "gdas"])] == ["RARTS, Gauss-Seidel", "RARTS, Jacobi", "GDAS"]
    with pytest.raises(SystemExit, match="names nobody"):
        quality.chosen((Contestant("a", "b"),), ["c"])


@pytest.mark.slow
def test_the_steps_on_cells_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "cells.json"
    figures = cells.main(["--pairs", "2", "--batch", "2", "--size", "16", "--C", "4", "--layers", "3", "--layouts",
                          "channels_last", "--out", str(out), "--only", "GDAS, alpha pass"])  # fmt: skip
    (row,) = figures["rows"]
    assert row["case"] == "GDAS, alpha pass" and row["ratio"] > 0 and row["aten_calls"]["ours"] > 100
    assert set(figures["peaks"]["channels_last"]) == {"gdas-a", "path"}
    assert json.loads(out.read_text())["rows"] == figures["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("program, words, case", [
    (gates, ["--C", "4"], "nb201, two"), (entangled, [], "macro, softmax, weights"), (entangled, [], "vit, softmax, alphas"),
], ids=["gates", "macro", "vit"])  # fmt: skip
def test_passes_of_gates_and_superposed_nets_are_measured(program: Any, words: list[str], case: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    figures = program.main(["--pairs", "2", "--batch", "2", "--peak-batch", "3", "--size", "16", "--layouts", "nchw",
                            "--only", case, "--out", str(out), *words])  # fmt: skip
    (row,) = figures["rows"]
    assert row["case"] == case and row["ratio"] > 0 and row["aten_calls"]["ours"] > row["aten_calls"]["against"] > 100
    assert set(figures["peaks"]["nchw"]) == {row["ours"], row["against"]} and figures["peak_batch"] == 3
    assert json.loads(out.read_text())["rows"] == figures["rows"] and f"| {case} | " in pairs.markdown(figures)
