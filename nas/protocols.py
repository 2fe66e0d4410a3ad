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

    def sort_channels(self, trained: SearchSpace | None = None) -> list[tuple[nn.Parameter, int, Tensor]]:
        """Sorts hidden channels by importance, in place, the best first: the largest network computes what it did.

        ``trained``: a restriction of ``space``, what was trained so far; the widths that its options give keep their
        channels. None protects nothing. The result, (parameter, dim, order), is for ``Descent.permute``: the parameter is now
        what ``index_select(dim, order)`` makes of the old one, one after the other; [] where no order can be changed.
        ValueError, before anything moves, where norms have a scale per width.
        """
        ...

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


class Served(Protocol):
    """What is read of a training: of a strategy, or of a tree of several."""

    def probabilities(self) -> Mapping[str, Sequence[float]]:
        """What it believes of each choice, over the root's options; empty where it has no such belief."""
        ...

    def architecture(self) -> Arch:
        """The architecture that it would derive now."""
        ...

    def fits(self, arch: Mapping[str, Value]) -> bool:
        """Whether ``arch`` meets its own budget; True where it has none."""
        ...

    def network(self, arch: Mapping[str, Setting]) -> Any:
        """The weights that serve ``arch``: the net, a copy, the moving average, a leaf of a tree."""
        ...


class Strategy(Served, Protocol):
    """One paper: a dataclass of its hyper-parameters. The engine calls ``start`` once, then ``update`` every step."""

    def start(self, setup: Setup) -> None:
        """Make alphas, weight copies, Descents. Raises ValueError where setup and hyper-parameters do not fit."""

    def passes(self) -> float:
        """What one step costs: forward and backward passes of one batch, for comparisons at equal cost; the mean over the
        run where steps differ."""
        ...

    def update(self, draw: Draw, now: Moment) -> Metrics:
        """ONE step of the paper."""
        ...

    def arch(self, now: Moment) -> Mapping[str, Setting]:
        """What the next weight step would run: mixture, sample or path."""
        ...


class Found(NamedTuple):
    """An architecture that was scored. ``costs``: price -> its cost, for every cost table that the search was given."""

    arch: Arch
    score: float
    costs: dict[str, float]


class Searcher(Protocol):
    """Ask / tell over codes (N, choices) of the root space: which architectures to score next. Scores: higher is better.

    A dataclass of its hyper-parameters; ``nas.searchers.rounds.Rounds`` does all but say what a round is.
    """

    def start(
        self, space: SearchSpace, costs: Mapping[str, CostTable], limits: Sequence[tuple[str, float, float]] = ()
    ) -> None:
        """``limits``: (price, low, high), all of which every candidate meets; ``costs``: a table for each price.

        Raises ValueError for limits that nothing found in ``space`` meets.
        """

    def ask(self, n: int) -> np.ndarray:
        """At most ``n`` architectures that have no score yet: canonical codes. Empty: the search is over."""
        ...

    def tell(self, codes: np.ndarray, scores: np.ndarray | Sequence[float]) -> None:
        """The ``scores`` (N,) of ``codes``, asked for or not. A score that is known stays."""

    def known(self, codes: np.ndarray) -> np.ndarray:
        """The scores (N,) of ``codes``; nan where there is none yet."""
        ...

    def best(self) -> Found | None:
        """The highest score within the limits; None before the first."""
        ...

    def front(self, price: str) -> list[Found]:
        """What no other beats in both cost and score, within the limits, from the cheapest to the dearest."""
        ...

    def state(self) -> dict[str, Any]:
        """All that ``load`` needs to go on: numbers, texts and tensors."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Call ``start`` first, as before. Raises ValueError for another search's state."""


class Log(Protocol):
    """Where metrics go. Every call names the step; nothing is read back by a strategy."""

    def __call__(self, now: Moment, metrics: Metrics) -> None: ...
