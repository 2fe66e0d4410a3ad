"""Every count of section 6 of the page of BigNAS, AttentiveNAS (arXiv 2011.09011) and AlphaNet: multiply-adds and parameters of
the published networks, predicted and counted, to the last digit. "Used" parameters: released ones hold 1x1 shortcuts that never
run. Figures are facts. Nothing has weights here: nets are on the meta device."""
from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces.bignas import ATTENTIVE, AttentiveNAS, BigNAS
from search_spaces.space import Arch
from supernets.bignas import build
from supernets.extract import extract

ORACLE = Path(__file__).resolve().parents[2].parent / "shared" / "oracles" / "attentivenas.json"
USED = {
    "A0": (192, 203_389_568, 8_954_184), "A1": (224, 279_238_816, 9_452_872), "A3": (224, 356_518_400, 12_784_928),
    "A5": (256, 490_520_064, 12_597_464), "AlphaNet-A5": (256, 491_481_088, 12_970_512),
}  # fmt: skip


@lru_cache
def tables() -> tuple[Any, CostTable, CostTable]:
    """Of images of a size that no network has: the resolution is a choice."""
    net = build(AttentiveNAS(), 3, 1000).to("meta")
    return net, CostTable(net, (224, 224), macs), CostTable(net, (224, 224), params)


def predicts(arch: Arch, expected: tuple[int, int]) -> None:
    """Alone and in a batch of codes."""
    net, *prices = tables()
    codes = net.space.encode([arch])
    assert tuple(table.of(arch) for table in prices) == expected
    assert tuple(int(table.batch(codes)[0]) for table in prices) == expected


def counts(arch: Arch, expected: tuple[int, int]) -> None:
    """By torch on the network that is built."""
    net, *_ = tables()
    example = torch.zeros(1, 3, 224, 224, device="meta")
    assert counted(extract(net, arch, example, inherit=False), example) == expected


@pytest.mark.parametrize("name", USED)
def test_published_counts(name: str) -> None:
    arch = tables()[0].space.parse(name)
    assert arch["resolution"] == USED[name][0]
    predicts(arch, USED[name][1:])
    counts(arch, USED[name][1:])


def test_the_smallest_network_is_a0_and_all_published_ones_are_checked() -> None:
    space = AttentiveNAS()
    assert space.smallest() == space.parse("A0") and set(USED) == set(ATTENTIVE)


def test_the_shared_vectors() -> None:
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is not here")
    for row in json.loads(ORACLE.read_text())["rows"]:
        predicts(AttentiveNAS().arch_of(**row["cfg"]), (row["macs_exact"], row["params_used"]))


def test_what_the_released_networks_count_more() -> None:
    """A 1x1 shortcut in every block, also where the identity runs: 9,064,648 parameters of A0."""
    space = AttentiveNAS()
    arch, unused, before = space.parse("A0"), 0, 16
    for s in range(7):
        width, depth = int(arch[f"stage{s}.width"]), int(arch[f"stage{s}.depth"])
        unused += (depth - (before != width)) * width * width
        before = width
    assert USED["A0"][2] + unused == 9_064_648


def test_tables_are_small_and_batches_exact() -> None:
    net, table, _ = tables()
    assert max(map(len, table.terms)) <= 5
    codes = net.space.random_codes(np.random.default_rng(0), 50)
    assert table.batch(codes).tolist() == [table.of(arch) for arch in net.space.decode(codes)]


def test_the_ends_of_bignas() -> None:
    """The page's figures are of AttentiveNAS's blocks, measured, and only a sanity check."""
    net = build(BigNAS(), 3, 1000).to("meta")
    space, table = net.space, CostTable(net, (224, 224))
    small, large = (table.of(arch) for arch in (space.smallest(), space.largest()))
    assert f"{small / 1e6:.2f}" == "219.38" and f"{large / 1e6:.1f}" == "1899.8"


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 90])
def test_at_full_size_the_extracted_network_is_the_supernet_to_the_last_bit(side: int) -> None:
    """Of 90 pixels, sides of 45, 23, 12, 6 and 3 follow: odd ones are pooled with padding."""
    net = build(AttentiveNAS(resolution=[side]), 3, 1000)
    generator = torch.Generator().manual_seed(0)
    net.reset(generator)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if "norm" in name:
                value.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(1, 3, 64, 64, generator=generator)
    for arch in (net.space.smallest(), net.space.largest()):
        with torch.no_grad():
            assert torch.equal(extract(net.eval(), arch, x)(x), net(x, arch))
