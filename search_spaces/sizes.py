"""Sizes that follow choices: one declaration serves the slice, the mask, the concatenation and the cost record.

A ``Size`` is a function of the choices it names; a ``Layout`` is the channels (or features) of a tensor as one
segment or several side by side, each a prefix of its full extent.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from search_spaces.space import Mixture, Setting


class Size(NamedTuple):
    """``of`` the values of the choices ``on``, in that order: Size(("b0.expand",), lambda e: 16 * e)."""

    on: tuple[str, ...]
    of: Callable[..., int]

    def at(self, arch: Mapping[str, Setting]) -> int:
        """The size under hard settings; ValueError where a setting is a mixture."""
        values = [arch[name] for name in self.on]
        for name, value in zip(self.on, values):
            if isinstance(value, Mixture):
                raise ValueError(f"{name} is a mixture here, so a size on it has no single value. "
                                 "Use candidates(size, arch).")
        return self.of(*values)


class Segment(NamedTuple):
    """A prefix of ``full`` channels, each of ``repeat`` positions (after a flatten: height * width)."""

    size: Size
    full: int
    repeat: int = 1


Layout = tuple[Segment, ...]


def fixed(n: int) -> Size:
    """A size that follows no choice."""
    return Size((), functools.partial(int, n))


def candidates(size: Size, arch: Mapping[str, Setting]) -> list[tuple[int, tuple[int, ...]]]:
    """What ``size`` may be under ``arch``: (value, positions) for each combination of active options.

    ``positions`` has one entry for each name of ``size.on`` whose setting is a mixture, in that order: the position
    of the option in the mixture. The weight of a candidate is the product of its mixtures' weights there. Hard
    settings add no entry: with none but hard ones the answer is [(value, ())].
    """
    axes: list[list[tuple[object, tuple[int, ...]]]] = []
    for name in size.on:
        setting = arch[name]
        if isinstance(setting, Mixture):
            active = range(len(setting.options)) if setting.active is None else setting.active
            axes.append([(setting.options[k], (k,)) for k in active])
        else:
            axes.append([(setting, ())])
    return [(size.of(*(value for value, _ in picked)), sum((at for _, at in picked), ()))
            for picked in itertools.product(*axes)]


def _widest(segment: Segment, arch: Mapping[str, Setting]) -> int:
    return max(value for value, _ in candidates(segment.size, arch)) * segment.repeat


def width(layout: Layout, arch: Mapping[str, Setting]) -> int:
    """The number of positions under ``arch``; of a mixture, its widest active candidate."""
    return sum(_widest(segment, arch) for segment in layout)


def positions(layout: Layout, arch: Mapping[str, Setting]) -> slice | list[int]:
    """Which of the full positions are there: a prefix slice for one segment, their numbers for several.

    Segment i starts at the sum of full * repeat of those before it.
    """
    if len(layout) == 1:
        return slice(0, _widest(layout[0], arch))
    found: list[int] = []
    start = 0
    for segment in layout:
        found.extend(range(start, start + _widest(segment, arch)))
        start += segment.full * segment.repeat
    return found
