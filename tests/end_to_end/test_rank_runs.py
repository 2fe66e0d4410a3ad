"""nas rank on several runs, on several columns, and on networks trained as truth, as a user runs it."""
from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import SEARCH, content, nas, ok
from PIL import Image
from rank_tables import ARCHS, NET, QUICK, TEXTS, rows, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas.build import Built
from nas.engine import seed_from
from nas.ranking.statistics import differences, kendall

TABLES = Path(__file__).resolve().parents[3] / "shared" / "tables"
published = pytest.mark.skipif(not TABLES.is_dir(), reason="the published tables are not in ../shared/tables")
MORE = list({NET.text(arch): None for arch in map(NET.sample, map(random.Random, range(80)))})[:50]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half as long a search as ``tied`` in the same space, from another seed; called like it."""
    folder = tmp_path_factory.mktemp("others") / "tied"
    ok(*SEARCH, "--epochs", "1", "--seed", "2", "--out", folder)
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_two_runs_in_one_picture(tied: Path, other: Path) -> None:
    truth = save("truth.csv", {"arch": MORE, "acc": [90 + i % 7 for i in range(50)]})
    before = content(tied), content(other)
    result = ok("rank", tied, other, "--truth", truth, *QUICK, "--seed", "3")
    assert (content(tied), content(other)) == before
    assert result.last == "runs/rank/rank.json" and result.errors == []
    assert "nas: 2 runs are compared: the result goes into runs/rank, --out chooses another" in result.err
    report = json.loads(Path(result.last).read_text())
    a, b = (f"{folder.parent.name}/tied" for folder in (tied, other))  # made unique by their parents
    assert list(report["rankers"]) == [a, b, "macs", "params"] and report["n"] == 50
    assert {name: (said["run"], said["step"]) for name, said in report["predictions"].items()} == {
        a: (str(tied), 12), b: (str(other), 6)}  # fmt: skip
    found = rows("runs/rank/rank.csv")
    assert list(found[0]) == ["text", a, b, "truth", "macs", "params"]
    p, q, t = (np.array([float(row[name]) for row in found]) for name in (a, b, "truth"))
    for name, values in ((a, p), (b, q)):
        assert report["rankers"][name]["kendall_tau"]["value"] == pytest.approx(kendall(values, t))
    alone = json.loads(ok("rank", other, "--truth", truth, *QUICK, "--seed", "3", "--out", "alone", "--json").last)
    assert alone["rankers"] == {"prediction" if name == b else name: by for name, by in report["rankers"].items() if name != a}
    assert [float(row["prediction"]) for row in rows("alone/rank.csv")] == q.tolist()
    first, by = report["differences"][0], differences({a: p, b: q}, t, seed_from(3, "bootstrap"))[a, b]
    assert (first["of"], first["less"], first["n"]) == (a, b, 50)
    assert (first["value"], first["low"], first["high"]) == pytest.approx(by[:3])
    assert sum(group["n"] for group in report["bins"]["macs"]) == 50 and len(report["bins"]["macs"]) > 1
    assert set(report["bins"]["rankers"]) == {a, b, "macs", "params"}
    low, high = (report["bins"]["macs"][0][key] for key in ("low", "high"))
    within = np.array([low <= int(row["macs"]) <= high for row in found])
    assert report["bins"]["rankers"][b]["kendall_tau"][0]["value"] == pytest.approx(kendall(q[within], t[within]))
    for text in (f"{b}: {other} after 6 steps", f"tau-b less that of {b}", "tau-b, mean over the bins", " MACs, n = "):
        assert text in result.err
    with Image.open("runs/rank/scatter.png") as picture:
        assert picture.width > 900 and picture.height > 500 and len(np.unique(np.asarray(picture.convert("L")))) > 20
    for folder, name, step in ((tied, a, 11), (other, b, 5)):
        tau = report["rankers"][name]["kendall_tau"]["value"]
        assert scalars(Path("runs/rank", f"{folder.parent.name}_tied"))["rank/kendall_tau"] == [(step, pytest.approx(tau))]
    assert EventAccumulator("runs/rank", {"images": 0}).Reload().Tags()["images"] == ["rank/scatter"]


@pytest.mark.slow
def test_a_restricted_run_leaves_out_what_it_cannot_serve(tied: Path, tmp_path: Path) -> None:
    ok(*SEARCH, "--epochs", "1", "--restrict", '{"stage0.width": [3, 4]}', "--out", "part")
    truth = save("truth.csv", {"arch": TEXTS, "acc": range(12)})
    kept = [text for text, arch in zip(TEXTS, ARCHS) if arch["stage0.width"] in (3, 4)]
    assert 3 <= len(kept) < 12
    report = json.loads(ok("rank", tied, "part", "--truth", truth, *QUICK, "--out", "out", "--json").last)
    assert [row["text"] for row in rows("out/rank.csv")] == kept
    assert report["left_out"] == {"not in the space of part": 12 - len(kept)} and report["bins"] is None


@pytest.mark.slow
@published
def test_several_columns_against_published_taus() -> None:
    """../shared/papers/pooling-mixture.md, section 5, check 8."""
    table = TABLES / "resnet20_baselines_mixture.csv"
    names = [f"M{models}_avg" for models in (1, 2, 4, 8)]
    words = ("rank", "--truth", table, "--value", "baseline_avg", "--predictions", table)
    result = ok(*words, "--prediction", ",".join(names), "--out", "out", "--json")
    report = json.loads(result.last)
    assert list(report["rankers"]) == names and report["n"] == 36 and report["bins"] is None
    for name, tau, rho in zip(names, (0.143, 0.312, 0.597, 0.530), (0.233, 0.473, 0.757, 0.709)):
        by = report["rankers"][name]
        assert by["kendall_tau"]["value"] == pytest.approx(tau, abs=0.0005)
        assert by["spearman"]["value"] == pytest.approx(rho, abs=0.0005)
        assert report["predictions"][name]["value"] == name
        assert scalars(Path("out", name))["rank/kendall_tau"] == [(0, pytest.approx(tau, abs=0.0005))]
    apart = {(by["of"], by["less"]): by for by in report["differences"]}
    assert len(apart) == 6 and apart["M1_avg", "M4_avg"]["value"] == pytest.approx(0.143 - 0.597, abs=0.001)
    assert apart["M1_avg", "M4_avg"]["high"] < 0 < apart["M4_avg", "M8_avg"]["high"]
    assert list(rows("out/rank.csv")[0]) == ["text", *names, "truth"]
    assert result.err.count("36 rows, 36 architectures, named by architecture") == 2  # a table once, not once a column
    one = json.loads(ok(*words, "--prediction", "M4_avg", "--out", "one", "--json").last)
    assert one["rankers"] == {"prediction": report["rankers"]["M4_avg"]} and one["differences"] == []


def test_columns_with_odd_names_and_gaps() -> None:
    save("truth.csv", {"k": "abcde", "acc": range(5)})
    save("p.csv", {"k": "abcde", "truth": [1, 2, 3, "", 5], "../x": [5, 4, "", 2, 1], "u,v": range(5), "$x": range(5)})
    given = ("rank", "--truth", "truth.csv", "--predictions", "p.csv", "--prediction")
    report = json.loads(ok(*given, "truth,../x,$x", "--out", "out", "--json").last)
    assert list(report["rankers"]) == ["column truth", "../x", "$x"] and report["n"] == 3
    assert report["left_out"] == {"without a prediction": 2}
    assert [report["rankers"][name]["kendall_tau"]["value"] for name in report["rankers"]] == pytest.approx([1, -1, 1])
    assert sorted(path.name for path in Path("out").iterdir() if path.is_dir()) == ["column_truth", "x", "x-2"]
    assert json.loads(ok(*given, "u,v", "--out", "comma", "--json").last)["predictions"]["value"] == "u,v"


def test_networks_trained_alone_are_the_truth(tied: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def trained(folder: Path, built: Built, config: Mapping[str, Any], **more: Any) -> Path:
        asked.update(more, folder=folder, step=built.step, recipe=config["space"]["class_path"])
        return Path(save("trained.csv", {"arch": TEXTS, "top1": range(12), "n": [50] * 12}))  # more are there than asked for

    monkeypatch.setattr("nas.commands.rank.trained_truth", trained)
    words = ("--truth", "train", "--networks", "4", "--epochs", "3", "--split", "test", "--seed", "5", *QUICK)
    report = json.loads(ok("rank", tied, other, *words, "--out", "out", "--json").last)
    assert asked == {"networks": 4, "epochs": 3, "seed": 5, "split": "test", "out": tied / "truth-test-epochs3-seed5",
                     "folder": tied, "step": 12, "recipe": "search_spaces.resnet.CifarResNet"}  # fmt: skip
    assert [row["text"] for row in rows("out/rank.csv")] == TEXTS[:4] and len(report["predictions"]) == 2
    assert report["truth"]["value"] == "top1" and report["n"] == report["distinct"] == 4


ON = ("TIED", "--truth", "truth.csv", "--value", "acc")
GIVEN = ("--truth", "truth.csv", "--value", "acc", "--predictions", "p.csv")
CASES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "one absent": (("TIED", "nope", *ON[1:]), ["nope: there is no such folder"]),
    "one no run": (("TIED", "folder", *ON[1:]), ["folder is not a run folder"]),
    "one not begun": (("TIED", "begun", *ON[1:]),
                      ["begun has no checkpoint yet", "begun/config.yaml --resume auto --out begun"]),
    "another space": (("TIED", "TAS", *ON[1:]), ["tas is of another space than", "kind='tas'", "kind='tied'",
                                                  "rank this one alone"]),
    "twice": (("TIED", "TIED/", *ON[1:]), ["tied/ is the same folder as", "Name each run once"]),
    "runs and values": (("TIED", "TAS", *GIVEN), ["with --predictions, one run or recipe lends its space"]),
    "bins": ((*ON, "--bins", "1"), ["--bins 1: allowed are 2 and more, and 0"]),
    "bins of nothing": ((*GIVEN, "--prediction", "p", "--bins", "3"),
                        ["--bins 3: the MACs of these architectures are not known", "--space"]),
    "one column absent": ((*GIVEN, "--prediction", "p,r"), ["--prediction r: p.csv has no such column", "Allowed: arch, p, q"]),
    "columns unnamed": (GIVEN, ["--prediction is missing", "p, q"]),
    "epochs of a table": ((*ON, "--epochs", "3"), ["--epochs is of --truth train, but truth.csv gives the truth"]),
    "networks of a table": ((*ON, "--networks", "3"), ["--networks is of --truth train"]),
    "no epochs": (("TIED", "--truth", "train"), ["--epochs is missing: how long"]),
    "epochs": (("TIED", "--truth", "train", "--epochs", "0"), ["epochs = 0 is too few"]),
    "networks": (("TIED", "--truth", "train", "--epochs", "1", "--networks", "2"), ["--networks 2 is too few", "3 or more"]),
    "value of trained": (("TIED", "--truth", "train", "--epochs", "1", "--value", "acc"), ["--value is of a table"]),
    "archs of trained": (("TIED", "--truth", "train", "--epochs", "1", "--archs", "5"), ["draws --networks itself"]),
    "trained and given": (("--truth", "train", "--predictions", "p.csv", "--epochs", "1"), ["./train is a file of this name"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_changes_nothing(name: str, tied: Path, tas: Path, place: Path) -> None:
    save("truth.csv", {"arch": TEXTS, "acc": range(12)})
    save("p.csv", {"arch": TEXTS, "p": range(12), "q": range(12)})
    Path("folder").mkdir()
    Path("begun").mkdir()
    Path("begun/config.yaml").write_bytes((tied / "config.yaml").read_bytes())
    before = content(place), content(Path())
    words, fragments = CASES[name]
    result = nas("rank", *(word.replace("TIED", str(tied)).replace("TAS", str(tas)) for word in words))
    assert result.code == 2, result.out + result.err
    assert len(result.errors) == 1 and result.errors[0].startswith("nas rank: "), result.err
    assert [text for text in fragments if text not in result.errors[0]] == [], result.errors[0]
    assert result.out == "" and (content(place), content(Path())) == before
