"""Parts of a space, one for each supernet of a split: together they hold exactly what the space holds, each architecture once.

A split sorts the options of one choice into groups. An architecture in which that choice counts belongs to the group of its
option; one in which it is inert, to the group of the canonical value, the first option of the root (where that is gone: the
first that is left). So one part keeps the latter, and in every other part what the choice needs is restricted to the options
that make it count. Sizes of parts add up to the size of the space.
"""
from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from search_spaces.choice import listed
from search_spaces.space import SearchSpace, Value, require

Space = TypeVar("Space", bound=SearchSpace)


def divide(space: Space, choice: str, groups: Sequence[Sequence[Value]]) -> list[Space]:
    """A part of ``space`` for each of ``groups``, in their order.

    Raises ValueError for a choice that cannot be split (``splittable``), for groups that do not hold each of its remaining
    options once, and for a group without an architecture that ``space`` may draw (NB201: a node that receives nothing).
    """
    if line := _refusal(space, choice):
        raise ValueError(line)
    options = space[choice].options
    given = [value for group in groups for value in group]
    for value in given:
        require(choice, value, options)
    if len(groups) < 2 or not all(groups) or len(given) != len(options) or len(set(given)) < len(given):
        raise ValueError(f"{choice} cannot be split into {' | '.join(map(listed, groups))}. Give two or more groups that hold "
                         f"each option once: {listed(options)}.")  # fmt: skip
    parts = [_part(space, choice, group) for group in groups]
    for group, part in zip(groups, parts):
        if not _draws(space, part):
            raise ValueError(f"The group {listed(group)} of {choice} would hold no architecture that {space!r} may draw. Put "
                             f"it together with another group, or restrict {choice} to its other options.")  # fmt: skip
    return parts


def splittable(space: SearchSpace, patterns: Sequence[str] = ("*",)) -> list[str]:
    """The free choices that match one of ``patterns`` and can be split, in the order of the space.

    Not those that never count, that a rule of the space sets (``SearchSpace.ruled``), and those of which fewer than two options
    are in an architecture that the space may draw. Raises ValueError for a pattern that matches no choice at all.
    """
    names = [choice.name for choice in space.choices]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = listed(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            raise ValueError(f"{pattern!r} matches no choice of {space.name}. Choices: {shown}.")
    return [name for name in space.free
            if any(fnmatchcase(name, pattern) for pattern in patterns) and not _refusal(space, name)]  # fmt: skip


def barren(space: SearchSpace, choice: str) -> tuple[Value, ...]:
    """The options of ``choice`` that no architecture has which ``space`` may draw: no group may consist of these alone.

    Raises ValueError for a choice that cannot be split.
    """
    if line := _refusal(space, choice):
        raise ValueError(line)
    fruitful = set(_fruitful(space, choice))
    return tuple(option for option in space[choice].options if option not in fruitful)


def holder(spaces: Sequence[SearchSpace], arch: Mapping[str, Value]) -> int:
    """Which of ``spaces``, parts of one root, holds ``arch`` (canonical or not: inert settings are not read).

    Raises ValueError where none does, where several do (then they are no parts of a split), and for missing or unknown names.
    """
    if not spaces:
        raise ValueError("There is no space to hold an architecture. Give the parts of a split.")
    live = spaces[0].counting(arch)
    found = [i for i, space in enumerate(spaces) if holds(space, arch)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{len(found)} of the {len(spaces)} parts hold {_shown(spaces, arch)}. Give parts that divide made.")
    for choice in spaces[0].root.choices:
        if choice.name in live:
            left = {option for space in spaces for option in space[choice.name].options}
            require(choice.name, arch[choice.name], [option for option in choice.options if option in left])
    raise ValueError(f"None of the {len(spaces)} parts holds {_shown(spaces, arch)}, though each of its settings is in one.")


def _refusal(space: SearchSpace, choice: str) -> str:
    """Why ``choice`` cannot be split, in one line; nothing where it can."""
    options = space[choice].options
    if choice in space.ties:
        leader = space.ties[choice].leader
        return f"{choice} follows {leader}, so it cannot be split. Split {leader}."
    if len(options) < 2:
        return f"{choice} has one option left, {listed(options)}, so it cannot be split."
    if choice in space.ruled:
        return f"{choice} cannot be split: {space.name} sets it by a rule while all its options are allowed. Restrict it first."
    needed = _needed(space, choice)
    if gone := next((name for name, values in needed.items() if not values), None):
        return f"{choice} cannot be split: it counts in no architecture of this space. {gone}: {listed(space[gone].options)}."
    fruitful = _fruitful(space, choice)
    if next(fruitful, None) is None or next(fruitful, None) is None:
        return f"{choice} cannot be split: fewer than two of {listed(options)} are in an architecture that {space!r} may draw."
    return ""


def _needed(space: SearchSpace, choice: str) -> dict[str, list[Value]]:
    """What may be left of which choices for ``choice`` to count always; nothing of one of them: it never can.

    A follower that is needed has no options of its own: its leader, which counts wherever it does, is restricted instead.
    """
    left: dict[str, list[Value]] = {}
    for name, holds in space.conditions(choice).items():
        tie = space.ties.get(name)
        leader = name if tie is None else tie.leader
        left[leader] = [option for option in left.get(leader, list(space[leader].options))
                        if (option if tie is None else tie.values[option]) in holds]  # fmt: skip
    return left


def _part(space: Space, choice: str, group: Sequence[Value]) -> Space:
    """What ``space`` holds with ``choice`` in ``group``, the inert ones with that of its canonical value."""
    options = space[choice].options
    keeps = options[0] in group  # in the root's order: the canonical one, or the first that is left
    allowed = {} if keeps else _needed(space, choice)
    return space.restrict(allowed | {choice: [option for option in options if option in group]})


def _fruitful(space: SearchSpace, choice: str) -> Iterator[Value]:
    """The options of ``choice`` whose part, alone, has an architecture that ``space`` may draw. A group has one where one of
    its options has."""
    return (option for option in space[choice].options if _draws(space, _part(space, choice, [option])))


def _draws(space: SearchSpace, part: SearchSpace) -> bool:
    """Whether ``part`` holds an architecture that ``space`` may draw.

    One draw says so: families with a rule draw by the same rule in a part that holds such an architecture (DARTS: an edge that
    would be a node's third input draws three, in no architecture of the whole), and refuse where there is none (NB201).
    """
    try:
        arch = part.sample(random.Random(0))
    except ValueError:
        return False
    return bool(space.lawful(space.encode([arch])).all())


def holds(space: SearchSpace, arch: Mapping[str, Value]) -> bool:
    """Whether ``space`` holds ``arch`` (canonical or not). Raises nothing: what is no architecture at all is not held."""
    try:
        space.check(arch)
    except ValueError:
        return False
    return True


def _shown(spaces: Sequence[SearchSpace], arch: Mapping[str, Value]) -> str:
    """``arch`` as ``text`` writes it; settings that differ among ``spaces`` alone, where they are few."""
    live = spaces[0].counting(arch)
    told = [choice.name for choice in spaces[0].root.choices if choice.name in live
            and len({space[choice.name].options for space in spaces}) > 1]  # fmt: skip
    return ", ".join(f"{name} = {arch[name]}" for name in told) or "this architecture"
