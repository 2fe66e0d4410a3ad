"""The vocabulary of the engine on one page: what a strategy is given and what it must answer.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width, ``N`` classes.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from search_spaces.space import Arch, SearchSpace, Setting, Value
from supernets.layers import Layer

if TYPE_CHECKING:
    from nas.cost import CostTable

Metrics = Mapping[str, float | Tensor]
"""What one step reports: tag -> number or scalar tensor (kept on its device until the log reads it)."""


class Batch(NamedTuple):
    """One batch on the device of the run.

    ``x``: (B, C, H, W) float, normalised. ``y``: (B,) int64 classes, or (B, N) float soft labels.
    ``index``: (B,) int64, the position of each image in its split.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


class Draw(Protocol):
    """Where a strategy gets its data. Splits: train, valid (alpha), select (picks), test (reports only)."""

    def __call__(self, split: str, size: int | None = None, odds: Tensor | float | None = None) -> Batch:
        """The next batch of ``split`` in this run, the share of this rank.

        ``size``: load at this resolution (pixels) instead of the data's own.
        ``odds``: draw with replacement, each image in proportion to ``odds`` (N_split,); a number means uniformly.
        """
        ...


class Moment(NamedTuple):
    """Where a run is. ``rng`` and ``noise`` depend on (seed, step) alone: every rank draws the same subnets."""

    step: int
    steps: int
    epoch: int
    epochs: int
    first: bool  # the first step of an epoch
    rng: random.Random
    noise: torch.Generator  # always a CPU generator


@runtime_checkable
class Supernet(Protocol):
    """A module that holds every network of ``space`` in one set of weights (see supernets/README.md)."""

    space: SearchSpace

    def __call__(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor: ...

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]: ...

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]: ...

    def reset(self, generator: torch.Generator) -> None: ...


class Setup(NamedTuple):
    """What a strategy starts from. ``loss(logits, y)`` is a mean over the batch.

    ``steps``: of the whole run; ``epoch_steps``: of one epoch; ``images``: in the train split.
    """

    net: Any  # a Supernet that is an nn.Module too; for ``plain``, any nn.Module
    space: SearchSpace | None
    costs: CostTable | None
    loss: Callable[[Tensor, Tensor], Tensor]
    teacher: nn.Module | None
    steps: int
    epoch_steps: int
    images: int


class Strategy(Protocol):
    """One paper: a dataclass of its hyper-parameters. The engine calls ``start`` once, then ``update`` every step."""

    def start(self, setup: Setup) -> None:
        """Make alphas, weight copies, Descents. Raises ValueError where setup and hyper-parameters do not fit."""

    def passes(self) -> int:
        """What one step costs: forward and backward passes of one batch, for comparisons at equal cost."""
        ...

    def update(self, draw: Draw, now: Moment) -> Metrics:
        """ONE step of the paper."""
        ...

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """What the next weight step would run: mixture, sample or path."""
        ...

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """What the strategy believes of each choice, over the root's options; empty where it has no such belief."""
        ...

    def architecture(self) -> Arch:
        """The architecture that the strategy would derive now."""
        ...

    def fits(self, arch: Mapping[str, Value]) -> bool:
        """Whether ``arch`` meets the strategy's own budget; True where it has none."""
        ...

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """The weights that serve ``arch``: the net, a copy, the moving average, a leaf of a tree."""
        ...


class Searcher(Protocol):
    """Ask / tell over codes (N, choices) of the root space."""

    def ask(self, n: int) -> np.ndarray: ...

    def tell(self, codes: np.ndarray, scores: np.ndarray) -> None: ...

    def state(self) -> dict: ...


class Log(Protocol):
    """Where metrics go. Every call names the step; nothing is read back by a strategy."""

    def __call__(self, now: Moment, metrics: Metrics) -> None: ...
