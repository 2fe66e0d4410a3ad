"""The picture of ``nas rank``: truth over prediction for every run, tau-b of every ranker, and tau-b within bins of MACs."""
from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nas.ranking.compare import Bin, Comparison
from nas.ranking.statistics import LEVEL, Estimate

matplotlib.use("Agg")  # no window is ever opened
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2")  # of runs
_TRIVIAL = (("0.3", "P"), ("0.6", "X"))  # macs and params
_MARKERS = "osD^v*<h"
_ACROSS = 4  # scatters in a row


def how(said: Mapping[str, Any]) -> str:
    """The predictions in a line: where from, and what a ranking by a supernet must state."""
    run = "run" in said
    return f"{said['run']} after {said['step']:,} steps, {reading(said)}" if run else f"{said['value']} of {said['file']}"


def reading(said: Mapping[str, Any]) -> str:
    """How a run was read, or the file that values are of."""
    if "run" not in said:
        return str(said["file"])
    norm = f"recalibrated on {said['bn_images']:,} images" if said["bn"] == "recalibrated" else "by batch statistics"
    return f"{said['split']} split, {said['images']:,} images, batch norm {norm}, batch size {said['batch_size']}"


def interval(estimate: Estimate) -> str:
    """For instance "0.512 [0.440, 0.578]"."""
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def short(macs: int) -> str:
    """Three digits, for instance "12.3M"."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if macs >= size:
            return f"{macs / size:.3g}{letter}"
    return str(macs)


def span(group: Bin) -> str:
    """The MACs of a bin."""
    return " to ".join(dict.fromkeys((short(group.low), short(group.high))))


@matplotlib.rc_context({"text.parse_math": False})  # names are a user's: a dollar is a dollar
def picture(report: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]], found: Comparison) -> Figure:
    """Above a scatter of every given ranker, one point an architecture, on one axis of truth; below tau-b of every ranker with
    its interval, and beside it the same within bins of MACs."""
    across = min(_ACROSS, len(found.given))
    down = -(-len(found.given) // across)
    heights = [4.6 if across == 1 else 3.0 * down, 1.6 + 0.28 * max(5, len(found.rankers))]
    figure = Figure(figsize=(max(8.5, 3.2 * across), sum(heights)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    alike = len({reading(by) for by in said.values()}) == 1
    one = how(said[found.given[0]]) if len(found.given) == 1 else reading(said[found.given[0]]) if alike else ""
    line = f"n = {report['n']:,} architectures, {LEVEL:.0%} intervals" + (f"; {one}" if one else "")
    above.suptitle(textwrap.fill(line, int(15 * figure.get_figwidth())), fontsize=8)
    places = above.subplots(down, across, sharey=True, squeeze=False)
    for i, axes in enumerate(places.flat):
        if i < len(found.given):
            _scatter(axes, found, i, said, alike)
        else:
            axes.set_visible(False)
    for row in places:
        row[0].set_ylabel(f"truth: {report['truth']['value']}", fontsize=8)
    panels = below.subplots(1, 2 if found.bins else 1, squeeze=False, width_ratios=[1, 1.6] if found.bins else [1])[0]
    _taus(panels[0], found)
    if found.bins:
        _by_bin(panels[1], found)
    return figure


def _look(found: Comparison) -> dict[str, dict[str, Any]]:
    """Colour and marker of every ranker."""
    looks = {}
    for i, name in enumerate(found.rankers):
        trivial = i - len(found.given)
        own = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        looks[name] = dict(zip(("color", "marker"), own if trivial < 0 else _TRIVIAL[trivial]))
    return looks


def _scatter(axes: Axes, found: Comparison, i: int, said: Mapping[str, Mapping[str, Any]], alike: bool) -> None:
    name = found.given[i]
    size = min(24.0, max(2.0, 2000 / len(found.truth)))
    axes.scatter(found.rankers[name], found.truth, s=size, alpha=0.6, linewidths=0, color=_look(found)[name]["color"])
    lines = [name, f"tau-b {interval(found.statistics[name]['kendall_tau'])}"]
    if "step" in said[name] and len(found.given) > 1:
        lines[1] += f", step {said[name]['step']:,}"
    lines += [] if alike else [reading(said[name])]
    axes.set_title("\n".join(lines), fontsize=7, wrap=True)
    axes.set_xlabel("prediction", fontsize=8)
    axes.tick_params(labelsize=7)


def _taus(axes: Axes, found: Comparison) -> None:
    """A line for every ranker, the first on top."""
    for i, (name, look) in enumerate(_look(found).items()):
        _point(axes, found.statistics[name]["kendall_tau"], i, look, upright=False)
    axes.set_yticks(range(len(found.rankers)), list(found.rankers), fontsize=7)
    axes.set_ylim(len(found.rankers) - 0.5, -0.5)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_title("Kendall tau-b", fontsize=8)
    axes.tick_params(labelsize=7)


def _by_bin(axes: Axes, found: Comparison) -> None:
    """A group for every bin and one for their mean, in it every ranker side by side."""
    looks = _look(found)
    step = 0.8 / len(looks)
    for i, (name, look) in enumerate(looks.items()):
        shift = (i - (len(looks) - 1) / 2) * step
        for b, estimate in enumerate([*found.binned[name].bins, found.binned[name].mean]):
            _point(axes, estimate, b + shift, look)
    ticks = [f"{span(group)}\nn = {group.n}".replace(" to ", " to\n") for group in found.bins] + ["mean"]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7, rotation=90 if len(ticks) > 8 else 0)
    for edge in range(len(found.bins)):
        axes.axvline(edge + 0.5, color="0.9" if edge < len(found.bins) - 1 else "0.5", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_title("Kendall tau-b within bins of MACs, rankers as on the left", fontsize=8)
    axes.tick_params(labelsize=7)


def _point(axes: Axes, estimate: Estimate, at: float, look: Mapping[str, Any], upright: bool = True) -> None:
    """A value with its interval at ``at`` across; nothing where there is no value."""
    if math.isnan(estimate.value):
        return
    low, high = (estimate.value, estimate.value) if math.isnan(estimate.low) else (estimate.low, estimate.high)
    draw, position = (axes.vlines, (at, estimate.value)) if upright else (axes.hlines, (estimate.value, at))
    draw(at, low, high, color=look["color"], linewidth=1.2)
    axes.plot(*position, linestyle="", markersize=4, **look)
