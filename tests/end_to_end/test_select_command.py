"""nas search with a searcher, then nas select for other budgets of the same run, nas extract and nas evaluate: one accuracy."""
from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import content, nas, ok
from killed import KILL, TERM, At, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas.commands.extract import load_source
from nas.cost import CostTable, macs
from nas.evaluate import score_archs
from nas.latency import Row as LayerRow
from nas.latency import read_latency, write_latency
from search_spaces.arch import read_arch
from search_spaces.resnet import CifarResNet
from supernets.layers import Shape
from supernets.resnet import ResNet

RECIPE = """
space: {class_path: search_spaces.resnet.CifarResNet, init_args: {depth: 14, kind: tied, widths: [4, 6, 8]}}
supernet: {class_path: supernets.resnet.ResNet}
strategy: {class_path: nas.strategies.rsps.RSPS, init_args: {archs: 1}}
searcher:
  class_path: nas.searchers.evolution.Evolution
  init_args: {population: 8, parents: 4, mutations: 4, crossovers: 4, generations: 3}
select: {macs_at_most: 70%, evaluations: 20, bn_images: 64}
evaluate: {bn_images: 64}
data: {name: digits, batch_size: 16, limit: 200, valid_fraction: 0.5}
epochs: 4
threads: 1
"""
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that named a searcher; never written to."""
    place = tmp_path_factory.mktemp("selected")
    (place / "mine.yaml").write_text(RECIPE)
    ok("search", place / "mine.yaml", "--out", place / "run")
    return place / "run"


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def said(*words: str | Path) -> Row:
    return json.loads(ok(*words).last)


def test_the_end_of_a_search_holds_what_the_searcher_picked(finished: Path) -> None:
    file = read_arch(finished / "arch.json")
    full = said("evaluate", finished, "--arch", "largest", "--images", "1", "--json")["subnets"][0]
    assert file.costs["macs"] <= 0.7 * full["macs"]
    with open(finished / "pareto.csv", newline="") as lines:
        rows = [{key: float(row[key]) for key in ("macs", "top1", "front")} for row in csv.DictReader(lines)]
    assert len(rows) == 20 == file.provenance["scored"]
    assert file.metrics["top1"]["value"] == max(row["top1"] for row in rows) and file.metrics["top1"]["n"] == 100
    assert (file.costs["macs"], file.metrics["top1"]["value"], 1.0) in [tuple(row.values()) for row in rows]
    assert (finished / "pareto.png").stat().st_size > 1000
    report = (finished / "report.md").read_text()
    for words in ("the best of 20 subnets", "Evolution(population=8", "macs_at_most = 70%", "smallest top-1 | middle top-1",
                  "nas select", "pareto.csv"):  # fmt: skip
        assert words in report
    [row] = [line for line in report.splitlines() if line.startswith("| **picked** |")]
    top1 = file.metrics["top1"]["value"]
    assert row.startswith(f"| **picked** | {file.costs['macs']:,} | {file.costs['params']:,} | {top1:.4f} | ")
    points = {(f"{row['macs']:,.0f}", f"{row['top1']:.4f}") for row in rows if row["front"]}  # all met the limits
    table = report[report.index("| architecture |") :].split("\n\n")[0].splitlines()[2:]
    shown = {(cells[2].strip(), cells[4].strip()) for cells in (line.split("|") for line in table)}
    assert shown == points and len(points) <= 10
    assert "## Health" not in report


def test_three_subnets_are_read_on_the_way(finished: Path) -> None:
    tags = [f"subnet/{name}/top1" for name in ("smallest", "middle", "largest")]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    read = [line for line in lines if tags[0] in line]
    assert [line["step"] for line in read] == [5, 11, 17, 23] and all(set(tags) <= line.keys() for line in read)
    assert not any("select/top1" in line for line in lines)
    log = EventAccumulator(str(finished))
    log.Reload()
    last = [log.Scalars(tag)[-1].value for tag in tags]
    assert last == pytest.approx([read[-1][tag] for tag in tags])
    _, built, _ = load_source(str(finished), [])
    for arch, value in ((built.space.smallest(), last[0]), (built.space.largest(), last[2])):
        assert score_archs(built.net, [arch], built.data, "select", built.device, 64)[0].top1 == pytest.approx(value)


def test_other_budgets_of_the_same_run_are_extracted_with_the_accuracy_they_were_picked_for(mine: Path) -> None:
    before = {name: text for name, text in content(mine).items() if not name.startswith(("picks", "pareto"))}
    full = said("evaluate", mine, "--arch", "largest", "--images", "1", "--json")["subnets"][0]
    found = []
    for share in ("25%", "45%", "70%"):
        path = Path(ok("select", mine, "--macs-at-most", share).last)
        assert path == mine / "picks" / f"macs_at_most-{share[:-1]}pct.json"
        file = read_arch(path)
        assert file.costs["macs"] <= float(share[:-1]) / 100 * full["macs"] and file.provenance["limits"] == {
            "macs_at_most": share}  # fmt: skip
        out = Path(ok("extract", mine, "--arch", path, "--out", f"bundle-{share[:-1]}").last)
        report = json.loads((out / "report.json").read_text())
        assert report["macs"]["counted"] == report["macs"]["predicted"] == file.costs["macs"]
        assert report["logits_max_difference"] < 1e-4
        stated = read_arch(out / "arch.json").metrics["top1"]
        assert (stated["value"], stated["n"]) == (file.metrics["top1"]["value"], 100)
        again = said("evaluate", out, "--split", "select", "--json")
        assert again["top1"] == stated["value"]
        subnet = said("evaluate", mine, "--arch", path, "--split", "select", "--bn-images", "64", "--json")["subnets"][0]
        assert (subnet["top1"], subnet["macs"]) == (stated["value"], file.costs["macs"])
        found.append(file)
    tops = [file.metrics["top1"]["value"] for file in found]  # what is known counts: more budget is never worse
    assert tops == sorted(tops) and tops[2] >= read_arch(mine / "arch.json").metrics["top1"]["value"]  # the recipe's own limits
    assert {name: text for name, text in content(mine).items() if not name.startswith(("picks", "pareto"))} == before


def test_what_was_scored_is_kept(mine: Path) -> None:
    first = said("select", mine, "--macs-at-most", "50%", "--json")
    again = said("select", mine, "--macs-at-most", "50%", "--json")
    assert 0 < first["scored_now"] < first["scored"] == 20 and again == {**first, "scored_now": 0}
    assert said("select", mine, "--json")["scored_now"] == 0  # the recipe's own limits
    other = said("select", mine, "--macs-at-most", "50%", "--bn-images", "32", "--json")
    assert other["scored_now"] == other["scored"] == other["known"]


def test_what_the_words_say(mine: Path) -> None:
    found = said("select", mine, "--searcher", "random", "--searcher.trials", "6", "--params-at-most", "2k",
                 "--macs-at-least", "3000", "--images", "50", "--out", "deep/own.json", "--json")  # fmt: skip
    file = read_arch("deep/own.json")
    assert found["scored"] == 6 and found["n"] == 50 and found["arch"] == "deep/own.json"
    assert file.costs["params"] <= 2000 and file.costs["macs"] >= 3000
    assert file.provenance["searcher"] == "Random(trials=6)"
    assert file.provenance["limits"] == {"params_at_most": "2k", "macs_at_least": "3000"}  # not those of the recipe
    fewer = said("select", mine, "--searcher", "coarse_to_fine", "--evaluations", "3", "--json")
    assert fewer["scored"] == 3


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A latency table of every shape, its milliseconds not in proportion to MACs."""
    net, asked = ResNet(CifarResNet(14, "tied", widths=(4, 6, 8)), 1, 10), dict[tuple[str, Shape], float]()
    CostTable(net, (8, 8), lambda op, shape: asked.setdefault((op, shape), 0.003 + 1e-5 * macs(op, shape)))
    write_latency(tmp_path / "my table%.csv", [LayerRow(op, shape, ms) for (op, shape), ms in asked.items()])
    return tmp_path / "my table%.csv"


@pytest.mark.slow
def test_a_limit_on_latency(mine: Path, table: Path) -> None:
    path = Path(ok("select", mine, "--latency", table, "--latency-at-most", "60%", "--threads", "1").last)
    assert path == mine / "picks" / "latency_at_most-60pct__by-my_table_.json"
    net = ResNet(CifarResNet(14, "tied", widths=(4, 6, 8)), 1, 10)
    costs, file = CostTable(net, (8, 8), read_latency(table)), read_arch(path)
    most = 0.6 * costs.of(net.space.largest())
    assert file.costs["latency_ms"] == pytest.approx(costs.of(file.arch), rel=1e-12) and file.costs["latency_ms"] <= most
    assert file.provenance["limits"] == {"latency_at_most": "60%"} and file.provenance["scored"] == 20
    again = said("select", mine, "--latency", table, "--latency-at-most", "60%", "--json")
    assert (again["scored_now"], again["latency_ms"]) == (0, file.costs["latency_ms"])
    both = said("select", mine, "--latency", table, "--latency-at-most", "60%", "--macs-at-most", "30%", "--json")
    assert both["latency_ms"] <= most and both["top1"] <= again["top1"] and both["macs"] <= 0.3 * CostTable(net, (8, 8)).of(
        net.space.largest())  # fmt: skip
    [scores] = (mine / "picks").glob("scores-*.jsonl")  # what was scored for MACs counts where it meets the limits
    tops = {tuple(row["code"]): row["top1"] for row in map(json.loads, scores.read_text().splitlines()[1:])}
    met = [top1 for code, top1 in tops.items() if costs.batch(np.array([code]))[0] <= most]
    assert 20 <= len(met) < len(tops) and again["top1"] == max(met)


@pytest.mark.slow
def test_threads_are_those_that_are_asked_for(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand behind those of the recipe, 1."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    (mine / "truth.csv").write_text("arch,accuracy\n" + "".join(f'"{row}",{n}\n' for n, row in enumerate(texts(mine))))
    bundle, before = mine / "bundle", Path(ok("select", mine).last).read_bytes()
    for words in (["select", mine, "--threads", "3"], ["evaluate", mine, "--threads", "3", "--images", "5"],
                  ["extract", mine, "--threads", "3", "--out", bundle],
                  ["rank", mine, "--truth", mine / "truth.csv", "--images", "5", "--bn-images", "16", "--threads", "3"],
                  ["evaluate", bundle, "--threads", "3"]):  # fmt: skip
        del asked[:]
        ok(*words)
        assert asked == ([3] if words[1] == bundle else [1, 3]), words[0]
        assert "threads = 0 is too few" in nas(*("0" if word == "3" else word for word in words)).err
    assert (mine / "picks" / "macs_at_most-70pct.json").read_bytes() == before  # they change nothing of the recipe


def texts(run: Path) -> list[str]:
    with open(run / "pareto.csv", newline="") as lines:
        return [row["arch"] for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_many_subnets_at_once(finished: Path) -> None:
    names = ["largest", "smallest", "random:4", str(finished / "arch.json")]
    found = said("evaluate", finished, *(word for name in names for word in ("--arch", name)), "--bn-images", "64", "--json")
    assert [row["arch"] for row in found["subnets"]] == names and (found["split"], found["n"]) == ("test", 359)
    _, built, _ = load_source(str(finished), [])
    archs = [built.space.largest(), built.space.smallest()]
    scores = score_archs(built.net, archs, built.data, "test", torch.device("cpu"), 64)
    assert [row["top1"] for row in found["subnets"][:2]] == [score.top1 for score in scores]
    text = ok("evaluate", finished).out.splitlines()
    assert len(text) == 2 and text[0].startswith("derived") and "359 test images" in text[1]


@pytest.mark.parametrize(("words", "parts"), [
    (["select", "RUN", "--macs-at-most", "1%"], ["No architecture was found", "network 2,276, which is 3.4%", "67,472, 100"]),
    (["select", "RUN", "--macs-at-most", "much"], ["macs_at_most = 'much' is not a budget"]),
    (["select", "RUN", "--macs-at-most", "40%", "--macs-at-least", "50%"], ["allows nothing"]),
    (["select", "RUN", "--searcher", "best"], ["--searcher best is not known", "random, evolution, coarse_to_fine"]),
    (["select", "RUN", "--searcher", "nas.strategies.tas.TAS"], ["is not a Searcher"]),
    (["select", "RUN", "--searcher", "random", "--searcher.trial", "3"], ["searcher.trial", "Nearest: searcher.trials"]),
    (["select", "RUN", "--evaluations", "0"], ["evaluations = 0 is too few"]),
    (["select", "RUN", "--latency-at-most", "50%"], ["by which table"]),
    (["select", "RUN", "--macs", "40%"], ["macs is not a known key. Nearest: macs_at_most"]),
    (["select", "nowhere"], ["nowhere: there is no such folder"]),
    (["select", "."], ["not a run folder"]),
    (["select", "RUN", "--device", "tpu"], ["--device tpu"]),
    (["evaluate", "RUN", "--arch", "random:x"], ["the seed must be a whole number"]),
    (["evaluate", "RUN", "--arch", "largest", "--images", "0"], ["--images 0 is too few"]),
    (["search", "mine.yaml", "--select.macs_at_most", "1%"], ["No architecture was found"]),
    (["search", "mine.yaml", "--searcher", "nas.searchers.random.Rando"], ["Nearest: nas.searchers.random.Random"]),
    (["search", "mine.yaml", "--select.macs", "1%"], ["select.macs is not a known key. Nearest: select.macs_at_most"]),
])  # fmt: skip
def test_bad_words_are_one_line(finished: Path, words: list[str], parts: list[str]) -> None:
    before = content(finished)
    result = nas(*(str(finished) if word == "RUN" else word for word in words))
    lines = result.err.splitlines()
    assert result.code == 2 and result.out == "" and all(part in lines[-1] for part in parts), result.err
    assert not any("Traceback" in line for line in lines)
    assert content(finished) == before and not Path("runs").exists()


def test_a_damaged_file_of_scores_is_named(mine: Path) -> None:
    path = next((mine / "picks").glob("scores-*.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "{}", *lines[4:]]) + "\n")
    result = nas("select", mine)
    assert result.code == 2 and f"{path}, line 4" in result.err and "Delete the file" in result.err


def test_a_stopped_run_can_be_selected_from(tmp_path: Path) -> None:
    ok("search", "mine.yaml", "--out", "short", "--max_time", "1e-6")
    result = ok("select", "short", "--evaluations", "4", "--json")
    assert json.loads(result.last)["scored"] == 4 and "stopped after" in result.err
    assert read_arch(json.loads(result.last)["arch"]).provenance["step"] < 24


@pytest.mark.slow
@pytest.mark.parametrize("at", [At(KILL, "scored", 2), At(TERM, "scored", 2)], ids=["kill", "term"])
def test_a_search_that_is_killed_while_it_picks_ends_like_an_unbroken_one(finished: Path, tmp_path: Path, at: At) -> None:
    assert run(["search", "mine.yaml", "--out", "broken"], at, tmp_path / "log") == (-9 if at.number == KILL else 143)
    kept = sum(len(path.read_text().splitlines()) - 1 for path in Path("broken/picks").glob("scores-*.jsonl"))
    assert 0 < kept < 20 and not Path("broken/arch.json").exists()
    ok("search", "mine.yaml", "--out", "broken", "--resume", "auto")
    for name in ("arch.json", "pareto.csv", "metrics.jsonl"):
        assert Path("broken", name).read_text() == (finished / name).read_text(), name
    report = (finished / "report.md").read_text().replace(str(finished), "broken").replace("# Search: run", "# Search: broken")
    assert Path("broken/report.md").read_text() == report
