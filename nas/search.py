"""A search from start to end: train a supernet by its strategy, pick, write arch.json; and the bundle of what was found.

From Python, on your own images and without a recipe:

    data = from_dataset(MyImages(), classes=["cat", "dog"], batch_size=64, valid_fraction=0.5)
    net = ResNet(CifarResNet(depth=20), channels=data.shape[0], classes=len(data.classes))
    found = search(data, net, TAS(target="55%"), epochs=30, out="runs/mine")      # beside=8: random search, too
    found.bundle("runs/mine/bundle")

Strategies that sample (weights shared by all subnets, no belief of which is good) name a searcher that picks when the training
is over: ``searcher=Evolution(), select=Select(macs_at_most="40%")``.
"""
from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from nas import ranks
from nas.beside import NONE, Beside, compare, words
from nas.build import Built, arch_file, device_of, gather
from nas.bundle import prove, write_bundle
from nas.checkpoint import Stateful
from nas.data import Data
from nas.engine import Act, Outcome, seed_from, signals
from nas.evaluate import score_plain, statistics_of
from nas.feed import Loaders
from nas.importance import importances
from nas.limits import Select
from nas.losses import CrossEntropy
from nas.picks import Picks
from nas.protocols import Searcher, Strategy
from nas.ranking.during import RankJudge, known_truth
from nas.ranking.section import UNRANKED, Rank
from nas.recalibrate import install
from nas.report import against_budget, report, settings, write_whole
from nas.run import Run
from nas.select import Picked, draw, prepare, select, write
from nas.splits import grow
from nas.splits.split import Split
from nas.splits.tree import Tree
from search_spaces.arch import ArchFile, read_arch, write_arch
from search_spaces.space import Arch
from supernets.elastic import Normalise
from supernets.extract import extract

_log = logging.getLogger("nas")


class Found(NamedTuple):
    """What a search found: ``arch`` is the content of ``folder``/arch.json, ``random`` that of random.json, where asked."""

    folder: Path
    arch: ArchFile
    built: Built
    config: dict[str, Any]
    random: dict[str, Any] | None = None

    def bundle(self, out: str | Path, inherit: bool = True, onnx: bool = False, pt2: bool = False) -> Path:
        """The plain network as a folder (nas/bundle.py), proven as ``nas extract`` does. Raises like ``bundle``."""
        return bundle(self.built, self.arch.arch, dict(self.arch.metrics), self.config, Path(out), inherit=inherit,
                      trained=True, onnx=onnx, pt2=pt2)[0]  # fmt: skip


def search(
    data: Data | Loaders, net: Any, strategy: Strategy, *, epochs: int, out: str | Path, seed: int = 1,
    device: str = "auto", loss: CrossEntropy | None = None, resume: str = "auto", every: int = 1, gap: bool = True,
    beside: int = 0, searcher: Searcher | None = None, limits: Select | None = None, split: Split | None = None,
    rank: Rank = UNRANKED,
) -> Found:  # fmt: skip
    """``nas search`` for objects of your own: trains ``net`` over ``net.space`` in the run folder ``out``.

    ``net``: a Supernet, trained from the weights it has. ``every``: epochs between readings of the derived architecture,
    with ``gap`` of the mixture too. ``beside``: random networks to train at equal cost afterwards (nas/beside.py).
    ``searcher``: picks within ``limits`` when the training is over; default: what the strategy derives. ``split``: how the
    supernet becomes several (nas/splits). ``rank``: known accuracies that its own are compared with on the way.
    ``resume``: "auto" goes on where a killed run of ``out`` stopped. Ctrl-C and SIGTERM save, then raise SystemExit.
    Raises ValueError where the parts do not fit, before a folder is made.
    """
    if epochs < 1 or every < 1:
        raise ValueError(f"epochs = {epochs}, every = {every}. Allowed: 1 or more.")
    place = device_of(device)
    group = ranks.start(place)
    # Loaders answers what Data does; only recipes build Data from arguments.
    built = gather(cast(Data, data), net.to(place), strategy, loss or CrossEntropy(), epochs=epochs, seed=seed,
                   device=place, group=group, searcher=searcher, select=limits, split=split)  # fmt: skip
    rehearse(built, Beside(beside), rank)
    space = {"name": net.space.name, "args": net.space.args}
    values = json.loads(json.dumps(vars(strategy), default=str))
    ranked = {} if rank.truth is None else {"rank": repr(rank)}
    config = {"python": {"space": space, "strategy": {type(strategy).__qualname__: values}, "data": data.describe(),
                         "searcher": searcher and settings(searcher), "limits": repr(limits), "split": repr(split), **ranked},
              "epochs": epochs, "seed": seed, "every": every, "gap": gap}  # fmt: skip
    run = Run(out, config, device=place, ranks=group, resume=resume)
    try:
        ended = train(built, run, config, seed=seed, every=every, gap=gap, beside=Beside(beside), rank=rank)
    finally:
        run.close()
    if ended.outcome.reason != "done":
        raise SystemExit(ended.outcome.exit)
    path, random = json.loads(ranks.share(json.dumps([str(ended.path), ended.random])))
    if built.split is not None:
        built = Tree(built, built.split, run.folder, epochs, seed).trained()
    return Found(run.folder, read_arch(path), built, config, random)


def rehearse(built: Built, beside: Beside, rank: Rank = UNRANKED) -> None:
    """ValueError for what does not fit, before a folder is made: the strategy's budget, the searcher's limits, a split that
    picks would read, more random networks than there are steps for them, splits of the supernet, known accuracies."""
    built.data.reads("select")
    if rank.truth is not None:
        if built.split is not None:
            raise ValueError(f"rank.truth = {rank.truth}: a run with splits is ranked when it has all its supernets, by nas "
                             "rank RUN --truth. Leave one of the two out.")  # fmt: skip
        known_truth(rank, built)
    strategy = copy.copy(built.strategy)
    strategy.start(built.setup)
    _drawable(built, strategy)
    if built.split is not None:
        if beside.networks:
            raise ValueError(f"beside.random = {beside.networks}: what a run with splits costs is not known before its end. "
                             "Leave one of the two out.")  # fmt: skip
        grow.rehearse(Tree(built, built.split, Path(), epochs_of(built), 0))
    if built.searcher is not None:
        prepare(built, copy.copy(built.searcher), built.select)
    beside.length(built, strategy)


def _drawable(built: Built, strategy: Strategy) -> None:
    """ValueError where images are to be drawn by importance and cannot be, or would starve."""
    images = importances(strategy)[1]
    if images is None or images.options is None:
        return
    if isinstance(built.data, Loaders):
        raise ValueError("images drawn by importance: your own loaders keep an order of their own. Use nas.data.from_dataset, "
                         "or leave it out (PA&DA: data: false; others: images: null).")  # fmt: skip
    if built.data.subset is not None and built.data.subset < 1 and not images.options.carry:
        raise ValueError(f"data.subset = {built.data.subset}: an epoch meets few of the images, and those that it does not "
                         "meet would hardly be drawn again. Set carry: true, which keeps their importance, or leave one out.")


class Ended(NamedTuple):
    """How a run ended. Main rank: ``path`` of arch.json where the search is done, ``random`` where random search is too."""

    outcome: Outcome
    path: Path | None = None
    random: dict[str, Any] | None = None


def train(
    built: Built, run: Run, config: Mapping[str, Any], *, seed: int, every: int = 1, images: int | None = None,
    bn_images: int = 2000, gap: bool = True, beside: Beside = NONE, rank: Rank = UNRANKED,
    max_time: float | None = None,
) -> Ended:  # fmt: skip
    """Trains in the folder of ``run``, writes arch.json and report.md; then ``beside``, random.json and the report anew.

    ``every``: epochs between readings on ``images`` of the select split, after ``bn_images`` recalibrated batch norms;
    ``gap``: of the mixture too. ``rank``: what else is read on the way. ``max_time``: seconds for all of it.
    """
    if built.split is not None:
        return _grown(built, run, config, seed, grow.Reading(every, images, bn_images, gap), max_time)
    began = time.monotonic()
    if built.ranks.main:
        _log.info("%s in %s", f"resuming at step {run.start}" if run.start else "starting", run.folder)
    feed = built.data.feed(seed, built.device, built.ranks.rank, built.ranks.world)
    picks = Picks(built.space, built.data, built.device, run.log, built.ranks, images, bn_images, gap,
                  derive=built.searcher is None)  # fmt: skip
    acts: list[tuple[int, Act]] = [(every * built.setup.epoch_steps, picks)]
    keep: dict[str, Stateful] = {"picks": picks}
    judge = None
    if rank.truth is not None and built.ranks.main:
        judge = keep["rank"] = RankJudge(rank, built, run.log)
        acts += judge.acts
    outcome = run.fit(built.strategy, built.setup, feed, seed=seed, every=acts, max_time=max_time, keep=keep)
    if outcome.reason != "done":
        return _stop(built, run, outcome, "")
    ranking = judge.conclude(run.folder) if judge else ""
    chosen, reason = None, ""
    if built.ranks.main and built.searcher is not None:
        picked = _select(built, built.searcher, config, run.folder, _left(max_time, began))
        if isinstance(picked, str):
            reason = picked
        else:
            chosen = _picked(built, picks, config, run.folder, picked, ranking=ranking)
    elif built.ranks.main:
        chosen = conclude(built, picks, config, run.folder, ranking)
    if beside.networks and built.searcher is not None:
        reason = ranks.share(reason)
    if reason:
        return _stop(built, run, outcome._replace(reason=reason), " while it picked")
    path = run.folder / "arch.json" if chosen else None
    if not beside.networks:
        return Ended(outcome, path)
    arch = json.loads(ranks.share(json.dumps(chosen["arch"] if chosen else None)))
    outcome, random = compare(built, arch, beside, config, run.folder, seed=seed, images=images, bn_images=bn_images,
                              max_time=_left(max_time, began))  # fmt: skip
    if outcome.reason != "done":
        return _stop(built, run, outcome, " of random search")._replace(path=path)
    if random and chosen:
        write_whole(run.folder / "random.json", json.dumps(random, indent=2) + "\n")
        _report(built, picks, config, run.folder, chosen, random, ranking=ranking)
        _log.info("random.json: %s", words(random))
    return Ended(outcome, path, random)


def _grown(
    built: Built, run: Run, config: Mapping[str, Any], seed: int, reading: grow.Reading, max_time: float | None
) -> Ended:
    """Trains and splits (nas/splits), then picks among all leaves, and writes what ``train`` does."""
    assert built.split is not None
    began, tree = time.monotonic(), Tree(built, built.split, run.folder, epochs_of(built), seed)
    outcome = grow.grow(tree, run, config, reading, max_time)
    if outcome.reason != "done":
        return _stop(built, run, outcome, "")
    if not built.ranks.main:
        return Ended(outcome)
    built.strategy.start(built.setup)  # for its budget: the leaves have strategies of their own
    built = tree.trained()
    found = grow.leaves(tree)
    leaf = grow.choose(found)
    picked: Picked | str = ""
    if built.searcher is not None:
        picked = _select(built, built.searcher, config, run.folder, _left(max_time, began))
        if isinstance(picked, str):
            return _stop(built, run, outcome._replace(reason=picked), " while it picked")
        leaf = next(one for one in found if one.node.path == tree.leaf(picked.best.arch).path)
    picks = Picks(built.space, built.data, built.device, run.log, built.ranks, derive=built.searcher is None)
    picks.load_state_dict(leaf.picks)
    splits = grow.told(tree, found, leaf)
    if isinstance(picked, Picked):
        _picked(built, picks, config, run.folder, picked, splits)
    else:
        row = leaf.row
        if not row["fits"]:
            _log.warning("no leaf derived an architecture within the tolerance of the budget: arch.json misses it")
        if leaf.picks["last"]["step"] != row["step"]:
            _write(built, leaf.picks["last"], config, run.folder / "arch-last.json")
        file = _write(built, row, config, run.folder / "arch.json")
        _report(built, picks, config, run.folder, row, splits=splits)
        _say(built, file, row)
    return Ended(outcome, run.folder / "arch.json")


def epochs_of(built: Built) -> int:
    return built.setup.steps // built.setup.epoch_steps


def _left(max_time: float | None, began: float) -> float | None:
    """The seconds that are left of ``max_time`` since ``began``; None: as many as it takes."""
    return None if max_time is None else max(max_time - (time.monotonic() - began), 1e-6)


def _stop(built: Built, run: Run, outcome: Outcome, where: str) -> Ended:
    if built.ranks.main:
        _log.info("stopped (%s) after step %d%s; continue with --resume auto --out %s", outcome.reason, outcome.step, where,
                  run.folder)  # fmt: skip
    return Ended(outcome)


def stopped(run: Run, outcome: Outcome) -> dict[str, Any]:
    """What ``--json`` prints of a run that was stopped before its end."""
    return {"run": str(run.folder), "stopped": outcome.reason, "step": outcome.step}


def conclude(built: Built, picks: Picks, config: Mapping[str, Any], folder: Path, ranking: str = "") -> dict[str, Any]:
    """Writes arch.json (the last architecture, as published; the best one where the last misses the budget),
    arch-best.json and report.md. Returns what arch.json holds: {"arch", "metric", "fits", ...}."""
    if picks.last is None or picks.last["step"] != built.setup.steps - 1:
        picks.look(built.setup.steps - 1, built.setup.steps, built.strategy)
    last, best = picks.last, picks.best
    assert last is not None
    chosen = last
    if not last["fits"]:
        if best is None:
            _log.warning("no derived architecture came within the tolerance of the budget: arch.json misses it. "
                         "Train longer, or raise the rate of the alphas (alpha_lr of TAS, else alphas.lr).")
        else:
            _log.warning("the last architecture misses the budget: arch.json holds the best one that meets it")
            chosen = best
            _write(built, last, config, folder / "arch-last.json")
    file = _write(built, chosen, config, folder / "arch.json")
    if best is not None:
        _write(built, best, config, folder / "arch-best.json")
    _report(built, picks, config, folder, chosen, ranking=ranking)
    _say(built, file, chosen)
    return chosen


def _select(built: Built, searcher: Searcher, config: Mapping[str, Any], folder: Path, left: float | None) -> Picked | str:
    """What ``searcher`` picks, or why it was stopped: a signal, or the end of the ``left`` seconds. The main rank alone."""
    _log.info("%s picks: at most %s subnets", type(searcher).__name__, built.select.evaluations or "any number of")
    with signals(left) as stop:

        def due() -> str | None:
            """``stop`` without a vote: the other ranks have nothing to do."""
            late = stop.deadline is not None and time.monotonic() >= stop.deadline
            return stop.reason or ("time" if late else None)

        return select(built, searcher, built.select, folder, config, built.step or built.setup.steps, due)


def _picked(
    built: Built, picks: Picks, config: Mapping[str, Any], folder: Path, found: Picked, splits: str = "",
    ranking: str = "",
) -> dict[str, Any]:
    """Writes arch.json, pareto.csv, pareto.png and report.md for what a searcher picked; what ``conclude`` returns."""
    end = built.setup.steps - 1
    if built.tree is None and (not picks.history or picks.history[-1]["step"] != end):
        picks.look(end, built.setup.steps, built.strategy)
    file = write(built, found, built.select, config, folder / "arch.json")
    draw(built, found, folder)
    arch = found.best.arch
    chosen = {"arch": arch, "metric": file.metrics["top1"], "step": end, "fits": built.trained.fits(arch), **found.said,
              "front": found.front}  # fmt: skip
    _report(built, picks, config, folder, chosen, splits=splits, ranking=ranking)
    _log.info("%s scored %d subnets, %d of them now; %d are on the front", found.said["searcher"], found.asked, found.fresh,
              len(found.front))  # fmt: skip
    _say(built, file, chosen)
    return chosen


def _say(built: Built, file: ArchFile, chosen: Mapping[str, Any]) -> None:
    """arch.json in one line, and in another what it costs beside the strategy's budget."""
    full = built.prices(built.space.root.largest())
    norms = ", recalibrated batch norm" if any(isinstance(module, Normalise) for module in built.net.modules()) else ""
    serves = (f"weights of {built.tree.server(chosen['arch']).called}" if isinstance(built.tree, Tree)
              else "supernet's weights")  # fmt: skip
    _log.info("arch.json: %s MACs (%.1f%% of the largest), %s parameters (%.1f%%), %s top-1 %.4f on %d images, "
              "in the %s%s", f"{file.costs['macs']:,}",
              100 * file.costs["macs"] / full["macs"], f"{file.costs['params']:,}",
              100 * file.costs["params"] / full["params"], chosen["metric"]["split"], chosen["metric"]["value"],
              chosen["metric"]["n"], serves, norms)  # fmt: skip
    if built.budget is not None:
        _log.info("%s", against_budget(built.budget, chosen["arch"]))


def _write(built: Built, pick: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> ArchFile:
    file = arch_file(built, pick["arch"], {"top1": pick["metric"]}, config)
    write_arch(path, file, built.space)
    return file


def _report(
    built: Built, picks: Picks, config: Mapping[str, Any], folder: Path, chosen: Mapping[str, Any],
    random: Mapping[str, Any] | None = None, splits: str = "", ranking: str = "",
) -> None:  # fmt: skip
    write_whole(folder / "report.md", report(built, picks, chosen, config, folder, random, splits, ranking))


def bundle(
    built: Built, arch: Arch, metrics: dict[str, Any], config: Mapping[str, Any], out: Path, *, inherit: bool,
    trained: bool, bn_images: int = 2000, onnx: bool = False, pt2: bool = False,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Recalibrate, extract, prove (law 6), write: the folder ``out`` and its report.

    ``inherit``: with the supernet's weights, else fresh ones. ``trained``: the strategy has been started, its network
    serves ``arch``. Raises ValueError where weights cannot be inherited or ``out`` is in use, RuntimeError where the plain
    network is not what the supernet and its cost table say.
    """
    net = built.trained.network(arch) if trained else built.net
    x = next(iter(built.data.batches("train", built.device, batch_size=8))).x
    reference = None
    if inherit:
        extract(net, arch, x)  # refuses early what cannot be inherited
        install(net, statistics_of(net, [arch], built.data, built.device, bn_images)[0])
    net.eval()
    with torch.no_grad():
        graph = extract(net, arch, x, inherit=inherit, seed=seed_from(config["seed"], "fresh"))
        if inherit:
            reference = type(net).forward(net, x, arch)  # in float32, whatever precision the run trains in
    predicted = {name: int(cost) for name, cost in built.prices(arch).items() if name in ("macs", "params")}
    report = prove(graph, x, predicted, reference)
    if trained and inherit and built.data.holds("select"):
        scores = score_plain(graph, built.data, "select", built.device)
        metrics = {"top1": {"value": scores.top1, "split": built.data.reads("select"), "n": scores.n,
                            "weights": "inherited", "bn": "recalibrated"}}  # fmt: skip
    kept = ("data", "loss", "retrain", "seed", "precision", "channels_last")
    report["recipe"] = {key: config[key] for key in kept if key in config}
    file = arch_file(built, arch, metrics if inherit else {}, config)
    write_bundle(out, graph.cpu(), file, report, x.cpu(), onnx=onnx, pt2=pt2, space=built.space)
    return out, report
