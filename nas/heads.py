"""Multi-sample dropout before the classifier, of any network that has one.

Multi-Sample Dropout for Accelerated Training and Better Generalization. Hiroshi Inoue. arXiv 1905.09788.

    features (B, F) -> M masks on the same features -> (M B, F) -> the one classifier -> logits (M B, N) -> mean of M losses

The features are computed once, the classifier runs on M times the rows; nas.losses repeats labels and teachers. Outside of
training there is no dropout, and logits are (B, N). M = 1 is plain dropout.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Head:
    """``dropout``: the rate before the classifier, 0: none, nothing is changed. ``samples``: M, masks of each image."""

    dropout: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0 or self.samples < 1:
            raise ValueError(f"head: dropout = {self.dropout}, samples = {self.samples}. Allowed: a rate from 0, below 1, and "
                             "1 sample or more.")  # fmt: skip

    def attach(self, net: nn.Module) -> None:
        """Puts the dropout before the module ``classifier`` of ``net``, supernet or plain network, in place. No key of its
        state changes, and copies have their own. ValueError where there is no such module."""
        if not self.dropout:
            return
        at = getattr(net, "classifier", None)
        while isinstance(at, nn.Sequential):  # a submodule of it would run as a layer
            at = at[0]
        if not isinstance(at, nn.Module) or type(at) is nn.Module:  # a bare module is a path of a plain network, never called
            raise ValueError(f"head.dropout = {self.dropout}: {type(net).__name__} has no module `classifier` that it could "
                             "stand before. Allowed here: 0.")  # fmt: skip
        at.add_module("head_dropout", MultiSampleDropout(self.dropout, self.samples).train(at.training))
        at.register_forward_pre_hook(_drop)


class MultiSampleDropout(nn.Dropout):
    """(B, ..) -> (M B, ..) in training: M masks, samples one after the other. Its input otherwise, and at ``rate`` 0."""

    def __init__(self, rate: float, samples: int = 1) -> None:
        super().__init__(rate)
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return super().forward(x if self.samples == 1 else x.repeat(self.samples, *[1] * (x.ndim - 1)))

    def extra_repr(self) -> str:
        return f"rate={self.p}, samples={self.samples}"


def _drop(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pre-hook: asks the module that it is called with, so that a copy of a network uses the copy's dropout."""
    x, *more = given
    return (module.get_submodule("head_dropout")(x), *more)
