"""Squeeze-excite of elastic width: widths, slices, plain form, costs, refusals."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.bundle import counted
from nas.cost import macs, params
from search_spaces.inverted import make_divisible, squeeze_width
from search_spaces.sizes import Segment, Size
from search_spaces.space import Choice, Mixture, SearchSpace
from supernets.extract import extract
from supernets.squeeze import SqueezeExcite

SPACE = SearchSpace([Choice("c", (24, 48, 72))], {})
OUT = Segment(Size(("c",), int), 72)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(seed: int = 1) -> SqueezeExcite:
    leaf = SqueezeExcite(OUT).double()
    generator = torch.Generator().manual_seed(seed)
    for p in leaf.parameters():
        p.data.normal_(generator=generator)
    leaf.name = "block.squeeze"
    return leaf.eval()


def test_rounding_is_the_published_one() -> None:
    # 72 // 4 = 18 -> 16, less than 0.9 * 18 = 16.2 -> 24; 11 -> 8 -> 16; 960 // 4 = 240
    assert [squeeze_width(mid) for mid in (8, 24, 44, 48, 72, 120, 960)] == [8, 8, 16, 16, 24, 32, 240]
    assert [make_divisible(v) for v in (1, 12, 18, 19.2, 67.2)] == [8, 16, 24, 24, 64]


@pytest.mark.parametrize("c", [24, 48, 72])
def test_a_value_runs_its_slice(c: int) -> None:
    leaf, x = made(), numbers(2, c, 3, 5)
    h = squeeze_width(c)
    z = F.relu(x.mean((2, 3)) @ leaf.reduce[:h, :c, 0, 0].T + leaf.reduce_bias[:h])
    gate = F.relu6(z @ leaf.expand[:c, :h, 0, 0].T + leaf.expand_bias[:c] + 3) / 6
    assert ((gate > 0) & (gate < 1)).any()
    assert torch.allclose(leaf(x, {"c": c}), x * gate[:, :, None, None], rtol=0, atol=1e-12)


class Net(nn.Module):
    """One leaf, as extraction sees it in a supernet."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.squeeze = SPACE, made()

    def forward(self, x: Tensor, arch: Any) -> Tensor:
        return self.squeeze(x, arch)


@pytest.mark.parametrize("c", [24, 48, 72])
def test_the_extracted_net_is_the_supernet(c: int) -> None:
    net, x = Net().eval(), numbers(2, c, 4, 4)
    plain = extract(net, {"c": c}, x)
    with torch.no_grad():
        assert torch.equal(plain(x), net(x, {"c": c}))
    assert set(plain.state_dict()) == {f"squeeze.{conv}.{kind}" for conv in ("reduce", "expand") for kind in ("weight", "bias")}


@pytest.mark.parametrize("c", [24, 48, 72])
def test_costs_are_those_of_the_plain_form(c: int) -> None:
    leaf, x, h = made(), numbers(1, c, 4, 4), squeeze_width(c)
    shapes: list[Any] = [(r.op, r.shape(c)) for r in leaf.layers((4, 4))]
    found = tuple(sum([price(op, s) for op, s in shapes]) for price in (macs, params))
    assert found == counted(leaf.plain({"c": c}, c, inherit=False), x) == (2 * c * h, (2 * c + 1) * h + c)


def test_taking_over_is_the_inverse_of_the_plain_form() -> None:
    given, taker, x = made(), made(2), numbers(2, 48, 4, 4)
    rest = taker.expand.detach()[48:].clone()
    taker.adopt(dict(given.plain({"c": 48}, 48).named_modules()))
    assert torch.equal(taker(x, {"c": 48}), given(x, {"c": 48}))
    assert torch.equal(taker.expand[48:], rest)


def test_a_start_has_gates_of_about_a_half() -> None:
    leaf = SqueezeExcite(OUT)
    assert not leaf.reduce_bias.any() and not leaf.expand_bias.any()
    assert leaf.reduce.std().item() == pytest.approx((2 / 24) ** 0.5, rel=0.1)
    x = torch.zeros(1, 72, 2, 2)
    x[:, 0] = 1e-3
    assert (leaf(x, {"c": 72})[:, 0] / 1e-3).mean().item() == pytest.approx(0.5, abs=1e-2)
    fresh = leaf.plain({"c": 24}, 24, inherit=False)
    assert not any(conv.bias.any() for conv in fresh.modules() if isinstance(conv, nn.Conv2d) and conv.bias is not None)


def test_what_is_not_there_is_refused() -> None:
    mixture = Mixture((24, 48, 72), torch.ones(3) / 3)
    with pytest.raises(ValueError, match=r"^block\.squeeze: c is a mixture, and squeeze-excite does not superpose\. Give one"):
        made()(numbers(1, 72, 2, 2), {"c": mixture})
    with pytest.raises(ValueError, match=r"width 80 is not in this supernet\. Allowed: 1 to 72"):
        made()(numbers(1, 80, 2, 2), {"c": 80})
    with pytest.raises(ValueError, match="an input of 72 channels, where this architecture has 24"):
        made()(numbers(1, 72, 2, 2), {"c": 24})
