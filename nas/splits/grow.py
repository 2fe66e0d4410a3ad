"""The work of a run with splits: train every supernet to its epoch, split it, go on with its children; at the end, choose.

    for level in levels: for node in level: train it; split it (all but the leaves)

Each node is a resumable run, and so is the whole: what is finished is left alone, what was begun goes on, in the middle of the
distances too. Under torchrun the nodes of a level are trained side by side, each by a team of ranks, whose gradients are
averaged among themselves; all ranks must see the same folders.
"""
from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.tensorboard import SummaryWriter

from nas import checkpoint, ranks
from nas.bilevel import weights_of
from nas.build import Built, arch_file
from nas.engine import Outcome, Stop, signals
from nas.feed import Loaders
from nas.picks import Picks
from nas.protocols import Strategy
from nas.report import write_whole
from nas.run import Run
from nas.splits import show
from nas.splits.gradients import shared
from nas.splits.measure import Measured, decide, exhaustive, measure
from nas.splits.tree import CHECKPOINTS, FORMAT, SPLIT, VERSION, Node, Tree, read_split, saved
from nas.strategies.mixture import Mixture
from nas.strategies.random import Random
from search_spaces.arch import write_arch
from search_spaces.choice import listed
from search_spaces.space import Value

_log = logging.getLogger("nas")
ARCH, BOARD, TREE = "arch.json", "split", "tree"
"""In the folder of a leaf: what it derived. In that of a node: TensorBoard events of its split; in the root's: of the tree."""
STOPS = ("time", "terminated", "interrupted")
"""Reasons to stop, the weightiest last."""


class Reading(NamedTuple):
    """How the architectures of every node are read: see ``nas.picks.Picks``."""

    every: int = 1
    images: int | None = None
    bn_images: int = 2000
    gap: bool = True


class Leaf(NamedTuple):
    """A leaf at its end. ``row``: "arch", "metric", "step", "fits" of what it derived, empty where a searcher picks. ``picks``:
    the state of its ``Picks``."""

    node: Node
    row: dict[str, Any]
    picks: dict[str, Any]


def rehearse(tree: Tree) -> None:
    """ValueError for what does not fit, before a folder is made: the arguments while supernets are to be split, schedules that
    begin anew and are too short, a first split that there is nothing for or whose parts the strategy cannot search, parameters
    to leave out that are not there, and ranks that a batch does not divide by."""
    built, split = tree.built, tree.split
    if isinstance(built.strategy, Random):
        raise ValueError("split: random search trains every network alone, so there is no supernet to split. Leave split out.")
    if isinstance(built.strategy, Mixture):
        raise ValueError("split: a mixture has several supernets already, and gradients are compared in one. Leave split out.")
    started: list[Strategy] = []
    for level in range(split.levels + 1):
        strategy, setup = tree.parts(level)
        strategy.start(setup)
        if level and split.inherits(level - 1) == "all":
            _take_over(started[-1], strategy)
        started.append(strategy)
    batches = [getattr(weights_of(strategy), "accumulate", 1) for strategy in (tree.searching, built.strategy)]
    if batches[0] != batches[1]:
        raise ValueError(f"split.before.weights.accumulate = {batches[0]}, and {batches[1]} for the leaves. Allowed: the same, "
                         "as an epoch has equally many steps for all.")  # fmt: skip
    if split.by == "exhaustive":
        _walk(tree, tree.root)
    else:
        found = Measured(built, split, 0)
        for name in found.options:
            if not shared(built.net, name, split.leave_out):
                raise ValueError(f"split.leave_out = {split.leave_out} leaves nothing to compare for {name}. Leave out less.")
        decide(built, found, split, 0, partial(_refusal, tree, tree.root))
        for level in range(1, split.levels):  # each choice is split once on a path
            matching = Measured(built, split, level).options
            if len(matching) <= level:
                raise ValueError(f"split.at = {split.at}: level {level + 1} would have nothing to split, for only "
                                 f"{', '.join(matching)} can be, each once. Split less often, or match more.")  # fmt: skip
    numbers = counts(tree)
    if isinstance(built.data, Loaders) and built.ranks.world > 1 and max(numbers) > 1:
        raise ValueError("split: your own loaders divide their images among all ranks, but each supernet has some of them. Use "
                         "nas.data.from_dataset, or one process.")  # fmt: skip
    for level in range(split.levels + 1):
        for number in ranks.sizes(numbers[level], built.ranks.world):
            if built.data.batch_size % number:
                raise ValueError(f"batch_size = {built.data.batch_size} does not divide by {number} ranks, which would train a "
                                 f"supernet together (of {built.ranks.world}). Give a multiple, or start another number of "
                                 "processes.")  # fmt: skip


def _take_over(parent: Strategy, child: Strategy) -> None:
    """ValueError where a (started) child cannot go on with its parent's state: ``split.before`` may make them differ."""
    kinds = {name: type(value) for name, value in vars(child).items()}
    try:
        checkpoint.restore(child, checkpoint.state_of(parent))
        odd = next((name for name, kind in kinds.items() if type(vars(child)[name]) is not kind), None)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        odd = str(error)
    if odd is not None:
        raise ValueError(f"split.before: the children cannot take over what their parent has ({odd}). Allowed: arguments that "
                         "keep its state as it is, or split.inherit: weights.")  # fmt: skip


def _walk(tree: Tree, node: Node) -> None:
    """Starts a strategy in every part that exhaustive splits below ``node`` make. ValueError where one cannot be."""
    if node.last:
        return
    here = dataclasses.replace(tree.built, space=node.space)
    for child in tree.born(node, exhaustive(here, tree.split, node.level)):
        strategy, setup = tree.parts(child.level)
        try:
            strategy.start(setup._replace(space=child.space))
        except ValueError as error:
            name = child.cut[-1]
            raise ValueError(f"split.choices: {child.called}, with {name} = {listed(child.space[name].options)}, cannot be "
                             f"searched: {error} Or split another choice.") from None  # fmt: skip
        _walk(tree, child)


def _refusal(tree: Tree, node: Node, choice: str, groups: Sequence[Sequence[Value]]) -> str:
    """Why the strategy cannot search one of the parts of ``node`` that ``groups`` make (a budget may be out of its reach); ""
    where it can search all."""
    try:
        for child in tree.born(node, {"choice": choice, "groups": groups}):
            strategy, setup = tree.parts(child.level)
            strategy.start(setup._replace(space=child.space))
    except ValueError as error:
        return str(error)
    return ""


def counts(tree: Tree) -> list[int]:
    """How many supernets each level has."""
    split, space = tree.split, tree.built.space
    many = ([len(split.groups_of(space[name].options, level)) for level, name in enumerate(split.choices)]
            if split.by == "exhaustive"
            else [split.group_count(level) for level in range(split.levels)])  # fmt: skip
    return [math.prod(many[:level]) for level in range(split.levels + 1)]


def planned(tree: Tree) -> int:
    """The steps of all supernets together, without the measuring of distances."""
    epochs = [end - begin for begin, end in zip([0, *tree.epochs], tree.epochs)]
    return sum(n * many for n, many in zip(counts(tree), epochs)) * tree.built.setup.epoch_steps


def grow(tree: Tree, run: Run, config: Mapping[str, Any], reading: Reading, max_time: float | None = None) -> Outcome:
    """Trains and splits all that is left to do. ``run``: of the root, whose folder is open. ``config``: of the whole.

    Returns how it ended, the same on every rank; its ``step`` is of the root. Raises like ``Run.fit``, and ValueError where
    a node cannot be split.
    """
    with signals(max_time) as stop:
        for level in range(tree.split.levels + 1):
            nodes = tree.level(level)
            done = [finished(tree, node) for node in nodes]  # before any rank works on them
            if run.ranks.main and level:
                _draw_tree(tree, rows(tree))
            stop.calls, ended = 0, set[str]()  # votes are counted within the team
            with ranks.team(len(nodes)) as team:
                for i in team.share(len(nodes)):
                    reason = "done" if done[i] else _work(tree, nodes[i], run, config, reading, team.ranks, stop)
                    if reason != "done":
                        ended.add(reason)
                        break
            votes = ranks.anywhere([reason in ended for reason in STOPS], ranks.device())
            stopped = [reason for reason, vote in zip(STOPS, votes) if vote]
            if stopped:
                return Outcome(stopped[-1], tree.done(tree.root))
    return Outcome("done", tree.steps(tree.root))


def finished(tree: Tree, node: Node) -> bool:
    """Whether nothing is left to do for ``node``: it is split; a leaf is trained, and says what it derived."""
    if not node.last:
        return bool(tree.children(node))
    derives = tree.built.searcher is None
    return tree.done(node) == tree.steps(node) and (not derives or (node.folder / ARCH).is_file())


def _work(
    tree: Tree, node: Node, root: Run, config: Mapping[str, Any], reading: Reading, group: ranks.Ranks, stop: Stop
) -> str:
    """Trains ``node`` to its end and splits it; what of this is done already is left alone. Returns how it ended."""
    built, own, until = tree.build(node), tree.config(node, config), tree.steps(node)
    built.ranks = group
    if node.inherits == "weights":
        built.net.load_state_dict(tree.open(tree.parent(node)).net.state_dict())
    if node.inherits == "all" and group.main and not saved(node.folder):  # where damaged checkpoints were deleted
        _beget(tree, tree.parent(node), [node], config)
    with _opened(node, root, own, built) as run:
        if group.main:
            _log.info("%s, %s: steps %d to %d, %.3g architectures, in %s", node.called, "a leaf" if node.last else
                      "to be split", run.start, until, float(node.space.size), run.folder)  # fmt: skip
        feed = built.data.feed(tree.seed_of(node), built.device, group.rank, group.world)
        picks = Picks(built.space, built.data, built.device, run.log, group, reading.images, reading.bn_images, reading.gap,
                      derive=built.searcher is None, called=node.called)  # fmt: skip
        acts = [(reading.every * built.setup.epoch_steps, picks)]
        if node.last and until % acts[0][0]:
            acts.append((until, picks))  # before the last checkpoint is written, which tells of it
        outcome = run.fit(built.strategy, built.setup, feed, seed=tree.seed_of(node), until=until, every=acts, stop=stop,
                          keep={"picks": picks})  # fmt: skip
        if outcome.reason != "done":
            return outcome.reason
        if not node.last:
            return _split(tree, node, built, config, stop)
        row = derived(picks.state_dict())
        if group.main and row:
            write_arch(run.folder / ARCH, arch_file(built, row["arch"], {"top1": row["metric"]}, own), built.space)
        return "done"


@contextmanager
def _opened(node: Node, root: Run, config: Mapping[str, Any], built: Built) -> Iterator[Run]:
    """The run of ``node``; the root's is another's to close."""
    if not node.path:
        yield root
        return
    run = Run(node.folder, config, device=built.device, ranks=built.ranks, period=root.period, exact=True)
    try:
        yield run
    finally:
        run.close()


def _split(tree: Tree, node: Node, built: Built, config: Mapping[str, Any], stop: Stop) -> str:
    """Splits ``node``: measures, writes the first checkpoints of children that go on with its state, and split.json last.
    Returns how it ended."""
    split, level, step = tree.split, node.level, tree.steps(node)
    if split.by == "exhaustive":
        found = exhaustive(built, split, level)
    else:
        measured = measure(built, split, level, node.folder / CHECKPOINTS, tree.seed_of(node), step, stop, node.cut,
                           node.called)  # fmt: skip
        if isinstance(measured, str):
            return measured
        found = decide(built, measured, split, level, partial(_refusal, tree, node))
    said = {"format": FORMAT, "version": VERSION, "by": split.by, "level": level, "epoch": node.ends, "step": step, **found,
            "inherit": split.inherits(level), "children": [".".join(map(str, (*node.path, i)))
                                                           for i in range(len(found["groups"]))]}  # fmt: skip
    children = tree.born(node, said)
    if built.ranks.main:
        if said["inherit"] == "all":
            _beget(tree, node, children, config)
        with _board(node.folder / BOARD) as writer:
            show.write_board(writer, said, step)
        write_whole(node.folder / SPLIT, json.dumps(said, indent=1) + "\n")
        _log.info("%s is split at %s: %s", node.called, said["choice"], show.grouped(said["groups"]))
    ranks.wait()
    return "done"


def _beget(tree: Tree, node: Node, children: Sequence[Node], config: Mapping[str, Any]) -> None:
    """The first checkpoints of ``children``, which go on with the state of ``node``."""
    payload, _ = checkpoint.load(node.folder / CHECKPOINTS, "cpu")
    for child in (child for child in children if not saved(child.folder)):  # trained already, where a split.json was deleted
        own = tree.config(child, config)
        folder = child.folder / CHECKPOINTS
        folder.mkdir(parents=True, exist_ok=True)
        first = {**payload, "seed": tree.seed_of(child), "config": own, "config_hash": checkpoint.config_hash(own),
                 "log": {"pending": {}}, "keep": {"picks": Picks.fresh()}}  # fmt: skip
        checkpoint.write(folder / "last.pt", first)


@contextmanager
def _board(folder: Path) -> Iterator[SummaryWriter]:
    """TensorBoard events in a folder of their own, in the place of what it held: a resumed run drops those of its own folder
    from its step on."""
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        yield writer


# -- at the end -----------------------------------------------------------------------------------------------------------


def leaves(tree: Tree) -> list[Leaf]:
    """All leaves of a tree that is grown, with what each derived."""
    states = [(node, checkpoint.load(node.folder / CHECKPOINTS)[0]["keep"]["picks"]) for node in tree.level(tree.split.levels)]
    return [Leaf(node, derived(picks), picks) for node, picks in states]


def derived(picks: Mapping[str, Any]) -> dict[str, Any]:
    """Of the state of a ``Picks``: the last architecture, or, where that misses the budget, the best that did not. {} where a
    searcher picks."""
    last, best = picks["last"], picks["best"]
    return (last if best is None or (last and last["fits"]) else best) or {}


def choose(found: Sequence[Leaf]) -> Leaf:
    """The best on the select split among those that meet the budget, if any does; of equal ones the first."""
    return max(found, key=lambda leaf: (leaf.row["fits"], leaf.row["metric"]["value"]) if leaf.row else (False, 0.0))


def told(tree: Tree, found: Sequence[Leaf], picked: Leaf) -> str:
    """What report.md says of the tree, and TensorBoard: every supernet, what each split measured, what all of it took."""
    lines, tables, training, splitting = rows(tree, found, picked), [], 0.0, 0
    _draw_tree(tree, lines)
    for node, line in zip(tree.nodes(), lines):
        begins, ends = line["epochs"]
        strategy, setup = tree.parts(node.level)
        strategy.start(setup._replace(space=node.space))  # some know their passes only then
        training += (ends - begins) * setup.epoch_steps * strategy.passes() * tree.built.data.batch_size
        if tree.children(node):
            said = read_split(node.folder / SPLIT)
            tables += [f"{node.called.capitalize()}, at its end:\n\n{show.table(said)}"] if said["measured"] else []
            splitting += said["images"]
    cost = (f"Image-passes: training {round(training):,}, splitting {splitting:,} ({splitting / training:.1%} more). Splitting "
            "is counted; training is its steps times the passes that one of them takes on the mean of its schedules, so an "
            "estimate where steps differ.")  # fmt: skip
    inner = sum(1 for node in tree.nodes() if tree.children(node))
    many = (f"{len(lines)} supernets: {len(lines) - inner} leaves, whose weights serve the architectures, each its own part; "
            f"inner ones, which were split on the way and serve none: {inner}.")  # fmt: skip
    return "\n\n".join([many, show.tree_text(lines), cost, *tables])


def rows(tree: Tree, found: Sequence[Leaf] = (), picked: Leaf | None = None) -> list[dict[str, Any]]:
    """What ``show.tree_text`` says of every node that there is, in the order of ``tree.nodes``."""
    top1, whole = {leaf.node.name: leaf.row["metric"]["value"] for leaf in found if leaf.row}, tree.built.space
    lines = []
    for node in tree.nodes():
        said = read_split(node.folder / SPLIT) if tree.children(node) else None
        lines.append({
            "path": node.name, "epochs": [tree.epochs[node.level - 1] if node.path else 0, node.ends],
            "choice": said and said["choice"], "cut": said and said["measured"].get(said["choice"], {}).get("cut"),
            "options": {choice.name: list(choice.options) for choice in node.space.choices
                        if choice.options != whole[choice.name].options},
            "size": node.space.size, "top1": top1.get(node.name),
            "picked": picked is not None and node.path == picked.node.path,
        })  # fmt: skip
    return lines


def _draw_tree(tree: Tree, lines: Sequence[Mapping[str, Any]]) -> None:
    step = max(line["epochs"][1] for line in lines) * tree.built.setup.epoch_steps
    with _board(tree.folder / TREE) as writer:
        writer.add_text("split/tree", show.tree_text(lines), step)
