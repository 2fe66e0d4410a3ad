"""Parameters and MACs of the AutoFormer spaces' smallest and largest networks, against formulas written down here.

The page gives no counts. Those of the networks that the paper found (5.7, 22.9 and 53.7 million parameters; their genotypes
are not on the page either) are unverified, and so no threshold; a test says only that they lie inside the spaces.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces.space import Arch, Mixture, Setting
from search_spaces.vit import AutoFormer, ViT
from supernets.extract import extract
from supernets.vit import ViT as Net
from supernets.vit import build

Layer = tuple[int, float]


def formula(embed: int, layers: Sequence[Layer], image: int = 224, patch: int = 16, channels: int = 3, classes: int = 1000,
            d: int = 64, relative: bool = True) -> tuple[int, int]:  # fmt: skip
    """(parameters, MACs) of a network of ``layers`` (heads, ratio)."""
    N = (image // patch) ** 2
    pixels = channels * patch * patch
    weights = (pixels + 1) * embed + embed + (N + 1) * embed  # patches, class token, positions
    products = N * pixels * embed
    for heads, ratio in layers:
        c, hidden = heads * d, int(embed * ratio)
        weights += 3 * c * (embed + 1) + embed * (c + 1)  # q, k, v and the projection
        weights += hidden * (embed + 1) + embed * (hidden + 1) + 4 * embed  # MLP, two norms
        weights += 4 * 30 * d if relative else 0  # keys and values, vertical and horizontal, -14 .. 14 and the class token
        products += (N + 1) * (4 * c * embed + 2 * hidden * embed)
    return weights + 2 * embed + classes * (embed + 1), products + classes * embed


ENDS: dict[str, tuple[tuple[int, int, Layer], tuple[int, int, Layer]]] = {
    "tiny": ((192, 12, (3, 3.5)), (240, 14, (4, 4))),
    "small": ((320, 12, (5, 3)), (448, 14, (7, 4))),
    "base": ((528, 14, (8, 3)), (624, 16, (10, 4))),
}
FOUND = {"tiny": 5.7e6, "small": 22.9e6, "base": 53.7e6}


@pytest.mark.parametrize("size", [pytest.param("tiny"), *(pytest.param(s, marks=pytest.mark.slow) for s in ("small", "base"))])
def test_the_ends_of_the_published_spaces(size: str) -> None:
    space = AutoFormer(size)
    net = Net(space, 3, 1000)
    ends = []
    for arch, (embed, depth, layer) in zip((space.smallest(), space.largest()), ENDS[size]):
        found = CostTable(net, (224, 224), params).of(arch), CostTable(net, (224, 224), macs).of(arch)
        assert found == formula(embed, depth * [layer])
        ends.append(found[0])
    assert ends[0] < FOUND[size] < ends[1]


def test_a_mixed_network_is_counted_as_predicted() -> None:
    """Every layer of its own; the library's prediction, torch's counter and the formula agree."""
    for relative in (True, False):
        space = ViT([6, 8, 12], [1, 2, 3], [1, 2, 3], [1, 1.5, 2], 4, 2, 8, relative)
        arch: Arch = {**space.largest(), "embed": 8, "layer0.heads": 1, "layer1.ratio": 1.5, "layer2.heads": 2}
        net = build(space, 1, 10)
        expected = formula(8, [(1, 2), (3, 1.5), (2, 2)], 8, 2, 1, 10, d=4, relative=relative)
        x = torch.zeros(2, 1, 8, 8)
        assert (CostTable(net, (8, 8), params).of(arch), CostTable(net, (8, 8), macs).of(arch)) == expected
        assert counted(extract(net, arch, x), x) == expected[::-1]


@pytest.mark.parametrize("relative", [True, False])
def test_a_mixture_of_everything_costs_what_its_networks_do_on_average(relative: bool) -> None:
    """Full enumeration: 3 x 2 x (2 x 3)^2 architectures, each by the formula, times its probability under the mixtures."""
    space = ViT([6, 8, 11], [1, 2], [1, 3], [1, 1.5, 2], 4, 2, 8, relative)
    net, generator = build(space, 3, 5), torch.Generator().manual_seed(0)
    soft: dict[str, Setting] = {
        c.name: Mixture(c.options, torch.rand(len(c.options), generator=generator, dtype=torch.float64).softmax(0))
        for c in space.choices
    }  # fmt: skip
    names = [c.name for c in space.choices]
    expected, whole = [0.0, 0.0], 0.0
    for picked in itertools.product(*(zip(c.options, soft[c.name].weights.tolist()) for c in space.choices)):  # type: ignore[union-attr]
        arch: Arch = {name: value for name, (value, _) in zip(names, picked)}
        p = math.prod(weight for _, weight in picked)
        layers = [(int(arch[f"layer{i}.heads"]), float(arch[f"layer{i}.ratio"])) for i in range(int(arch["depth"]))]
        costs = formula(int(arch["embed"]), layers, 8, 2, 3, 5, d=4, relative=relative)
        expected, whole = [total + p * cost for total, cost in zip(expected, costs)], whole + p
    assert whole == pytest.approx(1.0, rel=1e-12)
    found = [float(CostTable(net, (8, 8), price).expected(soft)) for price in (params, macs)]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_the_largest_tiny_network_is_counted_as_predicted() -> None:
    space = AutoFormer("tiny")
    x = torch.zeros(1, 3, 224, 224)
    graph = extract(Net(space, 3, 1000), space.largest(), x)
    assert counted(graph, x) == formula(240, 14 * [(4, 4)])[::-1]
