"""What ``nas rank`` leaves behind: a table in the log, rank.json, rank.csv, scatter.png and TensorBoard events."""
from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from nas.ranking import LEVEL, Estimate

matplotlib.use("Agg")  # no window is ever opened
_log = logging.getLogger("nas")
_WIDTH = 26  # characters of a cell
Found = Mapping[str, Mapping[str, Estimate]]
"""Ranker ("prediction", "macs", "params") -> statistic -> estimate."""


def plain(estimate: Estimate) -> dict[str, Any]:
    """For JSON, which has no nan."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in estimate._asdict().items()}


def how(said: Mapping[str, Any]) -> str:
    """The predictions in a line: where from, and what a ranking by a supernet must state."""
    if "run" not in said:
        return f"{said['value']} of {said['file']}"
    norm = f"recalibrated on {said['bn_images']:,} images" if said["bn"] == "recalibrated" else "by batch statistics"
    return (f"{said['run']} after {said['step']:,} steps, {said['split']} split, {said['images']:,} images, batch norm {norm}, "
            f"batch size {said['batch_size']}")  # fmt: skip


def interval(estimate: Estimate) -> str:
    """For instance "0.512 [0.440, 0.578]"."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def tell(report: Mapping[str, Any], found: Found) -> None:
    """The statistics as a table in the log: one line each, one column a ranker."""
    left = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items())
    _log.info("prediction: %s", how(report["predictions"]))
    _log.info("truth: %s of %s; %d architectures, %d distinct; left out: %s", report["truth"]["value"],
              report["truth"]["file"], report["n"], report["distinct"], left or "none")  # fmt: skip
    _log.info("%-26s%s   [%.0f%% interval]", "", "".join(f"{name:{_WIDTH}}" for name in found), 100 * LEVEL)
    for key, first in next(iter(found.values())).items():
        cells = "".join(f"{interval(by[key]):{_WIDTH}}" for by in found.values())
        _log.info("%-26s%s", label(key, first), cells.rstrip())
    for name, by in found.items():
        for key, estimate in by.items():
            if estimate.note:
                _log.info("%s of %s: %s", label(key, estimate), name, estimate.note)


def label(key: str, estimate: Estimate) -> str:
    words = {"kendall_tau": "Kendall tau-b", "spearman": "Spearman rho"}
    name = key.removeprefix("tenth_")
    text = words.get(name, f"{name} of the top {estimate.k}")
    return f"{text}, top {estimate.k}" if key == "tenth_kendall_tau" else text


def write(
    folder: Path, report: Mapping[str, Any], found: Found, names: Sequence[str], truth: np.ndarray,
    rankers: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    """The files, into ``folder``, which is made. ``rankers``: the values (n,) of each, in the order of ``names``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rank.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        columns = {"prediction": rankers["prediction"], "truth": truth, **rankers}
        rows.writerow(["text", *columns])
        rows.writerows(zip(names, *(values.tolist() for values in columns.values())))
    figure = scatter(report, found["prediction"]["kendall_tau"], truth, rankers["prediction"])
    figure.savefig(folder / "scatter.png", dpi=120)
    step = max(0, report["predictions"].get("step", 1) - 1)  # of the last update, as in the run's own events
    with SummaryWriter(str(folder)) as events:  # a folder of its own: the run may go on, and would cut its events
        for key in ("kendall_tau", "spearman"):
            if not math.isnan(found["prediction"][key].value):
                events.add_scalar(f"rank/{key}", found["prediction"][key].value, step)
        events.add_figure("rank/scatter", figure, step)
    (folder / "rank.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def scatter(report: Mapping[str, Any], tau: Estimate, truth: np.ndarray, prediction: np.ndarray) -> Figure:
    """Truth over prediction, one point an architecture."""
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(prediction, truth, s=max(2.0, 24 - 4 * math.log10(len(truth)) ** 2), alpha=0.6, linewidths=0)
    axes.set_xlabel("prediction")
    axes.set_ylabel(f"truth: {report['truth']['value']}")
    axes.set_title(f"Kendall tau-b {interval(tau)}, n = {report['n']:,}\n{how(report['predictions'])}", fontsize=7, wrap=True)
    return figure
