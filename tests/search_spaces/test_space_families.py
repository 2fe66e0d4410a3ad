"""The contract of every family in this package: a new space is one more line in SPACES. And the README's example."""
from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

import search_spaces
from search_spaces.arch import ArchFile, space_of
from search_spaces.bignas import AttentiveNAS, BigNAS
from search_spaces.channelbench import ChannelMobileNet, ChannelResNet
from search_spaces.darts import AMOEBANET, NASNET, Cells
from search_spaces.macro import ConvMacro
from search_spaces.mobilenet import OFAMobileNetV3, OFAProxyless
from search_spaces.nasbenchmacro import NASBenchMacro
from search_spaces.nasnet import NASNet
from search_spaces.nats import Sizes, Topology
from search_spaces.pooling import PoolingResNet
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.resnet50d import OFAResNet50D
from search_spaces.space import SearchSpace
from search_spaces.vit import AutoFormer, ViT

SPACES: list[SearchSpace] = [
    CifarResNet(8, "tas", widths=(4, 8, 16)), CifarResNet(14, "tied"), CifarResNet(20, "tas"), CifarResNet(32),
    CifarResNet(44), CifarResNet(56), CifarResNet(110, "tas"), CifarResNet(164, "tas"), CifarResNet(164),
    OFAResNet50D(), OFAResNet50D(0.125, (1, 1, 2, 1), (32, 48)),
    ImageNetResNet(18), ImageNetResNet(34, "tas"), ImageNetResNet(50, "tas"), ImageNetResNet(50),
    Topology(), Topology(4, 1), Sizes(), Cells(), Cells(48, 14, "imagenet"), Cells(4, 3, nodes=2, reduce_concat=[3]),
    Cells(4, 3, nodes=3, ops=("none", "skip_connect", "sep_conv_7x7")), Cells.of(NASNET), Cells.of(AMOEBANET, 4, 5),
    NASNet(), NASNet(2, 8, "imagenet", 16, True, blocks=2),
    ConvMacro(), ConvMacro(((2, 3), (3, 4), (4, 6), (5, 8)), (3, 5, 9), 7, (6, 5), 16, 0.25),
    NASBenchMacro(), NASBenchMacro(0.125, (2, 3), 8, compact=False),
    ChannelResNet(), ChannelResNet((6, 9, 3, 6, 9, 12, 6), 3), ChannelMobileNet(), ChannelMobileNet(parts=2),
    PoolingResNet(), PoolingResNet((4, 3, 2), 3, (4, 6, 8)),
    AutoFormer(), AutoFormer("base", 4, 32), ViT([6, 8, 12], [1, 2, 3], [1, 2, 3], [1, 1.5, 2], 4, 2, 8),
    OFAMobileNetV3(), OFAMobileNetV3(1.2, resolution=()), OFAMobileNetV3(0.35, True, (7,), (2, 3), (1, 2, 4), (16, 17)),
    OFAProxyless(), OFAProxyless(0.3, True, (3, 5)), BigNAS(), BigNAS(True, 0.3), AttentiveNAS(),
    AttentiveNAS(True, 0.25, [(1, 2)] * 7, (8, 9)),
]
all_spaces = pytest.mark.parametrize("space", SPACES, ids=str)


@all_spaces
def test_samples_are_legal_and_codes_agree(space: SearchSpace) -> None:
    rng = random.Random(0)
    archs = [space.sample(rng) for _ in range(5)] + [space.largest(), space.smallest()]
    archs += space.decode(space.random_codes(np.random.default_rng(0), 5))
    for arch in archs:
        space.check(arch)
        assert space.canonical(arch) == arch
    assert space.decode(space.encode(archs)) == archs
    assert len({space.key(arch) for arch in archs}) >= 10


@all_spaces
def test_one_architecture_is_a_restriction_of_size_one(space: SearchSpace) -> None:
    arch = space.sample(random.Random(1))
    fixed = space.restrict({name: [arch[name]] for name in space.counting(arch)})
    assert fixed.size == 1 < space.size and fixed.largest() == fixed.smallest() == arch
    assert type(fixed) is type(space) and fixed.root is space


@all_spaces
def test_text_is_one_line_and_reads_back(space: SearchSpace) -> None:
    for arch in (space.sample(random.Random(2)), space.largest(), space.smallest()):
        text = space.text(arch)
        assert "\n" not in text and space.parse(f" {text} ") == arch and list(space.parse(text)) == list(arch)
    for wrong in ("", "x", text[:-1] + "#", text + text):
        with pytest.raises(ValueError) as error:
            space.parse(wrong)
        assert "\n" not in str(error.value)


@all_spaces
def test_skips_and_nones_are_options(space: SearchSpace) -> None:
    for choice in space.choices:
        passing = {*space.skips, *space.nones}
        assert choice.ordered or passing <= set(choice.options) or not passing & set(choice.options)
    none = [choice.name for choice in space.choices for value in space.nones if space.largest()[choice.name] == value]
    assert not none and (not space.nones or {*space.smallest().values()} == {*space.skips})


@all_spaces
def test_what_is_drawn_is_lawful_and_a_rule_of_its_own_forbids_something(space: SearchSpace) -> None:
    rng = random.Random(3)
    sampled = space.encode([space.sample(rng) for _ in range(20)])
    drawn = np.concatenate([space.random_codes(np.random.default_rng(3), 50), sampled])
    assert space.lawful(drawn).shape == (70,) and space.lawful(drawn).all()
    free = SearchSpace.random_codes(space, np.random.default_rng(3), 300)
    ruled = type(space).random_codes is not SearchSpace.random_codes
    assert space.lawful(free).all() != ruled


@all_spaces
def test_name_and_args_rebuild_the_space(space: SearchSpace) -> None:
    file = ArchFile.of(space, space.largest(), input=(3, 8, 8), classes=("a",), preprocess={}, costs={})
    again = space_of(file)
    assert type(again) is type(space) and again.choices == space.choices and again.hash == space.hash


def test_the_readmes_example_runs() -> None:
    readme = Path(search_spaces.__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 1
    scope: dict = {"__name__": "search_spaces.tower"}
    exec(compile(blocks[0], "search_spaces/README.md", "exec"), scope)
    assert scope["space"].name == "tower.Tower" and scope["shallow"].size == 3 + 3**2


def test_the_readmes_map_names_every_file() -> None:
    here = Path(search_spaces.__file__).parent
    readme = (here / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in here.iterdir() if path.suffix in {".py", ".json"}} - {"__init__.py"}
    assert {name for name in re.findall(r"^\| `([^`]+)` \|", readme, re.MULTILINE)} == files
