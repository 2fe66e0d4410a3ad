"""What a run with splits tells whoever waits for it, and what it says of files that are damaged: words and values."""
from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from split_runs import EPOCH_STEPS, SEED, breaking, built, gm, go, outcome, same, split_only

from nas import checkpoint, health
from nas.budget import Budget
from nas.explain import explain
from nas.recipe import UsageError, parse, search_parser
from nas.report import _go_on
from nas.splits import measure as measuring
from nas.splits.grow import rehearse
from nas.splits.measure import STATE, Measured, measure
from nas.splits.split import Split
from nas.splits.tree import Tree
from nas.strategies.darts import DARTS

SPLIT = gm([1], repeats=4)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return said


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each comparison of a choice takes two seconds, so a batch of two edges four."""
    now = [100.0]

    def distances(*given: Any) -> np.ndarray:
        now[0] += 2.0
        return np.zeros((5, 5))

    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(measuring, "_distances", distances)
    return now


def measured(folder: Path, batches: int = 99, called: str = "supernet 0.1") -> Measured | str:
    """Stops after so many ``batches``."""
    made, seen = built(SPLIT), list[int]()
    made.strategy.start(made.setup)

    def stop() -> str | None:
        seen.append(1)
        return "time" if len(seen) == batches else None

    return measure(made, SPLIT, 0, folder, SEED, EPOCH_STEPS, stop, called=called)


# -- progress -------------------------------------------------------------------------------------------------------------


def test_measuring_tells_how_far_it_is(tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nas")
    measured(tmp_path)
    assert lines(caplog) == [
        "supernet 0.1: comparing the gradients of 10 options of 2 choices, on 4 batches",
        "supernet 0.1: 3 of 4 batches compared, left 00:04",  # the first after ten seconds
        "supernet 0.1: 4 of 4 batches compared, left 00:00",
    ]


def test_resumed_measuring_tells_what_was_done(tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nas")
    assert measured(tmp_path, batches=1) == "time"
    lines(caplog)
    measuring_again = measured(tmp_path)
    assert isinstance(measuring_again, Measured) and measuring_again.repeats == 4
    assert lines(caplog) == [
        "supernet 0.1: 1 of 4 batches were compared before",
        "supernet 0.1: comparing the gradients of 10 options of 2 choices, on 3 batches",
        "supernet 0.1: 4 of 4 batches compared, left 00:00",
    ]
    measured(tmp_path)
    assert lines(caplog) == ["supernet 0.1: 4 of 4 batches were compared before"]


# -- damaged files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["torn", "other", "empty"])
def test_distances_that_cannot_be_read_are_measured_anew(damage: str, tmp_path: Path, clock: list[float]) -> None:
    measured(tmp_path, batches=2)
    path = tmp_path / STATE
    if damage == "other":
        checkpoint.write(path, [1, 2])
    else:
        path.write_bytes(path.read_bytes()[:-60] if damage == "torn" else b"")
    with pytest.raises(ValueError) as error:
        measured(tmp_path)
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said
    assert "Delete it, and resume the run: the gradients are compared anew, and all that is trained stays." in said
    path.unlink()
    again = measured(tmp_path)
    assert isinstance(again, Measured) and again.repeats == 4


@pytest.mark.slow
def test_a_child_whose_first_checkpoint_is_torn_is_begotten_again(tmp_path: Path) -> None:
    """Where the message says to delete it, nothing of its parent is lost, and the run ends in the same bits."""
    split, run = gm([1]), tmp_path / "run"
    split_only(run, split)
    folder = run / "nodes" / "1" / "checkpoints"
    whole = shutil.copytree(run, tmp_path / "whole" / "run")
    go(whole, split)
    last = folder / "last.pt"
    last.write_bytes(last.read_bytes()[:-60])
    with pytest.raises(ValueError) as error:
        go(run, split)
    said = str(error.value)
    assert f"{last} cannot be read" in said and f"delete {folder}, and resume, which trains again what was in it" in said
    shutil.rmtree(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_distances", breaking(measuring._distances, lambda *given: True))
        go(run, split)
    assert same(outcome(run), outcome(whole)) == []


# -- names ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run that was warned of at every reading, and its log."""
    out, said = tmp_path_factory.mktemp("told") / "run", list[str]()

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, kept = logging.getLogger("nas"), Kept()
    level = log.level
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(health, "warnings", lambda found, **more: {"odd": "odd words"})
            go(out, gm([1]), every=1)
    finally:
        log.removeHandler(kept)
        log.setLevel(level)
    return out, said


def test_warnings_name_the_supernet(told: tuple[Path, list[str]]) -> None:
    warned = [line for line in told[1] if line.endswith("odd words")]
    assert warned == ["health of the root supernet after step 2: odd words", "health of supernet 0 after step 4: odd words",
                      "health of supernet 1 after step 4: odd words"]  # fmt: skip


def test_the_log_tells_leaves_from_what_is_split_and_whence_the_pick_came(told: tuple[Path, list[str]]) -> None:
    folder, said = told
    began = [line.split(": steps")[0] for line in said if ": steps" in line]
    assert began == ["the root supernet, to be split", "supernet 0, a leaf", "supernet 1, a leaf"]
    report = (folder / "report.md").read_text()
    assert ("3 supernets: 2 leaves, whose weights serve the architectures, each its own part; inner ones, which were split on "
            "the way and serve none: 1.") in report  # fmt: skip
    (picked,) = [i for i in (0, 1) if f"- **{i}**: " in report]
    assert f"in the weights of supernet {picked}, recalibrated batch norm" in said[-1]


def test_the_report_says_which_cost_is_an_estimate(told: tuple[Path, list[str]]) -> None:
    report = (told[0] / "report.md").read_text()
    assert "Splitting is counted; training is its steps times the passes that one of them takes on the mean" in report


def test_what_to_go_on_with_offers_another_pick_of_a_tree(tmp_path: Path) -> None:
    def offered(config: dict[str, Any]) -> list[str]:
        return [line for line in _go_on(config, Path("RUN"), None, "40%").split("\n") if "select" in line]

    assert offered({"split": {"at": ["25%"]}}) == ["    nas select RUN --macs-at-most 40%"]
    assert offered({"split": {"at": []}}) == offered({}) == []


# -- what is asked --------------------------------------------------------------------------------------------------------


def test_more_groups_than_options_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError) as error:
        Measured(built(gm([1], groups=9)), gm([1], groups=9), 0)
    assert str(error.value) == (
        "split.groups = 9: of the choices that match node1.from0, node2.from1 none has options left for 9 groups of 1 or more. "
        "node2.from1 has 5: none, skip_connect, nor_conv_1x1, nor_conv_3x3, avg_pool_3x3. Allowed: 2 to 5. Give fewer groups, "
        "or name other choices (split.choices).")  # fmt: skip
    first = gm([1], groups=5, choices=["node1.from0"])
    with pytest.raises(ValueError, match=r"avg_pool_3x3 \(none not alone\). Allowed: 2 to 4. Give fewer"):
        Measured(built(first), first, 0)
    with pytest.raises(ValueError, match=r"4 groups of 2 or more.*Allowed: 2. Give fewer"):
        Measured(built(gm([1], groups=4, least=2)), gm([1], groups=4, least=2), 0)
    with pytest.raises(ValueError, match=r"or more. Split less often \(split.at\), or name other choices"):
        Measured(built(gm([1])), gm([1]), 0, cut=["node1.from0", "node2.from1"])


def test_a_part_out_of_a_budgets_reach_is_named() -> None:
    """Exhaustive: the budget fits the whole, and the part with that operation cannot meet it."""
    split = Split(by="exhaustive", at=[1], choices=["node2.from0"])
    with pytest.raises(ValueError) as error:
        rehearse(Tree(built(split, DARTS(order=1, budget=Budget("20%"))), split, Path("nowhere"), 3, SEED))
    said = str(error.value)
    assert said.startswith("split.choices: supernet 3, with node2.from0 = nor_conv_3x3, cannot be searched: budget.target = ")
    assert "Smallest cost: 15,312 (30.7%)" in said and said.endswith("Or split another choice.")


@pytest.mark.parametrize("words", [["--split", "bananas"], ["--split=3"]])
def test_a_section_that_is_a_word_is_one_line(words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse(search_parser(), {}, words)
    said = str(error.value)
    given = words[-1].split("=")[-1]
    assert said.startswith(f"split = {given} is not a section. Give its keys, as --split.by VALUE, or a .yaml file of them. ")
    assert "Allowed: by, at, choices, " in said and "Parser key" not in said and "\n" not in said
    assert explain("Parser key \"restrict\": Unable to load config 'x'", search_parser()) == (
        "restrict = x is not a section. Give keys and values, or a .yaml file of them.")  # fmt: skip


def test_a_run_that_is_broken_off_serves_by_what_there_is(tmp_path: Path) -> None:
    split = gm([1])
    work = split_only(tmp_path / "run", split)
    assert [node.name for node in work.servers()] == ["0", "1"]  # begotten with the root's weights
    shutil.rmtree(tmp_path / "run" / "nodes" / "1")
    assert [node.name for node in work.servers()] == ["0", ""]  # what the second leaf would serve, the root does
