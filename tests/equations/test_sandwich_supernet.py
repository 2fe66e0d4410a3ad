"""The sandwich step of BigNAS on its own supernet, in float64: the zero start, and the sum of separately computed gradients."""
from __future__ import annotations

import torch
from torch import Tensor

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.bignas import BigNAS
from search_spaces import bignas as spaces
from supernets.bignas import BigNAS as Net

B, N, SEED = 6, 3, 5
SMALL = spaces.BigNAS(True, 0.1, ((1, 2), *((1,),) * 4, (1, 2), (1,)), (6, 8))


def supernet() -> Net:
    net = Net(SMALL, channels=1, classes=N).double()
    net.reset(torch.Generator().manual_seed(3))
    return net


def test_every_block_with_a_shortcut_starts_as_the_identity() -> None:
    net, arch, met = supernet(), SMALL.largest(), 0
    for block in net.every_block():
        block.register_forward_hook(lambda block, given, out: seen.append((given[0], out)))
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        net(torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(4)).double(), arch)
    for x, out in seen:
        if x.shape == out.shape:
            assert torch.equal(x, out)
            met += 1
    assert met >= 2


def test_the_gradient_of_a_real_sandwich() -> None:
    """Sum of four gradients, each computed alone, children at their own resolution; no buffer is written."""
    net, generator = supernet(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():  # away from the zero start, which hides most of the net
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    x = torch.randn(B, 1, 8, 8, generator=generator).double()
    y = torch.randint(N, (B,), generator=generator)
    weights = Weights(lr=1.0, lr_min=1.0, momentum=0.0, weight_decay=0.0, clip=None)
    before, buffers = [p.detach().clone() for p in net.parameters()], [b.clone() for b in net.buffers()]
    rng = moment(0, 1, 1, SEED).rng
    archs = [SMALL.largest(), SMALL.smallest(), SMALL.sample(rng), SMALL.sample(rng)]
    assert len({SMALL.key(arch) for arch in archs}) == 4 and len({arch["resolution"] for arch in archs}) == 2
    teacher = net(x, archs[0]).detach().softmax(1)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for arch in archs:
        z = net(x, arch)
        loss = CrossEntropy(0.1)(z, y) if arch is archs[0] else -(teacher * z.log_softmax(1)).sum(1).mean()
        for total, g in zip(expected, torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)):
            total.add_(0.0 if g is None else g)
    strategy = BigNAS(drop=0.0, weights=weights)
    strategy.start(Setup(net, SMALL, CostTable(net, (8, 8)), CrossEntropy(0.1), None, 1, 1, B))
    strategy.update(lambda *_, **__: Batch(x, y, y), moment(0, 1, 1, SEED))
    for old, p, g in zip(before, net.parameters(), expected):
        assert torch.allclose(old - p.detach(), g, rtol=1e-8, atol=1e-11)
    assert sum(bool(g.any()) for g in expected) > 0.9 * len(expected)
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers()))
