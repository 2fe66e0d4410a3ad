"""The widths of pre-activation ResNets: which choices there are, and how many channels each may keep."""
from __future__ import annotations

import math
import random

import numpy as np
import pytest

from search_spaces.arch import ArchFile, space_of
from search_spaces.preresnet import PreResNet
from search_spaces.resnet import Stage


def test_names_order_and_options() -> None:
    space = PreResNet(20, widths=(2, 3, 5))
    assert [(choice.name, choice.options[-1]) for choice in space.choices] == [
        ("stage0.block0.norm0.width", 2), ("stage0.block0.norm1.width", 2), ("stage0.block0.norm2.width", 2),
        ("stage0.block1.norm0.width", 8), ("stage0.block1.norm1.width", 2), ("stage0.block1.norm2.width", 2),
        ("stage1.block0.norm0.width", 8), ("stage1.block0.norm1.width", 3), ("stage1.block0.norm2.width", 3),
        ("stage1.block1.norm0.width", 12), ("stage1.block1.norm1.width", 3), ("stage1.block1.norm2.width", 3),
        ("stage2.block0.norm0.width", 12), ("stage2.block0.norm1.width", 5), ("stage2.block0.norm2.width", 5),
        ("stage2.block1.norm0.width", 20), ("stage2.block1.norm1.width", 5), ("stage2.block1.norm2.width", 5),
        ("final.width", 20),
    ]  # fmt: skip
    for choice in space.choices:
        assert choice.options == tuple(range(1, len(choice.options) + 1)) and choice.ordered and choice.needs == ()


def test_resnet_164_is_network_slimmings() -> None:
    """Its configuration: 16 16 16, 17 x (64 16 16), 64 32 32, 17 x (128 32 32), 128 64 64, 17 x (256 64 64), 256."""
    expected: list[int] = []
    before = 16
    for width in (16, 32, 64):
        expected += [before, width, width] + 17 * [4 * width, width, width]
        before = 4 * width
    space = PreResNet()
    assert [choice.options[-1] for choice in space.choices] == [*expected, 256]
    assert sum(len(choice.options) for choice in space.choices) == 12112
    assert space.stages == (Stage(18, 16, 1), Stage(18, 32, 2), Stage(18, 64, 2)) and space.stem == 16
    assert space.args == {"depth": 164} and space.name == "preresnet.PreResNet"


def test_size_and_extremes() -> None:
    space = PreResNet(11, widths=(2, 3, 5))
    assert space.size == math.prod([2, 2, 2, 8, 3, 3, 12, 5, 5, 20])
    assert PreResNet().size == math.prod(len(choice.options) for choice in PreResNet().choices)
    assert set(space.smallest().values()) == {1} and list(space.largest().values()) == [2, 2, 2, 8, 3, 3, 12, 5, 5, 20]


def test_the_sizes_name_the_choices() -> None:
    space = PreResNet(20, widths=(2, 3, 5))
    names = [space.norm_size(s, b, c).on[0] for s in range(3) for b in range(2) for c in range(3)]
    assert [*names, space.final_size().on[0]] == [choice.name for choice in space.choices]
    assert space.norm_size(1, 1, 0).at(space.largest()) == 12 == space.channels(1, 1, 0) == space.stream(1)
    assert space.final_size().at(space.smallest() | {"final.width": 7}) == 7


def test_it_is_a_space() -> None:
    space = PreResNet(11, widths=(2, 3, 5))
    archs = [space.sample(random.Random(seed)) for seed in range(4)]
    archs += space.decode(space.random_codes(np.random.default_rng(0), 4))
    assert space.decode(space.encode(archs)) == archs and len({space.key(arch) for arch in archs}) == 8
    for arch in archs:
        space.check(arch)
    few = space.restrict({"final.width": [5, 20]})
    assert few["final.width"].options == (5, 20) and few.root is space and few.stages is space.stages
    file = ArchFile.of(space, archs[0], input=(3, 8, 8), classes=("a",), preprocess={}, costs={})
    again = space_of(file)
    assert type(again) is PreResNet and again.choices == space.choices and again.hash == space.hash
    assert PreResNet(widths=[16, 32, 64]).hash == PreResNet().hash != PreResNet(155).hash


@pytest.mark.parametrize(("args", "line"), [
    ({"depth": 112}, r"depth = 112 is not in this space\. Allowed: 9n \+ 2, .* Nearest: 110\."),
    ({"depth": 2}, r"depth = 2 is not in this space\. .* Nearest: 11\."),
    ({"depth": 163}, r"Nearest: 164\."),
    ({"depth": 0}, r"depth = 0: give an integer, 1 or more"),
    ({"widths": (16, 32)}, r"widths = \[16, 32\]: give 3 positive integers"),
    ({"widths": (16, 0, 64)}, r"widths = 0: give an integer, 1 or more"),
])
def test_refused_arguments(args: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        PreResNet(**args)
    assert "\n" not in str(error.value)
