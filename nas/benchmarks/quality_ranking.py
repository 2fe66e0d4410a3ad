"""Rankings at equal cost: ``python -m nas.benchmarks.quality_ranking --space macro --out runs/rank --table FILE``.

``macro``: NAS-Bench-Macro by SPOS, FairNAS, PA&DA, each of its halves, and PA&DA on the supernets of two splits in two by
gradient matching. ``pooling``: where a ResNet-20 pools, by one supernet (SPOS), by few-shot NAS (four children, of nine
neighbouring placements each) and by balanced mixtures of two and of four supernets. Every run of a space gets as many
image-passes (nas/benchmarks/quality_trees.py), in whole epochs of the same --images training images, with the same batches,
rate and decay. The forward pass that rewards a supernet of a mixture counts as a third of a pass.

Then ``nas rank`` reads the same architectures of every run (macro: --archs random ones of the networks that differ; pooling:
all) on --rank-images held-out images, normalised by the batch, of the size of training, and ranks them by the table; beside
it rank MACs and parameters. Rewards come from as many images again, which are never ranked on. No searcher picks. Runs are
resumed where they were killed. What follows the options (--data.root=...) overrides the recipes.
"""
from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nas.benchmarks import quality_trees as trees
from nas.benchmarks.quality import ARGS, accuracies, in_parallel, program, run
from nas.benchmarks.quality_ranking_report import markdown, picture
from nas.benchmarks.quality_trees import EXHAUSTIVE, Base, Pairs, Plan, Way, ranked, spent, wanted
from nas.ranking.report import plain
from nas.ranking.statistics import differences
from nas.recipe import build, find, parse, read, search_parser
from search_spaces.pooling import POOLING, PoolingResNet
from search_spaces.space import SearchSpace

BATCH = 80  # divides 10,000 and 2,000 images, and 150,000 image-passes are whole epochs
STATISTICS = ("kendall_tau", "spearman", "tenth_kendall_tau", "tenth_overlap", "tenth_regret")
ARCHS = "archs.csv"


class Contest(NamedTuple):
    """One space: who takes part, the first being whom the others are compared with; the table's ``column``; ``own``, overrides
    of all recipes; ``rewards``, whether images are held out for rewards too."""

    pairs: Pairs
    column: str
    own: tuple[str, ...]
    rewards: bool

    def space(self, overrides: Sequence[str]) -> SearchSpace:
        base, _ = next(iter(self.pairs.values()))
        return build(parse(search_parser(), read(find(base.recipe)), _about(overrides, "--space")).space)


def trained_by(*words: str) -> tuple[str, ...]:
    return tuple(f"--{ARGS}.weights.{word}" for word in (*words, "momentum=0.9", "nesterov=false", "per_epoch=false"))


def single(recipe: str, *overrides: str, drawn: int = 1, unpaid: float = 0.0) -> tuple[Base, Way]:
    return Base(recipe, recipe, drawn, overrides, unpaid), Way("one-shot")


def neighbours(options: Sequence[Any], groups: int) -> list[list[Any]]:
    """``options`` in ``groups`` of equal size, as far as that goes, in their order."""
    return [part.tolist() for part in np.array_split(np.array(options), groups)]


PADA = "pada-nasbenchmacro-cifar10"
MACRO = Contest(
    {
        "SPOS": single("spos-nasbenchmacro-cifar10"),
        "FairNAS": single("fairnas-nasbenchmacro-cifar10"),
        "PA&DA": single(PADA),
        "PA&DA, paths alone": single(PADA, f"--{ARGS}.data=false"),
        "PA&DA, data alone": single(PADA, f"--{ARGS}.path=false"),
        "GM + PA&DA": (Base("GM + PA&DA", f"gm-{PADA}", 1, ()), Way("GM", (0.25, 0.5), (2, 2))),
    },
    "mean_acc", trained_by("lr=0.028", "lr_min=0", "weight_decay=2.5e-4", "clip=5"), rewards=False,
)  # fmt: skip
"""PA-DA's rate of 0.05 at 256 images, by the square root of the batch's share; its decay and clip."""
GROUPS = 4  # of the placements of poolings, in their order
FEW_SHOT = (EXHAUSTIVE, f"--split.choices=[{POOLING}]", "--split.inherit=weights",
            f"--split.parts={json.dumps([neighbours(PoolingResNet()[POOLING].options, GROUPS)])}")  # fmt: skip
ONE_SHOT, MIXTURE = "spos-pooling-cifar10", "mixture-pooling-cifar10"
FORWARD = 1 / 3  # of a pass: that which rewards a supernet
POOLINGS = Contest(
    {
        "one-shot (SPOS)": single(ONE_SHOT),
        "few-shot": (Base("few-shot", ONE_SHOT, 1, ()), Way("exhaustive", (2 / 3,), (GROUPS,), FEW_SHOT)),
        "mixture, M = 2": single(MIXTURE, f"--{ARGS}.models=2", drawn=2, unpaid=FORWARD),
        "mixture, M = 4": single(MIXTURE, f"--{ARGS}.models=4", drawn=2, unpaid=FORWARD),
    },
    "baseline_avg", trained_by("lr=0.08", "lr_min=0.001", "weight_decay=0", "clip=null"), rewards=True,
)  # fmt: skip
"""The mixture's published rate of 0.1 at 128 images, by the square root of the batch's share; its decay, no clip."""
SPACES = {"macro": MACRO, "pooling": POOLINGS}


def plan(contest: Contest, args: argparse.Namespace, overrides: Sequence[str]) -> list[Plan]:
    """The runs of those whom --only names, all seeds of one after another."""
    own = (*contest.own, *images(contest, args), f"--data.batch_size={args.batch}", f"--data.size={args.size}")
    if args.width is not None:
        own = (*own, f"--space.init_args.width={args.width}")
    counted = (*own, *overrides)  # the batch counts, and the models of a mixture
    sizes = [len(choice.options) for choice in contest.space(counted).choices]
    return trees.plan(wanted(contest.pairs, args.only), sizes, args, counted, own)


def images(contest: Contest, args: argparse.Namespace) -> tuple[str, ...]:
    """--images to train, --rank-images to rank and, for rewards, as many again."""
    held, parts = args.rank_images, 2 if contest.rewards else 1
    whole = args.images + parts * held
    share = held / whole
    return (f"--data.limit={whole}", f"--data.valid_fraction={share}", f"--data.select_fraction={share if parts == 2 else 0}")


def _about(overrides: Sequence[str], *starts: str) -> list[str]:
    return [word for word in overrides if word.startswith(starts)]


# -- runs ---------------------------------------------------------------------------------------------------------------


def contend(plan: Plan, archs: str | Path, args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """The row of a run, which is made where it is not there yet."""
    common = ["--searcher=null", "--evaluate.every=100000", "--evaluate.gap=false", f"--evaluate.images={args.batch}",
              f"--evaluate.bn_images={args.batch}", *overrides]  # fmt: skip
    run(plan.job, common, args.threads)
    said, lines = _rank(ranked(plan.job, (f"--truth={args.table}", f"--value={args.column}"), archs, args))
    p, t = (np.array([float(line[name]) for line in lines]) for name in ("prediction", "truth"))
    best = p == p.max()
    about = {"strategy": plan.job.contestant.name, "seed": plan.job.seed, "passes_a_step": plan.job.passes,
             "epochs": plan.job.epochs, "found": [line["text"] for line, first in zip(lines, best) if first]}  # fmt: skip
    return about | spent(plan, args.batch) | {key: said["rankers"]["prediction"][key] for key in STATISTICS} | {
        "read": said["predictions"], "n": said["n"], "accuracy": float(t[best].mean()),
        "place": 1 + int((t > t[best].mean()).sum()), "predictions": {line["text"]: x for line, x in zip(lines, p.tolist())},
        "seed_of_intervals": said["seed"],
    }  # fmt: skip


def trivial(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """How MACs and parameters rank what was ranked in ``folder``, with what the dearest has in the table; and the truths."""
    said, lines = _rank(folder / "rank.json")
    t, found = np.array([float(line["truth"]) for line in lines]), {}
    for name in ("macs", "params"):
        cost = np.array([float(line[name]) for line in lines])
        found[name] = {key: said["rankers"][name][key] for key in STATISTICS}
        found[name]["accuracy"] = float(t[cost == cost.max()].mean())
    return found, {line["text"]: float(line["truth"]) for line in lines}


def _rank(path: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """What ``nas rank`` wrote: rank.json, and the rows of rank.csv beside it."""
    with path.with_name("rank.csv").open(encoding="utf-8", newline="") as file:
        return json.loads(path.read_text(encoding="utf-8")), list(csv.DictReader(file))


def against(rows: Sequence[dict[str, Any]], truth: Mapping[str, float], base: str) -> None:
    """Adds "gain" to every row but those of ``base``: tau less that of ``base`` with the same seed, on the same resamples."""
    t = np.array(list(truth.values()))
    for row in rows:
        rival = next((other for other in rows if (other["strategy"], other["seed"]) == (base, row["seed"])), None)
        if rival is not None and rival is not row:
            both = {key: np.array([one["predictions"][text] for text in truth]) for key, one in (("a", row), ("b", rival))}
            row["gain"] = plain(differences(both, t, seed=row["seed_of_intervals"])["a", "b"])


def compete(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything: the plan, the runs, the ranking, the figures; nothing but the plan with --estimate."""
    contest = SPACES[args.space]
    args.column = args.column or contest.column
    plans = plan(contest, args, overrides)
    trees.say(plans, args.passes)
    if args.estimate:
        return {}
    space = contest.space(overrides)
    table = accuracies(args.table, args.column, space)
    if args.archs:
        distinct = {space.key(space.parse(text)): text for text in sorted(table)}
        trees.sample(distinct.values(), args.archs, args.archs_seed, args.out / ARCHS, "text")
    archs = args.out / ARCHS if args.archs else "all"
    rows = in_parallel([lambda each=each: contend(each, archs, args, overrides) for each in plans], args.jobs)
    costs, truth = trivial(plans[0].job.folder / f"rank-{args.bn}")
    base = next(iter(contest.pairs))
    against(rows, truth, base)
    asked = ("passes", "images", "rank_images", "size", "width", "batch", "repeats", "bn")
    return {"kind": args.space, **{name: getattr(args, name) for name in asked}, "base": base, "overrides": list(overrides),
            "rows": rows, "trivial": costs, "truth": truth,
            "space": {"mean": statistics.fmean(truth.values()), "best": max(truth.values()),
                      "networks": len(table)}}  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    names = [name for contest in SPACES.values() for name in contest.pairs]
    parser = trees.command_line("nas.benchmarks.quality_ranking", __doc__, names)
    parser.set_defaults(passes=150_000, images=10_000, repeats=3, bn="batch")
    parser.add_argument("--space", choices=SPACES, default="macro")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a batch")
    parser.add_argument("--width", type=float, help="macro: multiplier of the widths; default: as published")
    parser.add_argument("--archs", type=int, help="random architectures that are ranked, 0: all (macro: 200, pooling: all)")
    parser.add_argument("--archs-seed", type=int, default=0, help="of their draw")

    def asked(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
        if args.archs is None:
            args.archs = 200 if args.space == "macro" else 0
        return compete(args, overrides)

    return program(parser, asked, markdown, picture, argv)


if __name__ == "__main__":
    main()
