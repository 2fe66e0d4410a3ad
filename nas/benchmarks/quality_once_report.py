"""What nas/benchmarks/quality_once.py says: what follows from the curves, tables and pictures.

A curve is the content of a run's ``curve.json`` (nas/benchmarks/quality_once_run.py).
"""
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Curve = Mapping[str, Any]


def mean(top1: Mapping[str, float], names: Sequence[str]) -> float:
    return statistics.fmean(top1[name] for name in names)


def whole(curve: Curve) -> list[Mapping[str, Any]]:
    """The readings of all nets, in order."""
    return [row for row in curve["rows"] if len(row["top1"]) == len(curve["macs"])]


def reached(curve: Curve, names: Sequence[str], goal: float) -> float | None:
    """The cost at which the mean of ``names`` first is ``goal``, linear between readings; None where it never is."""
    cost, value = 0.0, 0.0
    for row in whole(curve):
        now = mean(row["top1"], names)
        if now >= goal:
            return cost + (row["cost"] - cost) * ((goal - value) / (now - value) if now > value else 1.0)
        cost, value = row["cost"], now
    return None


def dip(curve: Curve, full: str, switch: float) -> dict[str, float] | None:
    """``full`` around the epoch ``switch``: its last reading before, the lowest within the epoch after, how far it fell.

    None where it was not read on both sides.
    """
    before = [row["top1"][full] for row in curve["rows"] if row["epoch"] <= switch]
    after = [row["top1"][full] for row in curve["rows"] if switch < row["epoch"] <= switch + 1]
    if not before or not after:
        return None
    return {"before": before[-1], "lowest": min(after), "fall": before[-1] - min(after)}


def summary(curves: Sequence[Curve], groups: Mapping[str, Sequence[str]], full: str,
            switches: Mapping[str, float]) -> list[dict[str, Any]]:  # fmt: skip
    """A row a curve. ``groups``: name -> nets whose mean is compared; its goal is the lowest last mean of that seed's curves,
    read on the same images along the way. ``switches``: contestant -> epoch of its switch."""
    rows = []
    for curve in curves:
        row: dict[str, Any] = {key: curve[key] for key in ("name", "seed", "epochs", "cost", "forward_only", "seconds", "top1")}
        rivals = [other for other in curves if other["seed"] == curve["seed"]]
        for group, names in groups.items():
            goal = min(mean(whole(other)[-1]["top1"], names) for other in rivals)
            row[group] = {"mean": mean(curve["top1"], names), "goal": goal, "reached": reached(curve, names, goal)}
        if curve["name"] in switches:
            row["dip"] = dip(curve, full, switches[curve["name"]])
        rows.append(row)
    return rows


# -- tables -------------------------------------------------------------------------------------------------------------


def markdown(figures: Mapping[str, Any]) -> str:
    """The tables of a report: accuracies at the end, costs of equal accuracy, the switch, networks trained alone."""
    curves, rows = figures["curves"], figures["rows"]
    macs, groups = curves[0]["macs"], figures["groups"]
    heads = [*(f"{name} ({cost / 1e6:.2f} M)" for name, cost in macs.items()), *(f"mean of {name}" for name in groups)]
    lines = [f"Top-1 on {curves[0]['test_images']:,} test images, batch norms recalibrated; MACs of a network in brackets.", "",
             "| method | seed | epochs | MACs x images | forward only | " + " | ".join(heads) + " |",
             "|" + "---|" * (5 + len(heads))]  # fmt: skip
    for row in rows:
        cells = [row["name"], row["seed"], row["epochs"], f"{row['cost']:.3g}", f"{row['forward_only']:.3g}",
                 *(f"{100 * row['top1'][name]:.2f}" for name in macs),
                 *(f"{100 * row[group]['mean']:.2f}" for group in groups)]  # fmt: skip
        lines.append(_line(cells))
    lines += ["", f"Cost until the worst method's last mean, on {figures['images']:,} test images along the way "
              "(share of its own cost; linear between readings).", "",
              "| method | seed | " + " | ".join(f"{name}: goal | cost | share" for name in groups) + " |",
              "|" + "---|" * (2 + 3 * len(groups))]  # fmt: skip
    for row in rows:
        cells = [row["name"], row["seed"]]
        for group in groups:
            cost = row[group]["reached"]
            cells += [f"{100 * row[group]['goal']:.2f}", "never" if cost is None else f"{cost:.3g}",
                      "-" if cost is None else f"{cost / row['cost']:.2f}"]  # fmt: skip
        lines.append(_line(cells))
    dips = [row for row in rows if row.get("dip")]
    if dips:
        lines += ["", f"{figures['full']} at the switch: the last reading before, the lowest of the epoch after.", "",
                  "| method | seed | before | lowest | fall, points |", "|---|---|---|---|---|"]  # fmt: skip
    for row in dips:
        cells = [row["name"], row["seed"], *(f"{100 * row['dip'][key]:.2f}" for key in ("before", "lowest", "fall"))]
        lines.append(_line(cells))
    return "\n".join(lines + (alone_lines(figures["alone"]) if figures.get("alone") else []))


def alone_lines(alone: Mapping[str, Any]) -> list[str]:
    """The stand-alone check as a table."""
    lines = ["", f"Networks of {alone['supernet']}, seed {alone['seed']} ({alone['images']:,} images seen): as inherited, fine-"
             f"tuned for {alone['tune_epochs']} epochs, and trained alone from scratch on as many images.", "",
             "| network | MACs | inherited | fine-tuned | alone |", "|---|---|---|---|---|"]  # fmt: skip
    for row in alone["rows"]:
        lines.append(_line([row["net"], f"{row['macs'] / 1e6:.2f} M",
                            *(f"{100 * row[key]:.2f}" for key in ("inherited", "tuned", "scratch"))]))  # fmt: skip
    return lines


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# -- pictures -----------------------------------------------------------------------------------------------------------


def picture(figures: Mapping[str, Any], path: Path) -> None:
    """Accuracy over MACs at the end, mean accuracy over cost, the largest network over cost: a line a method, the mean of its
    seeds (the second and third: each seed thinly)."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    names = list(dict.fromkeys(curve["name"] for curve in figures["curves"]))
    group, six = next(iter(figures["groups"].items()))
    for i, name in enumerate(names):
        curves = [curve for curve in figures["curves"] if curve["name"] == name]
        style: dict[str, Any] = {"color": f"C{i}", "linewidth": 1.5}
        macs = [curves[0]["macs"][net] / 1e6 for net in six]
        axes[0].plot(macs, [100 * statistics.fmean(c["top1"][net] for c in curves) for net in six], "o-", label=name, **style)
        for curve in curves:
            rows = whole(curve)
            axes[1].plot([row["cost"] for row in rows], [100 * mean(row["top1"], six) for row in rows], "o-", markersize=3,
                         **style)  # fmt: skip
            axes[2].plot([row["cost"] for row in curve["rows"]], [100 * row["top1"][figures["full"]] for row in curve["rows"]],
                         "o-", markersize=3, **style)  # fmt: skip
    if figures.get("alone"):
        found = figures["alone"]
        for key, mark, name in (("scratch", "k^", "alone, from scratch"), ("tuned", "kx", f"{found['supernet']}, fine-tuned")):
            macs = [row["macs"] / 1e6 for row in found["rows"]]
            axes[0].plot(macs, [100 * row[key] for row in found["rows"]], mark, label=name)
    titles = ("at the end", f"mean of {group} on the way", f"the largest, {figures['full']}, on the way")
    for ax, title, label in zip(axes, titles, ("MACs of the network, millions", *["MACs x images spent"] * 2)):
        ax.set(title=title, xlabel=label, ylabel="top-1, %")
        ax.grid(color="0.92")
    axes[0].legend(fontsize=7, loc="lower right")
    low = min((100 * value for curve in figures["curves"] for value in curve["top1"].values()), default=math.nan)
    axes[0].set_ylim(bottom=max(0.0, low - 5))
    figure.savefig(path, dpi=130)
