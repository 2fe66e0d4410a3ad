"""Every figure of section 6 of the method page of DARTS (arXiv 1806.09055), to the last digit: the search net, and DARTS_V2
as an evaluation network with and without its auxiliary head."""
from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nas.alpha import Alpha
from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces import darts
from supernets.darts import Cells
from supernets.extract import extract, training_form

Form = tuple[int, int, str, int, int]
"""C, cells, stem, classes, height and width of the images."""

CIFAR10: Form = (36, 20, "cifar", 10, 32)
CIFAR100: Form = (36, 20, "cifar", 100, 32)
SMALL: Form = (16, 8, "cifar", 10, 32)
IMAGENET: Form = (48, 14, "imagenet", 1000, 224)
SLOW = pytest.mark.slow

WITHOUT = [(CIFAR10, 3_349_342, 528_359_040), (CIFAR100, 3_401_272, 528_410_880), (SMALL, 246_106, 43_444_736),
           pytest.param(IMAGENET, 4_718_752, 529_911_552, marks=SLOW)]  # fmt: skip
WITH = [(CIFAR10, 3_825_768, 529_054_848), (CIFAR100, 3_946_908, 529_175_808),
        pytest.param(IMAGENET, 5_979_528, None, marks=SLOW)]  # fmt: skip


@lru_cache
def net(form: Form) -> Cells:
    C, layers, stem, classes, _ = form
    return Cells(darts.Cells(C, layers, stem), classes=classes)


def example(form: Form, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 3, form[4], form[4])


def test_the_search_net() -> None:
    own, alpha = net(SMALL), Alpha(net(SMALL).space)
    assert sum(p.numel() for p in own.parameters()) == 1_930_618
    assert sum(p.numel() for p in alpha.parameters()) == 224 == 2 * 14 * 8
    mixed = sum(len(cell.leaves(darts.edge(cell.kind, node, source))) > 0 for cell in own.every_cell() for node in cell.nodes
                for source in range(node))  # fmt: skip
    assert mixed == 112
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        own(example(SMALL), alpha.soft())
    assert sum(counter.get_flop_counts()["Global"].values()) == 2 * 300_255_744


@pytest.mark.slow
@pytest.mark.parametrize("form, parameters, products", WITHOUT)
def test_evaluation_networks(form: Form, parameters: int, products: int) -> None:
    own, x = net(form), example(form)
    arch = own.space.arch_of(darts.DARTS_V2)
    assert counted(extract(own, arch, x, inherit=False), x) == (products, parameters)
    assert CostTable(own, (form[4], form[4]), macs).of(arch) == products
    table = CostTable(own, (form[4], form[4]), params)
    assert table.of(arch) == parameters == table.batch(own.space.encode([arch]))[0]


@pytest.mark.parametrize("form, parameters, products", WITH)
def test_evaluation_networks_with_their_auxiliary_head(form: Form, parameters: int, products: int | None) -> None:
    own, x = net(form), example(form, 2)
    trained = training_form(own, own.space.arch_of(darts.DARTS_V2), x)
    assert sum(p.numel() for p in trained.parameters()) == parameters
    with torch.no_grad():
        logits, features = trained.eval().network(x)
    assert trained.head is not None and trained.head(features).shape == logits.shape
    head, found = counted(trained.head, features), counted(trained.network, x[:1])
    if form == CIFAR10:
        assert head == (695_808, 476_426) and tuple(features.shape[1:]) == (576, 8, 8)
    if products is not None:
        assert found[0] + head[0] == products
    assert found[1] + head[1] == parameters


def test_the_classifier_of_darts_v2() -> None:
    classifier = net(CIFAR10).classifier.weight
    assert classifier.numel() == 5_760
