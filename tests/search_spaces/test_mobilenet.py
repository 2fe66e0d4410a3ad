"""The spaces of once-for-all, BigNAS and AttentiveNAS: sizes against the oracles by closed form, choices, vectors, texts.

The closed forms count a plain network layer by layer from the sizes that the space declares; no torch, no cost table.
"""
from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from search_spaces.bignas import ATTENTIVE, AttentiveNAS, BigNAS
from search_spaces.inverted import Inverted, make_divisible, squeeze_width
from search_spaces.mobilenet import COMPOUND, SPECIALISED, UNIFORM, OFAMobileNetV3, OFAProxyless, compound
from search_spaces.resnet50d import OFAResNet50D
from search_spaces.sizes import Size
from search_spaces.space import SearchSpace, Value

ORACLES = Path(__file__).resolve().parents[2].parent / "shared" / "oracles"
Arch = Mapping[str, Value]


def oracle(name: str) -> Any:
    """The content of an oracle file; the test skips where the folder is absent."""
    if not (ORACLES / name).is_file():
        pytest.skip(f"{ORACLES / name} is not here")
    return json.loads((ORACLES / name).read_text())


class Count:
    """Adds up the layers of one plain network on ``side`` x ``side`` images."""

    def __init__(self, side: int) -> None:
        self.side, self.macs, self.params = side, 0, 0

    def shrink(self, stride: int) -> None:
        self.side = -(-self.side // stride)

    def conv(self, c_in: int, c_out: int, k: int = 1, stride: int = 1, groups: int = 1, norm: bool = True) -> int:
        self.shrink(stride)
        weights = c_in // groups * c_out * k * k
        self.macs += weights * self.side**2
        self.params += weights + (2 * c_out if norm else 0)
        return c_out

    def linear(self, c_in: int, c_out: int, bias: bool = True) -> int:
        self.macs += c_in * c_out
        self.params += c_in * c_out + (c_out if bias else 0)
        return c_out

    def block(self, c_in: int, mid: int, c_out: int, k: int, stride: int, squeeze: int, expands: bool) -> int:
        if expands:
            self.conv(c_in, mid)
        self.conv(mid, mid, k, stride, groups=mid)
        if squeeze:
            self.linear(self.linear(mid, squeeze), mid)
        return self.conv(mid, c_out)


def inverted(space: Inverted, arch: Arch, side: int, classes: int = 1000) -> tuple[int, int]:
    """(MACs, parameters) of a network of MBConv blocks."""
    def size(wanted: Size | None) -> int:
        return 0 if wanted is None else wanted.at(arch)

    n = Count(side)
    c = n.conv(3, size(space.stem_size()), 3, space.stem_stride)
    if space.first is not None:
        c = n.block(c, c, space.first, 3, 1, 0, False)
    for s, stage in enumerate(space.stages):
        for b in range(int(arch[space.depth_name(s)])):
            assert size(space.in_size(s, b)) == c
            stride = 1 if b else stage.stride
            made = n.block(c, size(space.mid_size(s, b)), size(space.out_size(s)), size(space.kernel_size(s, b)), stride,
                           size(space.squeeze_size(s, b)), space.expands(s))
            if space.projection and c != made:
                n.macs += c * made * n.side**2
                n.params += c * made
            c = made
    c = n.conv(c, size(space.final_size()))
    if space.mix_size() is not None:
        c = n.linear(c, size(space.mix_size()), bias=False)
    n.linear(c, classes)
    return n.macs, n.params


def residual(space: OFAResNet50D, arch: Arch, side: int) -> tuple[int, int]:
    """(MACs, parameters) of a ResNet50D."""
    n = Count(side)
    c = n.conv(3, space.stem_mid_size().at(arch), 3, 2)
    for _ in range(int(arch["stem.depth"])):
        n.conv(c, c, 3)
    c = n.conv(c, space.stem_size().at(arch), 3)
    n.shrink(2)
    for s, stride in enumerate(space.STRIDES):
        for b in range(int(arch[space.depth_name(s)])):
            assert space.in_size(s, b).at(arch) == c
            mid, out = space.mid_size(s, b).at(arch), space.out_size(s).at(arch)
            n.conv(c, mid)
            n.conv(mid, mid, 3, 1 if b else stride)
            n.conv(mid, out)
            if b == 0:
                n.conv(c, out)
            c = out
    n.linear(c, 1000)
    return n.macs, n.params


OFA: dict[str, Any] = {
    "mbv3_w1.0": (OFAMobileNetV3(resolution=()), 9), "mbv3_w1.2": (OFAMobileNetV3(1.2, resolution=()), 1),
    "proxyless_w1.3": (OFAProxyless(), 2), "resnet50": (OFAResNet50D(), 2),
}


@pytest.mark.parametrize("name", OFA)
def test_ofa_to_the_last_digit(name: str) -> None:
    space, least = OFA[name]
    rows = oracle("ofa.json")["supernets"][name]["rows"]
    assert len(rows) >= least - 1
    for row in rows:
        arch = space.arch_of(**row["cfg"])
        count = residual if isinstance(space, OFAResNet50D) else inverted
        assert count(space, arch, row["res"]) == (row["macs_exact"], row["params"]), row["tag"]
        assert space.arch_of(**space.vectors(arch)) == arch
        assert row["tag"] not in ("max", "min") or arch == (space.largest() if row["tag"] == "max" else space.smallest())


def test_uniform_networks() -> None:
    space = OFAMobileNetV3(resolution=())
    for row in oracle("ofa.json")["uniform"]:
        arch = space.arch_of(row["ks"], row["e"], row["d"])
        assert inverted(space, arch, row["res"]) == (row["macs_exact"], row["params"])


def test_kernel_matrices_are_706_numbers_a_slot() -> None:
    found = oracle("ofa.json")["supernets"]["mbv3_w1.0"]
    space = OFAMobileNetV3(resolution=())
    assert found["supernet_kernel_matrix_params"] == 706 * sum(space.slots) == (625 + 81) * 20
    assert found["supernet_params"] == inverted(space, space.largest(), 224)[1] + 706 * 20


@pytest.mark.parametrize("name", SPECIALISED)
def test_specialised_networks_are_architectures_of_the_space(name: str) -> None:
    known = SPECIALISED[name]
    found = [row for row in oracle("ofa.json")["specialized"] if row["name"].startswith(f"pixel1_lat@{name[7:]}_")]
    assert len(found) == 1 and found[0]["image_size"] == known.resolution
    space = OFAMobileNetV3(known.width, resolution=())
    arch = space.parse(name)
    assert inverted(space, arch, known.resolution) == (found[0]["macs_exact"], found[0]["params"])
    first, *blocks = found[0]["blocks"]
    assert first == [space.stem_size().at(arch), space.first, 3, 1, 1, None, space.first_act, 0, int(space.first_residual)]
    mine = []
    for s, stage in enumerate(space.stages):
        for b in range(int(arch[space.depth_name(s)])):
            c, out = space.in_size(s, b).at(arch), space.out_size(s).at(arch)
            mine.append([c, out, space.kernel_size(s, b).at(arch), 1 if b else stage.stride, arch[space.expand_name(s, b)],
                         space.mid_size(s, b).at(arch), stage.act, int(stage.squeeze), int(b > 0)])
    assert mine == blocks
    mix = space.mix_size()
    assert mix is not None and [space.final_size().at(arch), mix.at(arch)] == found[0]["head"]


def test_specialised_names_know_their_space_and_resolution() -> None:
    assert OFAMobileNetV3().parse("pixel1-20ms")["resolution"] == 152
    with pytest.raises(ValueError, match=r"pixel1-79ms is a network of OFAMobileNetV3\(width=1\.2\)"):
        OFAMobileNetV3().parse("pixel1-79ms")
    with pytest.raises(ValueError, match=r"resolution = 240 is not in this space"):
        OFAMobileNetV3(1.2).parse("pixel1-143ms")
    assert OFAMobileNetV3(1.2, resolution=(224, 240)).parse("pixel1-143ms")["resolution"] == 240


def test_compofa() -> None:
    free = OFAMobileNetV3(resolution=())
    space = compound(free)
    assert space.size == 243 and space.root is free
    assert compound(free, elastic_kernel=True).size == sum(3**d for d in (2, 3, 4)) ** 5
    for d, costs in ((2, (124_326_864, 3_426_920)), (3, (231_579_712, 4_515_440))):
        kernels = [k for k in (3, 5, 3, 3, 5) for _ in range(4)]
        arch = free.arch_of(kernels, COMPOUND[d], d)
        space.check(arch)
        assert inverted(space, arch, 224) == costs
    with pytest.raises(ValueError, match=r"stage0\.block0\.expand = 3 is not in this space: it follows stage0\.depth = 4"):
        space.check({**space.largest(), "stage0.block0.expand": 3})
    with pytest.raises(ValueError, match="is not five stages of depths 2, 3, 4"):
        compound(OFAProxyless())


def test_deps_sizes() -> None:
    """The DepS page, section 6: exact at 224, two decimals of a million at 32."""
    large, small = OFAMobileNetV3(kernels=(7,), resolution=()), OFAMobileNetV3(small=True, kernels=(7,))
    assert [inverted(large, arch, 224)[0] for arch in (large.smallest(), large.largest())] == [151_290_192, 566_170_656]
    archs = [small.arch_of(7, e, d) for e, d in UNIFORM]
    macs = [inverted(small, arch, 32, 10)[0] for arch in archs]
    assert [round(n / 1e6, 2) for n in (macs[0], macs[-1])] == [45.09, 179.71] and macs == sorted(macs)
    assert archs[0] == small.smallest() and archs[-1] == small.largest()
    assert small.size == (9 + 27 + 81) ** 5 and small.resolutions == () and small.stem_stride == 1
    assert [stage.stride for stage in small.stages] == [1, 2, 2, 1, 2]


def test_attentivenas_to_the_last_digit() -> None:
    space = AttentiveNAS()
    names = {"attentivenas_a0": "A0", "attentivenas_a1": "A1", "attentivenas_a3": "A3", "attentivenas_a5": "A5",
             "alphanet_a5": "AlphaNet-A5", "min": "A0"}
    rows = oracle("attentivenas.json")["rows"]
    assert {row["tag"] for row in rows} == set(names)
    for row in rows:
        arch = space.arch_of(**row["cfg"])
        assert inverted(space, arch, row["cfg"]["resolution"]) == (row["macs_exact"], row["params_used"])
        assert space.vectors(arch) == row["cfg"]
        assert arch == space.parse(names[row["tag"]]) and space.text(arch) == ATTENTIVE[names[row["tag"]]]
    assert space.smallest() == space.parse("A0")


def test_attentivenas_extremes() -> None:
    space, small = AttentiveNAS(), AttentiveNAS(small=True)
    assert space.vectors(space.largest()) == {
        "resolution": 288, "width": [24, 24, 32, 40, 72, 128, 216, 224, 1984], "depth": [2, 5, 6, 6, 8, 8, 2],
        "kernel_size": [5] * 7, "expand_ratio": [1, 6, 6, 6, 6, 6, 6]}
    assert space.final_size().at(space.smallest()) == 6 * 216 and not space.expands(0) and space.expands(1)
    assert small.resolutions == () and small.stem_stride == 1 and "resolution" not in small.vectors(small.largest())
    assert small.parse("A0") == small.smallest()


def test_bignas_choices() -> None:
    space = BigNAS()
    rows = [(s.widths, s.depths, s.kernels, s.expands, s.stride, s.squeeze) for s in space.stages]
    assert rows == list(BigNAS.TABLE) and space.stem == (32, 40) and space.resolutions == (192, 224, 288, 320)
    assert space.size == 2 * (2 * 2) * (2 * 2) * (2 * 2 * 2) * (2 * 3 * 2) * (3 * 5 * 2) * (4 * 5 * 2) * (5 * 2 * 2) * 17 * 4
    arch = space.largest()
    assert space.mid_size(0, 0).at(arch) == 40 and space.mid_size(1, 0).at(arch) == 6 * 24 and space.mix_size() is None
    assert space.final_size().at(arch) == 1408 and space.squeeze_size(1, 1) is not None


def test_bignas_costs() -> None:
    """Measured by the page's author (section 6: 219.38 M at 192, 1899.8 M at 320), which settles its head: one convolution."""
    space = BigNAS()
    macs = inverted(space, space.smallest(), 192)[0], inverted(space, space.largest(), 320)[0]
    assert (round(macs[0] / 1e6, 2), round(macs[1] / 1e6, 1)) == (219.38, 1899.8)


SPACES: list[SearchSpace] = [
    OFAMobileNetV3(), OFAMobileNetV3(1.2), OFAMobileNetV3(0.35, True, (7,)), OFAMobileNetV3(0.1, True, (3, 5), (2, 3), (1, 2)),
    OFAProxyless(), OFAProxyless(0.25, True, resolution=[16, 24]), BigNAS(), BigNAS(True, 0.25, [[1, 2]] * 7), AttentiveNAS(),
    AttentiveNAS(True), AttentiveNAS(True, 0.25, [[1, 2]] * 7, [24, 32]), OFAResNet50D(),
    OFAResNet50D(0.1, (1, 1, 2, 1), (32, 48)),
]
all_spaces = pytest.mark.parametrize("space", SPACES, ids=str)


@all_spaces
def test_vectors_texts_and_args_read_back(space: Any) -> None:
    rng = random.Random(0)
    for arch in [space.sample(rng) for _ in range(20)] + [space.largest(), space.smallest()]:
        space.check(arch)
        assert space.arch_of(**space.vectors(arch)) == arch == space.parse(space.text(arch))
    again = type(space)(**json.loads(json.dumps(space.args)))
    assert again.hash == space.hash and again.choices == space.choices and repr(again) == repr(space)


@all_spaces
def test_sizes_name_two_choices_at_most_and_none_is_above_the_largest(space: Any) -> None:
    """With depth and resolution, no term of the cost names over four choices but the depthwise ones of AttentiveNAS (five)."""
    rng = random.Random(1)
    big = space.largest()
    slots = [stage.blocks for stage in space.stages] if isinstance(space, Inverted) else space.slots
    for s, blocks in enumerate(slots):
        for b in range(blocks):
            sizes = [space.in_size(s, b), space.mid_size(s, b), space.out_size(s)]
            if isinstance(space, Inverted):
                sizes += [size for size in (space.squeeze_size(s, b), space.kernel_size(s, b)) if size is not None]
            for size in sizes:
                assert len(size.on) <= 2
                assert size.at(space.sample(rng)) <= size.at(big)


def test_inert_blocks_change_neither_key_nor_vectors_nor_cost() -> None:
    space = OFAMobileNetV3(resolution=())
    slots = sum(space.slots)
    rng = random.Random(2)
    ks, e, d = rng.choices((3, 5, 7), k=slots), rng.choices((3, 4, 6), k=slots), [3, 2, 4, 2, 3]
    other_ks, other_e = list(ks), list(e)
    for s, depth in enumerate(d):
        for b in range(depth, 4):
            other_ks[4 * s + b], other_e[4 * s + b] = 7, 6
    assert (other_ks, other_e) != (ks, e)
    arch, other = space.arch_of(ks, e, d), space.arch_of(other_ks, other_e, d)
    assert arch == other and space.vectors(arch) == space.vectors(other)
    assert space.counting(arch) == {choice.name for choice in space.choices} - {
        f"stage{s}.block{b}.{of}" for s, depth in enumerate(d) for b in range(depth, 4) for of in ("kernel", "expand")}
    assert space.size == sum(9**depth for depth in (2, 3, 4)) ** 5


def test_published_resolutions() -> None:
    assert OFAMobileNetV3().resolutions == tuple(range(128, 225, 4)) and len(OFAMobileNetV3().resolutions) == 25
    assert OFAMobileNetV3(1.2).resolutions == tuple(range(160, 225, 4))
    assert AttentiveNAS().resolutions == (192, 224, 256, 288) and OFAProxyless().resolutions == OFAResNet50D().resolutions == ()
    assert OFAMobileNetV3(resolution=range(128, 225, 4)).hash == OFAMobileNetV3().hash  # published ones go unsaid


def test_proxyless_widths_and_its_inert_depth() -> None:
    space = OFAProxyless()
    widths = [space.stem_size(), *(space.out_size(s) for s in range(6)), space.final_size()]
    assert [size.at(space.largest()) for size in widths] == [40, 32, 56, 104, 128, 248, 416, 1664] and space.first == 24
    assert space.slots == (4, 4, 4, 4, 4, 1) and space.arch_of(7, 6, [4] * 5 + [2]) == space.largest()


def test_resnet50d_widths() -> None:
    space = OFAResNet50D()
    assert [space[f"stage{s}.width"].options for s in range(4)] == [
        (168, 208, 256), (336, 408, 512), (664, 816, 1024), (1328, 1640, 2048)]
    assert space["stem.mid"].options == (24, 32) and space["stem.width"].options == (40, 48, 64)
    assert space.slots == (4, 4, 6, 4) and space["stage2.depth"].options == (4, 5, 6)
    assert space.mid_size(3, 0).at(space.largest()) == make_divisible(round(2048 * 0.35)) == 720
    assert space.vectors(space.arch_of([1, 0, 2, 1, 0], [0.25] * 18, [1, 2, 0, 1, 2, 0]))["d"] == [0, 0, 2, 1, 0]
    assert space.arch_of([0] * 5, [0.2] * 18, [1, 0, 0, 0, 0, 0]) == space.smallest()  # 32 * 0.65 and 32 * 0.8 are both 24


@pytest.mark.parametrize(("v", "n"), [
    (1, 8), (8.8, 8), (10, 16), (11.9, 16), (12, 16), (19.2, 24), (41.6, 40), (166.4, 168), (249.6, 248),
])
def test_make_divisible(v: float, n: int) -> None:
    assert make_divisible(v) == n and n % 8 == 0 and n >= 0.9 * v


def test_squeeze_width() -> None:
    assert [squeeze_width(mid) for mid in (8, 72, 120, 960)] == [8, 24, 32, 240]


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (OFAMobileNetV3, {"width": 0}, r"width = 0: give a number above 0"),
    (OFAMobileNetV3, {"kernels": [3, 4]}, r"kernels = 3, 4: give odd integers, 1 or more"),
    (OFAMobileNetV3, {"expands": [1, 2]}, r"expands = 1, 2: give integers, 2 or more"),
    (OFAMobileNetV3, {"depths": []}, r"depths = \[\]: give a list of at least one option"),
    (OFAMobileNetV3, {"depths": [3, 2]}, r"stage0\.depth is ordered, so its options must ascend"),
    (OFAProxyless, {"resolution": [0]}, r"resolution = 0: give an integer, 1 or more"),
    (BigNAS, {"depths": [[1]]}, r"depths = \[\[1\]\]: give 7 lists"),
    (AttentiveNAS, {"width": True}, r"width = True: give a number above 0"),
    (OFAResNet50D, {"base": [1, 2]}, r"base = 1, 2: give four numbers of blocks"),
]


@pytest.mark.parametrize(("space", "args", "line"), WRONG)
def test_refused_arguments(space: Any, args: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        space(**args)
    assert "\n" not in str(error.value)


MBV3, ATTENTIVE_SPACE = OFAMobileNetV3(resolution=()), AttentiveNAS()
CALLS: list[tuple[Any, str]] = [
    (lambda: MBV3.arch_of([3] * 19, 3, 2), r"ks has 19 entries; .* needs 20, or one number for all"),
    (lambda: MBV3.arch_of(4, 3, 2), r"stage0\.block0\.kernel = 4 is not in this space\. Allowed: 3, 5, 7"),
    (lambda: MBV3.arch_of(3, 3, 2, 224), r"resolution = 224 is no choice"),
    (lambda: OFAMobileNetV3().arch_of(3, 3, 2), "says no resolution"),
    (lambda: MBV3.parse("3e3/3e3"), "has 2 stages"),
    (lambda: MBV3.parse("3e3,3"), "is not a chain of blocks"),
    (lambda: MBV3.parse("/".join(["3e3"] * 5)), r"stage0\.depth = 1 is not in this space\. Allowed: 2, 3, 4"),
    (lambda: ATTENTIVE_SPACE.parse("16/16x1k3e1"), "is not an architecture of"),
    (lambda: ATTENTIVE_SPACE.parse(ATTENTIVE["A0"].replace("@192", "")), "says no resolution"),
    (lambda: ATTENTIVE_SPACE.parse(ATTENTIVE["A0"].replace("16x1k3", "16x1k7")), r"stage0\.kernel = 7 is not in this space"),
    (lambda: ATTENTIVE_SPACE.arch_of([16], [1], [3], [1], 192), "width has 1 entries"),
    (lambda: OFAResNet50D().arch_of([3, 0, 0, 0, 0], [0.2] * 18, [0] * 6), r"d\[0\] = 3 is not in this space"),
    (lambda: OFAResNet50D().arch_of([0] * 5, [0.2] * 18, [0] * 6, 224), "Allowed: none, the images say"),
]


@pytest.mark.parametrize(("call", "line"), CALLS)
def test_refused_vectors_and_texts(call: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        call()
    assert "\n" not in str(error.value)
