"""The optimizer of weights by its name in a recipe."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")


def optimizer(
    name: str,
    lr: float,
    weight_decay: float,
    *,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    alpha: float = 0.9,
    eps: float = 1e-3,
    norm_decay: bool = True,
) -> Callable[[list[Parameter]], Optimizer]:
    """What a Descent takes: "sgd" (reads ``momentum``, ``nesterov``), "adam" or "adamw" (read ``betas``), or "rmsprop" (reads
    ``momentum``, ``alpha``, the decay of the mean square, and ``eps``, added to its root).

    Decay is part of the gradient, once a step, but for "adamw", which takes rate * decay of every weight from it.
    ``norm_decay`` False: parameters of at most one dimension (norms and biases) do not decay. Raises ValueError for another
    name, and for betas, alpha and eps that are none.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer = {name!r} is not known. Allowed: {', '.join(OPTIMIZERS)}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {list(betas)} are no decay rates. Allowed: from 0, below 1.")
    if not 0 <= alpha < 1 or not eps > 0:
        raise ValueError(f"alpha = {alpha}, eps = {eps}. Allowed: alpha from 0, below 1; eps above 0.")
    make: Callable[[Any], Optimizer]
    if name == "sgd":
        make = partial(SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True)
    elif name == "rmsprop":
        make = partial(RMSprop, lr=lr, alpha=alpha, eps=eps, momentum=momentum, weight_decay=weight_decay)
    else:
        make = partial(Adam if name == "adam" else AdamW, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return make if norm_decay else lambda params: make(groups(params, weight_decay))


def groups(params: list[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters of two dimensions and more, which decay, and the others (norms, biases), which do not; none empty."""
    decayed, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    both = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]
