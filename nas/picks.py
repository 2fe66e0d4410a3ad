"""Reading as a search goes on: the derived architecture's accuracy and health, the alphas in TensorBoard, and what to keep.

``last`` is the architecture at the end; ``best`` the one with the highest accuracy among those that meet the budget. Where a
searcher picks at the end, nothing is derived on the way: the smallest, a middle and the largest subnet are read instead.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from nas import health
from nas.data import Data
from nas.evaluate import Scores, score_archs
from nas.importance import importances
from nas.log import RunLog, RunLogs
from nas.protocols import Moment, Strategy
from nas.ranks import Ranks
from search_spaces.space import Arch, SearchSpace

matplotlib.use("Agg")  # no window is ever opened
_log = logging.getLogger("nas")


class Picks:
    """An act of the engine: derive, recalibrate, evaluate on the select split, judge the search's health, log. Its state is
    part of the checkpoint.

    ``gap``: read the accuracy of the mixture too, on the same images, where the strategy believes in one. ``derive``: False
    reads three subnets instead. ``called``: which supernet it is, in the log of a run that has several. ``history``: what was
    read, one row a reading. ``warned``: kind -> "step" and "words" of its first warning, which is not repeated, and "last", the
    latest step at which it held.
    """

    def __init__(
        self, space: SearchSpace, data: Data, device: torch.device, log: RunLogs, ranks: Ranks,
        images: int | None = None, bn_images: int = 2000, gap: bool = True, derive: bool = True, called: str = "",
    ) -> None:  # fmt: skip
        self.space, self.data, self.device, self.log, self.ranks = space, data, device, log, ranks
        self.images, self.bn_images, self.gap, self.derive = images, bn_images, gap, derive
        self.called = called
        self.best: dict[str, Any] | None = None  # {"arch", "metric", "step", "fits"}
        self.last: dict[str, Any] | None = None
        self.history: list[dict[str, float]] = []
        self.warned: dict[str, dict[str, Any]] = {}
        self.norm: float | None = None  # of the gradient of the alphas, mean of the log's last window
        self.peak: float | None = None  # its largest reading

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        if not self.ranks.main:
            return
        row, fresh = self.look(now.step, now.steps, strategy)
        self.log.now(now.step, {tag: value for tag, value in row.items() if "/" in tag})
        if isinstance(self.log, RunLog):
            for kind, words in fresh.items():
                self.log.writer.add_text(f"health/warning/{kind}", words, now.step)
        self._draw(now.step, strategy.probabilities())
        self._draw_importances(now.step, strategy)

    def look(self, step: int, steps: int, strategy: Strategy) -> tuple[dict[str, float], dict[str, str]]:
        """Reads what the strategy would derive after ``step``; sets ``last`` and ``best``. Returns the row that joins the
        history, and the warnings that are new, which the log has said. Three subnets, without ``derive``."""
        if not self.derive:
            row = {"step": step, **self._three(strategy)}
            said = health.collapsed(self.history, row, len(self.data.classes))
            self.history.append(row)
            return row, self._warned(step, said)
        derived, probabilities = strategy.architecture(), strategy.probabilities()
        arch, fits = self.space.canonical(derived), strategy.fits(derived)
        scores, mixed = self.read(strategy, arch, probabilities)
        gap = None if mixed is None else mixed.top1 - scores.top1
        found = health.read(self.space, arch, probabilities)
        row = {"step": step, "select/top1": scores.top1, "select/loss": scores.loss, "select/fits": float(fits), **found.tags()}
        if gap is not None:
            row["health/gap"] = gap
        self._gradient()
        if self.norm is not None:
            self.peak = max(self.norm, self.peak or 0.0)
        self.history.append(row if self.norm is None else {**row, "norm": self.norm})
        self.last = {"arch": arch, "metric": self.metric(scores), "step": step, "fits": fits}
        if fits and (self.best is None or scores.top1 > self.best["metric"]["value"]):
            self.best = dict(self.last)
        said = health.warnings(found, progress=(step + 1) / steps, gap=gap, norm=self.norm, peak=self.peak)
        return row, self._warned(step, said)

    def _warned(self, step: int, said: Mapping[str, str]) -> dict[str, str]:
        """Says what is new of the warnings ``said``, and remembers when each held; what is new."""
        fresh = {kind: words for kind, words in said.items() if kind not in self.warned}
        for kind, words in fresh.items():
            self.warned[kind] = {"step": step, "words": words}
            _log.warning("health%s after step %d: %s", f" of {self.called}" if self.called else "", step + 1, words)
        for kind in said:
            self.warned[kind]["last"] = step
        return fresh

    def read(
        self, strategy: Strategy, arch: Arch, probabilities: Mapping[str, Sequence[float]]
    ) -> tuple[Scores, Scores | None]:
        """Recalibrated accuracy of ``arch`` in the weights that serve it, and of the mixture in the same weights."""
        settings: list[Mapping[str, Any]] = [arch]
        if self.gap and probabilities and self.space.free:
            settings.insert(0, health.relaxed(self.space, probabilities, self.device))
        found = score_archs(strategy.network(arch), settings, self.data, "select", self.device, self.bn_images, self.images)
        return found[-1], (found[0] if len(found) > 1 else None)

    def _three(self, strategy: Strategy) -> dict[str, float]:
        """Recalibrated accuracy of the smallest, a middle and the largest subnet, each in the weights that serve it."""
        found = {}
        for name, arch in three(self.space).items():
            read = score_archs(strategy.network(arch), [arch], self.data, "select", self.device, self.bn_images, self.images)
            found[f"subnet/{name}/top1"] = read[0].top1
        return found

    def metric(self, scores: Scores) -> dict[str, Any]:
        return {
            "value": scores.top1, "split": self.data.reads("select"), "n": scores.n,
            "weights": "supernet", "bn": "recalibrated",
        }  # fmt: skip

    @staticmethod
    def fresh() -> dict[str, Any]:
        """The state before the first reading."""
        return {"best": None, "last": None, "history": [], "warned": {}, "norm": None, "peak": None}

    def state_dict(self) -> dict[str, Any]:
        self._gradient()
        return {"best": self.best, "last": self.last, "history": self.history, "warned": self.warned, "norm": self.norm,
                "peak": self.peak}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.last, self.history, self.warned = state["best"], state["last"], state["history"], state["warned"]
        self.norm, self.peak = state["norm"], state["peak"]

    def _gradient(self) -> None:
        """Takes the norm from the log's last window; of a resumed run, until its first window closes, the checkpoint's."""
        if self.log.latest:
            self.norm = self.log.latest.get("alpha/grad_norm")

    def _draw(self, step: int, probabilities: Mapping[str, Sequence[float]]) -> None:
        if not probabilities:
            return
        for name in self.space.free:
            self.log.histogram(f"alpha/{name}", torch.tensor(probabilities[name]), step)
        rows = {name: probabilities[name] for name in self.space.free}
        if rows:
            self.log.figure("alpha/heatmap", heatmap(rows, {n: self.space.root[n].options for n in rows}), step)

    def _draw_importances(self, step: int, strategy: Strategy) -> None:
        """What the next epoch is drawn by: p, one row for the choices that have the same, and N q, 1 for all where images are
        drawn uniformly."""
        paths, images = importances(strategy)
        if paths is not None:
            alike: dict[tuple[tuple[Any, ...], tuple[float, ...]], list[str]] = {}
            for name, p in paths.p.items():
                alike.setdefault((self.space.root[name].options, tuple(p)), []).append(name)
            called = {key: names[0] + (f" and {len(names) - 1} more" if names[1:] else "") for key, names in alike.items()}
            rows, options = {called[key]: key[1] for key in alike}, {called[key]: key[0] for key in alike}
            self.log.figure("importance/path", heatmap(rows, options, "p"), step)
        if images is not None and images.odds is not None:
            self.log.histogram("importance/data", images.images * images.odds, step)


def three(space: SearchSpace) -> dict[str, Arch]:
    """The smallest, the middle and the largest architecture. Middle: every open choice at the middle of its options, of an
    even number of them at the lower one."""
    middle = space.restrict({name: [space[name].options[(len(space[name].options) - 1) // 2]] for name in space.free})
    return {"smallest": space.smallest(), "middle": middle.largest(), "largest": space.largest()}


def heatmap(rows: Mapping[str, Sequence[float]], options: Mapping[str, Sequence[Any]], label: str = "softmax(alpha)") -> Figure:
    """Probabilities: one row a choice, one cell an option, the option written in it."""
    widest = max(len(row) for row in rows.values())
    cells = [list(row) + [float("nan")] * (widest - len(row)) for row in rows.values()]
    figure = Figure(figsize=(1.5 + 0.7 * widest, 0.8 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.set_xticks([])
    for y, (name, row) in enumerate(rows.items()):
        for x, p in enumerate(row):
            axes.text(x, y, str(options[name][x]), ha="center", va="center", fontsize=6, color="black" if p > 0.6 else "white")
    figure.colorbar(image, label=label)
    return figure
