"""The benchmarks of rankings and of path steps: what is run at which cost, what is read of it, and tiny runs."""
from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nas.benchmarks import paths, quality_ranking
from nas.benchmarks.quality_ranking import MACRO, POOLINGS, Contest, against, neighbours, plan
from nas.benchmarks.quality_ranking_report import markdown, picture
from nas.benchmarks.quality_trees import NEAR, Plan
from nas.ranking.statistics import kendall
from nas.recipe import find, parse, read, search_parser
from nas.splits.split import Split
from search_spaces.nasbenchmacro import NASBenchMacro
from search_spaces.pooling import PoolingResNet


def asked(out: Path, **more: Any) -> argparse.Namespace:
    given = {"passes": 150_000, "images": 10_000, "rank_images": 2_000, "seeds": [1, 2], "repeats": 3, "size": 16, "batch": 80,
             "width": None, "only": None, "out": out}  # fmt: skip
    return argparse.Namespace(**{**given, **more})


def config_of(each: Plan) -> Any:
    words = [word for word in each.job.command(["--searcher=null"])[3:] if not word.startswith("--out")]
    return parse(search_parser(), read(find(each.job.contestant.recipe)), words)


@pytest.mark.slow
@pytest.mark.parametrize(("contest", "epochs", "parts"), [
    (MACRO, {"SPOS": 15, "FairNAS": 5, "PA&DA": 15, "PA&DA, paths alone": 15, "PA&DA, data alone": 15, "GM + PA&DA": 5}, 1),
    (POOLINGS, {"one-shot (SPOS)": 15, "few-shot": 9, "mixture, M = 2": 11, "mixture, M = 4": 11}, 2),
])  # fmt: skip
def test_all_cost_alike_and_train_alike(tmp_path: Path, contest: Contest, epochs: dict[str, int], parts: int) -> None:
    plans = plan(contest, asked(tmp_path), [])
    assert [each.job.seed for each in plans] == [1, 2] * len(epochs) and len({each.job.folder for each in plans}) == len(plans)
    assert {each.job.contestant.name: each.table.epochs for each in plans} == epochs
    rates = set()
    for each in plans:
        config, total = config_of(each), each.job.image_passes + each.measured
        assert (1 - NEAR) * 150_000 < total <= 150_000
        data = config.data
        assert (data.limit, data.batch_size, data.size) == (10_000 + parts * 2_000, 80, 16)
        held = [round(share * data.limit) for share in (data.valid_fraction, data.select_fraction)]
        assert held == [2_000, 2_000 * (parts - 1)]
        assert config.searcher is None and config.epochs == each.table.epochs
        w = config.strategy.init_args.weights
        rates.add((w.lr, w.lr_min, w.momentum, w.nesterov, w.weight_decay, w.clip, w.per_epoch, w.accumulate))
    assert rates == {(0.028, 0.0, 0.9, False, 2.5e-4, 5.0, False, 1) if contest is MACRO
                     else (0.08, 0.001, 0.9, False, 0.0, None, False, 1)}  # fmt: skip


@pytest.mark.slow
def test_halves_splits_and_models_are_set(tmp_path: Path) -> None:
    plans = {each.job.contestant.name: each for each in plan(MACRO, asked(tmp_path, seeds=[1], width=0.5), [])}
    halves = {name: config_of(each).strategy.init_args for name, each in plans.items() if name.startswith("PA&DA")}
    assert {name: (args.path, args.data) for name, args in halves.items()} == {
        "PA&DA": (True, True), "PA&DA, paths alone": (True, False), "PA&DA, data alone": (False, True)}
    matched = plans["GM + PA&DA"]
    split = Split(**config_of(matched).split.as_dict())
    assert (split.by, split.epochs(5), split.repeats, split.group_count(1), split.least) == ("gradients", [1, 3], 3, 2, 1)
    assert matched.measured == (24 + 2 * 21) * 3 * 80 and matched.table.trained == 1 + 2 * 2 + 4 * 2 and matched.way.leaves == 4
    assert all(config_of(each).space.init_args.width == 0.5 for each in plans.values())
    poolings = {each.job.contestant.name: each for each in plan(POOLINGS, asked(tmp_path, seeds=[1]), [])}
    assert [config_of(poolings[f"mixture, M = {n}"]).strategy.init_args.models for n in (2, 4)] == [2, 4]
    assert poolings["mixture, M = 2"].job.image_passes == round(11 * 10_000 * 4 / 3)
    few = poolings["few-shot"]
    split = Split(**config_of(few).split.as_dict())
    options = PoolingResNet()["pooling"].options
    assert split.groups_of(options, 0) == [list(options[k : k + 9]) for k in (0, 9, 18, 27)] and split.inherits(0) == "weights"
    assert split.epochs(9) == list(few.table.at) == [7] and few.table.trained == 7 + 4 * 2


def test_parts_of_an_exhaustive_split() -> None:
    said: dict[str, Any] = {"at": [1], "choices": ["a"], "by": "exhaustive"}
    assert Split(**said).groups_of((1, 2, 3), 0) == [[1], [2], [3]]
    assert Split(**said, parts=[[[1, 3], [2]]]).groups_of((1, 2, 3), 0) == [[1, 3], [2]]
    assert neighbours(range(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    for wrong in ({"by": "gradients"}, {"at": [1, 2], "choices": ["a", "b"]}):
        with pytest.raises(ValueError, match=r"split\.parts = .*Allowed: groups of the options of each level's choice"):
            Split(**{**said, **wrong}, parts=[[[1, 3], [2]]])


TRUTH = {"a": 90.0, "b": 91.0, "c": 92.0, "d": 93.0, "e": 94.0}


def row(name: str, seed: int, predictions: Sequence[float], **more: Any) -> dict[str, Any]:
    tau: dict[str, Any] = {"value": kendall(np.array(predictions), np.array(list(TRUTH.values()))), "low": -0.5, "high": 0.9}
    return {"strategy": name, "seed": seed, "passes_a_step": 1.0, "epochs": 15, "at": [], "leaves": 1, "image_passes": 150_000,
            "split_images": 0, "train_seconds": 61.4, "kendall_tau": tau, "spearman": tau,
            "tenth_kendall_tau": {**tau, "value": None}, "tenth_overlap": tau,
            "accuracy": 93.0, "place": 2, "predictions": dict(zip(TRUTH, predictions)),
            "seed_of_intervals": 3, **more}  # fmt: skip


def figures() -> dict[str, Any]:
    rows = [row("SPOS", 1, [1, 2, 3, 4, 5]), row("SPOS", 2, [2, 1, 3, 4, 5]), row("PA&DA", 1, [2, 1, 3, 5, 4]),
            row("PA&DA", 2, [1, 2, 3, 4, 5], leaves=4, at=[1, 3])]  # fmt: skip
    against(rows, TRUTH, "SPOS")
    tau = {"value": 0.5, "low": 0.4, "high": 0.6}
    cost = {"kendall_tau": tau, "spearman": tau, "tenth_kendall_tau": tau, "tenth_overlap": tau, "accuracy": 92.5}
    return {"rows": rows, "base": "SPOS", "truth": TRUTH, "trivial": {"macs": cost, "params": cost},
            "space": {"mean": 92.0, "best": 94.0, "networks": 6561}}  # fmt: skip


def test_a_gain_is_over_the_run_of_the_same_seed() -> None:
    one, two, three, four = figures()["rows"]
    assert "gain" not in one and "gain" not in two
    assert three["gain"]["value"] == pytest.approx(0.6 - 1.0) and four["gain"]["value"] == pytest.approx(1.0 - 0.8)
    assert three["gain"]["low"] <= three["gain"]["value"] <= three["gain"]["high"] <= 0.0 <= four["gain"]["low"]


def test_rows_become_a_table_and_a_picture(tmp_path: Path) -> None:
    found = figures()
    lines = markdown(found).splitlines()
    assert lines[2] == ("| SPOS | 1 | 15, 1 | 150,000, 150,000 | 0, 0 | 61, 61 | 1.000 [-0.500, 0.900], 0.800 [-0.500, 0.900] "
                        "| 0.900 | - | 1.000, 0.800 | -, - | 1.000, 0.800 | 93.00 (2), 93.00 (2) |")  # fmt: skip
    assert lines[3].startswith("| PA&DA | 1 |") and "| -0.400 [" in lines[3]
    assert lines[4] == "| MACs alone | - | - | - | - | - | 0.500 [0.400, 0.600] | 0.500 | - | 0.500 | 0.500 | 0.500 | 92.50 |"
    assert lines[-1] == "5 of 6,561 architectures: mean 92.00, best 94.00; places are among these 5."
    picture(found, tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").stat().st_size > 5_000


TINY = ["--seeds", "1", "--size", "8", "--images", "64", "--rank-images", "32", "--batch", "16", "--repeats", "1",
        "--data.name=digits", "--data.root=null", "--data.augment=[crop]"]  # fmt: skip


@pytest.mark.slow
def test_macro_networks_are_ranked(tmp_path: Path) -> None:
    space = NASBenchMacro()
    codes = ["".join(code) for code in itertools.product("012", repeat=8)]
    table = {code: {"mean_acc": 50 + sum(map(int, space.text(space.normal(space.parse(code)))))} for code in codes}
    (tmp_path / "table.json").write_text(json.dumps(table))
    words = ["--space", "macro", "--out", str(tmp_path / "runs"), "--table", str(tmp_path / "table.json"), "--passes", "1400",
             "--only", "SPOS", "GM", "--archs", "8", "--width", "0.07", "--json", str(tmp_path / "figures.json"), "--picture",
             str(tmp_path / "figures.png"), "--space.init_args.features=8", *TINY]  # fmt: skip
    assert quality_ranking.main([*words, "--estimate"]) == {} and not (tmp_path / "runs").exists()
    figures = quality_ranking.main(words)
    assert [found["strategy"] for found in figures["rows"]] == ["SPOS", "GM + PA&DA"]
    assert len(figures["truth"]) == 8 == len({space.key(space.parse(code)) for code in figures["truth"]})
    for found in figures["rows"]:
        assert found["n"] == 8 and found["read"]["images"] == 32 and found["read"]["bn"] == "batch"
        assert found["accuracy"] == pytest.approx(np.mean([table[code]["mean_acc"] for code in found["found"]]))
        assert found["kendall_tau"]["value"] == pytest.approx(
            kendall(np.array(list(found["predictions"].values())), np.array(list(figures["truth"].values()))))  # fmt: skip
    matched = figures["rows"][1]
    assert matched["leaves"] == 4 and matched["split_images"] == 66 * 16 and len(matched["splits"]) == 3
    assert -2 <= matched["gain"]["value"] <= 2 and figures["trivial"]["macs"]["kendall_tau"]["value"] > 0
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == json.loads(json.dumps(figures["rows"]))
    assert (tmp_path / "figures.png").is_file()
    assert quality_ranking.main(words) == figures  # nothing is run again


@pytest.mark.slow
def test_poolings_are_ranked(tmp_path: Path) -> None:
    rows = [f"{n},{80 + n / 10}" for n in range(1, 37)]
    (tmp_path / "table.csv").write_text("\n".join(["architecture,baseline_avg", *rows]) + "\n")
    figures = quality_ranking.main([
        "--space", "pooling", "--out", str(tmp_path / "runs"), "--table", str(tmp_path / "table.csv"), "--passes", "500",
        "--only", "few-shot", "M = 2", "--space.init_args.widths=[2,2,2]", *TINY])  # fmt: skip
    few, mixed = figures["rows"]
    assert few["leaves"] == 4 and few["splits"][0]["groups"][3][-1] == "8-1-1" and few["split_images"] == 0
    assert mixed["image_passes"] == round(6 * 64 * 4 / 3) and mixed["n"] == few["n"] == 36
    assert figures["truth"]["8-1-1"] == pytest.approx(83.6) and "gain" not in mixed  # the one-shot run was not asked for


@pytest.mark.slow
def test_path_steps_train_the_same_paths(capsys: pytest.CaptureFixture) -> None:
    """A tiny run; and both sides of a case see the same paths, pair by pair."""
    given = paths.main(["--pairs", "2", "--batch", "2", "--size", "8", "--C", "2", "--N", "1", "--width", "7", "--images", "20",
                        "--layouts", "nchw", "--only", "NAS-Bench-Macro: PA&DA, data alone", "turn"])  # fmt: skip
    (found,) = given["rows"]
    assert found["goal"] == 1.05 and 0 < found["interval90"][0] <= found["ratio"] and math.isfinite(found["interval90"][1])
    assert given["further"][0]["images"] == 20 and "data alone" in capsys.readouterr().out
    bench = paths.PathBench(paths.Conditions(batch=2, size=8), "nchw", {"C": 2, "N": 1, "width": 7, "images": 20})
    for name in paths.OURS:
        seen: dict[str, list[Any]] = {"ours": [], "SPOS": []}
        started = bench.started

        def watched(strategy: Any, space: Any, net: Any, started: Any = started, seen: Any = seen) -> Any:
            side = seen["SPOS" if type(strategy).__name__ == "SPOS" else "ours"]
            net.register_forward_pre_hook(lambda module, args: side.append(dict(args[1])))
            return started(strategy, space, net)

        bench.started = watched  # type: ignore[method-assign]
        for step in (bench[f"macro/{name}"], bench[f"macro/{name}/SPOS"]):
            step(), step()
        bench.started = started  # type: ignore[method-assign]
        assert seen["ours"] == seen["SPOS"] and len(seen["ours"]) == (6 if name.startswith("FairNAS") else 2)
        assert seen["ours"][0] != seen["ours"][1]
