"""The choices of vision transformers, and the sizes that they mean."""
from __future__ import annotations

import pytest

from search_spaces.vit import AutoFormer, ViT


@pytest.mark.parametrize(("size", "embed", "depth", "heads", "ratio"), [
    ("tiny", (192, 216, 240), (12, 13, 14), (3, 4), (3.5, 4.0)),
    ("small", (320, 384, 448), (12, 13, 14), (5, 6, 7), (3.0, 3.5, 4.0)),
    ("base", (528, 576, 624), (14, 15, 16), (8, 9, 10), (3.0, 3.5, 4.0)),
])
def test_published_choices(size: str, embed: tuple, depth: tuple, heads: tuple, ratio: tuple) -> None:
    space = AutoFormer(size)
    assert [choice.name for choice in space.choices[:4]] == ["embed", "depth", "layer0.heads", "layer0.ratio"]
    assert len(space.choices) == 2 + 2 * depth[-1]
    for choice in space.choices:
        wanted = {"embed": embed, "depth": depth, "heads": heads, "ratio": ratio}[choice.name.rpartition(".")[2]]
        assert choice.options == wanted and choice.ordered
    assert (space.head_dim, space.patch, space.image, space.grid, space.tokens) == (64, 16, 224, 14, 197)
    a_layer = len(heads) * len(ratio)
    assert space.size == len(embed) * sum(a_layer**d for d in depth)


def test_layers_beyond_the_depth_are_inert() -> None:
    space = ViT([6, 8], [1, 3], [1, 2], [1, 2], head_dim=4, patch=2, image=8)
    assert [choice.needs for choice in space.choices] == [(), (), (), (), *4 * [(("depth", (3,)),)]]
    deep = {**space.largest(), "embed": 6}
    shallow = {**deep, "depth": 1}
    assert space.counting(shallow) == {"embed", "depth", "layer0.heads", "layer0.ratio"}
    assert space.key(shallow) == space.key({**shallow, "layer2.heads": 1}) != space.key(deep)
    assert space.size == 2 * (4 + 4**3)


def test_sizes_follow_their_choices() -> None:
    space = AutoFormer("tiny")
    arch = {**space.largest(), "embed": 216, "layer3.ratio": 3.5, "layer3.heads": 3}
    assert space.embed_size().at(arch) == 216
    assert space.heads_size(3).at(arch) == 192 and space.heads_size(4).at(arch) == 256
    assert space.hidden_size(3).at(arch) == 756 and space.hidden_size(4).at(arch) == 864
    odd = ViT([7], [1], [1], [1.5])
    assert odd.hidden_size(0).at(odd.largest()) == 10  # int(7 * 1.5): the first whole units


def test_arguments_rebuild_it_and_ratios_are_real_numbers() -> None:
    space = ViT([6, 8], [1], [1], [1, 2], 4, 2, 8, relative_position=False, pool="token")
    assert space["layer0.ratio"].options == (1.0, 2.0) and space.text(space.largest()).endswith("layer0.ratio=2.0")
    again = ViT(**space.args)
    assert again.hash == space.hash and (again.relative_position, again.pool) == (False, "token")
    assert AutoFormer().hash != AutoFormer("tiny", 4, 32).hash != AutoFormer("tiny", 4, 32, pool="token").hash


@pytest.mark.parametrize(("args", "line"), [
    ({"embed": []}, r"embed = \[\]: give a list of at least one option"),
    ({"embed": [8, 6]}, "embed is ordered, so its options must ascend"),
    ({"depth": [0, 1]}, "depth = 0: give an integer, 1 or more"),
    ({"heads": [1.5]}, r"heads = 1\.5: give an integer"),
    ({"ratio": [0, 1]}, "ratio = 0, 1: give numbers above 0"),
    ({"ratio": [0.1]}, r"ratio = 0\.1 leaves an MLP of embed 6 no hidden unit"),
    ({"head_dim": 0}, "head_dim = 0: give an integer"),
    ({"patch": 3}, "image = 8 is no whole number of patches of 3 pixels"),
    ({"pool": "max"}, r"pool = max is not in this space\. Allowed: mean, token"),
])
def test_refused_arguments(args: dict, line: str) -> None:
    usual: dict = {"embed": [6, 8], "depth": [1], "heads": [1], "ratio": [1], "head_dim": 4, "patch": 2, "image": 8}
    with pytest.raises(ValueError, match=line) as error:
        ViT(**{**usual, **args})
    assert "\n" not in str(error.value)


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size = huge is not in this space\. Allowed: tiny, small, base"):
        AutoFormer("huge")
