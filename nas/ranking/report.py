"""What ``nas rank`` leaves behind: a table in the log, rank.json, rank.csv, scatter.png and TensorBoard events."""
from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from nas.ranking.bins import FROM
from nas.ranking.compare import Comparison
from nas.ranking.picture import how, interval, picture, span
from nas.ranking.statistics import LEVEL, Estimate, flat

_log = logging.getLogger("nas")
_WIDTH, _ACROSS = 26, 4  # characters of a cell, cells in a line
FILES = ("rank.json", "rank.csv", "scatter.png")
Said = Mapping[str, Mapping[str, Any]]
"""Label of a run or column -> how its values came about."""


def plain(estimate: Estimate) -> dict[str, Any]:
    """For JSON, which has no nan."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in estimate._asdict().items()}


def plain_found(found: Comparison) -> dict[str, Any]:
    """The statistics of rank.json: by ranker, differences by pair, and by bin, null where there are no bins."""
    return {
        "rankers": {name: {key: plain(estimate) for key, estimate in by.items()} for name, by in found.statistics.items()},
        "differences": [{"of": a, "less": b, **plain(by)} for (a, b), by in found.differences.items()],
        "bins": {"macs": [group._asdict() for group in found.bins],
                 "rankers": {name: {"kendall_tau": [plain(estimate) for estimate in by.bins], "mean": plain(by.mean)}
                             for name, by in found.binned.items()}} if found.bins else None,
    }  # fmt: skip


def tell(report: Mapping[str, Any], said: Said, found: Comparison) -> None:
    """The statistics as tables in the log: one line each, one column a ranker."""
    left = ", ".join(f"{count} {reason}" for reason, count in report["left_out"].items())
    for name, reading in said.items():
        _log.info("%s: %s", name, how(reading))
    _log.info("truth: %s of %s; %d architectures, %d distinct; left out: %s", report["truth"]["value"],
              report["truth"]["file"], report["n"], report["distinct"], left or "none")  # fmt: skip
    if "macs" in found.rankers and report["n"] < FROM and not found.bins:
        _log.info("no bins of MACs: fewer than %d architectures; --bins asks for them", FROM)
    rankers, lines = list(found.rankers), list(_lines(found))
    width, head = max(_WIDTH, 2 + max(map(len, rankers))), 2 + max(len(title) for title, _ in lines)
    for start in range(0, len(rankers), _ACROSS):
        names = rankers[start : start + _ACROSS]
        _log.info("%s%s", f"{f'[{LEVEL:.0%} interval]':{head}}", "".join(f"{name:{width}}" for name in names).rstrip())
        for title, by in lines:
            cells = "".join(f"{interval(by[name]) if name in by else '':{width}}" for name in names)
            if cells.strip():
                _log.info("%s%s", f"{title:{head}}", cells.rstrip())
    nothing = [name for name, values in found.rankers.items() if flat(values)]
    for name in nothing:
        _log.info("%s: all predictions are equal, so it ranks no better than chance", name)
    for title, by in lines:
        told = {name: estimate.note for name, estimate in by.items() if estimate.note and name not in nothing}
        for note in dict.fromkeys(told.values()):
            _log.info("%s of %s: %s", title, ", ".join(name for name in told if told[name] == note), note)


def _lines(found: Comparison) -> Iterator[tuple[str, dict[str, Estimate]]]:
    """What a line of the table is called, and its estimates by ranker."""
    for key, first in next(iter(found.statistics.values())).items():
        yield label(key, first), {name: by[key] for name, by in found.statistics.items()}
    for b, group in enumerate(found.bins):
        title = f"tau-b, {span(group)} MACs, n = {group.n}"
        yield title, {name: by.bins[b] for name, by in found.binned.items()}
    if found.bins:
        yield "tau-b, mean over the bins", {name: by.mean for name, by in found.binned.items()}
    for other in found.rankers:
        by = {a: estimate for (a, b), estimate in found.differences.items() if b == other}
        if by:
            yield f"tau-b less that of {other}", by


def label(key: str, estimate: Estimate) -> str:
    words = {"kendall_tau": "Kendall tau-b", "spearman": "Spearman rho"}
    name = key.removeprefix("tenth_")
    text = words.get(name, f"{name} of the top {estimate.k}")
    return f"{text}, top {estimate.k}" if key == "tenth_kendall_tau" else text


def write(folder: Path, report: Mapping[str, Any], said: Said, found: Comparison, names: Sequence[str]) -> None:
    """The files, into ``folder``, which is made; ``names``: of the n architectures."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "rank.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        given = {name: found.rankers[name] for name in found.given}
        columns = {**given, "truth": found.truth, **found.rankers}  # the truth beside what is given, costs last
        rows.writerow(["text", *columns])
        rows.writerows(zip(names, *(values.tolist() for values in columns.values())))
    figure = picture(report, said, found)
    figure.savefig(folder / "scatter.png", dpi=120)
    steps = {name: max(0, by.get("step", 1) - 1) for name, by in said.items()}  # of the last update, as in a run's own events
    for name, place in curves(folder, found.given).items():
        with SummaryWriter(str(place)) as events:  # a folder of its own: the run may go on, and would cut its events
            for key in ("kendall_tau", "spearman"):
                if not math.isnan(found.statistics[name][key].value):
                    events.add_scalar(f"rank/{key}", found.statistics[name][key].value, steps[name])
            if place == folder:
                events.add_figure("rank/scatter", figure, steps[name])
    if len(found.given) > 1:
        with SummaryWriter(str(folder)) as events:
            events.add_figure("rank/scatter", figure, max(steps.values()))
    (folder / "rank.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def curves(folder: Path, given: Sequence[str]) -> dict[str, Path]:
    """Where the events of each go: ``folder`` for a single one, else a folder inside, which names the curve in TensorBoard. A
    label is anything that a user wrote: what is no letter, digit, ``_+=-`` or inner dot becomes ``_``."""
    if len(given) == 1:
        return {given[0]: folder}
    found: dict[str, Path] = {}
    taken = {*FILES}
    for label in given:
        base = re.sub(r"[^\w.+=-]+", "_", label).strip("._") or "column"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}-{count}"
        taken.add(name)
        found[label] = folder / name
    return found
