"""Search spaces: which architectures there are. Pure data; numpy at most. Import the words of choice.py from here.

An architecture gives every choice of its space one option. A choice counts where all its ``needs`` hold and the
needed choices count themselves; elsewhere it is inert: whatever it says, the network is the same. A space is only
ever restricted (``restrict``) or coupled (``tie``); both return a new space that remembers its ``root``.

Letters: ``N`` architectures, ``M`` choices, ``K`` options of one choice in the ROOT space.
"""
from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import json
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from search_spaces.choice import Arch, Choice, Mixture, Setting, Tie, Value, likeliest, listed, require
from search_spaces.count import count

__all__ = ["Arch", "Choice", "Mixture", "SearchSpace", "Setting", "Tie", "Value", "require"]

Space = TypeVar("Space", bound="SearchSpace")


class SearchSpace:
    """A set of architectures. ``choices`` hold the remaining options, in the root's order.

    ``name``: "resnet.CifarResNet" inside search_spaces. ``args``: JSON data, enough to rebuild the root.
    ``ties``: follower -> Tie. ``root``: the space before any restrict or tie. ``skips``, ``nones``: the options of
    unordered choices that pass their input on as it is, and those that give nothing at all (cell spaces).
    """

    skips: tuple[str, ...] = ()
    nones: tuple[str, ...] = ()
    name: str
    args: dict[str, Any]
    choices: tuple[Choice, ...]
    ties: Mapping[str, Tie]

    def __init__(self, choices: Sequence[Choice], args: Mapping[str, Any], *,
                 dear: Mapping[str, Value] | None = None, cheap: Mapping[str, Value] | None = None) -> None:
        """``dear`` and ``cheap``: for unordered choices, what ``largest`` and ``smallest`` take instead of the last
        and the first option. Raises ValueError for double names, needs that cannot hold, args that JSON cannot hold.
        """
        self.name = f"{type(self).__module__.removeprefix('search_spaces.')}.{type(self).__qualname__}"
        try:
            self.args = json.loads(json.dumps(dict(args), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"The args of {self.name} must be JSON data (they go into arch.json): {error}.") from None
        self.choices = tuple(choices)
        self.ties = {}
        self._root: SearchSpace | None = None
        self._at = {choice.name: i for i, choice in enumerate(self.choices)}  # the same in root and restricted spaces
        if len(self._at) < len(self.choices):
            double = next(c.name for i, c in enumerate(self.choices) if self._at[c.name] != i)
            raise ValueError(f"{self.name} has two choices named {double}.")
        self._order = self._needed_first()
        self._dear, self._cheap = dict(dear or {}), dict(cheap or {})
        for name, value in (*self._dear.items(), *self._cheap.items()):
            require(name, value, self[name].options)

    def _needed_first(self) -> tuple[int, ...]:
        """Positions of the choices, each after those it needs. Raises ValueError for needs that cannot hold."""
        order: dict[str, int] = {}
        for choice in self.choices:
            for name, values in choice.needs:
                for value in values:
                    require(name, value, self[name].options)
        while len(order) < len(self.choices):
            ready = [c.name for c in self.choices if c.name not in order and all(n in order for n, _ in c.needs)]
            if not ready:
                stuck = [c.name for c in self.choices if c.name not in order]
                raise ValueError(f"The needs of {self.name} form a circle among {', '.join(stuck)}.")
            order.update((name, self._at[name]) for name in ready)
        return tuple(order.values())

    # ---- reading ------------------------------------------------------------------------------------------------

    @property
    def root(self) -> SearchSpace:
        return self if self._root is None else self._root

    @property
    def free(self) -> tuple[str, ...]:
        """The names of the choices that are still open: more than one option, and following no other."""
        return tuple(c.name for c in self.choices if len(c.options) > 1 and c.name not in self.ties)

    @property
    def ruled(self) -> tuple[str, ...]:
        """The names of the choices that a rule of the family sets from the others, so that they are none of a search."""
        return ()

    @functools.cached_property
    def size(self) -> int:
        """The exact number of canonical architectures."""
        return count(self.choices, self.ties)

    @functools.cached_property
    def hash(self) -> str:
        """"sha256:..." of name, args and root choices: the same for a space and all its restrictions."""
        choices = [[c.name, c.options, c.ordered, c.needs] for c in self.root.choices]
        text = json.dumps([self.name, self.args, choices], sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def __getitem__(self, name: str) -> Choice:
        if name not in self._at:
            raise ValueError(self._unknown(name))
        return self.choices[self._at[name]]

    def __repr__(self) -> str:
        args = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        return f"{self.name}({args})" + ("" if self._root is None else " restricted")

    def part(self, name: str) -> str:
        """The part of the network that a choice belongs to, such as "normal"; "" where a space has no parts."""
        return ""

    # ---- architectures ------------------------------------------------------------------------------------------

    def largest(self) -> Arch:
        """The last option of every ordered choice, the dear one of every other; canonical."""
        return self.canonical(self._follow({c.name: self._extreme(c, self._dear, -1) for c in self.choices}))

    def smallest(self) -> Arch:
        """The first option of every ordered choice, the cheap one of every other; canonical."""
        return self.canonical(self._follow({c.name: self._extreme(c, self._cheap, 0) for c in self.choices}))

    def _extreme(self, choice: Choice, named: Mapping[str, Value], end: int) -> Value:
        """The named option; where it is gone, the last or first that is left and gives something."""
        value = named.get(choice.name)
        some = [option for option in choice.options if option not in self.nones] or choice.options
        return value if value is not None and value in choice.options else some[end]

    def sample(self, rng: random.Random) -> Arch:
        """Uniform in every free choice, followers set; canonical."""
        return self.canonical(self._follow({c.name: rng.choice(c.options) for c in self.choices}))

    def derive(self, probabilities: Mapping[str, Sequence[float]]) -> Arch:
        """The most probable remaining option of each choice (equal ones: the first), followers set.

        ``probabilities[name]``: K numbers, for the ROOT options; those of forbidden options are not read. A choice
        with one remaining option, or a follower, may be missing. Not canonical: the settings of inert choices are
        their argmax too (TAS's estimator reads them). Raises ValueError for unknown or missing names, a wrong K, nan.
        """
        odds = self._odds(probabilities)
        return self._follow({c.name: likeliest(odds[c.name]) if c.name in odds else c.options[0]
                             for c in self.choices})

    def _odds(self, probabilities: Mapping[str, Sequence[float]]) -> dict[str, dict[Value, float]]:
        """For each choice with a row, its remaining options' probabilities. Raises ValueError as ``derive`` says."""
        for name in probabilities:
            if name not in self._at:
                raise ValueError(self._unknown(name))
        found: dict[str, dict[Value, float]] = {}
        for choice, root in zip(self.choices, self.root.choices):
            row = probabilities.get(choice.name)
            if row is None and (len(choice.options) == 1 or choice.name in self.ties):
                continue
            if row is None or len(row) != len(root.options):
                given = "none" if row is None else str(len(row))
                raise ValueError(f"{choice.name} needs {len(root.options)} probabilities, one for each option of the "
                                 f"unrestricted space; given: {given}.")
            odds = {option: float(p) for option, p in zip(root.options, row) if option in choice.options}
            if any(math.isnan(p) for p in odds.values()):
                raise ValueError(f"The probabilities of {choice.name} hold nan: {listed(odds.values())}.")
            found[choice.name] = odds
        return found

    def _follow(self, arch: Arch) -> Arch:
        """``arch`` with every follower's setting as its leader's asks."""
        return arch | {name: tie.values[arch[tie.leader]] for name, tie in self.ties.items()}

    def counting(self, arch: Mapping[str, Value]) -> frozenset[str]:
        """The names of the choices that count in ``arch``. Raises ValueError for missing or unknown names."""
        self._complete(arch)
        live: set[str] = set()
        for i in self._order:
            choice = self.choices[i]
            if all(name in live and arch[name] in values for name, values in choice.needs):
                live.add(choice.name)
        return frozenset(live)

    def canonical(self, arch: Mapping[str, Value]) -> Arch:
        """``arch`` in the space's order, inert settings set to the first option of the ROOT choice. Values off the lists are
        kept: ``check`` judges. Raises ValueError for missing or unknown names."""
        live = self.counting(arch)
        return {c.name: arch[c.name] if c.name in live else c.options[0] for c in self.root.choices}

    def normal(self, arch: Mapping[str, Value]) -> Arch:
        """What a supernet runs in the place of ``arch``: of the architectures that are one network when trained alone, the one
        whose weights can serve them all; canonical, of the root. In most families that is the canonical ``arch``."""
        return self.canonical(arch)

    def key(self, arch: Mapping[str, Value]) -> Hashable:
        """Equal for architectures whose normal forms are equal, in a space and all its restrictions."""
        return tuple(self.normal(arch).values())

    def text(self, arch: Mapping[str, Value]) -> str:
        """One line that ``parse`` reads back: name=value,name=value of the canonical architecture."""
        return ",".join(f"{name}={value}" for name, value in self.canonical(arch).items())

    def parse(self, text: str) -> Arch:
        """The architecture that ``text`` writes down, canonical; of the root: ``check`` judges a restriction. Raises ValueError
        for another form, missing, double or unknown names, and options off the root's lists."""
        arch: Arch = {}
        for word in text.strip().split(","):
            name, equals, value = (part.strip() for part in word.partition("="))
            if not equals:
                raise ValueError(f"{word!r} is not name=value. {self.name} is written name=value,name=value.")
            options = {str(option): option for option in self.root[name].options}
            require(name, value, tuple(options))
            if name in arch:
                raise ValueError(f"{name} is set twice, to {arch[name]} and to {value}. Set it once.")
            arch[name] = options[value]
        return self.canonical(arch)

    def check(self, arch: Mapping[str, Value]) -> None:
        """ValueError for missing or unknown names, and for counting settings outside the remaining options."""
        live = self.counting(arch)
        for choice in self.choices:
            name = choice.name
            if name not in live:
                continue
            require(name, arch[name], choice.options)
            if name in self.ties:
                leader, values = self.ties[name]
                require(leader, arch[leader], self[leader].options)
                if arch[name] != values[arch[leader]]:
                    raise ValueError(f"{name} = {arch[name]} is not in this space: it follows {leader} = "
                                     f"{arch[leader]}. Allowed: {values[arch[leader]]}.")

    def _complete(self, arch: Mapping[str, Value]) -> None:
        if arch.keys() == self._at.keys():
            return
        for name in arch:
            if name not in self._at:
                raise ValueError(self._unknown(name))
        missing = [name for name in self._at if name not in arch]
        raise ValueError(f"This architecture does not set {missing[0]}" +
                         (f" and {len(missing) - 1} more of the choices" if missing[1:] else "") +
                         f" of {self.name}. Allowed: {listed(self[missing[0]].options)}.")

    def _unknown(self, name: object) -> str:
        near = difflib.get_close_matches(str(name), self._at, n=1, cutoff=0.0)
        return f"{name} is not a choice of {self.name}." + (f" Nearest: {near[0]}." if near else "")

    # ---- smaller spaces -----------------------------------------------------------------------------------------

    def restrict(self: Space, allowed: Mapping[str, Sequence[Value]]) -> Space:
        """This space with only the ``allowed`` options of the named choices; followers keep what their leaders allow.

        Raises ValueError for unknown names and options, an empty list, and a follower whose leader asks for more.
        """
        kept = {choice.name: choice.options for choice in self.choices}
        for name, values in allowed.items():
            choice = self[name]
            if len(values) == 0:
                raise ValueError(f"{name} would have no option left. Allowed: {listed(choice.options)}.")
            for value in values:
                require(name, value, choice.options)
            kept[name] = tuple(option for option in choice.options if option in values)
        space = self._with(kept, self.ties)
        for name in allowed:
            over = [option for option in space[name].options if option not in kept[name]]
            if over:
                leader = self.ties[name].leader
                raise ValueError(f"{name} follows {leader}, which still asks for {listed(over)}. Restrict {leader}.")
        return space

    def tie(self: Space, follower: str, leader: str, values: Mapping[Any, Value]) -> Space:
        """This space with the option of ``follower`` fixed by the leader's: ``values[leader option]``.

        Raises ValueError for unknown names and options, leader options without a value, a tie of a choice to itself
        or in a chain, and a leader that may be inert where its follower counts.
        """
        follows, leads = self[follower], self[leader]
        leaders = {tie.leader for tie in self.ties.values()}
        if follower == leader or follower in self.ties or leader in self.ties or follower in leaders:
            raise ValueError(f"{follower} cannot follow {leader}: a choice follows one leader, which follows none.")
        for option, value in values.items():
            require(leader, option, self.root[leader].options)
            if option in leads.options:
                require(follower, value, follows.options)
        missing = [option for option in leads.options if option not in values]
        if missing:
            raise ValueError(f"{follower} follows {leader}, but no value is given for {leader} = {listed(missing)}.")
        mine = self.conditions(follower)
        for name, needed in self.conditions(leader).items():
            if not mine.get(name, set(self[name].options)) <= needed:
                raise ValueError(f"{follower} cannot follow {leader}: {leader} may be inert where {follower} counts "
                                 f"(it needs {name} = {listed(sorted(needed, key=str))}).")
        ties = {**self.ties, follower: Tie(leader, dict(values))}
        return self._with({choice.name: choice.options for choice in self.choices}, ties)

    def conditions(self, name: str) -> dict[str, set[Value]]:
        """What must hold, directly or further up, for ``name`` to count: choice -> options of the root. It counts where all
        hold, and only there."""
        found: dict[str, set[Value]] = {}
        for needed, values in self[name].needs:
            for up, allowed in (*self.conditions(needed).items(), (needed, set(values))):
                found[up] = found.get(up, set(allowed)) & allowed
        return found

    def _with(self: Space, kept: Mapping[str, tuple[Value, ...]], ties: Mapping[str, Tie]) -> Space:
        """A copy with other remaining options and ties: a subclass's attributes and methods stay."""
        options = dict(kept)
        for name, (leader, values) in ties.items():
            image = {values[option] for option in kept[leader]}
            options[name] = tuple(option for option in self.root[name].options if option in image)
        space = copy.copy(self)
        for name in tuple(vars(space)):
            if isinstance(getattr(type(space), name, None), functools.cached_property):
                del vars(space)[name]  # worked out for the other options
        space._root = self.root
        space.ties = dict(ties)
        space.choices = tuple(c if options[c.name] == c.options else Choice(c.name, options[c.name], c.ordered, c.needs)
                              for c in self.choices)
        return space

    # ---- codes: many architectures at once ------------------------------------------------------------------------

    def encode(self, archs: Sequence[Mapping[str, Value]]) -> np.ndarray:
        """(N, M) int16: positions in the ROOT options. Raises ValueError for values off the root's lists."""
        places = [(c.name, {option: k for k, option in enumerate(c.options)}) for c in self.root.choices]
        codes = np.zeros((len(archs), len(self.choices)), dtype=np.int16)
        for n, arch in enumerate(archs):
            self._complete(arch)
            try:
                codes[n] = [place[arch[name]] for name, place in places]
            except KeyError:
                for choice in self.root.choices:
                    require(choice.name, arch[choice.name], choice.options)
        return codes

    def decode(self, codes: np.ndarray) -> list[Arch]:
        """The architectures of ``codes`` (N, M), the inverse of ``encode``. Raises ValueError for a wrong shape or
        positions that the root does not have."""
        codes = self._coded(codes)
        columns = [[choice.options[k] for k in column.tolist()]
                   for choice, column in zip(self.root.choices, codes.T)]
        names = [choice.name for choice in self.choices]
        return [dict(zip(names, row)) for row in zip(*columns)] if columns else [{} for _ in codes]

    def canonical_codes(self, codes: np.ndarray) -> np.ndarray:
        """``canonical`` for codes (N, M): a copy in which every inert entry is 0."""
        codes = self._coded(codes).copy()
        live = np.ones(codes.shape[::-1], dtype=bool)  # (M, N): a choice's column lies in one piece
        for i, at, holds in self._conditional:
            live[i] &= live[at] & holds[codes[:, at]]
        codes[~live.T] = 0
        return codes

    @functools.cached_property
    def _conditional(self) -> list[tuple[int, int, np.ndarray]]:
        """(choice, the one that it needs, (K,) bool: at which of that one's root options), in the order to look at them."""
        return [(i, self._at[name], np.array([option in values for option in self.root.choices[self._at[name]].options]))
                for i in self._order for name, values in self.choices[i].needs]

    def random_codes(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """(n, M) int16: uniform in every free choice, followers set, canonical: ``sample`` for many."""
        codes = np.zeros((n, len(self.choices)), dtype=np.int16)
        for i, (choice, root) in enumerate(zip(self.choices, self.root.choices)):
            if choice.name not in self.ties:
                places = np.array([root.options.index(option) for option in choice.options], dtype=np.int16)
                codes[:, i] = places[rng.integers(len(places), size=n)]
        return self.canonical_codes(self._follow_codes(codes))

    def lawful(self, codes: np.ndarray) -> np.ndarray:
        """(N, M) -> (N,) bool: which of ``codes`` of this (restricted) space ``sample`` may draw; all, but in families with
        a rule of their own."""
        return np.ones(len(codes), dtype=bool)

    def _follow_codes(self, codes: np.ndarray) -> np.ndarray:
        """``_follow`` for codes (N, M): a copy in which every follower is as its leader asks."""
        codes = codes.copy()
        for name, (leader, values) in self.ties.items():
            places = np.array([self.root[name].options.index(values[option]) if option in values else 0
                               for option in self.root[leader].options], dtype=np.int16)
            codes[:, self._at[name]] = places[codes[:, self._at[leader]]]
        return codes

    def _coded(self, codes: np.ndarray) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != len(self.choices) or codes.dtype.kind not in "iu":
            raise ValueError(f"Codes of {self.name} are integers (N, {len(self.choices)}); "
                             f"given: {codes.dtype} {codes.shape}.")
        wrong = (codes < 0) | (codes >= np.array([len(choice.options) for choice in self.root.choices]))
        if wrong.any():
            n, i = np.argwhere(wrong)[0].tolist()
            choice = self.root.choices[i]
            raise ValueError(f"Code {codes[n, i]} of {choice.name} in row {n} is not a position in this space. "
                             f"Allowed: 0 to {len(choice.options) - 1}.")
        return codes
