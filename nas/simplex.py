"""Points of the simplex from logits, by rows: softmax, sparsemax, and Dirichlet with its mean and divergence.

Letters: ``n`` rows, ``K`` options. A logit of -inf excludes its option: weight 0, no gradient.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:  # (n, K) -> (n, K)
    return torch.softmax(logits, dim=-1)


def sparsemax(logits: Tensor, dim: int = -1) -> Tensor:
    """The point of the simplex that is nearest to ``logits`` along ``dim`` (Martins, Astudillo. ICML 2016. arXiv 1602.02068).

        sparsemax(z)_i = max(z_i - t, 0),   S = {i: sum over j of max(z_j - z_i, 0) < 1},   t = (sum over S of z_j - 1) / |S|

    Exact, and so is its gradient: g_i - mean of g over S on the support S, 0 elsewhere. S is found by all pairs, without a
    cumulative sum, whose order of addition CUDA does not promise; K is small.
    """
    z = logits.movedim(dim, -1)
    fixed = z.detach()
    ahead = (fixed[..., None, :] - fixed[..., :, None]).relu().sum(-1)  # nan for -inf against itself: not below 1
    support = ahead < 1
    kept = z.masked_fill(~support, 0.0)
    t = (kept.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return (kept - t).masked_fill(~support, 0.0).movedim(-1, dim)


def concentration(logits: Tensor) -> Tensor:
    """elu(a) + 1, as exp(a) below 0, which does not round to 0; 0 at -inf."""
    above = logits > 0
    return torch.where(above, logits + 1, logits.masked_fill(above, 0.0).exp())


def dirichlet_mean(logits: Tensor) -> Tensor:  # (n, K) -> (n, K)
    """E of Dirichlet(elu(a) + 1). Of logits below 0 it is their softmax."""
    c = concentration(logits)
    return c / c.sum(-1, keepdim=True)


def dirichlet(logits: Tensor, noise: torch.Generator) -> Tensor:  # (n, K) -> (n, K)
    """One sample a row of Dirichlet(elu(a) + 1), with its pathwise gradient.

    Drawn on the host in float64 from ``noise`` (``rsample`` of torch.distributions knows only the global one), so equal
    logits give equal samples on every rank and device. x_i = g_i / sum g with g_i ~ Gamma(c_i), in logarithms, as
    Gamma(c) = Gamma(c + 1) U^(1/c) is 0 in floating point for small c. The gradient is that of torch.distributions:

        dx_j / dc_i = d_i (delta_ij - x_j),   d_i = -(dP(x_i; c_i, C - c_i) / dc_i) / (p(x_i) (1 - x_i)),   C = sum c

    with P, p of the Beta distribution of x_i; torch approximates d to about four digits.
    """
    c = concentration(logits.detach().double().cpu())
    excluded = c == 0
    log_g = torch._standard_gamma(c + 1, noise).log() - torch.empty_like(c).exponential_(generator=noise) / c
    x = softmax(log_g.masked_fill(excluded, -torch.inf))
    d = torch._dirichlet_grad(x, c, c.sum(-1, keepdim=True).expand_as(c)).masked_fill(excluded, 0.0)
    x, d, c = x.to(logits), d.to(logits), concentration(logits)
    moved = d * (c - c.detach())  # 0, with the gradient d
    return x + moved - x * moved.sum(-1, keepdim=True)


def dirichlet_kl(logits: Tensor, anchor: float = 1.0) -> Tensor:  # (n, K) -> (n,)
    """KL(Dirichlet(elu(a) + 1) || Dirichlet(anchor, .., anchor)) of each row, over the options that are not excluded.

        KL = sum_k [(c_k - b) (psi(c_k) - psi(C)) - lgamma(c_k) + lgamma(b)] + lgamma(C) - lgamma(K b),   C = sum c, b = anchor
    """
    allowed = logits > -torch.inf
    c = concentration(logits.masked_fill(~allowed, 0.0))  # 1 where excluded: finite, and without gradient
    C = c.masked_fill(~allowed, 0.0).sum(-1)
    b, K = c.new_tensor(anchor), allowed.sum(-1).to(c)
    terms = (c - b) * (c.digamma() - C.digamma()[..., None]) - c.lgamma() + b.lgamma()
    return terms.masked_fill(~allowed, 0.0).sum(-1) + C.lgamma() - (K * b).lgamma()


READINGS: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sparsemax": sparsemax, "dirichlet": dirichlet_mean}
"""Weights of logits by name, without noise; all keep the order of a row's logits."""
