"""Every cell of the public NATS-Bench table: strings, index order and isomorphism classes (sections 1 and 8 of the page)."""
from __future__ import annotations

import csv
from pathlib import Path

import pytest

from search_spaces.nats import Numbering, Topology

TABLES = Path(__file__).resolve().parents[2].parent / "shared" / "tables"
pytestmark = pytest.mark.skipif(not TABLES.is_dir(), reason="the public tables (../shared/tables) are not here")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with open(TABLES / "nats_bench.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_string_reads_back_in_the_published_order(rows: list[dict[str, str]]) -> None:
    space, numbering = Topology(), Numbering.read(TABLES / "nats_bench.csv")
    assert len(rows) == 15625 == space.size
    for i, (row, arch) in enumerate(zip(rows, space.decode(numbering.codes))):
        text = row["ArchitectureString"]
        space.check(arch)
        assert space.text(arch) == text and space.parse(text) == arch
        assert numbering.of(arch) == i and numbering.arch(i) == arch


def test_keys_are_the_published_isomorphism_strings(rows: list[dict[str, str]]) -> None:
    space = Topology()
    keys = [space.key(space.parse(row["ArchitectureString"])) for row in rows]
    assert len(set(keys)) == 6466
    assert keys == [row["UniqueString"] for row in rows]


def test_the_twelve_epoch_table_has_the_same_order() -> None:
    twelve = Numbering.read(TABLES / "nb201_12epoch_accs.csv")
    assert twelve.strings == Numbering.read(TABLES / "nats_bench.csv", "ArchitectureString").strings


def test_the_cells_that_the_page_names(rows: list[dict[str, str]]) -> None:
    space, numbering = Topology(), Numbering.read(TABLES / "nats_bench.csv")
    assert space.text(numbering.arch(0)) == (
        "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|")
    assert numbering.of(space.largest()) == 1462 and numbering.of(space.smallest()) == 1835
    assert space.text(numbering.arch(6111)) == (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|")
    for column, best in (("CIFAR10", 6111), ("CIFAR100", 9930), ("ImageNet", 857)):
        scores = [float(row[f"{column}TestAccuracy200Epochs"]) for row in rows]
        assert max(range(len(scores)), key=scores.__getitem__) == best
