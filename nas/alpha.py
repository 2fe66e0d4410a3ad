"""Architecture parameters, read as mixtures: logits of every choice (``Alpha``), or scales of channels (``Scales``).

Letters: ``n`` choices with equally many options, ``K`` options, ``I`` sampled candidates, ``N`` scales. All rows of one
``K`` are one Parameter, so a whole step's samples are drawn in one call and cross to the host once.
"""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from search_spaces.space import Arch, Mixture, SearchSpace, Setting, Value

if TYPE_CHECKING:
    from nas.cost import CostTable


class Alpha(nn.Module):
    """Logits for ``space``, started as N(0, std).

    Rows have the ROOT space's shape; options that ``space`` forbids are at -inf before the softmax, so children of a split
    load their parent's logits unchanged. Choices with one option left are plain values, tied followers copy the weights
    of their leader: neither is ever a mixture of its own.
    """

    def __init__(self, space: SearchSpace, std: float = 0.01, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.space = space
        self.groups: dict[int, list[str]] = {}
        for choice in space.root.choices:
            self.groups.setdefault(len(choice.options), []).append(choice.name)
        self.logits = nn.ParameterDict()
        for K, names in self.groups.items():
            self.logits[str(K)] = nn.Parameter(std * torch.randn(len(names), K, generator=generator))
            allowed = [[option in space[name].options for option in space.root[name].options] for name in names]
            self.register_buffer(f"allowed_{K}", torch.tensor(allowed), persistent=False)

    # -- readings as settings ---------------------------------------------------------------------------------------

    def soft(self, tau: float = 1.0, names: Iterable[str] | None = None) -> dict[str, Setting]:
        """softmax(alpha / tau), without noise."""
        out: dict[str, Setting] = {}
        for rows, logits, _ in self._rows(names):
            for name, weights in zip(rows, torch.softmax(logits / tau, dim=1).unbind(0)):
                out[name] = self._mixture(name, weights)
        return _complete(self.space, out)

    def gumbel(
        self, tau: float, noise: torch.Generator, names: Iterable[str] | None = None, count: int | None = None
    ) -> dict[str, Setting]:
        """A Gumbel-softmax sample over all options, or over ``count`` of them (TAS (3)-(5)).

        u = (log softmax(alpha) + g) / tau and p = softmax(u); with ``count``, that many candidates are drawn without
        replacement in proportion to p + 1e-7 (no gradient through the draw) and softmax over their u is their weight.
        ``tau <= 0``: u = alpha, the plain softmax. Candidates keep the order of the space's options.
        """
        out: dict[str, Setting] = {}
        for rows, logits, allowed in self._rows(names):
            u = self._noisy(logits, tau, noise)
            for name, weights in zip(rows, torch.softmax(u, dim=1).unbind(0)):
                out[name] = self._mixture(name, weights)
            drawn = [i for i, name in enumerate(rows) if count is not None and len(self.space[name].options) > count]
            if count is None or not drawn:
                continue
            u, allowed = u[drawn], allowed[drawn]
            at = self._draw(torch.softmax(u, dim=1), allowed, count, noise)  # (n, I)
            v = torch.softmax(u.gather(1, at.to(u.device)), dim=1)
            for i, positions, weights in zip(drawn, at.tolist(), v.unbind(0)):
                options = self.space.root[rows[i]].options
                out[rows[i]] = Mixture(tuple(options[j] for j in positions), weights)
        return _complete(self.space, out)

    def straight_through(
        self, tau: float, noise: torch.Generator, names: Iterable[str] | None = None
    ) -> dict[str, Setting]:
        """One option by Gumbel-max with weights onehot - stopgrad(p) + p over all options; only that one is computed, the
        others add their weight, whose value is 0 (``idle="ones"``, GDAS)."""
        out: dict[str, Setting] = {}
        for rows, logits, _ in self._rows(names):
            p = torch.softmax(self._noisy(logits, tau, noise), dim=1)
            at = p.argmax(dim=1)
            hard = torch.zeros_like(p).scatter_(1, at[:, None], 1.0)
            for name, j, h in zip(rows, at.tolist(), (hard - p.detach() + p).unbind(0)):
                out[name] = Mixture(self.space.root[name].options, h, (j,), "ones")
        return _complete(self.space, out)

    # -- readings as numbers ----------------------------------------------------------------------------------------

    def probabilities(self) -> dict[str, list[float]]:
        """softmax(alpha) of every choice over its root options, on the host."""
        out: dict[str, list[float]] = {}
        for K, names in self.groups.items():
            rows = torch.softmax(self._masked(K), dim=1).detach().double().cpu().tolist()
            out.update(zip(names, rows))
        return out

    def architecture(
        self, skip_limit: int | None = None, probabilities: Mapping[str, Sequence[float]] | None = None
    ) -> Arch:
        """The most probable option of every choice (``SearchSpace.derive``); of ``probabilities``, if given, instead of these.

        ``skip_limit``: how many choices of one part of the space (a cell) may take one of ``space.skips`` (P-DARTS). While
        more do, skips lose their probability at the choice of that part that is least sure of them. Choices that allow
        nothing else, and tied followers, keep theirs. Raises ValueError where it is negative.
        """
        p = {name: list(row) for name, row in (probabilities or self.probabilities()).items()}
        arch = self.space.derive(p)
        if skip_limit is None:
            return arch
        if skip_limit < 0:
            raise ValueError(f"skip_limit = {skip_limit}. Allowed: 0 or more skips a part, or None for no limit.")
        while (name := self._surplus_skip(arch, p, skip_limit)) is not None:
            options = self.space.root[name].options
            p[name] = [0.0 if option in self.space.skips else q for option, q in zip(options, p[name])]
            arch = self.space.derive(p)
        return arch

    def _surplus_skip(self, arch: Mapping[str, Value], p: Mapping[str, list[float]], limit: int) -> str | None:
        """Of the choices that can do without a skip, the least sure one in the first part that has more than ``limit``."""
        space, parts = self.space, dict[str, list[str]]()
        for name, option in arch.items():
            if option in space.skips:
                parts.setdefault(space.part(name), []).append(name)
        free = set(space.free)
        for names in parts.values():
            sure = {name: p[name][space.root[name].options.index(arch[name])] for name in names
                    if name in free and not set(space[name].options) <= set(space.skips)}  # fmt: skip
            loose = [name for name in sure if sure[name] > 0]  # 0: has been asked to do without
            if len(names) > limit and loose:
                return min(loose, key=lambda name: sure[name])
        return None

    def entropy(self) -> Tensor:
        """Mean over open choices of H(softmax(alpha)) / log(allowed options): 1 undecided, 0 decided."""
        parts = []
        for _, logits, allowed in self._rows(None):
            log_p = torch.log_softmax(logits, dim=1).masked_fill(~allowed, 0.0)  # 0 log 0 is 0, in the gradient too
            H = -(torch.softmax(logits, dim=1) * log_p).sum(1)
            parts.append(H / allowed.sum(1).to(H).log())
        return torch.cat(parts).mean() if parts else torch.zeros(())

    # -- inside -----------------------------------------------------------------------------------------------------

    def _masked(self, K: int) -> Tensor:
        return self.logits[str(K)].masked_fill(~getattr(self, f"allowed_{K}"), float("-inf"))

    def _rows(self, names: Iterable[str] | None) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """For each K: open choices among ``names``, their masked logits (n, K), what is allowed (n, K)."""
        wanted = set(self.space.free) if names is None else set(names) & set(self.space.free)
        for K, group in self.groups.items():
            at = [i for i, name in enumerate(group) if name in wanted]
            if not at:
                continue
            logits, allowed = self._masked(K), getattr(self, f"allowed_{K}")
            if len(at) < len(group):
                logits, allowed = logits[at], allowed[at]
            yield [group[i] for i in at], logits, allowed

    @staticmethod
    def _noisy(logits: Tensor, tau: float, noise: torch.Generator) -> Tensor:
        """(3): u, (n, K); everything is redrawn on a non-finite Gumbel number."""
        if tau <= 0:
            return logits
        while True:
            g = -torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=noise).log()
            if bool(g.isfinite().all()):
                return (torch.log_softmax(logits, dim=1) + g.to(logits)) / tau

    @staticmethod
    def _draw(p: Tensor, allowed: Tensor, count: int, noise: torch.Generator) -> Tensor:
        """(4): ``count`` positions a row, without replacement, ascending, on the host; (n, I)."""
        odds = ((p.detach().double() + 1e-7) * allowed).cpu()
        return torch.multinomial(odds, count, replacement=False, generator=noise).sort(dim=1).values

    def _mixture(self, name: str, weights: Tensor) -> Mixture:
        """All root options; only the allowed ones are computed."""
        options, allowed = self.space.root[name].options, self.space[name].options
        if len(options) == len(allowed):
            return Mixture(options, weights)
        return Mixture(options, weights, tuple(j for j, option in enumerate(options) if option in allowed))


class Scales(nn.Module):
    """A scale for every channel, read as mixtures of widths whose tail sums are the scales (supernets.preresnet).

    Network Slimming (Liu et al., ICCV 2017, arXiv 1708.06519), and RARTS's width search: the scales of all batch norms
    are architecture variables, an L1 penalty pulls them to 0, one threshold for the whole network says which stay, and
    the number that stay at a norm is its width. Every free choice of ``space`` is such a width.

    ``scales``: (N,) one for each option of the root's free choices, one choice after another. Options may be every width
    1 .. C or only some: a scale is that of the channels that its option adds to the next narrower one. All start at
    ``value`` (the released code: 0.5). A restricted space loads its root's state; the channels of a forbidden option go
    with the next wider one. Raises ValueError for a ``value`` of 0 or less, and for free choices that are no widths.
    """

    at: Tensor
    covers: Tensor
    ends: Tensor

    def __init__(self, space: SearchSpace, value: float = 0.5) -> None:
        super().__init__()
        if not value > 0:
            raise ValueError(f"value = {value}: scales start above 0, for instance at 0.5. None at 0 would ever move.")
        self.space = space
        self.widths = {name: _whole(space, name) for name in space.free}
        if not self.widths:
            raise ValueError(f"{space.name} has no choice left, so there is nothing to scale.")
        self.counts = [len(options) for options in self.widths.values()]
        start, at, covers = 0, list[int](), list[int]()
        for name in space.root.free:
            whole, options = space.root[name].options, self.widths.get(name, ())
            at += [start + whole.index(option) for option in options]
            covers += [b - a for a, b in zip((0, *options), options)]
            start += len(whole)
        last = torch.tensor(self.counts).cumsum(0) - 1
        self.scales = nn.Parameter(torch.full((start,), float(value)))
        self.register_buffer("at", torch.tensor(at), persistent=False)  # where the remaining options are in scales
        self.register_buffer("covers", torch.tensor(covers), persistent=False)  # how many channels each of them adds
        self.register_buffer("ends", torch.zeros(len(at), dtype=torch.bool).index_fill_(0, last, True), persistent=False)

    def soft(self, names: Iterable[str] | None = None) -> dict[str, Setting]:
        """Mixtures with w_k = s_k - s_(k+1), where s behind the widest option is 0: their tail sums are the scales.

        Weights may have any sign; they are no distribution.
        """
        s = self._free()
        behind = torch.cat([s[1:], s.new_zeros(1)]).masked_fill(self.ends, 0.0)
        wanted = set(self.widths) if names is None else set(names)
        rows = zip(self.widths.items(), (s - behind).split(self.counts))
        return _complete(self.space, {name: Mixture(options, w) for (name, options), w in rows if name in wanted})

    def l1(self) -> Tensor:
        """sum |s| over all channels of the free choices, () tensor; its slope at 0 is 0, as in the released code."""
        return (self._free().abs() * self.covers).sum()

    def entropy(self) -> Tensor:
        """H(|s| / sum |s|) / log(channels), over channels: 1 where all are equal, 0 where one has all. () without gradient."""
        share = self._free().detach().abs()
        share = share / (share * self.covers).sum().clamp(min=torch.finfo(share.dtype).tiny)
        return -(torch.xlogy(share, share) * self.covers).sum() / self.covers.sum().clamp(min=2).log()

    def probabilities(self) -> dict[str, list[float]]:
        """What is believed of each width, over the root's options: how often ``architecture(keep)`` derives it, if the number
        of channels to keep is drawn uniformly from 1, 2, .. all of them. A choice that is not free has one certain option
        (a follower: what it is in ``architecture()``)."""
        sizes, covers = self._sizes()
        ranked, order = sizes.sort(descending=True)
        before = torch.cat([torch.zeros(1, dtype=torch.long), covers[order].cumsum(0)])  # channels in front of each rank
        above = before[torch.searchsorted(-ranked, -sizes)].double() / before[-1]  # in how many draws an option drops out
        out = {name: [float(option == value) for option in self.space.root[name].options]
               for name, value in self.architecture().items()}  # fmt: skip
        for (name, options), dropped, added in zip(self.widths.items(), above.split(self.counts), covers.split(self.counts)):
            dropped, order = dropped.sort()
            kept = torch.searchsorted(added[order].cumsum(0), torch.tensor(options))  # so many stay, at least, for each width
            reached = (1 - dropped[kept]).index_fill(0, torch.tensor([0]), 1.0).tolist()  # how often a width or a wider one
            odds = dict(zip(options, (a - b for a, b in zip(reached, (*reached[1:], 0.0)))))
            out[name] = [odds.get(cast(int, option), 0.0) for option in self.space.root[name].options]
        return out

    def cut(self, keep: float) -> float:
        """The threshold on |s| that round(keep * channels) of all channels reach: at least one, more where some are equal.

        Raises ValueError for what is no share.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep = {keep} is not a share of the channels. Allowed: above 0, up to 1.")
        sizes, covers = self._sizes()
        ranked, order = sizes.sort(descending=True)
        reached = covers[order].cumsum(0)
        return float(ranked[int(torch.searchsorted(reached, max(1, round(keep * int(reached[-1])))))])

    def architecture(self, keep: float = 0.6, threshold: float | None = None) -> Arch:
        """Each width: how many of its channels have |s| >= ``threshold`` (``cut(keep)``, where none is given); at least one.

        In a restricted space: the widest remaining option that is no wider, or else the narrowest. Which channels they
        are is forgotten: the network is trained from scratch. Raises ValueError for scales that are not finite.
        """
        sizes, covers = self._sizes()
        stays = covers * (sizes >= (self.cut(keep) if threshold is None else threshold))
        arch = {choice.name: choice.options[0] for choice in self.space.choices}
        for (name, options), kept in zip(self.widths.items(), stays.split(self.counts)):
            arch[name] = options[max(bisect_right(options, int(kept.sum())), 1) - 1]
        return arch | {name: tie.values[arch[tie.leader]] for name, tie in self.space.ties.items()}

    def for_budget(self, costs: CostTable, R: float) -> Arch:
        """Of the architectures of all thresholds, the dearest that costs at most ``R``, in the unit of ``costs``.

        No cost may fall where a width grows. Raises ValueError where the narrowest network costs more.
        """
        levels = [*self._sizes()[0].unique().tolist(), math.inf]  # ascending, so the dearest comes first
        low, high = 0, len(levels) - 1
        least = costs.of(self.architecture(threshold=math.inf))
        if least > R:
            raise ValueError(f"A budget of {R:,.0f} cannot be reached: the narrowest network of this space costs {least:,.0f}.")
        while low < high:  # levels[high] fits, nothing below levels[low] does
            middle = (low + high) // 2
            fits = costs.of(self.architecture(threshold=levels[middle])) <= R
            low, high = (low, middle) if fits else (middle + 1, high)
        return self.architecture(threshold=levels[low])

    # -- inside -----------------------------------------------------------------------------------------------------

    def _free(self) -> Tensor:
        """The scales of the remaining options of free choices."""
        return self.scales if len(self.at) == len(self.scales) else self.scales[self.at]

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Their |s| (float64), and ``covers``, on the host. Raises ValueError for nan and infinity."""
        sizes = self._free().detach().abs().double().cpu()
        if not bool(sizes.isfinite().all()):
            raise ValueError("The scales are not finite, so they say no width. Lower the rate of alpha or the L1 penalty.")
        return sizes, self.covers.cpu()


def _whole(space: SearchSpace, name: str) -> tuple[int, ...]:
    """The remaining options of a width. ValueError for a choice that is none."""
    options = [option for option in space[name].options if isinstance(option, int) and option > 0]
    if not space[name].ordered or len(options) < len(space[name].options):
        raise ValueError(f"{name} is no width, so it has no scales. Restrict it to one option, or search it with Alpha.")
    return tuple(options)


def _complete(space: SearchSpace, out: dict[str, Setting]) -> dict[str, Setting]:
    """Adds choices with one option left, and followers with the weights of their leader."""
    for choice in space.choices:
        if choice.name not in space.ties and len(choice.options) == 1:
            out[choice.name] = choice.options[0]
    for name, tie in space.ties.items():
        if tie.leader in out:
            leader = out[tie.leader]
            if isinstance(leader, Mixture):
                allowed = tuple(tie.values.get(value, space[name].options[0]) for value in leader.options)
                out[name] = leader._replace(options=allowed)
            else:
                out[name] = tie.values[leader]
    return out
