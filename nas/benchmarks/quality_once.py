"""Once for all at equal cost: ``python -m nas.benchmarks.quality_once --out runs/once``.

DepS (with its ramp and without), BigNAS, OFA and CompOFA train the DepS paper's 32x32 form of OFA-MobileNetV3, all with 7x7
kernels (OFA then has no kernel phase), narrower and on smaller images. Cost is MACs x images summed over backward passes
(nas/benchmarks/quality_once_run.py); every method gets the number of whole epochs whose cost comes nearest to --budget, its
phases and schedule stretched to them. Its passes are drawn beforehand on a net that computes nothing, which prices them. All
train alike (``EQUAL``); the rest is as in the recipes: dropout, BigNAS's zero start of the last scales, the phases of OFA and
the ratios of their rates.

The networks are the six of the paper's plots (page deps.md, section 5) and (expand 4, depth 3), the third that CompOFA couples
and trains; of the six it trains the first and the last, and the others are read all the same. They are read on the official
test images, which choose nothing here. --alone trains three networks of the best supernet from scratch.

Runs are resumed where they were killed. What follows the options (--data.root=..., --data.batch_size=64) overrides the recipes.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nas.benchmarks.quality import ARGS, Contestant, chosen, command_line, execute, in_parallel, program, slug
from nas.benchmarks.quality_once_alone import alone
from nas.benchmarks.quality_once_report import markdown, picture, summary
from nas.benchmarks.quality_once_run import CURVE, Contest, Meter
from nas.build import Built, assemble
from nas.engine import moment
from nas.protocols import Batch, Setup
from nas.recipe import build, find, parse, read, search_parser
from search_spaces.mobilenet import UNIFORM, OFAMobileNetV3
from search_spaces.space import Arch, SearchSpace

DELAY = (f"--{ARGS}.delay=50%",)  # of the page: about half of the run, ramp 5 of 200 epochs
RAMP = (f"--{ARGS}.ramp=2.5%",)
EQUAL = tuple(f"--{ARGS}.weights.{word}" for word in (
    "optimizer=sgd", "lr=0.1", "lr_min=0", "momentum=0.9", "nesterov=true", "weight_decay=3e-5", "norm_decay=false",
    "schedule=cosine", "warmup_epochs=0", "per_epoch=false", "clip=null", "idle=skip"))  # fmt: skip
"""How everyone trains: that of deps-mbv3-cifar10. Phases of OFA keep their own ratios of the rate."""
ONCE = (
    Contestant("DepS", "deps-mbv3-cifar10", (*DELAY, *RAMP)),
    Contestant("DepS, no ramp", "deps-mbv3-cifar10", (*DELAY, f"--{ARGS}.ramp=0")),
    Contestant("BigNAS", "bignas-mbv3-cifar10"),
    Contestant("OFA", "ofa-mbv3-cifar10"),
    Contestant("CompOFA", "compofa-mbv3-cifar10"),
)
COMPOUND = ((3, 2), (4, 3), (6, 4))  # (expand, depth) of CompOFA's uniform networks
DENSE = 4  # readings of the largest network an epoch, around the switch of DepS
REHEARSED = 12  # steps that stand for an epoch where passes are priced


class Price(NamedTuple):
    """MACs x images that a run is expected to take; ``switch``: the epoch at which children enter, where there is one."""

    trained: float
    forward_only: float
    switch: float | None


class Plan(NamedTuple):
    """One run. ``words``: all overrides of its recipe, with ``epochs`` and ``seed``."""

    contestant: Contestant
    seed: int
    epochs: int
    price: Price
    words: tuple[str, ...]
    folder: Path


def label(expand: int, depth: int) -> str:
    return f"e{expand} d{depth}"


def nets(space: SearchSpace) -> dict[str, Arch]:
    """The uniform networks that are read, smallest first, with the largest kernel that the space has."""
    assert isinstance(space, OFAMobileNetV3)
    kernel = max(space.stages[0].kernels)
    pairs = sorted({*UNIFORM, *COMPOUND}, key=lambda pair: pair[0] * pair[1] + pair[1] / 10)
    return {label(e, d): space.arch_of(kernel, e, d) for e, d in pairs}


# -- equal cost ---------------------------------------------------------------------------------------------------------


class Shadow(nn.Module):
    """A supernet that computes nothing: logits are one bias. What a strategy does with it costs almost no time."""

    def __init__(self, built: Built) -> None:
        super().__init__()
        self.space = built.space
        self.bias = nn.Parameter(torch.zeros(len(built.data.classes)))

    def forward(self, x: Tensor, arch: Mapping[str, Any], drop: float = 0.0) -> Tensor:
        return self.bias.expand(len(x), -1)

    def sort_channels(self, trained: Any = None) -> list[Any]:
        return []


def priced(built: Built, strategy: Any, epochs: int, seed: int) -> Price:
    """What ``strategy`` is expected to spend in ``epochs``: each is rehearsed in a few steps, with the architectures that it
    draws."""
    net = Shadow(built)
    meter = Meter(net, built.costs.of)
    steps = min(REHEARSED, built.setup.epoch_steps)
    batch = Batch(torch.zeros(1, *built.data.shape), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def draw(split: str, size: int | None = None, odds: Any = None) -> Batch:
        return batch

    strategy.start(Setup(net, built.space, built.costs, built.loss, None, epochs * steps, steps, built.setup.images))
    for step in range(epochs * steps):
        strategy.update(draw, moment(step, epochs * steps, steps, seed))
    whole = built.setup.epoch_steps / steps * built.data.batch_size
    switch = vars(strategy)["switch"] / steps if "switch" in vars(strategy) else None
    return Price(meter.trained * whole, meter.forward_only * whole, switch)


def nearest(cost: Callable[[int], float], budget: float, least: int) -> int:
    """The number of epochs, ``least`` or more, whose cost comes nearest to ``budget``; cost grows with them."""
    epochs = max(least, 10)
    for _ in range(4):
        epochs, before = max(least, round(epochs * budget / cost(epochs))), epochs
        if epochs == before:
            break
    return min(range(max(least, epochs - 1), epochs + 2), key=lambda n: abs(cost(n) - budget))


def plan(
    contestant: Contestant, seeds: Sequence[int], overrides: Sequence[str], budget: float, out: Path
) -> tuple[list[Plan], Built]:
    """The runs of one contestant, and its parts."""
    common = [*contestant.overrides, *overrides]
    config = parse(search_parser(), read(find(contestant.recipe)), common)
    built = assemble(config)
    found: dict[int, Price] = {}

    def cost(epochs: int) -> float:
        if epochs not in found:
            found[epochs] = priced(built, build(config.strategy), epochs, seeds[0])
        return found[epochs].trained

    phases = vars(built.strategy).get("phases") or ()
    epochs = nearest(cost, budget, max(2, len(phases)))
    return [Plan(contestant, seed, epochs, found[epochs], (*common, f"--epochs={epochs}", f"--seed={seed}"),
                 out / f"{slug(contestant.name)}-{seed}") for seed in seeds], built  # fmt: skip


# -- time ---------------------------------------------------------------------------------------------------------------


def seconds_per_mac(built: Built, archs: Sequence[Arch]) -> float:
    """Of forward and backward for a batch, over MACs x images: measured on ``archs``, with the threads of this process."""
    batch = next(iter(built.data.batches("train", built.device)))
    spent, macs = 0.0, 0.0
    built.net.train()
    for arch in archs:
        for turn in range(3):
            began = time.process_time()
            built.loss(built.net(batch.x, arch), batch.y).backward()
            if turn:  # not the first
                spent += time.process_time() - began
                macs += built.costs.of(arch) * len(batch.x)
        built.net.zero_grad(set_to_none=True)
    return spent / macs


def minutes(plan: Plan, built: Built, rate: float, args: argparse.Namespace) -> float:
    """That a run may take: its passes and its readings; a forward pass counts a third."""
    read = sum(float(built.costs.of(arch)) for arch in nets(built.space.root).values())
    images = (args.readings + 1) * (args.images + args.bn_images) + built.data.count("test")
    return rate * (plan.price.trained + plan.price.forward_only / 3 + read * images / 3) / 60


# -- runs ---------------------------------------------------------------------------------------------------------------


def run(plan: Plan, built: Built, args: argparse.Namespace) -> dict[str, Any]:
    """The curve of a run, made where it is not there yet."""
    archs, switch, steps = nets(built.space.root), plan.price.switch, built.setup.epoch_steps
    around = () if switch is None else range(-DENSE, 2 * DENSE + 1)
    watched = tuple(round((switch + part / DENSE) * steps) for part in around if switch and switch + part / DENSE > 0)
    contest = Contest(plan.contestant.name, plan.contestant.recipe, plan.words, str(plan.folder), archs, list(archs)[-1],
                      args.budget / args.readings, watched, args.images, args.bn_images)  # fmt: skip
    if not (plan.folder / CURVE).is_file():
        told = plan.folder.with_suffix(".json")
        told.parent.mkdir(parents=True, exist_ok=True)
        contest.write(told)
        execute(["nas.benchmarks.quality_once_run", str(told)], plan.folder.with_suffix(".log"), args.threads)
    return json.loads((plan.folder / CURVE).read_text(encoding="utf-8"))


def three(curve: Mapping[str, Any]) -> list[str]:
    """The smallest, a middle and the largest of the six networks."""
    six = sorted((label(*pair) for pair in UNIFORM), key=curve["macs"].__getitem__)
    return [six[0], six[len(six) // 2], six[-1]]


def compete(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything: the plan and its estimate, the runs, the networks trained alone, what follows."""
    common = [*EQUAL, "--data.valid_fraction=0", "--data.select_fraction=0", f"--data.size={args.size}", "--restrict={}",
              f"--space.init_args.width={args.width}", f"--space.init_args.kernels=[{args.kernel}]",
              *([f"--data.limit={args.limit}"] if args.limit else []), *overrides]  # fmt: skip
    planned = [plan(contestant, args.seeds, common, args.budget, args.out) for contestant in chosen(ONCE, args.only)]
    plans = [(each, built) for seeded, built in planned for each in seeded]
    torch.set_num_threads(args.threads)
    ends = nets(plans[0][1].space.root)
    full = list(ends)[-1]
    rate = seconds_per_mac(plans[0][1], [ends[full], next(iter(ends.values()))])
    times = [minutes(each, built, rate, args) for each, built in plans]
    for (each, _), time_ in zip(plans, times):
        print(f"{each.contestant.name}, seed {each.seed}: {each.epochs} epochs, {each.price.trained:.3g} MACs x images "
              f"({each.price.trained / args.budget:.2f} of the budget), about {time_:.0f} min", flush=True)  # fmt: skip
    print(f"about {sum(times) / args.jobs:.0f} min in {args.jobs} processes", flush=True)
    if args.estimate:
        return {}
    curves = in_parallel([lambda each=each, built=built: run(each, built, args) for each, built in plans], args.jobs)
    groups = {"the six": [label(*pair) for pair in UNIFORM], "CompOFA's three": [label(*pair) for pair in COMPOUND]}
    switches = {each.contestant.name: each.price.switch for each, _ in plans if each.price.switch is not None}
    rows = summary(curves, groups, full, switches)
    figures = {"kind": "once", "budget": args.budget, "overrides": list(overrides), "images": args.images, "full": full,
               "groups": groups, "switches": switches, "rows": rows, "curves": curves}  # fmt: skip
    if args.alone:
        best = max((row for row in rows if row["seed"] == args.seeds[0]), key=lambda row: row["the six"]["mean"])
        curve = next(c for c in curves if (c["name"], c["seed"]) == (best["name"], best["seed"]))
        folder = next(each.folder for each, _ in plans if (each.contestant.name, each.seed) == (best["name"], best["seed"]))
        figures["alone"] = alone(folder, curve, three(curve), tune_epochs=args.tune_epochs, tune_rate=args.tune_rate,
                                 bn_images=args.bn_images, jobs=args.jobs, threads=args.threads)  # fmt: skip
    return figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = command_line("nas.benchmarks.quality_once", __doc__, (c.name for c in ONCE))
    parser.add_argument("--budget", type=float, default=2.5e12, help="MACs x images a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--estimate", action="store_true", help="print what would run and for how long, and leave")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--width", type=float, default=0.35, help="of the space")
    parser.add_argument("--kernel", type=int, default=7, help="of all blocks")
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--limit", type=int, default=10_000, help="training images; 0: all")
    parser.add_argument("--readings", type=int, default=8, help="of all networks along a run")
    parser.add_argument("--images", type=int, default=2_000, help="test images of these readings; at the end all are read")
    parser.add_argument("--bn-images", type=int, default=1_000, help="training images that recalibrate batch norms")
    parser.add_argument("--alone", action="store_true", help="train three networks of the best supernet alone, too")
    parser.add_argument("--tune-epochs", type=int, default=2, help="--alone: of fine-tuning")
    parser.add_argument("--tune-rate", type=float, default=0.1, help="--alone: rate of fine-tuning, of the supernet's")
    return program(parser, compete, markdown, picture, argv)


if __name__ == "__main__":
    main()
