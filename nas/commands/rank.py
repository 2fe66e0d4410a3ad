"""nas rank RUN... --truth TABLE --value COLUMN: how well the accuracies of runs, or given values, rank architectures."""
from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from nas.commands.extract import divided
from nas.engine import seed_from
from nas.evaluate import BN_MODES
from nas.ranking.bins import BINS, FROM
from nas.ranking.compare import compare
from nas.ranking.matching import Known, match, split
from nas.ranking.report import plain_found, tell, write
from nas.ranking.scope import ALONE, RESERVED, Reading, Scope, costs_of, readings, scope_of
from nas.ranking.statistics import FEWEST
from nas.ranking.tables import Table, read_table, value_column
from nas.ranking.truth import trained_truth
from nas.recipe import Parser, UsageError, parse
from nas.splits.regions import holds
from search_spaces.space import Arch

_log = logging.getLogger("nas")
SPLITS = ("select", "valid", "test")
ARCHS = 200  # architectures of a run that are read where --archs says nothing
TRAIN = "train"  # --truth train: no table, but networks that are trained alone
NETWORKS = 20  # of them, where --networks says nothing


def _parser() -> Parser:
    parser = Parser(prog="nas rank",
                            description="how well accuracies of runs, or given values, rank architectures of known accuracy")
    parser.add_argument("source", nargs="*", default=[],
                        help="run folders of one space, compared on the same architectures; a recipe does for --predictions")
    parser.add_argument("--truth", type=str | None, default=None,
                        help="CSV or JSON file of known accuracies, higher is better; or train: networks trained alone")
    parser.add_argument("--networks", type=int | None, default=None,
                        help=f"of --truth train: how many of the first run's space; default {NETWORKS}")
    parser.add_argument("--epochs", type=int | None, default=None, help="of --truth train: how long each is trained")
    parser.add_argument("--key", type=str | None, default=None,
                        help="its column (or columns, with commas) that names the architecture; default: found by itself")
    parser.add_argument("--value", type=str | None, default=None, help="its column of accuracies")
    parser.add_argument("--archs", type=str | None, default=None,
                        help=f"how many of the table's architectures, all, or a CSV file that lists them; default {ARCHS}, "
                             "of --predictions all")
    parser.add_argument("--predictions", type=str | None, default=None, help="CSV or JSON file of values instead of a run's")
    parser.add_argument("--prediction", type=str | None, default=None, help="its column of values, or several with commas")
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
    parser.add_argument("--bins", type=int | None, default=None,
                        help=f"of equally many architectures by MACs, with a tau-b inside each; 0: none; default {BINS} where "
                             f"MACs are known, of {FROM} architectures on")
    parser.add_argument("--out", type=str | None, default=None,
                        help="folder; default RUN/rank, then RUN/rank-2; of several runs or none runs/rank")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch; default: the recipe's")
    parser.add_argument("--json", action="store_true", help="the result as JSON on the last line of stdout")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    parser = _parser()
    own, overrides = divided(argv)
    config = parse(parser, {}, own)
    _check(config, overrides)
    files = _tables(config)
    scope = scope_of(config, overrides)
    out = _folder(config, scope)
    if config.truth == TRAIN:
        files = {"truth": _trained(config, scope), **files}
    archs, known = _known(config, scope, files)
    names, left = _choose(config, scope, archs, known)
    chosen = [archs[name] for name in names] if archs else []
    given = {label: Reading(np.array([known[label].values[name] for name in names]), known[label].said)
             for label in _labels(known)}  # fmt: skip
    given = given or dict(readings(config, scope, overrides, chosen))
    found = compare({label: reading.values for label, reading in given.items()}, costs_of(scope, chosen),
                    np.array([known["truth"].values[name] for name in names]),
                    top=config.top, bins=config.bins, seed=seed_from(config.seed, "bootstrap"))  # fmt: skip
    said = {label: reading.said for label, reading in given.items()}
    report = {
        "n": len(names), "distinct": len({scope.space.key(archs[name]) if scope.space and archs else name for name in names}),
        "left_out": left, "predictions": said.get(ALONE, said), "truth": known["truth"].said, "top": config.top,
        "seed": config.seed, **plain_found(found),
    }  # fmt: skip
    tell(report, said, found)
    write(out, report, said, found, names)
    print(json.dumps({"rank": str(out / "rank.json"), **report}) if config.json else out / "rank.json")
    return 0


# ---- what is asked -------------------------------------------------------------------------------------------------


def _check(config: Namespace, overrides: Sequence[str]) -> None:
    """UsageError for what is wrong before a file is opened."""
    if config.truth is None:
        raise UsageError("--truth is missing: a CSV or JSON file of known accuracies, one row for each architecture; or train.")
    if config.predictions is None:
        _check_runs(config)
    else:
        for name in ("bn", "bn_images", "split", "images"):
            if config[name] != _parser().get_default(name):
                raise UsageError(f"--{name.replace('_', '-')} says how a run is read, but --predictions gives the values. "
                                 "Leave one out.")  # fmt: skip
        if len(config.source) > 1:
            raise UsageError(f"{config.source[1]}: with --predictions, one run or recipe lends its space. Leave the rest out.")
    _check_truth(config)
    if not config.source and overrides:
        raise UsageError(f"{overrides[0]} overrides a recipe, but no run is named.")
    if config.source and config.space is not None:
        raise UsageError(f"--space {config.space}: {config.source[0]} has a space already. Leave one out.")
    for name, allowed in (("bn", BN_MODES), ("split", SPLITS)):
        if config[name] not in allowed:
            raise UsageError(f"--{name} {config[name]} is not known. Allowed: {', '.join(allowed)}.")
    for name in ("top", "images", "bn_images"):
        if config[name] is not None and config[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} {config[name]} is too few. Allowed: 1 or more.")
    counts = {"networks": config.networks} | ({"archs": int(config.archs)} if (config.archs or "").isdigit() else {})
    for name, count in counts.items():
        if count is not None and count < FEWEST:
            raise UsageError(f"--{name} {count} is too few: a ranking needs {FEWEST} or more.")
    if config.bins is not None and (config.bins < 0 or config.bins == 1):
        raise UsageError(f"--bins {config.bins}: allowed are 2 and more, and 0 for none.")


def _check_runs(config: Namespace) -> None:
    """UsageError where the words do not name run folders, each once."""
    if not config.source:
        raise UsageError("which run? nas rank RUN --truth TABLE (or train), RUN a folder that nas search wrote; or give "
                         "--predictions.")
    seen: dict[Path, str] = {}
    for source in config.source:
        if not Path(source).is_dir():
            raise UsageError(f"{source}: there is no such folder. Give run folders that nas search wrote.")
        place = Path(source).resolve()
        if place in seen:
            raise UsageError(f"{source} is the same folder as {seen[place]}. Name each run once.")
        seen[place] = source
    if config.prediction is not None:
        raise UsageError("--prediction names a column of --predictions, which is missing.")


def _check_truth(config: Namespace) -> None:
    """UsageError where a table and networks to be trained are mixed up."""
    if config.truth != TRAIN:
        for name in ("networks", "epochs"):
            if config[name] is not None:
                raise UsageError(f"--{name} is of --truth {TRAIN}, but {config.truth} gives the truth. Leave one out.")
        return
    if config.predictions is not None:
        raise UsageError(f"--truth {TRAIN} trains networks of a run, but --predictions gives the values. "
                         f"Name a run instead, or give --truth a table (./{TRAIN} is a file of this name).")  # fmt: skip
    for name in ("key", "value", "archs"):
        if config[name] is not None:
            raise UsageError(f"--{name} is of a table, but --truth {TRAIN} draws --networks itself. Leave it out.")
    if config.epochs is None:
        raise UsageError(f"--epochs is missing: how long is each network of --truth {TRAIN} trained?")


def _tables(config: Namespace) -> dict[str, Table]:
    """What is to be read: truth, predictions, and archs where a file lists them. Named columns must be there."""
    listed = None if config.archs is None or config.archs == "all" or config.archs.isdigit() else config.archs
    if listed is not None and not Path(listed).is_file():
        raise UsageError(f"--archs {listed}: there is no such file. Allowed: a number, all, or a CSV file of architectures.")
    given = {"truth": None if config.truth == TRAIN else config.truth, "predictions": config.predictions, "archs": listed}
    files = {name: read_table(path) for name, path in given.items() if path is not None}
    named = [("truth", "--key", part) for part in split(config.key)]
    named += [("truth", "--value", config.value)] if config.value else []
    named += [("predictions", "--prediction", part) for part in _predicted(config, files)]
    for file, option, column in named:
        files[file].require(column, option)
    return files


def _predicted(config: Namespace, files: Mapping[str, Table]) -> list[str]:
    """The columns that ``--prediction`` names; a name may have a comma itself."""
    if config.prediction is not None and config.prediction in files["predictions"].columns:
        return [config.prediction]
    return list(dict.fromkeys(split(config.prediction)))


def _folder(config: Namespace, scope: Scope) -> Path:
    """A folder that is absent or empty: ``--out``, else RUN/rank, RUN/rank-2, ..."""
    def used(folder: Path) -> bool:
        return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))

    own = scope.folder if len(scope.runs) == 1 else None
    out = Path(config.out) if config.out else (own or Path("runs")) / "rank"
    if config.out and used(out):
        raise UsageError(f"{out} is not empty: choose another --out, or empty it.")
    count = 1
    while used(out):
        count += 1
        out = out.with_name(f"rank-{count}")
    if not config.out and own is None:
        why = f"{len(scope.runs)} runs are compared" if scope.runs else "no run folder is named"
        _log.info("%s: the result goes into %s, --out chooses another", why, out)
    return out


def _trained(config: Namespace, scope: Scope) -> Table:
    """The accuracies of networks of the first run's space, each trained alone by its recipe. They are kept in the run's folder,
    under what they follow from: those that are there are not trained again."""
    assert scope.folder is not None and scope.built is not None
    networks, place = config.networks or NETWORKS, f"truth-{config.split}-epochs{config.epochs}-seed{config.seed}"
    path = trained_truth(scope.folder, scope.built, scope.recipe, networks=networks, epochs=config.epochs, seed=config.seed,
                         out=scope.folder / place, split=config.split)  # fmt: skip
    config.key, config.value, config.archs = "arch", "top1", "all"
    table = read_table(str(path))
    return Table(table.path, {name: cells[:networks] for name, cells in table.columns.items()})  # more may be there


# ---- which architectures -------------------------------------------------------------------------------------------


def _labels(known: Mapping[str, Any]) -> list[str]:
    """Of what was read, the columns of predictions."""
    return [name for name in known if name not in ("truth", "archs")]


def _known(config: Namespace, scope: Scope, files: Mapping[str, Table]) -> tuple[dict[str, Arch], dict[str, Known]]:
    """``match`` with what the command line says, every column of predictions by its label: ``ALONE``, of several their own
    names. What is odd in a file goes to the log."""
    keys = [*split(config.key), *(choice.name for choice in (scope.space.root.choices if scope.space else ()))]
    tables, columns = {"truth": files["truth"]}, {"truth": value_column(files["truth"], config.value, "--value", keys)}
    if "predictions" in files:
        asked = _predicted(config, files) or [value_column(files["predictions"], None, "--prediction", keys)]
        for column in asked:
            label = ALONE if len(asked) == 1 else f"column {column}" if column in (*RESERVED, "archs") else column
            tables[label], columns[label] = files["predictions"], column
    if "archs" in files:
        tables["archs"] = files["archs"]
    archs, known = match(tables, scope.space, config.key, columns)
    if not archs and not _labels(known):
        raise UsageError(f"{config.truth} has numbers only ({known['truth'].said['key']}), and the space of the run "
                         "has no numbering of its own. Add a column of architectures.")  # fmt: skip
    for said in {_file(name): known[name].said for name in known}.values():
        _log.info("%s: %d rows, %d architectures, named by %s", said["file"], said["rows"], said["architectures"], said["key"])
        if said["unread"]:
            _log.warning("%s: %d rows left out; the first: %s", said["file"], said["unread"], said["first_unread"])
        if said["repeated"]:
            _log.warning("%s: %d rows name an architecture again; its mean is taken", said["file"], said["repeated"])
    return archs, known


def _file(name: str) -> str:
    """The table that ``name`` of what was read is in."""
    return name if name in ("truth", "archs") else "predictions"


def _choose(
    config: Namespace, scope: Scope, archs: Mapping[str, Arch], known: Mapping[str, Known]
) -> tuple[list[str], dict[str, int]]:
    """The architectures to rank, which all have a truth (and every prediction, where they are given) and are in the space of
    every run; and how many were left out, by reason. UsageError where too few are left."""
    truth, given = known["truth"].values, [known[label].values for label in _labels(known)]
    wanted = list(known["archs"].values if "archs" in known else given[0] if given else truth)
    left = {"not in the truth": sum(name not in truth for name in wanted),
            "without a truth": sum(math.isnan(truth.get(name, 0.0)) for name in wanted)}  # fmt: skip
    names = [name for name in wanted if not math.isnan(truth.get(name, math.nan))]
    if given:
        left["not predicted"] = sum(name not in given[0] for name in {*wanted, *truth})
        left["without a prediction"] = sum(any(math.isnan(by.get(name, 0.0)) for by in given) for name in wanted)
        names = [name for name in names if not any(math.isnan(by.get(name, math.nan)) for by in given)]
    for label, space in scope.others.items():
        there = [name for name in names if holds(space, archs[name])]
        left[f"not in the space of {label}"] = len(names) - len(there)
        names = there
    left |= {f"rows of {_file(file)} unread": known[file].said["unread"] for file in known}
    left = {reason: count for reason, count in left.items() if count}
    if len(names) < FEWEST:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left.items())
        raise UsageError(f"{len(names)} architectures with truth and prediction; a ranking needs {FEWEST}. "
                         f"Left out: {reasons or 'none'}. {_lacking(wanted, known)}")  # fmt: skip
    many = int(config.archs) if (config.archs or "").isdigit() else ARCHS if config.archs is None and not given else None
    if many is not None and many < len(names):
        drawn = random.Random(seed_from(config.seed, "archs")).sample(range(len(names)), many)
        names = [names[i] for i in sorted(drawn)]
    return names, left


def _lacking(wanted: Sequence[str], known: Mapping[str, Known]) -> str:
    """What keeps the first of the ``wanted`` that cannot be ranked from it; where nothing does, that there are too few."""
    for file in (known[name] for name in known if name != "archs"):
        odd = next((name for name in wanted if name not in file.values), None)
        if odd is not None:
            return f"{file.said['file']} does not name {odd!r}; its first is {next(iter(file.values), None)!r}."
        empty = next((name for name in wanted if math.isnan(file.values[name])), None)
        if empty is not None:
            return f"{file.said['file']} has no number in column {file.said['value']} for {empty!r}."
    return f"All {len(wanted)} that are asked for have both: give more."
