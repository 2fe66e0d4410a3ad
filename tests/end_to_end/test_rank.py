"""nas rank: a run's accuracies and given values against known ones, as a user runs it."""
from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import SEARCH, content, differences, nas, ok
from killed import KILL, At, run
from PIL import Image
from rank_tables import ARCHS, NET, QUICK, TEXTS, rows, save
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas import checkpoint
from nas.commands.extract import load_source
from nas.evaluate import score_archs

NAMED = ("--space", "resnet.CifarResNet", "--args", "{depth: 14, widths: [4, 6, 8]}", "--input", "[1, 8, 8]")


def macs(arch: Mapping[str, Any]) -> int:
    """As ``nas spaces`` counts them."""
    alone = json.dumps({name: [value] for name, value in arch.items()})
    said = json.loads(ok("spaces", "resnet.CifarResNet", *NAMED[2:], "--restrict", alone, "--json").last)
    return int(said["costs"]["largest"]["macs"])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def truth() -> str:
    """Twelve architectures of which one has no value, and a row that is none."""
    values = [90.0 + i for i in range(12)]
    return save("truth.csv", {"arch": [*TEXTS, "none of ours"], "acc": [*values[:3], "nan", *values[4:], 50.0]})


def test_a_run_is_ranked_by_its_own_accuracies(tied: Path, truth: str, place: Path) -> None:
    before = content(place)
    result = ok("rank", tied, "--truth", truth, *QUICK, "--top", "3", "--out", "out")
    assert result.last == "out/rank.json" and result.out.count("\n") == 1 and result.errors == []
    assert content(place) == before
    report = json.loads(Path("out/rank.json").read_text())
    kept = [i for i in range(12) if i != 3]
    _, built, _ = load_source(str(tied), [])
    p = [score_archs(built.net, [ARCHS[i]], built.data, "select", torch.device("cpu"), 32, 48)[0].top1 for i in kept]
    t = [90.0 + i for i in kept]
    found = rows("out/rank.csv")
    assert list(found[0]) == ["text", "prediction", "truth", "macs", "params"]
    assert [row["text"] for row in found] == [TEXTS[i] for i in kept]
    assert [(float(row["prediction"]), float(row["truth"])) for row in found] == list(zip(p, t))
    assert [int(row["macs"]) for row in found][:2] == [macs(ARCHS[0]), macs(ARCHS[1])]
    tau = report["rankers"]["prediction"]["kendall_tau"]
    assert tau["value"] == pytest.approx(float(stats.kendalltau(p, t).statistic)) and tau["n"] == 11
    cost = [int(row["params"]) for row in found]
    assert report["rankers"]["params"]["spearman"]["value"] == pytest.approx(float(stats.spearmanr(cost, t).statistic))
    assert report["n"] == report["distinct"] == 11 and report["left_out"] == {"without a truth": 1, "rows of truth unread": 1}
    assert {key: report["predictions"][key] for key in ("step", "split", "images", "bn", "bn_images", "batch_size")} == {
        "step": 12, "split": "valid", "images": 48, "bn": "recalibrated", "bn_images": 32, "batch_size": 16}  # fmt: skip
    for text in ("1 rows left out; the first: 'none of ours'", "1 without a truth", "recalibrated on 32 images, batch size 16",
                 "Kendall tau-b  ", "overlap of the top 3", "regret of the top 2", "named by column arch"):  # fmt: skip
        assert text in result.err


def test_pictures_and_curves(tied: Path, truth: str) -> None:
    said = json.loads(ok("rank", tied, "--truth", truth, *QUICK, "--out", "out", "--json").last)
    assert said.pop("rank") == "out/rank.json" and said == json.loads(Path("out/rank.json").read_text())
    events = EventAccumulator("out", {"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {"rank/kendall_tau", "rank/spearman"}
    assert events.Tags()["images"] == ["rank/scatter"]
    (tau,) = events.Scalars("rank/kendall_tau")
    assert (tau.step, tau.value) == (11, pytest.approx(said["rankers"]["prediction"]["kendall_tau"]["value"]))
    with Image.open("out/scatter.png") as picture:
        assert picture.width > 500 and len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_batch_statistics_are_another_reading(tied: Path, truth: str) -> None:
    report = json.loads(ok("rank", tied, "--truth", truth, "--bn", "batch", "--split", "test", "--images", "50", "--out", "out",
                           "--json").last)  # fmt: skip
    assert {key: report["predictions"].get(key) for key in ("split", "images", "bn", "bn_images", "batch_size")} == {
        "split": "test", "images": 48, "bn": "batch", "bn_images": None, "batch_size": 16}  # fmt: skip
    _, built, _ = load_source(str(tied), [])
    (first,) = score_archs(built.net, ARCHS[:1], built.data, "test", torch.device("cpu"), limit=50, bn="batch")
    assert float(rows("out/rank.csv")[0]["prediction"]) == first.top1


@pytest.mark.slow
def test_a_stopped_run_is_ranked_and_goes_on_as_if_it_had_not_been(tied: Path, truth: str, tmp_path: Path) -> None:
    words = (*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    assert run(words, At(KILL, "update", 9), tmp_path / "log") == -KILL
    before = content(tmp_path / "run")
    for name, step in (("rank", 6), ("rank-2", 6)):
        assert ok("rank", "run", "--truth", truth, *QUICK, "--archs", "3").last == f"run/{name}/rank.json"
        assert json.loads(Path(f"run/{name}/rank.json").read_text())["predictions"]["step"] == step
    assert {path: found for path, found in content(tmp_path / "run").items() if not path.startswith("rank")} == before
    ok(*words)
    for name in ("last.pt", "previous.pt"):
        mine, theirs = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (tmp_path / "run", tied))
        assert differences(mine, theirs) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tied / "metrics.jsonl").read_bytes()
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0]["step"] == 12


@pytest.mark.slow
def test_which_architectures(tied: Path, truth: str) -> None:
    def ranked(*words: str) -> tuple[list[str], dict[str, int]]:
        out = Path(f"out{len(list(Path().glob('out*')))}")
        ok("rank", tied, "--truth", truth, *QUICK, *words, "--out", out)
        return [row["text"] for row in rows(out / "rank.csv")], json.loads((out / "rank.json").read_text())["left_out"]

    every = [text for text in TEXTS if text != TEXTS[3]]
    assert ranked("--archs", "all")[0] == every
    five = ranked("--archs", "5")[0]
    assert len(five) == 5 and five == [text for text in every if text in five]
    assert ranked("--archs", "5")[0] == five != ranked("--archs", "5", "--seed", "2")[0]
    other = NET.text(NET.largest())
    save("mine.csv", {"name": [TEXTS[7], other, TEXTS[3], TEXTS[1], TEXTS[7], TEXTS[2]]})
    names, left = ranked("--archs", "mine.csv")
    assert names == [TEXTS[7], TEXTS[1], TEXTS[2]]
    assert left == {"not in the truth": 1, "without a truth": 1, "rows of truth unread": 1}


@pytest.mark.slow
def test_given_values_need_no_run(truth: str) -> None:
    """Predictions 3, 1, 2, 2 of truths 90, 91, 92, 94: (1 + 1 - 3) / sqrt(5 * 6)."""
    save("p.csv", {"arch": [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4], TEXTS[3], TEXTS[5], "absent"], "p": [3, 1, 2, 2, 1, "", 4]})
    words = ("rank", "--truth", truth, "--key", "arch", "--value", "acc", "--predictions", "p.csv", "--prediction", "p")
    result = ok(*words)
    assert result.last == "runs/rank/rank.json" and "nas: no run folder is named: the result goes into runs/rank," in result.err
    assert ok(*words).last == "runs/rank-2/rank.json"
    assert "no run folder" not in ok(*words, "--out", "mine").err
    report = json.loads(Path(result.last).read_text())
    assert list(report["rankers"]) == ["prediction"] and report["n"] == 4
    tau = report["rankers"]["prediction"]["kendall_tau"]
    assert tau["value"] == pytest.approx(-1 / math.sqrt(30)) and tau["low"] <= tau["value"] <= tau["high"]
    assert report["rankers"]["prediction"]["regret"]["note"] == "the top 10 are all 4"
    assert report["left_out"] == {"not in the truth": 1, "without a truth": 1, "not predicted": 7, "without a prediction": 1}
    named = json.loads(ok(*words[:3], "--predictions", "p.csv", *NAMED, "--out", "out", "--json").last)
    assert list(named["rankers"]) == ["prediction", "macs", "params"]
    assert named["rankers"]["prediction"] == report["rankers"]["prediction"]
    assert [int(row["macs"]) for row in rows("out/rank.csv")] == [macs(ARCHS[i]) for i in (0, 1, 2, 4)]


def test_a_ranking_ranks_itself(tied: Path, truth: str) -> None:
    """rank.csv is a table of predictions, and of truths; the run lends its space."""
    ok("rank", tied, "--truth", truth, *QUICK, "--out", "first")
    words = ("rank", tied, "--truth", "first/rank.csv", "--value", "prediction", "--predictions", "first/rank.csv")
    report = json.loads(ok(*words, "--prediction", "prediction", "--out", "second", "--json").last)
    assert report["n"] == 11 and report["rankers"]["prediction"]["kendall_tau"]["value"] == pytest.approx(1.0)
    assert report["rankers"]["prediction"]["overlap"]["value"] == pytest.approx(1.0)


@pytest.mark.slow
def test_tables_of_choices_of_numbers_and_json(tied: Path) -> None:
    save("choices.csv", {**{name: [arch[name] for arch in ARCHS] for name in ARCHS[0]}, "acc": range(12)})
    Path("truth.json").write_text(json.dumps({text: {"acc": [i, i + 1.0]} for i, text in enumerate(TEXTS)}))
    taus = []
    for given in ("choices.csv", "truth.json"):
        said = json.loads(ok("rank", tied, "--truth", given, "--value", "acc", *QUICK, "--out", f"{given}.out", "--json").last)
        assert said["n"] == 12
        taus.append(said["rankers"]["macs"]["kendall_tau"])
    assert taus[0] == taus[1]
    save("numbered.csv", {"index": [3, 0, 11, 40], "p": [1, 2, 3, 4]})
    said = json.loads(ok("rank", tied, "--truth", "truth.json", "--predictions", "numbered.csv", "--out", "o", "--json").last)
    assert said["n"] == 3 and said["rankers"]["prediction"]["kendall_tau"]["value"] == pytest.approx(1 / 3)
    assert "row numbers from 0 of truth.json" in said["predictions"]["key"]
    assert said["left_out"]["rows of predictions unread"] == 1
    assert [row["text"] for row in rows("o/rank.csv")] == [TEXTS[3], TEXTS[0], TEXTS[11]]


def test_constants_are_no_crash(truth: str) -> None:
    save("p.csv", {"arch": TEXTS, "p": [1] * 12})
    result = ok("rank", "--truth", truth, "--predictions", "p.csv", "--json")
    by = json.loads(result.last)["rankers"]["prediction"]
    assert by["kendall_tau"] == {"value": None, "low": None, "high": None, "n": 11, "k": None,
                                 "note": "all predictions are equal"}  # fmt: skip
    assert by["overlap"]["value"] == pytest.approx(10 / 11)
    assert "prediction: all predictions are equal, so it ranks no better than chance" in result.err
    events = EventAccumulator("runs/rank", {"scalars": 0}).Reload()
    assert events.Tags()["scalars"] == [] and Path("runs/rank/scatter.png").is_file()


# ---- bad input -----------------------------------------------------------------------------------------------------

Words = Sequence[str]
ON = ("TIED", "--truth", "truth.csv")
GIVEN = ("--truth", "truth.csv", "--predictions", "p.csv")
CASES: dict[str, tuple[Words, list[str]]] = {
    "truth": (["TIED"], ["--truth is missing"]),
    "run": (["--truth", "truth.csv"], ["which run?", "--predictions"]),
    "run absent": (["nope", "--truth", "truth.csv"], ["nope: there is no such folder"]),
    "run no run": (["folder", "--truth", "truth.csv"], ["not a run folder", "config.yaml"]),
    "truth absent": (["TIED", "--truth", "nope.csv"], ["nope.csv: there is no such file"]),
    "truth no table": (["TIED", "--truth", "picture.csv"], ["picture.csv cannot be read"]),
    "key": ([*ON, "--key", "arhc"], ["--key arhc: truth.csv has no such column", "Allowed: arch, acc, n"]),
    "key of numbers": ([*ON, "--value", "acc", "--key", "n"], ["--key n: there, truth.csv holds no architectures"]),
    "key unknown": ([*ON[:2], "words.csv", "--value", "acc"], ["--key is missing, and words.csv holds no architectures"]),
    "numbers alone": ([*ON[:2], "numbers.csv"], ["numbers.csv has numbers only", "no numbering of its own"]),
    "value": ([*ON, "--value", "top1"], ["--value top1: truth.csv has no such column"]),
    "value unnamed": (ON, ["--value is missing", "acc, n"]),
    "value no number": ([*ON, "--value", "arch"], ["truth.csv, row 1: arch = ", "is no number"]),
    "no overlap": ([*ON, "--value", "acc", "--archs", "mine.csv"], ["0 architectures with truth and prediction",
                                                                   "3 not in the truth", "truth.csv does not name 'stage0",
                                                                   f"; its first is {TEXTS[0]!r}."]),
    "too few": ([*ON, "--value", "acc", "--archs", "2"], ["--archs 2 is too few"]),
    "too few left": ([*ON, "--value", "n"], ["2 architectures with truth and prediction; a ranking needs 3",
                                             f"10 without a truth. truth.csv has no number in column n for {TEXTS[2]!r}."]),
    "too few of a table": (["TIED", "--truth", "two.csv", "--value", "acc"], ["2 architectures with", "none. All 2 that"]),
    "too few predicted": ([*GIVEN, "--value", "acc", "--prediction", "q"],
                          [f"10 without a prediction. p.csv has no number in column q for {TEXTS[2]!r}."]),
    "archs": ([*ON, "--value", "acc", "--archs", "some"], ["--archs some: there is no such file", "a number, all"]),
    "bn": ([*ON, "--value", "acc", "--bn", "running"], ["--bn running", "Allowed: recalibrated, batch"]),
    "split": ([*ON, "--value", "acc", "--split", "train"], ["--split train", "select, valid, test"]),
    "images": ([*ON, "--value", "acc", "--images", "0"], ["--images 0 is too few"]),
    "top": ([*ON, "--value", "acc", "--top", "0"], ["--top 0 is too few"]),
    "out in use": ([*ON, "--value", "acc", "--out", "folder"], ["folder is not empty"]),
    "prediction alone": ([*ON, "--value", "acc", "--prediction", "p"], ["--predictions, which is missing"]),
    "both readings": ([*GIVEN, "--value", "acc", "--bn", "batch"], ["--bn says how a run is read"]),
    "override of nothing": ([*GIVEN, "--value", "acc", "--data.limit", "3"], ["--data.limit overrides a recipe"]),
    "no common key": (["--truth", "truth.csv", "--value", "acc", "--predictions", "words.csv", "--prediction", "acc"],
                      ["share no column that could name an architecture"]),
    "space": ([*GIVEN, "--value", "acc", "--space", "resnet.Cifar"], ["--space resnet.Cifar", "Nearest: resnet.CifarResNet"]),
    "two spaces": ([*ON, "--value", "acc", "--space", "resnet.CifarResNet"], ["has a space already"]),
    "option": ([*ON, "--turth", "x"], ["turth"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_changes_nothing(name: str, tied: Path, place: Path) -> None:
    save("truth.csv", {"arch": TEXTS, "acc": range(12), "n": [1, 2, *[None] * 10]})
    save("words.csv", {"name": ["a", "b", "c"], "acc": [1, 2, 3]})
    save("numbers.csv", {"index": [0, 1, 2], "acc": [1, 2, 3]})
    save("two.csv", {"arch": TEXTS[:2], "acc": range(2)})
    save("p.csv", {"arch": TEXTS, "p": range(12), "q": [1, 2, *[None] * 10]})
    save("mine.csv", {"arch": [NET.text(NET.sample(random.Random(seed))) for seed in (50, 51, 52)]})
    Path("picture.csv").write_bytes(bytes(range(256)))
    Path("folder").mkdir()
    Path("folder/thesis.txt").write_text("mine")
    before = content(place), content(Path())
    words, fragments = CASES[name]
    result = nas("rank", *(tied if word == "TIED" else word for word in words))
    assert result.code == 2, result.out + result.err
    assert len(result.errors) == 1 and result.errors[0].startswith("nas rank: "), result.err
    assert [text for text in fragments if text not in result.errors[0]] == [], result.errors[0]
    assert result.out == "" and (content(place), content(Path())) == before
