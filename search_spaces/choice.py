"""The words for one decision: value, choice, mixture, tie; and the line that refuses a wrong value."""
from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Value = int | float | str
Arch = dict[str, Value]


class Mixture(NamedTuple):
    """A setting that blends options. ``weights``: a Tensor (len(options),) that may need grad; never touched here.

    ``active``: positions to compute, known on the host when drawn; None = all. ``idle``: what the others add,
    "absent", "ones" (+ w_j, GDAS) or "gate" (only dL/dw_j = <f_j(x), dL/dout>, ProxylessNAS).
    """

    options: tuple[Value, ...]
    weights: Any
    active: tuple[int, ...] | None = None
    idle: str = "absent"


Setting = Value | Mixture


@dataclass(frozen=True)
class Choice:
    """One decision. ``options``: ascending if ``ordered``, in published order if not.

    ``needs``: ((name, values that make it count), ...), all must hold and each needed choice must itself count.
    """

    name: str
    options: tuple[Value, ...]
    ordered: bool = True
    needs: tuple[tuple[str, tuple[Value, ...]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "needs", tuple((name, tuple(values)) for name, values in self.needs))
        if not self.options:
            raise ValueError(f"{self.name} has no options. A choice needs at least one.")
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"{self.name} lists an option twice: {listed(self.options)}.")
        if self.ordered and any(a >= b for a, b in zip(self.options, self.options[1:])):  # type: ignore[operator]
            raise ValueError(f"{self.name} is ordered, so its options must ascend: {listed(self.options)}.")


class Tie(NamedTuple):
    """The follower's option is ``values[leader's option]``."""

    leader: str
    values: Mapping[Value, Value]


def listed(values: Iterable[object]) -> str:
    """``values`` as they stand in an error's line."""
    return ", ".join(str(value) for value in values)


def require(name: str, value: Any, options: Sequence[Value]) -> None:
    """ValueError with name, value, allowed and nearest, where ``value`` is none of ``options``."""
    if value in options:
        return
    near: Any = None
    if isinstance(value, int | float) and not any(isinstance(option, str) for option in options):
        near = min(options, key=lambda option: abs(option - value))  # type: ignore[operator]
    else:
        near = next(iter(difflib.get_close_matches(str(value), [str(option) for option in options], n=1)), None)
    raise ValueError(f"{name} = {value} is not in this space. Allowed: {listed(options)}." +
                     (f" Nearest: {near}." if near is not None else ""))


def positive(name: str, value: Any) -> int:
    """``value``; ValueError where it is not an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value}: give an integer, 1 or more.")
    return value


def likeliest(odds: Mapping[Value, float]) -> Value:
    """The most probable option; of equal ones, the first."""
    return max(odds, key=lambda option: odds[option])
