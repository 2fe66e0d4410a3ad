"""The space of ProxylessNAS: its skeleton, which blocks may be left out, and what is refused."""
from __future__ import annotations

import random

import pytest

from search_spaces.arch import ArchFile, space_of
from search_spaces.mobilenet import OFAProxyless
from search_spaces.proxyless import KERNELS, ZERO, ProxylessNAS


def test_six_operations_and_zero_where_there_is_a_shortcut() -> None:
    """Page fewshot-gm.md, section 2c: six operations, or seven with zero. The first block of a stage has no shortcut."""
    space = ProxylessNAS()
    assert len(space.choices) == 21 and space.size == 6**6 * 7**15
    for choice in space.choices:
        first = choice.name.endswith("block0")
        assert choice.options == (*KERNELS, *([] if first else [ZERO])) and not choice.ordered
    assert KERNELS == {"mbconv3_3x3": (3, 3), "mbconv6_3x3": (3, 6), "mbconv3_5x5": (5, 3), "mbconv6_5x5": (5, 6),
                       "mbconv3_7x7": (7, 3), "mbconv6_7x7": (7, 6)}  # fmt: skip


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("width", [1.0, 1.3])
def test_the_skeleton_is_that_of_ofa_proxyless(width: float, small: bool) -> None:
    space, ofa = ProxylessNAS(width, small), OFAProxyless(width, small)
    assert (space.stem, space.first, space.stem_stride) == (ofa.stem[0], ofa.first, ofa.stem_stride)
    assert space.final == ofa.final_size().of()
    for stage, theirs in zip(space.places, ofa.stages):
        assert len(stage) == theirs.blocks and stage[0].stride == theirs.stride
        assert {place.c_out for place in stage} == set(theirs.widths) and {place.stride for place in stage[1:]} <= {1}


def test_where_widths_agree_by_rounding_the_first_block_has_a_shortcut_too() -> None:
    place = ProxylessNAS(0.2, small=True).places[0][0]
    assert (place.c_in, place.c_out, place.stride, place.shortcut) == (8, 8, 1, True)
    assert ProxylessNAS(0.2).places[0][0].shortcut is False  # of stride 2


def test_architectures_are_written_and_read() -> None:
    space = ProxylessNAS(0.5, True, (1, 2, 1, 1, 1, 1))
    arch = space.sample(random.Random(3))
    assert space.parse(space.text(arch)) == arch
    file = ArchFile.of(space, arch, input=(3, 8, 8), classes=("a", "b"), preprocess={}, costs={}, metrics={}, provenance={})
    again = space_of(file)
    assert again.hash == space.hash and again.args == {"width": 0.5, "small": True, "blocks": [1, 2, 1, 1, 1, 1]}
    assert ProxylessNAS().args == {"width": 1.0}
    assert set(space.largest().values()) == {"mbconv6_7x7"} and set(space.smallest().values()) == {"mbconv3_3x3"}


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks = \[4, 4\]: give a number for each of the 6 stages"):
        ProxylessNAS(blocks=(4, 4))
    with pytest.raises(ValueError, match="blocks"):
        ProxylessNAS(blocks=(4, 4, 4, 4, 0, 1))
    with pytest.raises(ValueError, match="width = 0: give a number above 0"):
        ProxylessNAS(0)
