"""The supernet of ProxylessNAS: a block that is zero is its shortcut, gates of one path get the gradients of all, costs."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas.cost import CostTable, params
from search_spaces.inverted import mid_width
from search_spaces.proxyless import ZERO, ProxylessNAS
from search_spaces.space import Mixture
from supernets.proxyless import Mixed, build
from supernets.proxyless import ProxylessNAS as Net


@pytest.fixture
def net() -> Net:
    net = build(ProxylessNAS(0.2, True, (1, 2, 1, 1, 1, 1)), 3, 5).double()
    net.reset(torch.Generator().manual_seed(1))
    return net


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_zero_leaves_the_shortcut_alone(net: Net) -> None:
    block, x = net.get_submodule("stages.1.1"), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert isinstance(block, Mixed)
    assert torch.equal(block(x, {"stage1.block1": ZERO}), x)
    one = Mixture((ZERO,), torch.ones(1, dtype=torch.float64))
    assert torch.equal(block(x, {"stage1.block1": one}), x)
    half = Mixture(("mbconv3_5x5", ZERO), torch.tensor([0.25, 0.75], dtype=torch.float64))
    expected = x + 0.25 * (block(x, {"stage1.block1": "mbconv3_5x5"}) - x)
    assert torch.allclose(block(x, {"stage1.block1": half}), expected, atol=1e-12)


def test_gates_of_one_path_get_the_gradients_of_all_operations(net: Net) -> None:
    """ProxylessNAS, full_v2: only the drawn operation runs, and dL/dg_j = <f_j(x), dL/dout> of every one is found."""
    space = net.space
    largest = space.largest()
    name = "stage1.block1"
    options = space[name].options

    def gradient(active: tuple[int, ...] | None, idle: str) -> Tensor:
        g = torch.zeros(len(options), dtype=torch.float64)
        g[2] = 1.0
        g.requires_grad_()
        net(X, largest | {name: Mixture(options, g, active, idle)}).square().sum().backward()
        assert g.grad is not None
        return g.grad

    gate, full = gradient((2,), "gate"), gradient(None, "absent")
    assert torch.allclose(gate, full, rtol=1e-9, atol=1e-12)
    assert gate[options.index(ZERO)] == 0 and bool((gate[:-1] != 0).all())


def test_a_block_costs_what_its_convolutions_do(net: Net) -> None:
    space = net.space
    macs, count = CostTable(net, (8, 8)), CostTable(net, (8, 8), params)
    largest = space.largest()
    mid, without = mid_width(8, 6), largest | {"stage1.block1": ZERO}
    assert macs.of(largest) - macs.of(without) == 4 * 4 * (8 * mid + 49 * mid + mid * 8)  # at 4x4, after the stride of block 0
    assert count.of(largest) - count.of(without) == 8 * mid + 49 * mid + mid * 8 + 2 * (mid + mid + 8)


def test_what_a_choice_owns(net: Net) -> None:
    mine = net.owned("stage1.block0", "mbconv3_7x7")
    block = net.get_submodule("stages.1.0.operations.mbconv3_7x7")
    assert {id(p) for p in mine} == {id(p) for p in block.parameters()}
    assert len(net.owned("stage1.block0")) == 6 * len(mine)
    assert net.owned("stage1.block0", ZERO) == [] and net.owned("stage9.block0") == []
