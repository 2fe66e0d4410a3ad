"""Random search beside any search, at equal cost: is what was found better than luck?

``networks`` random architectures share the image-passes of the search, a pass a step, each trained alone from fresh weights;
what the search found is trained alone too, in the same way and just as long, and all are read on the same images:

    length = search steps * passes of a search step // networks          steps of each network
    random.Random(trials=networks + 1, given=[found, random ones]), (networks + 1) * length steps

The random ones meet the strategy's own budget, as far as drawing at random finds such. The run is a folder of its own,
RUN/random, that goes on where it was killed, as every run does.
"""
from __future__ import annotations

import copy
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from nas.bilevel import Weights, weights_of
from nas.build import Built, arch_file
from nas.engine import Outcome, seed_from
from nas.evaluate import Scores, score_archs
from nas.log import RunLogs
from nas.protocols import Moment, Strategy
from nas.run import Run
from nas.strategies.random import Random
from search_spaces.arch import write_arch
from search_spaces.space import Arch

_log = logging.getLogger("nas")
FOLDER = "random"
DRAWS = 10_000  # random architectures asked whether they meet the budget, before one that does not is taken


class Beside(NamedTuple):
    """What is asked: ``networks`` random ones (0: none), trained by ``weights`` (None: as the strategy trains its own, where
    it says so by a field of that name, else as DARTS does)."""

    networks: int = 0
    weights: Weights | None = None

    def length(self, built: Built, strategy: Strategy) -> int:
        """Steps of each network beside a started ``strategy``. ValueError for a number of networks that is negative or more
        than the steps there are, and where they would be trained by several batches a step."""
        passes = round(built.setup.steps * strategy.passes())
        if not 0 <= self.networks <= passes:
            raise ValueError(f"beside.random = {self.networks} networks. Allowed: 0 (none) to {passes:,}, one for each pass of "
                             f"the search ({built.setup.steps:,} steps of {strategy.passes():g}).")  # fmt: skip
        if not self.networks:
            return 0
        self.trained(strategy).one_batch("beside.weights (the strategy's, where not given)")
        return passes // self.networks

    def trained(self, strategy: Strategy) -> Weights:
        """How each network is trained."""
        return self.weights or weights_of(strategy) or Weights()


NONE = Beside()


class Judge:
    """An act of the engine, every step: reads each network of a ``Random`` when its training ends, on the select split with
    recalibrated batch norms, all on the same images. Its state is part of the checkpoint."""

    def __init__(self, built: Built, log: RunLogs, images: int | None, bn_images: int) -> None:
        self.built, self.log, self.images, self.bn_images = built, log, images, bn_images
        self.rows: list[dict[str, Any]] = []  # {"arch", "top1", "n"}, the found one first

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        assert isinstance(strategy, Random)
        if self.built.ranks.main and len(strategy.scores) > len(self.rows):
            arch = dict(strategy.scores[-1]["arch"])
            scores = self.read(arch)
            self.log.now(now.step, {"select/top1": scores.top1, "select/loss": scores.loss})
            self.rows.append({"arch": arch, "top1": scores.top1, "n": scores.n})

    def read(self, arch: Arch) -> Scores:
        built = self.built
        return score_archs(built.net, [arch], built.data, "select", built.device, self.bn_images, self.images)[0]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = state["rows"]


def compare(
    built: Built, found: Arch, beside: Beside, config: Mapping[str, Any], folder: Path, *, seed: int,
    images: int | None = None, bn_images: int = 2000, max_time: float | None = None,
) -> tuple[Outcome, dict[str, Any] | None]:  # fmt: skip
    """Trains and reads ``found`` and the random ones in ``folder``/random, or goes on there.

    Returns how it ended, and on the main rank, where it is done, what was found (``conclude``). ValueError where another
    comparison was begun there.
    """
    length, weights = beside.length(built, built.strategy), beside.trained(built.strategy)
    drawn, misses = draw(built, beside.networks, seed)
    net = copy.deepcopy(built.net)  # trained as it is: every network of Random begins with a reset
    setup = built.setup._replace(net=net, steps=length * (beside.networks + 1))
    strategy = Random(trials=beside.networks + 1, judge=1, given=[found, *drawn], weights=weights)
    part = replace(built, net=net, strategy=strategy, setup=setup)
    said = {"search": dict(config), "random": {"networks": beside.networks, "steps": setup.steps, "weights": asdict(weights)},
            "found": found, "seed": seed}  # fmt: skip
    run = Run(folder / FOLDER, said, device=built.device, ranks=built.ranks, resume="auto")
    try:
        if built.ranks.main:
            _log.info("random search at equal cost: %d networks and the found one, %s steps each, in %s", beside.networks,
                      f"{length:,}", run.folder)  # fmt: skip
        judge = Judge(part, run.log, images, bn_images)
        feed = built.data.feed(seed, built.device, built.ranks.rank, built.ranks.world)
        outcome = run.fit(strategy, setup, feed, seed=seed, every=[(1, judge)], max_time=max_time, keep={"judge": judge})
    finally:
        run.close()
    if not built.ranks.main or outcome.reason != "done":
        return outcome, None
    passes = round(built.setup.steps * built.strategy.passes()) * built.data.batch_size
    return outcome, conclude(part, judge.rows, said, run.folder) | {"outside_budget": misses, "search_image_passes": passes}


def draw(built: Built, networks: int, seed: int) -> tuple[list[Arch], int]:
    """Random architectures that meet the budget of the (started) strategy, and how many of them do not: where none of
    ``DRAWS`` met it. The same on every rank and in every resumption."""
    found, misses = [], 0
    rng = random.Random(seed_from(seed, "beside"))
    for _ in range(networks):
        arch = built.space.sample(rng)
        for _ in range(DRAWS - 1 if misses == 0 else 0):
            if built.strategy.fits(arch):
                break
            arch = built.space.sample(rng)
        misses += not built.strategy.fits(arch)
        found.append(arch)
    return found, misses


def conclude(part: Built, rows: list[dict[str, Any]], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes arch.json of the best random one into ``folder``. Returns ``summary``, how the networks were trained and read,
    and ``networks``, the random ones."""
    length = part.setup.steps // len(rows)
    judged = {"split": part.data.reads("select"), "n": rows[0]["n"], "weights": "scratch", "bn": "recalibrated"}
    networks = [{"top1": row["top1"], **part.prices(row["arch"]), "text": part.space.text(row["arch"])} for row in rows]
    best = max(rows[1:], key=lambda row: row["top1"])
    file = arch_file(part, best["arch"], {"top1": {"value": best["top1"], **judged}}, config)
    write_arch(folder / "arch.json", file, part.space)
    return summary(networks) | {
        "judged": judged, "steps": length, "image_passes": length * (len(rows) - 1) * part.data.batch_size,
        "arch": str(folder / "arch.json"), "networks": networks[1:],
    }  # fmt: skip


def summary(networks: list[dict[str, Any]]) -> dict[str, Any]:
    """``networks``: top1 and costs, the found one first. ``rank``: 1 where no random one is better; ``std``: of a sample,
    None for one network."""
    found, others = networks[0], networks[1:]
    top = [network["top1"] for network in others]
    return {
        "found": found, "best": max(others, key=lambda network: network["top1"]), "mean": mean(top),
        "std": stdev(top) if len(top) > 1 else None, "rank": 1 + sum(value > found["top1"] for value in top),
        "of": len(networks),
    }  # fmt: skip


def words(said: Mapping[str, Any]) -> str:
    """What ``compare`` found, in one line."""
    found, best, judged = said["found"], said["best"], said["judged"]
    spread = f" +- {said['std']:.4f}" if said["std"] is not None else ""
    return (f"each trained alone for {said['steps']:,} steps, {judged['split']} top-1 on {judged['n']:,} images: "
            f"found {found['top1']:.4f} ({found['macs']:,} MACs), best of {said['of'] - 1} random {best['top1']:.4f} "
            f"({best['macs']:,} MACs), random {said['mean']:.4f}{spread}; the found one is number {said['rank']} of "
            f"{said['of']}")  # fmt: skip
