"""The commands on a tree of supernets, on the folders of its nodes, and on options that are not written out."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli import Result, nas, ok
from test_help_texts import PARSERS
from torch.utils.tensorboard import SummaryWriter

from nas.recipe import Parser, UsageError, find, parse, read, search_parser
from search_spaces import nats

SPACE = nats.Topology(2, 1)
TREE = ("search", "gm-darts-nb201-digits", "--space.C", "2", "--space.N", "1", "--data.limit", "64", "--data.batch_size", "16",
        "--epochs", "3", "--split.at", "[0,1]", "--split.repeats", "1", "--split.choices", "[node2.*]", "--threads", "1",
        "--evaluate.every", "2", "--evaluate.bn_images", "16")  # fmt: skip
FEW = ("--images", "16", "--bn-images", "16")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven supernets, four of them leaves."""
    out = tmp_path_factory.mktemp("tree") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_figure", lambda *given: None)
        assert ok(*TREE, "--out", out).last == str(out / "arch.json")
    return out


def refused(*words: str | Path) -> str:
    """What is said of the command ``words``, in one line that is no traceback."""
    result: Result = nas(*words)
    assert result.code == 2 and not result.out
    (line,) = result.errors
    return line


def holders(run: Path) -> dict[str, str]:
    """Leaf -> an architecture that it alone holds, as text: all else skips."""
    first = json.loads((run / "split.json").read_text())
    found = {}
    for i, group in enumerate(first["groups"]):
        second = json.loads((run / "nodes" / str(i) / "split.json").read_text())
        for j, part in enumerate(second["groups"]):
            arch = dict.fromkeys(nats.NAMES, "skip_connect") | {first["choice"]: group[0], second["choice"]: part[0]}
            found[f"{i}.{j}"] = SPACE.text(arch)
    return found


def test_an_inner_node_sends_to_the_run_and_to_its_leaves(run: Path) -> None:
    node = run / "nodes" / "0"
    for verb in ("extract", "evaluate"):
        assert refused(verb, node) == (
            f"nas {verb}: {node} has no arch.json: supernet 0 of {run} was split, so it derives nothing. Give the whole run, "
            f"nas {verb} {run}, or a leaf that came of it: {run}/nodes/0.0, {run}/nodes/0.1.")  # fmt: skip


def test_an_architecture_of_another_part_is_sent_to_the_leaf_that_serves_it(run: Path, tmp_path: Path) -> None:
    archs = holders(run)
    for at, there in (("0", "1.1"), ("0.0", "0.1")):
        said = refused("evaluate", run / "nodes" / at, "--arch", archs[there], *FEW)
        assert said.startswith(f"nas evaluate: {run}/nodes/{at} is supernet {at} of {run}, which has a part of the space: ")
        assert " is not in this space. Allowed: " in said
        assert said.endswith(f"This architecture is served by supernet {there}: nas evaluate {run} --arch '{archs[there]}', or "
                             f"the same with {run}/nodes/{there}.")  # fmt: skip
    file = run / "nodes" / "0.1" / "arch.json"
    said = refused("extract", run / "nodes" / "1.0", "--arch", file, "--out", tmp_path / "bundle")
    assert f"is served by supernet 0.1: nas extract {run} --arch '|" in said and not (tmp_path / "bundle").exists()
    rows = json.loads(ok("evaluate", run / "nodes" / "1", "--arch", archs["1.1"], *FEW, "--json").last)["subnets"]
    assert "supernet" not in rows[0]  # a node alone serves its own part


def test_the_run_says_which_leaf_serves(run: Path) -> None:
    archs = holders(run)
    words = [word for text in archs.values() for word in ("--arch", text)]
    result = ok("evaluate", run, *words, *FEW, "--json")
    assert [row["supernet"] for row in json.loads(result.last)["subnets"]] == [f"supernet {leaf}" for leaf in archs]
    assert f"nas: weights of the 4 leaves of {run}; what was split on the way serves nothing: 3 supernets" in result.err
    lines = ok("evaluate", run, "--arch", archs["1.0"], *FEW).out.splitlines()
    assert lines[0].endswith(" parameters  supernet 1.0") and lines[1].startswith("1 subnet on 16 test images")


@pytest.mark.slow
def test_another_pick_of_a_tree(run: Path, tmp_path: Path) -> None:
    """``report.md`` offers it; limits that a leaf cannot meet are met by others, and a leaf alone says where to go."""
    report = (run / "report.md").read_text()
    assert f"    nas select {run} --macs-at-most 20%\n" in report
    copy = shutil.copytree(run, tmp_path / "run")
    few = ("--searcher", "random", "--evaluations", "2", *FEW)
    found = ok("select", copy, "--macs-at-most", "20%", *few, "--json")
    leaf = json.loads(found.last)["supernet"]
    assert json.loads(found.last)["macs"] <= 0.2 * 49_872 and leaf in {f"supernet {name}" for name in holders(run)}
    assert f"on 16 images, in the weights of {leaf}\n" in found.err
    row = json.loads(ok("evaluate", copy, "--arch", "largest", *FEW, "--json").last)["subnets"][0]
    one = row["supernet"].removeprefix("supernet ")
    assert json.loads(ok("select", copy, "--macs-at-least", "99%", *few, "--json").last)["supernet"] == f"supernet {one}"
    other = next(name for name in holders(run) if name != one)
    node = copy / "nodes" / other
    said = refused("select", node, "--macs-at-least", "99%", *few)
    assert "No architecture was found that meets the limits: macs at least 49,374 (smallest network " in said
    assert said.endswith(f"Widen them. {node} is supernet {other} of {copy}, which has a part of the space: nas select {copy} "
                         "picks among all leaves.")  # fmt: skip


def test_an_unfinished_tree_says_so_and_how_to_finish_it(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "arch.json").unlink()
    for leaf in ("1.0", "1.1"):
        shutil.rmtree(copy / "nodes" / leaf)
    finish = f"nas search {copy}/config.yaml --resume auto --out {copy}."
    inner = refused("extract", copy / "nodes" / "1")
    assert inner.endswith(f"supernet 1 of {copy} was split, so it derives nothing. Finish the whole run: {finish}")
    assert refused("extract", copy).endswith(f"{copy} has no arch.json yet: finish it with {finish}")
    archs = holders(run)
    result = ok("evaluate", copy, "--arch", archs["1.0"], "--arch", archs["0.1"], *FEW)
    assert f"nas: {copy} is not finished: weights of supernet 0.0, supernet 0.1, supernet 1\n" in result.err
    assert [line.split("  ")[-1] for line in result.out.splitlines()[:2]] == ["supernet 1", "supernet 0.1"]
    assert ok(*finish.removesuffix(".").split()[1:]).last == str(copy / "arch.json")
    assert json.loads((copy / "arch.json").read_text())["arch"] == json.loads((run / "arch.json").read_text())["arch"]


# -- options that are not written out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prog", PARSERS)
def test_every_verb_wants_whole_names(prog: str) -> None:
    parser = PARSERS[prog]
    assert isinstance(parser, Parser)
    required = [action.dest for action in parser._actions if not action.option_strings and action.nargs != "?"]
    for action in parser._actions:
        long = max(action.option_strings, key=len, default="")
        part, values = long[:-1], [] if action.nargs == 0 else ["1"]
        if long and part not in parser._option_string_actions and not action.dest.endswith("help"):
            with pytest.raises(UsageError) as error:
                parse(parser, {}, [*required, part, *values])
            assert f"{part.removeprefix('--')} is not a known key. Nearest: " in str(error.value)


@pytest.mark.parametrize("recipe, word, near", [
    ("gm-spos-nb201-digits", "--split.repeat", "split.repeats"), ("gm-spos-nb201-digits", "--epoch", "epochs"),
    ("gm-spos-nb201-digits", "--searcher.pop", "searcher.population"), ("tas-digits", "--strategy.targ", "strategy.target"),
    ("rarts-digits", "--strategy.weights.mom", "strategy.weights.momentum"), ("tas-digits", "--space.dep", "space.depth"),
    ("rarts-digits", "--strategy.init_args.weights.mom", "strategy.weights.momentum"),
])  # fmt: skip
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_part_of_a_name_is_no_name(recipe: str, word: str, near: str, joined: bool) -> None:
    """In classes and the sections of their arguments, too."""
    with pytest.raises(UsageError, match=f"is not a known key.*Nearest: {near}[.]"):
        parse(search_parser(), read(find(recipe)), [f"{word}=3"] if joined else [word, "3"])


def test_part_of_a_name_ends_the_program_with_2() -> None:
    assert refused("search", "gm-spos-nb201-digits", "--split.repeat", "3") == (
        "nas search: split.repeat is not a known key. Nearest: split.repeats.")  # fmt: skip
    assert refused("search", "gm-spos-nb201-digits", "--split", "bananas").startswith(
        "nas search: split = bananas is not a section. Give its keys, as --split.by VALUE")  # fmt: skip
    assert "Allowed: 2. Give fewer groups" in refused("search", "gm-spos-nb201-digits", "--split.groups", "9", "--dry-run")
