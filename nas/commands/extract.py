"""nas extract RUN|RECIPE --arch FILE|derived|largest|smallest|random:SEED --out DIR: a plain network as a bundle."""
from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas import checkpoint
from nas.budget import budget
from nas.build import Built, assemble
from nas.engine import seed_from
from nas.recipe import Parser, UsageError, find, parse, plain_config, read, search_parser
from nas.search import bundle
from nas.splits.places import Place, elsewhere, place_of, underived
from nas.splits.regions import holds
from nas.splits.tree import Tree
from search_spaces.arch import ArchFile, read_arch
from search_spaces.space import Arch, SearchSpace

_log = logging.getLogger("nas")
SOURCES = ("auto", "inherited", "scratch")


def _parser() -> Parser:
    parser = Parser(prog="nas extract", description="an architecture as a plain network")
    parser.add_argument("source", help="run folder, or recipe (untrained weights)")
    parser.add_argument("--arch", default="derived",
                        help="arch.json file, derived, largest, smallest, random:SEED, random:SEED@55%, or an arch as text")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the bundle; default RUN/bundle")
    parser.add_argument("--from", dest="weights", default="auto", help="inherited, scratch, or auto: inherited where possible")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx too")
    parser.add_argument("--pt2", action="store_true", help="write model.pt2 (torch.export) too")
    parser.add_argument("--bn-images", type=int | None, default=None,
                        help="training images that recalibrate batch norms; default: as for the reading in FILE, else 2000")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch; default: the recipe's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    parser = _parser()
    own, overrides = divided(argv)
    config = parse(parser, {}, own)
    if config.weights not in SOURCES:
        raise UsageError(f"--from {config.weights} is not known. Allowed: {', '.join(SOURCES)}.")
    inherit = config.weights != "scratch"
    folder, built, plain = load_source(config.source, [*overrides, f"--device={config.device}"], weights=inherit)
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out) if config.out else (folder / "bundle" if folder else None)
    if out is None:
        raise UsageError("--out is missing: where shall the bundle of a recipe go?")
    arch, metrics = arch_of(config.arch, folder, built, "extract", overrides)
    bn_images = config.bn_images or metrics.get("top1", {}).get("bn_images", 2000)
    make = partial(bundle, built, arch, metrics, plain, out, trained=folder is not None and inherit, bn_images=bn_images,
                   onnx=config.onnx, pt2=config.pt2)  # fmt: skip
    try:
        path, report = make(inherit=inherit)
    except ValueError as error:
        if config.weights != "auto" or "cannot be inherited" not in str(error):
            raise
        _log.info("the bundle gets fresh weights, for nas retrain: %s", str(error).split(", so weights")[0])
        path, report = make(inherit=False)
    if report["logits_max_difference"] is not None:
        _log.info("largest difference to the supernet's logits: %.3g", report["logits_max_difference"])
    _log.info("%s MACs, %s parameters, counted and predicted alike; weights: %s", f"{report['macs']['counted']:,}",
              f"{report['params']['counted']:,}", report["weights"])
    print(json.dumps({"bundle": str(path), **report}) if config.json else path)
    return 0


def divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This verb's own arguments, and dotted overrides of the recipe (--data.root /data)."""
    own: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        dotted = word.startswith("--") and "." in word.partition("=")[0]
        (overrides if dotted else own).append(word)
        if dotted and "=" not in word and words:
            overrides.append(words.pop(0))
    return own, overrides


def load_source(
    source: str, overrides: Sequence[str], weights: bool = True
) -> tuple[Path | None, Built, dict[str, Any]]:
    """A run folder with its trained weights, or a recipe with fresh ones: (folder, objects, config).

    ``weights``: False leaves those of the run aside, so that ``overrides`` may ask for another size of its networks.
    """
    parser = search_parser()
    place = Path(source)
    folder = place if place.is_dir() else None
    if folder is None and len(place.parts) > 1 and place.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{source}: there is no such folder. Give a run folder that nas search wrote, or a recipe.")
    recipe = read(find(source)) if folder is None else recipe_of_run(folder)
    parsed = parse(parser, recipe, overrides)
    if folder is not None and weights and parsed.space != parse(parser, recipe, []).space:
        raise UsageError("--space.*: the weights of a run are of its own space, so they cannot be inherited by another. "
                         "nas extract --from scratch makes such a network with fresh weights.")  # fmt: skip
    parsed.init = parsed.init if folder is None else None
    built = assemble(parsed)
    torch.manual_seed(seed_from(parsed.seed, "start"))
    if folder is not None and weights:
        built.strategy.start(built.setup)
        built = _trained(folder, built, parsed.epochs, parsed.seed)
    return folder, built, plain_config(parser, parsed)


def _trained(folder: Path, built: Built, epochs: int, seed: int) -> Built:
    """``built``, whose strategy has started, as the run in ``folder`` left it."""
    if built.split is not None:
        tree = Tree(built, built.split, folder, epochs, seed)
        built, servers = tree.trained(), tree.servers()
        if built.finished:
            inner = sum(1 for _ in tree.nodes()) - len(servers)
            _log.info("weights of the %d leaves of %s; what was split on the way serves nothing: %d supernets", len(servers),
                      folder, inner)  # fmt: skip
        else:
            _log.warning("%s is not finished: weights of %s", folder, ", ".join(node.called for node in servers))
        return built
    payload, path = checkpoint.load(folder / "checkpoints", built.device)
    checkpoint.restore(built.strategy, payload["strategy"], folder / "checkpoints")
    _log.info("weights of %s, step %d", path, payload["step"])
    return dataclasses.replace(built, step=payload["step"], finished=payload["step"] >= built.setup.steps)


def served_by(built: Built, arch: Arch) -> dict[str, str]:
    """{"supernet": whose weights serve ``arch``} of a run with several; {} of others."""
    return {"supernet": built.tree.server(arch).called} if isinstance(built.tree, Tree) else {}


def recipe_of_run(folder: Path) -> dict[str, Any]:
    """The recipe that a run of ``nas search`` followed. UsageError for other folders."""
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} is not a run folder: it lacks config.yaml. Give what nas search wrote, or a recipe.")
    recipe = read(folder / "config.yaml")
    if "python" in recipe:
        raise UsageError(f"{folder} was searched from Python, on data that only your script has: call found.bundle(out) there.")
    if "space" not in recipe:
        raise UsageError(f"{folder} is not a search: config.yaml names no space. A retrained network is in {folder}/bundle.")
    return recipe


def arch_of(
    name: str, folder: Path | None, built: Built, verb: str, overrides: Sequence[str] = ()
) -> tuple[Arch, dict[str, Any]]:
    """The architecture that ``--arch`` names, and its metrics where a file states them. ``verb``: the command, and its
    ``overrides``, for what to say of a supernet in a tree that does not hold the architecture."""
    place = None if folder is None else place_of(folder)
    if place is None:
        return _named(name, folder, built, built.space)
    if name == "derived" and not (place.folder / "arch.json").is_file():
        raise UsageError(underived(place, verb, built.searcher is not None))
    arch, metrics = _named(name, folder, built, built.space.root)
    try:
        built.space.check(arch)
    except ValueError as error:
        raise UsageError(_elsewhere(place, arch, verb, overrides, str(error))) from None
    return arch, metrics


def _elsewhere(place: Place, arch: Arch, verb: str, overrides: Sequence[str], why: str) -> str:
    """Which supernet of the tree around ``place`` serves ``arch``; ``why`` where none does."""
    built, config = load_source(str(place.root), overrides, weights=False)[1:]
    if built.split is None or not holds(built.space, arch):
        return f"{place.folder}: {why}"
    return elsewhere(place, Tree(built, built.split, place.root, config["epochs"], config["seed"]), arch, verb, why)


def _named(name: str, folder: Path | None, built: Built, expect: SearchSpace) -> tuple[Arch, dict[str, Any]]:
    """``arch_of``; what a file or text says must be of ``expect``."""
    space = built.space
    if name in ("largest", "smallest"):
        return (space.largest() if name == "largest" else space.smallest()), {}
    if name.startswith("random:"):
        seed, _, share = name[7:].partition("@")
        if not seed.isdigit():
            raise UsageError(f"--arch {name}: the seed must be a whole number, for instance random:1 or random:1@55%.")
        return (random_near(built, int(seed), share) if share else space.sample(random.Random(int(seed)))), {}
    if name == "derived":
        if folder is None:
            raise UsageError("--arch derived needs a run folder. Allowed for a recipe: FILE, largest, smallest, random:SEED.")
        if not (folder / "arch.json").is_file():
            run = shlex.quote(str(folder))
            raise UsageError(f"{folder} has no arch.json yet: finish it with nas search {run}/config.yaml --resume auto --out "
                             f"{run}.")  # fmt: skip
        name = str(folder / "arch.json")
    if not os.path.isfile(name):  # False too for what is too long to be a path
        return written(name, expect), {}
    file = read_arch(name)
    if file.space["name"] == space.name and file.space["args"] != space.args:
        return resized(name, file, space.root), {}
    file = read_arch(name, expect=expect)
    return dict(file.arch), dict(file.metrics)


def written(text: str, space: SearchSpace) -> Arch:
    """The architecture that ``text`` writes down or names (``space.parse``)."""
    try:
        arch = space.parse(text)
    except ValueError as error:
        if any(sign in text for sign in " :=|"):
            raise UsageError(f"--arch: {error}") from None
        raise UsageError(f"--arch {text}: there is no such file. Allowed: arch.json, derived, largest, smallest, random:SEED, "
                         f"or the text of an architecture of {space.name}.") from None  # fmt: skip
    space.check(arch)
    return arch


def resized(name: str, file: ArchFile, space: SearchSpace) -> Arch:
    """The arch of a file that was written for ``space`` with other args, where its choices are the same: a genotype, say,
    in another number of channels and cells. ValueError where they are not."""
    try:
        other = type(space)(**file.space["args"])
    except (TypeError, ValueError):
        other = None
    if other is None or other.choices != space.choices or other.hash != file.space["hash"]:
        return dict(read_arch(name, expect=space).arch)  # refuses, and says what differs
    space.check(file.arch)
    _log.info("%s is of %r; the network is made in %r, which has the same choices", name, other, space)
    return dict(file.arch)


def random_near(built: Built, seed: int, amount: str, tolerance: float = 0.05, tries: int = 1_000_000) -> Arch:
    """The first of uniform random architectures whose MACs lie within ``tolerance`` of ``amount`` ("55%", or MACs)."""
    target = budget(amount, built.costs, built.space, f"--arch random:{seed}@{amount}")
    rng = np.random.default_rng(seed)
    for _ in range(tries // 50_000):
        codes = built.space.random_codes(rng, 50_000)
        hits = np.flatnonzero(np.abs(built.costs.batch(codes) - target) <= tolerance * target)
        if len(hits):
            return built.space.decode(codes[hits[:1]])[0]
    raise UsageError(f"--arch random:{seed}@{amount}: none of {tries:,} random architectures is within {tolerance:.0%} of it.")
