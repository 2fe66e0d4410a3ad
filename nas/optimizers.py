"""The optimizer of weights by its name in a recipe."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

OPTIMIZERS = ("sgd", "adam", "adamw")


def optimizer(
    name: str, lr: float, weight_decay: float, *, momentum: float, nesterov: bool, betas: tuple[float, float]
) -> Callable[[list[Parameter]], Optimizer]:
    """What a Descent takes: "sgd" (reads ``momentum``, ``nesterov``), "adam" or "adamw" (read ``betas``).

    Decay is part of the gradient of the first two; "adamw" takes rate * decay of every weight from it. Raises ValueError for
    another name, and for betas that are no decay rates.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer = {name!r} is not known. Allowed: {', '.join(OPTIMIZERS)}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {list(betas)} are no decay rates. Allowed: from 0, below 1.")
    if name == "sgd":
        return partial(SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True)
    return partial(Adam if name == "adam" else AdamW, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
