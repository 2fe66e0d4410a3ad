"""A recipe with splits from the command line: kills and signals anywhere in the tree, and what its nodes are good for."""
from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from cli import nas, ok
from killed import INT, KILL, TERM, At, run
from safetensors.torch import load_file
from split_runs import outcome, same

from nas import checkpoint
from nas.commands.extract import load_source
from nas.splits.tree import Tree

RECIPE = """
space: {class_path: search_spaces.nats.Topology, init_args: {C: 2, N: 1}}
supernet: {class_path: supernets.nats.Topology}
strategy: {class_path: nas.strategies.darts.DARTS, init_args: {order: 1}}
split:
  at: [25%, 2]
  choices: ["node[12].*"]
  repeats: 2
  leave_out: ["stem.*", "norm.*", "classifier.*"]
  inherit: [all, nothing]
  before: {alphas: {lr: 0.0}}
data: {name: digits, batch_size: 16, limit: 64, valid_fraction: 0.5}
epochs: 4
evaluate: {every: 3, gap: false}
threads: 1
"""
# Two steps an epoch: 2 of the root, 4 - 2 of each child, 4 of each of the four leaves. Three edges and two batches a split.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def grown(place: Path) -> Path:
    """A finished run; never written to."""
    assert ok("search", place / "mine.yaml", "--out", place / "run").last == str(place / "run" / "arch.json")
    return place / "run"


def tree(folder: Path) -> Tree:
    found = load_source(str(folder), ["--device=cpu"])[1].tree
    assert isinstance(found, Tree)
    return found


# -- its nodes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_node_is_a_run_of_its_own(grown: Path, tmp_path: Path) -> None:
    """Its config is a recipe of a part of the space; what is read and extracted there is what the whole run says."""
    whole, node = tree(grown), grown / "nodes" / "0.1"
    leaf = next(leaf for leaf in whole.level(2) if leaf.name == "0.1")
    folder, built, config = load_source(str(node), ["--device=cpu"])
    assert folder == node and built.finished and built.step == 4 and built.tree is None and config["split"]["at"] == []
    assert [choice.options for choice in built.space.choices] == [choice.options for choice in leaf.space.choices]
    assert built.space.size == leaf.space.size < built.space.root.size and built.net.space.size == 5**6
    assert built.strategy.alphas.lr > 0  # type: ignore[attr-defined]
    inner = load_source(str(grown / "nodes" / "0"), ["--device=cpu"])[1]
    assert inner.strategy.alphas.lr == 0.0 and not inner.finished  # type: ignore[attr-defined]
    arch = leaf.space.sample(random.Random(1))
    text = leaf.space.text(arch)
    rows = [json.loads(ok("evaluate", source, "--arch", text, "--split", "valid", "--json").last)["subnets"][0]
            for source in (grown, node)]  # fmt: skip
    assert rows[0].pop("supernet") == "supernet 0.1" and rows[0] == rows[1]
    one, two = (load_file(Path(ok("extract", source, "--arch", text, "--out", tmp_path / name).last) / "model.safetensors")
                for source, name in ((grown, "a"), (node, "b")))  # fmt: skip
    assert same(one, two) == []
    assert Path(ok("extract", node, "--out", tmp_path / "derived").last).is_dir()  # its own arch.json
    assert json.loads((tmp_path / "derived" / "arch.json").read_text())["arch"] == json.loads(
        (node / "arch.json").read_text())["arch"]  # fmt: skip


@pytest.mark.slow
def test_picks_among_the_leaves_and_in_one_of_them(grown: Path, tmp_path: Path) -> None:
    words, mine = ("--searcher", "random", "--searcher.trials", "6", "--bn_images", "32", "--json"), tmp_path / "mine"
    shutil.copytree(grown, mine)
    for source in (mine, mine / "nodes" / "0.1"):
        said = json.loads(ok("select", source, *words, "--out", tmp_path / "pick.json").last)
        arch = json.loads((tmp_path / "pick.json").read_text())["arch"]
        assert said["scored"] == 6 and (source == mine or tree(mine).leaf(arch).name == "0.1")


@pytest.mark.slow
def test_the_root_alone_serves_what_is_not_split_yet(place: Path, grown: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("search", place / "mine.yaml", "--out", tmp_path / "run", "--resume", "auto")
    assert run(words, At(TERM, "distance", 5), log) == 143
    said = log.read_text()
    assert f"continue with --resume auto --out {tmp_path / 'run'}" in said and "Traceback" not in said
    assert torch.load(tmp_path / "run" / "checkpoints" / "split.pt", weights_only=True)["repeats"] == 2
    assert not (tmp_path / "run" / "nodes").exists() and not (tmp_path / "run" / "split.json").exists()
    result = nas("evaluate", tmp_path / "run", "--arch", "largest", "--split", "valid", "--images", "16")
    assert result.code == 0 and "1 subnet on" in result.out
    ok(*words)
    assert same(outcome(tmp_path / "run"), outcome(grown)) == []


# -- kills --------------------------------------------------------------------------------------------------------------

KILLS = {
    "root": [At(KILL, "update", 2)],
    "distances": [At(KILL, "distance", 5), At(KILL, "distance", 2)],
    "split": [At(KILL, "begotten", 1), At(KILL, "begotten", 2)],
    "child": [At(KILL, "update", 4), At(KILL, "distance", 6)],
    "leaf": [At(KILL, "update", 10), At(KILL, "update", 3), At(KILL, "derived", 2), At(KILL, "update", 3)],
    "files": [At(KILL, "written", 3), At(KILL, "moved", 2), At(KILL, "line", 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS.values(), ids=KILLS)
def test_a_killed_tree_ends_like_an_unbroken_one(kills: list[At], place: Path, grown: Path, tmp_path: Path) -> None:
    words = ("search", place / "mine.yaml", "--out", tmp_path / "run", "--resume", "auto")
    for at in kills:
        assert run(words, at, tmp_path / "log") == -KILL, (tmp_path / "log").read_text()
        assert not (tmp_path / "run" / "arch.json").exists()
    ok(*words)
    assert same(outcome(tmp_path / "run"), outcome(grown)) == []
    assert sorted(path.name for path in (tmp_path / "run" / "nodes").iterdir()) == ["0", "0.0", "0.1", "1", "1.0", "1.1"]
    assert not (tmp_path / "run-2").exists() and not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_places_of_a_tree(seed: int, place: Path, grown: Path, tmp_path: Path) -> None:
    rng, words = random.Random(seed), ("search", place / "mine.yaml", "--out", tmp_path / "run", "--resume", "auto")
    most = {"update": 20, "distance": 15, "begotten": 2, "derived": 4, "written": 10, "moved": 8, "line": 8}
    for _ in range(rng.randint(2, 4)):
        name = rng.choice(sorted(most))
        code = run(words, At(KILL, name, rng.randint(1, most[name])), tmp_path / "log")
        assert code in (-KILL, 0), (tmp_path / "log").read_text()
    folder = Path(ok(*words).last).parent  # where nothing was saved before the first kill, a folder of its own
    assert same(outcome(folder), outcome(grown)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_amid_a_leaf(number: int, code: int, place: Path, grown: Path, tmp_path: Path) -> None:
    words = ("search", place / "mine.yaml", "--out", tmp_path / "run", "--resume", "auto")
    assert run(words, At(number, "update", 8), tmp_path / "log") == code  # 2 + 2 + 2 before the first leaf
    assert checkpoint.load(tmp_path / "run" / "nodes" / "0.0" / "checkpoints")[0]["step"] == 2
    assert not (tmp_path / "run" / "nodes" / "0.1").exists()
    ok(*words)
    assert same(outcome(tmp_path / "run"), outcome(grown)) == []
