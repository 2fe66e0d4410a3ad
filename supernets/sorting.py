"""Channel sort: the middle channels of one block in descending order of importance, so that a narrower child keeps the best
(OFA, arXiv 1908.09791, page section 3). The block computes what it did; only the order of its channels is another.

    moved = sort_channels([block.expand, block.depthwise], block.project, keep=(64,), squeeze=block.squeeze)
    w.permute(moved)                                   # momentum, pending gradients and average follow

A bottleneck of three convolutions is sorted from behind: ``sort_chain([conv1, conv2, conv3])`` is ``sort_channels([conv2],
conv3)``, then ``([conv1], conv2)``.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from search_spaces.sizes import Segment
from search_spaces.space import SearchSpace
from supernets.elastic import Leaf, Normalise
from supernets.squeeze import SqueezeExcite

Moved = list[tuple[Parameter, int, Tensor]]
"""(parameter, dim, order): the parameter is now what ``index_select(dim, order)`` makes of the old one."""


def importance(weight: Tensor, dim: int = 1) -> Tensor:
    """(n,): the L1 norm of each of the n slices of ``weight`` along ``dim``; dim 1 is what a layer reads."""
    return weight.detach().abs().sum([axis for axis in range(weight.ndim) if axis != dim])


def banded(scores: Tensor, keep: Iterable[int] = ()) -> Tensor:
    """(n,) -> (n,) positions by descending score within each band between the widths ``keep``, equal scores as they stand.

    No position crosses a kept width, so the first c are the same set for every c in ``keep``. ValueError for widths
    outside 1 .. n.
    """
    n = len(scores)
    for width in keep:
        if not 1 <= width <= n:
            raise ValueError(f"keep: a width of {width}. Allowed: 1 to {n}, the channels that are sorted.")
    edges = sorted({0, *keep, n})
    return torch.cat([low + scores[low:high].argsort(descending=True, stable=True) for low, high in pairwise(edges)])


def trained_widths(out: Segment, trained: SearchSpace | None) -> list[int]:
    """``keep`` of ``sort_channels``: the widths below the full one that the options of ``trained`` give ``out``, ascending.
    None has trained none."""
    if trained is None:
        return []
    options = [trained[name].options for name in out.size.on]
    return sorted({int(out.size.of(*values)) for values in product(*options)} - {out.full})


def sort_chain(leaves: Sequence[Leaf], trained: SearchSpace | None = None) -> Moved:
    """Sorts, from behind, the channels between each two neighbours of a chain; those that go in and out stay."""
    moved: Moved = []
    for maker, reader in reversed(list(pairwise(leaves))):
        moved += sort_channels([maker], reader, trained_widths(maker.out[0], trained))
    return moved


@torch.no_grad()
def sort_channels(
    makers: Sequence[Leaf], reader: Leaf | Sequence[Leaf], keep: Sequence[int] = (), squeeze: SqueezeExcite | None = None
) -> Moved:
    """Sorts, in place, the channels that ``makers`` give (depthwise ones pass them on) and ``reader``, or each of several,
    reads.

    Importance is the L1 norm of the readers' columns. ``keep``: the widths already trained; the channels of no such child
    change. ``squeeze``: on these channels; its hidden units are sorted too, by the L1 norm of what they send, and stay
    within the hidden widths of ``keep`` (the released code lets them cross, which changes kept children by 2e-4).

    Weights, norms (scale, shift, statistics), biases follow; kernel matrices, which channels share, do not move. Returns the
    parameters that were permuted, for ``Descent.permute``. ValueError, before anything moves, for norms with a scale per
    width, readers of a concatenation, and leaves of another number of channels.
    """
    readers = [reader] if isinstance(reader, Leaf) else reader
    weights = [cast(Parameter, leaf.weight) for leaf in readers]
    n = weights[0].shape[1]
    for leaf, weight in zip(readers, weights):
        if len(leaf.into) != 1 or weight.shape[1] != n:
            raise ValueError(f"{leaf.name}: reads several segments side by side, or other channels than {readers[0].name}; "
                             "they cannot be sorted as one.")  # fmt: skip
    rows = [place for maker in makers for place in _made(maker, n)]
    if squeeze is not None and squeeze.reduce.shape[1] != n:
        raise ValueError(f"{squeeze.name}: has {squeeze.reduce.shape[1]} channels, where {readers[0].name} reads {n}.")
    order = banded(torch.stack([importance(weight) for weight in weights]).sum(0), keep)
    moved = _permute([*((weight, 1) for weight in weights), *rows], order)
    if squeeze is not None:
        moved += _permute([(squeeze.reduce, 1), (squeeze.expand, 0), (squeeze.expand_bias, 0)], order)
        units = banded(importance(squeeze.expand), [squeeze.hidden(width) for width in keep])
        moved += _permute([(squeeze.reduce, 0), (squeeze.reduce_bias, 0), (squeeze.expand, 1)], units)
    return moved


def _made(maker: Leaf, n: int) -> list[tuple[Tensor, int]]:
    """What holds one entry for each of the ``n`` channels that ``maker`` gives."""
    weight, norm, bias = (getattr(maker, name, None) for name in ("weight", "norm", "bias"))
    if weight is None or weight.shape[0] != n:
        raise ValueError(f"{maker.name}: gives {maker.out[0].full} channels, and {n} are sorted. Name the leaves in between.")
    found: list[Tensor] = [weight] if bias is None else [weight, bias]
    if isinstance(norm, Normalise):
        if len(norm.weight) > 1:
            raise ValueError(f"{maker.name}: its norm has a scale per width, which cannot follow a sort. Use norm 'shared'.")
        found += [*norm.weight, *norm.bias, norm.running_mean, norm.running_var]
    return [(tensor, 0) for tensor in found]


def _permute(places: Sequence[tuple[Tensor, int]], order: Tensor) -> Moved:
    """Permutes in place; buffers move, but only parameters are told of."""
    for tensor, dim in places:
        tensor.copy_(tensor.index_select(dim, order))
    return [(tensor, dim, order) for tensor, dim in places if isinstance(tensor, nn.Parameter)]
