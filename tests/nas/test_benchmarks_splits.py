"""The benchmark of splits: what trees cost, which epochs pay for a budget, what is run and read, and a tiny run of it."""
from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from nas.benchmarks import quality_splits
from nas.benchmarks.quality import legal
from nas.benchmarks.quality_splits import FIRST, PAIRS, SIZES, cells, markdown, picture, plan
from nas.benchmarks.quality_trees import Timetable, compared, seconds, splits, timetable, trained
from nas.recipe import find, parse, read, search_parser
from nas.splits.split import Split
from search_spaces.nats import NAMES, OPS, Topology


def asked(out: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"passes": 250_000, "images": 5_000, "seeds": [1, 2], "repeats": 5, "out": out, **more})


def test_the_epochs_of_a_tree_are_those_of_all_its_supernets() -> None:
    assert trained((), 50, ()) == 50
    assert trained((15, 30), 60, (2, 2)) == 15 + 2 * 15 + 4 * 30
    assert trained((600,), 900, (5,)) == 600 + 5 * 300
    assert trained((0,), 20, (7,)) == 7 * 20
    assert trained((2, 4, 6), 21, (2, 2, 2)) == 2 + 4 + 8 + 120


def test_distances_take_a_pass_for_each_option_of_what_is_not_split() -> None:
    """Page fewshot-gm.md, check 9: NB201 3000 for the first supernet; then five open edges in each of two."""
    assert compared([5] * 6, (2,), 100) == 3000
    assert compared([5] * 6, (2, 2), 100) == 3000 + 2 * 2500
    assert compared([7] * 14, (2,), 100) == 9800
    assert compared(SIZES, (2, 2), 5) == 5 * (29 + 2 * 24)
    assert compared(SIZES, (), 5) == 0


def test_the_path_is_that_whose_total_comes_nearest() -> None:
    assert timetable((), (), 25.04) == Timetable((), 25, 25)
    assert timetable((), (), 24.6) == Timetable((), 25, 25)
    assert timetable((2 / 3,), (4,), 50.08) == Timetable((17,), 25, 49)  # 2 % off, and 17 of 25 is two thirds
    assert timetable((2 / 3,), (4,), 25.04) == Timetable((9,), 13, 25)
    assert timetable((0.25, 0.5), (2, 2), 22.57) == Timetable((2, 4), 8, 22)
    for shares, children, budget in (((0.25, 0.5), (2, 2), 45.1), ((0.25, 0.5), (2, 2), 90.0), ((2 / 3,), (5,), 100.0)):
        found = timetable(shares, children, budget)
        assert found.trained == trained(found.at, found.epochs, children)
        assert abs(found.trained / budget - 1) < 0.03
        assert all(abs(a - share * found.epochs) <= 1.5 for a, share in zip(found.at, shares))


def test_a_budget_that_pays_for_no_tree_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"pays for 4\.00 epochs, too few for 2 splits into \[2, 2\]"):
        timetable((0.25, 0.5), (2, 2), 4.0)
    with pytest.raises(SystemExit, match=r"pays for 0\.30 epochs"):
        timetable((), (), 0.3)


@pytest.mark.slow
def test_all_searches_cost_alike_and_their_splits_fit(tmp_path: Path) -> None:
    plans = plan(PAIRS, asked(tmp_path), [])
    assert [each.job.seed for each in plans] == [1, 2] * len(PAIRS) and len({each.job.folder for each in plans}) == len(plans)
    for each in plans:
        total = each.job.image_passes + each.measured
        assert 0.96 * 250_000 < total < 1.03 * 250_000
        assert each.measured == (5 * 77 * 64 if "GM" in each.job.contestant.name else 0)
        assert each.job.image_passes == each.table.trained * each.job.passes * 4_992
        words = [word for word in each.job.command(["--data.limit=10000"])[3:] if not word.startswith("--out")]
        config = parse(search_parser(), read(find(each.job.contestant.recipe)), words)
        split = Split(**config.split.as_dict())
        assert split.epochs(config.epochs) == list(each.table.at) and config.epochs == each.table.epochs
        assert config.data.batch_size == 64 and config.data.valid_fraction == 0.5
        assert config.restrict == {FIRST: ["skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]}
        w = config.strategy.init_args.weights
        assert (w.lr, w.lr_min, w.momentum, w.nesterov, w.weight_decay, w.clip) == (0.025, 0.001, 0.9, True, 5e-4, None)
        if "GM" in each.job.contestant.name:
            assert (split.by, split.repeats, split.least, split.group_count(0)) == ("gradients", 5, 2, 2)
            last = "nothing" if "anew" in each.job.contestant.name else "all"
            assert (split.inherits(0), split.inherits(1)) == ("all", last)
        elif "exhaustive" in each.job.contestant.name:
            assert (split.by, split.choices, split.inherits(0)) == ("exhaustive", [FIRST], "weights")
        else:
            assert split.levels == 0


def test_overrides_of_the_batch_size_count(tmp_path: Path) -> None:
    (one,) = plan(["SPOS, one-shot"], asked(tmp_path, seeds=[3]), ["--data.batch_size=500", "--data.root=x"])
    assert one.job.image_passes == 50 * 5_000 and one.table.epochs == 50
    assert one.job.folder == tmp_path / "spos-one-shot-3"


def whole_table() -> dict[str, float]:
    space = Topology()
    return {space.text(dict(zip(NAMES, ops))): float(i % 97) for i, ops in enumerate(itertools.product(OPS, repeat=6))}


def test_the_common_cells_live_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "cells.csv"
    cells(whole_table(), 50, 0, path)
    head, *texts = path.read_text().splitlines()
    assert head == "cell" and len(set(texts)) == 50 and all(legal(text) for text in texts)
    cells(whole_table(), 20, 7, path)
    assert path.read_text().splitlines() == [head, *texts]


def test_seconds_are_those_of_every_supernets_steps(tmp_path: Path) -> None:
    """Root: 15 steps of 2 x 10 images at 100 a second, 5 at 50; a child goes on for 4 steps from 20; its child begins anew."""

    def rows(folder: Path, *speeds: tuple[int, float]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"step": step, "system/images_per_s": speed, "system/memory": 1.0}) for step, speed in speeds]
        (folder / "system.jsonl").write_text("\n".join(lines) + "\n")

    def split(folder: Path, inherit: str, images: int) -> None:
        said = {"step": 20, "inherit": inherit, "seconds": 1.5, "images": images, "measured": {"a": {}}}
        (folder / "split.json").write_text(json.dumps(said))

    rows(tmp_path, (14, 100.0), (19, 50.0))
    rows(tmp_path / "nodes" / "0", (23, 40.0))
    rows(tmp_path / "nodes" / "0.1", (9, 200.0))
    split(tmp_path, "all", 64)
    split(tmp_path / "nodes" / "0", "nothing", 128)
    assert seconds(tmp_path, 2, 10) == pytest.approx(15 * 20 / 100 + 5 * 20 / 50 + 4 * 20 / 40 + 10 * 20 / 200)
    found = splits(tmp_path)
    assert [said["images"] for said in found] == [64, 128] and all("measured" not in said for said in found)


ROW: dict[str, Any] = {
    "strategy": "SPOS, GM", "seed": 1, "leaves": 4, "at": [4, 8], "epochs": 16, "image_passes": 244_288, "split_images": 24_640,
    "split_seconds": 30.0, "train_seconds": 400.0, "share": 0.075, "accuracy": 93.5, "place": 700,
    "kendall_tau": {"value": 0.5, "low": 0.4, "high": 0.6},
}  # fmt: skip


def test_rows_become_a_table_and_a_picture(tmp_path: Path) -> None:
    other = {**ROW, "seed": 2, "accuracy": 94.0, "place": 30, "kendall_tau": {"value": 0.6, "low": 0.55, "high": 0.7}}
    one = {**ROW, "strategy": "SPOS, one-shot", "leaves": 1, "at": [], "split_images": 0, "split_seconds": 0.0, "share": 0.0}
    figures = {"rows": [ROW, other, one], "cells": 200, "space": {"median": 91.0}}
    lines = markdown(figures).splitlines()
    assert lines[2] == (
        "| SPOS, GM | 4 | 4, 8 of 16 | 244,288, 244,288 | 24,640, 24,640 | 30 / 400 = 7.5%, 30 / 400 = 7.5% | 93.50, 94.00 "
        "| 93.75 | 700, 30 | 0.500 [0.400, 0.600], 0.600 [0.550, 0.700] | 0.550 |")  # fmt: skip
    assert lines[3].startswith("| SPOS, one-shot | 1 | - of 16 |")
    picture(figures, tmp_path / "splits.png")
    assert (tmp_path / "splits.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_tree_is_searched_looked_up_and_ranked(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    table = whole_table()
    path.write_text("\n".join(["acc,cell", *(f"{value},{text}" for text, value in table.items())]) + "\n")
    words = ["--out", str(tmp_path / "runs"), "--table", str(path), "--column", "acc", "--passes", "2600", "--images", "64",
             "--seeds", "1", "--only", "DARTS, exhaustive", "SPOS, GM, leaves", "--C", "2", "--size", "8", "--limit", "128",
             "--repeats", "1", "--evaluations", "6", "--select-images", "32", "--cells", "6", "--bn", "batch",
             "--rank-images", "32", "--json", str(tmp_path / "figures.json"),
             "--data.name=digits", "--data.root=null", "--data.augment=[crop]", "--data.batch_size=16"]  # fmt: skip
    planned = {each.job.contestant.name: each for each in plan(
        ["DARTS, exhaustive", "SPOS, GM, leaves anew"], asked(tmp_path, passes=2600, images=64, seeds=[1], repeats=1),
        ["--data.batch_size=16"])}  # fmt: skip
    figures = quality_splits.main(words)
    assert [row["strategy"] for row in figures["rows"]] == list(planned)
    for row in figures["rows"]:
        each = planned[row["strategy"]]
        assert row["leaves"] == 4 and row["at"] == list(each.table.at) and row["accuracy"] == table[row["found"]]
        assert row["image_passes"] == each.job.image_passes + row["split_images"]
        assert row["n"] == 6 and -1 <= row["kendall_tau"]["value"] <= 1 and row["train_seconds"] > 0
    exhaustive, matched = figures["rows"]
    assert exhaustive["split_images"] == 0 == exhaustive["split_seconds"] and len(exhaustive["splits"]) == 1
    assert abs(matched["split_images"] - planned["SPOS, GM, leaves anew"].measured) <= 2 * 16 and matched["split_seconds"] > 0
    assert [said["inherit"] for said in matched["splits"]] == ["all", "nothing", "nothing"]
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == figures["rows"]
    assert quality_splits.main(words) == figures  # nothing is run again
