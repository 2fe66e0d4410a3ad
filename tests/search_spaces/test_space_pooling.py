"""Where a residual network pools: the numbering of the published table (page pooling-mixture.md, sections 1 and 5), what is
read and what is refused."""
from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import pytest
import torch

from nas.ranking.matching import named
from nas.ranking.tables import numbers, read_table
from search_spaces.arch import ArchFile, space_of
from search_spaces.pooling import POOLING, PoolingResNet
from search_spaces.space import Mixture

TABLES = Path(__file__).parents[2] / ".." / "shared" / "tables"
KNOWN = {1: ("1-1-8", (1, 2)), 24: ("4-3-3", (4, 7)), 34: ("7-1-2", (7, 8)), 36: ("8-1-1", (8, 9))}


def table(name: str) -> Path:
    if not (TABLES / name).is_file():
        pytest.skip(f"{name} is not here: it is part of the shared tables, not of the project")
    return TABLES / name


def test_thirty_six_placements_in_the_published_order() -> None:
    space = PoolingResNet()
    (choice,) = space.choices
    assert space.size == len(choice.options) == 36 and not choice.ordered and space.args == {}
    assert space.units == (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    parts = [tuple(map(int, str(option).split("-"))) for option in choice.options]
    assert parts == sorted(parts) and all(sum(part) == 10 and min(part) >= 1 for part in parts)
    for number, (form, at) in KNOWN.items():
        arch = {POOLING: form}
        assert space.numbered(number) == arch and space.number(arch) == number and space.places(form) == at
        assert [unit for unit, bit in enumerate(space.code(arch)) if bit == "1"] == [*at]
    assert (space.smallest(), space.largest()) == ({POOLING: "1-1-8"}, {POOLING: "8-1-1"})


def test_every_row_of_the_published_list() -> None:
    space, rows = PoolingResNet(), list(csv.DictReader(table("rn20_lookup_space.csv").open()))
    assert [int(row["number"]) for row in rows] == list(range(1, 37))
    for row in rows:
        arch = space.numbered(int(row["number"]))
        form = "-".join(row[f"block{i}"] for i in (1, 2, 3))
        assert space.text(arch) == form and space.code(arch) == row["code"].replace(",", "")
        for text in (form, row["number"], row["code"], row["code"].replace(",", ""), f"[{form.replace('-', ', ')}]"):
            assert space.parse(text) == arch
        assert space.number(arch) == int(row["number"])


def test_the_published_accuracies_find_their_rows() -> None:
    """As nas rank reads them: no key is named. Page, check 9: the worst is number 1, the best number 34."""
    found = read_table(str(table("resnet20_baselines_mixture.csv")))
    rows, space = named(found, PoolingResNet(), None), PoolingResNet()
    assert len(set(rows.names)) == 36 and None not in rows.names and "column architecture" in rows.rule
    alone = dict(zip(rows.names, numbers(found, "baseline_avg")))
    ordered = sorted((str(name) for name in rows.names), key=lambda name: alone[name])
    assert (ordered[0], ordered[-1]) == ("1-1-8", "7-1-2") and space.number(rows.archs[ordered[-1]]) == 34
    assert alone["1-1-8"] == pytest.approx(87.447, abs=5e-4) and alone["7-1-2"] == pytest.approx(92.012, abs=5e-4)


def test_other_counts_of_blocks_and_poolings() -> None:
    assert PoolingResNet((2, 2), 1, (8, 16)).size == 4 and PoolingResNet((9,), 3, (16,)).size == math.comb(9, 3)
    space = PoolingResNet((2, 1, 1), 3, (4, 6, 8))
    assert space.units == (4, 4, 4, 6, 8) and space.root[POOLING].options == ("1-1-1-2", "1-1-2-1", "1-2-1-1", "2-1-1-1")
    assert space.args == {"blocks": [2, 1, 1], "pools": 3, "widths": [4, 6, 8]}
    assert PoolingResNet(pools=3).args == {"pools": 3}
    for arch in (space.numbered(i) for i in range(1, 5)):
        assert space.parse(space.code(arch)) == space.parse(str(space.number(arch))) == space.parse(space.text(arch)) == arch
    part = space.restrict({POOLING: ("1-2-1-1", "1-1-1-2")})
    assert part.number({POOLING: "1-2-1-1"}) == 3 and part.places("2-1-1-1") == (2, 3, 4) and part.size == 2
    assert part.largest() == {POOLING: "1-2-1-1"}


def test_architectures_are_written_and_read() -> None:
    space = PoolingResNet((2, 2), 1, (8, 16))
    arch = space.sample(random.Random(3))
    file = ArchFile.of(space, arch, input=(3, 8, 8), classes=("a", "b"), preprocess={}, costs={}, metrics={}, provenance={})
    again = space_of(file)
    assert again.hash == space.hash and isinstance(again, PoolingResNet) and again.units == (8, 8, 8, 16, 16)


@pytest.mark.parametrize("text", [
    "", "x", "4-3-3-", "4-3", "4-3-3#", "4-3-34-3-3", "3-3-3", "0-5-5", "10-0-0", "37", "0", "00", "1.5", "1100000000",
    "0100000000", "0111000000", "01100000000", "0,1,1", "-1", "04-3-3",
])  # fmt: skip
def test_what_is_not_a_placement_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as error:
        PoolingResNet().parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("arguments", "words"), [
    (((3, 3),), r"blocks = \[3, 3\] and widths = \[16, 32, 64\]: give as many of both"), (((), 1, ()), "as many of both"),
    (((3, 0, 3),), "blocks"), (((3, 3, 3), 0), "pools"), (((3, 3, 3), 10), "each stands before a block of its own"),
    (((3, 3, 3), 2, (16, 32, True)), "widths"), (((50, 50), 8, (4, 8)), r"186,087,894,300 placements.*at most 100,000"),
], ids=str)  # fmt: skip
def test_arguments_that_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        PoolingResNet(*arguments)
    assert "\n" not in str(error.value)


def test_numbers_and_settings_that_are_refused() -> None:
    space = PoolingResNet()
    for number in (0, 37, True):
        with pytest.raises(ValueError, match=rf"number {number} is not in this space\. Allowed: 1 to 36"):
            space.numbered(number)
    with pytest.raises(ValueError, match="pooling is a mixture, and placements of poolings do not blend"):
        space.places(Mixture(("4-3-3", "7-1-2"), torch.ones(2)))
    with pytest.raises(ValueError, match=r"pooling = 9-9-9 is not in this space"):
        space.number({POOLING: "9-9-9"})
