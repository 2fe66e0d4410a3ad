"""OFA and DepS under the contract of test_strategies: in six steps OFA goes through three phases, DepS through its ramp."""
from __future__ import annotations

from functools import partial

from strategy_entry import ALONE, Entry

from nas.bilevel import Weights
from nas.strategies.deps import DepS
from nas.strategies.ofa import OFA, Phase

WEIGHTS = partial(Weights, lr=0.05, lr_min=0.01, nesterov=True, norm_decay=False, clip=None, per_epoch=False, idle="skip")
PHASES = [
    Phase("full", 1, 1.0, nets=2), Phase("kernel", 1, 0.5, {"*.kernel": 2}, nets=2),
    Phase("the rest", 3, 0.5, {"*.depth": 2, "*.expand": 2}, nets=3, warmup=1, sort=True),
]  # fmt: skip
AT_ONCE = [Phase("whole", 1, 1.0, {"*": 9}, nets=3)]
WIDTHS = [Phase("full", 1, 1.0, nets=2), Phase("all", 5, 0.5, {"*.depth": 9, "*.width": 9}, nets=4, sort=True)]


def shrinking(strategy: str, kind: str, make: partial, slow: bool = False) -> Entry:
    return Entry(f"{strategy}-{kind}", lambda: make(weights=WEIGHTS()), kind, ALONE, runs="sandwich", asks=("train",),
                 slow=slow)  # fmt: skip


ENTRIES = [
    shrinking("deps", "mobile", partial(DepS, 1, 1)),
    shrinking("deps-mean", "mobile-sized", partial(DepS, "0%", "0%", combine="mean", momentum="reset", m=0.5), slow=True),
    shrinking("deps", "tied-shared", partial(DepS, 1, 1, protect=None, momentum="released"), slow=True),
    shrinking("ofa", "mobile-sized", partial(OFA, PHASES)),
    shrinking("ofa-at-once", "mobile", partial(OFA, AT_ONCE, kd_ratio=0.0, combine="mean"), slow=True),
    shrinking("ofa", "tied-shared", partial(OFA, WIDTHS), slow=True),
]  # fmt: skip
