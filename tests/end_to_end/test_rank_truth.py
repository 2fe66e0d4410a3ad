"""Ranking during a search, and the same by nas rank afterwards; networks trained alone as the truth, killed and resumed."""
from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli import SEARCH, differences, nas, ok
from killed import KILL, At, run
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas.commands.extract import load_source
from nas.ranking.truth import trained_truth
from search_spaces.resnet import CifarResNet

NET = CifarResNet(14, "tied", [4, 6, 8])
TEXTS = [NET.text(NET.sample(random.Random(seed))) for seed in range(12)]
READ = ("--rank.images", "48", "--rank.bn_images", "32", "--rank.archs", "8")


@pytest.fixture(scope="module")
def truth(place: Path) -> str:
    path = place / "known.csv"
    rows = [f'"{text}",{value}' for text, value in zip(TEXTS, random.Random(1).sample(range(100), 12))]
    path.write_text("\n".join(["arch,acc", *rows, "none of ours,5\n"]))
    return str(path)


@pytest.fixture(scope="module")
def ranked(place: Path, truth: str) -> Path:
    """The search ``tied``, but ranked after its first epoch and at its end."""
    said = ok(*SEARCH, "--rank.truth", truth, "--rank.every", "1", *READ, "--out", place / "ranked")
    assert "1 rows name no architecture of this space, or no value" in said.err
    assert "rank after step 6: Kendall tau-b " in said.err and "8 architectures" in said.err
    return place / "ranked"


def readings(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "rank/kendall_tau" in line]


def payload(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True)


def test_the_last_reading_is_what_nas_rank_says(ranked: Path, truth: str, tmp_path: Path) -> None:
    words = ("--images", "48", "--bn-images", "32", "--archs", "8", "--out", tmp_path / "rank", "--json")
    said = json.loads(ok("rank", ranked, "--truth", truth, *words).last)["rankers"]
    last, kept = readings(ranked)[-1], payload(ranked, "last")["keep"]["rank"]["rows"][-1]
    found = said["prediction"]["kendall_tau"]
    assert last["step"] == kept["step"] == 11 and kept["images"] == 48
    assert kept["kendall_tau"] == pytest.approx([found["value"], found["low"], found["high"]])
    assert last["rank/kendall_tau"] == kept["kendall_tau"][0]
    assert last["rank/spearman"] == pytest.approx(said["prediction"]["spearman"]["value"])
    macs, report = said["macs"]["kendall_tau"], (ranked / "report.md").read_text()
    assert f"| MACs alone |  | {macs['value']:.3f} [{macs['low']:.3f}, {macs['high']:.3f}] |" in report


def test_the_search_is_the_one_without(ranked: Path, tied: Path) -> None:
    for name in ("last", "previous"):
        mine, theirs = payload(ranked, name), payload(tied, name)
        assert len(mine["keep"].pop("rank")["rows"]) == {"last": 2, "previous": 1}[name]
        for key in ("config", "config_hash"):
            mine.pop(key), theirs.pop(key)
        assert differences(mine, theirs) == []
    lines = [line for line in (ranked / "metrics.jsonl").read_text().splitlines() if "rank/" not in line]
    assert lines == (tied / "metrics.jsonl").read_text().splitlines()
    files = [json.loads((folder / "arch.json").read_text()) for folder in (ranked, tied)]
    for file in files:
        file["provenance"].pop("recipe_sha256")
    assert files[0] == files[1]
    assert "rank" not in yaml.safe_load((tied / "config.yaml").read_text())


def test_the_curves_are_in_the_runs_own_events(ranked: Path) -> None:
    events = EventAccumulator(str(ranked), {"scalars": 0}).Reload()
    for tag in ("rank/kendall_tau", "rank/spearman"):
        assert [(one.step, pytest.approx(one.value)) for one in events.Scalars(tag)] == [
            (line["step"], line[tag]) for line in readings(ranked)]  # fmt: skip
    assert (ranked / "rank-curve.png").is_file()


@pytest.mark.slow
def test_a_killed_search_ranks_on(ranked: Path, truth: str, tmp_path: Path) -> None:
    words = (*SEARCH, "--rank.truth", truth, "--rank.every", "1", *READ, "--out", tmp_path / "run", "--resume", "auto")
    assert run(words, At(KILL, "update", 9), tmp_path / "log") == -KILL
    ok(*words)
    assert differences(payload(tmp_path / "run", "last"), payload(ranked, "last")) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (ranked / "metrics.jsonl").read_bytes()


def test_a_recipe_that_asks_too_much_is_refused_in_one_line(truth: str, tmp_path: Path) -> None:
    for words, said in (
        (("--rank.every", "2"), "rank.truth is missing, so rank.every says nothing"),
        (("--rank.truth", tmp_path / "none.csv"), "none.csv: there is no such file"),
        (("--rank.truth", truth, "--rank.value", "top"), "rank.value top: "),
        (("--rank.truth", truth, "--rank.every", "0"), "rank.every = 0 is too few"),
        (("--rank.truth", truth, "--rank.archs", "few"), "rank.archs = 'few'. Allowed: 3 or more, or all."),
        (("--rank.truths", truth), "rank.truths is not a known key. Nearest: rank.truth."),
        (("--rank.truth", truth, "--split.at", "[1]"), "a run with splits is ranked when it has all its supernets"),
    ):
        result = nas(*SEARCH, *words, "--out", tmp_path / "run")
        assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0], result.err
        assert not (tmp_path / "run").exists()


TRAIN = ("--truth", "train", "--networks", "3", "--epochs", "2", "--seed", "2", "--bn-images", "32")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_networks_trained_alone_are_a_truth_for_nas_rank(tied: Path, tmp_path: Path) -> None:
    """Killed in the second of three networks, in its second epoch: the first is not trained again, and all ends as without."""
    for name in ("run", "whole"):
        shutil.copytree(tied, tmp_path / name)
    whole = json.loads(ok("rank", tmp_path / "whole", *TRAIN, "--json").last)
    words = ("rank", tmp_path / "run", *TRAIN, "--out", tmp_path / "rank", "--json")
    assert run(words, At(KILL, "update", 12 + 9), tmp_path / "log") == -KILL  # 12 steps for each network
    (path,) = (tmp_path / "run").glob("truth*/truth.csv")
    first = rows(path)
    assert len(first) == 1 and not (tmp_path / "rank").exists()
    result = ok(*words)
    assert "network 1 of 3" not in result.err and "network 3 of 3: top-1 " in result.err
    assert len(re.findall(r"^step 12/12 ", result.err, re.MULTILINE)) == 2
    found, (other,) = rows(path), (tmp_path / "whole").glob("truth*/truth.csv")
    assert found[:1] == first and path.read_bytes() == other.read_bytes()
    said = json.loads(result.last)
    assert said["n"] == 3 and said["rankers"] == whole["rankers"]
    p, t = ([float(row[name]) for row in rows(tmp_path / "rank" / "rank.csv")] for name in ("prediction", "truth"))
    assert t == [float(row["top1"]) for row in found]
    tau = float(stats.kendalltau(p, t).statistic)
    assert said["rankers"]["prediction"]["kendall_tau"]["value"] == (None if tau != tau else pytest.approx(tau))


@pytest.mark.slow
def test_a_truth_is_what_nas_retrain_finds(tied: Path, tmp_path: Path) -> None:
    """On the search's own images, read on its select split."""
    folder, built, config = load_source(str(tied), [])
    assert folder is not None
    found = rows(trained_truth(folder, built, config, networks=3, epochs=2, seed=2, out=tmp_path / "truth"))[0]
    bundle = ok("extract", tied, "--arch", found["arch"], "--from", "scratch", "--out", tmp_path / "bundle").last
    words = ("--epochs", "2", "--seed", "2", "--data.valid_fraction", "0.5", "--out", tmp_path / "retrained")
    alone = Path(ok("retrain", bundle, *words).last)
    said = json.loads(ok("evaluate", alone, "--split", "select", "--json").last)
    assert said["top1"] == float(found["top1"]) and said["n"] == int(found["n"])
