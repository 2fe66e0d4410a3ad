"""Sizes of conv-macro networks (TangleNAS, arXiv 2312.10440; page spaces-nb201-nats-macro, section 6), by formula and counted;
and the network itself, against a literal one."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.build import rebuild
from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces.arch import ArchFile
from search_spaces.macro import ConvMacro
from search_spaces.space import Mixture
from supernets.extract import extract
from supernets.macro import build
from supernets.printer import check, source

TEXTS = ("8:16:32:64/3:3:3:3", "32:64:128:128/3:7:5:7", "16:32:64:256/5:3:7:3", "32:64:128:256/7:7:7:7")


def formula(text: str, classes: int = 10) -> tuple[int, int]:
    """(MACs, parameters) for 3 x 32 x 32 images, layer by layer."""
    (c1, c2, c3, c4), (k1, k2, k3, k4) = (map(int, side.split(":")) for side in text.split("/"))
    convs = [(3, c1, k1, 32), (c1, c2, k2, 32), (c2, c3, k3, 16), (c3, c4, k4, 8), (c4, 256, 7, 6)]
    linears = [(256 * 6 * 6, 256), (256, 128), (128, 64), (64, classes)]
    products = sum(i * o * k * k * side * side for i, o, k, side in convs) + sum(i * o for i, o in linears)
    numbers = sum((i * k * k + 1) * o for i, o, k, _ in convs) + sum((i + 1) * o for i, o in linears)
    return products, numbers


@pytest.mark.parametrize("text", TEXTS)
def test_sizes(text: str) -> None:
    net = build(ConvMacro(), 3, 10)
    arch, expected = net.space.parse(text), formula(text)
    assert (CostTable(net, (32, 32), macs).of(arch), CostTable(net, (32, 32), params).of(arch)) == expected
    x = torch.zeros(1, 3, 32, 32)
    assert counted(extract(net, arch, x, inherit=False), x) == expected


class Literal(nn.Module):
    """The network as the page writes it down."""

    def __init__(self, c: list[int], k: list[int]) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(i, o, n, padding=n // 2) for i, o, n in zip([3, *c], c, k))
        self.conv5 = nn.Conv2d(c[3], 256, 7, padding=2)
        self.linear = nn.ModuleList(nn.Linear(i, o) for i, o in ((9216, 256), (256, 128), (128, 64), (64, 10)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv[1](self.conv[0](x).relu()).relu(), 2)
        x = F.max_pool2d(F.dropout2d(self.conv[2](x).relu(), 0.5, self.training), 2)
        x = F.dropout2d(self.conv5(self.conv[3](x).relu()), 0.5, self.training).flatten(1)
        for linear in self.linear[:3]:
            x = linear(x).relu()
        return self.linear[3](x)


def test_the_network_is_the_pages() -> None:
    """Weights in order; in training, with the same random numbers, both drop the same channels."""
    space = ConvMacro(drop=0.5)
    net, arch = build(space, 3, 10), space.parse("8:16:32:64/3:5:3:7")
    net.reset(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.5)  # at PyTorch's start a chain without norms is almost deaf
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    graph, literal = extract(net.eval(), arch, x), Literal([8, 16, 32, 64], [3, 5, 3, 7])
    with torch.no_grad():
        names = ["conv1", "conv2", "conv3", "conv4", "conv5", "hidden.0", "hidden.1", "hidden.2", "classifier"]
        for mine, name in zip((*literal.conv, literal.conv5, *literal.linear), names, strict=True):
            mine.load_state_dict(graph.get_submodule(name).state_dict())
    z = graph(x)
    assert torch.allclose(z, literal.eval()(x), rtol=0, atol=1e-4) and torch.equal(z, net(x, arch))
    drawn = []
    for module in (graph.train(), literal.train()):
        torch.manual_seed(3)
        drawn.append(module(x))
    assert torch.allclose(drawn[0], drawn[1], rtol=0, atol=1e-4) and not torch.allclose(drawn[0], z, rtol=0, atol=1e-2)


SMALL = ConvMacro(((2, 3), (2, 4), (3, 5), (2, 4)), (3, 5, 7), features=6, hidden=(8, 5), image=16, drop=0.5)


def test_dropout_is_the_networks_own() -> None:
    """It comes with the space's rate, in arch.json too, and is printed; the supernet can search with another or with none."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    file = ArchFile.of(SMALL, SMALL.smallest(), input=(3, 16, 16), classes=tuple("abc"), preprocess={}, costs={})
    graph = rebuild(file)
    assert [m.p for m in graph.modules() if isinstance(m, nn.Dropout2d)] == [0.5, 0.5]
    text = source(graph.eval(), (2, 3, 16, 16))
    check(graph, text, x)
    assert text.count("nn.Dropout2d()") == 2
    net = type(build(SMALL, 3, 3))(SMALL, 3, 3, drop=0.0).train()
    arch = SMALL.largest()
    assert torch.equal(net(x, arch), net(x, arch)) and not torch.equal(net(x, arch), net(x, arch, drop=0.5))
    assert not any(isinstance(m, nn.Dropout2d) for m in extract(net, arch, x).modules())
    with pytest.raises(ValueError, match=r"drop = 1\.5 is not a rate"):
        type(net)(SMALL, 3, 3, drop=1.5)


def test_another_image_size_is_refused() -> None:
    net = build(SMALL, 3, 3)
    with pytest.raises(ValueError, match=r"images of 32x32, but this space's are 16x16\. Give the space image: 32"):
        CostTable(net, (32, 32))
    with pytest.raises(ValueError, match=r"hidden\.0: an input of 216 channels, where this architecture has 24"):
        net(torch.zeros(1, 3, 32, 32), SMALL.largest())


def test_a_mixture_has_the_expected_cost_of_its_chain() -> None:
    """Every layer's expectation is that of its own choices: a width is drawn once, and its layers share it."""
    net, space = build(SMALL, 3, 3), SMALL
    counts = {choice.name: len(choice.options) for choice in space.choices}
    soft = {name: Mixture(space[name].options, torch.full((n,), 1 / n, dtype=torch.float64)) for name, n in counts.items()}
    table = CostTable(net, (16, 16), params)
    codes = torch.cartesian_prod(*map(torch.arange, counts.values())).numpy()
    assert float(table.expected(soft)) == pytest.approx(table.batch(codes).mean(), rel=1e-12)
