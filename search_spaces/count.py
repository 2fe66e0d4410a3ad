"""How many canonical architectures a space has: exact, without enumerating them.

Each choice is a variable whose states are its options and INERT; it is tied to the few choices that it needs or
follows. Summing the variables out one by one, the least linked first, keeps every table as small as a group of
linked choices (depth -> widths), so 10^60 architectures are counted in milliseconds.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from search_spaces.choice import Choice, Tie, Value

INERT = None  # the state of a choice that does not count; no option is None


class Factor(NamedTuple):
    """How many ways there are for each combination of states of ``scope``; combinations with no way are left out."""

    scope: tuple[str, ...]
    ways: dict[tuple, int]


def count(choices: Sequence[Choice], ties: Mapping[str, Tie]) -> int:
    """The number of canonical architectures of ``choices`` under ``ties``."""
    states = {choice.name: (*choice.options, INERT) for choice in choices}
    factors = [_factor(choice, ties.get(choice.name), states) for choice in choices]
    left = dict.fromkeys(states)  # ordered, so that the answer takes the same path every time
    total = 1
    while left:
        name = _least_linked(left, factors)
        del left[name]
        touched = [factor for factor in factors if name in factor.scope]
        factors = [factor for factor in factors if name not in factor.scope]
        message = _sum_out(name, _product(touched))
        if message.scope:
            factors.append(message)
        else:
            total *= message.ways.get((), 0)
    return total


def _factor(choice: Choice, tie: Tie | None, states: Mapping[str, tuple[Value | None, ...]]) -> Factor:
    """One choice given the choices it needs and follows: its options where it counts, INERT elsewhere."""
    parents = tuple(dict.fromkeys([name for name, _ in choice.needs] + ([tie.leader] if tie else [])))
    ways: dict[tuple, int] = {}
    for combination in itertools.product(*(states[name] for name in parents)):
        given = dict(zip(parents, combination))
        if not all(given[name] in values for name, values in choice.needs):
            ways[(*combination, INERT)] = 1
        elif tie is None:
            ways.update(((*combination, option), 1) for option in choice.options)
        else:
            leads = given[tie.leader]
            if leads is not INERT:  # tie() made sure that a leader counts wherever its follower does
                ways[(*combination, tie.values[leads])] = 1
    return Factor((*parents, choice.name), ways)


def _least_linked(names: Iterable[str], factors: Sequence[Factor]) -> str:
    linked: dict[str, set[str]] = {name: set() for name in names}
    for factor in factors:
        for name in factor.scope:
            linked[name].update(factor.scope)
    return min(linked, key=lambda name: len(linked[name]))


def _product(factors: Sequence[Factor]) -> Factor:
    result = Factor((), {(): 1})
    for factor in factors:
        shared = [name for name in factor.scope if name in result.scope]
        added = [name for name in factor.scope if name not in result.scope]
        pick_shared = [factor.scope.index(name) for name in shared]
        pick_added = [factor.scope.index(name) for name in added]
        rows: dict[tuple, list[tuple[tuple, int]]] = {}
        for row, n in factor.ways.items():
            key = tuple(row[i] for i in pick_shared)
            rows.setdefault(key, []).append((tuple(row[i] for i in pick_added), n))
        mine = [result.scope.index(name) for name in shared]
        ways = {}
        for row, n in result.ways.items():
            for extra, m in rows.get(tuple(row[i] for i in mine), ()):
                ways[row + extra] = n * m
        result = Factor((*result.scope, *added), ways)
    return result


def _sum_out(name: str, factor: Factor) -> Factor:
    at = factor.scope.index(name)
    ways: dict[tuple, int] = {}
    for row, n in factor.ways.items():
        rest = row[:at] + row[at + 1:]
        ways[rest] = ways.get(rest, 0) + n
    return Factor(factor.scope[:at] + factor.scope[at + 1:], ways)
