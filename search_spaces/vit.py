"""Vision transformers whose embedding, depth, heads and MLPs are chosen (AutoFormer: Chen, Peng, Fu, Ling, ICCV 2021, arXiv
2107.00651; its spaces as on the page of TangleNAS, section 3).

One embedding width is shared by the whole network. Each layer has its own number of heads, of fixed width, so that q, k and v
have heads * head_dim channels, and its own MLP ratio r: the first int(embed * r) hidden units. Layers beyond the depth are
inert.
"""
from __future__ import annotations

from collections.abc import Sequence

from search_spaces.choice import listed, positive
from search_spaces.sizes import Size
from search_spaces.space import Choice, SearchSpace, require

POOLS = ("mean", "token")


class Transformer:
    """What a space of vision transformers knows besides its choices: the skeleton, and the choices that govern each size.

    ``blocks``: layers of the deepest network. ``image``, ``patch``: pixels of a side. ``tokens``: patches and the class token.
    ``relative_position``: whether keys and values have embeddings of the 2D distance between two tokens. ``pool``: what the
    classifier reads, the "mean" of the patches (as AutoFormer was released) or the class "token".
    """

    blocks: int
    head_dim: int
    patch: int
    image: int
    relative_position: bool
    pool: str

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2 + 1

    def embed_size(self) -> Size:
        """The channels of every token, in all layers."""
        return Size(("embed",), _same)

    def heads_size(self, i: int) -> Size:
        """The channels of q, of k and of v in layer ``i``."""
        return Size((f"layer{i}.heads",), self._heads)

    def hidden_size(self, i: int) -> Size:
        """The hidden units of the MLP in layer ``i``."""
        return Size(("embed", f"layer{i}.ratio"), _hidden)

    def _heads(self, heads: int) -> int:
        return heads * self.head_dim

    def _skeleton(
        self, embed: Sequence[int], depth: Sequence[int], heads: Sequence[int], ratio: Sequence[float], head_dim: int,
        patch: int, image: int, relative_position: bool, pool: str,
    ) -> list[Choice]:  # fmt: skip
        """Sets the attributes; returns the choices: embed, depth, then heads and ratio of each layer."""
        for name, options in (("embed", embed), ("depth", depth), ("heads", heads)):
            for value in _some(name, options):
                positive(name, value)
        if any(isinstance(r, bool) or not r > 0 for r in _some("ratio", ratio)):
            raise ValueError(f"ratio = {listed(ratio)}: give numbers above 0.")
        if int(min(embed) * min(ratio)) < 1:
            raise ValueError(f"ratio = {min(ratio)} leaves an MLP of embed {min(embed)} no hidden unit. Give more of either.")
        self.head_dim, self.patch, self.image = (
            positive(name, value) for name, value in (("head_dim", head_dim), ("patch", patch), ("image", image))
        )
        if image % patch:
            raise ValueError(f"image = {image} is no whole number of patches of {patch} pixels. Choose a patch that divides.")
        require("pool", pool, POOLS)
        self.relative_position, self.pool = bool(relative_position), pool
        depths = tuple(depth)
        self.blocks = max(depths)
        choices = [Choice("embed", tuple(embed)), Choice("depth", depths)]
        for i in range(self.blocks):
            kept = tuple(d for d in depths if d > i)
            needs = (("depth", kept),) if kept != depths else ()
            choices.append(Choice(f"layer{i}.heads", tuple(heads), needs=needs))
            choices.append(Choice(f"layer{i}.ratio", tuple(map(float, ratio)), needs=needs))
        return choices


class ViT(Transformer, SearchSpace):
    """Any options: ``ViT(embed=[16, 24, 32], depth=[1, 2], heads=[1, 2], ratio=[1, 2], head_dim=8, patch=2, image=8)``.

    ``embed``, ``depth``, ``heads``, ``ratio``: ascending options. The rest: see ``Transformer``. Raises ValueError for
    options that are empty, not positive or not ascending, and for a patch that does not divide the image.
    """

    def __init__(
        self, embed: Sequence[int], depth: Sequence[int], heads: Sequence[int], ratio: Sequence[float], head_dim: int = 64,
        patch: int = 16, image: int = 224, relative_position: bool = True, pool: str = "mean",
    ) -> None:  # fmt: skip
        choices = self._skeleton(embed, depth, heads, ratio, head_dim, patch, image, relative_position, pool)
        super().__init__(choices, {
            "embed": list(embed), "depth": list(depth), "heads": list(heads), "ratio": list(map(float, ratio)),
            "head_dim": head_dim, "patch": patch, "image": image, "relative_position": self.relative_position, "pool": pool,
        })  # fmt: skip


class AutoFormer(Transformer, SearchSpace):
    """The published spaces: "tiny", "small" and "base", with heads of 64 channels.

    ``patch``, ``image`` and the rest: see ``Transformer``. Raises ValueError for another ``size``, and as ``ViT`` does.
    """

    SIZES = {  # noqa: RUF012  a constant table: embed, depth, heads, ratio
        "tiny": ((192, 216, 240), (12, 13, 14), (3, 4), (3.5, 4.0)),
        "small": ((320, 384, 448), (12, 13, 14), (5, 6, 7), (3.0, 3.5, 4.0)),
        "base": ((528, 576, 624), (14, 15, 16), (8, 9, 10), (3.0, 3.5, 4.0)),
    }

    def __init__(
        self, size: str = "tiny", patch: int = 16, image: int = 224, relative_position: bool = True, pool: str = "mean"
    ) -> None:
        require("size", size, tuple(self.SIZES))
        choices = self._skeleton(*self.SIZES[size], 64, patch, image, relative_position, pool)
        super().__init__(choices, {
            "size": size, "patch": patch, "image": image, "relative_position": self.relative_position, "pool": pool,
        })  # fmt: skip


def _same(embed: int) -> int:
    return embed


def _hidden(embed: int, ratio: float) -> int:
    return int(embed * ratio)


def _some(name: str, options: Sequence) -> Sequence:
    if isinstance(options, str) or not isinstance(options, Sequence) or not options:
        raise ValueError(f"{name} = {options}: give a list of at least one option.")
    return options
