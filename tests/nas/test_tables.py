"""A user's tables: what is read, what is missing, and which architecture a row is about."""
from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nas.cost import CostTable
from nas.ranking.matching import match, named
from nas.ranking.statistics import kendall
from nas.ranking.tables import Table, numbers, read_table, value_column
from search_spaces.nats import Sizes, Topology
from search_spaces.resnet import CifarResNet
from search_spaces.space import SearchSpace
from supernets.nats import build

TABLES = Path(__file__).resolve().parents[3] / "shared" / "tables"
published = pytest.mark.skipif(not TABLES.is_dir(), reason="the published tables are not in ../shared/tables")
NET = CifarResNet(14, "tied", [4, 6, 8])
ARCHS = [NET.sample(random.Random(seed)) for seed in range(6)]
TEXTS = [NET.text(arch) for arch in ARCHS]


def table(**columns: Sequence[object]) -> Table:
    return Table("t.csv", {name: ["" if cell is None else str(cell) for cell in cells] for name, cells in columns.items()})


def written(folder: Path, name: str, text: str) -> Table:
    (folder / name).write_text(text, encoding="utf-8")
    return read_table(str(folder / name))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_a_mark_blank_lines_and_a_comma_at_the_end(tmp_path: Path) -> None:
    found = written(tmp_path, "t.csv", '\ufeffkey, acc ,\n"a,b",1.5,\n\n c ,,\n')
    assert found.columns == {"key": ["a,b", "c"], "acc": ["1.5", ""]} and found.rows == 2


def test_json_of_both_forms(tmp_path: Path) -> None:
    macro = '{"012": {"test_acc": [1, 2.0, 6], "mean": 3.5, "std": null}, "020": {"mean": NaN, "more": 1}}'
    assert written(tmp_path, "m.json", macro).columns == {
        "key": ["012", "020"], "test_acc": ["3.0", ""], "mean": ["3.5", "nan"], "std": ["", ""], "more": ["", "1"]}  # fmt: skip
    assert written(tmp_path, "n.json", '{"a": 1, "b": 2.5}').columns == {"key": ["a", "b"], "value": ["1", "2.5"]}
    assert written(tmp_path, "l.json", '[{"arch": "a", "v": 1}, {"arch": "b"}]').columns == {"arch": ["a", "b"], "v": ["1", ""]}


@pytest.mark.parametrize(("name", "text", "words"), [
    ("t.csv", "a,b\n1,2\n1\n", "t.csv, line 3: 1 cells, but the header names 2 columns"),
    ("t.csv", "a,a\n1,2\n", "two columns named a"),
    ("t.csv", "a,b\n", "holds no rows"),
    ("t.csv", "", "holds no rows"),
    ("t.csv", 'a\n"1', "cannot be read as CSV or JSON: unexpected end of data"),
    ("t.json", '{"a": ', "t.json cannot be read as CSV or JSON: Expecting value"),
    ("t.json", "[1, 2]", "expected an object of architectures"),
    ("t.json", "{}", "holds no rows"),
])  # fmt: skip
def test_damaged_files(name: str, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path, name, text)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="cannot be read as CSV or JSON"):
        read_table(str(tmp_path / "t.csv"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_table(str(tmp_path / "u.csv"))


def test_missing_numbers_are_nan_and_words_are_refused() -> None:
    found = numbers(table(v=["1", "", "NaN", "n/a", "inf", "-2e1", None]), "v")
    assert np.array_equal(found, [1, math.nan, math.nan, math.nan, math.nan, -20, math.nan], equal_nan=True)
    with pytest.raises(ValueError, match=r"t.csv, row 2: v = '91%' is no number"):
        numbers(table(v=["1", "91%"]), "v")


def test_the_only_column_of_numbers_is_the_value() -> None:
    given = table(arch=[1, 2], key=["a", "b"], c1=[8, 16], acc=[None, 90.5])
    assert value_column(given, None, "--value", ["c1"]) == "acc" and value_column(given, "c1", "--value", []) == "c1"
    with pytest.raises(ValueError, match=r"--value is missing: which column of t.csv\? Columns of numbers: c1, acc"):
        value_column(given, None, "--value", [])
    with pytest.raises(ValueError, match=r"--value is missing: .* Columns of numbers: none"):
        value_column(table(arch=["a"]), None, "--value", [])


# ---- which architecture --------------------------------------------------------------------------------------------


def test_texts_are_found_by_themselves_and_made_canonical() -> None:
    i = next(i for i, arch in enumerate(ARCHS) if arch["stage0.depth"] == 1)
    inert = TEXTS[i].replace("stage0.block1.conv0.width=1", "stage0.block1.conv0.width=3")
    assert inert != TEXTS[i]
    found = named(table(n=[1, 2, 3], name=[inert, TEXTS[1], "other"], acc=[1, 2, 3]), NET, None)
    assert found.names == [TEXTS[i], TEXTS[1], None] and found.archs == {TEXTS[i]: ARCHS[i], TEXTS[1]: ARCHS[1]}
    assert "column name" in found.rule and "'other' is not name=value" in found.unread


def test_choices_as_columns() -> None:
    """Settings that do not count may be empty; programs write whole numbers with gaps as 8.0."""
    rows = {name: [arch[name] if name in NET.counting(arch) else None for arch in ARCHS] for name in ARCHS[0]}
    rows["stage0.width"] = [f"{value}.0" for value in rows["stage0.width"]]
    given = table(acc=[1] * 6, **rows)
    found = named(given, NET, None)
    assert found.names == TEXTS and "columns named like the choices" in found.rule and found.unread == ""
    given.columns["stage0.width"][2:4] = ["", "9"]
    found = named(given, NET, None)
    assert found.names == [*TEXTS[:2], None, None, *TEXTS[4:]] and "stage0.width is empty where it counts" in found.unread


def test_numbers_of_the_space_itself() -> None:
    space = Sizes()
    found = named(table(index=["0", "7.0", "32768"], acc=[1, 2, 3]), space, None)
    assert found.names == [space.text(space.numbered(0)), space.text(space.numbered(7)), None] and not found.numbers
    assert "numbers of nats.Sizes" in found.rule and "32768" in found.unread


def test_a_restriction_leaves_out_the_rest() -> None:
    space: SearchSpace = NET.restrict({"stage0.width": [3, 4]})
    found = named(table(name=TEXTS), space, "name")
    assert found.names == [text if arch["stage0.width"] in (3, 4) else None for arch, text in zip(ARCHS, TEXTS)]
    assert None in found.names and "stage0.width = " in found.unread


@pytest.mark.parametrize("key", [None, "acc"])
def test_no_rule_fits(key: str | None) -> None:
    with pytest.raises(ValueError, match=r"t.csv holds no architectures of resnet.CifarResNet \(first row: .*texts: stage0"):
        named(table(name=["a"], acc=[1.5]), NET, key)
    with pytest.raises(ValueError, match=r"--key nme: t.csv has no such column. Allowed: name, acc"):
        named(table(name=["a"], acc=[1.5]), NET, "nme")


CELLS = [Topology().text(Topology().sample(random.Random(seed))) for seed in range(4)]


def test_numbers_are_row_numbers_of_the_truth_or_its_column() -> None:
    """NAS-Bench-201 has no formula for its index: only a table knows it."""
    values = table(index=[2, 0, 9], v=[1, 2, 3])
    archs, known = match({"truth": table(cell=CELLS, acc=[1, 2, 3, 4]), "predictions": values}, Topology(), None,
                         {"truth": "acc", "predictions": "v"})  # fmt: skip
    assert known["predictions"].values == {CELLS[2]: 1.0, CELLS[0]: 2.0} and set(archs) == set(CELLS)
    said = known["predictions"].said
    assert said["unread"] == 1 and said["first_unread"] == "number 9 is not in t.csv" and "row numbers from 0" in said["key"]
    truth = table(arch=[9, 2, 5, 0], cell=CELLS, acc=[1, 2, 3, 4])
    _, known = match({"truth": truth, "predictions": values}, Topology(), None, {"truth": "acc", "predictions": "v"})
    assert known["predictions"].values == {CELLS[1]: 1.0, CELLS[3]: 2.0, CELLS[0]: 3.0}
    assert "column arch of" in known["predictions"].said["key"]


def test_a_truth_of_numbers_is_joined_by_another_files_column() -> None:
    truth = table(index=[2, 0], acc=[91, 92])
    columns = {"truth": "acc", "predictions": "v"}
    _, known = match({"truth": truth, "predictions": table(id=[0, 2], cell=CELLS[:2], v=[1, 2])}, Topology(), None, columns)
    assert known["truth"].values == {CELLS[1]: 91.0, CELLS[0]: 92.0}
    with pytest.raises(ValueError, match=r"another file has their numbers .* Give t.csv a column index"):
        match({"truth": truth, "predictions": table(cell=CELLS[:2], v=[1, 2])}, Topology(), None, columns)


def test_without_a_space_names_are_as_written() -> None:
    truth, given = table(size=[1, 1, 1], k=["a", "b", None], acc=[1, 2, 3]), table(k=["b", "a"], v=[1, 2], size=[1, 1])
    columns = {"truth": "acc", "predictions": "v"}
    archs, known = match({"truth": truth, "predictions": given}, None, None, columns)
    assert archs == {} and known["truth"].values == {"a": 1.0, "b": 2.0} and known["predictions"].values == {"b": 1.0, "a": 2.0}
    said = known["truth"].said  # size names no row differently from the others
    assert (said["key"], said["unread"], said["first_unread"]) == ("k, as written", 1, "an empty cell")
    archs, known = match({"truth": truth, "predictions": given}, None, "size,k", columns)
    assert known["predictions"].values == {"size=1,k=b": 1.0, "size=1,k=a": 2.0} and len(known["truth"].values) == 3
    with pytest.raises(ValueError, match="share no column that could name an architecture"):
        match({"truth": truth, "predictions": table(name=["b"], v=[1])}, None, None, columns)


def test_rows_of_one_architecture_are_averaged_and_counted() -> None:
    truth = table(name=[TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0], TEXTS[2]], acc=[1, 2, 4, None, None])
    _, known = match({"truth": truth}, NET, None, {"truth": "acc"})
    values, said = known["truth"].values, known["truth"].said
    assert values[TEXTS[0]] == 2.5 and values[TEXTS[1]] == 2.0 and math.isnan(values[TEXTS[2]])
    assert (said["rows"], said["architectures"], said["repeated"], said["without_value"], said["unread"]) == (5, 3, 2, 1, 0)


@published
@pytest.mark.parametrize(("truth", "values", "columns", "tau"), [
    ("nats_bench.csv", "nats_bench.csv", ("CIFAR10TestAccuracy200Epochs", "CIFAR100TestAccuracy200Epochs"), 0.882),
    ("nats_bench.csv", "nats_bench.csv", ("CIFAR10TestAccuracy200Epochs", "ImageNetTestAccuracy200Epochs"), 0.839),
    ("nats_bench.csv", "nb201_12epoch_accs.csv", ("CIFAR10TestAccuracy200Epochs", "cifar10-val"), 0.594),
    ("nats_bench.csv", "nb201_12epoch_accs.csv", ("CIFAR10TestAccuracy200Epochs", "cifar10-test"), 0.700),
])  # fmt: skip
def test_published_rank_correlations(truth: str, values: str, columns: tuple[str, str], tau: float) -> None:
    files = {"truth": read_table(str(TABLES / truth)), "predictions": read_table(str(TABLES / values))}
    archs, known = match(files, Topology(), None, dict(zip(files, columns)))
    assert len(archs) == 15_625 and known["truth"].values.keys() == known["predictions"].values.keys() == archs.keys()
    t, p = (np.array([known[name].values[arch] for arch in archs]) for name in files)
    assert kendall(p, t) == pytest.approx(tau, abs=0.0006)


@published
def test_published_rank_correlation_of_the_trivial_ranker() -> None:
    """Whole numbers: sums of floats would break ties, and move tau by 0.002."""
    space, table = Topology(), read_table(str(TABLES / "nats_bench.csv"))
    rows = named(table, space, None)
    cost = CostTable(build(space, 3, 10), (32, 32)).batch(space.encode([rows.archs[name or ""] for name in rows.names]))
    assert cost.dtype == np.int64
    for data, tau in (("CIFAR10", 0.578), ("CIFAR100", 0.553), ("ImageNet", 0.520)):
        assert kendall(cost, numbers(table, f"{data}TestAccuracy200Epochs")) == pytest.approx(tau, abs=0.0006)
