"""Chains: convolutions and batch norms one after another, on kernels that are given. What the operations of cells run.

Letters: ``B`` batch, ``c C`` channels, ``H W`` height and width, ``w`` () the weight of an operation in a mixture.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from supernets.depthwise import depthwise
from supernets.elastic import Normalise


class Conv(NamedTuple):
    """One convolution that keeps H W, or divides them by ``stride``; kernels are odd. ``depthwise``: c_in groups, square.
    ``valid``: without padding."""

    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    dilation: int = 1
    depthwise: bool = False
    valid: bool = False

    def sides(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    def steps(self) -> tuple[int, int]:
        """Vertical and horizontal stride."""
        return self.stride if isinstance(self.stride, tuple) else (self.stride, self.stride)

    def padding(self) -> tuple[int, int]:
        height, width = (1, 1) if self.valid else self.sides()
        return self.dilation * (height // 2), self.dilation * (width // 2)


Unit = Sequence[Conv]
"""Convolutions one after another, then one batch norm; between two units stands a ReLU."""


class Chain(NamedTuple):
    """Units and what they run on: a kernel for each convolution, a bias for each or for none, a norm for each unit."""

    units: Sequence[Unit]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    norms: Sequence[Normalise]

    def run(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """w f(x), w in the scale of the last norm; f(x) without w. (B, c_in, H, W) -> (B, c_out, H', W')."""
        k, last = 0, len(self.units) - 1
        for u, (unit, norm) in enumerate(zip(self.units, self.norms)):
            for conv in unit:
                x = self._convolve(x, conv, k)
                k += 1
            gamma, beta = norm.affine(x.shape[1]) if len(norm.weight) else (None, None)
            if u == last and w is not None:
                gamma = filled(w, norm) if gamma is None else w.to(gamma.dtype) * gamma
                beta = None if beta is None else w.to(beta.dtype) * beta
            x = norm(x, gamma, beta)
            if u < last:
                x = F.relu(x, inplace=True)
        return x

    def _convolve(self, x: Tensor, conv: Conv, k: int) -> Tensor:
        weight, bias = self.weights[k], self.biases[k] if self.biases else None
        if conv.depthwise and bias is None:
            return depthwise(x, weight, conv.steps()[0], conv.dilation)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding(), conv.dilation, x.shape[1] if conv.depthwise else 1)


def filled(w: Tensor, norm: Normalise) -> Tensor:
    """A weight () as the scale (c,) of an affine-free norm. Real numbers, not a view of one: the backward of a batch norm
    in channels_last (CPU, seen in torch 2.15) reads its scale without regard to strides, beyond the end of a view."""
    mean = norm.running_mean
    return w.to(mean.dtype) * torch.ones_like(mean)


def together(chains: Sequence[Chain], x: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """w f(x) of several chains that read one x, in one convolution and one batch norm; weights () each, or all None.

    Chains of one unit of one dense convolution, alike but for their numbers, with affine-free norms, in training:
    batch statistics are per channel, so this is what each gives alone. (B, c_in, H, W) -> one (B, c_out, H', W') each.
    """
    if len(chains) == 1:
        return (chains[0].run(x, weights[0]),)
    ((conv,),), (norm,), c = chains[0].units, chains[0].norms, len(chains[0].weights[0])
    bias = torch.cat([chain.biases[0] for chain in chains]) if chains[0].biases else None
    weight = torch.cat([chain.weights[0] for chain in chains])
    z = F.conv2d(x, weight, bias, conv.stride, conv.padding(), conv.dilation)
    given = [w for w in weights if w is not None]
    scale = torch.stack(given).to(norm.running_mean.dtype).repeat_interleave(c) if given else None
    return F.batch_norm(z, None, None, scale, None, training=True, eps=norm.eps).split(c, dim=1)
