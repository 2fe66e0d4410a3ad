"""What the contract tests know of one kind of supernet, and what kinds have in common. The list is in supernet_entries."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_spaces.space import Arch, SearchSpace
from supernets.elastic import Normalise
from supernets.preresnet import ScaledNorm
from supernets.tokens import TokenNorm

Part = tuple[str, tuple[slice, ...]]
"""A parameter and the part of it that an architecture uses; of a convolution: its (out, in) channels."""
Refused = tuple[Arch, bool, str]
"""An architecture that extraction refuses, with weights inherited or not, and the pattern of its message."""


class Entry(NamedTuple):
    """``make_net(space, channels=, classes=, **settings)``. ``used``, ``norms`` (net, arch): the parameters an
    architecture's gradients reach; the path of each norm that runs, and its channels.

    ``inherits``: which architectures can take the supernet's weights over: "all", "largest" or "none"; ``adopts``: whether
    it takes over those of a plain network; ``scales``: whether its batch norms have scales of their own (where scales are
    the architecture's, it takes over a plain network whose scales are 1). ``groups``: choices that the test of ``owned``
    fixes together while all others are mixtures (one by one where one can cut another off). ``owners``: choices that own
    parameters. ``structure``: choices that must be hard while others are mixtures of two options. ``words``: settings that
    refuse an unknown word. ``refused``: what extraction refuses beside what all refuse.
    ``gain``: what fresh weights are multiplied by: a chain without norms loses its signal at PyTorch's start.
    ``hard``: choices that refuse mixtures. ``constants``: parts of names of matrices that ``reset`` does not draw.
    """

    id: str
    make_space: Callable[[], SearchSpace]
    make_net: Callable[..., Any]
    settings: Mapping[str, Any]
    inherits: str
    used: Callable[[Any, Arch], Iterator[Part]]
    norms: Callable[[Any, Arch], dict[str, int]]
    groups: Callable[[SearchSpace], list[set[str]]]
    owners: Callable[[SearchSpace], set[str]]
    structure: Callable[[SearchSpace], set[str]] = lambda space: set()
    refused: Callable[[SearchSpace], list[Refused]] = lambda space: []
    adopts: bool = True
    scales: bool = True
    words: tuple[str, ...] = ()
    size: int = 8
    gain: float = 1.0
    hard: Callable[[SearchSpace], set[str]] = lambda space: set()
    constants: tuple[str, ...] = ()

    def net(self) -> Any:
        net = self.make_net(self.make_space(), channels=3, classes=5, **self.settings).double()
        generator = torch.Generator().manual_seed(1)
        net.reset(generator)
        with torch.no_grad():
            for p in net.parameters() if self.gain != 1.0 else ():
                p.mul_(self.gain)
            for module in net.modules():
                for p in module.parameters() if isinstance(module, (Normalise, ScaledNorm, TokenNorm)) else ():
                    p.copy_(torch.empty_like(p).uniform_(0.5, 1.5, generator=generator))
        return net

    def images(self, seed: int = 0, batch: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)


def archs(space: SearchSpace, n: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


def parts(net: Any, path: str, o: int, i: int) -> Iterator[Part]:
    """Of an elastic convolution (its norm included) that runs with ``o`` output and ``i`` input channels."""
    leaf = net.get_submodule(path)
    yield f"{path}.weight", (slice(o), slice(i))
    if leaf.norm is not None:
        k = leaf.widths.index(o) if len(leaf.norm.weight) > 1 else 0
        yield f"{path}.norm.weight.{k}", (slice(o),)
        yield f"{path}.norm.bias.{k}", (slice(o),)


def classifier(c: int) -> Iterator[Part]:
    yield "classifier.weight", (slice(None), slice(c))
    yield "classifier.bias", (slice(None),)


def one_by_one(space: SearchSpace) -> list[set[str]]:
    return [{choice.name} for choice in space.choices]


def named(space: SearchSpace) -> set[str]:
    return {choice.name for choice in space.choices}
