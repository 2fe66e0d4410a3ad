"""Accuracy over cost: which architectures no other beats in both, how much they beat together, as a table and a picture."""
from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")  # no window is ever opened
COLUMNS = ("macs", "params", "top1", "loss", "images", "front", "arch")


def on_front(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """(N,) costs and scores -> (N,) bool: no other is at most as dear and better, or cheaper and as good; of equal ones the
    first."""
    order = np.lexsort((np.arange(len(cost)), -score, cost))
    before = np.maximum.accumulate(np.concatenate([[-math.inf], score[order]]))[:-1]
    front = np.zeros(len(cost), dtype=bool)
    front[order] = score[order] > before
    return front


def hypervolume(cost: Sequence[float], score: Sequence[float], full: float) -> float:
    """The area that a front dominates between its costs and ``full``, above score 0, as a share of ``full``: 0 to 1 for
    scores of 0 to 1. What costs more than ``full`` adds nothing."""
    best, at, area = 0.0, 0.0, 0.0
    for c, s in sorted(zip(cost, score)):
        c = min(c, full)
        area += (c - at) * best
        best, at = max(best, s), c
    return (area + (full - at) * best) / full if full > 0 else best


def table(rows: Sequence[Sequence[object]]) -> str:
    """CSV text of ``COLUMNS``."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(rows)
    return out.getvalue()


def picture(cost: np.ndarray, score: np.ndarray, picked: Sequence[tuple[float, float]], split: str) -> Figure:
    """Top-1 over MACs of all that was scored; the front joined, ``picked`` (cost, score) ringed."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    front = on_front(cost, score)
    order = np.flatnonzero(front)[np.argsort(cost[front], kind="stable")]
    axes.scatter(cost, score, s=9, color="tab:gray", alpha=0.5, linewidths=0, label=f"scored: {len(cost):,}")
    axes.plot(cost[order], score[order], "o-", color="tab:blue", markersize=4, linewidth=1, label=f"front: {len(order)}")
    if picked:
        x, y = zip(*picked)
        axes.scatter(x, y, s=90, facecolors="none", edgecolors="tab:red", linewidths=1.6, label="picked")
    axes.set(xlabel="MACs", ylabel=f"{split} top-1, recalibrated batch norm")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
