"""nas select RUN --macs-at-most 40%: an architecture for another budget from the same run, without training."""
from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from nas.build import Built
from nas.commands.extract import divided, load_source, recipe_of_run, served_by
from nas.engine import signals
from nas.limits import Select
from nas.recipe import Parser, UsageError, parse
from nas.searchers.evolution import Evolution
from nas.select import FOLDER, Picked, draw, prepare, select, write
from nas.splits.places import place_of, unmet
from search_spaces.arch import ArchFile

_log = logging.getLogger("nas")
OWN = ("random", "evolution", "coarse_to_fine")
FIGURES = ("evaluations", "images", "bn_images")
LIMITS = tuple(field.name for field in dataclasses.fields(Select) if field.name not in FIGURES)


def _parser() -> Parser:
    parser = Parser(
        prog="nas select",
        description="the best subnet of a run within limits. Limits given here replace those of the recipe; scores are kept.",
    )  # fmt: skip
    parser.add_argument("run", help="folder that nas search wrote, finished or stopped")
    for name in LIMITS:
        what = "latency table (.csv) of these limits" if name == "latency" else "40% of the largest network, or a number"
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=str | None, default=None, help=what)
    parser.add_argument("--searcher", type=str | None, default=None,
                        help=f"{', '.join(OWN)}, or a class; --searcher.KEY VALUE for its arguments; default: the recipe's")
    parser.add_argument("--evaluations", type=int | None, default=None, help="subnets that are scored at most")
    parser.add_argument("--images", type=int | None, default=None, help="of the select split, for each subnet")
    parser.add_argument("--bn_images", "--bn-images", type=int | None, default=None, help="that recalibrate batch norms")
    parser.add_argument("--out", type=str | None, default=None, help="arch.json of the pick; default RUN/picks/LIMITS.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch; default: the recipe's")
    parser.add_argument("--json", action="store_true", help="the result as JSON on the last line of stdout")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    own, overrides = divided(argv)
    config = parse(_parser(), {}, own)
    if not Path(config.run).is_dir():
        raise UsageError(f"{config.run}: there is no such folder. Give a run folder that nas search wrote.")
    words = [*_translated(config, Path(config.run)), *overrides, f"--device={config.device}"]
    folder, built, recipe = load_source(config.run, words)
    assert folder is not None
    if config.threads:
        torch.set_num_threads(config.threads)
    searcher = built.searcher or Evolution()
    if not built.finished:
        _log.warning("the run was stopped after %d steps: its subnets are not fully trained", built.step)
    if place := place_of(folder):
        try:
            prepare(built, copy.copy(searcher), built.select)
        except ValueError as error:
            raise UsageError(unmet(place, error)) from None
    began = time.monotonic()
    with signals() as stop:
        found = select(built, searcher, built.select, folder, recipe, built.step, lambda: stop.reason)
    if isinstance(found, str):
        _log.info("stopped (%s); the same command goes on from there", found)
        return 130 if found == "interrupted" else 143
    out = Path(config.out) if config.out else folder / FOLDER / f"{built.select.named()}.json"
    file = write(built, found, built.select, recipe, out)
    draw(built, found, folder)
    _say(built, found, file, time.monotonic() - began)
    print(json.dumps({**_result(out, found, file), **served_by(built, found.best.arch)}) if config.json else out)
    return 0


def _translated(config: Namespace, folder: Path) -> list[str]:
    """The options as overrides of the run's recipe: --macs-at-most 40% -> --select.macs_at_most=40%."""
    words = [f"--select.{name}={config[name]}" for name in FIGURES if config[name] is not None]
    given = {name: config[name] for name in LIMITS if config[name] is not None}
    if given:
        words += [f"--select.{name}={given.get(name, 'null')}" for name in LIMITS]
    Select(**given, **{name: config[name] for name in FIGURES if config[name] is not None})  # refuses before weights load
    if config.searcher is None:
        return words
    path = config.searcher
    if "." not in path:
        if path not in OWN:
            raise UsageError(f"--searcher {path} is not known. Allowed: {', '.join(OWN)}, or the import path of a class.")
        path = f"nas.searchers.{path}.{''.join(part.title() for part in path.split('_'))}"
    before = recipe_of_run(folder).get("searcher") or {}
    return words if before.get("class_path") == path else [f"--searcher={path}", *words]


def _say(built: Built, found: Picked, file: ArchFile, seconds: float) -> None:
    full = built.prices(built.space.root.largest())
    _log.info("%s scored %d subnets, %d of them now in %.0f s; %d are on the front", found.said["searcher"], found.asked,
              found.fresh, seconds, len(found.front))
    _log.info("picked: %s MACs (%.1f%% of the largest), %s parameters (%.1f%%), %s top-1 %.4f on %d images%s",
              f"{file.costs['macs']:,}", 100 * file.costs["macs"] / full["macs"], f"{file.costs['params']:,}",
              100 * file.costs["params"] / full["params"], file.metrics["top1"]["split"], found.score.top1, found.score.n,
              "".join(f", in the weights of {name}" for name in served_by(built, found.best.arch).values()))  # fmt: skip


def _result(out: Path, found: Picked, file: ArchFile) -> dict[str, Any]:
    return {"arch": str(out), "top1": found.score.top1, "n": found.score.n, **file.costs, "scored": found.asked,
            "scored_now": found.fresh, "front": len(found.front), "known": len(found.scores)}  # fmt: skip
