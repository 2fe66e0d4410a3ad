"""Searches compared at equal cost: ``python -m nas.benchmarks.quality cells|macro|widths``.

Cost is counted in image-passes: images of a batch times ``Strategy.passes()`` (forward and backward passes of one batch a
step), summed over the run; every strategy gets as many whole epochs as fit. Every run is a ``nas search`` of a shipped
recipe with overrides, in a process of its own, resumed where it was killed.

``cells``: NAS-Bench-201 skeleton; what is found is looked up in a table of the accuracies of all cells (--table), beside the
average cell of the space. ``macro``: the same on TangleNAS's conv-macro space. ``widths``: residual network under a MACs
budget; what is found is trained from scratch, all alike, beside the uniform and random widths of equal MACs.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from nas.cost import CostTable, macs, params
from nas.ranking.matching import match
from nas.ranking.tables import read_table
from nas.recipe import build, find, parse, read, search_parser
from search_spaces.arch import ArchFile, read_arch, space_of, write_arch
from search_spaces.space import Arch, SearchSpace

ARGS = "strategy.init_args"
HALVES = ("--data.valid_fraction=0.5", "--data.select_fraction=0")
"""The same images for everyone, whatever a recipe keeps aside for picks."""


class Contestant(NamedTuple):
    """A shipped recipe and what is set differently in it."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


CELLS = (
    Contestant("DARTS, first order", "darts-nb201-cifar10", (f"--{ARGS}.order=1",)),
    Contestant("DARTS, second order", "darts-nb201-cifar10", (f"--{ARGS}.order=2",)),
    Contestant("RARTS, Gauss-Seidel", "rarts-nb201-cifar10"),
    Contestant("RARTS, Jacobi", "rarts-nb201-cifar10", (f"--{ARGS}.mode=jacobi",)),
    Contestant("SNAS", "snas-nb201-cifar10"),
    Contestant("GDAS", "gdas-nb201-cifar10"),
    Contestant("RSPS", "rsps-nb201-cifar10"),
    Contestant("random search", "random-nb201-cifar10"),
)
MACRO = (
    Contestant("TangleNAS, softmax", "tangle-macro-cifar10", (f"--{ARGS}.mixing=softmax",)),
    Contestant("TangleNAS, Dirichlet", "tangle-macro-cifar10", (f"--{ARGS}.mixing=dirichlet",)),
    Contestant("SPOS sampling, random selection", "rsps-macro-cifar10"),
    Contestant("random search", "random-macro-cifar10"),
)
LOOKED_UP = {"cells": (CELLS, "CIFAR10TestAccuracy200Epochs"), "macro": (MACRO, "test_acc")}
"""Kinds whose results are looked up -> who takes part, the table's column."""
WIDTHS = (
    Contestant("TAS", "tas-resnet20-cifar10"),
    Contestant("DARTS, first order", "darts-resnet20-cifar10", (f"--{ARGS}.order=1",)),
    Contestant("DARTS, second order", "darts-resnet20-cifar10", (f"--{ARGS}.order=2",)),
    Contestant("RARTS, Gauss-Seidel", "rarts-resnet20-cifar10"),
)


class Job(NamedTuple):
    """One run: ``passes`` a step, ``epochs``, and the image-passes it really takes."""

    contestant: Contestant
    seed: int
    passes: float
    epochs: int
    image_passes: int
    folder: Path

    def command(self, overrides: Sequence[str]) -> list[str]:
        return ["nas", "search", self.contestant.recipe, *HALVES, *self.contestant.overrides, *overrides,
                f"--epochs={self.epochs}", f"--seed={self.seed}", "--resume=auto", f"--out={self.folder}"]  # fmt: skip


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).replace("--", "-")


def plan(contestants: Iterable[Contestant], seeds: Sequence[int], overrides: Sequence[str], budget: int, images: int,
         out: Path) -> list[Job]:  # fmt: skip
    """What to run: as many epochs over ``images`` training images as the ``budget`` of image-passes pays for."""
    jobs = []
    for contestant in contestants:
        words = [*contestant.overrides, *(word for word in overrides if word.startswith(("--strategy", "--data.batch_size")))]
        config = parse(search_parser(), read(find(contestant.recipe)), words)
        strategy, batch = build(config.strategy), config.data.batch_size
        cost = strategy.passes() * (images // batch * batch)  # an epoch leaves out the last, partial batch
        epochs = budget // cost if cost else 0
        if epochs < 1:
            raise SystemExit(f"{contestant.name}: {budget} image-passes are less than one epoch of {images} images.")
        for seed in seeds:
            folder = out / f"{slug(contestant.name)}-{seed}"
            jobs.append(Job(contestant, seed, strategy.passes(), epochs, epochs * cost, folder))
    return jobs


def execute(words: Sequence[str], log: Path, threads: int) -> None:
    """``nas ...`` in a process of its own, its output in ``log``. SystemExit where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, "-m", *words], stdout=file, stderr=file, env=environment, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}: see {log}")


def in_parallel(works: Sequence[Any], processes: int) -> list[Any]:
    """Calls every work, ``processes`` at a time; results in order."""
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda work: work(), works))


# -- looked up in a table -----------------------------------------------------------------------------------------------


def accuracies(path: Path, column: str, space: SearchSpace) -> dict[str, float]:
    """Text of an architecture -> its value in a file of a whole space. ValueError where it cannot be read."""
    table = read_table(str(path))
    table.require(column, "--column")
    _, known = match({"truth": table}, space, None, {"truth": column})
    return known["truth"].values


def looked_up(job: Job, table: Mapping[str, float]) -> dict[str, Any]:
    """What ``job`` found: its architecture, costs, accuracy in the table and place among all of them (1 is the best)."""
    file = read_arch(job.folder / "arch.json")
    text = space_of(file).text(file.arch)
    value = table[text]
    return {
        "strategy": job.contestant.name, "seed": job.seed, "passes_a_step": job.passes, "epochs": job.epochs,
        "image_passes": job.image_passes, "found": text, "macs": file.costs["macs"], "params": file.costs["params"],
        "accuracy": value, "place": 1 + sum(other > value for other in table.values()),
    }  # fmt: skip


def by_table(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Every search, and what the table says of its result; beside the mean of what random sampling draws from."""
    contestants, column = LOOKED_UP[args.kind]
    sizes = [f"--space.init_args.C={args.C}", f"--space.init_args.N={args.N}"] if args.kind == "cells" else []
    jobs = plan(chosen(contestants, args.only), args.seeds, overrides, args.passes, args.images, args.out)

    def search(job: Job) -> None:
        learns = args.alpha_lr is not None and "alphas" in read(find(job.contestant.recipe))["strategy"]["init_args"]
        run(job, [*([f"--{ARGS}.alphas.lr={args.alpha_lr}"] if learns else []), *sizes, *overrides], args.threads)

    in_parallel([lambda job=job: search(job) for job in jobs], args.processes)
    space = space_of(read_arch(jobs[0].folder / "arch.json"))
    table = accuracies(args.table, args.column or column, space)
    drawn = [value for text, value in table.items() if args.kind != "cells" or legal(text)]
    average = {"mean": statistics.fmean(drawn), "median": statistics.median(drawn), "std": statistics.pstdev(drawn),
               "best": max(table.values()), "networks": len(table), "drawn": len(drawn)}  # fmt: skip
    return {"rows": [looked_up(job, table) for job in jobs], "space": average}


def legal(text: str) -> bool:
    """Whether every node of a NAS-Bench-201 cell receives something: what random sampling draws from."""
    return all(any(not op.startswith("none~") for op in node.strip("|").split("|")) for node in text.split("+"))


def run(job: Job, overrides: Sequence[str], threads: int) -> None:
    if not (job.folder / "arch.json").is_file():
        execute(job.command(overrides), job.folder.with_suffix(".log"), threads)


# -- widths -------------------------------------------------------------------------------------------------------------


def widths(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Search, extract with fresh weights, train alone; then the uniform and random networks of the same budget."""
    target = f"{args.target}%"
    jobs = plan(chosen(WIDTHS, args.only), args.seeds, overrides, args.passes, args.images, args.out)

    def search(job: Job) -> dict[str, Any]:
        tas = job.contestant.recipe.startswith("tas")
        own = [f"--{ARGS}.{'target' if tas else 'budget.target'}={target}"]
        own += [f"--{ARGS}.{'alpha_lr' if tas else 'alphas.lr'}={0.02 if args.alpha_lr is None else args.alpha_lr}"]
        run(job, [*own, *overrides], args.threads)
        return alone(args, job.folder, "derived", job.folder / "alone", overrides, job.seed) | {
            "strategy": job.contestant.name, "seed": job.seed, "passes_a_step": job.passes, "epochs": job.epochs,
            "image_passes": job.image_passes}  # fmt: skip

    rows = in_parallel([lambda job=job: search(job) for job in jobs], args.processes)
    source = jobs[0].folder
    even = args.out / "uniform.json"
    write_arch(even, uniform(read_arch(source / "arch.json"), args.target / 100))
    others = [("uniform", str(even), seed) for seed in args.seeds]
    others += [("random", f"random:{seed}@{target}", seed) for seed in args.seeds]
    rows += in_parallel([
        lambda name=name, arch=arch, seed=seed: alone(args, source, arch, args.out / f"{name}-{seed}", overrides, seed)
        | {"strategy": f"{name} widths", "seed": seed} for name, arch, seed in others
    ], args.processes)  # fmt: skip
    return {"rows": rows, "target": args.target}


def alone(args: argparse.Namespace, source: Path, arch: str, out: Path, overrides: Sequence[str], seed: int) -> dict[str, Any]:
    """The network of ``arch`` trained from scratch for --alone epochs: costs and test accuracy."""
    log = out.with_suffix(".log")
    if not (out / "plain").is_dir():
        words = ["nas", "extract", str(source), f"--arch={arch}", "--from=scratch", f"--out={out / 'plain'}"]
        execute(words, log, args.threads)
    trained = out / "trained"
    if not (trained / "bundle").is_dir():
        kept = [word for word in overrides if word.startswith(("--data.", "--precision", "--channels_last"))]
        execute(["nas", "retrain", str(out / "plain"), *kept, "--data.valid_fraction=0", f"--epochs={args.alone}",
                 f"--seed={seed}", "--resume=auto", f"--out={trained}"], log, args.threads)  # fmt: skip
    file = read_arch(trained / "bundle" / "arch.json")
    return {"macs": file.costs["macs"], "params": file.costs["params"], "top1": file.metrics["top1"]["value"],
            "split": file.metrics["top1"]["split"], "n": file.metrics["top1"]["n"]}  # fmt: skip


def uniform(file: ArchFile, share: float) -> ArchFile:
    """Every width at the same place of its options, the place whose MACs come nearest to ``share`` of the largest's; the
    other choices as in the largest."""
    space = space_of(file)
    net = importlib.import_module("supernets." + space.name.partition(".")[0]).build(space, file.input[0], len(file.classes))
    costs = CostTable(net, tuple(file.input[1:]))  # type: ignore[arg-type]
    goal = share * costs.of(space.largest())
    arch = min(_even(space), key=lambda arch: abs(costs.of(arch) - goal))
    priced = {"macs": costs.priced(macs).of(arch), "params": costs.priced(params).of(arch)}
    return ArchFile.of(space, arch, input=file.input, classes=file.classes, preprocess=file.preprocess, costs=priced,
                       metrics={}, provenance={**file.provenance, "strategy": "uniform"})  # fmt: skip


def _even(space: SearchSpace) -> list[Arch]:
    most = max(len(choice.options) for choice in space.choices)
    return [{c.name: c.options[min(k, len(c.options) - 1)] if c.name.endswith("width") else c.options[-1]
             for c in space.choices} for k in range(most)]  # fmt: skip


# -- report -------------------------------------------------------------------------------------------------------------


def chosen(contestants: Sequence[Contestant], only: Sequence[str] | None) -> list[Contestant]:
    found = [c for c in contestants if not only or any(word.lower() in c.name.lower() for word in only)]
    if not found:
        raise SystemExit(f"--only {' '.join(only or ())} names nobody. Allowed: {', '.join(c.name for c in contestants)}.")
    return found


def markdown(kind: str, figures: Mapping[str, Any]) -> str:
    """The rows as a table, a strategy's seeds side by side."""
    lines = (["| strategy | image-passes | accuracy in the table, by seed | mean | place among all | MACs | found |",
              "|---|---|---|---|---|---|---|"] if kind in LOOKED_UP else
             ["| strategy | image-passes | test top-1 alone, by seed | mean | MACs |", "|---|---|---|---|---|"])  # fmt: skip
    names = list(dict.fromkeys(row["strategy"] for row in figures["rows"]))
    for name in names:
        rows = [row for row in figures["rows"] if row["strategy"] == name]
        scores = [row["accuracy"] if kind in LOOKED_UP else 100 * row["top1"] for row in rows]
        macs = ", ".join(f"{row['macs'] / 1e6:.2f} M" for row in rows)
        shown = [name, f"{rows[0].get('image_passes', 0):,}" if "image_passes" in rows[0] else "-",
                 ", ".join(f"{score:.2f}" for score in scores), f"{statistics.fmean(scores):.2f}"]  # fmt: skip
        if kind in LOOKED_UP:
            shown += [", ".join(f"{row['place']:,}" for row in rows), macs, " ".join(f"`{row['found']}`" for row in rows)]
        else:
            shown.append(macs)
        lines.append("| " + " | ".join(text.replace("|", "\\|") if "`" in text else text for text in shown) + " |")
    return "\n".join(lines)


def picture(kind: str, figures: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every run, a row a strategy; where it was looked up, beside the mean and spread of the space."""
    names = list(dict.fromkeys(row["strategy"] for row in figures["rows"]))[::-1]
    figure = Figure(figsize=(7.5, 1.2 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row in figures["rows"]:
        score = row["accuracy"] if kind in LOOKED_UP else 100 * row["top1"]
        axes.plot(score, names.index(row["strategy"]), "o", color="C0", alpha=0.8)
    if kind in LOOKED_UP:
        space = figures["space"]
        axes.axvspan(space["mean"] - space["std"], space["mean"] + space["std"], color="0.92")
        for value, text in ((space["mean"], "mean +- std of the space"), (space["best"], "best")):
            axes.axvline(value, color="0.6", linewidth=1)
            axes.text(value, len(names) - 0.4, text, fontsize=7, ha="right" if text == "best" else "center")
    axes.set_ylim(-0.6, len(names) - 0.1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("accuracy of what was found in the table, %" if kind in LOOKED_UP else "test top-1 of the found network, %")
    figure.savefig(path, dpi=130)


# -- command line -------------------------------------------------------------------------------------------------------


def program(
    parser: argparse.ArgumentParser, compete: Callable[[argparse.Namespace, list[str]], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str], picture: Callable[[dict[str, Any], Path], None], argv: Sequence[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """The end of a comparison's command line: what ``compete`` makes of the options and of the recipe overrides behind them is
    printed, and drawn and written where that is asked for. Nothing where there are no figures (--estimate)."""
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


def command_line(module: str, doc: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """The options of every comparison. ``names``: of the contestants."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", help=f"contestants, by a part of their names: {'; '.join(names)}")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    return parser


def _compared(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    if args.kind in LOOKED_UP and args.table is None:
        raise SystemExit(f"{args.kind} needs --table: a CSV with the accuracies of the whole space")
    return {"kind": args.kind, "passes": args.passes, "overrides": overrides,
            **(by_table if args.kind in LOOKED_UP else widths)(args, overrides)}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = command_line("nas.benchmarks.quality", __doc__, (c.name for c in (*CELLS, *MACRO, *WIDTHS)))
    parser.add_argument("kind", choices=(*LOOKED_UP, "widths"))
    parser.add_argument("--passes", type=int, default=250_000, help="image-passes a run")
    parser.add_argument("--images", type=int, default=5_000, help="in the training split, for counting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", type=Path, help="cells, macro: CSV with the accuracies of the whole space")
    parser.add_argument("--column", help="cells, macro: its column")
    parser.add_argument("--C", type=int, default=8, help="cells: channels of the first stage")
    parser.add_argument("--N", type=int, default=1, help="cells: cells a stage")
    parser.add_argument("--target", type=float, default=50.0, help="widths: budget, %% of the MACs of the largest")
    parser.add_argument("--alpha-lr", type=float, help="Adam's rate on the alphas (widths: 0.02; else as in the recipes)")
    parser.add_argument("--alone", type=int, default=20, help="widths: epochs of training from scratch")
    return program(parser, _compared, lambda found: markdown(found["kind"], found),
                   lambda found, path: picture(found["kind"], found, path), argv)  # fmt: skip


if __name__ == "__main__":
    main()
