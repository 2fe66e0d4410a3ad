"""The conv-macro space: its lists, its one-line form, what it refuses; and tables keyed by its choices."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nas.ranking.matching import named
from nas.ranking.tables import numbers, read_table
from search_spaces.macro import ConvMacro

BEST = {"c1": 32, "c2": 64, "c3": 128, "c4": 128, "k1": 3, "k2": 7, "k3": 5, "k4": 7}
TABLE = Path(__file__).resolve().parents[3] / "shared" / "tables" / "conv_macro_cifar10.csv"


def test_the_published_lists() -> None:
    space = ConvMacro()
    assert space.size == 3**8 == 6561 and space.args == {}
    assert [choice.name for choice in space.choices] == list(BEST)
    assert [space[f"c{i}"].options for i in (1, 2, 3, 4)] == [(8, 16, 32), (16, 32, 64), (32, 64, 128), (64, 128, 256)]
    assert {space[f"k{i}"].options for i in (1, 2, 3, 4)} == {(3, 5, 7)} and all(choice.ordered for choice in space.choices)
    assert list(space.smallest().values()) == [8, 16, 32, 64, 3, 3, 3, 3]
    assert space.width_size(4).at(BEST) == 128 and space.kernel_size(2).at(BEST) == 7


def test_text() -> None:
    space = ConvMacro()
    assert space.text(BEST) == "32:64:128:128/3:7:5:7" and space.parse(" 32:64:128:128/3:7:5:7\n") == BEST
    restricted = space.restrict({"k2": [7]})
    assert restricted.parse("8:16:32:64/3:3:3:3")["k2"] == 3  # of the root, as every space
    for wrong in ("8", "8:16:32:64", "8:16:32/64:3:3:3:3", "8:16:32:64/3:3:3:x", "8:16:32:64/3:3:3:3/3"):
        with pytest.raises(ValueError, match=r"is not four widths and four kernels\. They are written c1:c2:c3:c4/k1:k2:k3:k4"):
            space.parse(wrong)
    with pytest.raises(ValueError, match=r"k4 = 4 is not in this space\. Allowed: 3, 5, 7"):
        space.parse("8:16:32:64/3:3:3:4")


def test_what_differs_from_the_published_space_is_said() -> None:
    space = ConvMacro(((2, 3), (3, 4), (4, 6), (5, 8)), (3, 5), 7, (6,), 16, 0.5)
    assert space.args == {"widths": [[2, 3], [3, 4], [4, 6], [5, 8]], "kernels": [3, 5], "features": 7, "hidden": [6],
                          "image": 16, "drop": 0.5}  # fmt: skip
    again = ConvMacro(**space.args)
    assert again.hash == space.hash and again.size == 2**8 and again.parse(space.text(space.largest())) == space.largest()


@pytest.mark.parametrize(("args", "words"), [
    ({"widths": ((8, 16),)}, r"widths = \[\[8, 16\]\]: give four lists"),
    ({"widths": ((8, 16), (0, 4), (4,), (4,))}, r"widths = 0: give an integer, 1 or more"),
    ({"widths": ((16, 8), (4,), (4,), (4,))}, r"c1 is ordered, so its options must ascend"),
    ({"kernels": (3, 4)}, r"kernels = 3, 4: an even one has no centre"),
    ({"image": 11}, r"image = 11 leaves nothing"),
    ({"features": 0}, r"features = 0: give an integer"),
    ({"hidden": (4, -1)}, r"hidden = -1: give an integer"),
    ({"drop": 1.0}, r"drop = 1\.0 is not a rate"),
])  # fmt: skip
def test_bad_arguments(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        ConvMacro(**args)
    assert "\n" not in str(error.value)


def test_rows_of_a_table_are_read_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("c1,c2,c3,c4,k1,k2,k3,k4,test_acc\n8,16,32,64,3,3,3,3,10.0\n32,64,128,128,3,7,5,7,84.41\n8,16,32,65,3,3,3,3,1\n")
    rows = named(read_table(str(path)), ConvMacro(), None)
    assert rows.names == ["8:16:32:64/3:3:3:3", "32:64:128:128/3:7:5:7", None] and "c4 = 65" in rows.unread
    assert rows.archs["32:64:128:128/3:7:5:7"] == BEST
    path.write_text("network,accuracy\n32:64:128:128/3:7:5:7,84.41\n")
    assert named(read_table(str(path)), ConvMacro(), None).archs == {"32:64:128:128/3:7:5:7": BEST}


@pytest.mark.skipif(not TABLE.is_file(), reason="the published table ../shared/tables/conv_macro_cifar10.csv is not here")
def test_the_published_table() -> None:
    """Section 6 of the page: 6561 networks, the best one, 14 failures."""
    table, space = read_table(str(TABLE)), ConvMacro()
    rows = named(table, space, None)
    accuracy = dict(zip(rows.names, numbers(table, "test_acc").tolist()))
    assert len(rows.archs) == len(accuracy) == 6561 and None not in accuracy
    assert max(accuracy, key=lambda name: accuracy[name]) == space.text(BEST) and accuracy[space.text(BEST)] == 84.41
    assert sum(value == 10.0 for value in accuracy.values()) == 14 and accuracy[space.text(space.smallest())] == 10.0
    assert accuracy[space.text(space.sample(random.Random(0)))] > 60
