"""The list of supernets whose promises the contract tests check: a new entry inherits every test.

Nets are tiny and float64. Every batch norm has random scales and shifts, or its sets could not be told apart.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, SearchSpace
from supernets.resnet import ResNet


class Bottleneck(CifarResNet):
    """ResNet-164 with two blocks a stage instead of eighteen."""

    BLOCKS = {164: 2}  # noqa: RUF012  a constant table


class Entry(NamedTuple):
    """``inherits``: which architectures can take the supernet's weights over: "all", "largest" or "none"."""

    id: str
    make_space: Callable[[], SearchSpace]
    settings: Mapping[str, str]
    inherits: str
    size: int = 8

    def net(self) -> Any:
        net = ResNet(self.make_space(), channels=3, classes=5, **self.settings).double()  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        net.reset(generator)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if ".norm." in name:
                    p.copy_(torch.empty_like(p).uniform_(0.5, 1.5, generator=generator))
        return net

    def images(self, seed: int = 0, batch: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)


TIED = lambda: CifarResNet(20, "tied", widths=(8, 12, 16))  # noqa: E731
SUPERNETS = [
    Entry("cifar20-tied", TIED, {}, "all"),
    Entry("cifar20-tied-shared", TIED, {"norm": "shared"}, "all"),
    Entry("cifar20-tied-sum", TIED, {"mixing": "sum"}, "all"),
    Entry("cifar20-tas", lambda: CifarResNet(20, "tas", widths=(8, 12, 16)), {}, "none"),
    Entry("cifar20-tas-shared-sum", lambda: CifarResNet(20, "tas", widths=(8, 12, 16)),
          {"norm": "shared", "mixing": "sum"}, "none"),
    Entry("bottleneck-tied", lambda: Bottleneck(164, "tied", widths=(4, 6, 8)), {}, "all"),
    Entry("bottleneck-tas", lambda: Bottleneck(164, "tas", widths=(4, 6, 8)), {}, "none"),
    Entry("imagenet18-tied", lambda: ImageNetResNet(18, "tied", widths=(4, 6, 8, 12)), {}, "all", 32),
    Entry("imagenet18-tas", lambda: ImageNetResNet(18, "tas", widths=(4, 6, 8, 12)), {}, "largest", 32),
]  # fmt: skip


def archs(space: SearchSpace, n: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def used(net: Any, arch: Arch) -> Iterator[tuple[str, int, int]]:
    """(path, out channels, in channels) of every convolution that runs, and of the classifier. A sum of unequal widths
    keeps the wider one's channels."""
    space = net.space
    x = space.stem_size().at(arch)
    yield "stem", x, 3
    for s in range(len(net.stages)):
        for b in range(int(arch[space.depth_name(s)])):
            path, block, i = f"stages.{s}.{b}", net.stages[s][b], x
            for c in range(space.convs):
                o = space.conv_size(s, b, c).at(arch)
                yield f"{path}.conv{c}", o, i
                i = o
            if block.shortcut is not None:
                yield f"{path}.shortcut", i, x
                x = i
            x = max(x, i)
    yield "classifier", 5, x
