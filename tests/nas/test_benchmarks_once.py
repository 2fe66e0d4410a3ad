"""Once for all: what a run costs, what follows from its curves, and that the benchmarks run. No time is judged."""
from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nas.benchmarks import once, quality_once
from nas.benchmarks.pairs import measure
from nas.benchmarks.quality_once import EQUAL, ONCE, Price, Shadow, nearest, nets, plan, priced, three
from nas.benchmarks.quality_once_report import dip, markdown, mean, picture, reached, summary, whole
from nas.benchmarks.quality_once_run import CURVE, Contest, Meter
from nas.benchmarks.steps import Conditions
from nas.bilevel import Weights
from nas.build import Built, assemble
from nas.recipe import find, parse, read, search_parser
from nas.strategies.bignas import BigNAS
from nas.strategies.deps import DepS
from search_spaces.mobilenet import UNIFORM, OFAMobileNetV3
from search_spaces.space import Arch

TINY = ["--data.name=digits", "--data.root=null", "--data.augment=[crop]", "--data.limit=60", "--data.batch_size=20",
        "--data.valid_fraction=0", "--data.size=8", "--space.init_args.width=0.1", "--space.init_args.kernels=[3]"]  # fmt: skip
SIX = {"the six": ["small", "full"]}


class Constant(nn.Module):
    """(B, 2) logits, whatever the architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor, arch: dict[str, int]) -> torch.Tensor:
        return self.bias.expand(len(x), -1)


def tiny(recipe: str, *words: str) -> Built:
    return assemble(parse(search_parser(), read(find(recipe)), [*EQUAL, *TINY, *words]))


# -- cost ---------------------------------------------------------------------------------------------------------------


def test_a_meter_counts_what_makes_a_graph_and_the_rest_apart() -> None:
    net = Constant()
    meter = Meter(net, lambda arch: 10 * arch["depth"])
    net(torch.zeros(3, 1), {"depth": 2})
    net(torch.zeros(3, 1), arch={"depth": 4})
    with torch.no_grad():
        net(torch.zeros(5, 1), {"depth": 1})
    teacher = copy.deepcopy(net).requires_grad_(False)
    teacher(torch.zeros(1, 1), {"depth": 1})
    with meter.paused():
        net(torch.zeros(3, 1), {"depth": 2})
    assert (meter.trained, meter.forward_only) == (3 * 20 + 3 * 40, 5 * 10 + 10)


def test_runs_are_priced_by_what_they_would_draw() -> None:
    """DepS without random children: 3 epochs of 60 images for the full network, the last of them for the smallest too."""
    built = tiny("deps-mbv3-cifar10")
    full, small = (built.costs.of(arch) for arch in (built.space.largest(), built.space.smallest()))
    found = priced(built, DepS(delay=3, ramp=1, randoms=0), 3, seed=1)
    assert found == Price(60.0 * (3 * full + small), 0.0, 2.0)
    sandwich = priced(built, BigNAS(children=0, weights=Weights()), 2, seed=1)
    assert sandwich == Price(60.0 * 2 * (full + small), 0.0, None)


@pytest.mark.slow
def test_every_method_gets_the_epochs_that_cost_nearest_to_the_budget(tmp_path: Path) -> None:
    assert [nearest(lambda n: 3.0 * n, budget, 2) for budget in (1.0, 31.0, 32.0)] == [2, 10, 11]
    built = tiny("deps-mbv3-cifar10")
    budget = 60.0 * 20 * built.costs.of(built.space.largest())
    some = [ONCE[0], ONCE[1], ONCE[4]]
    plans = [plan(contestant, [1, 2], [*EQUAL, *TINY], budget, tmp_path)[0] for contestant in some]
    assert [[each.seed for each in seeded] for seeded in plans] == [[1, 2]] * 3
    for (first, second), contestant in zip(plans, some):
        assert first.contestant == contestant and first.folder != second.folder
        assert abs(first.price.trained / budget - 1) < 0.05  # half an epoch of the dearest
        assert (first.price.forward_only > 0) == ("OFA" in contestant.name)
    deps, rough, compound = (seeded[0] for seeded in plans)
    assert deps.price.switch == round(deps.epochs / 2) - 1 and rough.price.switch == round(rough.epochs / 2)
    assert compound.price.switch is None


def test_shadows_serve_every_architecture() -> None:
    built = tiny("compofa-mbv3-cifar10")
    assert Shadow(built)(torch.zeros(4, 1, 8, 8), built.space.smallest()).shape == (4, 10)


def test_the_networks_that_are_read() -> None:
    space = OFAMobileNetV3(width=0.1, small=True, kernels=[3, 5])
    found = nets(space)
    assert list(found) == ["e3 d2", "e3 d3", "e4 d3", "e3 d4", "e4 d4", "e6 d3", "e6 d4"]
    assert found["e6 d4"] == space.largest() and found["e4 d3"]["stage4.block0.kernel"] == 5
    macs = {name: i for i, name in enumerate(found)}
    assert three({"macs": macs}) == ["e3 d2", "e4 d4", "e6 d4"] and len(UNIFORM) == 6


def test_contests_are_read_as_written(tmp_path: Path) -> None:
    arch: Arch = {"stage0.depth": 2}
    contest = Contest("DepS", "deps-digits", ("--epochs=1",), "runs/a", {"e3 d2": arch}, "e3 d2", 1e6, (3, 4), 10, 20)
    contest.write(tmp_path / "told.json")
    assert Contest.read(tmp_path / "told.json") == contest


# -- report -------------------------------------------------------------------------------------------------------------


def curve(name: str, seed: int, readings: list[tuple[float, float, float]], **more: Any) -> dict[str, Any]:
    """Of two networks: (cost, small, full) of each reading, an epoch apart."""
    rows = [{"step": i, "epoch": float(i), "cost": cost, "forward_only": 0.0, "images": 100 * i, "seconds": 1.0,
             "top1": {"small": small, "full": full}} for i, (cost, small, full) in enumerate(readings, 1)]  # fmt: skip
    return {"name": name, "seed": seed, "epochs": len(rows), "cost": readings[-1][0], "forward_only": 0.0, "seconds": 3.0,
            "rows": rows, "top1": {"small": readings[-1][1], "full": readings[-1][2]}, "macs": {"small": 1e6, "full": 4e6},
            "test_images": 500, **more}  # fmt: skip


SLOW = curve("slow", 1, [(10.0, 0.1, 0.3), (20.0, 0.3, 0.5)])
QUICK = curve("quick", 1, [(5.0, 0.3, 0.3), (15.0, 0.5, 0.9)])


def test_the_cost_of_equal_accuracy_is_linear_between_readings() -> None:
    names = SIX["the six"]
    assert mean(SLOW["top1"], names) == pytest.approx(0.4) and len(whole(SLOW)) == 2
    assert reached(QUICK, names, 0.4) == pytest.approx(5 + 10 * 0.1 / 0.4)
    assert reached(SLOW, names, 0.4) == pytest.approx(20.0) and reached(SLOW, names, 0.41) is None
    assert reached(QUICK, names, 0.15) == pytest.approx(2.5)  # from nothing at cost 0


def test_the_dip_is_the_lowest_within_an_epoch_of_the_switch() -> None:
    rows = [{"epoch": epoch, "top1": {"full": value}} for epoch, value in
            [(1.0, 0.5), (2.0, 0.6), (2.5, 0.4), (3.0, 0.55), (3.5, 0.1)]]  # fmt: skip
    assert dip({"rows": rows}, "full", 2.0) == {"before": 0.6, "lowest": 0.4, "fall": pytest.approx(0.2)}
    assert dip({"rows": rows}, "full", 0.5) is None and dip({"rows": rows}, "full", 3.5) is None


def test_goals_are_of_a_seed_and_tables_hold_them(tmp_path: Path) -> None:
    other = curve("slow", 2, [(20.0, 0.1, 0.1)])
    rows = summary([SLOW, QUICK, other], SIX, "full", {"quick": 1.0})
    assert [row["the six"]["goal"] for row in rows] == pytest.approx([0.4, 0.4, 0.1])
    assert rows[1]["dip"] == {"before": 0.3, "lowest": 0.9, "fall": pytest.approx(-0.6)} and "dip" not in rows[0]
    alone = {"supernet": "quick", "seed": 1, "images": 200, "tune_epochs": 1,
             "rows": [{"net": "small", "macs": 1e6, "inherited": 0.5, "tuned": 0.55, "scratch": 0.6}]}  # fmt: skip
    figures = {"curves": [SLOW, QUICK, other], "rows": rows, "groups": SIX, "images": 100, "full": "full", "alone": alone}
    text = markdown(figures)
    assert "| quick | 1 | 2 | 15 | 0 | 50.00 | 90.00 | 70.00 |" in text and "| quick | 1 | 40.00 | 7.5 | 0.50 |" in text
    assert "| quick | 1 | 30.00 | 90.00 | -60.00 |" in text and "| small | 1.00 M | 50.00 | 55.00 | 60.00 |" in text
    picture(figures, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# -- whole runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_contestants_are_trained_read_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_once, "three", lambda curve: ["e4 d4"])  # one is enough here
    out, figures_path = tmp_path / "once", tmp_path / "figures.json"
    words = ["--out", str(out), "--budget", "2e8", "--limit", "0", "--size", "8", "--width", "0.1", "--kernel", "3",
             "--readings", "2", "--images", "40", "--bn-images", "40", "--only", "DepS", "--alone", "--tune-epochs", "1",
             *TINY[:5]]  # fmt: skip
    assert quality_once.main([*words, "--estimate"]) == {} and not out.exists()
    figures = quality_once.main([*words, "--json", str(figures_path), "--picture", str(tmp_path / "picture.png")])
    assert json.loads(figures_path.read_text()) == figures and (tmp_path / "picture.png").is_file()
    ramped, rough = figures["curves"]
    assert (ramped["name"], rough["name"]) == ("DepS", "DepS, no ramp")
    last = ramped["rows"][-1]
    assert last["step"] == ramped["steps"] and last["cost"] == ramped["cost"] and len(whole(ramped)) >= 2
    assert all(a["cost"] < b["cost"] for a, b in zip(ramped["rows"], ramped["rows"][1:]))
    assert any(len(row["top1"]) == 1 for row in ramped["rows"])  # the largest alone, around the switch
    assert ramped["test_images"] == 359 and set(ramped["top1"]) == set(ramped["macs"])
    alone = figures["alone"]
    assert alone["images"] == last["images"] == ramped["steps"] * 20 or alone["supernet"] == "DepS, no ramp"
    best = max(figures["rows"], key=lambda row: row["the six"]["mean"])
    (row,) = alone["rows"]
    assert row["net"] == "e4 d4" and 0 < row["scratch"] < 1 and 0 < row["tuned"] < 1
    assert row["inherited"] == pytest.approx(best["top1"]["e4 d4"], abs=1e-6)  # extracted as it was read


@pytest.mark.slow
def test_a_killed_contestant_ends_with_the_same_curve(tmp_path: Path) -> None:
    built = tiny("deps-mbv3-cifar10")
    words = (*EQUAL, *TINY, "--epochs=6", "--seed=1", "--strategy.init_args.delay=3", "--strategy.init_args.ramp=1")
    found = []
    for name in ("whole", "killed"):
        contest = Contest("DepS", "deps-mbv3-cifar10", words, str(tmp_path / name), nets(built.space), "e6 d4",
                          100.0 * built.costs.of(built.space.largest()), (7, 8), 40, 40)  # fmt: skip
        contest.write(tmp_path / f"{name}.json")
        command = [sys.executable, "-m", "nas.benchmarks.quality_once_run", str(tmp_path / f"{name}.json")]
        if name == "killed":
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            until = time.monotonic() + 120
            while not (tmp_path / name / "checkpoints" / "last.pt").exists() and time.monotonic() < until:
                time.sleep(0.02)
            running.send_signal(signal.SIGKILL)
            running.wait()
            assert not (tmp_path / name / CURVE).exists()
        subprocess.run(command, check=True, capture_output=True)
        content = json.loads((tmp_path / name / CURVE).read_text())
        found.append({**content, "seconds": 0, "rows": [{**row, "seconds": 0} for row in content["rows"]]})
    assert found[0] == found[1] and len(found[0]["rows"]) > 3


# -- speed --------------------------------------------------------------------------------------------------------------

NUMBERS = {"width": 10, "population": 10, "generations": 3, "subnets": 4, "images": 16}


@pytest.mark.slow
def test_steps_of_a_supernet_and_of_its_networks() -> None:
    bench = once.OnceBench(Conditions(pairs=2, batch=2, size=16), "channels_last", NUMBERS)
    assert set(once.CASES) == {f"{kind}, {what}" for kind in once.KINDS for what in
                               (*once.ARCHS, "sandwich", "sandwich over the largest")}  # fmt: skip
    rows = measure(bench, {name: once.CASES[name] for name in ("ofa, smallest", "ofa, sandwich")})
    for row in rows:
        assert row["ratio"] > 0 and row["goal"] == 1.02 and min(row["aten_calls"].values()) > 100


@pytest.mark.parametrize(("low", "words"), [(1.0, "goal met"), (1.03, "bound met"), (1.06, "missed")])
def test_verdicts_follow_the_lower_end(low: float, words: str) -> None:
    row = {"case": "ofa, smallest", "layout": "nchw", "ratio": 1.1, "interval90": [low, 1.2]}
    assert once.verdict(row) == f"ofa, smallest, nchw: 1.100; goal 1.02, at most 1.06: {words}; released code 1.13"


def test_evolution_and_evaluation_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    conditions = Conditions(batch=2, size=8)
    found = once.evolution(conditions, NUMBERS, "nchw")
    assert 10 < found["candidates"] <= 40 and found["seconds"] > 0 and found["goal"] == 2.0
    read = once.evaluation(conditions, NUMBERS, "channels_last")
    assert read["subnets"] == 4 and read["images"] == 16 and 0 < read["interval90"][0] <= read["ratio"]
    assert "candidates" in once.said(found) and "4 subnets" in once.said(read)


@pytest.mark.slow
def test_the_program_prints_cases_measures_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "once.json"
    figures = once.main(["--pairs", "2", "--batch", "2", "--size", "32", "--layouts", "nchw", "--width", "10", "--population",
                         "10", "--generations", "2", "--out", str(out), "--only", "ofa, sandwich over the largest",
                         "evolution"])  # fmt: skip
    (row,), (further,) = figures["rows"], figures["further"]
    assert row["goal"] is None and further["measure"] == "evolution" and further["layout"] == "nchw"
    assert set(figures["peaks"]["nchw"]) == {"ofa-sandwich", "ofa-largest-plain"}
    assert json.loads(out.read_text()) == json.loads(json.dumps(figures))
    printed = capsys.readouterr().out
    ours, against = figures["peaks"]["nchw"].values()
    assert ("peak memory of the sandwich" in printed) == (min(ours, against) > 0) and "candidates" in printed
