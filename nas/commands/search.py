"""nas search RECIPE: train the supernet by its strategy, derive, write arch.json into the run folder."""
from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from nas import ranks
from nas.build import Built, arch_file, assemble
from nas.engine import moment, seed_from
from nas.log import memory
from nas.picks import Picks
from nas.recipe import UsageError, find, parse, plain_config, read, search_parser
from nas.run import Run
from search_spaces.arch import write_arch

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
    if config.dry_run:
        return dry_run(built, config)
    copy.copy(built.strategy).start(built.setup)  # refuses what does not fit before a folder is made
    plain = plain_config(parser, config)
    out = config.out or f"runs/{name}"
    run = Run(out, plain, device=built.device, ranks=built.ranks, resume=config.resume, period=config.log_every)
    if built.ranks.main:
        _log.info("%s in %s", f"resuming at step {run.start}" if run.start else "starting", run.folder)
    try:
        return _search(built, config, plain, run)
    finally:
        run.close()


def _search(built: Built, config: Namespace, plain: dict[str, Any], run: Run) -> int:
    feed = built.data.feed(config.seed, built.device, built.ranks.rank, built.ranks.world)
    picks = Picks(built.space, built.data, built.device, run.log, built.ranks, config.evaluate.images,
                  config.evaluate.bn_images)
    every = [(config.evaluate.every * built.setup.epoch_steps, picks)]
    outcome = run.fit(built.strategy, built.setup, feed, seed=config.seed, every=every, max_time=config.max_time,
                      keep={"picks": picks})
    if not built.ranks.main:
        return outcome.exit
    if outcome.reason != "done":
        _log.info("stopped (%s) after step %d; continue with --resume auto --out %s", outcome.reason, outcome.step, run.folder)
        print(run.folder)
        return outcome.exit
    path = conclude(built, picks, plain, run.folder)
    print(json.dumps({"arch": str(path), **json.loads(path.read_text())["costs"]}) if config.json else path)
    return outcome.exit


def conclude(built: Built, picks: Picks, plain: dict[str, Any], folder: Path) -> Path:
    """Writes arch.json (the last architecture, as published; the best one where the last misses the budget) and
    arch-best.json. Returns the path of arch.json."""
    last = picks.last
    arch = built.space.canonical(built.strategy.architecture())
    if last is None or last["arch"] != arch or last["step"] != built.setup.steps - 1:
        scores = picks.read(built.strategy, arch)
        last = {"arch": arch, "metric": picks.metric(scores), "fits": built.strategy.fits(arch)}
    best = picks.best
    if last["fits"] and (best is None or last["metric"]["value"] > best["metric"]["value"]):
        best = last
    chosen = last
    if not last["fits"]:
        if best is None:
            _log.warning("no derived architecture met the budget: arch.json misses it. Train longer, or raise cost_weight.")
        else:
            _log.warning("the last architecture misses the budget: arch.json holds the best one that meets it")
            chosen = best
            write_arch(folder / "arch-last.json", arch_file(built, last["arch"], {"top1": last["metric"]}, plain))
    path = folder / "arch.json"
    write_arch(path, arch_file(built, chosen["arch"], {"top1": chosen["metric"]}, plain))
    if best is not None:
        write_arch(folder / "arch-best.json", arch_file(built, best["arch"], {"top1": best["metric"]}, plain))
    costs, full = built.prices(chosen["arch"]), built.prices(built.space.root.largest())
    _log.info("arch.json: %s MACs (%.1f%% of the largest), %s parameters (%.1f%%), %s top-1 %.4f on %d images, "
              "inherited weights, recalibrated batch norm", f"{costs['macs']:,}", 100 * costs["macs"] / full["macs"],
              f"{costs['params']:,}", 100 * costs["params"] / full["params"], chosen["metric"]["split"],
              chosen["metric"]["value"], chosen["metric"]["n"])
    return path


def dry_run(built: Built, config: Namespace) -> int:
    """Time and memory from three measured steps after one to warm up; nothing is written."""
    setup = built.setup
    feed = built.data.feed(config.seed, built.device, built.ranks.rank, built.ranks.world)
    torch.manual_seed(seed_from(config.seed, "start"))
    built.strategy.start(setup)
    times = []
    for step in range(4):
        now = moment(step, max(setup.steps, 4), setup.epoch_steps, config.seed)
        began = time.perf_counter()
        loss = float(built.strategy.update(feed, now)["train/loss"])  # waits for the device
        times.append(time.perf_counter() - began)
    seconds = sum(times[1:]) / 3
    figures = {
        "seconds_per_step": round(seconds, 4), "steps": setup.steps, "hours": round(seconds * setup.steps / 3600, 3),
        "memory_mib": round(memory()), "loss": loss,
    }  # fmt: skip
    if ranks.rank() == 0:
        _log.info("%.3f s a step, %d steps: about %.2f h without evaluations; peak memory %d MiB", seconds, setup.steps,
                  figures["hours"], figures["memory_mib"])
        print(json.dumps(figures))
    return 0


def recipe_of(argv: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """Name, content and overrides of a command line whose first word (or --config) is a recipe."""
    args = list(argv)
    given = None
    if args and not args[0].startswith("-"):
        given = args.pop(0)
    elif "--config" in args and args.index("--config") + 1 < len(args):
        i = args.index("--config")
        given = args[i + 1]
        del args[i : i + 2]
    if given is None:
        if any(word in args for word in ("-h", "--help", "--print_config")):
            return "search", {}, args
        raise UsageError("which recipe? Give a shipped name (nas search tas-digits) or a .yaml file.")
    path = find(given)
    return path.stem, read(path), args


