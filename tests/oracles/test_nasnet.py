"""Every figure of section 5 of the page of NASNet (arXiv 1707.07012), to the last digit, from the cost table and counted on
the plain network; beside it the totals of NASNet-A Large, as Keras prints them."""
from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces.nasnet import CIFAR, LARGE, MOBILE, NASNET_A
from search_spaces.nasnet import NASNet as Space
from search_spaces.space import Arch
from supernets.extract import extract, training_form
from supernets.nasnet import NASNet

SLOW = pytest.mark.slow
FORMS: dict[str, tuple[Any, int, int]] = {"cifar": (CIFAR, 32, 10), "mobile": (MOBILE, 224, 1000), "large": (LARGE, 331, 1000)}
"""Arguments of the space, height and width of the images, classes."""
CELLS = [40_384, 25_152, *[28_224] * 4, 87_168, 81_024, 93_312, *[101_504] * 4, 305_408, 301_312, 350_464, *[383_232] * 4]
OUTPUTS = [192] * 6 + [256] + [384] * 6 + [512] + [768] * 6


@cache
def net(form: str, meta: bool = False) -> tuple[NASNet, Arch]:
    """The supernet that holds NASNet-A alone (without numbers: of the whole space), and NASNet-A."""
    args, _, classes = FORMS[form]
    space = Space(**args)
    arch = space.arch_of(NASNET_A)
    with torch.device("meta" if meta else "cpu"):
        return NASNet(space if meta else space.restrict({name: [v] for name, v in arch.items()}), 3, classes), arch


def tabled(form: str) -> tuple[int, int, int]:
    """Parameters, those and batch-norm statistics, MACs: by the records of the supernet."""
    own, arch = net(form, meta=True)
    hw = (FORMS[form][1],) * 2
    table, shapes = CostTable(own, hw, params), []
    for layer in own.layers(hw):
        shapes += [layer.shape(*(arch[name] for name in layer.on))] if layer.op == "norm" else []
    statistics = sum(2 * shape.c_out for shape in shapes if shape is not None)
    assert table.of(arch) == table.batch(own.space.encode([arch]))[0]
    return int(table.of(arch)), int(table.of(arch)) + statistics, int(CostTable(own, hw, macs).of(arch))


@SLOW
@pytest.mark.parametrize("form, figures", [
    ("cifar", (3_346_538, 3_383_786, 544_333_312)), ("mobile", (5_289_978, 5_326_716, 563_638_816)),
    ("large", (88_753_150, 88_949_818, 23_783_414_658)),
])  # fmt: skip
def test_by_the_cost_table(form: str, figures: tuple[int, int, int]) -> None:
    """6 @ 768, 4 @ 1056 and 6 @ 4032. Of Large the page has no figures: Keras prints 88,949,818 numbers, 88,753,150 of them
    trainable; its products are published as 23.8 G."""
    assert tabled(form) == figures


@pytest.mark.parametrize("form, figures", [
    ("cifar", (3_346_538, 3_383_786, 544_333_312)),
    pytest.param("mobile", (5_289_978, 5_326_716, 563_638_816), marks=SLOW),
])  # fmt: skip
def test_the_plain_network_counts_the_same(form: str, figures: tuple[int, int, int]) -> None:
    own, arch = net(form)
    x = torch.zeros(1, 3, FORMS[form][1], FORMS[form][1])
    graph = extract(own.eval(), arch, x, inherit=False)
    statistics = sum(2 * m.num_features for m in graph.modules() if isinstance(m, nn.BatchNorm2d))
    products, parameters = counted(graph, x)
    assert (parameters, parameters + statistics, products) == figures
    eps, momentum = {"cifar": (1e-5, 0.1), "mobile": (1e-3, 3e-4)}[form]
    assert {(m.eps, round(m.momentum or 0, 12)) for m in graph.modules() if isinstance(m, nn.BatchNorm2d)} == {(eps, momentum)}


def test_the_breakdown_of_cifar_6_at_768() -> None:
    own, arch = net("cifar")
    found: dict[str, int] = defaultdict(int)
    for layer in own.layers((32, 32)):
        shape = layer.shape(*(arch[name] for name in layer.on))
        found[".".join(layer.name.split(".")[: 2 if layer.name.startswith("cells") else 1])] += (
            0 if shape is None else params(layer.op, shape))
    assert [found[f"cells.{k}"] for k in range(20)] == CELLS
    assert (found["stem"], found["classifier"], sum(found.values())) == (2_784, 7_690, 3_346_538)
    assert [cell.out.size.at(arch) for cell in own.every_cell()] == OUTPUTS
    assert [32 // 2**cell.out.level for cell in own.every_cell()] == [32] * 6 + [16] * 7 + [8] * 7


def test_the_auxiliary_head_reads_the_last_normal_cell_before_the_second_reduction() -> None:
    """384 channels at 16x16; 5x5 pool of stride 3: 4x4; 1x1 to 128, 4x4 to 768, linear. Parameters without it: 3,346,538."""
    own, arch = net("cifar")
    x = torch.zeros(2, 3, 32, 32)
    form = training_form(own.eval(), arch, x)
    assert sum(p.numel() for p in form.network.parameters()) == 3_346_538
    assert form.head is not None
    head = sum(p.numel() for p in form.head.parameters())
    assert head == 384 * 128 + 2 * 128 + 128 * 768 * 4 * 4 + 2 * 768 + 768 * 10 + 10
    with torch.no_grad():
        logits, features = form.network(x)
    assert features.shape == (2, 384, 16, 16) and form.head(features).shape == logits.shape == (2, 10)
