"""How well a supernet ranks known architectures as it is trained: an act of the run (recipe: ``rank``, nas/ranking/section.py).

    known_truth(asked, built)                       # before there is a folder: refuses what does not fit
    judge = RankJudge(asked, built, run.log)
    run.fit(..., every=judge.acts, keep={"rank": judge})
    report += judge.conclude(run.folder)            # a table; rank-curve.png

A reading is what ``nas rank`` would say of the run at this moment: tau-b and rho of the accuracies with shared weights. It
changes nothing that the training sees: buffers are put back, and random numbers come from a fork.
"""
from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nas.build import Built
from nas.engine import Act, seed_from
from nas.evaluate import Scores, recalibrating, score_served
from nas.log import RunLogs
from nas.protocols import Moment, Strategy
from nas.ranking.matching import match, split
from nas.ranking.section import Rank
from nas.ranking.statistics import FEWEST, LEVEL, ends, kendall, resampled_taus, rounds_of, spearman
from nas.ranking.tables import read_table, value_column
from search_spaces.space import Arch

matplotlib.use("Agg")  # no window is ever opened
_log = logging.getLogger("nas")
CURVE = "rank-curve.png"
AT_ONCE = 16  # architectures whose statistics are in memory together
ROWS = 10  # of the table in report.md, at most


class Known(NamedTuple):
    """Architectures of known accuracy: ``t`` and ``macs`` (n,). ``value``: the column of the accuracies. ``left``: rows or
    architectures of the file that cannot be ranked."""

    archs: list[Arch]
    t: np.ndarray
    macs: np.ndarray
    value: str
    left: int

    @property
    def digest(self) -> str:
        said = json.dumps([self.archs, self.t.tolist()], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


def known_truth(asked: Rank, built: Built) -> Known:
    """What is ranked: those architectures of the file that the space holds, or as many of them as are asked for. ValueError and
    FileNotFoundError for a split without images, a file that is none, columns that are not there, and fewer than three
    architectures."""
    assert asked.truth is not None
    built.data.reads(asked.split)
    space, table = built.space, read_table(asked.truth)
    named = [*(("rank.key", part) for part in split(asked.key)), *([("rank.value", asked.value)] if asked.value else [])]
    for option, column in named:
        table.require(column, option)
    keys = [*split(asked.key), *(choice.name for choice in space.root.choices)]
    column = value_column(table, asked.value, "rank.value", keys)
    archs, found = match({"truth": table}, space, asked.key, {"truth": column})
    truth = found["truth"]
    names = [name for name, value in truth.values.items() if not math.isnan(value)]
    if not archs:
        raise ValueError(f"rank.truth = {asked.truth} has numbers only ({truth.said['key']}), and {space.root.name} has no "
                         "numbering of its own. Add a column of architectures.")  # fmt: skip
    left = int(truth.said["unread"]) + len(truth.values) - len(names)
    if len(names) < FEWEST:
        raise ValueError(f"rank.truth = {asked.truth}: {len(names)} architectures of this space with a number in column "
                         f"{column}; a ranking needs {FEWEST}. {truth.said['first_unread']}".strip())  # fmt: skip
    if isinstance(asked.archs, int) and asked.archs < len(names):
        drawn = random.Random(seed_from(asked.seed, "archs")).sample(range(len(names)), asked.archs)
        names = [names[i] for i in sorted(drawn)]
    chosen = [archs[name] for name in names]
    t = np.array([truth.values[name] for name in names])
    return Known(chosen, t, built.costs.batch(space.encode(chosen)), column, left)


class RankJudge:
    """An act of the engine, of the main rank alone. ``rows``: of each reading "step", how many "images", "kendall_tau" as
    [value, low, high], and "spearman"; None where accuracies that are all equal give none. Its state is part of the checkpoint.
    """

    def __init__(self, asked: Rank, built: Built, log: RunLogs) -> None:
        self.asked, self.built, self.log = asked, built, log
        self.known = known_truth(asked, built)
        self.seed = seed_from(asked.seed, "bootstrap")
        self.macs = self.tau(self.known.macs)
        self.rows: list[dict[str, Any]] = []
        if self.known.left:
            _log.warning("%s: %d rows name no architecture of this space, or no value", asked.truth, self.known.left)

    @property
    def acts(self) -> list[tuple[int, Act]]:
        """When it acts: every so many epochs, and at the end."""
        steps, period = self.built.setup.steps, self.asked.every * self.built.setup.epoch_steps
        return [(period, self), *([(steps, self)] if steps % period else [])]

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        scores = self.read(strategy)
        p = np.array([score.top1 for score in scores])
        tau, rho = self.tau(p), spearman(p, self.known.t)
        self.rows.append({"step": now.step, "images": scores[0].n, "kendall_tau": tau, "spearman": _plain([rho])[0]})
        self.log.now(now.step, {"rank/kendall_tau": kendall(p, self.known.t), "rank/spearman": rho})
        _log.info("rank after step %d: Kendall tau-b %s, Spearman rho %s; MACs alone tau-b %s; %d architectures", now.step + 1,
                  _said(tau), _said(_plain([rho])), _said(self.macs), len(self.known.archs))  # fmt: skip

    def tau(self, p: np.ndarray) -> list[float | None]:
        """tau-b of ``p`` (n,), and the ends of its interval, those of ``nas rank`` for the same architectures and seed."""
        t = self.known.t
        return _plain([kendall(p, t), *ends(resampled_taus([p], t, self.seed, rounds_of(len(t)))[:, 0])])

    def read(self, strategy: Strategy) -> list[Scores]:
        """Of each architecture in the weights that serve it."""
        asked, device, scores = self.asked, self.built.device, list[Scores]()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for start in range(0, len(self.known.archs), AT_ONCE):
                archs = self.known.archs[start : start + AT_ONCE]
                with untouched(strategy.network) as network:
                    scores += score_served(network, archs, self.built.data, asked.split, device, asked.bn_images, asked.images,
                                           asked.bn)  # fmt: skip
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "known": self.known.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError where ``state`` is of other architectures or accuracies."""
        if state["known"] != self.known.digest:
            raise ValueError(f"rank.truth = {self.asked.truth}: its architectures or values changed since the run began. "
                             "Resume with the file that was, or start a new run.")  # fmt: skip
        self.rows = state["rows"]

    def conclude(self, folder: Path) -> str:
        """Draws rank-curve.png into ``folder``. Returns the readings as a table for report.md, of many some, evenly from the
        first to the last."""
        asked, last = self.asked, len(self.rows) - 1
        self._draw(folder)
        shown = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)}) if last >= ROWS else range(last + 1)
        lines = ["| after step | epoch | Kendall tau-b | Spearman rho |", "| ---: | ---: | ---: | ---: |"]
        for row in (self.rows[i] for i in shown):
            lines.append(f"| {row['step'] + 1:,} | {self._epoch(row):g} | {_said(row['kendall_tau'])} | "
                         f"{_said([row['spearman']])} |")  # fmt: skip
        lines.append(f"| MACs alone |  | {_said(self.macs)} |  |")
        count = recalibrating(self.built.data, asked.bn_images)
        norm = f"recalibrated on {count:,} images" if asked.bn == "recalibrated" else "by batch statistics"
        words = (f"{len(self.known.archs):,} architectures of {asked.truth}, column {self.known.value}; {LEVEL:.0%} intervals. "
                 f"Read in the supernet's weights on {self.rows[last]['images']:,} {self.built.data.reads(asked.split)} "
                 f"images, batch norm {norm}. {last + 1:,} readings in all: {CURVE}, nas monitor.")  # fmt: skip
        return "\n".join(lines) + "\n\n" + words

    def _epoch(self, row: Mapping[str, Any]) -> float:
        return (row["step"] + 1) / self.built.setup.epoch_steps

    def _draw(self, folder: Path) -> None:
        """tau-b over epochs, with its interval, and that of MACs alone."""
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        kept = [row for row in self.rows if row["kendall_tau"][0] is not None]
        epochs = [self._epoch(row) for row in kept]
        value, low, high = (np.array([row["kendall_tau"][i] for row in kept], dtype=float) for i in range(3))
        axes.plot(epochs, value, marker="o", label="the supernet's accuracies")
        axes.fill_between(epochs, low, high, alpha=0.2, label=f"{LEVEL:.0%} interval")
        if self.macs[0] is not None:
            axes.axhline(self.macs[0], linestyle="--", color="grey", label="MACs alone")
        axes.set_xlabel("epochs")
        axes.set_ylabel("Kendall tau-b")
        axes.set_title(f"{len(self.known.archs):,} architectures of {self.asked.truth}, {self.known.value}", fontsize=8,
                       wrap=True)  # fmt: skip
        axes.legend(fontsize=8)
        part = folder / f".{CURVE}.part"
        figure.savefig(part, format="png", dpi=120)
        part.replace(folder / CURVE)


@contextmanager
def untouched(network: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
    """``network``, each of whose nets has its buffers back at the end: recalibrated statistics leave nothing behind."""
    served: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}

    def serve(arch: Mapping[str, Any]) -> Any:
        net = network(arch)
        if id(net) not in served:
            served[id(net)] = net, {name: buffer.clone() for name, buffer in net.named_buffers()}
        return net

    try:
        yield serve
    finally:
        with torch.no_grad():
            for net, before in served.values():
                for name, buffer in net.named_buffers():
                    buffer.copy_(before[name])


def _plain(values: Sequence[float]) -> list[float | None]:
    """For files that have no nan."""
    return [None if math.isnan(x) else float(x) for x in values]


def _said(row: Sequence[float | None]) -> str:
    """A value and, where there is one, its interval: "0.512 [0.440, 0.578]"."""
    value, *bounds = row
    if value is None:
        return "none"
    return f"{value:.3f}" if not bounds or None in bounds else f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
