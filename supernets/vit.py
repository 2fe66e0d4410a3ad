"""The supernet of search_spaces.vit: vision transformers whose embedding, depth, heads and MLPs are chosen (AutoFormer, Chen et
al., ICCV 2021, arXiv 2107.00651), by slices (SPOS, as published) or superposed (TangleNAS).

Letters: ``B`` batch, ``N`` tokens (the class token first), ``e`` embed. Layers normalise first: x + attention(norm(x)), then
x + mlp(norm(x)). The first layers are kept.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from search_spaces.sizes import Segment, fixed
from search_spaces.space import Mixture, SearchSpace
from search_spaces.vit import AutoFormer
from search_spaces.vit import ViT as Space
from supernets.attention import Attention, Mlp
from supernets.elastic import Arch, Leaf
from supernets.extract import DropPath
from supernets.layers import Layer, When, known_view
from supernets.mixing import Candidate, active, blend
from supernets.sorting import Moved
from supernets.tokens import Patches, TokenLinear, TokenNorm


class Block(nn.Module):
    """One layer. Its share of the strength of drop path (``DropPath``) grows linearly from 0 in the first layer to all in the
    last of the space's deepest network, as AutoFormer's linspace does: a shallower one ends before it."""

    def __init__(self, space: Space | AutoFormer, i: int, embed: Segment, norm: str, both_sides: bool) -> None:
        super().__init__()
        largest = space.root.largest()
        heads, hidden = (Segment(size, size.at(largest)) for size in (space.heads_size(i), space.hidden_size(i)))
        self.norm0 = TokenNorm(embed, norm)
        self.attention = Attention(embed, heads, space.head_dim, space.grid, space.relative_position, both_sides)
        self.norm1 = TokenNorm(embed, norm)
        self.mlp = Mlp(embed, hidden, both_sides)
        self.drop_path = DropPath(i / max(1, space.blocks - 1))

    def forward(self, x: Tensor, arch: Arch, drop: Any = None) -> Tensor:
        """(B, N, e) -> the same. ``drop``: strength of drop path; None where there is none, also in a trace."""
        for norm, branch in ((self.norm0, self.attention), (self.norm1, self.mlp)):
            y = branch(norm(x, arch), arch)
            x = x + (y if drop is None else self.drop_path(y, drop))
        return x


class ViT(nn.Module):
    """The supernet of a ViT or AutoFormer space.

    ``channels``: of the input image. ``classes``: outputs. ``norm``: what a layer norm of a mixture normalises, "masked"
    (every candidate its own channels) or "full" (see ``TokenNorm``). ``both_sides``: see ``Superposed``. A mixture of depths
    is the sum of the outputs after each of them. ``forward(x, arch, drop)``: ``drop`` is the strength of drop path.
    """

    def __init__(
        self, space: Space | AutoFormer, channels: int = 3, classes: int = 10, norm: str = "masked", both_sides: bool = True
    ) -> None:
        super().__init__()
        self.space = space
        embed = Segment(space.embed_size(), int(space.root["embed"].options[-1]))
        self.patches = Patches(channels, embed, space.image, space.patch)
        self.blocks = nn.ModuleList(Block(space, i, embed, norm, both_sides) for i in range(space.blocks))
        self.norm = TokenNorm(embed, norm)
        self.classifier = TokenLinear(embed, Segment(fixed(classes), classes), 1, both_sides)
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, image, image) -> logits (B, classes)."""
        return self._run(x, arch, drop if drop and self.training else None)[0]

    def tapped(self, x: Tensor, arch: Arch, drop: float) -> tuple[Tensor, Tensor]:
        """Logits, and the tokens (B, N, e) before the last norm, which no head reads (``supernets.extract.Tapped``)."""
        return self._run(x, arch, drop)

    def head(self, features: tuple[int, int, int]) -> nn.Module:
        """ValueError: a vision transformer is trained without an auxiliary head."""
        raise ValueError("a vision transformer has no auxiliary head: train it with auxiliary 0; drop_path works.")

    def _run(self, x: Tensor, arch: Arch, drop: Any) -> tuple[Tensor, Tensor]:
        x = self._layers(self.patches(x, arch), arch, drop)
        y = self.norm(x, arch)
        y = y[:, 1:].mean(1) if self.space.pool == "mean" else y[:, 0]
        return self.classifier(y, arch), x

    def _layers(self, x: Tensor, arch: Arch, drop: Any) -> Tensor:
        """The first ``depth`` layers; of a mixture, the sum of the taps after each active depth."""
        depth, blocks = arch["depth"], list(cast(Iterable[Block], self.blocks))
        if not isinstance(depth, Mixture):
            if not 1 <= int(depth) <= len(blocks):
                raise ValueError(f"a ViT of this space cannot keep {depth} layers. Allowed: 1 to {len(blocks)}.")
            for block in blocks[: int(depth)]:
                x = block(x, arch, drop)
            return x
        if depth.idle == "gate":
            raise ValueError("idle='gate' runs candidates again in the backward pass; the taps of all depths are one pass.")
        taps: dict[int, Tensor] = {}
        wanted = {int(depth.options[j]) for j in active(depth)}
        for i, block in enumerate(blocks[: max(wanted, default=0)]):
            x = block(x, arch, drop)
            if i + 1 in wanted:
                taps[i + 1] = x
        candidates: list[Candidate | None] = [lambda _, w, d=int(d): (taps[d], w) for d in depth.options]  # type: ignore[misc]
        return blend(candidates, x, depth)

    # -- readings ---------------------------------------------------------------------------------------------------

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term; all views are the plain network's.

        MACs are those of convolution and linear layers: the products inside of attention are not counted (published figures
        often have them), class token, positions and tables cost parameters alone. ValueError for another image size.
        """
        known_view(view)
        if tuple(input_size) != (self.space.image, self.space.image):
            h, w = input_size
            raise ValueError(
                f"this space has positions for images of {self.space.image} x {self.space.image} pixels, given: {h} x {w}. "
                f"Set the space's image (and a patch that divides it), or load images of that size."
            )
        hw = (1, self.space.tokens)
        records = self.patches.layers((self.space.grid, self.space.grid))
        for i, block in enumerate(cast(Iterable[Block], self.blocks)):
            there = When(("depth",), lambda depth, i=i: depth > i) if i else None
            for leaf in (block.norm0, block.attention, block.norm1, block.mlp):
                records += leaf.layers(hw, there)
        return [*records, *self.norm.layers(hw), *self.classifier.layers((1, 1))]

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """The layers that only the deepest option of ``depth`` runs (any option: those that not all run)."""
        if choice != "depth":
            return []
        options, blocks = [int(d) for d in self.space.root["depth"].options], list(self.blocks)
        if option is None:
            return [p for block in blocks[options[0] :] for p in block.parameters()]
        shared = max((d for d in options if d != option), default=0)
        return [p for block in blocks[shared : max(int(option), shared)] for p in block.parameters()]

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: all widths train from the first step, each channel in its place; none waits to be chosen (AutoFormer)."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def build(space: Space | AutoFormer, channels: int, classes: int) -> ViT:
    """The supernet that serves an arch.json of this module's spaces."""
    return ViT(space, channels, classes)
