"""Every figure of section 6 of the page of once-for-all (arXiv 1908.09791) and of DepS (arXiv 2407.06167) that is about mobile
networks: multiply-adds and parameters, predicted and counted, to the last digit. Figures are facts. Nothing has weights here:
nets are on the meta device."""
from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces.mobilenet import COMPOUND, SPECIALISED, OFAMobileNetV3, OFAProxyless, compound
from search_spaces.space import Arch
from supernets.extract import extract
from supernets.mobilenet import build

ORACLE = Path(__file__).resolve().parents[2].parent / "shared" / "oracles" / "ofa.json"
V3 = ("v3", 1.0)


class Row(NamedTuple):
    """``kind``: space and width. ``blocks``: (ks, e, d) for all blocks and stages, or the name of a published network."""

    kind: tuple[str, float]
    blocks: tuple[int, int, int] | str
    side: int
    macs: int
    params: int


ROWS = [
    Row(V3, (7, 6, 4), 224, 566_170_656, 7_664_760), Row(V3, (7, 6, 4), 128, 188_248_320, 7_664_760),
    Row(V3, (3, 3, 2), 224, 121_278_672, 3_410_792), Row(V3, (3, 3, 2), 128, 41_476_224, 3_410_792),
    Row(V3, (5, 4, 3), 224, 250_746_944, 4_551_792), Row(V3, (5, 4, 3), 160, 129_548_864, 4_551_792),
    Row(V3, (3, 3, 3), 224, 173_736_240, 3_891_360), Row(V3, (5, 6, 4), 224, 486_353_184, 7_445_880),
    Row(V3, (7, 3, 2), 224, 151_290_192, 3_493_352), Row(V3, (7, 6, 3), 224, 424_399_200, 6_251_344),
    Row(("v3", 1.2), (7, 6, 4), 224, 843_101_040, 10_701_632),
    Row(("proxyless", 1.3), (7, 6, 4), 224, 1_004_908_032, 7_942_056),
    Row(("proxyless", 1.3), (3, 3, 2), 224, 265_526_256, 3_718_832),
    Row(V3, "pixel1-20ms", 152, 76_664_384, 4_304_592), Row(V3, "pixel1-40ms", 172, 162_265_088, 6_024_176),
    Row(("v3", 1.2), "pixel1-79ms", 224, 355_469_648, 8_168_608),
    Row(("v3", 1.2), "pixel1-143ms", 240, 641_756_192, 9_221_888),
]  # fmt: skip


@lru_cache
def space_of(kind: str, width: float) -> Any:
    """Without a choice of resolution: the images say."""
    return (OFAMobileNetV3 if kind == "v3" else OFAProxyless)(width, resolution=())


@lru_cache
def tables(kind: str, width: float, side: int) -> tuple[Any, CostTable, CostTable]:
    net = build(space_of(kind, width), 3, 1000).to("meta")
    return net, CostTable(net, (side, side), macs), CostTable(net, (side, side), params)


def predicts(prices: tuple[CostTable, CostTable], arch: Arch, expected: tuple[int, int]) -> None:
    """Alone and in a batch of codes."""
    codes = prices[0].root.encode([arch])
    assert tuple(table.of(arch) for table in prices) == expected
    assert tuple(int(table.batch(codes)[0]) for table in prices) == expected


def agrees(net: Any, prices: tuple[CostTable, CostTable], arch: Arch, side: int, expected: tuple[int, int]) -> None:
    """Predicted, and counted by torch on the network that is built."""
    predicts(prices, arch, expected)
    example = torch.zeros(1, 3, side, side, device="meta")
    assert counted(extract(net, arch, example, inherit=False), example) == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind[0]}-{row.kind[1]}-{row.blocks}-{row.side}")
def test_published_counts(row: Row) -> None:
    net, *prices = tables(*row.kind, row.side)
    space = net.space
    arch = space.parse(row.blocks) if isinstance(row.blocks, str) else space.arch_of(*row.blocks)
    agrees(net, (prices[0], prices[1]), arch, row.side, (row.macs, row.params))


def test_every_specialised_network_is_checked() -> None:
    assert {row.blocks for row in ROWS} >= set(SPECIALISED)
    assert all(SPECIALISED[row.blocks].resolution == row.side for row in ROWS if isinstance(row.blocks, str))


TAGS = {"mbv3_w1.0": V3, "mbv3_w1.2": ("v3", 1.2), "proxyless_w1.3": ("proxyless", 1.3)}


@pytest.mark.parametrize(("tag", "kind"), TAGS.items())
def test_the_shared_vectors(tag: str, kind: tuple[str, float]) -> None:
    """The oracle file's rows, random vectors with inert entries among them."""
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is not here")
    found = json.loads(ORACLE.read_text())["supernets"][tag]
    for row in found["rows"]:
        net, *prices = tables(*kind, row["res"])
        arch = net.space.arch_of(**row["cfg"])
        predicts((prices[0], prices[1]), arch, (row["macs_exact"], row["params"]))
        if row["tag"].startswith("seed"):
            agrees(net, (prices[0], prices[1]), arch, row["res"], (row["macs_exact"], row["params"]))
    weights = {name: p.numel() for name, p in net.named_parameters()}
    if "supernet_params" in found:
        assert sum(weights.values()) == found["supernet_params"]
        assert sum(n for name, n in weights.items() if "matrices" in name) == found["supernet_kernel_matrix_params"]


def test_parameters_of_the_supernet() -> None:
    """706 numbers of matrices for each of 20 blocks; fixed kernels have none (DepS), nor has mode crop (CompOFA)."""
    net, *_ = tables(*V3, 224)
    weights = {name: p.numel() for name, p in net.named_parameters()}
    matrices = sum(n for name, n in weights.items() if "matrices" in name)
    assert (sum(weights.values()), matrices) == (7_678_880, 20 * 706)
    fixed = build(OFAMobileNetV3(kernels=[7], resolution=()), 3, 1000)
    assert sum(p.numel() for p in fixed.parameters()) == 7_664_760


def test_costs_follow_the_chosen_resolution() -> None:
    """Whatever the size of the images that come."""
    space = OFAMobileNetV3()
    net = build(space, 3, 1000).to("meta")
    prices = CostTable(net, (32, 32), macs), CostTable(net, (32, 32), params)
    for row in ROWS:
        if row.kind == V3 and not isinstance(row.blocks, str):
            predicts(prices, space.arch_of(*row.blocks, row.side), (row.macs, row.params))
    agrees(net, prices, space.parse("pixel1-20ms"), 224, (76_664_384, 4_304_592))
    assert prices[0].of(space.arch_of(3, 3, 2, 128) | {"resolution": 127}) == 41_476_224  # sides round up


def test_tables_are_small_and_batches_exact() -> None:
    space = OFAMobileNetV3()
    table = CostTable(build(space, 3, 1000).to("meta"), (224, 224))
    assert max(map(len, table.terms)) <= 5
    codes = space.random_codes(np.random.default_rng(0), 50)
    assert table.batch(codes).tolist() == [table.of(arch) for arch in space.decode(codes)]


@pytest.mark.parametrize(("d", "expected"), [(2, (124_326_864, 3_426_920)), (3, (231_579_712, 4_515_440))])
def test_coupled_networks(d: int, expected: tuple[int, int]) -> None:
    """CompOFA: the expand follows the depth, and kernels are 3, 5, 3, 3, 5 by stage."""
    space = compound(OFAMobileNetV3(resolution=()))
    net, macs_table, params_table = tables(*V3, 224)
    arch = space.restrict({f"stage{s}.depth": [d] for s in range(5)}).largest()
    assert arch["stage0.block0.expand"] == COMPOUND[d]
    agrees(net, (macs_table, params_table), arch, 224, expected)


@pytest.mark.parametrize(("blocks", "printed"), [((7, 3, 2), "45.09"), ((7, 6, 4), "179.71")])
def test_the_small_form(blocks: tuple[int, int, int], printed: str) -> None:
    """DepS's mbv3_32: 32 x 32 images, 10 classes, kernels of 7."""
    net = build(OFAMobileNetV3(small=True, kernels=[7]), 3, 10).to("meta")
    arch, example = net.space.arch_of(*blocks), torch.zeros(1, 3, 32, 32, device="meta")  # type: ignore[attr-defined]
    found = int(CostTable(net, (32, 32)).of(arch))
    assert f"{found / 1e6:.2f}" == printed
    assert counted(extract(net, arch, example, inherit=False), example)[0] == found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [V3, ("proxyless", 1.3)], ids=["v3", "proxyless"])
def test_at_full_size_the_extracted_network_is_the_supernet_to_the_last_bit(kind: tuple[str, float]) -> None:
    net = build(space_of(*kind), 3, 1000)
    generator = torch.Generator().manual_seed(0)
    net.reset(generator)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if "norm" in name:
                value.uniform_(0.5, 1.5, generator=generator)
            elif "matrices" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    x = torch.randn(1, 3, 64, 64, generator=generator)
    for blocks in ((7, 6, 4), (3, 3, 2), (5, 4, 3)):
        arch = net.space.arch_of(*blocks)  # type: ignore[attr-defined]
        with torch.no_grad():
            assert torch.equal(extract(net.eval(), arch, x)(x), net(x, arch))
