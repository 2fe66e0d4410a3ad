"""Windows, files and events of a run's log."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas.engine import moment
from nas.log import METRICS, SYSTEM, NonFiniteLoss, RunLog, Silent, cut
from nas.protocols import Moment


def at(step: int, steps: int = 20) -> Moment:
    return moment(step, steps, epoch_steps=4, seed=0)


def rows(folder: Path, name: str = METRICS) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_window_is_one_line_of_means(tmp_path: Path) -> None:
    log = RunLog(tmp_path, period=3)
    for step in range(7):
        rare = {"now/then": 5} if step == 1 else {}
        log(at(step, steps=7), {"train/loss": torch.tensor(float(step)), "train/lr": 0.1, **rare})
    log.close()
    assert rows(tmp_path) == [
        {"step": 2, "epoch": 0, "train/loss": 1.0, "train/lr": 0.1, "now/then": 5.0},
        {"step": 5, "epoch": 1, "train/loss": 4.0, "train/lr": 0.1},
        {"step": 6, "epoch": 1, "train/loss": 6.0, "train/lr": 0.1},  # the run's end closes the last window
    ]
    assert log.latest == {"train/loss": 6.0, "train/lr": 0.1}


def test_a_metric_is_read_when_it_is_reported(tmp_path: Path) -> None:
    log, alpha = RunLog(tmp_path, period=2), torch.tensor(1.0, requires_grad=True)
    log(at(0), {"a": alpha})
    with torch.no_grad():
        alpha.add_(10.0)
    log(at(1), {"a": alpha})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "epoch": 0, "a": 6.0}]


def test_floats_make_the_round_trip_and_only_losses_must_be_finite(tmp_path: Path) -> None:
    log = RunLog(tmp_path, period=1)
    third = torch.tensor(1 / 3, dtype=torch.float64)
    log(at(0), {"a": third, "b": torch.tensor(0.1), "c": 1e-300, "d": torch.tensor(math.nan)})
    log.now(0, {"valid/top1": 0.75, "rank/kendall_tau": math.inf})
    log.close()
    assert rows(tmp_path) == [
        {"step": 0, "epoch": 0, "a": 1 / 3, "b": torch.tensor(0.1).item(), "c": 1e-300, "d": None},
        {"step": 0, "valid/top1": 0.75, "rank/kendall_tau": None},
    ]


def test_metrics_hold_no_clock_and_system_does(tmp_path: Path) -> None:
    log = RunLog(tmp_path, period=2, world=3)
    for step in range(2):
        log.drew(8, 0.0)
        log(at(step), {"train/loss": 1.0})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "epoch": 0, "train/loss": 1.0}]
    (row,) = rows(tmp_path, SYSTEM)
    assert set(row) == {"step", "system/images_per_s", "system/memory", "system/data_wait"}
    assert row["system/images_per_s"] > 0 and row["system/memory"] > 1 and row["system/data_wait"] == 0.0


def test_a_loss_that_is_not_finite_is_named_by_its_own_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path, period=4)
    log(at(0), {"train/loss": torch.tensor(1.0)})
    log(at(1), {"train/loss": torch.tensor(math.inf), "other": math.nan})
    log(at(2), {"train/loss": torch.tensor(2.0)})
    with pytest.raises(NonFiniteLoss, match=r"^step 1: train/loss = inf, not finite\. .* none was written\. [^\n]*$"):
        log.check()
    with pytest.raises(NonFiniteLoss):
        log(at(3), {"train/loss": torch.tensor(2.0)})
    with pytest.raises(NonFiniteLoss, match="step 9: valid/loss = nan"):
        log.now(9, {"valid/loss": math.nan})
    log.close()
    assert rows(tmp_path) == []


def test_one_number_a_metric(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    with pytest.raises(ValueError, match=r"metric alpha: shape \(2,\)"):
        log(at(0), {"alpha": torch.zeros(2)})
    log.close()
    with pytest.raises(ValueError, match="period = 0"):
        RunLog(tmp_path, period=0)


def test_the_open_window_is_part_of_the_state(tmp_path: Path) -> None:
    values = [torch.tensor(v) for v in (0.1, 0.7, 0.2, 0.9, 0.3, 0.4)]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        log = RunLog(folder, period=3)
        for step in range(5):  # 4 and its evaluation come after the checkpoint
            if step == 4:
                log.flush()
                state = log.state_dict()
            log(at(step), {"train/loss": values[step]})
            log.now(step, {"valid/top1": step / 10})
        if folder == straight:
            log(at(5), {"train/loss": values[5]})
        log.close()
    resumed = RunLog(killed, period=3, start=4)
    resumed.load_state_dict(state)
    resumed(at(4), {"train/loss": values[4]})
    resumed.now(4, {"valid/top1": 0.4})
    resumed(at(5), {"train/loss": values[5]})
    resumed.close()
    assert (killed / METRICS).read_bytes() == (straight / METRICS).read_bytes() != b""


def test_cut_drops_later_lines_and_a_torn_last_one(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "a": step}) for step in (1, 3, 5)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 2, "a"')
    (tmp_path / SYSTEM).write_text("\n".join(lines) + "\n\x00\x00\x00\n")
    cut(tmp_path, 5)
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(tmp_path, SYSTEM)] == [1, 3]
    (tmp_path / METRICS).write_text("hello\n" + "\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object with a step"):
        cut(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, SYSTEM]


def test_events_are_readable_and_a_resumed_run_purges(tmp_path: Path) -> None:
    import matplotlib.figure

    log = RunLog(tmp_path, period=1)
    for step in range(4):
        log(at(step), {"train/loss": 10.0 + step})
    log.histogram("alpha/stage0.width", torch.tensor([0.1, 0.9]), 3)
    log.figure("alpha/heatmap", matplotlib.figure.Figure(), 3)
    log.close()
    (first,) = tmp_path.glob("events*")  # TensorBoard reads the files in the order of their names, which begin with a
    first.rename(tmp_path / "events.out.tfevents.1000000000.first")  # second: here both are of the same one
    log = RunLog(tmp_path, period=1, start=2)
    for step in range(2, 4):
        log(at(step), {"train/loss": 20.0 + step})
    log.histogram("alpha/stage0.width", torch.tensor([0.2, 0.8]), 3)
    log.figure("alpha/heatmap", matplotlib.figure.Figure(), 3)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 10.0), (1, 11.0), (2, 22.0), (3, 23.0)]
    assert "system/images_per_s" in events.Tags()["scalars"]
    assert [e.step for e in events.Histograms("alpha/stage0.width")] == [3]
    assert [e.step for e in events.Images("alpha/heatmap")] == [3]


def test_silent_has_the_same_calls() -> None:
    public = {name for name in vars(RunLog) if not name.startswith("_")} | {"__call__"}
    assert public <= set(vars(Silent))
    silent = Silent()
    silent(at(0), {"train/loss": math.nan})
    silent.check()
    assert silent.state_dict() == {} and silent.latest == {}
