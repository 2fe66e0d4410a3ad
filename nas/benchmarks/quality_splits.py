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
import csv
import itertools
import json
import random
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from nas.benchmarks.quality import (
    ARGS,
    HALVES,
    Contestant,
    Job,
    accuracies,
    chosen,
    execute,
    in_parallel,
    legal,
    looked_up,
    run,
    slug,
)
from nas.recipe import build, find, parse, read, search_parser
from nas.splits.show import BLUE, RED
from search_spaces.arch import read_arch
from search_spaces.nats import NAMES, OPS

FIRST = NAMES[0]
LIVING = tuple(op for op in OPS if op != "none")
SAME_SPACE = f"--restrict={json.dumps({FIRST: LIVING})}"
SIZES = (len(LIVING), *(len(OPS) for _ in NAMES[1:]))  # options of every choice
NEAR = 0.03  # a total this near to the budget is as good as any: the shares of the splits decide


class Base(NamedTuple):
    """A strategy to split. ``drawn``: batches that a step of it draws."""

    name: str
    recipe: str
    drawn: int
    overrides: tuple[str, ...]


class Way(NamedTuple):
    """How supernets become several. ``shares``: of the path, where each level splits. ``children``: of each split."""

    name: str
    shares: tuple[float, ...] = ()
    children: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def gradients(self) -> bool:
        return bool(self.shares) and EXHAUSTIVE not in self.overrides


ALIKE = tuple(f"--{ARGS}.weights.{word}" for word in (
    "lr=0.025", "lr_min=0.001", "momentum=0.9", "nesterov=true", "weight_decay=5e-4", "clip=null", "per_epoch=false",
))  # fmt: skip
"""How everyone trains: as the weight-sharing searches of NATS-Bench do."""
BASES = (
    Base("DARTS", "darts-nb201-cifar10", 2, (*ALIKE, "--data.batch_size=64", f"--{ARGS}.order=1")),
    Base("SPOS", "spos-nb201-cifar10", 1, (*ALIKE, "--data.batch_size=64")),
)
MATCHED = ("--split.groups=2", "--split.least=2", '--split.leave_out=["stem.*","norm.*","classifier.*"]')
EXHAUSTIVE = "--split.by=exhaustive"
WAYS = (
    Way("one-shot"),
    Way("exhaustive", (2 / 3,), (len(LIVING),), (EXHAUSTIVE, f"--split.choices=[{FIRST}]", "--split.inherit=weights")),
    Way("GM", (0.25, 0.5), (2, 2), (*MATCHED, "--split.inherit=all")),
    Way("GM, leaves anew", (0.25, 0.5), (2, 2), (*MATCHED, "--split.inherit=[all,nothing]")),
)
PAIRS = {f"{base.name}, {way.name}": (base, way) for base, way in itertools.product(BASES, WAYS)}


# -- equal cost ---------------------------------------------------------------------------------------------------------


class Timetable(NamedTuple):
    """``at``: the epochs at which a path of ``epochs`` splits. ``trained``: epochs of all supernets together."""

    at: tuple[int, ...]
    epochs: int
    trained: int


def trained(at: Sequence[int], epochs: int, children: Sequence[int]) -> int:
    """The epochs of all supernets of a tree whose paths take ``epochs`` and split at ``at``."""
    total, nets = 0, 1
    for begin, end, n in zip((0, *at), (*at, epochs), (*children, 1)):
        total += nets * (end - begin)
        nets *= n
    return total


def compared(sizes: Iterable[int], children: Sequence[int], repeats: int) -> int:
    """Passes of a batch that the distances of all splits take, where each split leaves the choice with most options too few to
    be compared again."""
    total, nets, left = 0, 1, sorted(sizes)
    for n in children:
        total += nets * sum(left) * repeats
        left.pop()
        nets *= n
    return total


def timetable(shares: Sequence[float], children: Sequence[int], budget: float) -> Timetable:
    """The path whose tree takes ``budget`` epochs: splits within one epoch of their ``shares``; of those whose totals are
    ``NEAR``, or of the nearest, the one that keeps the shares best. SystemExit where not even the shortest fits."""
    found: list[tuple[float, float, float, Timetable]] = []
    for epochs in range(len(shares) + 1, int(budget) + 2):
        around = [sorted({round(share * epochs) + d for d in (-1, 0, 1)}) for share in shares]
        for at in itertools.product(*around):
            if all(a < b for a, b in zip((0, *at), (*at, epochs))):
                total = trained(at, epochs, children)
                off = abs(total / budget - 1)
                astray = sum(abs(a / epochs - share) for a, share in zip(at, shares))
                found.append((max(off - NEAR, 0.0), astray, off, Timetable(at, epochs, total)))
    best = min(found, key=lambda row: row[:3], default=None)
    if best is None or best[3].trained > budget * 1.5:
        raise SystemExit(f"The budget pays for {budget:.2f} epochs, too few for {len(shares)} splits into {list(children)}.")
    return best[3]


class Plan(NamedTuple):
    """One run. ``measured``: image-passes that its splits are expected to take beside those of ``job``."""

    job: Job
    base: Base
    way: Way
    table: Timetable
    measured: int


def plan(names: Iterable[str], args: argparse.Namespace, overrides: Sequence[str]) -> list[Plan]:
    """The runs of ``names``, all seeds of one after another."""
    plans = []
    for name in names:
        base, way = PAIRS[name]
        words = (*base.overrides, *(word for word in overrides if word.startswith(("--strategy", "--data.batch_size"))))
        config = parse(search_parser(), read(find(base.recipe)), words)
        strategy, batch = build(config.strategy), config.data.batch_size
        epoch = round(strategy.passes() * (args.images // batch * batch))  # leaves out the last, partial batch
        measured = compared(SIZES, way.children, args.repeats) * batch if way.gradients else 0
        table = timetable(way.shares, way.children, (args.passes - measured) / epoch)
        split = (*way.overrides, *([f"--split.at={list(table.at)}"] if way.shares else ()),
                 *([f"--split.repeats={args.repeats}"] if way.gradients else ()))  # fmt: skip
        contestant = Contestant(name, base.recipe, (*base.overrides, SAME_SPACE, *split))
        for seed in args.seeds:
            folder = args.out / f"{slug(name)}-{seed}"
            job = Job(contestant, seed, strategy.passes(), table.epochs, table.trained * epoch, folder)
            plans.append(Plan(job, base, way, table, measured))
    return plans


# -- what came of it ----------------------------------------------------------------------------------------------------


def cells(table: Mapping[str, float], count: int, seed: int, path: Path) -> None:
    """``count`` random living cells of ``table``, as the list that ``nas rank`` reads; one that is there stays."""
    if path.is_file():
        return
    drawn = random.Random(seed).sample(sorted(text for text in table if legal(text)), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["cell"], *([text] for text in drawn)])


def seconds(folder: Path, batches: int, batch: int) -> float:
    """Of the training of all supernets in the run ``folder``, without readings and splits. ``batches`` of ``batch`` images are
    drawn a step."""
    total = 0.0
    for node in (folder, *sorted((folder / "nodes").glob("*"))):
        begin = 0
        if node != folder:
            above = node.name.rpartition(".")[0]
            said = json.loads(((folder / "nodes" / above if above else folder) / "split.json").read_text(encoding="utf-8"))
            begin = said["step"] if said["inherit"] == "all" else 0  # else its steps are counted anew
        for line in (node / "system.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            total += (row["step"] + 1 - begin) * batches * batch / row["system/images_per_s"]
            begin = row["step"] + 1
    return total


def splits(folder: Path) -> list[dict[str, Any]]:
    """Every split.json of the run ``folder``, the root's first, without the distances."""
    paths = [folder / "split.json", *sorted((folder / "nodes").glob("*/split.json"))]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return [{key: value for key, value in said.items() if key != "measured"} for said in found]


def ranked(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """Kendall's tau of the run on the common cells: {"value", "low", "high", ..}; made where it is not there yet."""
    folder = plan.job.folder
    path = folder / f"rank-{args.bn}" / "rank.json"
    if not path.is_file():
        shutil.rmtree(path.parent, ignore_errors=True)  # of a kill
        execute(["nas", "rank", str(folder), f"--truth={args.table}", f"--value={args.column}",
                 f"--archs={args.out / 'cells.csv'}", f"--bn={args.bn}", f"--bn-images={args.bn_images}",
                 f"--images={args.rank_images}", f"--out={path.parent}"],
                folder.with_suffix(".log"), args.threads)  # fmt: skip
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {key: found["rankers"]["prediction"][key] for key in ("kendall_tau", "tenth_kendall_tau")} | {"n": found["n"]}


def contend(plan: Plan, table: Mapping[str, float], args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """The row of a run, which is made where it is not there yet."""
    common = [f"--space.init_args.C={args.C}", f"--space.init_args.N={args.N}", f"--data.size={args.size}",
              f"--data.limit={args.limit}", "--evaluate.every=100000", "--evaluate.gap=false",
              f"--select.evaluations={args.evaluations}",
              f"--select.images={args.select_images}", f"--select.bn_images={args.bn_images}", *overrides]  # fmt: skip
    run(plan.job, common, args.threads)
    found, batch = splits(plan.job.folder), parse(
        search_parser(), read(find(plan.base.recipe)), [*plan.base.overrides, *HALVES, *overrides]).data.batch_size
    measuring, training = sum(said["seconds"] for said in found), seconds(plan.job.folder, plan.base.drawn, batch)
    images = sum(said["images"] for said in found)
    metric = read_arch(plan.job.folder / "arch.json").metrics["top1"]
    return looked_up(plan.job, table) | {
        "at": list(plan.table.at), "leaves": _leaves(plan.way), "split_images": images,
        "image_passes": plan.job.image_passes + images, "split_seconds": measuring, "train_seconds": training,
        "share": measuring / training, "splits": found, "top1": metric["value"], "images": metric["n"], **ranked(plan, args),
    }  # fmt: skip


def _leaves(way: Way) -> int:
    found = 1
    for n in way.children:
        found *= n
    return found


# -- report -------------------------------------------------------------------------------------------------------------


def by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["strategy"], []).append(row)
    return found


def markdown(figures: Mapping[str, Any]) -> str:
    """The rows as a table, seeds side by side."""
    heads = ["search", "leaves", "splits at, of epochs", "image-passes", "of them for splits", "seconds: splitting / training",
             "accuracy in the table, by seed", "mean", "place among all", "Kendall tau [90%], by seed", "mean"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for name, rows in by_name(figures["rows"]).items():
        at = ", ".join(map(str, rows[0]["at"])) or "-"
        lines.append([
            name, str(rows[0]["leaves"]), f"{at} of {rows[0]['epochs']}", ", ".join(f"{row['image_passes']:,}" for row in rows),
            ", ".join(f"{row['split_images']:,}" for row in rows),
            ", ".join(f"{row['split_seconds']:.0f} / {row['train_seconds']:.0f} = {row['share']:.1%}" for row in rows),
            ", ".join(f"{row['accuracy']:.2f}" for row in rows), f"{statistics.fmean(row['accuracy'] for row in rows):.2f}",
            ", ".join(f"{row['place']:,}" for row in rows), ", ".join(_interval(row["kendall_tau"]) for row in rows),
            f"{statistics.fmean(row['kendall_tau']['value'] for row in rows):.3f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(tau: Mapping[str, float]) -> str:
    return f"{tau['value']:.3f} [{tau['low']:.3f}, {tau['high']:.3f}]"


def picture(figures: Mapping[str, Any], path: Path) -> None:
    """Left what was picked, right tau with its interval; a row a search, a mark a seed."""
    groups = by_name(figures["rows"])
    names = list(groups)[::-1]
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, name in enumerate(names):
        for i, row in enumerate(groups[name]):
            place, tau = y + 0.16 * (i - (len(groups[name]) - 1) / 2), row["kendall_tau"]
            style: dict[str, Any] = {"color": RED if row["leaves"] > 1 else BLUE, "marker": "os^v"[i % 4]}
            ends = [[tau["value"] - tau["low"]], [tau["high"] - tau["value"]]]
            left.plot(row["accuracy"], place, **style)
            right.errorbar(tau["value"], place, xerr=ends, capsize=2, **style)
    space = figures["space"]
    left.axvline(space["median"], color="0.6", linewidth=1)
    left.text(space["median"], len(names) - 0.45, "median living cell", fontsize=7, ha="center")
    left.set_ylim(-0.6, len(names) - 0.2)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("accuracy of the picked cell in the table, %")
    right.set_xlabel(f"Kendall tau of {figures['cells']} cells, 90% interval")
    for axes in (left, right):
        axes.grid(axis="x", color="0.92")
    figure.savefig(path, dpi=130)


def compete(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything: the plan, the runs, the ranking, the figures; nothing but the plan with --estimate."""
    names = [c.name for c in chosen([Contestant(name, pair[0].recipe) for name, pair in PAIRS.items()], args.only)]
    plans = plan(names, args, overrides)
    for each in plans:
        total = each.job.image_passes + each.measured
        print(f"{each.job.contestant.name}, seed {each.job.seed}: splits at {list(each.table.at)} of {each.table.epochs} "
              f"epochs, {each.table.trained} epochs in all; {each.job.image_passes:,} + {each.measured:,} image-passes "
              f"({total / args.passes:.3f} of the budget)", flush=True)  # fmt: skip
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
    parser = argparse.ArgumentParser(prog="python -m nas.benchmarks.quality_splits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--table", type=Path, required=True, help="CSV with the accuracies of the whole space (NB201)")
    parser.add_argument("--column", default="CIFAR10TestAccuracy200Epochs", help="its column")
    parser.add_argument("--passes", type=int, default=250_000, help="image-passes a run")
    parser.add_argument("--images", type=int, default=5_000, help="in the training split, for counting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help=f"searches, by a part of their names: {'; '.join(PAIRS)}")
    parser.add_argument("--estimate", action="store_true", help="print what would run, and leave")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--repeats", type=int, default=5, help="batches over which distances are averaged (published: 100)")
    parser.add_argument("--C", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--N", type=int, default=1, help="cells a stage")
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--limit", type=int, default=10_000, help="training images, half of them held out")
    parser.add_argument("--evaluations", type=int, default=100, help="SPOS: cells that its searcher scores")
    parser.add_argument("--select-images", type=int, default=2_000, help="SPOS: held-out images that score a cell")
    parser.add_argument("--cells", type=int, default=200, help="random living cells that are ranked")
    parser.add_argument("--cells-seed", type=int, default=0, help="of their draw")
    parser.add_argument("--bn", default="recalibrated", help="how nas rank normalises: recalibrated or batch")
    parser.add_argument("--bn-images", type=int, default=500, help="training images that recalibrate batch norms")
    parser.add_argument("--rank-images", type=int, default=2_000, help="held-out images that rank a cell")
    parser.add_argument("--picture", type=Path, help="draw the figures there (.png)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args, overrides = parser.parse_known_args(argv)
    figures = compete(args, overrides)
    if figures:
        print(markdown(figures))
        if args.picture:
            picture(figures, args.picture)
        if args.json:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
