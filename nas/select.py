"""Picking from a trained supernet under limits: a searcher asks, subnets are read, every reading is kept.

    found = select(built, searcher, built.select, folder, config, step)
    write(built, found, folder / "picks" / "mine.json")

A subnet's score is its top-1 on the select split with batch norms recalibrated for it, in the weights that serve it. In the
run's folder, ``picks`` holds the scores (nas/scores.py: another budget reads only what no earlier one did), the state of each
searcher (a killed selection goes on where it was, and ends like one that was not), TensorBoard events and the picks.
"""
from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from nas import checkpoint
from nas.build import Built, arch_file
from nas.evaluate import score_served
from nas.front import hypervolume, on_front, picture, table
from nas.limits import Select
from nas.protocols import Found, Searcher
from nas.report import settings, write_whole
from nas.scores import Score, ScoreFile
from search_spaces.arch import ArchFile, write_arch

_log = logging.getLogger("nas")
AT_ONCE = 16
"""Subnets whose statistics are held at once: the recalibration images are loaded once for all of them."""
FOLDER = "picks"
SHOWN = 10.0
"""Seconds between lines of progress."""
UNREAD = ("workers", "download")
"""Settings of the data that change no reading."""

Stop = Callable[[], "str | None"]
"""Asked after every few subnets: the reason to stop, or None."""


class Picked(NamedTuple):
    """What a searcher picked. ``asked``: subnets scored for it, ``fresh`` of them read now, the others known before.
    ``about``: what the scores depend on. ``front``: of what was scored, by MACs."""

    best: Found
    score: Score
    asked: int
    fresh: int
    front: list[Found]
    scores: ScoreFile
    said: dict[str, Any]


def prepare(built: Built, searcher: Searcher, limits: Select) -> None:
    """Starts ``searcher`` in the space of ``built``. ValueError where no architecture was found that meets the limits."""
    tables = limits.tables(built.costs)
    searcher.start(built.space, tables, limits.limits(tables, built.space))


def select(
    built: Built, searcher: Searcher, limits: Select, folder: Path, config: Mapping[str, Any], step: int,
    stop: Stop = lambda: None,
) -> Picked | str:  # fmt: skip
    """Runs ``searcher`` to its end, or for ``limits.evaluations`` subnets; the reason where ``stop`` gave one before.

    ``built``: its strategy holds the weights after ``step`` steps. ``folder``: of the run. ``config``: the recipe.
    Raises ValueError where nothing meets the limits, RuntimeError where the searcher asks for nothing.
    """
    prepare(built, searcher, limits)
    scores = ScoreFile(folder / FOLDER, built.space, about(built, limits, config, step))
    state = folder / FOLDER / f"{limits.named()}.pt"
    asked, fresh = _resume(searcher, limits, scores, state), 0
    most = math.inf if limits.evaluations is None else limits.evaluations
    shown = time.monotonic()
    writer = SummaryWriter(str(folder / FOLDER / "events" / limits.named()), purge_step=asked)
    try:
        while asked < most and len(codes := searcher.ask(int(min(AT_ONCE, most - asked)))):
            read = _read(built, scores, codes, limits)
            searcher.tell(codes, [score.top1 for score in scores.of(codes) if score is not None])
            asked, fresh = asked + len(codes), fresh + read
            if read:
                checkpoint.write(state, {"about": scores.about, "asked": asked, "searcher": searcher.state()})
                _note(writer, built, searcher, asked)
            if time.monotonic() - shown > SHOWN:
                shown = time.monotonic()
                _log.info("%d subnets scored%s", asked, "" if most == math.inf else f" of at most {most:,}")
            if reason := stop():
                return reason
        best = searcher.best()
        if best is None:
            raise RuntimeError(f"{type(searcher).__name__} asked for no architecture, so there is none to pick.")
        _note(writer, built, searcher, asked)
    finally:
        writer.close()
    fresh += _read(built, scores, built.space.encode([best.arch]), limits)  # known, unless the file was deleted since
    best, score = _best(built, scores, limits)
    said = {"searcher": settings(searcher), "limits": limits.given(), "scored": asked, "step": step}
    return Picked(best, score, asked, fresh, searcher.front("macs"), scores, said)


def _best(built: Built, scores: ScoreFile, limits: Select) -> tuple[Found, Score]:
    """The highest top-1 that is known within the limits, whoever asked for it; of equal ones the lowest loss, then the fewest
    MACs."""
    tables = limits.tables(built.costs)
    codes, found = scores.all()
    met = built.space.lawful(codes)
    for price, low, high in limits.limits(tables, built.space):
        cost = tables[price].batch(codes)
        met &= (cost >= low) & (cost <= high)
    macs = tables["macs"].batch(codes)
    ranked = sorted(np.flatnonzero(met).tolist(), key=lambda i: (
        -found[i].top1, math.inf if (loss := found[i].loss) is None else loss, macs[i]))  # fmt: skip
    for i in ranked:
        [arch] = built.space.root.decode(codes[[i]])
        if _holds(built, arch):
            costs = {price: table.batch(codes[[i]]).tolist()[0] for price, table in tables.items()}
            return Found(arch, found[i].top1, costs), found[i]
    raise RuntimeError("no score within the limits is known, though one was just read.")


def _holds(built: Built, arch: Mapping[str, Any]) -> bool:
    """Whether the space, which the recipe may restrict, holds ``arch``."""
    try:
        built.space.check(arch)
    except ValueError:
        return False
    return True


def about(built: Built, limits: Select, config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What a score depends on, beside the architecture."""
    split = built.data.reads("select")
    every = built.data.count(split)
    return {
        "step": step, "split": split, "images": min(limits.images or every, every), "bn_images": limits.bn_images,
        "batch_size": built.data.batch_size, "input": list(built.data.shape),
        "data": {key: value for key, value in config.get("data", {}).items() if key not in UNREAD},
        "splits": built.data.describe(),
        "precision": config.get("precision", "float32"), "seed": config["seed"],
    }  # fmt: skip


def metric(built: Built, found: Picked, limits: Select) -> dict[str, Any]:
    """The reading of the pick, as arch.json states it."""
    return {"value": found.score.top1, "split": built.data.reads("select"), "n": found.score.n, "weights": "supernet",
            "bn": "recalibrated", "bn_images": limits.bn_images}  # fmt: skip


def write(built: Built, found: Picked, limits: Select, config: Mapping[str, Any], path: Path) -> ArchFile:
    """The pick as an arch.json at ``path``; its provenance says by whom, under which limits, of how many."""
    file = arch_file(built, found.best.arch, {"top1": metric(built, found, limits)}, config)
    costs = {**file.costs, **{price: cost for price, cost in found.best.costs.items() if price not in file.costs}}
    file = dataclasses.replace(file, costs=costs, provenance={**file.provenance, **found.said})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arch(path, file, built.space)
    return file


def draw(built: Built, found: Picked, folder: Path) -> None:
    """pareto.csv and pareto.png in ``folder``: everything that has a score like the pick's, earlier selections included."""
    codes, scores = found.scores.all()
    tables = Select().tables(built.costs)
    macs, params = tables["macs"].batch(codes), tables["params"].batch(codes)
    top1 = np.array([score.top1 for score in scores])
    front = on_front(macs, top1)
    archs = (built.space.text(arch) for arch in built.space.root.decode(codes))
    rows = [[m, p, score.top1, score.loss, score.n, int(f), arch]
            for m, p, score, f, arch in zip(macs.tolist(), params.tolist(), scores, front, archs)]  # fmt: skip
    write_whole(folder / "pareto.csv", table(rows))
    picked = [(found.best.costs["macs"], found.score.top1)]
    figure = picture(macs, top1, picked, built.data.reads("select"))
    part = folder / ".pareto.png.part"
    figure.savefig(part, format="png", dpi=120)
    part.replace(folder / "pareto.png")


def _resume(searcher: Searcher, limits: Select, scores: ScoreFile, state: Path) -> int:
    """Puts ``searcher`` where a selection of the same kind stopped; how many subnets it had scored. What has not the same
    searcher, limits, space and weights begins anew, and so does one that went further than ``limits.evaluations``."""
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    if saved["about"] != scores.about or saved["asked"] > (limits.evaluations or saved["asked"]):
        return 0
    try:
        searcher.load(saved["searcher"])
    except ValueError as error:
        _log.info("%s is not continued: %s", state, error)
        return 0
    return saved["asked"]


def _read(built: Built, scores: ScoreFile, codes: np.ndarray, limits: Select) -> int:
    """Reads those of ``codes`` (N, M) that have no score, in the weights that serve them; how many."""
    unknown = codes[[score is None for score in scores.of(codes)]]
    if not len(unknown):
        return 0
    archs = built.space.decode(unknown)
    read = score_served(built.trained.network, archs, built.data, "select", built.device, limits.bn_images, limits.images)
    scores.add(unknown, [Score(one.top1, one.loss, one.n) for one in read])
    return len(unknown)


def _note(writer: SummaryWriter, built: Built, searcher: Searcher, asked: int) -> None:
    """TensorBoard, over the number of subnets scored."""
    front, best = searcher.front("macs"), searcher.best()
    assert best is not None
    full = float(built.costs.of(built.space.root.largest()))
    area = hypervolume([found.costs["macs"] for found in front], [found.score for found in front], full)
    for tag, value in (("front_size", len(front)), ("hypervolume", area), ("best", best.score)):
        writer.add_scalar(f"search/{tag}", value, asked)
