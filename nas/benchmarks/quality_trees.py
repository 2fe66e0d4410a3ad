"""Runs of one supernet or of several at equal cost: what the comparisons with splits share (quality_splits, quality_ranking).

Cost is counted in image-passes (``nas.benchmarks.quality``) of all supernets together, the measuring of distances included: a
path from the root to a leaf gets the whole epochs, split at about the shares of it that are asked for, whose total comes
nearest to the budget. Every run is a ``nas search`` of a shipped recipe, read by ``nas rank``.
"""
from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nas.benchmarks.quality import Contestant, Job, chosen, execute, slug
from nas.benchmarks.quality import command_line as program_options
from nas.recipe import build, find, parse, read, search_parser
from nas.splits.show import BLUE, RED
from nas.strategies.fairnas import FairNAS, options

NEAR = 0.03  # a total this near to the budget is as good as any: the shares of the splits decide
EXHAUSTIVE = "--split.by=exhaustive"


class Base(NamedTuple):
    """A strategy to split. ``drawn``: batches that a step of it draws. ``unpaid``: passes of a step that the strategy does not
    count (a forward pass is a third of one)."""

    name: str
    recipe: str
    drawn: int
    overrides: tuple[str, ...]
    unpaid: float = 0.0


class Way(NamedTuple):
    """How supernets become several. ``shares``: of the path, where each level splits. ``children``: of each split."""

    name: str
    shares: tuple[float, ...] = ()
    children: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def gradients(self) -> bool:
        return bool(self.shares) and EXHAUSTIVE not in self.overrides

    @property
    def leaves(self) -> int:
        return math.prod(self.children)


Pairs = Mapping[str, tuple[Base, Way]]
"""Who takes part, by name."""


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


def plan(
    pairs: Pairs, sizes: Sequence[int], args: argparse.Namespace, overrides: Sequence[str], own: Sequence[str] = ()
) -> list[Plan]:
    """The runs of ``pairs``, all seeds of one after another. ``sizes``: options of every choice. ``own``: overrides of all
    recipes that come before what splits them; ``overrides``: those of the command line, which ``contend`` gives."""
    plans = []
    for name, (base, way) in pairs.items():
        words = (*base.overrides, *(word for word in overrides if word.startswith(("--strategy", "--data.batch_size"))))
        config = parse(search_parser(), read(find(base.recipe)), words)
        strategy, batch = build(config.strategy), config.data.batch_size
        fair = isinstance(strategy, FairNAS)  # which knows its passes only when it has a space
        passes = options(build(config.space)) * strategy.weights.accumulate if fair else strategy.passes()
        passes += base.unpaid
        epoch = passes * (args.images // batch * batch)  # leaves out the last, partial batch
        measured = compared(sizes, way.children, args.repeats) * batch if way.gradients else 0
        table = timetable(way.shares, way.children, (args.passes - measured) / epoch)
        split = (*way.overrides, *([f"--split.at={list(table.at)}"] if way.shares else ()),
                 *([f"--split.repeats={args.repeats}"] if way.gradients else ()))  # fmt: skip
        contestant = Contestant(name, base.recipe, (*base.overrides, *own, *split))
        for seed in args.seeds:
            folder = args.out / f"{slug(name)}-{seed}"
            job = Job(contestant, seed, passes, table.epochs, round(table.trained * epoch), folder)
            plans.append(Plan(job, base, way, table, measured))
    return plans


def wanted(pairs: Pairs, only: Sequence[str] | None) -> dict[str, tuple[Base, Way]]:
    """Those whose names hold one of the words ``only``."""
    return {c.name: pairs[c.name] for c in chosen([Contestant(name, pair[0].recipe) for name, pair in pairs.items()], only)}


def say(plans: Iterable[Plan], budget: int) -> None:
    """Prints what would run."""
    for each in plans:
        total = each.job.image_passes + each.measured
        print(f"{each.job.contestant.name}, seed {each.job.seed}: splits at {list(each.table.at)} of {each.table.epochs} "
              f"epochs, {each.table.trained} epochs in all; {each.job.image_passes:,} + {each.measured:,} image-passes "
              f"({total / budget:.3f} of the budget)", flush=True)  # fmt: skip


def command_line(module: str, doc: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """The options of comparisons of trees. ``names``: of who takes part."""
    parser = program_options(module, doc, names)
    parser.add_argument("--table", type=Path, required=True, help="accuracies of the whole space")
    parser.add_argument("--column", help="its column")
    parser.add_argument("--passes", type=int, help="image-passes a run")
    parser.add_argument("--images", type=int, help="in the training split, for counting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--estimate", action="store_true", help="print what would run, and leave")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--repeats", type=int, help="batches over which distances are averaged (published: 100)")
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--bn", help="how nas rank normalises: recalibrated or batch")
    parser.add_argument("--bn-images", type=int, default=500, help="training images that recalibrate batch norms")
    parser.add_argument("--rank-images", type=int, default=2_000, help="held-out images that rank an architecture")
    return parser


# -- what came of it ----------------------------------------------------------------------------------------------------


def sample(texts: Iterable[str], count: int, seed: int, path: Path, head: str) -> None:
    """``count`` random ones of ``texts`` as the list that ``nas rank`` reads, in a column ``head``; one that is there stays."""
    if path.is_file():
        return
    drawn = random.Random(seed).sample(sorted(texts), count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[head], *([text] for text in drawn)])


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


def ranked(job: Job, truth: Sequence[str], archs: str | Path, args: argparse.Namespace) -> Path:
    """The rank.json of a run on ``archs`` (a file, or all), made where it is not there yet. ``truth``: what is said of the
    table."""
    path = job.folder / f"rank-{args.bn}" / "rank.json"
    if not path.is_file():
        shutil.rmtree(path.parent, ignore_errors=True)  # of a kill
        execute(["nas", "rank", str(job.folder), *truth, f"--archs={archs}", f"--bn={args.bn}", f"--bn-images={args.bn_images}",
                 f"--images={args.rank_images}", f"--out={path.parent}"],
                job.folder.with_suffix(".log"), args.threads)  # fmt: skip
    return path


def spent(plan: Plan, batch: int) -> dict[str, Any]:
    """What the finished run of ``plan`` took, its splits apart."""
    found, training = splits(plan.job.folder), seconds(plan.job.folder, plan.base.drawn, batch)
    measuring, images = sum(said["seconds"] for said in found), sum(said["images"] for said in found)
    return {"at": list(plan.table.at), "leaves": plan.way.leaves, "split_images": images,
            "image_passes": plan.job.image_passes + images, "split_seconds": measuring, "train_seconds": training,
            "share": measuring / training, "splits": found}  # fmt: skip


# -- report -------------------------------------------------------------------------------------------------------------


def by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["strategy"], []).append(row)
    return found


def table_of(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def interval(tau: Mapping[str, Any]) -> str:
    """With its ends, where it has some; a statistic that is not there is a dash."""
    if None in (tau["value"], tau["low"], tau["high"]):
        return "-" if tau["value"] is None else f"{tau['value']:.3f}"
    return f"{tau['value']:.3f} [{tau['low']:.3f}, {tau['high']:.3f}]"


def side_by_side(
    figures: Mapping[str, Any], path: Path, labels: tuple[str, str], further: Callable[[Axes, Axes, float], None]
) -> None:
    """Left what was picked, right tau with its interval; a row a search, a mark a seed. ``further``: what is drawn behind
    them, up to a height."""
    groups = by_name(figures["rows"])
    names = list(groups)[::-1]
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, name in enumerate(names):
        for i, row in enumerate(groups[name]):
            place, tau = y + 0.16 * (i - (len(groups[name]) - 1) / 2), row["kendall_tau"]
            style: dict[str, Any] = {"color": RED if row["leaves"] > 1 else BLUE, "marker": "os^v"[i % 4]}
            left.plot(row["accuracy"], place, **style)
            if None not in (tau["value"], tau["low"], tau["high"]):
                right.plot([tau["low"], tau["high"]], [place, place], "|-", color=style["color"])
                right.plot(tau["value"], place, **style)
    further(left, right, len(names) - 0.45)
    left.set_ylim(-0.6, len(names) - 0.2)
    left.set_yticks(range(len(names)), names)
    for axes, label in zip((left, right), labels):
        axes.set_xlabel(label)
        axes.grid(axis="x", color="0.92")
    figure.savefig(path, dpi=130)


def marked(axes: Axes, value: float, height: float, text: str) -> None:
    """A line across all rows, and what it is."""
    axes.axvline(value, color="0.6", linewidth=1)
    axes.text(value, height, text, fontsize=7, ha="center")
