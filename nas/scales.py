"""Scales of channels as architecture variables, read as mixtures of widths (RARTS's width search).

Letters: ``N`` scales. Where a choice has logits instead, see nas/alpha.py.
"""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from nas.alpha import complete
from search_spaces.space import Arch, Mixture, SearchSpace, Setting

if TYPE_CHECKING:
    from nas.cost import CostTable


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
        return complete(self.space, {name: Mixture(options, w) for (name, options), w in rows if name in wanted})

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
