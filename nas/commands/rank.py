"""nas rank RUN --truth TABLE --value COLUMN: how well the accuracies of a run, or given values, rank architectures."""
from __future__ import annotations

import difflib
import importlib
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from nas.build import Built
from nas.commands.extract import divided, load_source
from nas.commands.spaces import classes, make
from nas.cost import CostTable, params
from nas.engine import seed_from
from nas.evaluate import BN_MODES, score_served
from nas.matching import Known, match, split
from nas.rank_report import plain, tell, write
from nas.ranking import FEWEST, statistics
from nas.recipe import UsageError, parse
from nas.tables import Table, read_table, value_column
from search_spaces.space import Arch, SearchSpace

_log = logging.getLogger("nas")
SPLITS = ("select", "valid", "test")
ARCHS = 200  # architectures of a run that are read where --archs says nothing
_AT_ONCE = 100  # of them whose recalibrated statistics are in memory together


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="nas rank", exit_on_error=False,
                            description="how well a run's accuracies, or given values, rank architectures of known accuracy")
    parser.add_argument("source", nargs="?", default=None, help="run folder; a recipe does for --predictions")
    parser.add_argument("--truth", type=str | None, default=None, help="CSV or JSON file of known accuracies, higher is better")
    parser.add_argument("--key", type=str | None, default=None,
                        help="its column (or columns, with commas) that names the architecture; default: found by itself")
    parser.add_argument("--value", type=str | None, default=None, help="its column of accuracies")
    parser.add_argument("--archs", type=str | None, default=None,
                        help=f"how many of the table's architectures, all, or a CSV file that lists them; default {ARCHS}, "
                             "of --predictions all")
    parser.add_argument("--predictions", type=str | None, default=None, help="CSV or JSON file of values instead of a run's")
    parser.add_argument("--prediction", type=str | None, default=None, help="its column of values")
    parser.add_argument("--space", type=str | None, default=None, help="without a run: nats.Topology, for MACs and parameters")
    parser.add_argument("--args", type=dict[str, Any], default={}, help="its arguments, as nas spaces takes them")
    parser.add_argument("--input", type=list[int], default=[3, 32, 32], help="channels, height, width of an image")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--bn", default="recalibrated", help="recalibrated, or batch: the statistics of each batch")
    parser.add_argument("--bn-images", type=int, default=2000, help="training images that recalibrate batch norms")
    parser.add_argument("--split", default="select", help="select, valid or test")
    parser.add_argument("--images", type=int | None, default=None, help="images of the split; default all")
    parser.add_argument("--seed", type=int, default=1, help="of the draw of architectures and of the intervals")
    parser.add_argument("--top", type=int, default=10, help="k of the top-k overlap and regret")
    parser.add_argument("--out", type=str | None, default=None,
                        help="folder; default RUN/rank, then RUN/rank-2; without a run runs/rank")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch; default: the recipe's")
    parser.add_argument("--json", action="store_true", help="the result as JSON on the last line of stdout")
    parser.add_argument("--debug", action="store_true")
    return parser


class Scope(NamedTuple):
    """Where architectures come from: a run (``folder`` and ``built``), a recipe, a named space, or nothing that is known."""

    folder: Path | None = None
    built: Built | None = None
    space: SearchSpace | None = None
    costs: CostTable | None = None


def run(argv: Sequence[str]) -> int:
    parser = _parser()
    own, overrides = divided(argv)
    config = parse(parser, {}, own)
    _check(config, overrides)
    files = _tables(config)
    scope = _scope(config, overrides)
    if config.threads:
        torch.set_num_threads(config.threads)
    out = _folder(config, scope)
    archs, known = _known(config, scope, files)
    names, left = _choose(config, known)
    t = np.array([known["truth"].values[name] for name in names])
    if "predictions" in known:
        p, said = np.array([known["predictions"].values[name] for name in names]), known["predictions"].said
    else:
        p, said = _accuracies(config, scope, [archs[name] for name in names])
    rankers = {"prediction": p} | (_costs(scope, [archs[name] for name in names]) if archs else {})
    seed = seed_from(config.seed, "bootstrap")
    found = {name: statistics(x, t, config.top, seed) for name, x in rankers.items()}
    report = {
        "n": len(names), "distinct": len({scope.space.key(archs[name]) if scope.space and archs else name for name in names}),
        "left_out": left, "predictions": said, "truth": known["truth"].said, "top": config.top, "seed": config.seed,
        "rankers": {name: {key: plain(estimate) for key, estimate in by.items()} for name, by in found.items()},
    }  # fmt: skip
    tell(report, found)
    write(out, report, found, names, t, rankers)
    print(json.dumps({"rank": str(out / "rank.json"), **report}) if config.json else out / "rank.json")
    return 0


# ---- what is asked -------------------------------------------------------------------------------------------------


def _check(config: Namespace, overrides: Sequence[str]) -> None:
    """UsageError for what is wrong before a file is opened."""
    if config.truth is None:
        raise UsageError("--truth is missing: a CSV or JSON file of known accuracies, one row for each architecture.")
    if config.predictions is None:
        if config.source is None:
            raise UsageError("which run? nas rank RUN --truth TABLE, a folder that nas search wrote; or give --predictions.")
        if not Path(config.source).is_dir():
            raise UsageError(f"{config.source}: there is no such folder. Give a run folder that nas search wrote.")
        if config.prediction is not None:
            raise UsageError("--prediction names a column of --predictions, which is missing.")
    else:
        for name in ("bn", "bn_images", "split", "images"):
            if config[name] != _parser().get_default(name):
                raise UsageError(f"--{name.replace('_', '-')} says how a run is read, but --predictions gives the values. "
                                 "Leave one out.")  # fmt: skip
    if config.source is None and overrides:
        raise UsageError(f"{overrides[0]} overrides a recipe, but no run is named.")
    if config.source is not None and config.space is not None:
        raise UsageError(f"--space {config.space}: {config.source} has a space already. Leave one out.")
    for name, allowed in (("bn", BN_MODES), ("split", SPLITS)):
        if config[name] not in allowed:
            raise UsageError(f"--{name} {config[name]} is not known. Allowed: {', '.join(allowed)}.")
    for name in ("top", "images", "bn_images"):
        if config[name] is not None and config[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {config[name]} is too few. Allowed: 1 or more.")
    if (config.archs or "").isdigit() and int(config.archs) < FEWEST:
        raise UsageError(f"--archs {config.archs} is too few: a ranking needs {FEWEST} or more.")


def _tables(config: Namespace) -> dict[str, Table]:
    """What is to be read: truth, predictions, and archs where a file lists them. Named columns must be there."""
    listed = None if config.archs is None or config.archs == "all" or config.archs.isdigit() else config.archs
    if listed is not None and not Path(listed).is_file():
        raise UsageError(f"--archs {listed}: there is no such file. Allowed: a number, all, or a CSV file of architectures.")
    given = {"truth": config.truth, "predictions": config.predictions, "archs": listed}
    files = {name: read_table(path) for name, path in given.items() if path is not None}
    named = [("truth", "--key", part) for part in split(config.key)]
    named += [("truth", "--value", config.value), ("predictions", "--prediction", config.prediction)]
    for file, option, column in named:
        if column is not None:
            files[file].require(column, option)
    return files


def _scope(config: Namespace, overrides: Sequence[str]) -> Scope:
    if config.source is not None:
        folder, built, _ = load_source(config.source, [*overrides, f"--device={config.device}"])
        return Scope(folder, built, built.space, built.costs)
    if config.space is None:
        return Scope()
    known = dict(classes())
    if config.space not in known:
        near = difflib.get_close_matches(config.space, known, n=1, cutoff=0.0)[0]
        raise UsageError(f"--space {config.space} is not known. Allowed: {', '.join(known)}. Nearest: {near}.")
    if len(config.input) != 3 or min(config.input) < 1:
        raise UsageError(f"--input {config.input} is no image. Allowed: [channels, height, width], for instance [3,32,32].")
    space = make(known[config.space], config.args)
    net = importlib.import_module("supernets." + space.name.partition(".")[0]).build(space, config.input[0], config.classes)
    return Scope(space=space, costs=CostTable(net, tuple(config.input[1:])))


def _folder(config: Namespace, scope: Scope) -> Path:
    """A folder that is absent or empty: ``--out``, else RUN/rank, RUN/rank-2, ..."""
    def used(folder: Path) -> bool:
        return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))

    out = Path(config.out) if config.out else (scope.folder or Path("runs")) / "rank"
    if config.out and used(out):
        raise UsageError(f"{out} is not empty: choose another --out, or empty it.")
    count = 1
    while used(out):
        count += 1
        out = out.with_name(f"rank-{count}")
    if not config.out and scope.folder is None:
        _log.info("no run folder is named: the result goes into %s, --out chooses another", out)
    return out


# ---- which architectures -------------------------------------------------------------------------------------------


def _known(config: Namespace, scope: Scope, files: Mapping[str, Table]) -> tuple[dict[str, Arch], dict[str, Known]]:
    """``match`` with what the command line says; what is odd in a file goes to the log."""
    asked = {"truth": ("--value", config.value), "predictions": ("--prediction", config.prediction)}
    keys = [*split(config.key), *(choice.name for choice in (scope.space.root.choices if scope.space else ()))]
    columns = {name: value_column(files[name], value, option, keys)
               for name, (option, value) in asked.items() if name in files}  # fmt: skip
    archs, known = match(files, scope.space, config.key, columns)
    if not archs and "predictions" not in known:
        raise UsageError(f"{config.truth} has numbers only ({known['truth'].said['key']}), and the space of the run "
                         "has no numbering of its own. Add a column of architectures.")  # fmt: skip
    for said in (known[name].said for name in known):
        _log.info("%s: %d rows, %d architectures, named by %s", said["file"], said["rows"], said["architectures"], said["key"])
        if said["unread"]:
            _log.warning("%s: %d rows left out; the first: %s", said["file"], said["unread"], said["first_unread"])
        if said["repeated"]:
            _log.warning("%s: %d rows name an architecture again; its mean is taken", said["file"], said["repeated"])
    return archs, known


def _choose(config: Namespace, known: Mapping[str, Known]) -> tuple[list[str], dict[str, int]]:
    """The architectures to rank, which all have a truth (and a prediction, where they are given); and how many were left out,
    by reason. UsageError where too few are left."""
    truth, given = known["truth"].values, known["predictions"].values if "predictions" in known else None
    wanted = list(known["archs"].values if "archs" in known else truth if given is None else given)
    left = {"not in the truth": sum(name not in truth for name in wanted),
            "without a truth": sum(math.isnan(truth.get(name, 0.0)) for name in wanted)}  # fmt: skip
    names = [name for name in wanted if not math.isnan(truth.get(name, math.nan))]
    if given is not None:
        left["not predicted"] = sum(name not in given for name in {*wanted, *truth})
        left["without a prediction"] = sum(math.isnan(given.get(name, 0.0)) for name in wanted)
        names = [name for name in names if not math.isnan(given.get(name, math.nan))]
    left |= {f"rows of {file} unread": known[file].said["unread"] for file in known}
    left = {reason: count for reason, count in left.items() if count}
    if len(names) < FEWEST:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left.items())
        raise UsageError(f"{len(names)} architectures with truth and prediction; a ranking needs {FEWEST}. "
                         f"Left out: {reasons or 'none'}. {_lacking(wanted, known)}")  # fmt: skip
    many = int(config.archs) if (config.archs or "").isdigit() else ARCHS if config.archs is None and given is None else None
    if many is not None and many < len(names):
        drawn = random.Random(seed_from(config.seed, "archs")).sample(range(len(names)), many)
        names = [names[i] for i in sorted(drawn)]
    return names, left


def _lacking(wanted: Sequence[str], known: Mapping[str, Known]) -> str:
    """What keeps the first of the ``wanted`` that cannot be ranked from it; where nothing does, that there are too few."""
    for file in (known[name] for name in ("truth", "predictions") if name in known):
        odd = next((name for name in wanted if name not in file.values), None)
        if odd is not None:
            return f"{file.said['file']} does not name {odd!r}; its first is {next(iter(file.values), None)!r}."
        empty = next((name for name in wanted if math.isnan(file.values[name])), None)
        if empty is not None:
            return f"{file.said['file']} has no number in column {file.said['value']} for {empty!r}."
    return f"All {len(wanted)} that are asked for have both: give more."


# ---- what is found -------------------------------------------------------------------------------------------------


def _accuracies(config: Namespace, scope: Scope, archs: Sequence[Arch]) -> tuple[np.ndarray, dict[str, Any]]:
    """Top-1 of each architecture in the weights that serve it, and how it was read."""
    built, folder = scope.built, scope.folder
    assert built is not None and folder is not None
    scores = []
    for start in range(0, len(archs), _AT_ONCE):
        scores += score_served(built.trained.network, archs[start : start + _AT_ONCE], built.data, config.split, built.device,
                               config.bn_images, config.images, config.bn)  # fmt: skip
        _log.info("%d of %d architectures", len(scores), len(archs))
    said = {"run": str(folder), "step": built.step, "split": built.data.reads(config.split),
            "images": scores[0].n, "bn": config.bn, "batch_size": built.data.batch_size}  # fmt: skip
    if config.bn == "recalibrated":  # whole batches, at least one, of what there is
        batches = max(1, config.bn_images // built.data.batch_size)
        said["bn_images"] = min(batches * built.data.batch_size, built.data.count("train"))
    else:
        said["batch_size"] = min(built.data.batch_size, scores[0].n)
    return np.array([score.top1 for score in scores]), said


def _costs(scope: Scope, archs: Sequence[Arch]) -> dict[str, np.ndarray]:
    """The trivial rankers, as whole numbers: a float's rounding would break their ties."""
    assert scope.space is not None and scope.costs is not None
    codes = scope.space.encode(archs)
    return {"macs": scope.costs.batch(codes), "params": scope.costs.priced(params).batch(codes)}
