"""Operations side by side are the operations one by one, in values and gradients, whatever the layout."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.space import Mixture
from supernets.abreast import Inputs, abreast, columns, fits, pointwise, repeated, spread
from supernets.operations import Conv, Halve, Operation

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SEPARABLE = [(Conv(5, 2, 1, True), Conv(1)), (Conv(5, 1, 1, True), Conv(1))]
DILATED = [(Conv(3, 1, 2, True), Conv(1))]
STRIDED = [(Conv(5, 2, 2, True), Conv(1))]


def normal(*shape: int, seed: int = 0, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x.contiguous(memory_format=layout) if x.ndim == 4 else x).requires_grad_()


def check_equal(found: Any, expected: Any, leaves: list[Tensor]) -> None:
    """Tensors, and the gradients of a sum in which every number counts."""
    grads = []
    for outs in (found, expected):
        total = sum((out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum() for out in outs)
        grads.append(torch.autograd.grad(total, leaves))
    for mine, theirs in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= 1e-10 * theirs.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("units", [SEPARABLE, DILATED, STRIDED, None], ids=["separable", "dilated", "strided", "halves"])
@pytest.mark.parametrize("E", [1, 2, 4])
def test_abreast_is_one_by_one(E: int, units: Any, layout: torch.memory_format) -> None:
    operations: list[Any] = [
        (Halve(4, 6, affine=False) if units is None else Operation(4, 4, units, affine=False)).double() for _ in range(E)
    ]
    x, w = normal(3, 4, 8, 8, layout=layout), normal(E, seed=1)
    found = abreast(operations, Inputs(x, E), w).chunk(E, dim=1)
    expected = [operation.scaled(x, v)[0] for operation, v in zip(operations, w.unbind(0))]
    leaves = [x, w, *(p for operation in operations for p in operation.parameters())]
    check_equal(found, expected, leaves)
    assert all(part.permute(0, 2, 3, 1)[0].stride(-1) == 1 for part in found)


@pytest.mark.parametrize("E", [1, 3])
def test_scales_are_real_numbers(E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of a batch norm in channels_last may read a scale without regard to its strides."""
    scales: list[Tensor] = []
    batch_norm = F.batch_norm

    def watched(x: Tensor, mean: Any, var: Any, weight: Tensor | None, *rest: Any, **more: Any) -> Tensor:
        scales.extend([] if weight is None else [weight])
        return batch_norm(x, mean, var, weight, *rest, **more)

    monkeypatch.setattr(F, "batch_norm", watched)
    w, inputs = normal(E), Inputs(normal(2, 4, 8, 8), E)
    for operations in ([Operation(4, 4, DILATED, affine=False).double() for _ in range(E)],
                       [Halve(4, 4, affine=False).double() for _ in range(E)]):  # fmt: skip
        abreast(operations, inputs, w)
    assert len(scales) == 2
    for scale in scales:
        assert scale.stride() == (1,) and scale.untyped_storage().nbytes() == 4 * E * 8
        assert torch.equal(scale, w.repeat_interleave(4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise_is_a_convolution_in_groups(layout: torch.memory_format) -> None:
    x, w = normal(2, 6, 4, 5, layout=layout), normal(3, 5, 2, seed=1)
    check_equal([pointwise(x, w)], [F.conv2d(x, w.reshape(15, 2, 1, 1), groups=3)], [x, w])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("K", [0, 1, 3])
def test_spread_is_a_weighted_sum_for_each_reader(K: int, E: int, layout: torch.memory_format) -> None:
    features = [normal(2, 4, 5, 5, seed=k, layout=layout) for k in range(K)]
    weights, sums = [normal(E, seed=9 + k) for k in range(K)], normal(2, 4 * E, 5, 5, seed=20, layout=layout)
    expected = [
        sum((w[e] * feature for w, feature in zip(weights, features)), start=part)
        for e, part in enumerate(sums.chunk(E, dim=1))
    ]
    check_equal(spread(features, weights, sums, E), expected, [*features, *weights, sums])


def test_repeated_is_a_repetition() -> None:
    x = normal(2, 3, 4, 4)
    for E in (1, 2, 5):
        check_equal([repeated(x, E)], [x.repeat(1, E, 1, 1)], [x])


def test_what_stands_side_by_side() -> None:
    assert fits(Operation(4, 4, SEPARABLE, affine=False)) and fits(Operation(4, 4, DILATED, affine=False))
    assert not fits(Operation(4, 4, SEPARABLE)) and not fits(Operation(4, 4, [[Conv(3)]], affine=False))
    assert fits(Halve(4, 4, affine=False)) and not fits(Halve(4, 4)) and not fits(None)


def test_columns_are_of_mixtures_that_are_alike() -> None:
    w = [torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.5, 0.3, 0.2])]
    some = [Mixture(("none", "a", "b"), v, (0, 2)) for v in w]
    assert {option: column.tolist() for option, column in columns(some).items()} == {
        "none": pytest.approx([0.1, 0.5]), "b": pytest.approx([0.7, 0.2])}  # fmt: skip
    assert list(columns([some[0]._replace(active=None)])) == ["none", "a", "b"]
    for other in (some[1]._replace(active=(1, 2)), some[1]._replace(options=("none", "b", "a")), some[1]._replace(idle="ones")):
        assert columns([some[0], other]) == {}
    assert columns([]) == {} and columns([mixture._replace(idle="ones") for mixture in some]) == {}
