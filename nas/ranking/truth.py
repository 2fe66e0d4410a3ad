"""Truth by training: random architectures of a run's space, each trained alone from fresh weights, for ``nas rank --truth``.

    path = trained_truth(folder, built, config, networks=20, epochs=30, seed=1, out=folder / "truth")

    OUT/truth.csv       arch, top1, n, macs, seed, epochs: one row for each network that is trained
    OUT/truth.json      how they are trained and read
    OUT/networks/000    the run of each network; its checkpoints are deleted when its row is written

Each is trained as ``nas retrain --from scratch --epochs E --seed S`` trains it, by the run's section ``retrain``, but on the
images that the search itself trained its weights on, and is read on a split that the search held out: ``select`` by default,
which the ranking of the run reads as well. So neither a network nor the supernet's weights were trained on what they are
compared by, whatever a published retraining adds to the training images (alphas were, where ``select`` is ``valid``).
"""
from __future__ import annotations

import csv
import io
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from tqdm import tqdm

from nas import checkpoint
from nas.alone import base_of, network_for, prepared
from nas.build import Built, arch_file, data_of
from nas.data import Data
from nas.engine import Outcome, seed_from, signals
from nas.evaluate import Scores, score_plain
from nas.ranking.statistics import FEWEST
from nas.ranking.tables import read_table
from nas.recipe import parse, plain_config, retrain_parser
from nas.report import write_whole
from nas.run import Run
from search_spaces.arch import ArchFile
from search_spaces.space import Arch, SearchSpace

_log = logging.getLogger("nas")
COLUMNS = ("arch", "top1", "n", "macs", "seed", "epochs")
TABLE, ABOUT, NETWORKS = "truth.csv", "truth.json", "networks"
SPLITS = ("select", "valid", "test")
HELD_OUT = ("name", "root", "limit", "size", "valid_fraction", "select_fraction", "split_seed")
"""Of the data: which images are held out, and their size. As in the search, whatever its section ``retrain`` says."""
UNREAD = ("workers", "download")
"""Of the data: what changes no result."""
TRIES = 100  # random architectures, times those found so far, of which none is new: then the space holds no more


def trained_truth(
    folder: Path, built: Built, config: Mapping[str, Any], *, networks: int, epochs: int, seed: int, out: Path,
    split: str = "select",
) -> Path:  # fmt: skip
    """The CSV file in the folder ``out``, when ``networks`` architectures of ``built.space`` are trained for ``epochs`` each.

    ``folder``: of the run, ``config``: its recipe. ``seed``: of the draw, and of each training; the first networks of a larger
    number are those of a smaller one. What is in the file is not trained again, and what was begun goes on. Ctrl-C and SIGTERM
    save, then raise SystemExit. ValueError, before ``out`` is made, for what does not fit, and where ``out`` holds other truth.
    """
    _check(folder, built, config, networks, split)
    settings = settings_of(config, epochs, seed)
    archs = {built.space.text(arch): arch for arch in drawn(built.space, networks, seed)}
    data = data_of(settings)
    if data.shape != built.data.shape or list(data.classes) != list(built.data.classes):
        raise ValueError(f"retrain.data: images {data.shape} of {len(data.classes)} classes; {folder} searched for "
                         f"{built.data.shape} and {len(built.data.classes)}. Leave them as in the search.")  # fmt: skip
    about = _about(built, settings, data.reads(split))
    files = {text: arch_file(built, arch, {}, config) for text, arch in archs.items()}
    prepared(network_for(next(iter(files.values())), settings), settings, data, built.device)  # refuses what does not fit
    rows = _begun(out, about)
    times: list[float] = []
    with signals() as stop:
        for i, (text, file) in enumerate(files.items()):
            if text in rows:
                continue
            _log.info("network %d of %d, alone for %d epochs: %s", i + 1, networks, epochs, text)
            began = time.monotonic()
            place = out / NETWORKS / f"{i:03d}"
            outcome, scores = alone(file, settings, data, built.device, split, place, {**about, "arch": text}, stop)
            if scores is None:
                _log.info("stopped (%s) at network %d of %d; the same command goes on there", outcome.reason, i + 1, networks)
                raise SystemExit(outcome.exit)
            rows[text] = [repr(scores.top1), str(scores.n), str(file.costs["macs"]), str(seed), str(epochs)]
            _write(out / TABLE, rows)
            shutil.rmtree(place / "checkpoints")
            times.append(time.monotonic() - began)
            left = tqdm.format_interval(sum(times) / len(times) * sum(text not in rows for text in archs))
            _log.info("network %d of %d: top-1 %.4f on %d %s images; about %s left", i + 1, networks, scores.top1, scores.n,
                      about["split"], left)  # fmt: skip
    return out / TABLE


def alone(
    file: ArchFile, settings: Namespace, data: Data, device: torch.device, split: str, place: Path, said: Mapping[str, Any],
    stop: Callable[[], str | None],
) -> tuple[Outcome, Scores | None]:  # fmt: skip
    """Trains the network of ``file`` in the folder ``place``, or goes on there. Its scores with the running statistics of its
    training; None where ``stop`` ended it before."""
    strategy, setup, feed = prepared(network_for(file, settings), settings, data, device)
    run = Run(place, said, device=device, exact=True)
    try:
        outcome = run.fit(strategy, setup, feed, seed=settings.seed, stop=stop)
    finally:
        run.close()
    if outcome.reason != "done":
        return outcome, None
    return outcome, score_plain(strategy.network({}), data, split, device)


def drawn(space: SearchSpace, networks: int, seed: int) -> list[Arch]:
    """Random architectures, distinct by ``space.key``. ValueError where the space does not hold as many."""
    rng, found, tries = random.Random(seed_from(seed, "truth")), dict[Any, Arch](), 0
    while len(found) < networks:
        arch = space.sample(rng)
        key = space.key(arch)
        tries = tries + 1 if key in found else 0
        found.setdefault(key, arch)
        if tries > TRIES * len(found):
            raise ValueError(f"{networks} different networks: {space!r} holds {len(found)}, as far as random ones show. Ask "
                             "for fewer.")  # fmt: skip
    return list(found.values())


def settings_of(config: Mapping[str, Any], epochs: int, seed: int) -> Namespace:
    """How each network is trained: what retraining of a run by the recipe ``config`` says, with the search's own images."""
    base, own = base_of(config), config["data"]
    kept = {key: value for key, value in base["data"].items() if key not in HELD_OUT}
    base["data"] = {**kept, **{key: own[key] for key in HELD_OUT if key in own}}
    return parse(retrain_parser(), base, [f"--epochs={epochs}", f"--seed={seed}"])


def _check(folder: Path, built: Built, config: Mapping[str, Any], networks: int, split: str) -> None:
    if "data" not in config:
        raise ValueError(f"{folder} was searched from Python, on data that only your script has: its networks cannot be "
                         "trained here. Give a table of known accuracies.")  # fmt: skip
    if networks < FEWEST:
        raise ValueError(f"{networks} networks are too few to train for a truth: a ranking needs {FEWEST} or more.")
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: networks are trained on the others. Allowed: {', '.join(SPLITS)}.")
    if built.ranks.world > 1:
        raise ValueError(f"networks are trained alone by one process, and {built.ranks.world} were started. Start it without "
                         "torchrun.")  # fmt: skip


def _about(built: Built, settings: Namespace, split: str) -> dict[str, Any]:
    """What a row depends on, beside the architecture."""
    root, recipe = built.space.root, plain_config(retrain_parser(), settings)
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in UNREAD}
    part = {choice.name: list(choice.options) for choice in built.space.choices if choice.options != root[choice.name].options}
    about = {"space": {"name": root.name, "args": root.args, "hash": root.hash, "part": part}, "split": split, **recipe}
    return json.loads(json.dumps(about))


def _begun(out: Path, about: Mapping[str, Any]) -> dict[str, list[str]]:
    """The rows that ``out`` holds by their text; it is made where there is none. ValueError where it holds something else."""
    said, table = out / ABOUT, out / TABLE
    if said.is_file():
        try:
            stored = json.loads(said.read_text(encoding="utf-8"))
            checkpoint.check_config(stored, about, said)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{said} cannot be read: {error}. Choose another folder, or delete this one.") from None
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty, and holds no truth by training. Choose another folder, or empty it.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(said, json.dumps(about, indent=2) + "\n")
    if not table.is_file():
        return {}
    found = read_table(str(table))
    for name in COLUMNS:
        found.require(name, "column")
    return {text: cells for text, *cells in zip(*(found.columns[name] for name in COLUMNS))}


def _write(path: Path, rows: Mapping[str, list[str]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows([arch, *row] for arch, row in rows.items())
    write_whole(path, text.getvalue())
