"""A fraction of the images an epoch, and multi-sample dropout: in a search, its bundle, and retraining."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli import DATA, SEARCH, differences, nas, ok

from nas.build import rebuild
from nas.bundle import load_bundle
from nas.heads import MultiSampleDropout

SUBSET = ("--data.subset", "0.5")  # of 100 images: 3 batches of 16 an epoch, not 6
HEAD = ("--head.dropout", "0.3", "--head.samples", "4")


def steps(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def test_a_search_says_what_it_reads_and_counts_it() -> None:
    said = ok(*SEARCH, *SUBSET, *HEAD, "--dry-run")
    assert json.loads(said.last)["steps"] == 6
    assert "an epoch reads 48 of train (the whole batches of 50%, RS2 without replacement)" in said.err


def test_from_a_search_to_a_retrained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, int]] = []
    forward = MultiSampleDropout.forward

    def watched(self: MultiSampleDropout, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        rows.append((len(x), len(out)))
        return out

    monkeypatch.setattr(MultiSampleDropout, "forward", watched)
    run = Path(ok(*SEARCH, *SUBSET, *HEAD, "--out", tmp_path / "run").last).parent
    assert steps(run) == [5] and (16, 64) in rows and not any(b < a or b not in (a, 4 * a) for a, b in rows)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["head"] == {"dropout": 0.3, "samples": 4}
    assert (config["data"]["subset"], config["data"]["subset_replacement"]) == (0.5, False)
    bundle = Path(ok("extract", run, "--out", tmp_path / "bundle").last)
    assert json.loads((bundle / "report.json").read_text())["logits_max_difference"] <= 1e-5
    rows.clear()
    more = ("--epochs", "2", *DATA, "--threads", "1", "--plain.warmup_epochs", "0", "--data.subset", "0.1", "--log_every", "1")
    again = ok("retrain", bundle, *more, *HEAD, "--teacher", bundle, "--out", tmp_path / "again")
    assert "an epoch reads 16 of train (the whole batches of 10%, RS2 without replacement)" in again.err
    assert steps(tmp_path / "again") == [0, 1] and rows.count((16, 64)) == 2
    loaded = load_bundle(Path(again.last), rebuild)
    assert loaded.report["retrain"]["head"] == {"dropout": 0.3, "samples": 4} and loaded.report["retrain"]["steps"] == 2
    assert not any(isinstance(module, MultiSampleDropout) for module in loaded.module.modules())
    assert loaded.module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """In the middle of the stream: 12 steps are 192 of the permutations of 100 images, one behind the other."""
    args = (*SEARCH, "--epochs", "4", *SUBSET, *HEAD)
    ok(*args, "--out", tmp_path / "whole")
    stopped = ok(*args, "--out", tmp_path / "cut", "--max_time", "0.001", "--json")
    assert 0 < json.loads(stopped.last)["step"] < 12
    assert ok(*args, "--out", tmp_path / "cut", "--resume", "auto").code == 0
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert one["step"] == two["step"] == 12 and differences(one["strategy"], two["strategy"]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data.subset", "0"), "data.subset = 0.0 is no fraction of an epoch"),
        (("--data.subset", "0.1"), "data.subset = 0.1 of the 100 images of train fills no batch of 16. Give 0.16 or more"),
        (("--head.dropout", "1"), "head: dropout = 1.0, samples = 1. Allowed"),
        (("--head.samples", "0"), "head: dropout = 0.0, samples = 0. Allowed"),
        (("--head.drop", "0.3"), "head.drop is not a known key. Nearest: head.dropout"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = nas(*SEARCH, *words, "--out", tmp_path / "run")
    assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_recipe_says_how_its_networks_are_retrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own head, not the search's; its own subset over the search's."""
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(ok(*SEARCH, *SUBSET, *HEAD, "--print_config").out)
    recipe["retrain"] = {"epochs": 1, "head": {"dropout": 0.2}, "data": {"subset": None}, "plain": {"warmup_epochs": 0}}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    bundle = ok("extract", "mine.yaml", "--arch", "largest", "--out", "fresh").last
    printed = yaml.safe_load(ok("retrain", bundle, "--print_config").out)
    assert printed["head"] == {"dropout": 0.2, "samples": 1} and printed["data"]["subset"] is None
    del recipe["retrain"]
    Path("other.yaml").write_text(yaml.safe_dump(recipe))
    printed = yaml.safe_load(ok("retrain", bundle, "--recipe", "other.yaml", "--print_config").out)
    assert printed["head"] == {"dropout": 0.0, "samples": 1} and printed["data"]["subset"] == 0.5
