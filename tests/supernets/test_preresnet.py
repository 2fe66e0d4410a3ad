"""The supernet of pre-activation ResNets: tail sums are scales, scales are batch norms' gammas, and what is extracted."""
from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.build import adopt, rebuild
from nas.bundle import counted
from nas.cost import CostTable, activations, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces.arch import ArchFile
from search_spaces.preresnet import PreResNet as Space
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Arch, Mixture, Setting
from supernets.extract import extract
from supernets.preresnet import PreResNet, ScaledNorm, build
from supernets.printer import check, source
from supernets.superpose import tail_sums


def net_of(depth: int = 20, widths: tuple[int, int, int] = (3, 4, 5)) -> Any:
    """A tiny net in float64 whose shifts are random."""
    net = PreResNet(Space(depth, widths), channels=3, classes=5).double()
    generator = torch.Generator().manual_seed(1)
    net.reset(generator)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("shift"):
                p.uniform_(-0.5, 0.5, generator=generator)
    return net


def images(seed: int = 0, batch: int = 6) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def archs(space: Any, n: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def scales(space: Any, seed: int = 2) -> dict[str, Tensor]:
    """A random scale of any sign for every channel of every norm."""
    generator = torch.Generator().manual_seed(seed)
    return {c.name: torch.randn(len(c.options), generator=generator, dtype=torch.float64) for c in space.choices}


def mixtures(space: Any, s: dict[str, Tensor]) -> dict[str, Setting]:
    """Weights whose tail sums are ``s``."""
    return {name: Mixture(space[name].options, v - torch.cat([v[1:], v.new_zeros(1)])) for name, v in s.items()}


def close(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1.0))


# -- tail sums --------------------------------------------------------------------------------------------------------


def test_tail_sums() -> None:
    w = torch.tensor([0.1, -0.2, 0.4], dtype=torch.float64, requires_grad=True)
    assert tail_sums(w).tolist() == pytest.approx([0.3, 0.2, 0.4], abs=1e-15)
    assert tail_sums(w, (1, 2, 3)).tolist() == tail_sums(w).tolist()
    assert tail_sums(w, (2, 3, 6)).tolist() == pytest.approx([0.3, 0.3, 0.2, 0.4, 0.4, 0.4], abs=1e-15)
    assert tail_sums(w, (4, 2, 2)).tolist() == pytest.approx([0.3, 0.3, 0.1, 0.1], abs=1e-15)  # a follower's order
    tail_sums(w, (2, 3, 6))[2].backward()
    assert w.grad is not None and w.grad.tolist() == [0.0, 1.0, 1.0]


def test_a_mixture_is_every_width_once() -> None:
    """Each option keeps its first channels of the same normalised features, padded with zeros; the shift is added once."""
    leaf = ScaledNorm(Segment(fixed(6), 6), Size(("w",), int)).double()
    x, options = images()[:, :1].repeat(1, 6, 1, 1) * torch.arange(1, 7)[:, None, None] ** 2, (2, 3, 5)
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    with torch.no_grad():
        leaf.shift.copy_(torch.arange(6) / 10)
    w = torch.tensor([0.3, -0.8, 0.6], dtype=torch.float64)
    z = F.batch_norm(x, None, None, training=True)
    for active in (None, (0, 2), (1,)):
        on = range(3) if active is None else active
        C = options[max(on)]
        expected = sum(w[k] * F.pad(z[:, : options[k]], (0, 0, 0, 0, 0, C - options[k])) for k in on)
        expected = expected + leaf.shift[:C, None, None]
        assert close(leaf(x, {"w": Mixture(options, w, active)}), expected)
    assert close(leaf(x, {"w": 4}), z[:, :4] + leaf.shift[:4, None, None])
    idle = leaf(x, {"w": Mixture(options, w, (1,), "ones")})
    assert close(idle, leaf(x, {"w": Mixture(options, w, (1,))}) + w[0] + w[2])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_scales_are_gammas(training: bool) -> None:
    """The net under a superposition is the plain network whose batch norms have these scales, and so are the gradients."""
    net, x = net_of(), images()
    space, s = net.space, scales(net.space)
    install(net, recalibrate(net, [mixtures(space, s)], [images(1)])[0])
    net.train(training)
    graph = extract(net, space.largest(), x)
    leaves = {name: leaf for name, leaf in net.named_modules() if isinstance(leaf, ScaledNorm)}
    gammas: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        norm: Any = graph.get_submodule(f"{path}.norm")
        with torch.no_grad():
            norm.weight.copy_(s[leaf.out[0].size.on[0]])
        gammas[leaf.out[0].size.on[0]] = norm.weight
    assert gammas.keys() == s.keys()
    s = {name: v.requires_grad_() for name, v in s.items()}
    mixed, plain = net(x, mixtures(space, s)), graph(x)
    assert close(mixed, plain)
    factors = images(3).flatten()[: mixed.numel()].view_as(mixed)
    mine = torch.autograd.grad((mixed * factors).sum(), [*s.values()])
    theirs = torch.autograd.grad((plain * factors).sum(), [gammas[name] for name in s])
    assert all(close(a, b) and bool(a.any()) for a, b in zip(mine, theirs))


# -- costs and plain networks; the promises of every supernet are in tests/contracts --------------------------------------


def test_reset_clears_the_shifts() -> None:
    net = net_of()
    shifts = [leaf.shift for leaf in net.modules() if isinstance(leaf, ScaledNorm)]
    assert len(shifts) == 19 and all(bool(shift.any()) for shift in shifts)
    net.reset(torch.Generator().manual_seed(1))
    assert not any(bool(shift.any()) for shift in shifts)


def test_costs_of_odd_images() -> None:
    net, x = net_of(), torch.zeros(2, 3, 9, 7).double()
    table = CostTable(net, (9, 7), macs)
    assert max(len(on) for on in table.terms) == 2
    for arch in (net.space.largest(), *archs(net.space, 2, seed=6)):
        expected = counted(extract(net, arch, x), x[:1])[0]
        assert table.of(arch) == expected == table.batch(net.space.encode([arch]))[0]


def test_the_plain_network_is_printed() -> None:
    """Blocks that read the whole stream are one class, blocks that read its first channels another (and their norm a third)."""
    net, x = net_of(29), images().float()
    net = net.float().eval()
    arch = net.space.largest() | {"stage1.block1.norm0.width": 5, "stage1.block2.norm0.width": 9, "final.width": 7}
    for given, classes in ((net.space.largest(), 3), (arch, 5), (archs(net.space, 1)[0], None)):
        graph = extract(net, given, x)
        text = source(graph, x.shape)
        check(graph, text, x)
        assert classes is None or text.count("\nclass ") == classes
        assert ("x[:, :" in text) == (given != net.space.largest())


def test_an_arch_file_rebuilds_it() -> None:
    net = net_of()
    arch = archs(net.space, 1)[0]
    file = ArchFile.of(net.space, arch, input=(3, 8, 8), classes=tuple("abcde"), preprocess={}, costs={})
    graph = rebuild(file)
    assert {key: value.shape for key, value in graph.state_dict().items()} == {
        key: value.shape for key, value in extract(net, arch, images()).state_dict().items()}  # fmt: skip
    leaves = [m for m in graph.modules() if not list(m.children())]
    assert {type(m) for m in leaves} == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert all(bool((m.weight == 1).all()) for m in leaves if isinstance(m, nn.BatchNorm2d))


def test_scales_cannot_be_adopted() -> None:
    net, x, largest = net_of(), images(batch=2), Space(20, (3, 4, 5)).largest()
    weights = extract(net, largest, x, inherit=False).state_dict()
    weights["final.norm.weight"][3] = 0.5
    with pytest.raises(ValueError, match=r"final: .* scales of its own") as error:
        adopt(net, largest, weights, x)
    assert "\n" not in str(error.value)


def test_what_is_refused() -> None:
    net, x, largest = net_of(), images(batch=2), Space(20, (3, 4, 5)).largest()
    name = "stage1.block1.norm0.width"
    for value in (0, 17, Mixture((1, 17), torch.ones(2)), Mixture((1, 2), torch.ones(2), ())):
        with pytest.raises(ValueError, match=rf"{name} cannot keep (0|17) channels\. Allowed: 1 to 16\."):
            net(x, {**largest, name: value})
    with pytest.raises(ValueError, match=r"norm0: idle='gate' needs"):
        net(x, {**largest, name: Mixture((1, 2), torch.ones(2), (0,), "gate")})


def test_resnet_164_is_the_published_net() -> None:
    """1.70M parameters on CIFAR-10. By hand, at 32 x 32: stem 3*16*9; a stage's first block i*w + 9*w*w + 4*w*w + 4*i*w (the
    projection), the 17 others 4*w*w + 9*w*w + 4*w*w; the strided convolutions count at their output."""
    space = Space()
    arch, layers = space.largest(), build(space, 3, 10).layers((32, 32))
    shapes = [(layer.op, layer.shape(*(arch[name] for name in layer.on))) for layer in layers]
    found = [sum(price(op, shape) for op, shape in shapes if shape is not None) for price in (macs, params, activations)]
    by_hand, source, size = 3 * 16 * 9 * 32**2, 16, 32
    for w, stride in ((16, 1), (32, 2), (64, 2)):
        by_hand += source * w * size**2
        size //= stride
        by_hand += (9 * w * w + 4 * w * w + source * 4 * w + 17 * 17 * w * w) * size**2
        source = 4 * w
    assert found[:2] == [by_hand + 256 * 10, 1_703_258] and found[0] == 247_646_720


@pytest.mark.slow
def test_resnet_164_as_it_is_counted() -> None:
    net, x = build(Space(), 3, 10), torch.zeros(2, 3, 32, 32)
    tables = [CostTable(net, (32, 32), price) for price in (macs, params)]
    for arch in (net.space.largest(), *archs(net.space, 2)):
        graph = extract(net, arch, x, inherit=False)
        assert counted(graph, x) == tuple(table.of(arch) for table in tables)
    check(graph, source(graph), x)
