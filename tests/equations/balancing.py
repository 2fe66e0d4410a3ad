"""The balanced assignment of configurations to models as the page writes it (pooling-mixture.md, section 2), on plain lists."""
from __future__ import annotations

import math


def normal(row: list[float]) -> list[float]:
    return [p / math.fsum(row) for p in row]


def softmax(T: float, row: list[float]) -> list[float]:
    return normal([math.exp(T * w) for w in row])


def uneven(pi: list[float]) -> float:
    return math.fsum(p * math.log(p * len(pi)) for p in pi)


def literal(W: list[list[float]], T: float) -> tuple[list[list[float]], list[list[float]]]:
    """P and the stored pi, steps 1 to 4."""
    P, stored = [softmax(T, row) for row in W], list[list[float]]()
    while True:
        pi = [math.fsum(column) / len(P) for column in zip(*P)]
        if uneven(pi) <= 1e-4:
            return P, stored
        stored.append(pi)
        P = [normal([p / q for p, q in zip(row, pi)]) for row in P]


def replayed(row: list[float], T: float, stored: list[list[float]]) -> list[float]:
    """Step 6."""
    r = softmax(T, row)
    for pi in stored:
        r = normal([p / q for p, q in zip(r, pi)])
    return r
