"""What nas/benchmarks/quality_ranking.py says: the rows as a table, trivial rankers below them, and a picture."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from nas.benchmarks.quality_trees import by_name, interval, marked, side_by_side, table_of

NAMES = {"macs": "MACs alone", "params": "parameters alone"}


def markdown(figures: Mapping[str, Any]) -> str:
    """Seeds side by side; a dash where there is none."""
    base = figures["base"]
    heads = ["ranker", "supernets", "epochs, passes a step", "image-passes", "of them for splits", "training, s",
             "Kendall tau-b [90%], by seed", "mean", f"tau-b less that of {base} [90%], by seed", "Spearman rho, by seed",
             "tau-b of the top tenth, by seed", "overlap of the top tenth, by seed",
             "accuracy in the table of the best predicted, by seed (place)"]  # fmt: skip
    lines = []
    for name, rows in by_name(figures["rows"]).items():
        first = rows[0]
        at = f" (splits at {', '.join(map(str, first['at']))})" if first["at"] else ""  # of a path from the root to a leaf
        lines.append([
            name, str(first["leaves"]), f"{first['epochs']}{at}, {first['passes_a_step']:.3g}",
            ", ".join(f"{row['image_passes']:,}" for row in rows), ", ".join(f"{row['split_images']:,}" for row in rows),
            ", ".join(f"{row['train_seconds']:.0f}" for row in rows), ", ".join(interval(row["kendall_tau"]) for row in rows),
            _mean(rows), ", ".join(interval(row["gain"]) for row in rows if "gain" in row) or "-",
            *(_short([row[key] for row in rows]) for key in ("spearman", "tenth_kendall_tau", "tenth_overlap")),
            ", ".join(f"{row['accuracy']:.2f} ({row['place']})" for row in rows),
        ])  # fmt: skip
    for name, found in figures["trivial"].items():
        lines.append([
            NAMES[name], *["-"] * 5, interval(found["kendall_tau"]), _mean([found]), "-",
            *(_short([found[key]]) for key in ("spearman", "tenth_kendall_tau", "tenth_overlap")), f"{found['accuracy']:.2f}",
        ])  # fmt: skip
    space, ranked = figures["space"], len(figures["truth"])
    return table_of(heads, lines) + (f"\n\n{ranked:,} of {space['networks']:,} architectures: mean {space['mean']:.2f}, best "
                                     f"{space['best']:.2f}; places are among these {ranked:,}.")  # fmt: skip


def _mean(rows: Sequence[Mapping[str, Any]]) -> str:
    values = [row["kendall_tau"]["value"] for row in rows]
    return "-" if None in values else f"{statistics.fmean(values):.3f}"


def _short(found: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join("-" if one["value"] is None else f"{one['value']:.3f}" for one in found)


def picture(figures: Mapping[str, Any], path: Path) -> None:
    """The accuracy of the best predicted, beside mean and best; tau-b, beside that of MACs and parameters."""
    labels = ("accuracy in the table of the best predicted, %",
              f"Kendall tau-b of {len(figures['truth']):,} architectures, 90% interval")  # fmt: skip

    def beside(left: Axes, right: Axes, height: float) -> None:
        for word in ("mean", "best"):
            marked(left, figures["space"][word], height, word)
        for name, found in figures["trivial"].items():
            if found["kendall_tau"]["value"] is not None:
                marked(right, found["kendall_tau"]["value"], height, NAMES[name])

    side_by_side(figures, path, labels, beside)
