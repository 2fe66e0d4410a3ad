"""Channel-Bench-Macro, both spaces: widths, texts, smaller forms, and the rows of the published table."""
from __future__ import annotations

import random
from pathlib import Path

import pytest

from nas.ranking.matching import named
from nas.ranking.tables import numbers, read_table
from search_spaces.channelbench import NAMES, ChannelMobileNet, ChannelResNet, Channels

TABLE = Path(__file__).parents[2].parent / "shared" / "tables" / "channel-bench-resnet.json"
both = pytest.mark.parametrize("kind", [ChannelResNet, ChannelMobileNet])


@pytest.mark.parametrize(("space", "full"), [
    (ChannelResNet(), (256, 256, 256, 512, 512, 512, 512)), (ChannelMobileNet(), (128, 768, 768, 768, 256, 1536, 1024)),
])
def test_the_widths_of_the_page(space: Channels, full: tuple[int, ...]) -> None:
    assert [choice.name for choice in space.choices] == ["c0", "c1", "c2", "c3", "c4", "c5", "c6"]
    assert [choice.options for choice in space.choices] == [(w // 4, w // 2, 3 * w // 4, w) for w in full]
    assert all(choice.ordered and not choice.needs for choice in space.choices)
    assert space.size == 4**7 == 16384 and space.args == {} and space.name == f"channelbench.{type(space).__name__}"
    assert space.text(space.smallest()) == "1111111" and space.text(space.largest()) == "4444444"
    assert [space.segment(i).full for i in range(7)] == list(full)


def test_a_text_is_seven_digits() -> None:
    space = ChannelResNet()
    best = {"c0": 256, "c1": 192, "c2": 256, "c3": 512, "c4": 512, "c5": 256, "c6": 512}
    assert space.text(best) == "4344424" and space.parse(" 4344424\n") == best
    assert ChannelMobileNet().parse("1234321") == {"c0": 32, "c1": 384, "c2": 576, "c3": 768, "c4": 192, "c5": 768, "c6": 256}
    narrow = space.restrict({"c0": [256], "c1": [64, 192]})
    assert narrow.text(best) == "4344424" and narrow.parse("1111111") == space.smallest()  # ``check`` judges a restriction
    rng = random.Random(0)
    for arch in (space.sample(rng) for _ in range(20)):
        assert space.parse(space.text(arch)) == arch and list(space.parse(space.text(arch))) == list(NAMES)


@both
def test_smaller_forms(kind: type[Channels]) -> None:
    space = kind((4, 6, 2, 8, 4, 6, 10), parts=2)
    assert space.args == {"widths": [4, 6, 2, 8, 4, 6, 10], "parts": 2}
    assert [choice.options for choice in space.choices] == [(2, 4), (3, 6), (1, 2), (4, 8), (2, 4), (3, 6), (5, 10)]
    assert space.size == 2**7 and space.parse("1212121") == dict(zip(NAMES, (2, 6, 1, 8, 2, 6, 5)))
    assert kind(**space.args).hash == space.hash != kind().hash
    assert kind(list(kind.WIDTHS), 4).args == {} and kind(parts=2).args == {"parts": 2}
    with pytest.raises(ValueError, match=r"'1213121' is not 7 digits\. .* each as one digit of 1 to 2, such as 2222222\."):
        space.parse("1213121")


@pytest.mark.parametrize("text", ["", "111111", "11111111", "1111115", "0111111", "111111x", "1,1,1,1", "-111111", "111111٢",
                                  "64:64:64:128:128:128:128"])  # fmt: skip
def test_texts_refused(text: str) -> None:
    words = r"is not 7 digits\. Widths are written c0, .*, c6, each as one digit of 1 to 4, such as 4444444\."
    with pytest.raises(ValueError, match=words) as error:
        ChannelResNet().parse(text)
    assert "\n" not in str(error.value)


@both
@pytest.mark.parametrize(("args", "line"), [
    ({"widths": [8] * 6}, r"widths = \[8, 8, .*\]: give a list of 7, the largest of c0, c1, .* such as \["),
    ({"widths": 8}, "widths = 8: give a list of 7"), ({"widths": "4444444"}, "widths = 4444444: give a list of 7"),
    ({"widths": [8] * 6 + [6]}, r"widths = 8, .*, 6: 6 is not made of 4 equal parts\. Give multiples of 4\."),
    ({"widths": [8] * 6 + [0]}, "widths = 0: give an integer, 1 or more"),
    ({"widths": [8.0] * 7}, r"widths = 8\.0: give an integer"),
    ({"parts": 0}, "parts = 0: give an integer, 1 or more"), ({"parts": 10}, r"parts = 10: .* one digit\. Allowed: 1 to 9\."),
])
def test_arguments_refused(kind: type[Channels], args: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        kind(**args)
    assert "\n" not in str(error.value)


def test_widths_of_another_space_have_no_text() -> None:
    with pytest.raises(ValueError, match=r"c3 = 64 is not in this space\. Allowed: 128, 256, 384, 512\. Nearest: 128"):
        ChannelResNet().text(dict.fromkeys(NAMES, 64))


def test_rows_of_a_table_are_found_by_their_text(tmp_path: Path) -> None:
    path, space = tmp_path / "table.json", ChannelResNet()
    path.write_text('{"1111111": {"acc": [91, 92], "mean": 91.5}, "4344424": {"acc": [93, 94], "mean": 93.5}, "4344425": {}}')
    rows = named(read_table(str(path)), space, None)
    assert rows.names == ["1111111", "4344424", None] and "'4344425' is not 7 digits" in rows.unread
    assert rows.archs["4344424"] == space.parse("4344424") and not rows.numbers


@pytest.mark.skipif(not TABLE.is_file(), reason="the published table ../shared/tables/channel-bench-resnet.json is not here")
def test_the_published_table() -> None:
    """Section 5 of the page: 16384 networks, their range, the best one."""
    table, space = read_table(str(TABLE)), ChannelResNet()
    rows = named(table, space, None)
    assert len(rows.archs) == 16384 and None not in rows.names and rows.rule == (
        "column key, as channelbench.ChannelResNet writes architectures")
    accuracy = dict(zip(rows.names, numbers(table, "mean").tolist()))
    assert max(accuracy, key=lambda name: accuracy[name]) == "4344424"
    for text, value in (("1111111", 91.700), ("4444444", 93.617), ("4344424", 93.893)):
        assert accuracy[text] == pytest.approx(value, abs=5e-4)
    assert (round(min(accuracy.values()), 2), round(max(accuracy.values()), 2)) == (91.57, 93.89)
