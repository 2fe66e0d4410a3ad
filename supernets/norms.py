"""The batch norm of supernets, and those of plain networks: made of one, and put back into one.

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prefix(weight: Tensor, dim: int, size: int) -> Tensor:
    """The first ``size`` along ``dim``; all of them without a slice, whose backward would copy the gradient."""
    return weight if weight.shape[dim] == size else weight.narrow(dim, 0, size)


class Normalise(nn.Module):
    """Batch norm of the first c of C channels, with its own scale and shift per candidate width, shared ones, or none
    (``affine=False``).

    In training it normalises with the batch's own statistics and writes no buffer (law 7); in evaluation it reads
    ``running_mean`` and ``running_var``, which only recalibration writes (nas.recalibrate hooks this module).
    """

    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5
    momentum = 0.1  # of the plain network's norm

    def __init__(self, widths: Sequence[int], separate: bool, affine: bool = True) -> None:
        super().__init__()
        C = max(widths)
        self.index = {c: k if separate else 0 for k, c in enumerate(widths)}
        sizes = () if not affine else widths if separate else (C,)
        self.weight = nn.ParameterList([nn.Parameter(torch.ones(c)) for c in sizes])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(c)) for c in sizes])
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def affine(self, c: int) -> tuple[Tensor, Tensor]:
        """Scale and shift (c,), (c,) of the candidate of width ``c``; KeyError where there is none."""
        k = self.index[c]
        return prefix(self.weight[k], 0, c), prefix(self.bias[k], 0, c)

    def forward(self, z: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, c, H, W) -> the same; without ``weight`` and ``bias`` it only normalises."""
        if self.training:
            return F.batch_norm(z, None, None, weight, bias, training=True, eps=self.eps)
        c = z.shape[1]
        return F.batch_norm(z, self.running_mean[:c], self.running_var[:c], weight, bias, training=False, eps=self.eps)


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
