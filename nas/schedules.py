"""Schedules of a rate: pure functions of the steps taken so far -> a factor of the base rate."""
from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """The base rate at every step."""
    return lambda step: 1.0


def linear(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` at step 0 to ``end`` at step ``steps`` and after."""
    if steps < 1:
        raise ValueError(f"linear: steps = {steps}. Allowed: 1 or more.")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


def cosine(steps: int, floor: float = 0.0, warmup: int = 0) -> Schedule:
    """``warmup`` steps of (step + 1) / warmup, then half a cosine from 1 to ``floor``, reached at step ``steps``."""
    if not 0 <= warmup < steps:
        raise ValueError(f"cosine: warmup = {warmup}, steps = {steps}. Allowed: 0 <= warmup < steps.")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return floor + (1.0 - floor) * _half_cosine(step - warmup, steps - warmup)

    return factor


def cosine_per_epoch(epochs: int, epoch_steps: int, warmup_epochs: int = 0) -> Schedule:
    """As ``cosine`` to 0, but constant within an epoch after the warm-up (TAS, arXiv 1905.09717, released code).

    ``epochs`` counts the warm-up; the cosine ends with the run (T_max = epochs - warmup_epochs).
    """
    if not 0 <= warmup_epochs < epochs or epoch_steps < 1:
        raise ValueError(
            f"cosine_per_epoch: epochs = {epochs}, warmup_epochs = {warmup_epochs}, epoch_steps = {epoch_steps}. "
            "Allowed: 0 <= warmup_epochs < epochs, epoch_steps of 1 or more."
        )

    def factor(step: int) -> float:
        if step < warmup_epochs * epoch_steps:
            return (step + 1) / (warmup_epochs * epoch_steps)
        return _half_cosine(step // epoch_steps - warmup_epochs, epochs - warmup_epochs)

    return factor


def exponential(length: float, rate: float, floor: float = 0.0) -> Schedule:
    """max(rate^(step / length), floor): times ``rate`` every ``length`` steps, in small steps, never below ``floor``
    (BigNAS, arXiv 2003.11142, whose floor keeps small children learning late)."""
    if not length > 0 or not 0.0 < rate <= 1.0 or not 0.0 <= floor <= 1.0:
        raise ValueError(f"exponential: length = {length}, rate = {rate}, floor = {floor}. Allowed: length above 0, rate above "
                         "0 up to 1, floor 0 to 1.")  # fmt: skip
    return lambda step: max(rate ** (step / length), floor)


def _half_cosine(at: int, length: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(at / length, 1.0)))
