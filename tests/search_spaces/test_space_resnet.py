"""The residual spaces against section 2 of the TAS page (the lists below are typed from the paper's table)."""
from __future__ import annotations

import math

import pytest

from search_spaces.resnet import CifarResNet, ImageNetResNet, Stage, cifar_depths, imagenet_depths, width_options

WIDTHS = {  # full -> candidates
    16: "4 6 8 9 11 12 14 16", 256: "76 102 128 153 179 204 230 256",
    32: "9 12 16 19 22 25 28 32", 512: "153 204 256 307 358 409 460 512",
    64: "19 25 32 38 44 51 57 64", 1024: "307 409 512 614 716 819 921 1024",
    128: "38 51 64 76 89 102 115 128", 2048: "614 819 1024 1228 1433 1638 1843 2048",
}


@pytest.mark.parametrize("full", WIDTHS)
def test_width_lists(full: int) -> None:
    assert width_options(full) == tuple(int(word) for word in WIDTHS[full].split())
    assert width_options(full) == tuple(sorted({int(full * r / 10) for r in range(3, 11)}))


def test_tiny_widths_stay_positive_and_distinct() -> None:
    assert width_options(4) == (1, 2, 3, 4) and width_options(2) == (1, 2) and width_options(1) == (1,)
    assert width_options(10) == (3, 4, 5, 6, 7, 8, 9, 10)  # 10 * 0.7 and the like must not fall short


def test_depth_lists() -> None:
    assert [cifar_depths(n) for n in (1, 2, 3, 5, 9)] == [(1,), (1, 2), (1, 2, 3), (1, 3, 5), (1, 3, 5, 7, 9)]
    assert cifar_depths(7) == (1, 3, 5, 7)
    assert cifar_depths(18) == (1, 3, 5, 7, 9, 11, 13, 15, 17, 18)
    assert [imagenet_depths(n, 3) for n in (3, 4, 6, 3)] == [(1, 2, 3), (1, 2, 4), (2, 4, 6), (1, 2, 3)]
    assert imagenet_depths(2, 2) == (1, 2)


@pytest.mark.parametrize(("depth", "alpha", "beta"), [(20, 19, 3), (32, 31, 3), (56, 55, 5), (110, 109, 10)])
def test_logit_shapes_of_the_paper(depth: int, alpha: int, beta: int) -> None:
    space = CifarResNet(depth, "tas")
    widths = [choice for choice in space.choices if choice.name.endswith("width")]
    depths = [choice for choice in space.choices if choice.name.endswith("depth")]
    assert len(widths) == alpha and {len(choice.options) for choice in widths} == {8}
    assert len(depths) == 3 and {len(choice.options) for choice in depths} == {beta}


def test_sizes_in_closed_form() -> None:
    def tas(depths: tuple[int, ...]) -> int:  # one width for the stem; 2 widths a kept block
        return 8 * sum(8 ** (2 * d) for d in depths) ** 3

    assert CifarResNet(20, "tas").size == tas((1, 2, 3))
    assert CifarResNet(110, "tas").size == tas(cifar_depths(18)) > 10**60
    assert CifarResNet(56, "tied").size == (8 * sum(8**d for d in (1, 3, 5, 7, 9))) ** 3
    bottleneck = sum(8 ** (2 * d) for d in (1, 2, 3)), sum(8 ** (2 * d) for d in (1, 2, 4)), sum(
        8 ** (2 * d) for d in (2, 4, 6))
    assert ImageNetResNet(50, "tied").size == 8 * 8**4 * math.prod(bottleneck) * bottleneck[0]
    assert CifarResNet(20, "tas").restrict({"stage0.depth": [1], "stem.width": [4]}).size == (
        8**2 * sum(8 ** (2 * d) for d in (1, 2, 3)) ** 2)


def test_names_and_order_tas() -> None:
    names = [choice.name for choice in CifarResNet(14, "tas").choices]
    assert names[:7] == ["stem.width", "stage0.depth", "stage0.block0.conv0.width", "stage0.block0.conv1.width",
                         "stage0.block1.conv0.width", "stage0.block1.conv1.width", "stage1.depth"]
    assert len(names) == 1 + 3 * 5
    deep = CifarResNet(164, "tas")
    assert [deep[f"stage1.block17.conv{c}.width"].options[-1] for c in range(3)] == [32, 32, 128]
    assert deep["stem.width"].options[-1] == 16 and len(deep.choices) == 1 + 3 * (1 + 18 * 3)


def test_names_and_order_tied() -> None:
    assert [choice.name for choice in CifarResNet(14).choices][:5] == [
        "stage0.width", "stage0.depth", "stage0.block0.conv0.width", "stage0.block1.conv0.width", "stage1.width"]
    names = [choice.name for choice in ImageNetResNet(50).choices]
    assert names[:5] == ["stem.width", "stage0.width", "stage0.depth", "stage0.block0.conv0.width",
                         "stage0.block0.conv1.width"]
    assert ImageNetResNet(50)["stage0.width"].options[-1] == 256
    assert ImageNetResNet(50)["stage3.width"].options[-1] == 2048
    assert not any(name.endswith("conv2.width") for name in names)


def test_blocks_need_depth() -> None:
    space = ImageNetResNet(50, "tas")
    assert space["stage2.block0.conv0.width"].needs == (("stage2.depth", (2, 4, 6)),)
    assert space["stage2.block3.conv2.width"].needs == (("stage2.depth", (4, 6)),)
    tied = CifarResNet(20)
    assert tied["stage1.block2.conv0.width"].needs == (("stage1.depth", (3,)),)
    assert tied["stage1.width"].needs == ()
    arch = tied.largest() | {"stage1.depth": 1}
    assert tied.canonical(arch)["stage1.block1.conv0.width"] == 9 and tied.canonical(arch)["stage1.width"] == 32


def test_the_skeleton() -> None:
    space = CifarResNet(32, "tas", widths=(4, 8, 16))
    assert space.stages == (Stage(5, 4, 1), Stage(5, 8, 2), Stage(5, 16, 2))
    assert (space.expansion, space.convs, space.stem, space.kind) == (1, 2, 4, "tas")
    assert (CifarResNet(164).expansion, CifarResNet(164).convs, CifarResNet(164).stem) == (4, 3, 16)
    assert ImageNetResNet(34).stages == (Stage(3, 64, 1), Stage(4, 128, 2), Stage(6, 256, 2), Stage(3, 512, 2))
    assert space.restrict({"stage0.depth": [1]}).stages is space.stages


def test_sizes_name_the_choice_that_governs() -> None:
    tas, tied = CifarResNet(20, "tas"), CifarResNet(20, "tied")
    assert tas.stem_size().on == ("stem.width",) and tied.stem_size().on == ("stage0.width",)
    assert ImageNetResNet(50).stem_size().on == ("stem.width",)
    assert ImageNetResNet(18).stem_size().on == ("stage0.width",)
    assert tas.conv_size(1, 2, 1).on == ("stage1.block2.conv1.width",)
    assert tied.conv_size(1, 2, 1).on == ("stage1.width",)
    assert tied.conv_size(1, 2, 0).on == ("stage1.block2.conv0.width",)
    assert ImageNetResNet(50).conv_size(3, 0, 2).on == ("stage3.width",)
    assert ImageNetResNet(50).conv_size(3, 0, 1).on == ("stage3.block0.conv1.width",)
    assert tied.conv_size(2, 0, 1).at(tied.smallest()) == 19
    assert tas.depth_name(2) == "stage2.depth"
    for space in (tas, tied, CifarResNet(164), ImageNetResNet(50, "tas"), ImageNetResNet(50)):
        named = {space.stem_size().on[0]} | {space.depth_name(s) for s in range(len(space.stages))}
        named |= {space.conv_size(s, b, c).on[0] for s, stage in enumerate(space.stages)
                  for b in range(stage.blocks) for c in range(space.convs)}
        assert named == {choice.name for choice in space.choices}  # no more, no less


def test_args_rebuild_the_space() -> None:
    assert CifarResNet(20).args == {"depth": 20, "kind": "tied"} and CifarResNet(20).name == "resnet.CifarResNet"
    assert CifarResNet(20, widths=[16, 32, 64]).hash == CifarResNet(20).hash
    small = CifarResNet(8, "tas", widths=(4, 8, 8))
    assert small.args == {"depth": 8, "kind": "tas", "widths": [4, 8, 8]}
    assert CifarResNet(**small.args).hash == small.hash != CifarResNet(8, "tas").hash


@pytest.mark.parametrize(("kind", "args", "line"), [
    (CifarResNet, {"depth": 21}, r"depth = 21 is not .* Allowed: 8, 14, 20, 32, 44, 56, 110, 164. Nearest: 20"),
    (ImageNetResNet, {"depth": 101}, r"depth = 101 is not in this space. Allowed: 18, 34, 50. Nearest: 50"),
    (CifarResNet, {"depth": 20, "kind": "ties"}, r"kind = ties is not .* Allowed: tied, tas. Nearest: tied"),
    (CifarResNet, {"depth": 20, "widths": [4, 8]}, r"widths = \[4, 8\]: give 3 positive integers"),
    (ImageNetResNet, {"depth": 18, "widths": [4, 8, 0, 4]}, r"give 4 positive integers"),
])
def test_refused_arguments(kind: type, args: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        kind(**args)
