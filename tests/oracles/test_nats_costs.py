"""Every figure of section 3 of the page spaces-nb201-nats-macro: multiply-adds and parameters of networks of NAS-Bench-201
(arXiv 2001.00326) and of the NATS size space (arXiv 2009.00437), to the last digit. Figures are facts."""
from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces import nats
from supernets.extract import extract
from supernets.nats import build


class Row(NamedTuple):
    """``arch``: the published string. ``madds``, ``parameters`` in millions, as printed."""

    arch: str
    classes: int
    size: int
    madds: str
    parameters: str


INDEX_0 = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
INDEX_6111 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
INDEX_1462 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
ROWS = {
    "topology 0, CIFAR-10": Row(INDEX_0, 10, 32, "15.647370", "0.129306"),
    "topology 6111, CIFAR-10": Row(INDEX_6111, 10, 32, "153.272970", "1.073466"),
    "topology 1462, CIFAR-10": Row(INDEX_1462, 10, 32, "220.119690", "1.531546"),
    "topology 0, CIFAR-100": Row(INDEX_0, 100, 32, "15.653220", "0.135156"),
    "topology 0, IN16-120": Row(INDEX_0, 120, 16, "3.919480", "0.136456"),
    "size 8:8:8:8:8": Row("8:8:8:8:8", 10, 32, "4.481114", "0.011714"),
    "size 8:8:8:16:32": Row("8:8:8:16:32", 10, 32, "6.840650", "0.049202"),
    "size 64:64:64:64:64": Row("64:64:64:64:64", 10, 32, "274.399882", "0.713674"),
}


@pytest.fixture(params=list(ROWS.values()), ids=list(ROWS))
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@lru_cache
def net(topology: bool, classes: int) -> Any:
    space: Any = nats.Topology() if topology else nats.Sizes()
    return build(space, 3, classes)


def of(row: Row) -> Any:
    return net(row.arch.startswith("|"), row.classes)


def printed(row: Row, products: int, parameters: int) -> tuple[str, str]:
    """Millions, six digits. Their count has one more for each class, the bias of the classifier."""
    return f"{(products + row.classes) / 1e6:.6f}", f"{parameters / 1e6:.6f}"


def test_predicted(row: Row) -> None:
    supernet, size = of(row), (row.size, row.size)
    arch = supernet.space.parse(row.arch)
    tables = [CostTable(supernet, size, price) for price in (macs, params)]
    assert printed(row, *(int(table.of(arch)) for table in tables)) == (row.madds, row.parameters)
    codes = supernet.space.encode([arch])
    assert printed(row, *(int(table.batch(codes)[0]) for table in tables)) == (row.madds, row.parameters)


def test_counted(row: Row) -> None:
    """By torch, on the network that is built; its parameters are what an optimizer would get."""
    supernet, example = of(row), torch.zeros(1, 3, row.size, row.size)
    graph = extract(supernet, supernet.space.parse(row.arch), example, inherit=False)
    assert printed(row, *counted(graph, example)) == (row.madds, row.parameters)


def test_tables_agree_with_themselves_on_the_whole_space() -> None:
    """Edges add up: 15,625 cells from six tables, each operation worth the same on every edge."""
    supernet = net(True, 10)
    table, arch = CostTable(supernet, (32, 32)), supernet.space.parse(INDEX_1462)
    codes = np.indices((5,) * 6).reshape(6, -1).T
    costs = table.batch(codes)
    one, three = (codes == 2).sum(1), (codes == 3).sum(1)
    per_1x1 = 15 * 16 * 16 * 32 * 32  # of 15 cells: twice the channels, half the height and width, as many products
    skeleton = table.of(arch) - 6 * 9 * per_1x1
    assert bool((costs == skeleton + per_1x1 * (one + 9 * three)).all())
