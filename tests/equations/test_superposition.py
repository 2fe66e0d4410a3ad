"""Superposition against the literal sum of zero-padded slices: the page's checks 1 to 8 (arXiv 2312.10440), in float64.

Letters as in the paper: a over output widths, b over input widths, c over kernels.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.cost import CostTable, macs, params
from search_spaces.sizes import Segment, Size
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.layers import Layer
from supernets.superpose import SuperposedConv, SuperposedLinear, mask, reach, window

OUT, IN, KERNELS, EMBED, RATIO = (8, 16, 32), (4, 8, 12), (3, 5, 7), (192, 216, 240), (3.5, 4)
OPTIONS = {"out": OUT, "in": IN, "k": KERNELS, "embed": EMBED, "ratio": RATIO}
SPACE = SearchSpace([Choice(name, options) for name, options in OPTIONS.items()], {})
out, into, kernel, embed = (Size((name,), int) for name in ("out", "in", "k", "embed"))
hidden = Size(("embed", "ratio"), lambda e, r: int(e * r))
LIKE = torch.zeros((), dtype=torch.float64)
PUBLISHED = (0.2, 0.5, 0.3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(name: str, weights: Sequence[float] = PUBLISHED) -> Mixture:
    return Mixture(SPACE[name].options, torch.tensor(weights, dtype=torch.float64, requires_grad=True))


def soft() -> dict[str, Setting]:
    rows = {"in": (0.6, 0.1, 0.3), "k": (0.25, 0.35, 0.4), "ratio": (0.3, 0.7)}
    return {name: mixed(name, rows.get(name, PUBLISHED)) for name in OPTIONS}


def there(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def weights(arch: dict[str, Setting], *names: str) -> list[Tensor]:
    found = [arch[name] for name in names]
    return [setting.weights for setting in found if isinstance(setting, Mixture)]


def padded(W: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The sum over all triples of a_i b_j c_k pad0(W[:co_i, :ci_j, window k])."""
    total = torch.zeros_like(W)
    for (i, co), (j, ci), (n, k) in itertools.product(*map(enumerate, (OUT, IN, KERNELS))):
        s = (7 - k) // 2
        own = F.pad(W[:co, :ci, s : s + k, s : s + k], (s, s, s, s, 0, 12 - ci, 0, 32 - co))
        total = total + a[i] * b[j] * c[n] * own
    return total


def close(x: Tensor, y: Tensor, tolerance: float = 1e-12) -> bool:
    x, y = x.detach(), y.detach()
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance * max(1.0, float(y.abs().max())))


def conv(**kind: Any) -> SuperposedConv:
    return SuperposedConv(SPACE, (Segment(into, 12),), Segment(out, 32), kernel, **kind).double()


@pytest.mark.parametrize(("stride", "dilation", "size"), [(1, 1, 8), (2, 1, 9), (1, 2, 7), (2, 2, 8)])
def test_1_the_mask_is_the_padded_loop(stride: int, dilation: int, size: int) -> None:
    """Values, and gradients to W, the bias and every a, b, c."""
    leaf, x = conv(stride=stride, dilation=dilation), numbers(2, 12, size, size)
    found = []
    for literal in (False, True):
        leaf.zero_grad(set_to_none=True)
        arch = soft()
        a, b, c = weights(arch, "out", "in", "k")
        assert leaf.bias is not None
        if literal:
            shift = torch.stack([a[i] * F.pad(leaf.bias[:co], (0, 32 - co)) for i, co in enumerate(OUT)]).sum(0)
            y = F.conv2d(x, padded(leaf.weight, a, b, c), shift, stride, 3 * dilation, dilation)
        else:
            y = leaf(x, arch)
        (y * numbers(*y.shape, seed=1)).sum().backward()
        found.append([y, leaf.weight.grad, leaf.bias.grad, a.grad, b.grad, c.grad])
    for mine, theirs in zip(*found):
        assert mine is not None and theirs is not None and close(mine, theirs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("both_sides", [True, False])
def test_2_superposed_weights_are_superposed_outputs(stride: int, both_sides: bool) -> None:
    """Of a bare convolution; behind a ReLU no longer. Masked on the output side alone, inputs are not weighed."""
    leaf, x, arch = conv(stride=stride, both_sides=both_sides), numbers(2, 12, 8, 8), soft()
    a, b, c = weights(arch, "out", "in", "k")
    with torch.no_grad():
        def outputs(behind: Any) -> Tensor:
            total = torch.zeros(())
            for (i, co), (j, ci), (n, k) in itertools.product(*map(enumerate, (OUT, IN, KERNELS))):
                plain = leaf.plain({"out": co, "k": k}, ci if both_sides else 12)
                y = behind(plain(x[:, : ci if both_sides else 12]))
                total = total + a[i] * b[j] * c[n] * F.pad(y, (0, 0, 0, 0, 0, 32 - co))
            return total

        assert close(leaf(x, arch), outputs(lambda y: y))
        assert not close(F.relu(leaf(x, arch)), outputs(F.relu), 1e-3)


@pytest.mark.parametrize("norm", [None, "shared"])
def test_3_one_hot_is_the_extracted_layer_and_zero_elsewhere(norm: str | None) -> None:
    leaf, x = conv(norm=norm, bias=norm is None), numbers(4, 12, 6, 6)
    if leaf.norm is not None:
        with torch.no_grad():
            leaf.norm.weight[0].uniform_(0.5, 1.5)
            leaf.norm.bias[0].uniform_(0.5, 1.5)
    for i, j, n in itertools.product(range(3), repeat=3):
        one = [tuple(float(at == place) for at in range(3)) for place in (i, j, n)]
        arch = {name: mixed(name, row) for name, row in zip(("out", "in", "k"), one)}
        plain = leaf.plain({"out": OUT[i], "k": KERNELS[n]}, IN[j]).train()
        y, co = leaf(x, arch), OUT[i]
        assert y.shape[1] == 32 and close(y[:, :co], plain(x[:, : IN[j]])) and not y[:, co:].any()


def test_3_linear() -> None:
    leaf = SuperposedLinear(SPACE, (Segment(into, 12),), Segment(out, 32)).double()
    x = numbers(2, 5, 12)
    for i, j in itertools.product(range(3), repeat=2):
        arch = {name: mixed(name, [float(at == place) for at in range(3)]) for name, place in (("out", i), ("in", j))}
        y = leaf(x, arch)
        assert close(y[..., : OUT[i]], leaf.plain({"out": OUT[i]}, IN[j])(x[..., : IN[j]])) and not y[..., OUT[i] :].any()


def loop(first: Size, second: Size, arch: dict[str, Setting], names: Sequence[str], grid: tuple[int, int]) -> Tensor:
    """The joint mask by its definition, one combination after another."""
    total = torch.zeros(grid, dtype=torch.float64)
    for picked in itertools.product(*(enumerate(SPACE[name].options) for name in names)):
        w = torch.ones((), dtype=torch.float64)
        for own, (at, _) in zip(weights(arch, *names), picked):
            w = w * own[at]
        values = {name: value for name, (_, value) in zip(names, picked)}
        n, m = (size.of(*(values[name] for name in size.on)) for size in (first, second))
        block = torch.zeros(grid, dtype=torch.float64)
        block[:n, :m] = 1.0
        total = total + w * block
    return total


def test_4_embed_and_ratio() -> None:
    """Equal to the loop, gradients too; rank 3 and not 1: no product of two vectors."""
    found = []
    for literal in (False, True):
        arch = soft()
        grid = loop(hidden, embed, arch, ("embed", "ratio"), (960, 240)) if literal else there(mask(hidden, embed, arch, LIKE))
        (grid * numbers(960, 240)).sum().backward()
        found.append([grid.detach(), *(there(w.grad) for w in weights(arch, "embed", "ratio"))])
    assert all(close(mine, theirs) for mine, theirs in zip(*found))
    assert int(torch.linalg.matrix_rank(found[0][0])) == 3
    product = there(reach(hidden, soft(), LIKE))[:, None] * there(reach(embed, soft(), LIKE))
    assert int(torch.linalg.matrix_rank(product)) == 1 and not close(found[0][0], product, 1e-2)
    assert torch.equal(there(mask(embed, hidden, soft(), LIKE)), found[0][0].T)


class Net:
    """What a cost table asks of a supernet."""

    def __init__(self, *leaves: SuperposedConv | SuperposedLinear, hw: tuple[int, int] = (1, 1)) -> None:
        self.space, self.leaves, self.hw = SPACE, leaves, hw
        for i, leaf in enumerate(leaves):
            leaf.name = f"leaf{i}"

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return [record for leaf in self.leaves for record in leaf.layers(self.hw)]


@torch.no_grad()
def test_5_the_masks_add_up_to_the_expected_cost() -> None:
    """Parameters and MACs of a convolution; of an MLP, whose embed is drawn once for both sides."""
    arch, hw = soft(), (6, 5)
    grid, taps, rows = (there(m) for m in (mask(out, into, arch, LIKE), window(kernel, arch, LIKE), reach(out, arch, LIKE)))
    net = Net(conv(), hw=hw)
    entries = grid.sum() * taps.sum()
    assert float(CostTable(net, (1, 1), params).expected(arch)) == pytest.approx(float(entries + rows.sum()), rel=1e-12)
    assert float(CostTable(net, (1, 1), macs).expected(arch)) == pytest.approx(30 * float(entries), rel=1e-12)
    a, b, c = weights(arch, "out", "in", "k")
    triples = itertools.product(range(3), repeat=3)
    literal = sum(float(a[i] * b[j] * c[n] * OUT[i] * IN[j] * KERNELS[n] ** 2) for i, j, n in triples)
    assert float(entries) == pytest.approx(literal, rel=1e-12)
    mlp = SuperposedLinear(SPACE, (Segment(embed, 240),), Segment(hidden, 960))
    joint, shift = there(mask(hidden, embed, arch, LIKE)), there(reach(hidden, arch, LIKE))
    expected = float(CostTable(Net(mlp), (1, 1), params).expected(arch))
    assert expected == pytest.approx(float(joint.sum() + shift.sum()), rel=1e-12)
    apart = shift.sum() * there(reach(embed, arch, LIKE)).sum() + shift.sum()
    assert expected != pytest.approx(float(apart), rel=1e-3)


@torch.no_grad()
def test_5_depthwise_costs_follow_the_outputs() -> None:
    arch = soft()
    leaf = SuperposedConv(SPACE, (Segment(out, 32),), Segment(out, 32), kernel, depthwise=True, bias=False)
    entries = there(reach(out, arch, LIKE)).sum() * there(window(kernel, arch, LIKE)).sum()
    assert float(CostTable(Net(leaf), (1, 1), params).expected(arch)) == pytest.approx(float(entries), rel=1e-12)


@torch.no_grad()
def test_6_widths() -> None:
    m = there(reach(out, soft(), LIKE))
    assert m.tolist() == pytest.approx([1.0] * 8 + [0.8] * 8 + [0.3] * 16, abs=1e-15)


@torch.no_grad()
def test_7_kernels() -> None:
    m = there(window(kernel, {"k": mixed("k")}, LIKE))
    assert m.shape == (7, 7)
    for y, x in itertools.product(range(7), repeat=2):
        ring = max(abs(y - 3), abs(x - 3))
        assert float(m[y, x]) == pytest.approx((1.0, 1.0, 0.8, 0.3)[ring], abs=1e-15)


def test_8_gradients_of_a_shared_choice_are_the_loops() -> None:
    """embed x embed through a layer: values, and gradients to W, the bias, the input and the weights of every candidate."""
    leaf, x, found = SuperposedLinear(SPACE, (Segment(embed, 240),), Segment(embed, 240)).double(), numbers(3, 240), []
    assert leaf.bias is not None
    for literal in (False, True):
        leaf.zero_grad(set_to_none=True)
        arch, given = soft(), x.clone().requires_grad_()
        (v,) = weights(arch, "embed")
        if literal:
            padded = [(F.pad(leaf.weight[:e, :e], (0, 240 - e, 0, 240 - e)), F.pad(leaf.bias[:e], (0, 240 - e))) for e in EMBED]
            weight, shift = (torch.stack([w * own[part] for w, own in zip(v, padded)]).sum(0) for part in (0, 1))
            y = F.linear(given, weight, shift)
        else:
            y = leaf(given, arch)
        (y * numbers(*y.shape, seed=1)).sum().backward()
        found.append([y, leaf.weight.grad, leaf.bias.grad, given.grad, v.grad])
    for mine, theirs in zip(*found):
        assert mine is not None and theirs is not None and close(mine, theirs)


@torch.no_grad()
def test_8_a_shared_choice_is_drawn_once() -> None:
    """The entry depends on max(o, q) alone; the product of both sides, which would draw it twice, does not."""
    arch = soft()
    grid, once = there(mask(embed, embed, arch, LIKE)), there(reach(embed, arch, LIKE))
    o = torch.arange(240)
    by_the_larger = once[torch.maximum(o[:, None], o)]
    assert close(grid, by_the_larger)
    assert close(grid, loop(embed, embed, arch, ("embed",), (240, 240)))
    assert not close(once[:, None] * once, by_the_larger, 1e-2)
