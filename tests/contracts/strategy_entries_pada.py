"""Strategies that draw paths or images by importance, and those that draw their images so."""
from __future__ import annotations

from strategy_entry import ALONE, Entry

from nas.bilevel import Weights
from nas.importance import Importance
from nas.strategies.bignas import BigNAS
from nas.strategies.fairnas import FairNAS
from nas.strategies.pada import PADA

TRAIN = ("train",)


def sgd() -> Weights:
    return Weights(lr=0.05, lr_min=0.0, momentum=0.9, weight_decay=2.5e-4, clip=5.0, per_epoch=False)


def drawn(name: str, kind: str, slow: bool = False, batches: int = 1, **options: bool | str | float) -> Entry:
    weights = sgd()
    weights.accumulate = batches
    return Entry(f"pada-{name}-{kind}", lambda: PADA(**options, weights=weights), kind, ALONE,  # type: ignore[arg-type]
                 runs="path", asks=TRAIN * batches, slow=slow)  # fmt: skip


ENTRIES = [
    drawn("both", "cells"),
    drawn("apart", "cells", slow=True, shared=False, norm_point="before_clip", floor=0.02),
    drawn("two-batches", "cells", slow=True, batches=2, carry=True),
    drawn("paths", "nasnet", slow=True, data=False), drawn("images", "mobile", path=False, reweight=True),
    Entry("fairnas-images-cells", lambda: FairNAS(weights=sgd(), images=Importance(carry=True)), "cells", ALONE,
          runs="sandwich", asks=TRAIN, legal=False, refuses=("some",), slow=True),
    Entry("bignas-images-tied", lambda: BigNAS(weights=sgd(), images=Importance()), "tied", ALONE, runs="sandwich", asks=TRAIN,
          slow=True),
]  # fmt: skip
