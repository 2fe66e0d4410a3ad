"""Depthwise convolutions are those of torch, in values and gradients, in every layout, size, stride and dilation."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from supernets.depthwise import depthwise

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(k: int, size: tuple[int, int], layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)
    return x.requires_grad_(), torch.randn(3, 1, k, k, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 6), (4, 4), (7, 5), (2, 2), (1, 1)])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_values_and_gradients(k: int, s: int, d: int, size: tuple[int, int], layout: torch.memory_format) -> None:
    x, w = inputs(k, size, layout)
    found, expected = depthwise(x, w, s, d), F.conv2d(x, w, None, s, d * (k // 2), d, 3)
    assert found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert found.is_contiguous(memory_format=layout)
    g = torch.randn(expected.shape, dtype=torch.float64)
    for mine, theirs in zip(torch.autograd.grad(found, (x, w), g), torch.autograd.grad(expected, (x, w), g)):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    pair = inputs(5, (8, 8), torch.channels_last)
    pair[1 - wanted].requires_grad_(False)
    found = depthwise(*pair, 1, 2)
    expected = F.conv2d(*pair, None, 1, 4, 2, 3)
    (mine,), (theirs,) = (torch.autograd.grad(y.sum(), pair[wanted]) for y in (found, expected))
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-11)


class Kernels(TorchDispatchMode):
    """The width and the dilation of the kernels whose weight gradient ATen is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "convolution_backward" and args[-1][1]:
            self.asked.append((args[2].shape[-1], args[6][1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k, d, calls", [(3, 1, 1), (5, 1, 2), (3, 2, 1), (5, 2, 2)])
def test_weight_gradients_are_asked_of_kernels_with_three_columns_and_no_dilation(k: int, d: int, calls: int) -> None:
    x, w = inputs(k, (8, 8), torch.channels_last)
    y = depthwise(x, w, 1, d)
    with Kernels() as found:
        y.sum().backward()
    assert found.asked == [(3, 1)] * calls


def test_one_gradient_after_another_finds_its_zeros() -> None:
    """Two forms whose buffers have the same sizes, with their zeros in different places."""
    for C, size, d in ((2, (10, 8), 2), (4, (5, 10), 1), (2, (10, 8), 2), (4, (5, 10), 1)):
        x = torch.randn(2, C, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        w = torch.randn(C, 1, 5, 5, dtype=torch.float64, requires_grad=True)
        (mine,), (theirs,) = (torch.autograd.grad(y.square().sum(), w)
                              for y in (depthwise(x, w, 1, d), F.conv2d(x, w, None, 1, 2 * d, d, C)))  # fmt: skip
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-9)


def test_half_precision_under_autocast() -> None:
    x, w = inputs(5, (8, 8), torch.channels_last)
    x, w = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise(x, w, 1, 2)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32 and bool(w.grad.any())
