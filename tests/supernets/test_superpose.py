"""Leaves of superposed sizes: what they compute, cost, refuse, hand over and take back."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.sizes import Layout, Segment, Size, fixed
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.superpose import SuperposedConv, SuperposedLinear, mask, reach, window

SPACE = SearchSpace([Choice("c", (2, 4, 6)), Choice("e", (2, 3)), Choice("k", (1, 3, 5))], {})
c, e, k = (Size((name,), int) for name in "cek")
LIKE = torch.zeros((), dtype=torch.float64)
HARD: dict[str, Setting] = {"c": 4, "e": 3, "k": 3}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(options: tuple[Any, ...], weights: list[float], active: tuple[int, ...] | None = None, idle: str = "absent") -> Mixture:
    return Mixture(options, torch.tensor(weights, dtype=torch.float64, requires_grad=True), active, idle)


def conv(into: Layout = (Segment(e, 3),), out: Segment = Segment(c, 6), **kind: Any) -> SuperposedConv:  # noqa: B008  values
    leaf = SuperposedConv(SPACE, into, out, k, **kind).double()
    leaf.name = "stage.conv"
    return leaf


def test_masks_of_hard_settings_are_none() -> None:
    assert reach(c, HARD, LIKE) is None and window(k, HARD, LIKE) is None and mask(c, e, HARD, LIKE) is None


def test_a_mixture_on_one_side_leaves_the_other_whole() -> None:
    w = of((2, 4, 6), [0.2, 0.5, 0.3])
    rows = mask(c, e, {**HARD, "c": w}, LIKE)
    columns = mask(e, c, {**HARD, "c": w}, LIKE)
    assert rows is not None and rows.shape == (6, 3) and columns is not None and torch.equal(rows.T, columns)
    assert rows[:, 0].tolist() == pytest.approx([1, 1, 0.8, 0.8, 0.3, 0.3], abs=1e-15)


def test_masks_follow_the_net_not_the_weights() -> None:
    """float64 alphas over a float32 net; sums need not be one."""
    m = reach(c, {"c": of((2, 4, 6), [1.0, 2.0, 4.0])}, torch.zeros(1))
    assert m is not None and m.dtype == torch.float32 and m.tolist() == [7, 7, 6, 6, 4, 4]


def test_only_active_options_are_computed() -> None:
    arch = {"c": of((2, 4, 6), [0.2, 0.5, 0.3], (0, 1)), "e": of((2, 3), [0.5, 0.25], (0,)),
            "k": of((1, 3, 5), [0.1, 0.2, 0.7], (1,))}  # fmt: skip
    leaf, x = conv(), numbers(2, 2, 6, 6)
    y = leaf(x, arch)
    assert y.shape == (2, 4, 6, 6)
    y.square().sum().backward()
    for name, reached in (("c", [True, True, False]), ("e", [True, False]), ("k", [False, True, False])):
        assert [bool(g) for g in arch[name].weights.grad] == reached
    assert leaf.weight.grad is not None
    used = torch.zeros_like(leaf.weight, dtype=torch.bool)
    used[:4, :2, 1:4, 1:4] = True
    assert torch.equal(leaf.weight.grad != 0, used)


def test_straight_through_samples_weigh_their_slice() -> None:
    """One active option of weight h, not one: h times the slice, the bias included; idle ones have gradient 1 an output."""
    leaf, x = conv(), numbers(2, 3, 6, 6)
    arch = {**HARD, "c": of((2, 4, 6), [0.0, 1.5, 0.0], (1,), idle="ones")}
    plain = leaf.plain(HARD, 3)
    y = leaf(x, arch)
    assert torch.allclose(y, 1.5 * plain(x), rtol=0, atol=1e-14)
    y.sum().backward()
    grad = arch["c"].weights.grad  # type: ignore[union-attr]
    assert grad[0] == grad[2] == y.numel() and float(grad[1]) == pytest.approx(plain(x).sum().item(), abs=1e-10)


def test_options_of_one_size_are_one_slice() -> None:
    same = Size(("c",), lambda _: 4)
    leaf = SuperposedConv(SPACE, (Segment(fixed(3), 3),), Segment(same, 4), fixed(3)).double()
    x = numbers(1, 3, 5, 5)
    y = leaf(x, {"c": of((2, 4, 6), [0.2, 0.5, 0.6])})
    assert torch.allclose(y, 1.3 * leaf(x, {"c": 4}), rtol=0, atol=1e-14)


def test_a_sum_of_input_segments_reads_each_prefix() -> None:
    """Two tensors side by side, the second flattened from two positions a channel."""
    layout = (Segment(e, 3), Segment(c, 6, repeat=2))
    leaf = SuperposedLinear(SPACE, layout, Segment(fixed(5), 5)).double()
    arch = {**HARD, "c": of((2, 4, 6), [0.2, 0.5, 0.3], (0, 1))}
    x = numbers(4, 11)
    weight = leaf.weight[:, [0, 1, 2, *range(3, 11)]] * torch.tensor([1, 1, 1, *[0.7] * 4, *[0.5] * 4], dtype=torch.float64)
    assert torch.allclose(leaf(x, arch), F.linear(x, weight, leaf.bias), rtol=0, atol=1e-14)
    assert torch.allclose(leaf.plain({**HARD, "e": 2}, 10)(x[:, :10]), leaf(x[:, :10], {**HARD, "e": 2}), rtol=0, atol=1e-14)


def test_depthwise_channels_follow_their_input() -> None:
    leaf = conv((Segment(c, 6),), depthwise=True, dilation=2, stride=2)
    assert leaf.weight.shape == (6, 1, 5, 5)
    a, b = [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]
    arch, x = {"c": of((2, 4, 6), a), "k": of((1, 3, 5), b)}, numbers(2, 6, 9, 9)
    total = torch.zeros((), dtype=torch.float64)
    for v, width in zip(a, (2, 4, 6)):
        for w, side in zip(b, (1, 3, 5)):
            plain = leaf.plain({"c": width, "k": side}, width)
            assert isinstance(plain, nn.Conv2d) and plain.groups == width
            y = plain(x[:, :width])
            assert torch.allclose(y, leaf(x[:, :width], {"c": width, "k": side}), rtol=0, atol=1e-14)
            total = total + v * w * F.pad(y, (0, 0, 0, 0, 0, 6 - width))
    assert torch.allclose(leaf(x, arch), total, rtol=0, atol=1e-13)


def test_a_norm_is_shared_and_weighed_behind() -> None:
    """The mixture of zero-padded outputs of candidates that each end in the shared norm: widths then keep a gradient."""
    leaf, x = conv(norm="shared", bias=False), numbers(3, 3, 6, 6)
    assert leaf.norm is not None
    with torch.no_grad():
        leaf.norm.weight[0].uniform_(0.5, 1.5)
        leaf.norm.bias[0].uniform_(0.5, 1.5)
    mixture = of((2, 4, 6), [0.2, 0.5, 0.3])
    y = leaf(x, {**HARD, "c": mixture})
    outputs = [leaf.plain({**HARD, "c": n}, 3).train()(x) for n in (2, 4, 6)]
    total = sum(v * F.pad(z, (0, 0, 0, 0, 0, 6 - z.shape[1])) for v, z in zip((0.2, 0.5, 0.3), outputs))
    assert isinstance(total, Tensor) and torch.allclose(y, total, rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert bool((mixture.weights.grad.abs() > 1.0).all())


@pytest.mark.parametrize("norm", [None, "shared"])
def test_adopt_is_the_inverse_of_plain(norm: str | None) -> None:
    leaf, arch = conv(norm=norm, bias=norm is None), {"c": 4, "e": 2, "k": 3}
    torch.manual_seed(0)
    plain = leaf.plain(arch, 2, inherit=False).double()
    with torch.no_grad():
        for p in (*plain.parameters(), *(b for b in plain.buffers() if b.is_floating_point())):
            p.uniform_(0.5, 1.5)
    before = leaf.weight.detach().clone()
    leaf.adopt({"": plain, **dict(plain.named_children())})
    back = leaf.plain(arch, 2).state_dict()
    assert all(torch.equal(back[name], value) for name, value in plain.state_dict().items() if value.is_floating_point())
    changed = (leaf.weight != before).nonzero().amax(0).tolist()
    assert changed == [3, 1, 3, 3] and (leaf.weight != before).nonzero().amin(0).tolist() == [0, 0, 1, 1]


def test_what_cannot_be_is_refused() -> None:
    leaf, x = conv(), numbers(2, 3, 6, 6)
    cases: list[tuple[dict[str, Setting], str]] = [
        ({**HARD, "c": of((2, 4), [0.5, 0.5], (0,), idle="gate")}, r"^stage\.conv: idle='gate' needs separate candidates"),
        ({**HARD, "k": of((3, 5), [0.5, 0.5], ())}, r"^stage\.conv: k has no active option"),
        ({**HARD, "c": 7}, r"^stage\.conv: width 7 is not in this supernet\. Allowed: 1 to 6"),
        ({**HARD, "k": 7}, r"^stage\.conv: kernel 7 is not in this supernet\. Allowed: odd, 1 to 5"),
        ({**HARD, "k": 2}, r"^kernel = 2 has no centre"),
        ({**HARD, "e": 2}, r"^stage\.conv: an input of 3 channels, where this architecture has 2"),
    ]
    for arch, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            leaf(x, arch)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="norm = 'own' is not known"):
        conv(norm="own")
    with pytest.raises(ValueError, match="kernel = 2 has no centre"):
        SuperposedConv(SPACE, (Segment(e, 3),), Segment(c, 6), c)
    with pytest.raises(ValueError, match="kernel 1 would have a padding of -1"):
        conv(padding=1)
