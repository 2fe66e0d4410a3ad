"""Batch norms of plain networks: made of a supernet's ``Normalise``, and put back into one."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from supernets.elastic import Normalise


def plain_norm(norm: Normalise, c: int, bias: Tensor | None, inherit: bool, affine: bool = True) -> nn.BatchNorm2d:
    """The batch norm of a plain network: scale 1 and shift 0 where ``norm`` has none of its own. ``bias`` of a preceding
    convolution that loses it goes into the running mean: (z + b) - (m + b) = z - m."""
    own = nn.BatchNorm2d(c, eps=norm.eps, momentum=norm.momentum, affine=affine).to(norm.running_mean)
    if inherit:
        with torch.no_grad():
            if affine and len(norm.weight):
                gamma, beta = norm.affine(c)
                own.weight.copy_(gamma)
                own.bias.copy_(beta)
            assert own.running_mean is not None and own.running_var is not None
            own.running_mean.copy_(norm.running_mean[:c] if bias is None else norm.running_mean[:c] - bias)
            own.running_var.copy_(norm.running_var[:c])
    return own


def adopt_norm(name: str, norm: Normalise, plain: nn.BatchNorm2d) -> None:
    """Takes over the scale, shift and statistics of a plain norm of at most as many channels; the leaf ``name`` has the norm.

    ValueError where it has no scale and shift to put them into.
    """
    if not len(norm.weight):
        raise ValueError(
            f"{name}: this search net's norms have no scale and shift, so it cannot take over the weights of a plain network. "
            "Search from fresh weights (leave out init)."
        )
    assert plain.running_mean is not None and plain.running_var is not None
    c = plain.num_features
    for mine, theirs in zip(norm.affine(c), (plain.weight, plain.bias)):
        mine.copy_(theirs)
    norm.running_mean[:c].copy_(plain.running_mean)
    norm.running_var[:c].copy_(plain.running_var)
