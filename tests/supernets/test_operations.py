"""Candidate operations as leaves: weights in norms, plain forms, costs, and what they take over."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.bundle import counted
from nas.cost import macs, params
from supernets.chains import filled, together
from supernets.elastic import Leaf
from supernets.operations import Classifier, Conv, Halve, Operation, Pool, zero

SEPARABLE = [[Conv(3, 2, 1, True), Conv(1)], [Conv(3, 1, 1, True), Conv(1)]]
LEAVES: dict[str, Any] = {
    "conv": lambda affine: Operation(4, 6, [[Conv(3)]], affine),
    "conv with a bias": lambda affine: Operation(4, 6, [[Conv(3)]], affine, bias=True),
    "separable": lambda affine: Operation(4, 6, SEPARABLE, affine),
    "dilated": lambda affine: Operation(4, 6, [[Conv(5, 1, 2, True), Conv(1)]], affine),
    "1x7, 7x1": lambda affine: Operation(4, 4, [[Conv((1, 7), (1, 2)), Conv((7, 1), (2, 1))]], affine),
    "halving": lambda affine: Halve(4, 6, affine),
    "pool": lambda affine: Pool("max", 4, 2, norm=not affine),
}


@pytest.fixture(params=LEAVES)
def leaf(request: pytest.FixtureRequest) -> Any:
    return made(request.param, False)


def made(name: str, affine: bool) -> Any:
    """In float64, with statistics, scales and shifts that are not those of the start."""
    own: Leaf = LEAVES[name](affine).double()
    generator = torch.Generator().manual_seed(1)
    own.reset(generator)
    for key, value in (*own.named_parameters(), *own.named_buffers()):
        if "norm" in key:
            value.data.uniform_(0.5, 1.5, generator=generator)
    own.name = "cell.op"
    return own


def state(size: int = 8) -> Tensor:
    return torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_multiplies(leaf: Any, training: bool) -> None:
    leaf.train(training)
    w = torch.tensor(0.3, dtype=torch.float64)
    y, rest = leaf.scaled(state(), w)
    assert rest is None
    assert torch.allclose(y, w * leaf(state(), {}), rtol=1e-12, atol=1e-12)
    assert torch.equal(leaf.weighted(state(), None)[0], leaf(state(), {}))


def test_a_pool_without_a_norm_hands_the_weight_back() -> None:
    w = torch.tensor(0.3)
    y, rest = Pool("avg", 4).scaled(state(), w)
    assert rest is w and torch.equal(y, nn.AvgPool2d(3, 1, 1, count_include_pad=False)(state()))


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("affine", [True, False])
def test_the_plain_form_is_the_leaf(name: str, affine: bool) -> None:
    own = made(name, affine).eval()
    plain = own.plain({}, 4).eval()
    assert torch.allclose(plain(state()), own(state(), {}), rtol=0, atol=1e-12)
    assert not any(module.bias is not None for module in plain.modules() if isinstance(module, nn.Conv2d))


def test_costs_are_those_of_the_fresh_plain_form(leaf: Any) -> None:
    plain, x = leaf.plain({}, 4, inherit=False), state()
    records = leaf.layers(tuple(leaf(x, {}).shape[2:]))
    shapes = [(record.op, record.shape(*[0] * len(record.on))) for record in records]
    assert counted(plain.double(), x) == tuple(sum(price(op, shape) for op, shape in shapes) for price in (macs, params))


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in ("pool", "conv with a bias")])
def test_taking_over_is_the_inverse_of_the_plain_form(name: str) -> None:
    given, taker = made(name, True).eval(), LEAVES[name](True).double().eval()
    plain = given.plain({}, 4)
    taker.adopt({path: module for path, module in plain.named_modules() if path})
    assert torch.equal(taker(state(), {}), given(state(), {}))
    with pytest.raises(ValueError, match=r"cell\.op: this search net's norms have no scale and shift, so it cannot take over"):
        made(name, False).adopt({path: module for path, module in plain.named_modules() if path})


@pytest.mark.parametrize("bias", [False, True])
def test_together_is_each_alone(bias: bool) -> None:
    operations = [Operation(4, 6, [[Conv(3, 2)]], affine=False, bias=bias).double() for _ in range(3)]
    weights = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.3, 0.5)]
    x = state().requires_grad_()
    joint = together([operation.chain() for operation in operations], x, weights)
    alone = [operation.scaled(x, w)[0] for operation, w in zip(operations, weights)]
    sources = [x, *weights, *(operation.weight[0] for operation in operations)]
    for outs in (joint, alone):
        assert len(outs) == 3 and all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(outs, alone))
    totals = [torch.cat([(k + 1) * y**3 for k, y in enumerate(outs)]).sum() for outs in (joint, alone)]
    found = [torch.autograd.grad(total, sources) for total in totals]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(*found))


def test_a_filled_scale_is_not_a_view() -> None:
    norm = made("halving", False).norm
    w = torch.tensor(0.25, requires_grad=True)
    scale = filled(w, norm)
    assert scale.tolist() == [0.25] * 6 and scale.stride() == (1,) and scale.dtype == torch.float64
    scale.sum().backward()
    assert w.grad is not None and w.grad.item() == 6.0


def test_a_zero_has_the_size_of_its_stride() -> None:
    assert zero(state()).shape == (3, 4, 8, 8) and zero(state(7), 2).shape == (3, 4, 4, 4)
    assert not zero(state(), 2).any()


def test_a_classifier_starts_as_torch_starts_it() -> None:
    own = Classifier(Operation(100, 400, [[Conv(1)]]).out, 50)
    own.reset(torch.Generator().manual_seed(3))
    for values in (own.weight.detach(), own.bias.detach()):
        assert float(values.abs().max()) <= 1 / 20 and float(values.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.2)
    plain: Any = own.plain({}, 400, inherit=False)
    assert plain.weight.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05) and plain.bias.abs().max().item() <= 1 / 20


@pytest.mark.parametrize("make, words", [
    (lambda: Halve(4, 5), "5 is odd. Choose an even C"),
    (lambda: Pool("sum", 4), "kind = 'sum' is not a pool. Allowed: avg, max"),
])  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
