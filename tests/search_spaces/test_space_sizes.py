"""Sizes and layouts by hand."""
from __future__ import annotations

import copy
import pickle

import pytest

from search_spaces.sizes import Segment, Size, candidates, fixed, positions, width
from search_spaces.space import Mixture


def by_expand(expand: int) -> int:
    return 16 * expand


EXPAND = Size(("e",), by_expand)
HEADS = Size(("heads", "dim"), lambda heads, dim: heads * dim)
SOFT = Mixture((2, 3, 6), weights=[0.2, 0.3, 0.5])
PAIR = Mixture((1, 2, 3, 4), weights=[0.1, 0.2, 0.3, 0.4], active=(3, 1))


def test_hard_sizes() -> None:
    assert EXPAND.at({"e": 3, "other": SOFT}) == 48
    assert HEADS.at({"heads": 4, "dim": 8}) == 32
    assert fixed(7).at({}) == 7 and fixed(7).on == () and fixed(7) != fixed(8)
    assert pickle.loads(pickle.dumps(fixed(7))).at({}) == copy.deepcopy(EXPAND).at({"e": 1}) - 9 == 7
    with pytest.raises(ValueError, match="e is a mixture here"):
        EXPAND.at({"e": SOFT})


def test_candidates_are_the_product_over_active_options() -> None:
    assert candidates(EXPAND, {"e": 3}) == [(48, ())]
    assert candidates(fixed(5), {}) == [(5, ())]
    assert candidates(EXPAND, {"e": SOFT}) == [(32, (0,)), (48, (1,)), (96, (2,))]
    assert candidates(HEADS, {"heads": PAIR, "dim": 8}) == [(32, (3,)), (16, (1,))]
    assert candidates(HEADS, {"heads": 5, "dim": Mixture((4, 8), [1, 1])}) == [(20, (0,)), (40, (1,))]
    both = candidates(HEADS, {"heads": PAIR, "dim": Mixture((4, 8), [1, 1])})
    assert both == [(16, (3, 0)), (32, (3, 1)), (8, (1, 0)), (16, (1, 1))]


def test_one_segment_is_a_prefix() -> None:
    layout = (Segment(EXPAND, full=96),)
    assert width(layout, {"e": 2}) == 32 and positions(layout, {"e": 2}) == slice(0, 32)
    assert width(layout, {"e": SOFT}) == 96 and positions(layout, {"e": SOFT}) == slice(0, 96)
    only_small = Mixture((2, 3, 6), [0.2, 0.3, 0.5], active=(0, 1))
    assert width(layout, {"e": only_small}) == 48  # the widest ACTIVE candidate
    flat = (Segment(fixed(3), full=5, repeat=4),)
    assert width(flat, {}) == 12 and positions(flat, {}) == slice(0, 12)


def test_several_segments_start_where_the_full_ones_end() -> None:
    layout = (Segment(Size(("a",), int), full=4), Segment(fixed(2), full=3, repeat=2),
              Segment(Size(("b",), int), full=5))
    arch = {"a": 2, "b": 3}
    assert positions(layout, arch) == [0, 1, 4, 5, 6, 7, 10, 11, 12]
    assert width(layout, arch) == 9
    full = {"a": 4, "b": 5}
    assert positions((layout[0], layout[2]), full) == list(range(9))
