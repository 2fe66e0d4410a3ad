"""Interpolation, folding and blending as pure functions, against the page, torch and each candidate by itself."""
from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.space import Mixture
from supernets.mixing import Candidate, Scaled, active, averaging, blend, fold, idle_ones, interpolate_channels, plus_idle


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- averaging and interpolate_channels ---------------------------------------------------------------------------------

CWI = [  # tas.md, section 6, check 2
    (range(1, 7), [1.5, 2.5, 4.5, 5.5]),
    (range(1, 5), [1, 1.5, 2, 3, 3.5, 4]),
    (range(11), [0, 0.5, 1.5, 2, 2.5, 3.5, 4, 4.5, 5.5, 6, 6.5, 7.5, 8, 8.5, 9.5, 10]),
]
PAIRS = [(1, 1), (1, 5), (5, 1), (3, 8), (8, 3), (9, 16), (11, 16), (7, 7)]


@pytest.mark.parametrize("given, expected", CWI, ids=["6 to 4", "4 to 6", "11 to 16"])
def test_the_examples_of_the_page(given: range, expected: list[float]) -> None:
    c = torch.tensor(list(given), dtype=torch.float64)
    assert (averaging(len(given), len(expected)) @ c).tolist() == expected
    assert interpolate_channels(c[None, :, None, None], len(expected)).flatten().tolist() == expected


@pytest.mark.parametrize("c, channels", PAIRS)
def test_interpolation_is_torchs_adaptive_average(c: int, channels: int) -> None:
    x = doubles(2, c, 3, 5)
    theirs = F.adaptive_avg_pool1d(x.permute(0, 2, 3, 1).reshape(30, 1, c), channels)
    theirs = theirs.reshape(2, 3, 5, channels).permute(0, 3, 1, 2)
    found = interpolate_channels(x, channels)
    assert found.shape == (2, channels, 3, 5) and torch.allclose(found, theirs, rtol=0, atol=1e-14)
    assert (found is x) == (c == channels)
    single = interpolate_channels(x.float(), channels)
    assert single.dtype == torch.float32 and torch.allclose(single, found.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c, channels", PAIRS)
def test_sum_is_padding_with_zeros(c: int, channels: int) -> None:
    x = doubles(2, c, 3, 5)
    expected = F.pad(x, (0, 0, 0, 0, 0, channels - c))  # a negative pad cuts
    assert torch.equal(interpolate_channels(x, channels, "sum"), expected)
    assert torch.equal(averaging(c, channels, "sum"), torch.eye(channels, c, dtype=torch.float64))


# -- fold ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["interpolate", "sum"])
@pytest.mark.parametrize("sizes", [[4, 8], [8, 4], [3, 5, 8], [8], [5, 5]], ids=str)
def test_a_fold_is_every_candidate_by_itself(sizes: list[int], mixing: str) -> None:
    """Value and every gradient; z has more channels than the widest candidate reads only through the caller's slice."""
    C = max(sizes)

    def leaves() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        scales = [doubles(c, seed=10 + k) for k, c in enumerate(sizes)]
        shifts = [doubles(c, seed=20 + k) for k, c in enumerate(sizes)]
        found = (doubles(2, C, 3, 4), doubles(len(sizes), seed=1), scales, shifts)
        for leaf in (found[0], found[1], *scales, *shifts):
            leaf.requires_grad_()
        return found

    z, v, scales, shifts = mine = leaves()
    M, b = fold(sizes, v.unbind(0), scales, shifts, mixing)
    assert M.shape == (C, C) and b.shape == (C,)
    found = F.conv2d(z, M[:, :, None, None], b)
    z, v, scales, shifts = theirs = leaves()
    expected = torch.zeros(2, C, 3, 4, dtype=torch.float64)
    for c, w, gamma, beta in zip(sizes, v, scales, shifts):
        f = gamma[:, None, None] * z[:, :c] + beta[:, None, None]
        expected = expected + w * interpolate_channels(f, C, mixing)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    factors = doubles(2, C, 3, 4, seed=3)
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    for a, e in zip((*mine[:2], *mine[2], *mine[3]), (*theirs[:2], *theirs[2], *theirs[3])):
        assert a.grad is not None and e.grad is not None
        assert torch.allclose(a.grad, e.grad, rtol=0, atol=1e-11) and bool(a.grad.any())


# -- blend --------------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Three candidates f_j(x) = tanh(s_j x), and how often each was called."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64))
        self.calls = [0, 0, 0]

    def of(self, j: int, x: Tensor, w: Tensor | None) -> Scaled:
        """The second candidate takes its weight in, as a batch norm does; the others hand it back."""
        self.calls[j] += 1
        y = torch.tanh(self.s[j] * x)
        return (y, w) if j != 1 or w is None else (w * y, None)

    def candidates(self) -> list[Candidate]:
        return [partial(self.of, j) for j in range(3)]


def settled() -> tuple[Counted, Tensor, Tensor, Tensor]:
    """Candidates, x, weights, dL/dout."""
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    return Counted(), doubles(2, 3, 4, 4).requires_grad_(), w, doubles(2, 3, 4, 4, seed=1)


def values(net: Counted, x: Tensor) -> list[Tensor]:
    """f_j(x) without counting and without a graph."""
    return [torch.tanh(s * x) for s in net.s.detach()]


@pytest.mark.parametrize("at", [None, (0, 2), (1,)], ids=["all", "two", "one"])
def test_absent_candidates_add_nothing(at: tuple[int, ...] | None) -> None:
    net, x, w, grad = settled()
    out = blend(net.candidates(), x, Mixture(("a", "b", "c"), w, at))
    f, js = values(net, x.detach()), (0, 1, 2) if at is None else at
    assert active(Mixture(("a", "b", "c"), w, at)) == js
    assert torch.allclose(out, sum(w.detach()[j] * f[j] for j in js), rtol=0, atol=1e-14)  # type: ignore[arg-type]
    (out * grad).sum().backward()
    assert net.calls == [int(j in js) for j in range(3)]  # the others are called neither way
    dots = [(f[j] * grad).sum().item() if j in js else 0.0 for j in range(3)]
    assert w.grad is not None and w.grad.tolist() == pytest.approx(dots, rel=1e-12)
    assert net.s.grad is not None and [bool(g) for g in net.s.grad] == [j in js for j in range(3)]
    dx = sum(w.detach()[j] * net.s.detach()[j] * (1 - f[j] ** 2) for j in js) * grad
    assert x.grad is not None and torch.allclose(x.grad, dx, rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_idle_ones_add_their_weight() -> None:
    """GDAS: out = w_1 f_1(x) + w_0 + w_2; dL/dw_1 = <f_1(x), dL/dout>, dL/dw_0 = dL/dw_2 = the sum of dL/dout."""
    net, x, w, grad = settled()
    out = blend(net.candidates(), x, Mixture(("a", "b", "c"), w, (1,), "ones"))
    f = values(net, x.detach())[1]
    assert torch.allclose(out, 0.5 * f + 0.2 + 0.3, rtol=0, atol=1e-14)
    (out * grad).sum().backward()
    assert net.calls == [0, 1, 0]
    total = grad.sum().item()
    assert w.grad is not None and w.grad.tolist() == pytest.approx([total, (f * grad).sum().item(), total], rel=1e-12)


def test_idle_ones_of_a_straight_through_sample_change_no_value() -> None:
    net, x, w, _ = settled()
    hard = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64) - w.detach() + w
    mixture = Mixture(("a", "b", "c"), hard, (1,), "ones")
    assert torch.equal(blend(net.candidates(), x, mixture), hard[1] * values(net, x)[1])
    rest = idle_ones(mixture)
    assert isinstance(rest, Tensor) and rest.item() == 0.0
    assert idle_ones(mixture._replace(active=(0, 1, 2))) == idle_ones(mixture._replace(active=None)) == 0.0
    assert idle_ones(mixture._replace(idle="absent")) == 0.0
    assert plus_idle(x, 0.0) is x and torch.equal(plus_idle(x, torch.tensor(2.0)), x + 2.0)


@pytest.mark.parametrize("at", [(1,), (2,), (0, 2)], ids=str)
def test_a_gate_passes_the_active_and_weighs_them_all(at: tuple[int, ...]) -> None:
    """ProxylessNAS: out = f_i(x), unweighted; dL/dw_j = <f_j(x), dL/dout> for every j, run in the backward alone."""
    net, x, w, grad = settled()
    out = blend(net.candidates(), x, Mixture(("a", "b", "c"), w, at, "gate"))
    assert net.calls == [int(j in at) for j in range(3)]  # in the forward, only what is active
    f = values(net, x.detach())
    assert torch.allclose(out, sum(f[j] for j in at), rtol=0, atol=1e-14)  # type: ignore[arg-type]
    (out * grad).sum().backward()
    assert net.calls == [1, 1, 1]  # what is active is remembered
    assert w.grad is not None and w.grad.tolist() == pytest.approx([(f_j * grad).sum().item() for f_j in f], rel=1e-12)
    dx = sum(net.s.detach()[j] * (1 - f[j] ** 2) for j in at) * grad
    assert x.grad is not None and torch.allclose(x.grad, dx, rtol=0, atol=1e-12)  # type: ignore[arg-type]
    ds = [(x.detach() * (1 - f[j] ** 2) * grad).sum().item() if j in at else 0.0 for j in range(3)]
    assert net.s.grad is not None and net.s.grad.tolist() == pytest.approx(ds, rel=1e-12)


def test_a_gates_gradient_is_that_of_the_weighted_sum_at_the_gate() -> None:
    """Through autograd: the binary gate g as the weights of a blend of all three (tas of the page's check 5)."""
    net, x, w, grad = settled()
    gate = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    out = blend(net.candidates(), x, Mixture(("a", "b", "c"), gate - w.detach() + w, (1,), "gate"))
    (mine,) = torch.autograd.grad((out * grad).sum(), w)
    g = gate.clone().requires_grad_()
    full = blend(net.candidates(), x, Mixture(("a", "b", "c"), g))
    (theirs,) = torch.autograd.grad((full * grad).sum(), g)
    assert torch.allclose(out, full, rtol=0, atol=1e-14) and torch.allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize("idle", ["absent", "ones", "gate"])
def test_an_empty_candidate_is_zero_and_not_computed(idle: str) -> None:
    net, x, w, grad = settled()
    out = blend([None, *net.candidates()[1:]], x, Mixture(("none", "b", "c"), w, (0, 2), idle))
    f = values(net, x.detach())
    factor, rest = (1.0, 0.0) if idle == "gate" else (0.3, 0.5 if idle == "ones" else 0.0)
    assert torch.allclose(out, factor * f[2] + rest, rtol=0, atol=1e-14) and net.calls == [0, 0, 1]
    (out * grad).sum().backward()
    assert w.grad is not None and w.grad[0].item() == 0.0
    assert w.grad[2].item() == pytest.approx((f[2] * grad).sum().item(), rel=1e-12)


def test_a_mixture_of_nothing_but_empty_candidates_is_the_given_zero() -> None:
    net, x, w, _ = settled()
    alone = Mixture(("none", "b", "c"), w, (0,), "ones")
    out = blend([None, *net.candidates()[1:]], x, alone, empty=lambda x: x * 0.0)
    assert torch.allclose(out, torch.full_like(out, 0.8), rtol=0, atol=1e-15) and net.calls == [0, 0, 0]
    with pytest.raises(ValueError, match="no zero is given"):
        blend([None, *net.candidates()[1:]], x, alone)


def test_a_gate_to_nothing_still_weighs_the_others() -> None:
    net, x, w, grad = settled()
    gate = Mixture(("none", "b", "c"), w, (0,), "gate")
    out = blend([None, *net.candidates()[1:]], x, gate, empty=lambda x: x * 0.0)
    assert not bool(out.any()) and net.calls == [0, 0, 0]
    (out * grad).sum().backward()
    f = values(net, x.detach())
    assert net.calls == [0, 1, 1] and w.grad is not None and w.grad[0].item() == 0.0
    assert w.grad[1:].tolist() == pytest.approx([(f_j * grad).sum().item() for f_j in f[1:]], rel=1e-12)
    with pytest.raises(ValueError, match="no zero is given"):
        blend([None, *net.candidates()[1:]], x, gate)


def test_a_gate_is_differentiated_once() -> None:
    net, x, w, grad = settled()
    out = (blend(net.candidates(), x, Mixture(("a", "b", "c"), w, (1,), "gate")) * grad).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in one backward pass"):
        out.backward()


def test_a_gate_without_gradients_runs_nothing_again() -> None:
    net, x, w, grad = settled()
    (blend(net.candidates(), x, Mixture(("a", "b", "c"), w.detach(), (1,), "gate")) * grad).sum().backward()
    assert net.calls == [0, 1, 0] and net.s.grad is not None and bool(net.s.grad[1])


def test_a_gate_runs_the_others_in_the_precision_of_the_forward() -> None:
    """Under autocast a linear layer answers in bfloat16, in the backward pass too, where autocast is off."""
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    met: list[torch.dtype] = []

    def candidate(_: Tensor, w: Tensor | None) -> Scaled:
        y = layer(x)
        met.append(y.dtype)
        return y, w

    w = torch.tensor([1.0, 0.0], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = blend([candidate, candidate], x, Mixture(("a", "b"), w, (0,), "gate"))
    out.float().sum().backward()
    assert met == [torch.bfloat16] * 2 and w.grad is not None and w.grad.dtype == torch.float32
    assert w.grad[0].item() == w.grad[1].item() == pytest.approx(layer(x).sum().item(), rel=0.05)


@pytest.mark.parametrize("idle", ["absent", "ones", "gate"])
def test_no_active_option_is_refused(idle: str) -> None:
    net, x, w, _ = settled()
    with pytest.raises(ValueError, match=r"a mixture over \('a', 'b', 'c'\) has no active option"):
        blend(net.candidates(), x, Mixture(("a", "b", "c"), w, (), idle))
    assert net.calls == [0, 0, 0]
