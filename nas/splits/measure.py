"""Where a supernet is split: the distances of gradients, measured batch by batch and saved after each, and what follows.

Hu et al., ICLR 2022, arXiv 2203.15207 (page fewshot-gm.md, sections 2b to 2d). For every choice that may be split: one draw of
all other choices, one gradient for each option; on one batch, and again on others. Nothing of the run is changed: neither
weights, buffers and optimizers nor what the training draws afterwards.
"""
from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nas import checkpoint
from nas.build import Built
from nas.engine import moment, seed_from
from nas.protocols import Batch, Moment
from nas.splits.gradients import fixed, match, shared
from nas.splits.partitions import Cut, Partition, best, chosen
from nas.splits.regions import barren, splittable
from nas.splits.split import Split
from search_spaces.choice import listed
from search_spaces.space import Mixture, SearchSpace, Setting, Value

_log = logging.getLogger("nas")
STATE = "split.pt"
"""Beside the checkpoints: sums of distances, and the position in the data."""
SHOWN = 10.0
"""Seconds between lines of progress."""
DRAWS = 100
"""Of the other choices, until no option leaves a dead network (a cell without input); then the last is taken."""


class Measured:
    """Sums of distances over repeats, for every choice that may be split, in the space's order. ``options``: of each;
    ``barren``: positions of those that make no group without any other. ``cut``: choices that were split before, and stay as
    they are (page, section 2b). ValueError where no choice can be split."""

    def __init__(self, built: Built, split: Split, level: int, cut: Sequence[str] = ()) -> None:
        space, groups = built.space, split.group_count(level)
        self.options: dict[str, tuple[Value, ...]] = {}
        self.barren: dict[str, list[int]] = {}
        for name in splittable(space, split.choices):
            if name in cut:
                continue
            options, alone = space[name].options, barren(space, name)
            if len(options) >= groups * split.least and len(options) - len(alone) >= groups:
                self.options[name], self.barren[name] = options, [options.index(option) for option in alone]
        if not self.options:
            raise ValueError(_too_few(space, split, level, cut))
        self.sums = {name: torch.zeros(len(options), len(options), dtype=torch.float64)
                     for name, options in self.options.items()}  # fmt: skip
        self.repeats, self.seconds = 0, 0.0

    def means(self) -> dict[str, np.ndarray]:
        """The mean distances D (n, n) of each choice's options."""
        return {name: total.numpy() / max(self.repeats, 1) for name, total in self.sums.items()}

    @property
    def passes(self) -> int:
        """Forward and backward passes of a batch, for one repeat and one sample."""
        return sum(map(len, self.options.values()))


def measure(
    built: Built, split: Split, level: int, folder: Path, seed: int, step: int, stop: Callable[[], str | None],
    cut: Sequence[str] = (), called: str = "the root supernet",
) -> Measured | str:  # fmt: skip
    """The distances at a node whose (started) strategy has made ``step`` steps, or why it was stopped: ``stop`` is asked after
    every batch. ``folder``: of its checkpoints, where the state is kept. ``cut``: see ``Measured``. ``called``: the node, in
    the log. ValueError where no choice can be split, and where what was kept cannot be read."""
    found, group = Measured(built, split, level, cut), built.ranks
    feed = built.data.feed(seed_from(seed, "split"), built.device, group.rank, group.world)
    about = {"seed": seed, "step": step, "options": {name: list(options) for name, options in found.options.items()},
             "repeats": split.repeats, "samples": split.samples}  # fmt: skip
    path = folder / STATE
    if path.exists():
        state = _kept(path)
        if state["about"] == about:
            found.sums, found.repeats, found.seconds = state["sums"], state["repeats"], state["seconds"]
            feed.load_state_dict(state["feed"])
    shown = _Shown(called, found, split, group.main)
    while found.repeats < split.repeats:
        began = time.monotonic()
        now = _moment(built, found.repeats, seed, step)
        batch = feed("train")
        for name in found.options:
            for _ in range(split.samples):
                found.sums[name] += torch.from_numpy(_distances(built, split, name, batch, now)) / split.samples
        found.repeats += 1
        found.seconds += time.monotonic() - began
        if group.main:
            checkpoint.write(path, {"about": about, "sums": found.sums, "repeats": found.repeats, "seconds": found.seconds,
                                    "feed": feed.state_dict()})  # fmt: skip
        shown()
        if reason := stop():
            return reason
    return found


def _kept(path: Path) -> dict[str, Any]:
    """The state of measuring at ``path``. ValueError where it is damaged."""
    lost = "Delete it, and resume the run: the gradients are compared anew, and all that is trained stays."
    try:
        state = checkpoint.read(path)
    except ValueError as error:
        raise ValueError(f"{error}, which keeps the distances of gradients. {lost}") from None
    if not isinstance(state, dict) or not {"about", "sums", "repeats", "seconds", "feed"} <= state.keys():
        raise ValueError(f"{path} does not hold distances of gradients. {lost}")
    return state


class _Shown:
    """Tells the log what is compared, of a resumed run how much of it is done, and then now and then how far it is."""

    def __init__(self, called: str, found: Measured, split: Split, main: bool) -> None:
        self.called, self.found, self.of, self.main = called, found, split.repeats, main
        self.start, self.began = found.repeats, time.monotonic()
        self.last = self.began
        if main and self.start:
            _log.info("%s: %d of %d batches were compared before", called, self.start, self.of)
        if main and self.start < self.of:
            _log.info("%s: comparing the gradients of %d options of %d choices, on %d batches", called, found.passes,
                      len(found.options), self.of - self.start)  # fmt: skip

    def __call__(self) -> None:
        """After each batch."""
        clock, done = time.monotonic(), self.found.repeats
        if self.main and (clock - self.last >= SHOWN or done == self.of):
            self.last = clock
            left = (clock - self.began) / (done - self.start) * (self.of - done)
            _log.info("%s: %d of %d batches compared, left %s", self.called, done, self.of, tqdm.format_interval(left))


def _too_few(space: SearchSpace, split: Split, level: int, cut: Sequence[str]) -> str:
    """Why no choice can be split into the groups that are asked for."""
    groups, names = split.group_count(level), [name for name in splittable(space, split.choices) if name not in cut]
    words = (f"split.groups = {groups}: of the choices that match {', '.join(split.choices)} none has options left for "
             f"{groups} groups of {split.least} or more.")  # fmt: skip
    most = {name: min(len(space[name].options) // split.least, len(space[name].options) - len(barren(space, name)))
            for name in names}  # fmt: skip
    widest = max(names, key=lambda name: most[name], default="")
    if not names or most[widest] < 2:
        return f"{words} Split less often (split.at), or name other choices (split.choices)."
    alone = f" ({listed(barren(space, widest))} not alone)" if barren(space, widest) else ""
    return (f"{words} {widest} has {len(space[widest].options)}: {listed(space[widest].options)}{alone}. Allowed: "
            f"{'2' if most[widest] == 2 else f'2 to {most[widest]}'}. Give fewer groups, or name other choices "
            "(split.choices).")  # fmt: skip


def _moment(built: Built, repeat: int, seed: int, step: int) -> Moment:
    """The next step of the training, with randomness of its own."""
    setup = built.setup
    here = moment(repeat, max(setup.steps, repeat + 1), setup.epoch_steps, seed_from(seed, "split"))
    return here._replace(step=step, steps=setup.steps, epoch=step // setup.epoch_steps,
                         epochs=-(-setup.steps // setup.epoch_steps), first=step % setup.epoch_steps == 0)  # fmt: skip


def _distances(built: Built, split: Split, name: str, batch: Batch, now: Moment) -> np.ndarray:
    """D (n, n) of the options of one choice, for one batch and one draw of the other choices."""
    space = built.space
    alone = set(barren(space, name))
    for _ in range(DRAWS):
        with torch.no_grad():
            others: Mapping[str, Setting] = built.strategy.arch(now) if split.others == "strategy" else space.sample(now.rng)
        rng = random.Random(now.rng.random())
        setting_of = partial(_fixed, space, others, name, rng, split.keep_weight)
        if all(_alive(space, setting_of(option)) for option in space[name].options if option not in alone):
            break
    return match(built.net, built.setup.loss, batch, setting_of, space[name].options,
                 shared(built.net, name, split.leave_out))  # fmt: skip


def _fixed(
    space: SearchSpace, others: Mapping[str, Setting], name: str, rng: random.Random, keep_weight: bool, option: Value
) -> dict[str, Setting]:
    return fixed(space, others, name, option, rng, keep_weight)


def _alive(space: SearchSpace, setting: Mapping[str, Setting]) -> bool:
    """Whether the space would draw ``setting``, where it is a plain architecture; mixtures always give something."""
    arch = {name: said for name, said in setting.items() if not isinstance(said, Mixture)}
    return len(arch) < len(setting) or bool(space.lawful(space.root.encode([arch]))[0])


Refuses = Callable[[str, Sequence[Sequence[Value]]], str]
"""(choice, groups) -> why the strategy cannot search one of the parts that they make, "" where it can search all."""


def cuts(found: Measured, split: Split, level: int, refuses: Refuses = lambda choice, groups: "") -> dict[str, Cut]:
    """The best partition of each choice's options whose parts can be searched; choices without one are left out. ValueError
    where no choice has one."""
    cut = partial(best, groups=split.group_count(level), least=split.least, balanced=split.balanced)
    every: dict[str, Cut] = {}
    reasons = ["their options do not make such groups."]  # the last is told
    for name, D in found.means().items():
        def admits(partition: Partition, name: str = name) -> bool:
            reasons.append(refuses(name, grouped(found, name, partition)))
            return not reasons[-1]

        with suppress(ValueError):
            every[name] = cut(D, barren=found.barren[name], admits=admits)
    if not every:
        raise ValueError(f"split: no partition of {', '.join(found.options)} makes parts that can be searched: {reasons[-1]}")
    return every


def grouped(found: Measured, choice: str, partition: Partition) -> list[list[Value]]:
    """The options of ``choice`` in groups."""
    return [[found.options[choice][i] for i in group] for group in partition]


def decide(
    built: Built, found: Measured, split: Split, level: int, refuses: Refuses = lambda choice, groups: ""
) -> dict[str, Any]:
    """The choice to split, its groups, and all that was measured, as split.json has it. ValueError like ``cuts``."""
    every = cuts(found, split, level, refuses)
    name = chosen(every, split.rule)

    D = found.means()
    return {
        "choice": name, "groups": grouped(found, name, every[name].groups), "rule": split.rule, "repeats": split.repeats,
        "samples": split.samples, "passes": found.passes * split.repeats * split.samples,
        "images": found.passes * split.repeats * split.samples * built.data.batch_size, "seconds": round(found.seconds, 3),
        "measured": {choice: {"options": list(found.options[choice]), "distances": D[choice].tolist(),
                              "groups": grouped(found, choice, cut.groups), "within": cut.within, "cut": cut.cut}
                     for choice, cut in every.items()},
    }  # fmt: skip


def exhaustive(built: Built, split: Split, level: int) -> dict[str, Any]:
    """A child for each option, or group of options, of the named choice, as split.json has it. ValueError where it cannot be
    split."""
    name = split.choices[level]
    options = built.space[name].options
    if name not in splittable(built.space, [name]):
        raise ValueError(f"split: {name} has no options to split ({', '.join(map(str, options))}). Name another choice.")
    return {"choice": name, "groups": split.groups_of(options, level), "rule": None, "repeats": 0, "samples": 0, "passes": 0,
            "images": 0, "seconds": 0.0, "measured": {}}  # fmt: skip
