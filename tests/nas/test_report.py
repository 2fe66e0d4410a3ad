"""What report.md and random.json say, from figures."""
from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nas.beside import DRAWS, Beside, draw, summary, words
from nas.bilevel import Weights
from nas.protocols import Found
from nas.report import comparison, front_table, health_table, settings, warning_lines, write_whole
from nas.strategies.darts import DARTS
from nas.strategies.tas import TAS
from search_spaces.nats import Topology


def network(top1: float, macs: int = 1000) -> dict[str, Any]:
    return {"top1": top1, "macs": macs, "params": 7, "text": "a=1"}


def said(**changes: Any) -> dict[str, Any]:
    return {**summary([network(0.5, 1234), network(0.25), network(0.75, 9000), network(0.5)]), "steps": 40, "image_passes": 120,
            "search_image_passes": 128, "outside_budget": 0,
            "judged": {"split": "valid", "n": 100, "weights": "scratch", "bn": "recalibrated"}, **changes}  # fmt: skip


def test_the_summary_ranks_the_found_one_among_the_random_ones() -> None:
    found = summary([network(0.5), network(0.25), network(0.75, 9000), network(0.5)])
    assert (found["rank"], found["of"], found["mean"]) == (2, 4, 0.5)  # an equal one is not better
    assert found["std"] == pytest.approx(0.25) and found["best"] == network(0.75, 9000)
    assert summary([network(0.1), network(0.2)])["std"] is None
    assert summary([network(0.9), network(0.2), network(0.3)])["rank"] == 1


def test_the_comparison_in_words_and_as_a_table() -> None:
    assert words(said()) == (
        "each trained alone for 40 steps, valid top-1 on 100 images: found 0.5000 (1,234 MACs), best of 3 random 0.7500 "
        "(9,000 MACs), random 0.5000 +- 0.2500; the found one is number 2 of 4")  # fmt: skip
    table = comparison(said())
    for line in ("| found | 0.5000 | 1,234 | 7 |", "| best of 3 random | 0.7500 | 9,000 | 7 |",
                 "| random, mean +- std | 0.5000 +- 0.2500 |  |  |"):  # fmt: skip
        assert line in table.splitlines()
    assert "number 2 of 4" in table and "search 128, the random ones together 120" in table and "budget" not in table
    assert "+-" not in comparison(said(std=None)) and "+-" not in words(said(std=None))
    assert "3 of the random networks do not meet" in comparison(said(outside_budget=3))


def test_the_health_table_has_first_middle_and_last() -> None:
    history = [{"step": step, "select/top1": step / 100, "health/entropy": 1 - step / 10, "health/gap": 0.25, "other": 1.0}
               for step in range(5)]  # fmt: skip
    history[4]["norm"] = 0.00123
    lines = health_table(history).splitlines()
    assert lines[0] == "| after step | entropy | mixture top-1 | derived top-1 | gap | alpha gradient norm |"
    assert lines[2:5] == ["| 1 | 1.000 | 0.2500 | 0.0000 | 0.250 |  |", "| 3 | 0.800 | 0.2700 | 0.0200 | 0.250 |  |",
                          "| 5 | 0.600 | 0.2900 | 0.0400 | 0.250 | 0.0012 |"]  # fmt: skip
    assert "5 readings" in lines[-1]
    assert health_table([{"step": 4, "select/top1": 0.5}]).splitlines()[:3] == [
        "| after step | derived top-1 |", "| ---: | ---: |", "| 5 | 0.5000 |"]  # fmt: skip


def test_a_warning_says_whether_it_still_holds() -> None:
    assert warning_lines({}, 9) == "No warnings."
    warned = {"skip": {"step": 4, "last": 9, "words": "a."}, "gap": {"step": 6, "last": 8, "words": "b."}}
    assert warning_lines(warned, 9).splitlines() == [
        "- **skip**, after step 5, still so at the end: a.", "- **gap**, after step 7, last seen after step 9: b."]  # fmt: skip


def front(n: int, best: int, name: str = "{:03d}") -> tuple[Any, dict[str, Any]]:
    """What ``front_table`` asks of a search, and a pick, the ``best``-th of a front of ``n``; architecture i costs 1000 i."""
    found = [Found({"a": i}, i / 100, {"macs": 1000 * i, "params": 2 * i}) for i in range(1, n + 1)]
    space = SimpleNamespace(text=lambda arch: name.format(arch["a"]))
    prices = SimpleNamespace(space=space, prices=lambda arch: {"macs": 1000 * arch["a"], "params": 2 * arch["a"]})
    return prices, {"arch": {"a": best}, "metric": {"value": best / 100}, "front": found}


def test_the_table_of_the_front_marks_the_pick() -> None:
    lines = front_table(*front(3, 2, "|a~{}|")).splitlines()
    assert lines == ["|  | MACs | parameters | top-1 | architecture |", "| --- | ---: | ---: | ---: | --- |",
                     "|  | 1,000 | 2 | 0.0100 | `\\|a~1\\|` |", "| **picked** | 2,000 | 4 | 0.0200 | `\\|a~2\\|` |",
                     "|  | 3,000 | 6 | 0.0300 | `\\|a~3\\|` |"]  # fmt: skip


@pytest.mark.parametrize("n, best", [(9, 10), (10, 4), (10, 11), (11, 5), (40, 40), (40, 1), (40, 17), (400, 399), (400, 2)])
def test_a_long_front_shows_ten_rows_with_its_ends_and_the_pick(n: int, best: int) -> None:
    """The pick may have been scored for other limits: it need not be on the front of this searcher."""
    table, _, end = front_table(*front(n, best)).partition("\n\n")
    rows = table.splitlines()[2:]
    macs = [int(row.split("|")[2].replace(",", "")) for row in rows]
    whole = sorted({*range(1, n + 1), best})
    assert len(macs) == min(len(whole), 10) and macs == sorted(macs)
    assert macs[0] == 1000 * whole[0] and macs[-1] == 1000 * whole[-1]
    assert [row for row in rows if "**picked**" in row] == [
        f"| **picked** | {1000 * best:,} | {2 * best} | {best / 100:.4f} | `{best:03d}` |"]  # fmt: skip
    gaps = [b - a for a, b in pairwise(macs)]
    assert len(whole) <= 10 or max(gaps) <= 2.1 * 1000 * len(whole) / 9
    assert end == ("" if len(whole) <= 10 else f"10 of {len(whole)}, evenly between the ends.")


def test_what_is_too_long_for_a_table_is_named() -> None:
    text = front_table(*front(2, 1, "x" * 119 + "{}")) + front_table(*front(2, 1, "x" * 120 + "{}"))
    assert text.count("arch.json |") == text.count("see pareto.csv |") == 1 and text.count("x" * 119) == 2


def test_settings_are_those_that_differ() -> None:
    assert settings(TAS()) == "TAS()"
    assert settings(TAS(target="30%", alpha_std=0.01)) == "TAS(target='30%')"
    assert settings(DARTS(order=1, weights=Weights(lr=0.5))) == "DARTS(order=1, weights=Weights(lr=0.5))"
    assert settings(SimpleNamespace(a=1)) == "SimpleNamespace"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "report.md", "first\n")

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "report.md", "second\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"] and (tmp_path / "report.md").read_text() == "first\n"


# ---- which networks, how long ---------------------------------------------------------------------------------------


def built(fits: Any = lambda arch: True, steps: int = 12, passes: int = 2) -> Any:
    """What ``nas.beside`` asks of a search."""
    strategy = SimpleNamespace(passes=lambda: passes, fits=fits)
    return SimpleNamespace(setup=SimpleNamespace(steps=steps), strategy=strategy, space=Topology(C=4, N=1))


def test_the_random_networks_share_the_passes_of_the_search() -> None:
    assert [Beside(n).length(built(), built().strategy) for n in (0, 1, 3, 5, 24)] == [0, 24, 8, 4, 1]
    assert Beside(8).length(built(passes=5), built(passes=5).strategy) == 7
    for networks in (-1, 25):
        with pytest.raises(ValueError, match=rf"beside.random = {networks} networks\. Allowed: 0 \(none\) to 24, .*12 steps"):
            Beside(networks).length(built(), built().strategy)


def test_draws_meet_the_budget_as_far_as_there_are_any() -> None:
    found, misses = draw(built(), 6, seed=1)
    assert misses == 0 and found == draw(built(), 6, seed=1)[0] != draw(built(), 6, seed=2)[0]
    skips = draw(built(lambda arch: arch["node1.from0"] == "skip_connect"), 6, seed=1)
    assert skips[1] == 0 and {arch["node1.from0"] for arch in skips[0]} == {"skip_connect"}
    asked: list[Any] = []
    assert draw(built(lambda arch: asked.append(arch)), 3, seed=1)[1] == 3  # type: ignore[func-returns-value]
    assert DRAWS <= len(asked) <= DRAWS + 10  # none is found: not looked for again
