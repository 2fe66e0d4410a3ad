"""What people see of a split: heat maps of the similarities, bars of the cuts, tables and the tree as text. Plain data in.

A split is the content of split.json. Its "measured" holds, for every choice that was compared, {"options": names,
"distances": (n, n) rows of D, "groups": the best partition as lists of options, "within", "cut"}; it is empty where no
gradient was read (exhaustive splits). The similarity is 1 - D, as in the paper (shared page fewshot-gm.md, section 2b):
1 where gradients agree, 0 at right angles, below 0 where they oppose.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")  # no window is ever opened
Measured = Mapping[str, Mapping[str, Any]]
MOST = 24  # heat maps in a picture
BLUE, RED, GREY = "#0072B2", "#D55E00", "0.8"  # told apart by everyone (Okabe and Ito)
_CELL, _EDGE = 0.36, 1.15  # inches: a cell of a heat map, its labels


# -- pictures -----------------------------------------------------------------------------------------------------------


def similarity(measured: Measured, chosen: str = "") -> Figure:
    """1 - D of every measured choice, the largest cut first, ``MOST`` at most (``chosen`` among them). Options stand group by
    group, so that a good partition shows as blocks; the groups of ``chosen`` are outlined. ValueError where nothing was
    measured."""
    names = shown(measured, chosen)
    widest = max(len(measured[name]["options"]) for name in names)
    side = _CELL * widest + _EDGE
    columns = math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(side * columns + 1.0, (side + 0.3) * rows), layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False).ravel()
    low = min(float(np.min(1 - np.asarray(measured[name]["distances"]))) for name in names)
    for axes, name in zip(found, names):
        _heat(axes, name, measured[name], min(low, 0.99))
        if name == chosen:
            _outline(axes, measured[name]["groups"])
            axes.set_title(f"{axes.get_title()}: split", fontsize=8, fontweight="bold", color="black")
    for axes in found[len(names) :]:
        axes.set_axis_off()
    figure.colorbar(found[0].images[0], ax=list(found), label="similarity of gradients, 1 - D", fraction=0.03)
    if len(names) < len(measured):
        figure.suptitle(f"{len(names)} of {len(measured)} choices: the largest cuts", fontsize=8)
    return figure


def cuts(measured: Measured, chosen: str = "") -> Figure:
    """Bars: the cut of every measured choice, and behind it what its best partition leaves within groups; the largest cut on
    top, ``chosen`` in another colour. ValueError where nothing is measured."""
    names = _by_cut(measured)
    figure = Figure(figsize=(6.4, 0.9 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    cut = [float(measured[name]["cut"]) for name in names]
    axes.barh(names, cut, color=[RED if name == chosen else BLUE for name in names])
    axes.barh(names, [float(measured[name]["within"]) for name in names], left=cut, color=GREY)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("distance of gradients cut by the best partition; grey: left within its groups")
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == chosen else "normal")
    return figure


def shown(measured: Measured, chosen: str = "") -> list[str]:
    """The choices that ``similarity`` shows, in order."""
    names = _by_cut(measured)
    if chosen in names[MOST:]:
        return [*names[: MOST - 1], chosen]
    return names[:MOST]


def _by_cut(measured: Measured) -> list[str]:
    if not measured:
        raise ValueError("No distances were measured: an exhaustive split reads no gradients, so there is nothing to draw.")
    return sorted(measured, key=lambda name: -float(measured[name]["cut"]))


def _heat(axes: Axes, name: str, row: Mapping[str, Any], low: float) -> None:
    """One heat map; colours from ``low`` to 1."""
    order, words = _order(row), [str(option) for option in row["options"]]
    S = 1 - np.asarray(row["distances"], dtype=np.float64)[np.ix_(order, order)]
    axes.imshow(S, vmin=low, vmax=1.0, cmap="cividis")
    axes.set_xticks(range(len(order)), [words[i] for i in order], rotation=90, fontsize=7)
    axes.set_yticks(range(len(order)), [words[i] for i in order], fontsize=7)
    axes.set_title(f"{name}\ncut {float(row['cut']):.3g}", fontsize=8, color="0.3")
    for (y, x), value in np.ndenumerate(S):
        color = "black" if value > (low + 1) / 2 else "white"  # cividis is bright in its upper half
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)


def _order(row: Mapping[str, Any]) -> list[int]:
    """Positions of the options, group by group."""
    return [list(row["options"]).index(option) for group in row["groups"] for option in group]


def _outline(axes: Axes, groups: Sequence[Sequence[Any]]) -> None:
    start = 0
    for group in groups:
        box = Rectangle((start - 0.5, start - 0.5), len(group), len(group), fill=False, edgecolor=RED, linewidth=2.5)
        axes.add_patch(box)
        start += len(group)


# -- text ---------------------------------------------------------------------------------------------------------------


def sentence(split: Mapping[str, Any]) -> str:
    """What was split, into what, how and at which cost."""
    words = (f"After epoch {split['epoch']} (step {split['step']:,}): {split['choice']} was split into "
             f"{grouped(split['groups'])}, children {', '.join(split['children'])}, which inherit {split['inherit']}.")
    if not split["measured"]:
        return f"{words} One child for each option: nothing was measured."
    rule = {"cut": "the largest cut", "within": "the smallest distance within groups"}[split["rule"]]
    return (f"{words} By {rule} of {len(split['measured'])} choices, over {split['repeats']} batches of {split['samples']} "
            f"{'draw' if split['samples'] == 1 else 'draws'}: {split['passes']:,} passes, {split['images']:,} image-passes, "
            f"{split['seconds']:.1f} s.")  # fmt: skip


def table(split: Mapping[str, Any]) -> str:
    """Markdown: a row for each measured choice, the best by the rule of ``split`` first; only the split one where none was."""
    lines = ["| choice | cut | within | groups |", "|---|---:|---:|---|"]
    measured: Measured = split["measured"]
    if not measured:
        lines.append(f"| **{split['choice']}** |  |  | {grouped(split['groups'])} |")
    sign = -1 if split["rule"] == "cut" else 1
    for name in sorted(measured, key=lambda name: sign * float(measured[name][split["rule"]])):
        row = measured[name]
        word = f"**{name}**" if name == split["choice"] else name
        lines.append(f"| {word} | {float(row['cut']):.4f} | {float(row['within']):.4f} | {grouped(row['groups'])} |")
    return "\n".join(lines)


def grouped(groups: Sequence[Sequence[Any]]) -> str:
    """"none, skip_connect / nor_conv_1x1"."""
    return " / ".join(", ".join(map(str, group)) for group in groups)


def tree_text(nodes: Sequence[Mapping[str, Any]]) -> str:
    """The whole run as a nested Markdown list, parents before children.

    A node: {"path": "" of the root or "0.1", "epochs": [first, end], "choice": what it was split by or None, "cut": float or
    None, "options": {choice: what its parent's split left}, "size": architectures, "top1": float or None, "picked": bool}.
    """
    lines = []
    for node in sorted(nodes, key=lambda node: _steps(node["path"])):
        begin, end = node["epochs"]
        words = [f"{choice} = {', '.join(map(str, options))}" for choice, options in node["options"].items()]
        words.append(f"{end - begin} {'epoch' if end - begin == 1 else 'epochs'}{f' from {begin}' if begin else ''}")
        words.append(f"{node['size']:,} architectures")
        if node["choice"] is not None:
            words.append(f"split {node['choice']}" + ("" if node["cut"] is None else f" (cut {node['cut']:.3g})"))
        if node["top1"] is not None:
            words.append(f"top-1 {node['top1']:.4f}")
        name = f"**{node['path'] or 'root'}**" if node["picked"] else node["path"] or "root"
        tail = ", **picked**" if node["picked"] else ""
        lines.append(f"{'  ' * len(_steps(node['path']))}- {name}: {', '.join(words)}{tail}")
    return "\n".join(lines)


def _steps(path: str) -> tuple[int, ...]:
    """"0.1" -> (0, 1)."""
    return tuple(int(step) for step in path.split(".")) if path else ()


# -- TensorBoard --------------------------------------------------------------------------------------------------------


def write_board(
    writer: SummaryWriter, split: Mapping[str, Any], step: int, nodes: Sequence[Mapping[str, Any]] = ()
) -> None:
    """What there is to see of ``split`` after ``step``; of the tree as well, where its ``nodes`` are given."""
    measured: Measured = split["measured"]
    if measured:
        writer.add_figure("split/similarity", similarity(measured, split["choice"]), step)
        writer.add_figure("split/cut", cuts(measured, split["choice"]), step)
    for name, row in measured.items():
        writer.add_scalar(f"split/cut/{name}", float(row["cut"]), step)
        writer.add_scalar(f"split/within/{name}", float(row["within"]), step)
    writer.add_text("split/table", f"{sentence(split)}\n\n{table(split)}", step)
    if nodes:
        writer.add_text("split/tree", tree_text(nodes), step)
