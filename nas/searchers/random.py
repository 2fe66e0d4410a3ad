"""Random search: the best of ``trials`` architectures drawn uniformly within the limits.

RSPS (Li, Talwalkar. UAI 2019. arXiv 1902.07638) picks so from its supernet: 100 architectures in the released code. How they
are scored (there: on one batch of 512 each) is for the evaluation to say.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nas.searchers.rounds import Rounds


@dataclass
class Random(Rounds):
    """``trials``: different architectures; fewer where the space holds fewer within the limits."""

    trials: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials = {self.trials}: nothing would be tried. Allowed: 1 or more.")

    def _next(self, rng: np.random.Generator) -> np.ndarray:
        return self.genes.meeting(rng, self.trials, frozenset()) if self.round == 0 else self._none()
