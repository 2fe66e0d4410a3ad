"""One contestant of nas/benchmarks/quality_once.py: a search whose cost is metered and whose networks are read on the way.

    python -m nas.benchmarks.quality_once_run JOB.json

The run folder is that of ``nas search`` (``nas extract`` takes networks from it), resumed where it was killed; ``curve.json``
in it holds what was read. Cost is MACs x images, summed over the passes that a backward follows: forward passes that make a
graph. What runs without one (the teacher of OFA) is summed apart, as ``forward_only``; readings are in neither.
"""
from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.build import Built, assemble
from nas.evaluate import score_archs
from nas.protocols import Moment, Strategy
from nas.recipe import find, parse, plain_config, read, search_parser
from nas.report import write_whole
from nas.run import Run
from search_spaces.space import Arch

CURVE = "curve.json"


@dataclass(frozen=True)
class Contest:
    """What one run is told. ``name``: of the contestant; ``words``: overrides of ``recipe``, epochs and seed among them.

    ``nets``: name -> architecture; ``full``: the name of the largest. All are read whenever another ``every`` MACs x images
    are spent and at the end, on ``images`` test images after ``bn_images`` training images; ``full`` alone after each of
    ``watched`` steps too. At the end they are also read on all test images.
    """

    name: str
    recipe: str
    words: tuple[str, ...]
    folder: str
    nets: dict[str, Arch]
    full: str
    every: float
    watched: tuple[int, ...]
    images: int
    bn_images: int

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Contest:
        told = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**told, "words": tuple(told["words"]), "watched": tuple(told["watched"])})


class Meter:
    """MACs x images of the passes of ``net`` and its copies: ``trained``, those that make a graph, and ``forward_only``.

    ``price``: architecture -> MACs for one image.
    """

    def __init__(self, net: nn.Module, price: Callable[[Mapping[str, Any]], int | float]) -> None:
        self.trained = self.forward_only = 0.0
        self.running = True

        def count(module: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> None:
            if self.running:
                spent = price(kwargs["arch"] if "arch" in kwargs else args[1]) * len(out)
                if torch.is_grad_enabled() and out.requires_grad:  # a view of a weight says so without a graph, too
                    self.trained += spent
                else:
                    self.forward_only += spent

        net.register_forward_hook(count, with_kwargs=True)  # a closure: the hook of a deep copy counts here too

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes that are not training's."""
        self.running = False
        try:
            yield
        finally:
            self.running = True


class Readings:
    """An act of the engine, of every step: the curve of a contestant. Its state is part of the checkpoint.

    ``rows``: {"step", "epoch", "cost", "forward_only", "images", "seconds", "top1": {net: accuracy}}; ``seconds``: of
    training alone, on this machine.
    """

    def __init__(self, built: Built, meter: Meter, contest: Contest) -> None:
        self.built, self.meter, self.contest = built, meter, contest
        self.rows: list[dict[str, Any]] = []
        self.seconds, self.due = 0.0, contest.every
        self.began = time.perf_counter()

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        self.seconds += time.perf_counter() - self.began
        done = now.step + 1
        whole = self.meter.trained >= self.due or done == now.steps
        if whole or done in self.contest.watched:
            top1 = self.read(strategy, list(self.contest.nets) if whole else [self.contest.full], self.contest.images)
            epoch = done / self.built.setup.epoch_steps
            self.rows.append({"step": done, "epoch": epoch, "cost": self.meter.trained,
                              "forward_only": self.meter.forward_only, "images": done * self.built.data.batch_size,
                              "seconds": self.seconds, "top1": top1})  # fmt: skip
        while self.meter.trained >= self.due:
            self.due += self.contest.every
        self.began = time.perf_counter()

    def read(self, strategy: Strategy, names: Sequence[str], images: int | None) -> dict[str, float]:
        """Accuracy of the nets ``names``, batch norms recalibrated, on ``images`` test images (None: all)."""
        archs = [self.contest.nets[name] for name in names]
        with self.meter.paused():
            found = score_archs(strategy.network(archs[-1]), archs, self.built.data, "test", self.built.device,
                                self.contest.bn_images, images)  # fmt: skip
        return {name: scores.top1 for name, scores in zip(names, found)}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds, "due": self.due, "trained": self.meter.trained,
                "forward_only": self.meter.forward_only}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows, self.seconds, self.due = state["rows"], state["seconds"], state["due"]
        self.meter.trained, self.meter.forward_only = state["trained"], state["forward_only"]


def contend(contest: Contest) -> int:
    """Trains to the end, or goes on with it, and writes the curve. Returns the exit status."""
    parser = search_parser()
    config = parse(parser, read(find(contest.recipe)), contest.words)
    built = assemble(config)
    plain = plain_config(parser, config)
    plain.pop("beside")
    meter = Meter(built.net, built.costs.of)
    readings = Readings(built, meter, contest)
    run = Run(contest.folder, plain, device=built.device, ranks=built.ranks, resume="auto", period=config.log_every)
    try:
        feed = built.data.feed(config.seed, built.device)
        outcome = run.fit(built.strategy, built.setup, feed, seed=config.seed, every=[(1, readings)],
                          keep={"readings": readings})  # fmt: skip
        if outcome.reason == "done":
            names = list(contest.nets)
            final = readings.read(built.strategy, names, None)
            write_whole(run.folder / CURVE, json.dumps({
                "name": contest.name, "recipe": contest.recipe, "words": list(contest.words), "seed": config.seed,
                "epochs": config.epochs, "steps": built.setup.steps, "epoch_steps": built.setup.epoch_steps,
                "data": built.data.describe(), "test_images": built.data.count("test"), "cost": meter.trained,
                "forward_only": meter.forward_only, "seconds": readings.seconds, "rows": readings.rows, "top1": final,
                "text": {name: built.space.root.text(contest.nets[name]) for name in names},
                "macs": {name: built.costs.of(contest.nets[name]) for name in names},
            }, indent=2) + "\n")  # fmt: skip
    finally:
        run.close()
    return outcome.exit


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="nas: %(message)s", stream=sys.stderr)
    [path] = sys.argv[1:] if argv is None else argv
    return contend(Contest.read(Path(path)))


if __name__ == "__main__":
    sys.exit(main())
