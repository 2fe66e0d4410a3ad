"""The alpha-divergence between networks: a pure function of logits (AlphaNet).

AlphaNet: Improved Training of Supernets with Alpha-Divergence. Dilin Wang, Chengyue Gong, Meng Li, Qiang Liu, Vikas Chandra.
ICML 2021. arXiv 2102.07954. Of one image, q = softmax(student), p = softmax(teacher), w = p / q, all constants:

    alpha not in {0, 1}:   w_a = min(w^alpha, clip)
                           D   = sum_c q (w_a - 1) / (alpha (alpha - 1))       rho = w_a / alpha + 1 / (alpha (alpha - 1))
    alpha = 1:             D   = sum_c q w ln w, the KL of p from q            rho = w            (never clipped)
    alpha = 0:             w_0 = min(w, clip),  D = -sum_c q ln w_0            rho = ln w_0 - 1
    surrogate:             G   = -sum_c q rho log q_student                    only log q_student carries a gradient

Without clipping grad G = grad D. The constants of rho change G but not its gradient, as sum_c q grad log q = 0. A negative
alpha weighs classes that the student overrates, a positive one those that it underrates.

Letters: ``B`` batch, ``N`` classes.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nas.losses import repeated

NEAR = 1e-3
"""An alpha so near to 0 or 1 is taken for it: the general form divides by alpha (alpha - 1)."""


class Divergence(NamedTuple):
    """Of each image: ``D``, the divergence, a constant; ``G``, the surrogate to be minimised. Both (B,)."""

    D: Tensor
    G: Tensor


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float, clip: float | None = None) -> Divergence:
    """``student``, ``teacher``: logits (B, N); no gradient reaches the teacher. ``clip``: the largest w^alpha (alpha 0: w),
    above 0; None for no clipping, where w^alpha may overflow. Raises ValueError for other shapes and values.

    Ratios are taken between log-probabilities, so a p or q that rounds to 0 makes nothing that is not finite.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"alpha_divergence: logits {tuple(student.shape)} and {tuple(teacher.shape)}. "
                         "Give two tensors (batch, classes) of one shape.")  # fmt: skip
    check_divergence((alpha,), clip)
    log_q = student.log_softmax(1)
    lq, lp = log_q.detach(), teacher.detach().log_softmax(1)
    q, ln_w = lq.exp(), lp - lq
    top = math.inf if clip is None else math.log(clip)
    if abs(alpha - 1) < NEAR:
        D, weight = (lp.exp() * ln_w).sum(1), lp.exp()  # q w = p
    elif abs(alpha) < NEAR:
        ln_w = ln_w.clamp(max=top)
        D, weight = -(q * ln_w).sum(1), q * (ln_w - 1)
    else:
        scale = 1 / (alpha * (alpha - 1))
        q_w = (lq + (alpha * ln_w).clamp(max=top)).exp()  # q min(w^alpha, clip)
        D, weight = (q_w - q).sum(1) * scale, q_w / alpha + q * scale
    return Divergence(D, -(weight * log_q).sum(1))  # weight = q rho


def adaptive_divergence(
    student: Tensor, teacher: Tensor, alphas: tuple[float, float] = (-1.0, 1.0), clip: float | None = 5.0
) -> Tensor:
    """G of whichever of two ``alphas`` (alpha-, alpha+) has the larger D, image by image; of equal ones, alpha+. The mean over
    the batch, (). Defaults as published; the rest as for ``alpha_divergence``. Either may hold several samples of the batch
    (nas/losses.py): the mean is over all of them."""
    student, teacher = repeated(student, teacher), repeated(teacher, student)
    low, high = (alpha_divergence(student, teacher, alpha, clip) for alpha in alphas)
    return torch.where(low.D > high.D, low.G, high.G).mean()


def check_divergence(alphas: tuple[float, ...], clip: float | None) -> None:
    """ValueError for an alpha that is not finite and a clip that is not above 0."""
    if not all(math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"alpha = {', '.join(map(str, alphas))} is no order of a divergence. Allowed: finite numbers.")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip = {clip} is no bound of a ratio. Allowed: a number above 0, or None for no clipping.")
