"""Losses and scores: pure functions of logits. ``B`` batch, ``N`` classes; every result is a scalar tensor.

Logits may hold M samples of the batch, (M B, N), one sample after the other (multi-sample dropout, nas/heads.py): labels and
the logits that they are compared with are then repeated, so that a loss is the mean of the M losses.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def repeated(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` (B, ..) as often as ``like`` (M B, ..) holds samples of them, (M B, ..); as they are for any other length."""
    times, rest = divmod(len(like), len(rows) or 1)
    return rows if rest or times < 2 else rows.repeat(times, *[1] * (rows.ndim - 1))


class CrossEntropy:
    """Cross-entropy of logits (B, N) with classes (B,) or soft labels (B, N), summed and divided by B; for logits (M B, N) the
    mean of M.

    ``class_weights``: one factor a class. They scale each image's loss but not the divisor B (torch divides by the
    sum of the weights for classes (B,), by B for soft labels), so that a class and its one-hot row cost the same and
    the mean over ranks is the mean over the whole batch.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing = {label_smoothing}. Allowed: 0 up to, not including, 1.")
        if class_weights is not None and not all(0.0 <= weight < float("inf") for weight in class_weights):
            raise ValueError(f"class_weights = {list(class_weights)}. Allowed: finite numbers of at least 0.")
        self.label_smoothing = label_smoothing
        self.weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:  # (B, N), (B,) or (B, N) -> ()
        if self.weights is not None:
            if len(self.weights) != logits.shape[1]:
                raise ValueError(f"class_weights: {len(self.weights)} for {logits.shape[1]} classes. Give one a class.")
            if self.weights.device != logits.device or self.weights.dtype != logits.dtype:
                self.weights = self.weights.to(logits)  # once, not every step
        y = repeated(y, logits)
        total = F.cross_entropy(logits, y, self.weights, reduction="sum", label_smoothing=self.label_smoothing)
        return total / len(logits)


def distillation(student: Tensor, teacher: Tensor, y: Tensor, lam: float, T: float, loss: Loss) -> Tensor:
    """Knowledge distillation: Dong & Yang, TAS, arXiv 1905.09717, equation (14), as released (the print swaps the two).

    ``student``, ``teacher``: logits (B, N); no gradient reaches the teacher. ``lam``: the share of the teacher, 0 to 1.
    ``T``: temperature > 0. ``loss``: the loss of the labels ``y``. Either of the two may hold several samples of the batch.
    """
    if not 0.0 <= lam <= 1.0 or not T > 0.0:
        raise ValueError(f"distillation: lam = {lam}, T = {T}. Allowed: lam from 0 to 1, T above 0.")
    one, other = repeated(student, teacher), repeated(teacher, student)
    divergence = F.kl_div(
        F.log_softmax(one / T, dim=1),
        F.log_softmax(other.detach() / T, dim=1),
        reduction="batchmean",
        log_target=True,
    )  # KL(softmax(teacher/T) || softmax(student/T))
    return (1.0 - lam) * loss(student, y) + lam * T**2 * divergence  # (14)


def soft_cross_entropy(student: Tensor, teacher: Tensor, T: float = 1.0) -> Tensor:  # (B, N), (B, N) -> ()
    """T^2 CE(softmax(teacher / T), softmax(student / T)), the mean over the batch; no gradient reaches the teacher.

    It exceeds KL(teacher || student) by the teacher's entropy, a constant: same gradient. Either of the two may hold several
    samples of the batch.
    """
    if not T > 0.0:
        raise ValueError(f"soft_cross_entropy: T = {T}. Allowed: above 0.")
    one, other = repeated(student, teacher), repeated(teacher, student)
    return T**2 * F.cross_entropy(one / T, F.softmax(other.detach() / T, dim=1))


def top1(logits: Tensor, y: Tensor) -> Tensor:  # (B, N), (B,) or (B, N) -> ()
    """The share of images whose largest logit is their class (for soft labels: their most probable class); of several samples
    of the batch the mean."""
    classes = repeated(y.argmax(dim=1) if y.ndim == 2 else y, logits)
    return (logits.detach().argmax(dim=1) == classes).float().mean()


def means(parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What the parts of a step report, averaged: the same tags in all of them. One part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return {tag: torch.stack([part[tag] for part in parts]).mean() for tag in parts[0]}
