"""What ``nas rank`` reads: run folders and what they are called, the space they share, and their accuracies."""
from __future__ import annotations

import difflib
import importlib
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace

from nas.build import Built
from nas.commands.extract import load_source, recipe_of_run
from nas.commands.spaces import classes, make
from nas.cost import CostTable, params
from nas.evaluate import recalibrating, score_served
from nas.recipe import UsageError, build, parse, search_parser
from search_spaces.patterns import restricted, tied
from search_spaces.space import Arch, SearchSpace

_log = logging.getLogger("nas")
ALONE = "prediction"  # what the only run, or the only column of predictions, is called
RESERVED = ("text", "truth", "macs", "params", ALONE)  # other columns of rank.csv
_AT_ONCE = 100  # architectures whose recalibrated statistics are in memory together


class Scope(NamedTuple):
    """Where architectures come from: ``runs`` (folders by label) of one space, a recipe, a named space, or nothing that is
    known. ``built`` and its ``recipe``: the first run or the recipe. ``others``: the spaces of the further runs, by label."""

    runs: Mapping[str, Path] = {}
    built: Built | None = None
    recipe: Mapping[str, Any] = {}
    space: SearchSpace | None = None
    costs: CostTable | None = None
    others: Mapping[str, SearchSpace] = {}

    @property
    def folder(self) -> Path | None:
        """The first run."""
        return next(iter(self.runs.values()), None)


class Reading(NamedTuple):
    """Of one run: top-1 of each architecture as ``values`` (n,), and what is ``said`` of how it was read."""

    values: np.ndarray
    said: dict[str, Any]


def scope_of(config: Namespace, overrides: Sequence[str]) -> Scope:
    """What ``nas rank`` was pointed to. UsageError, before anything is read, where several runs are of different spaces."""
    if config.source:
        first, *further = [Path(source) for source in config.source]
        others = {folder: space_of(folder, overrides) for folder in further}
        folder, built, recipe = _loaded(config, config.source[0], overrides)
        for other, space in others.items():
            _same(first, built.space, other, space)
        names = labels([first, *further])
        runs = dict(zip(names, [first, *further])) if folder else {}
        return Scope(runs, built, recipe, built.space, built.costs, dict(zip(names[1:], others.values())))
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


def labels(folders: Sequence[Path]) -> list[str]:
    """What the runs in ``folders``, all different, are called: the only one ``ALONE``; of several each by the folder's name,
    and as many of its parents as tell it from the others and from other columns."""
    if len(folders) == 1:
        return [ALONE]
    places = [folder.resolve().parts for folder in folders]
    found = []
    for i, own in enumerate(places):
        others, k = places[:i] + places[i + 1 :], 1
        while own[-k:] in [other[-k:] for other in others] or Path(*own[-k:]).as_posix() in RESERVED:
            k += 1
        found.append(Path(*own[-k:]).as_posix())
    return found


def space_of(folder: Path, overrides: Sequence[str]) -> SearchSpace:
    """The space that the run in ``folder`` searched. UsageError where it is no run, or has no weights yet."""
    recipe = parse(search_parser(), recipe_of_run(folder), overrides)
    if not any(folder.rglob("*.pt")):
        run = shlex.quote(str(folder))
        raise UsageError(f"{folder} has no checkpoint yet: go on with nas search {run}/config.yaml --resume auto --out {run}.")
    space = tied(restricted(build(recipe.space), recipe.restrict), recipe.tie)
    return restricted(space, recipe.part) if recipe.part else space


def _same(first: Path, space: SearchSpace, other: Path, given: SearchSpace) -> None:
    """UsageError where an architecture of one space is none of the other."""
    if space.hash != given.hash:
        raise UsageError(f"{other} is of another space than {first}: {given.root!r}, not {space.root!r}. "
                         "Runs are compared on the architectures of one space: rank this one alone.")  # fmt: skip


def _loaded(config: Namespace, source: str, overrides: Sequence[str]) -> tuple[Path | None, Built, dict[str, Any]]:
    """``load_source`` on the device and with the threads that the command line asks for."""
    loaded = load_source(source, [*overrides, f"--device={config.device}"])
    if config.threads:
        torch.set_num_threads(config.threads)
    return loaded


def readings(config: Namespace, scope: Scope, overrides: Sequence[str], archs: Sequence[Arch]) -> Iterator[tuple[str, Reading]]:
    """Of one run after another its label and the accuracies of ``archs`` in the weights that serve them. The first is loaded
    already, of the others one at a time is in memory."""
    assert scope.space is not None and scope.costs is not None
    macs = scope.costs.batch(scope.space.encode(archs))
    for label, folder in scope.runs.items():
        built = scope.built if folder is scope.folder else _loaded(config, str(folder), overrides)[1]
        assert built is not None
        if not np.array_equal(built.costs.batch(built.space.encode(archs)), macs):
            _log.warning("%s: other MACs than in %s, whose are shown: its images have another size, or its supernet differs",
                         folder, scope.folder)  # fmt: skip
        yield label, _read(config, folder, built, archs)


def _read(config: Namespace, folder: Path, built: Built, archs: Sequence[Arch]) -> Reading:
    scores = []
    for start in range(0, len(archs), _AT_ONCE):
        scores += score_served(built.trained.network, archs[start : start + _AT_ONCE], built.data, config.split, built.device,
                               config.bn_images, config.images, config.bn)  # fmt: skip
        _log.info("%s: %d of %d architectures", folder, len(scores), len(archs))
    said = {"run": str(folder), "step": built.step, "split": built.data.reads(config.split),
            "images": scores[0].n, "bn": config.bn, "batch_size": built.data.batch_size}  # fmt: skip
    if config.bn == "recalibrated":
        said["bn_images"] = recalibrating(built.data, config.bn_images)
    else:
        said["batch_size"] = min(built.data.batch_size, scores[0].n)
    return Reading(np.array([score.top1 for score in scores]), said)


def costs_of(scope: Scope, archs: Sequence[Arch]) -> dict[str, np.ndarray]:
    """The trivial rankers, as whole numbers: a float's rounding would break their ties. None where the costs are not known."""
    if scope.space is None or scope.costs is None or not archs:
        return {}
    codes = scope.space.encode(archs)
    return {"macs": scope.costs.batch(codes), "params": scope.costs.priced(params).batch(codes)}
