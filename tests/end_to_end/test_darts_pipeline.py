"""DARTS cells from a search to the published way of evaluation: a genotype found in a small net, extracted in a larger one,
trained from scratch with drop path and an auxiliary head; and the search net's own weights, fine-tuned."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import differences, nas, ok
from killed import KILL, At, run
from safetensors.torch import load_file
from torch import nn

from nas import checkpoint
from nas.build import rebuild
from nas.bundle import load_bundle
from search_spaces.arch import read_arch
from search_spaces.darts import Cells

RECIPE = """
space: {class_path: search_spaces.darts.Cells, init_args: {C: 4, layers: 3, nodes: 2}}
supernet: {class_path: supernets.darts.Cells}
strategy: {class_path: nas.strategies.darts.DARTS, init_args: {order: 1}}
data: {name: digits, batch_size: 16, augment: [crop], valid_fraction: 0.5, limit: 200}
epochs: 1
channels_last: true
threads: 1
retrain:
  epochs: 2
  plain: {lr: 0.025, nesterov: false, weight_decay: 3.0e-4, clip: 5.0, auxiliary: 0.4, drop_path: 0.2}
  data: {valid_fraction: 0.0}
"""
LARGER = ("--from", "scratch", "--space.init_args.C", "6", "--space.init_args.layers", "4")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search on DARTS cells."""
    place = tmp_path_factory.mktemp("darts")
    (place / "recipe.yaml").write_text(RECIPE)
    ok("search", place / "recipe.yaml", "--out", place / "run")
    return place / "run"


@pytest.fixture(scope="module")
def larger(cells: Path) -> Path:
    """The bundle of what was found, with more channels and cells and fresh weights."""
    return Path(ok("extract", cells, *LARGER, "--out", cells.parent / "larger").last)


@pytest.fixture(scope="module")
def inherited(cells: Path) -> Path:
    return Path(ok("extract", cells, "--out", cells.parent / "inherited").last)


@pytest.fixture(scope="module")
def evaluated(larger: Path) -> Path:
    """The run folder of ``larger`` trained as its recipe says."""
    return Path(ok("retrain", larger, "--threads", "1", "--out", larger.parent / "evaluated").last).parent


def report(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "report.json").read_text())


def pool_norms(bundle: Path) -> list[nn.BatchNorm2d]:
    module = load_bundle(bundle, rebuild).module
    return [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d) and not norm.affine]


def test_a_genotype_moves_to_another_number_of_channels_and_cells(cells: Path, larger: Path) -> None:
    found, file = read_arch(cells / "arch.json"), read_arch(larger / "arch.json")
    assert file.arch == found.arch and file.metrics == {}
    assert (found.space["args"]["C"], file.space["args"]["C"], file.space["args"]["layers"]) == (4, 6, 4)
    assert file.costs["macs"] > 1.5 * found.costs["macs"]
    assert Cells(C=4, layers=3, nodes=2).genotype(found.arch) == Cells(C=6, layers=4, nodes=2).genotype(file.arch)
    again = ok("extract", cells, *LARGER, "--out", cells.parent / "again")
    assert "which has the same choices" in again.err and "weights of" not in again.err
    assert differences(load_file(Path(again.last) / "model.safetensors"), load_file(larger / "model.safetensors")) == []


@pytest.mark.parametrize("words, why", [
    (("--space.init_args.C", "6"), r"cannot be inherited by another. nas extract --from scratch"),
    (("--from", "inherited", "--space.init_args.C", "6"), r"cannot be inherited by another"),
    (("--from", "scratch", "--space.init_args.nodes", "3"), "arch.json is for space darts.Cells(C=4, layers=3, "),
])  # fmt: skip
def test_what_is_another_network_is_refused(words: tuple[str, ...], why: str, cells: Path, tmp_path: Path) -> None:
    refused = nas("extract", cells, *words, "--out", tmp_path / "b")
    assert refused.code == 2 and why in refused.err and len(refused.errors) == 1
    assert not (tmp_path / "b").exists()


def test_head_and_drop_path_serve_the_training_alone(larger: Path, evaluated: Path) -> None:
    said, file = report(evaluated / "bundle"), read_arch(evaluated / "bundle" / "arch.json")
    assert (said["retrain"]["auxiliary"], said["retrain"]["drop_path"]) == (0.4, 0.2)
    assert (said["weights"], said["form"]) == ("scratch", "fresh")
    assert said["params"]["counted"] == file.costs["params"] == read_arch(larger / "arch.json").costs["params"]
    assert load_file(evaluated / "bundle" / "model.safetensors").keys() == load_file(larger / "model.safetensors").keys()
    assert "dropout" not in (evaluated / "bundle" / "model.py").read_text().lower()
    rows = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if "train/auxiliary" in row]
    assert seen and all(row["train/loss"] > row["train/auxiliary"] * 0.4 for row in seen)
    assert seen[-1]["train/drop_path"] == pytest.approx(0.1)  # of two epochs the second
    stated = json.loads(ok("evaluate", evaluated / "bundle", "--json").last)["top1"]
    assert stated == file.metrics["top1"]["value"]
    state, _ = checkpoint.load(evaluated / "checkpoints")
    weights = state["strategy"]["setup"]["net"]
    assert any(key.startswith("head.") for key in weights)
    kept = load_file(evaluated / "bundle" / "model.safetensors")
    assert all(torch.equal(weights[f"network.{key}"], value) for key, value in kept.items())


@pytest.mark.slow
def test_a_killed_evaluation_ends_like_an_unbroken_one(larger: Path, evaluated: Path, tmp_path: Path) -> None:
    words = ("retrain", larger, "--threads", "1", "--out", tmp_path / "run", "--resume", "auto")
    count = random.Random(3).randint(13, 18)  # in the second of two epochs of 12 steps
    assert run(words, At(KILL, "update", count), tmp_path / "log") == -KILL
    assert "resuming at step 12" in ok(*words).err
    mine, theirs = (torch.load(place / "checkpoints" / "last.pt", weights_only=True) for place in (tmp_path / "run", evaluated))
    assert differences(mine, theirs) == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (evaluated / "metrics.jsonl").read_text()
    first, second = (load_file(place / "bundle" / "model.safetensors") for place in (tmp_path / "run", evaluated))
    assert differences(first, second) == []
    assert report(tmp_path / "run" / "bundle") == report(evaluated / "bundle")


@pytest.mark.parametrize("more", [("--plain.auxiliary", "0", "--plain.drop_path", "0"), ()], ids=["plain", "training form"])
def test_inherited_weights_are_fine_tuned_in_their_own_form(more: tuple[str, ...], inherited: Path, tmp_path: Path) -> None:
    assert (report(inherited)["weights"], report(inherited)["form"]) == ("inherited", "inherited")
    still = ("--plain.lr", "0", "--plain.weight_decay", "0", "--epochs", "1", *more)
    tuned = Path(ok("retrain", inherited, "--from", "inherited", *still, "--out", tmp_path / "tuned").last)
    assert (report(tuned)["weights"], report(tuned)["form"]) == ("fine-tuned", "inherited")
    before, after = (load_file(place / "model.safetensors") for place in (inherited, tuned))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items() if value.ndim > 1)
    assert len(pool_norms(inherited)) == len(pool_norms(tuned))
    stated = read_arch(tuned / "arch.json").metrics["top1"]["value"]
    assert json.loads(ok("evaluate", tuned, "--json").last)["top1"] == stated


def test_pools_lose_their_norms_from_scratch(cells: Path, tmp_path: Path) -> None:
    """An architecture with a pool on every edge: its inherited form has norms that its fresh form lacks."""
    arch = json.loads((cells / "arch.json").read_text())
    arch["arch"] = {name: "none" if op == "none" else "max_pool_3x3" for name, op in arch["arch"].items()}
    (tmp_path / "arch.json").write_text(json.dumps(arch))
    given = ("--arch", tmp_path / "arch.json")
    first = Path(ok("extract", cells, *given, "--out", tmp_path / "inherited").last)
    read = {(name.partition(".")[0], name[-1]) for name, op in arch["arch"].items() if op != "none"}  # kind and state
    assert len(pool_norms(first)) == sum(2 if kind == "reduce" else 1 for kind, _ in read)
    assert report(first)["logits_max_difference"] < 1e-4
    alone = ("--plain.auxiliary", "0", "--plain.drop_path", "0", "--epochs", "1")
    again = Path(ok("retrain", first, "--from", "scratch", *alone, "--out", tmp_path / "scratch").last)
    assert pool_norms(again) == [] and report(again)["form"] == "fresh"


@pytest.mark.parametrize("words", [("--plain.auxiliary", "0.4"), ("--plain.drop_path", "0.2")])
def test_networks_that_have_neither_are_refused(words: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    refused = nas("retrain", bundle, *words, "--out", tmp_path / "run")
    assert refused.code == 2 and "have neither an auxiliary head nor drop path" in refused.err and len(refused.errors) == 1
    assert not (tmp_path / "run").exists()
