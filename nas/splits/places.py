"""The folder of one supernet of a tree, given as if it were the whole run: what it cannot say or serve, and where to ask.

    RUN/nodes/0.1    served by itself: its own part of the space; all else by RUN, or by another leaf
"""
from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nas.splits.tree import NODES, SPLIT, Tree
from search_spaces.space import Value


class Place(NamedTuple):
    """``folder``: as given, of the supernet called ``name`` ("0.1") in the tree of the run ``root``."""

    folder: Path
    root: Path
    name: str


def place_of(folder: Path) -> Place | None:
    """Which supernet of which run lies in ``folder``; None for a run of its own, the root of a tree included."""
    whole = folder if folder.parent.name == NODES else folder.absolute()
    root = whole.parent.parent
    inside = whole.parent.name == NODES and all(part.isdigit() for part in whole.name.split("."))
    return Place(folder, root, whole.name) if inside and (root / "config.yaml").is_file() else None


def underived(place: Place, verb: str, searched: bool) -> str:
    """Why ``place`` has no arch.json, and what has one. ``verb``: that reads one. ``searched``: a searcher picks among all
    leaves."""
    root = shlex.quote(str(place.root))
    reasons = ["was split, so it derives nothing"] if (place.folder / SPLIT).is_file() else []
    reasons += ["leaves the choice to a searcher, which picks among all leaves"] if searched else []
    why = f"supernet {place.name} of {place.root} {' and '.join(reasons or ['is not finished'])}"
    if not (place.root / "arch.json").is_file():
        return (f"{place.folder} has no arch.json: {why}. Finish the whole run: "
                f"nas search {shlex.quote(str(place.root / 'config.yaml'))} --resume auto --out {root}.")  # fmt: skip
    have = [str(file.parent) for file in sorted((place.root / NODES).glob(f"{place.name}.*/arch.json"))]
    leaves = f", or a leaf that came of it: {', '.join(have)}" if have else ""
    return f"{place.folder} has no arch.json: {why}. Give the whole run, nas {verb} {root}{leaves}."


def unmet(place: Place, error: ValueError) -> str:
    """``error``, by which the part of ``place`` has nothing within the limits, and where there may be."""
    return (f"{error} {place.folder} is supernet {place.name} of {place.root}, which has a part of the space: nas select "
            f"{shlex.quote(str(place.root))} picks among all leaves.")  # fmt: skip


def elsewhere(place: Place, tree: Tree, arch: Mapping[str, Value], verb: str, why: str) -> str:
    """Which supernet of ``tree`` serves ``arch``, which that of ``place`` does not hold. ``why``: by which choice. ValueError
    where no supernet of the tree holds it."""
    node, text = tree.server(arch), shlex.quote(tree.built.space.text(arch))
    called, there = "the root supernet, as far as the tree goes", ""
    if node.path:
        called, there = node.called, f", or the same with {node.folder}"
    return (f"{place.folder} is supernet {place.name} of {place.root}, which has a part of the space: {why} This architecture "
            f"is served by {called}: nas {verb} {shlex.quote(str(place.root))} --arch {text}{there}.")  # fmt: skip
