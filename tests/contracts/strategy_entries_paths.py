"""Strategies without alphas that leave the pick to a searcher: uniform and fair paths, and the sandwich of BigNAS."""
from __future__ import annotations

from dataclasses import replace

from strategy_entry import ALONE, Entry

from nas.bilevel import Weights
from nas.strategies.bignas import BigNAS
from nas.strategies.fairnas import FairNAS
from nas.strategies.spos import SPOS

TRAIN = ("train",)


def rmsprop() -> Weights:
    """As published but for the warm-up, which would be all of a short run."""
    return Weights(lr=0.02, lr_min=0.001, optimizer="rmsprop", weight_decay=1e-5, clip=None, per_epoch=False, warmup_epochs=1,
                   schedule="exponential", decay_epochs=0.5)  # fmt: skip


def sgd() -> Weights:
    """Of CIFAR: decay of weights alone, clipped by value."""
    return Weights(lr=0.05, lr_min=0.0, nesterov=True, clip=None, clip_value=1.0, per_epoch=False, norm_decay=False)


def sandwich(kind: str) -> Entry:
    return Entry(f"bignas-{kind}", lambda: BigNAS(weights=rmsprop()), kind, ALONE, runs="sandwich", asks=TRAIN)


def spos(kind: str, slow: bool = False) -> Entry:
    return Entry(f"spos-{kind}", SPOS, kind, ALONE, runs="path", asks=TRAIN, slow=slow)


ENTRIES = [
    sandwich("mobile"), sandwich("attentive")._replace(slow=True), sandwich("tied"),
    Entry("bignas-mean-mobile-sized", lambda: BigNAS(3, combine="mean", weights=sgd()), "mobile-sized", ALONE, runs="sandwich",
          asks=TRAIN, slow=True),
    spos("cells"), spos("mobile"), spos("macro", slow=True),
    Entry("spos-two-batches-cells", lambda: SPOS(Weights(accumulate=2)), "cells", ALONE, runs="path", asks=TRAIN * 2),
    Entry("bignas-two-batches-tied", lambda: BigNAS(weights=replace(rmsprop(), accumulate=2)), "tied", ALONE, runs="sandwich",
          asks=TRAIN * 2, slow=True),
    Entry("fairnas-cells", FairNAS, "cells", ALONE, runs="sandwich", asks=TRAIN, legal=False, refuses=("some",)),
    Entry("fairnas-mean-macro", lambda: FairNAS("mean", sgd()), "macro", ALONE, runs="sandwich", asks=TRAIN, legal=False,
          refuses=("some",), slow=True),
]  # fmt: skip
