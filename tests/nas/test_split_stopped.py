"""A run with splits that is broken off, wherever that may be, ends in the same bits as one that nobody touched."""
from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from split_runs import EPOCH_STEPS, Enough, breaking, gm, go, outcome, same, tree

from nas import checkpoint
from nas.run import Run
from nas.splits import grow
from nas.splits import measure as measuring
from nas.splits.split import Split
from nas.strategies.darts import DARTS

EPOCHS = 4
SPLITS = {kind: gm([2], kind, repeats=3) for kind in ("all", "weights", "nothing")}
SPLITS["nested"] = gm([1, 3], ["all", "nothing"], choices=["node*"], repeats=2)


@functools.cache
def whole(folder: Path, kind: str) -> dict[str, Any]:
    return outcome(run(folder / kind, SPLITS[kind]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def run(out: Path, split: Split) -> Path:
    return go(out, split, epochs=EPOCHS, every=3).folder


class Counted:
    """Says when something happens for the ``nth`` time (from 0)."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, *given: Any, **named: Any) -> bool:
        self.left -= 1
        return self.left == -1


def at_step(patch: pytest.MonkeyPatch, nth: int) -> None:
    patch.setattr(DARTS, "update", breaking(DARTS.update, Counted(nth)))


def at_distance(patch: pytest.MonkeyPatch, nth: int) -> None:
    """Of two edges a batch."""
    patch.setattr(measuring, "_distances", breaking(measuring._distances, Counted(nth)))


def at_child(patch: pytest.MonkeyPatch, name: str) -> None:
    """Before the first checkpoint of a child."""
    last = str(Path("nodes") / name / "checkpoints" / "last.pt")
    patch.setattr(checkpoint, "write", breaking(checkpoint.write, lambda path, payload: str(path).endswith(last)))


def at_file(patch: pytest.MonkeyPatch, function: str, name: str) -> None:
    patch.setattr(grow, function, breaking(getattr(grow, function), lambda path, *rest: path.name == name))


def broken(out: Path, split: Split, breaks: Any) -> None:
    """The run goes on until ``breaks`` has its way."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        breaks(patch)
        run(out, split)


def places(kind: str) -> Iterator[tuple[str, Any]]:
    yield "root", lambda patch: at_step(patch, 3)
    yield "distance", lambda patch: at_distance(patch, 3)
    if kind == "all":
        yield "child", lambda patch: at_child(patch, "1")
    yield "begotten", lambda patch: at_file(patch, "write_whole", "split.json")
    yield "leaf", lambda patch: at_step(patch, 3)
    yield "written", lambda patch: at_file(patch, "write_arch", "arch.json")
    yield "sibling", lambda patch: at_step(patch, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("weights", "nothing"))])
def test_a_run_that_is_broken_everywhere(kind: str, place: Path, tmp_path: Path) -> None:
    """One after the other: amid the root, its distances, what is written of the children, before split.json, amid a leaf,
    between its last checkpoint and its architecture, at the first step of the other leaf."""
    out, split = tmp_path / kind, SPLITS[kind]
    for name, breaks in places(kind):
        broken(out, split, breaks)
        assert not (out / "arch.json").exists()
        assert (out / "split.json").exists() == (name in ("leaf", "written", "sibling"))
        if name == "distance":
            state = torch.load(out / "checkpoints" / "split.pt", weights_only=True)
            assert state["repeats"] == 1 and state["feed"] == {"train": 1}
        if name == "begotten":
            children = [out / "nodes" / f"{i}" / "checkpoints" / "last.pt" for i in (0, 1)]
            assert [path.exists() for path in children] == [kind == "all"] * 2
        if name == "written":
            assert not (out / "nodes" / "0" / "arch.json").exists()
        if name == "sibling" and kind == "nothing":  # as a kill amid its first files leaves it
            (out / "nodes" / "1" / "checkpoints").mkdir(parents=True)
            (out / "nodes" / "1" / "config.yaml").write_text("seed: [")
    assert same(outcome(run(out, split)), whole(place, kind)) == []
    assert sorted(path.name for path in (out / "nodes").iterdir()) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 4, 7, 13, 16])
def test_two_levels_broken_anywhere(nth: int, place: Path, tmp_path: Path) -> None:
    out, split = tmp_path / "nested", SPLITS["nested"]
    broken(out, split, lambda patch: at_step(patch, nth))
    broken(out, split, lambda patch: at_distance(patch, 2 + nth) if nth < 13 else at_step(patch, 1))
    assert same(outcome(run(out, split)), whole(place, "nested")) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["root's last step", "first distance", "last distance"])
def test_a_signal_is_not_lost_between_the_parts(
    moment: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM ends the run with 143 at the next place where that loses nothing, and it goes on from there."""
    out, split = tmp_path / "all", SPLITS["all"]
    holder, name = (DARTS, "update") if moment.startswith("root") else (measuring, "_distances")
    call, due = getattr(holder, name), Counted({"root's last step": 3, "first distance": 0, "last distance": 5}[moment])

    def signalled(*given: Any, **named: Any) -> Any:
        if due():
            os.kill(os.getpid(), signal.SIGTERM)
        return call(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(holder, name, signalled)
        run(out, split)
    assert stop.value.code == 143 and not (out / "split.json").exists()
    state = torch.load(out / "checkpoints" / "split.pt", weights_only=True)
    assert state["repeats"] == (3 if moment == "last distance" else 1)
    assert checkpoint.load(out / "checkpoints")[0]["step"] == 2 * EPOCH_STEPS
    if moment == "last distance":
        assert same(outcome(run(out, split)), whole(place, "all")) == []


def test_a_node_has_one_folder_whatever_is_in_it(tmp_path: Path) -> None:
    """A kill amid the first files of a run leaves what another would take for somebody else's."""
    folder = tmp_path / "0"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: [")
    run = Run(folder, {"seed": 1}, exact=True)
    run.close()
    assert run.folder == folder and run.start == 0 and (folder / "config.yaml").read_text() == "seed: 1\n"
    (folder / "config.yaml").write_text("seed: [")
    other = Run(folder, {"seed": 1})
    other.close()
    assert other.folder == tmp_path / "0-2"


def test_what_is_done_is_left_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run, resumed: nothing is trained or measured, and every file stays, a board of its split too."""
    before = whole(place, "all")
    folder = place / "all"
    boards = [path.name for path in sorted((folder / "split").iterdir())]
    monkeypatch.setattr(DARTS, "update", breaking(DARTS.update, lambda *given: True))
    monkeypatch.setattr(measuring, "_distances", breaking(measuring._distances, lambda *given: True))
    assert same(outcome(run(folder, SPLITS["all"])), before) == []
    assert [path.name for path in sorted((folder / "split").iterdir())] == boards


@pytest.mark.slow
def test_time_that_is_up_stops_a_tree_too(tmp_path: Path, place: Path) -> None:
    """Each session does a piece of work; all together they do what one does."""
    found = tree(tmp_path / "all", SPLITS["all"])
    assert found.level(1) == [] and found.trained().step == 0
    split, sessions = SPLITS["all"], 0
    while not (tmp_path / "all" / "split.json").exists():
        sessions += 1
        with pytest.raises(SystemExit) as stop:
            hasty(tmp_path / "all", split)
        assert stop.value.code == 0
    assert sessions == 3 + 3 + 1  # steps of the root (the last is no place to stop), batches, and a step of a leaf
    ended = [name for name in same(outcome(run(tmp_path / "all", split)), whole(place, "all")) if "previous.pt" not in name]
    assert ended == []  # a session that is stopped saves at other steps


def hasty(out: Path, split: Split) -> None:
    """``run`` with no time at all: from Python, where a recipe would say max_time."""
    grown: Any = grow.grow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow, "grow", lambda *given: grown(*given[:-1], 1e-6))
        run(out, split)
