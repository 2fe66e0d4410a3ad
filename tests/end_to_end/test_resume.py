"""Kills, signals and time limits: a resumed run ends in the same bits as one that nobody touched."""
from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import RETRAIN, SEARCH, differences, ok
from killed import INT, KILL, TERM, At, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas import checkpoint

# SEARCH has 12 steps in two epochs, RETRAIN 24: a checkpoint after each epoch.


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must be the same: the checkpoints, the metrics, the architectures."""
    files = sorted((folder / "checkpoints").iterdir())
    state: dict[str, Any] = {path.name: torch.load(path, weights_only=True) for path in files}
    state["metrics"] = (folder / "metrics.jsonl").read_text()
    for path in sorted(folder.glob("arch*.json")):
        state[path.name] = json.loads(path.read_text())
    return state


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for the speeds."""
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"] if not tag.startswith("system/")}  # fmt: skip


@pytest.mark.slow
def test_a_search_killed_three_times_ends_like_an_unbroken_one(tied: Path, tmp_path: Path) -> None:
    rng, words = random.Random(7), (*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    for count in (rng.randint(7, 12), rng.randint(2, 6), 6):  # from step 0, then from 6: the last before its last step
        assert run(words, At(KILL, "update", count), tmp_path / "log") == -KILL
        assert not (tmp_path / "run" / "arch.json").exists()
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0]["step"] == 6
    result = ok(*words)
    assert "resuming at step 6" in result.err and result.last == str(tmp_path / "run" / "arch.json")
    assert differences(outcome(tmp_path / "run"), outcome(tied)) == []
    assert curves(tmp_path / "run") == curves(tied)
    assert not (tmp_path / "run-2").exists()


@pytest.mark.parametrize("at", [
    pytest.param(At(KILL, "written", 2), marks=pytest.mark.slow), pytest.param(At(KILL, "moved", 1), marks=pytest.mark.slow),
    At(KILL, "line", 2)],
    ids=lambda at: at.place)  # fmt: skip
def test_a_kill_in_the_middle_of_a_file(at: At, tied: Path, tmp_path: Path) -> None:
    words = (*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    assert run(words, at, tmp_path / "log") == -KILL
    if at.place == "moved":
        assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    if at.place == "line":
        assert (tmp_path / "run" / "metrics.jsonl").read_text().endswith('{"step": 7, "train/lo')
    result = ok(*words)
    assert "resuming at step 6" in result.err
    assert differences(outcome(tmp_path / "run"), outcome(tied)) == []


@pytest.mark.slow
def test_a_retraining_killed_twice_ends_like_an_unbroken_one(bundle: Path, retrained: Path, tmp_path: Path) -> None:
    words = ("retrain", bundle, *RETRAIN, "--out", tmp_path / "run", "--resume", "auto")
    for count in (random.Random(3).randint(13, 18), random.Random(4).randint(2, 6)):
        assert run(words, At(KILL, "update", count), tmp_path / "log") == -KILL
    assert "resuming at step 12" in ok(*words).err
    assert differences(outcome(tmp_path / "run"), outcome(retrained)) == []
    mine, theirs = tmp_path / "run" / "bundle", retrained / "bundle"
    assert differences(load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")) == []
    for name in ("arch.json", "model.py", "report.json"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    assert ok(*words).last == str(tmp_path / "run" / "bundle")  # once more, after the end: nothing to do


@pytest.mark.parametrize(("number", "code"), [(TERM, 143), (INT, 130)], ids=["SIGTERM", "SIGINT"])
def test_signals_save_first(number: int, code: int, tied: Path, tmp_path: Path) -> None:
    words = (*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    assert run([*words, "--json"], At(number, "update", 4), tmp_path / "log") == code
    said = (tmp_path / "log").read_text()
    assert "after step 4; continue with --resume auto --out" in said and "Traceback" not in said
    result = json.loads(said.splitlines()[-1])
    assert result.pop("stopped") in ("terminated", "interrupted")
    assert result == {"run": str(tmp_path / "run"), "step": 4}
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0]["step"] == 4
    ok(*words)
    ended, whole = outcome(tmp_path / "run"), outcome(tied)
    assert differences(ended["last.pt"], whole["last.pt"]) == []
    assert ended["metrics"] == whole["metrics"] and ended["arch.json"] == whole["arch.json"]


@pytest.mark.slow
def test_signals_save_a_retraining_too(bundle: Path, retrained: Path, tmp_path: Path) -> None:
    words = ("retrain", bundle, *RETRAIN, "--out", tmp_path / "run", "--resume", "auto")
    assert run(words, At(TERM, "update", 5), tmp_path / "log") == 143
    assert (tmp_path / "log").read_text().splitlines()[-1] == str(tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0]["step"] == 5
    ok(*words)
    assert differences(outcome(tmp_path / "run")["last.pt"], outcome(retrained)["last.pt"]) == []


def test_max_time_stops_saves_and_goes_on(tied: Path, tmp_path: Path) -> None:
    words = (*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    result = ok(*words, "--max-time", "1e-6")
    assert result.last == str(tmp_path / "run") and "stopped (time) after step 1" in result.err
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0]["step"] == 1
    ok(*words)
    assert differences(outcome(tmp_path / "run"), outcome(tied)) == []


def test_a_torn_checkpoint_gives_way_to_the_one_before(tied: Path, tmp_path: Path) -> None:
    shutil.copytree(tied, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    result = ok(*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    assert f"{last} cannot be read (BadZipFile); continuing from {last.with_name('previous.pt')} (step 6)" in result.err
    assert differences(outcome(tmp_path / "run"), outcome(tied)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kills_at_random_places(seed: int, tied: Path, tmp_path: Path) -> None:
    rng, words = random.Random(seed), (*SEARCH, "--out", tmp_path / "run", "--resume", "auto")
    for _ in range(rng.randint(1, 4)):
        place = rng.choice(["update", "written", "moved", "line"])
        code = run(words, At(KILL, place, rng.randint(1, {"update": 12, "line": 4}.get(place, 2))), tmp_path / "log")
        assert code in (-KILL, 0), (tmp_path / "log").read_text()
    folder = Path(ok(*words).last).parent  # where nothing was saved before the first kill, a folder of its own
    assert differences(outcome(folder), outcome(tied)) == []
