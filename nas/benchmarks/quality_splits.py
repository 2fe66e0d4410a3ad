"""Splits of a supernet at equal cost: ``python -m nas.benchmarks.quality_splits --out runs/splits --table nats_bench.csv``.

NAS-Bench-201 skeleton, DARTS (first order) and SPOS, each as one supernet, as few-shot NAS (a child for each operation on the
first edge) and as GM-NAS (two splits in two by gradient matching; leaves go on, or begin anew as published). Cost is counted
in image-passes (``nas.benchmarks.quality``) of all supernets together, the measuring of distances included: a path from the
root to a leaf gets the whole epochs, split at about the published shares of it, whose total comes nearest to --passes. All
search the same space: none is left out on the first edge, where few-shot NAS would train a child of dead cells.

What was picked is looked up in a table of the accuracies of all cells; 200 random living cells, the same for everyone, are
ranked by ``nas rank``. Runs are ``nas search`` of shipped recipes, resumed where they were killed. What follows the options
(--data.root=...) overrides the recipes.
"""
from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from nas.benchmarks import quality_trees as trees
from nas.benchmarks.quality import ARGS, HALVES, accuracies, in_parallel, legal, looked_up, program, run
from nas.benchmarks.quality_trees import EXHAUSTIVE, Base, Plan, Way, by_name, interval, marked, ranked, spent, table_of, wanted
from nas.recipe import build, find, parse, read, search_parser
from search_spaces.arch import read_arch
from search_spaces.nats import NAMES, OPS

FIRST = NAMES[0]
LIVING = tuple(op for op in OPS if op != "none")
SAME_SPACE = f"--restrict={json.dumps({FIRST: LIVING})}"
SIZES = (len(LIVING), *(len(OPS) for _ in NAMES[1:]))  # options of every choice

ALIKE = tuple(f"--{ARGS}.weights.{word}" for word in (
    "lr=0.025", "lr_min=0.001", "momentum=0.9", "nesterov=true", "weight_decay=5e-4", "clip=null", "per_epoch=false",
))  # fmt: skip
"""How everyone trains: as the weight-sharing searches of NATS-Bench do."""
BASES = (
    Base("DARTS", "darts-nb201-cifar10", 2, (*ALIKE, "--data.batch_size=64", f"--{ARGS}.order=1")),
    Base("SPOS", "spos-nb201-cifar10", 1, (*ALIKE, "--data.batch_size=64")),
)
MATCHED = ("--split.groups=2", "--split.least=2", '--split.leave_out=["stem.*","norm.*","classifier.*"]')
WAYS = (
    Way("one-shot"),
    Way("exhaustive", (2 / 3,), (len(LIVING),), (EXHAUSTIVE, f"--split.choices=[{FIRST}]", "--split.inherit=weights")),
    Way("GM", (0.25, 0.5), (2, 2), (*MATCHED, "--split.inherit=all")),
    Way("GM, leaves anew", (0.25, 0.5), (2, 2), (*MATCHED, "--split.inherit=[all,nothing]")),
)
PAIRS = {f"{base.name}, {way.name}": (base, way) for base, way in itertools.product(BASES, WAYS)}


def plan(names: Iterable[str], args: argparse.Namespace, overrides: Sequence[str]) -> list[Plan]:
    """The runs of ``names``, all seeds of one after another."""
    return trees.plan({name: PAIRS[name] for name in names}, SIZES, args, overrides, (SAME_SPACE,))


# -- what came of it ----------------------------------------------------------------------------------------------------


def cells(table: Mapping[str, float], count: int, seed: int, path: Path) -> None:
    """``count`` random living cells of ``table``, as the list that ``nas rank`` reads; one that is there stays."""
    trees.sample((text for text in table if legal(text)), count, seed, path, "cell")


def contend(plan: Plan, table: Mapping[str, float], args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """The row of a run, which is made where it is not there yet."""
    common = [f"--space.init_args.C={args.C}", f"--space.init_args.N={args.N}", f"--data.size={args.size}",
              f"--data.limit={args.limit}", "--evaluate.every=100000", "--evaluate.gap=false",
              f"--select.evaluations={args.evaluations}",
              f"--select.images={args.select_images}", f"--select.bn_images={args.bn_images}", *overrides]  # fmt: skip
    run(plan.job, common, args.threads)
    batch = parse(search_parser(), read(find(plan.base.recipe)), [*plan.base.overrides, *HALVES, *overrides]).data.batch_size
    truth = (f"--truth={args.table}", f"--value={args.column}")
    found = json.loads(ranked(plan.job, truth, args.out / "cells.csv", args).read_text(encoding="utf-8"))
    tau = {key: found["rankers"]["prediction"][key] for key in ("kendall_tau", "tenth_kendall_tau")}
    metric = read_arch(plan.job.folder / "arch.json").metrics["top1"]
    return looked_up(plan.job, table) | spent(plan, batch) | {"top1": metric["value"], "images": metric["n"], **tau,
                                                              "n": found["n"]}  # fmt: skip


# -- report -------------------------------------------------------------------------------------------------------------


def markdown(figures: Mapping[str, Any]) -> str:
    """The rows as a table, seeds side by side."""
    heads = ["search", "leaves", "splits at, of epochs", "image-passes", "of them for splits", "seconds: splitting / training",
             "accuracy in the table, by seed", "mean", "place among all", "Kendall tau [90%], by seed", "mean"]  # fmt: skip
    lines = []
    for name, rows in by_name(figures["rows"]).items():
        at = ", ".join(map(str, rows[0]["at"])) or "-"
        lines.append([
            name, str(rows[0]["leaves"]), f"{at} of {rows[0]['epochs']}", ", ".join(f"{row['image_passes']:,}" for row in rows),
            ", ".join(f"{row['split_images']:,}" for row in rows),
            ", ".join(f"{row['split_seconds']:.0f} / {row['train_seconds']:.0f} = {row['share']:.1%}" for row in rows),
            ", ".join(f"{row['accuracy']:.2f}" for row in rows), f"{statistics.fmean(row['accuracy'] for row in rows):.2f}",
            ", ".join(f"{row['place']:,}" for row in rows), ", ".join(interval(row["kendall_tau"]) for row in rows),
            f"{statistics.fmean(row['kendall_tau']['value'] for row in rows):.3f}",
        ])  # fmt: skip
    return table_of(heads, lines)


def picture(figures: Mapping[str, Any], path: Path) -> None:
    """What was picked, beside the median cell, and tau."""
    labels = ("accuracy of the picked cell in the table, %", f"Kendall tau of {figures['cells']} cells, 90% interval")

    def median(left: Axes, right: Axes, height: float) -> None:
        marked(left, figures["space"]["median"], height, "median living cell")

    trees.side_by_side(figures, path, labels, median)


def compete(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything: the plan, the runs, the ranking, the figures; nothing but the plan with --estimate."""
    plans = plan(wanted(PAIRS, args.only), args, overrides)
    trees.say(plans, args.passes)
    if args.estimate:
        return {}
    config = parse(search_parser(), read(find(BASES[0].recipe)), [])
    table = accuracies(args.table, args.column, build(config.space))
    cells(table, args.cells, args.cells_seed, args.out / "cells.csv")
    rows = in_parallel([lambda each=each: contend(each, table, args, overrides) for each in plans], args.jobs)
    alive = [value for text, value in table.items() if legal(text)]
    return {"kind": "splits", "passes": args.passes, "repeats": args.repeats, "bn": args.bn, "cells": args.cells,
            "overrides": list(overrides), "rows": rows,
            "space": {"mean": statistics.fmean(alive), "median": statistics.median(alive), "best": max(table.values()),
                      "living": len(alive), "networks": len(table)}}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = trees.command_line("nas.benchmarks.quality_splits", __doc__, PAIRS)
    parser.set_defaults(column="CIFAR10TestAccuracy200Epochs", passes=250_000, images=5_000, repeats=5, bn="recalibrated")
    parser.add_argument("--C", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--N", type=int, default=1, help="cells a stage")
    parser.add_argument("--limit", type=int, default=10_000, help="training images, half of them held out")
    parser.add_argument("--evaluations", type=int, default=100, help="SPOS: cells that its searcher scores")
    parser.add_argument("--select-images", type=int, default=2_000, help="SPOS: held-out images that score a cell")
    parser.add_argument("--cells", type=int, default=200, help="random living cells that are ranked")
    parser.add_argument("--cells-seed", type=int, default=0, help="of their draw")
    return program(parser, compete, markdown, picture, argv)


if __name__ == "__main__":
    main()
