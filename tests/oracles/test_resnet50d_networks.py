"""OFA-ResNet50D to the last digit: MACs and parameters by table and counted on the extracted network (arXiv 1908.09791)."""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces.resnet50d import OFAResNet50D as Space
from search_spaces.space import Arch
from supernets.extract import extract
from supernets.resnet50d import OFAResNet50D, build

ORACLE = Path(__file__).parents[2] / ".." / "shared" / "oracles" / "ofa.json"
ROWS = {"max": (7491643904, 48105992), "min": (962192128, 6539280)}


def costs(net: OFAResNet50D, arch: Arch, side: int) -> tuple[int, int]:
    return int(CostTable(net, (side, side), macs).of(arch)), int(CostTable(net, (side, side), params).of(arch))


def counts(net: OFAResNet50D, arch: Arch, side: int) -> tuple[int, int]:
    x = torch.zeros(1, 3, side, side)
    return counted(extract(net.eval(), arch, x, inherit=False), x)


@pytest.fixture(scope="module")
def full() -> OFAResNet50D:
    return build(Space(), 3, 1000)


def test_the_largest_and_the_smallest(full: OFAResNet50D) -> None:
    assert costs(full, full.space.largest(), 224) == ROWS["max"]
    assert costs(full, full.space.smallest(), 224) == ROWS["min"] == counts(full, full.space.smallest(), 224)


def test_every_row_of_the_oracle_by_table_and_counted(full: OFAResNet50D) -> None:
    if not ORACLE.exists():
        pytest.skip(f"{ORACLE} is not on this machine")
    rows = json.loads(ORACLE.read_text())["supernets"]["resnet50"]["rows"]
    assert {row["tag"] for row in rows} >= set(ROWS)
    for row in rows:
        arch, expected = full.space.arch_of(**row["cfg"]), (row["macs_exact"], row["params"])
        assert costs(full, arch, row["res"]) == counts(full, arch, row["res"]) == expected, row["tag"]


def test_random_networks_by_table_and_counted() -> None:
    """Odd sizes too, with the resolution as a choice and without; codes give what ``of`` gives."""
    rng = random.Random(0)
    for resolution, side in (((32, 45), 64), (None, 45)):
        net = build(Space(0.125, (1, 1, 2, 1), resolution), 3, 10)
        archs = [net.space.sample(rng) for _ in range(6)]
        for arch in archs:
            assert costs(net, arch, side) == counts(net, arch, side)
        table = CostTable(net, (side, side), macs)
        assert np.array_equal(table.batch(net.space.encode(archs)), [table.of(arch) for arch in archs])


class Literal(nn.Module):
    """The largest network as the page writes it down, on the names of the extracted one."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def conv(self, x: Tensor, path: str, stride: int = 1) -> Tensor:
        w = {name: self.weights[f"{path}.{name}"] for name in ("conv.weight", "norm.weight", "norm.bias")}
        z = F.conv2d(x, w["conv.weight"], stride=stride, padding=w["conv.weight"].shape[2] // 2)
        mean, var = (self.weights[f"{path}.norm.running_{name}"] for name in ("mean", "var"))
        return F.batch_norm(z, mean, var, w["norm.weight"], w["norm.bias"], eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x, "stem.conv0", 2).relu()
        x = x + self.conv(x, "stem.residual").relu()
        x = F.max_pool2d(self.conv(x, "stem.conv1").relu(), 3, 2, 1)
        for s, (stride, blocks) in enumerate(zip((1, 2, 2, 2), (3, 3, 4, 3))):
            for b in range(blocks):
                path, step = f"stages.{s}.{b}", 1 if b else stride
                y = self.conv(self.conv(x, f"{path}.conv0").relu(), f"{path}.conv1", step).relu()
                if b == 0:
                    x = self.conv(F.avg_pool2d(x, step, step, ceil_mode=True), f"{path}.shortcut")
                x = (self.conv(y, f"{path}.conv2") + x).relu()
        return F.linear(x.mean((2, 3)), self.weights["classifier.weight"], self.weights["classifier.bias"])


def randomised(net: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if "norm" in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
    return net.double().eval()


@pytest.mark.parametrize("side", [64, 45])
def test_the_network_is_the_pages(side: int) -> None:
    """Odd sizes meet partial windows in the averages of the shortcuts."""
    net = randomised(build(Space(0.125, (1, 1, 2, 1)), 3, 10))
    generator, arch = torch.Generator().manual_seed(1), net.space.largest()
    x = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
    graph = extract(net, arch, x)
    expected = Literal(dict(graph.state_dict()))(x)
    assert torch.allclose(net(x, arch), expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    assert torch.equal(graph(x), net(x, arch))


@pytest.mark.parametrize("n", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_the_extracted_network_is_the_supernet(n: int) -> None:
    """On statistics that were recalibrated for each, with equal logits; counted costs are predicted ones."""
    net, rng = randomised(build(Space(0.125, (1, 1, 2, 1), (32, 45)), 3, 10)), random.Random(7)
    x = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    archs = [net.space.sample(rng) for _ in range(n)]
    for arch, statistics in zip(archs, recalibrate(net, archs, [x])):
        install(net, statistics)
        net.eval()
        graph = extract(net, arch, x)
        assert torch.equal(graph(x), net(x, arch)) and counted(graph, x) == costs(net, arch, 40)


def test_zero_gamma_makes_every_block_its_shortcut() -> None:
    net = OFAResNet50D(Space(0.125, (1, 1, 1, 1)), 3, 10, zero_gamma=True)
    net.reset(torch.Generator().manual_seed(0))
    gammas = {name: p for name, p in net.named_parameters() if name.endswith("norm.weight.0")}
    zero = {name for name, p in gammas.items() if not p.any()}
    assert zero == {name for name in gammas if ".conv2." in name} and len(zero) == 12
    other = build(Space(0.125, (1, 1, 1, 1)), 3, 10)
    assert all(bool((p == 1).all()) for name, p in other.named_parameters() if name.endswith("norm.weight.0"))


def test_inert_settings_change_nothing() -> None:
    net = randomised(build(Space(0.125, (1, 1, 1, 1)), 3, 10))
    x, arch = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double(), net.space.smallest()
    inert = {**arch, "stage3.block2.expand": 0.35, "stage0.block1.expand": 0.25}
    assert net.space.key(inert) == net.space.key(arch) and costs(net, inert, 32) == costs(net, arch, 32)
    assert torch.equal(net(x, inert), net(x, arch))


def test_a_stem_of_two_residuals_is_refused() -> None:
    net = build(Space(0.125, (1, 1, 1, 1)), 3, 10)
    with pytest.raises(ValueError, match=r"the stem cannot keep 2 residual convolutions\. Allowed: 0, 1\."):
        net(torch.zeros(2, 3, 32, 32), {**net.space.largest(), "stem.depth": 2})
