"""Smaller spaces by patterns of names, as a recipe writes them: what is left of which choices, and which follow which.

    restrict: {"*.depth": 2, "stage0.*": largest, "*.kernel": [3, 5]}
    tie: {"stage*.block*.expand": {leader: "stage*.depth", values: {2: 3, 3: 4, 4: 6}}}        # CompOFA, arXiv 2104.12642
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from search_spaces.choice import Choice, listed, require
from search_spaces.space import SearchSpace, Value

Space = TypeVar("Space", bound=SearchSpace)
ENDS = ("largest", "smallest")


def restricted(space: Space, patterns: Mapping[str, Any]) -> Space:
    """``space`` with what ``patterns`` leave of every choice that they match (``*``, ``?``, ``[abc]``), read in order.

    A pattern says the options that stay (of each choice those that it has), "largest" or "smallest", or a number n: the n
    largest options, all where a choice has fewer. Raises ValueError where a pattern matches no choice, says an option that
    none of them has, leaves a choice without any, and where a number meets a choice that has no order.
    """
    kept = {choice.name: choice.options for choice in space.choices}
    for pattern, said in patterns.items():
        names = [name for name in kept if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"restrict: {pattern!r} matches no choice of {space.name}. Choices: {_some(space)}.")
        if isinstance(said, str) and said in ENDS:
            end = space.largest() if said == "largest" else space.smallest()
            kept |= {name: (_end(space[name], kept[name], end[name], said),) for name in names}
        elif isinstance(said, int) and not isinstance(said, bool):
            kept |= {name: _top(space[name], kept[name], said) for name in names}
        else:
            options = said if isinstance(said, list | tuple) else [said]
            kept |= _listed(space, kept, names, options)
    return space.restrict({name: options for name, options in kept.items() if options != space[name].options})


def fitted(patterns: Mapping[str, Any], space: SearchSpace, whole: SearchSpace) -> dict[str, Any]:
    """``patterns`` that were written for ``whole``, as they are for ``space``, a part of it: a list of which a choice has lost
    all options, but not before, leaves it the largest that it has. Read by ``restricted``, which refuses what it did before.
    """
    found: dict[str, Any] = {}
    for pattern, said in patterns.items():
        listing = said if isinstance(said, list | tuple) else () if isinstance(said, int) or said in ENDS else [said]
        names = [choice.name for choice in space.choices if fnmatchcase(choice.name, pattern)]
        lost = [name for name in names if not any(option in listing for option in space[name].options)
                and any(option in listing for option in whole[name].options)]
        found |= {name: "largest" if name in lost else said for name in names} if lost else {pattern: said}
    return found


def tied(space: Space, ties: Mapping[str, Any]) -> Space:
    """``space`` with every choice that a pattern of ``ties`` matches following a leader: {pattern: {"leader", "values"}}.

    ``leader``: a name, in which every ``*`` stands for what the ``*`` of the pattern in its place stood for. ``values``:
    leader's option -> follower's; its keys may be text, as in JSON. Raises ValueError where a pattern matches no choice, for
    another form, and as ``SearchSpace.tie`` does.
    """
    for pattern, tie in ties.items():
        if not isinstance(tie, Mapping) or set(tie) != {"leader", "values"} or not isinstance(tie["values"], Mapping):
            raise ValueError(f"tie: {pattern!r} says {tie}. Give {{leader: NAME, values: {{leader's option: own option}}}}.")
        form = re.compile(re.escape(pattern).replace(r"\*", "(.*)"))
        found = [(choice.name, match) for choice in space.choices if (match := form.fullmatch(choice.name))]
        if not found:
            raise ValueError(f"tie: {pattern!r} matches no choice of {space.name}. Choices: {_some(space)}.")
        leader = str(tie["leader"])
        if leader.count("*") > pattern.count("*"):
            raise ValueError(f"tie: the leader {leader!r} has more * than {pattern!r}, which say what they stand for.")
        for name, match in found:
            parts = iter(match.groups())
            leads = re.sub(r"\*", lambda _, parts=parts: next(parts), leader)  # type: ignore[misc]
            options = {str(option): option for option in space.root[leads].options}
            values: dict[Value, Value] = {}
            for key, value in tie["values"].items():
                if str(key) not in options:
                    require(leads, key, tuple(options.values()))
                values[options[str(key)]] = value
            space = space.tie(name, leads, values)
    return space


def _end(choice: Choice, left: Sequence[Value], end: Value, said: str) -> Value:
    """The largest or smallest option that is ``left``; of choices without order, the ``end`` that their space names."""
    if choice.ordered:
        return left[-1] if said == "largest" else left[0]
    if end in left:
        return end
    raise ValueError(f"restrict: {choice.name} has no order, and its {said} option {end} is not among {listed(left)}.")


def _top(choice: Choice, left: tuple[Value, ...], n: int) -> tuple[Value, ...]:
    if n < 1 or not choice.ordered:
        raise ValueError(f"restrict: {choice.name}: {n}. Allowed: a list of options, largest, smallest, or of choices in order "
                         "the number of the largest options, 1 or more.")  # fmt: skip
    return left[-n:]


def _listed(
    space: SearchSpace, kept: Mapping[str, tuple[Value, ...]], names: Sequence[str], said: Sequence[Value]
) -> dict[str, tuple[Value, ...]]:
    """What ``said`` leaves of each of ``names``."""
    for value in said:
        if not any(value in space.root[name].options for name in names):
            require(names[0], value, kept[names[0]])
    found = {name: tuple(option for option in kept[name] if option in said) for name in names}
    for name, options in found.items():
        if not options:
            raise ValueError(f"restrict: {name} would have no option left of {listed(said)}. Allowed: {listed(kept[name])}.")
    return found


def _some(space: SearchSpace) -> str:
    names = [choice.name for choice in space.choices]
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
