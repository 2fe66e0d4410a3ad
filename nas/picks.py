"""Reading the derived architecture as a search goes on: its accuracy, the alphas in TensorBoard, and what to keep.

``last`` is the architecture at the end; ``best`` the one with the highest accuracy among those that meet the budget.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from nas.data import Data
from nas.evaluate import Scores, score_archs
from nas.log import RunLogs
from nas.protocols import Moment, Strategy
from nas.ranks import Ranks
from search_spaces.space import Arch, SearchSpace

matplotlib.use("Agg")  # no window is ever opened


class Picks:
    """An act of the engine: derive, recalibrate, evaluate on the select split, log. Its state is part of the checkpoint."""

    def __init__(
        self, space: SearchSpace, data: Data, device: torch.device, log: RunLogs, ranks: Ranks,
        images: int | None = None, bn_images: int = 2000,
    ) -> None:  # fmt: skip
        self.space, self.data, self.device, self.log, self.ranks = space, data, device, log, ranks
        self.images, self.bn_images = images, bn_images
        self.best: dict[str, Any] | None = None  # {"arch", "metric", "step"}
        self.last: dict[str, Any] | None = None

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        if not self.ranks.main:
            return
        derived = strategy.architecture()
        arch, fits = self.space.canonical(derived), strategy.fits(derived)
        scores = self.read(strategy, arch)
        self.log.now(now.step, {"select/top1": scores.top1, "select/loss": scores.loss, "select/fits": float(fits)})
        self._draw(now.step, strategy.probabilities())
        self.last = {"arch": arch, "metric": self.metric(scores), "step": now.step, "fits": fits}
        if fits and (self.best is None or scores.top1 > self.best["metric"]["value"]):
            self.best = dict(self.last)

    def read(self, strategy: Strategy, arch: Arch) -> Scores:
        """Recalibrated accuracy of ``arch`` in the weights that serve it."""
        return score_archs(strategy.network(arch), [arch], self.data, "select", self.device, self.bn_images, self.images)[0]

    def metric(self, scores: Scores) -> dict[str, Any]:
        return {
            "value": scores.top1, "split": self.data.reads("select"), "n": scores.n,
            "weights": "supernet", "bn": "recalibrated",
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.last = state["best"], state["last"]

    def _draw(self, step: int, probabilities: Mapping[str, Sequence[float]]) -> None:
        if not probabilities:
            return
        for name in self.space.free:
            self.log.histogram(f"alpha/{name}", torch.tensor(probabilities[name]), step)
        rows = {name: probabilities[name] for name in self.space.free}
        if rows:
            self.log.figure("alpha/heatmap", heatmap(rows, {n: self.space.root[n].options for n in rows}), step)


def heatmap(rows: Mapping[str, Sequence[float]], options: Mapping[str, Sequence[Any]]) -> Figure:
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
    figure.colorbar(image, label="softmax(alpha)")
    return figure
