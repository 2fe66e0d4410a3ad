"""Which images a feed reads in which step: a pure function of (seed, step), the same on every rank and after a resumption.

n images, B a batch, permutation e a fresh order of all images:

    all images               epoch e: the first floor(n / B) batches of permutation e; what fills no batch is left out
    a fraction r of them     floor(r n / B) batches an epoch, fresh ones in every epoch
      without replacement    of one stream, permutation 0, 1, 2, ... end to end: each image once before any is read again
      with replacement       epoch e: the first batches of permutation e: distinct within an epoch, drawn anew for the next

RS2: Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning. Patrik Okanovic et al. ICLR 2024.
arXiv 2305.18424. In the stream nothing is left out: where B does not divide n, a batch holds the end of one permutation and
the start of the next, perhaps an image twice, each time in the view of its own permutation. Where B divides n, the stream is
what E' = r E epochs of all images read, so that RS2 without replacement is training on all images with the schedule
compressed to r E epochs: the baseline to compare with.
"""
from __future__ import annotations

import torch
from torch import Tensor

from nas.augment import ODDS, noise, permutation, uniform

Odds = Tensor | float | None


def fraction_of(n: int, subset: float | None) -> int:
    """floor(r n), the images of an epoch; all n without ``subset``. Decimals count as written: 0.29 of 100 are 29."""
    return n if subset is None else int(subset * n + 1e-6)


class Order:
    """step -> (positions (B,), the epoch that augmentation hashes, of the batch or of each image (B,)).

    ``subset``: the fraction r of an epoch, above 0, below 1; None for all. ``replacement``: how it is drawn, see the module.
    ``epoch_steps``: batches of an epoch; 0 where r n fills none.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, device: torch.device | str, subset: float | None = None,
        replacement: bool = False,
    ) -> None:  # fmt: skip
        self.n, self.batch_size, self.seed, self.device = n, batch_size, seed, device
        self.stream = subset is not None and not replacement
        self.epoch_steps = fraction_of(n, subset) // batch_size
        self._epoch, self._order = -1, torch.empty(0)
        self._odds, self._version, self._ends = torch.empty(0), -1, torch.empty(0)

    def __call__(self, step: int, odds: Odds = None) -> tuple[Tensor, int | Tensor]:
        B = self.batch_size
        if odds is not None:
            draws = step * B + torch.arange(B, device=self.device)
            index = self._weighted(step * B, odds) if isinstance(odds, Tensor) else noise(self.seed, 0, draws, ODDS) % self.n
            return index, -1 - draws  # no epoch is negative
        if not self.stream:
            epoch, start = divmod(step, self.epoch_steps)
            return self._permutation(epoch)[start * B : (start + 1) * B], epoch
        epoch, start = divmod(step * B, self.n)
        index = self._permutation(epoch)[start : start + B]
        short = B - len(index)  # the next permutation begins within this batch
        if not short:
            return index, epoch
        epochs = torch.full((B,), epoch, device=self.device)
        epochs[-short:] += 1
        return torch.cat([index, self._permutation(epoch + 1)[:short]]), epochs

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, epoch, self.n, self.device)
        return self._order

    def _weighted(self, start: int, odds: Tensor) -> Tensor:
        """Positions by the inverse of the cumulative odds, of the draws from ``start`` on. On the host in float64: ranks agree,
        and nothing waits for a device."""
        if odds is not self._odds or odds._version != self._version:  # once for the odds of an epoch
            self._ends = self._cumulated(odds)
            self._odds, self._version = odds, odds._version
        numbers = uniform(noise(self.seed, 0, start + torch.arange(self.batch_size), ODDS))
        found = torch.searchsorted(self._ends, numbers * self._ends[-1], right=True)
        # Rounding may reach the end of the list, where odds may be 0: the last that is not stands at the first of equal ends.
        found = found.clamp(max=int(torch.searchsorted(self._ends, self._ends[-1])))
        device = torch.device(self.device)
        return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)

    def _cumulated(self, odds: Tensor) -> Tensor:
        weights = odds.detach().to("cpu", torch.float64)
        fine = weights.shape == (self.n,) and bool(torch.isfinite(weights).all() and weights.min() >= 0)
        if not fine or weights.sum() <= 0:
            raise ValueError(f"odds {tuple(odds.shape)}: allowed are ({self.n},) finite numbers from 0, not all 0.")
        return weights.cumsum(0)
