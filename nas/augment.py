"""Batched augmentation on the device of the run, and the counter-based random numbers behind it.

Every number is a hash of (seed, epoch, index, purpose): the same image gets the same crop in the same epoch whatever
the batch around it, the rank that reads it or the step a run resumed at. There is no generator state to save.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width, ``p`` pad.
The hash is splitmix64 (Steele, Lea, Flood, OOPSLA 2014) in int64 arithmetic that wraps around.
"""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What a number is for: two purposes never share a number.
ORDER, ROW, COLUMN, FLIP, HOLE_ROW, HOLE_COLUMN, VIEW, ODDS, SPLIT, TEST, LIMIT, VALID, SELECT = range(13)

_MASK = (1 << 64) - 1
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_GOLDEN = 0x9E3779B97F4A7C15


def signed(number: int) -> int:
    """The int64 with the low 64 bits of ``number``."""
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's ``>>`` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64 of every element of an int64 tensor."""
    x = x + signed(_GOLDEN)
    for bits, factor in _STEPS:
        x = (x ^ _shift(x, bits)) * signed(factor)
    return x ^ _shift(x, 31)


def mix_number(number: int) -> int:
    """``mix`` of one Python int, without a kernel launch; signed."""
    number = (number + _GOLDEN) & _MASK
    for bits, factor in _STEPS:
        number = ((number ^ (number >> bits)) * factor) & _MASK
    return signed(number ^ (number >> 31))


@lru_cache(maxsize=256)
def fold(*numbers: int) -> int:
    """One int64 out of several ints; the order counts."""
    key = 0
    for number in numbers:
        key = mix_number(key ^ signed(number))
    return key


def noise(seed: int, epoch: int | Tensor, index: Tensor, purpose: int) -> Tensor:
    """Random integers in [0, 2^63), one per element of ``index``; ``epoch`` is a number or has ``index``'s shape."""
    key = fold(seed, purpose)
    key_epoch = mix(epoch ^ key) if isinstance(epoch, Tensor) else mix_number(key ^ signed(epoch))
    return _shift(mix(index ^ key_epoch), 1)


def uniform(numbers: Tensor) -> Tensor:
    """``noise`` as float64 in [0, 1): its upper 53 bits."""
    return (numbers >> 10).to(torch.float64) * 2.0**-53


def permutation(seed: int, epoch: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of an epoch, (n,) int64: a pure function of its arguments, the same on every device."""
    return noise(seed, epoch, torch.arange(n, device=device), ORDER).argsort(stable=True)


def crop(x: Tensor, row: Tensor, column: Tensor, pad: int) -> Tensor:
    """Pad (B, C, H, W) by ``pad`` zeros on each side, cut (H, W) at each image's own (row, column) in [0, 2 pad]."""
    height, width = x.shape[-2:]
    windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)  # view (B, C, 2p+1, 2p+1, H, W)
    return windows[torch.arange(len(x), device=x.device), :, row, column]


def flip(x: Tensor, which: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) for which ``which`` (B,) bool holds, left to right."""
    return torch.where(which[:, None, None, None], x.flip(-1), x)


def cut_out(x: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
    """Zero a square of ``length`` around each image's (row, column), clipped at the border (DeVries, 1708.04552)."""

    def inside(centre: Tensor, size: int) -> Tensor:  # (B,) -> (B, size)
        away = torch.arange(size, device=x.device) - (centre[:, None] - length // 2)
        return (away >= 0) & (away < length)

    hole = inside(row, x.shape[-2])[:, None, :, None] & inside(column, x.shape[-1])[:, None, None, :]
    return x.masked_fill(hole, 0)


@lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], full: float, device: torch.device) -> list[Tensor]:
    scale = torch.tensor([1.0 / (full * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device)
    return [scale[:, None, None], shift[:, None, None]]


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, H, W) uint8 (or float, taken as it is) -> float32, less the channel means, over the deviations."""
    scale, shift = _affine(tuple(mean), tuple(std), 255.0 if x.dtype == torch.uint8 else 1.0, x.device)
    return x.to(torch.float32) * scale + shift


def resize(x: Tensor, size: int | None) -> Tensor:
    """(B, C, H, W) float -> (B, C, size, size), bilinear and antialiased; ``None`` or the same size: as it is."""
    if size is None or tuple(x.shape[-2:]) == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class Augment:
    """The training view of a batch. ``pad``: 0 = no crop; ``cutout``: side of the hole in pixels, 0 = none."""

    pad: int = 0
    flip: bool = False
    cutout: int = 0

    def pixels(self, x: Tensor, seed: int, epoch: int | Tensor, index: Tensor) -> Tensor:
        """Crop and flip (B, C, H, W), any dtype, before it is normalised: the pad is black, as torchvision's on PIL."""
        if self.pad:
            row, column = (noise(seed, epoch, index, purpose) % (2 * self.pad + 1) for purpose in (ROW, COLUMN))
            x = crop(x, row, column, self.pad)
        if self.flip:
            x = flip(x, noise(seed, epoch, index, FLIP) % 2 == 1)
        return x

    def holes(self, x: Tensor, seed: int, epoch: int | Tensor, index: Tensor) -> Tensor:
        """Cut out of (B, C, H, W) float after it is normalised: a hole shows the mean colour, as in DARTS's code."""
        if not self.cutout:
            return x
        row = noise(seed, epoch, index, HOLE_ROW) % x.shape[-2]
        column = noise(seed, epoch, index, HOLE_COLUMN) % x.shape[-1]
        return cut_out(x, row, column, self.cutout)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body on global generators (torch's on the CPU, NumPy's, Python's) seeded by ``seed``; restore them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed & (_MASK >> 1))
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
