"""nas search RECIPE: train the supernet by its strategy, derive, write arch.json into the run folder."""
from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from nas import ranks
from nas.beside import Beside
from nas.bilevel import Weights
from nas.build import Built, assemble
from nas.engine import moment, seed_from
from nas.log import memory
from nas.ranking.section import Rank
from nas.recipe import UsageError, find, option, parse, plain_config, read, search_parser
from nas.run import Run, explicit
from nas.search import epochs_of, rehearse, stopped, train
from nas.splits.grow import planned
from nas.splits.tree import Tree
from search_spaces.arch import read_arch

_log = logging.getLogger("nas")


def run(argv: Sequence[str]) -> int:
    parser = search_parser()
    name, base, overrides = recipe_of(argv)
    config = parse(parser, base, overrides)
    built = assemble(config)
    if built.ranks.main:
        _log.info("%s", built.data.describe())
        _log.info("%d choices, %.3g architectures, %s parameters", len(built.space.choices), float(built.space.size),
                  f"{sum(p.numel() for p in built.net.parameters()):,}")
    beside, rank = beside_of(config), Rank(**config.rank.as_dict())
    rehearse(built, beside, rank)
    if config.dry_run:
        return dry_run(built, config)
    plain = plain_config(parser, config)
    plain.pop("beside")  # it changes nothing of the search, and may be asked of a finished one with --resume auto
    if rank.truth is None:
        plain.pop("rank")  # says nothing: runs that began without the key go on
    out = explicit(config.out, config.resume, built.ranks) if config.out else Path("runs") / name
    run = Run(out, plain, device=built.device, ranks=built.ranks, resume=config.resume,
              period=config.log_every)  # fmt: skip
    try:
        outcome, path, random = train(
            built, run, plain, seed=config.seed, every=config.evaluate.every, images=config.evaluate.images,
            bn_images=config.evaluate.bn_images, gap=config.evaluate.gap, beside=beside, rank=rank,
            max_time=config.max_time)  # fmt: skip
    finally:
        run.close()
    if built.ranks.main:
        whole = outcome.reason == "done"
        said = done(path, random) if path and whole else stopped(run, outcome)
        print(json.dumps(said) if config.json else path if whole else run.folder)
    return outcome.exit


def done(path: Path, random: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``--json`` prints of a finished search: its costs; where it was asked, how random search did."""
    found = {"random": {key: value for key, value in random.items() if key != "networks"}} if random else {}
    return {"arch": str(path), **read_arch(path).costs, **found}


def beside_of(config: Namespace) -> Beside:
    """What the recipe asks beside the search."""
    weights = config.beside.weights
    return Beside(config.beside.random, None if weights is None else Weights(**weights.as_dict()))


def dry_run(built: Built, config: Namespace) -> int:
    """Time and memory from three measured steps after one to warm up; nothing is written. A run with splits trains all its
    supernets in the time."""
    setup = built.setup
    steps = setup.steps if built.split is None else planned(Tree(built, built.split, Path(), epochs_of(built), config.seed))
    feed = built.data.feed(config.seed, built.device, built.ranks.rank, built.ranks.world)
    torch.manual_seed(seed_from(config.seed, "start"))
    built.strategy.start(setup)
    times = []
    for step in range(4):
        now = moment(step, max(setup.steps, 4), setup.epoch_steps, config.seed)
        began = time.perf_counter()
        metrics = {name: float(value) for name, value in built.strategy.update(feed, now).items()}  # waits for the device
        times.append(time.perf_counter() - began)
    seconds = sum(times[1:]) / 3
    figures = {
        "seconds_per_step": round(seconds, 4), "steps": steps, "hours": round(seconds * steps / 3600, 3),
        "memory_mib": round(memory()), "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }  # fmt: skip
    if ranks.rank() == 0:
        _log.info("%.3f s a step, %d steps: about %.2f h without evaluations%s; peak memory %d MiB", seconds, steps,
                  figures["hours"], " and splits" if built.split else "", figures["memory_mib"])
        print(json.dumps(figures))
    return 0


def recipe_of(argv: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """Name, content and overrides of a command line whose first word (or --config) is a recipe."""
    args = list(argv)
    given = args.pop(0) if args and not args[0].startswith("-") else option(args, "--config")
    if given is None:
        if any(word in args for word in ("-h", "--help", "--print_config")):
            return "search", {}, args
        raise UsageError("which recipe? It comes first: nas search tas-digits (or a .yaml file), then options.")
    path = find(given)
    return path.stem, read(path), args
