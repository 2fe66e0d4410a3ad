"""A supernet of three choices with a kernel and a bias for each option, or nothing, and short runs of PA&DA on it.

    z = sum over choices i of x W_i,o + b_i,o
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.pada import PADA
from search_spaces.space import Choice, SearchSpace, Setting
from supernets.layers import Layer

B, N, IMAGES, EPOCH_STEPS, EPOCHS, SEED = 4, 3, 9, 2, 3, 7
OPTIONS = ("none", "conv", "wide")
NAMES = ("e0", "e1", "e2")
CPU = torch.device("cpu")


def space_of(names: tuple[str, ...] = NAMES, options: tuple[str, ...] = OPTIONS) -> SearchSpace:
    choices = [Choice(name, options, ordered=False) for name in names]
    return SearchSpace(choices, {}, dear=dict.fromkeys(names, options[-1]), cheap=dict.fromkeys(names, options[0]))


class Ops(nn.Module):
    """See the top of this file. ``ran``: every path."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space, self.ran = space, []  # type: ignore[var-annotated]
        g = torch.Generator().manual_seed(1)
        self.W, self.b = ({f"{c.name}:{o}": nn.Parameter(torch.randn(N, generator=g, dtype=torch.float64))
                           for c in space.root.choices for o in c.options if o != "none"} for _ in range(2))  # fmt: skip
        for kind, table in (("W", self.W), ("b", self.b)):
            for key, p in table.items():
                self.register_parameter(f"{kind}_{key}", p)

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, 1) -> (B, N)
        self.ran.append(dict(arch))
        z = x * torch.zeros(N, dtype=x.dtype)
        for name, option in arch.items():
            if option != "none":
                z = z + x * self.W[f"{name}:{option}"] + self.b[f"{name}:{option}"]
        return z + 0.0 * sum(p.sum() for p in self.parameters()) if all(o == "none" for o in arch.values()) else z

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        keys = [key for key in self.W if key.split(":")[0] == choice and option in (None, key.split(":")[1])]
        return [table[key] for key in keys for table in (self.W, self.b)]

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return []


class Draws:
    """Epoch 0: every image once, in order; then repeats, also within a batch. ``asked``: the odds of each draw."""

    ROWS = ((0, 1, 2, 3), (4, 5, 6, 7), (2, 2, 5, 0), (5, 2, 5, 7), (8, 1, 1, 1), (8, 0, 0, 3))

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(2)
        self.x = torch.randn(IMAGES, 1, generator=g, dtype=torch.float64) * 3
        self.y = torch.randint(N, (IMAGES,), generator=g)
        self.asked: list[Any] = []

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        assert split == "train" and size is None
        index = torch.tensor(self.ROWS[len(self.asked)])
        self.asked.append(odds if odds is None else odds.clone())
        return Batch(self.x[index], self.y[index], index)


def setup_of(net: nn.Module, space: SearchSpace, steps: int = EPOCHS * EPOCH_STEPS) -> Setup:
    return Setup(net, space, CostTable(net, (1, 1)), CrossEntropy(), None, steps, EPOCH_STEPS, IMAGES)


def ran(strategy: PADA, seed: int = SEED) -> tuple[Ops, Draws, list[dict[str, Any]]]:
    """Six steps; what p, q and the weights were after each."""
    space = space_of()
    net, draw, after = Ops(space), Draws(), []
    strategy.start(setup_of(net, space))
    for step in range(EPOCHS * EPOCH_STEPS):
        strategy.update(draw, moment(step, EPOCHS * EPOCH_STEPS, EPOCH_STEPS, seed))
        after.append({
            "p": {name: list(row) for name, row in strategy.paths.p.items()} if strategy.paths else {},
            "q": None if strategy.images.odds is None else strategy.images.odds.numpy().copy(),
            "w": {name: p.detach().numpy().copy() for name, p in net.named_parameters()},
        })  # fmt: skip
    return net, draw, after


def weights(clip: float = 0.5) -> Weights:
    return Weights(lr=0.1, lr_min=0.1, momentum=0.0, weight_decay=0.0, clip=clip)
