"""Elastic depthwise convolution: width by the first channels, kernel by the centre or by shared matrices (OFA, Cai et al.,
arXiv 1908.09791, released code: facts only).

Letters: ``B`` batch, ``C c`` channels, ``H W`` height and width, ``k`` kernel size (odd), ``K`` the largest one.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Segment, Size
from search_spaces.space import Mixture, SearchSpace
from supernets.depthwise import depthwise
from supernets.elastic import Arch, init_conv, possible_sizes, prefix
from supernets.superpose import SuperposedConv, centre

MODES = ("crop", "transform")


class ElasticDepthwise(SuperposedConv):
    """Depthwise convolution (no bias) whose width and kernel are choices, and the shared batch norm behind it.

    A value runs the slice: the first c channels of the (C, 1, K, K) weight, and of its kernels

    - ``mode`` "crop": the centred k x k window;
    - "transform": step by step from K down to k, the centred window of the kernel of the step before, flattened and times
      the transposed matrix of this step, which all channels share and which starts as the identity. Kernels 3, 5, 7 have
      matrices of 25 x 25 and 9 x 9: 706 numbers. Plain networks hold the finished kernel, not the matrices.

    A mixture of widths or kernels is superposed under "crop" (``SuperposedConv``); "transform" refuses it: its kernels are
    not windows of one another. ``eps`` is the norm's. Padding k // 2. ValueError for unknown modes and even kernels.
    """

    def __init__(
        self, space: SearchSpace, out: Segment, kernel: Size, stride: int = 1, mode: str = "crop", eps: float = 1e-5
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode = {mode!r} is not known. Allowed: {', '.join(MODES)}.")
        super().__init__(space, (out,), out, kernel, stride, depthwise=True, bias=False, norm="shared")
        self.mode, self.sides = mode, possible_sizes(kernel, space)[::-1]
        assert self.norm is not None
        self.norm.eps = eps
        smaller = self.sides[1:] if mode == "transform" else ()
        self.matrices = nn.ParameterList([nn.Parameter(torch.eye(k * k)) for k in smaller])

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Kernels N(0, 2 / (K K C)) (OFA, section 2: C, not C / groups), scale 1, shift 0, matrices the identity."""
        super().reset(generator)
        init_conv(self.weight, generator)
        for matrix in getattr(self, "matrices", ()):  # none yet where the superclass resets itself
            nn.init.eye_(matrix)

    def kernels(self, n: int, k: int) -> Tensor:
        """(n, 1, k, k): the kernels of size ``k`` of the first ``n`` channels. ValueError for sizes without a matrix."""
        weight = prefix(self.weight, 0, n)
        if not len(self.matrices) or k == self.sides[0]:
            return centre(weight, k)
        if k not in self.sides:
            allowed = ", ".join(map(str, self.sides[::-1]))
            raise ValueError(f"{self.name}: kernel {k} has no matrix in this supernet. Allowed: {allowed}.")
        for side, matrix in zip(self.sides[1:], self.matrices):
            weight = F.linear(centre(weight, side).flatten(1), matrix).view(n, 1, side, side)
            if side == k:
                break
        return weight

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """(B, c, H, W) -> (B, c, ceil(H / stride), ceil(W / stride)); of a mixture, c is the widest active width."""
        mixed = next((name for size in self._sizes() for name in size.on if isinstance(arch[name], Mixture)), None)
        if mixed is not None:
            if self.mode == "transform":
                raise ValueError(f"{self.name}: {mixed} is a mixture, and kernels of mode 'transform' do not superpose. "
                                 "Give one option, or build the supernet with mode 'crop'.")  # fmt: skip
            return super().forward(x, arch)
        n, k = self._width(arch), self.kernel.at(arch)
        self._padding(k)
        if x.shape[1] != n:
            raise ValueError(f"{self.name}: an input of {x.shape[1]} channels, where this architecture has {n}. "
                             "Check what feeds it.")  # fmt: skip
        weight, norm = self.kernels(n, k), self.norm
        assert norm is not None
        if torch.is_grad_enabled():
            z = depthwise(x, weight, self.stride)
        else:  # what the plain network calls: equal to the last bit
            z = F.conv2d(x, weight, None, self.stride, k // 2, 1, n)
        return norm(z, prefix(norm.weight[0], 0, n), prefix(norm.bias[0], 0, n))

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        """The convolution with its finished kernels, and its batch norm."""
        made = super().plain(arch, *c_in, inherit=inherit)
        conv = cast(nn.Conv2d, made.get_submodule("conv"))
        if not inherit:
            init_conv(conv.weight)
        elif self.mode == "transform":
            with torch.no_grad():
                conv.weight.copy_(self.kernels(self.out[0].size.at(arch), self.kernel.at(arch)))
        return made

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """The convolution into the centre of its first channels, with the identity for matrices down to its kernel, and its
        batch norm into theirs."""
        super().adopt(plain)
        k = cast(nn.Conv2d, plain["conv"]).kernel_size[0]
        for side, matrix in zip(self.sides[1:], self.matrices):
            if side >= k:
                nn.init.eye_(matrix)

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """The matrices are the kernel choice's; of one option, the matrix that no other option passes through."""
        if self.kernel.on != (choice,) or not len(self.matrices):
            return []
        if option is None:
            return list(self.matrices)
        return [self.matrices[-1]] if self.kernel.of(option) == self.sides[-1] else []
