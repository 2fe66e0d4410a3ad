"""Elastic multi-head attention with the relative positions of AutoFormer, and the MLP beside it.

Letters: ``B`` batch, ``N n m`` tokens (the class token first), ``h`` heads, ``d`` channels of a head, ``g`` patches along one
side, ``e`` embed. Relative positions as in Wu et al., ICCV 2021 (arXiv 2107.14222), in the form that AutoFormer was released
with: keys and values each have one table for vertical and one for horizontal distances, up to 14 patches; row 0 is the class
token's.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from search_spaces.sizes import Segment, Size
from supernets.elastic import Arch, Leaf
from supernets.layers import Layer, Shape, When, term
from supernets.superpose import reach
from supernets.tokens import TokenLinear, draw

FARTHEST = 14
ROWS = 2 * FARTHEST + 2
"""Of one table: the class token, then the distances -14 .. 14."""


def distances(table: Tensor, g: int) -> Tensor:  # (ROWS, d) -> (g, g, d)
    """[a, c]: the row of the distance c - a, of 14 where they are farther apart. Slices and a sliding window, so that a plain
    network needs no table of indices, and its gradient is a sum in a fixed order."""
    near = min(g - 1, FARTHEST)
    rows = table[1 + FARTHEST - near : 2 + FARTHEST + near]
    if near < g - 1:
        far = g - 1 - near
        rows = torch.cat([rows[:1].expand(far, -1), rows, rows[-1:].expand(far, -1)])
    return rows.unfold(0, g, 1).flip(0).transpose(1, 2)


def positions(tables: Tensor, g: int) -> Tensor:  # (2 ROWS, d) -> (N, N, d)
    """[n, m]: the vertical table's row for the distance from token n to token m, and the horizontal one's, added."""
    vertical, horizontal = distances(tables[:ROWS], g), distances(tables[ROWS:], g)
    patches = (vertical[:, None, :, None] + horizontal[None, :, None, :]).reshape(g * g, g * g, -1)
    token = (tables[:1] + tables[ROWS : ROWS + 1])[None]
    patches = torch.cat([token.expand(g * g, 1, -1), patches], 1)
    return torch.cat([token.expand(1, g * g + 1, -1), patches])


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, d: int, g: int, share: Tensor | None = None
) -> Tensor:  # 3 x (B, h, N, d) -> (B, h, N, d)
    """softmax(q (k + r_k) / sqrt d) (v + r_v), r the embeddings of ``positions``.

    ``share`` (h, 1, 1): how much of r_v each head takes.
    """
    scores = q @ k.transpose(2, 3) + torch.einsum("bhnd,nmd->bhnm", q, positions(keys, g))
    weights = F.softmax(scores * d**-0.5, -1)
    relative = torch.einsum("bhnm,nmd->bhnd", weights, positions(values, g))
    return weights @ v + (relative if share is None else relative * share)


class Attention(Leaf):
    """Multi-head self-attention: ``qkv`` has the first heads of q, of k and of v, ``proj`` reads them all.

    A mixture of heads superposes both weights; softmax is not linear, so that is no mixture of outputs (page, section 7). The
    embedding of relative values, which all heads share, is weighed like the value of its head.
    """

    def __init__(
        self, embed: Segment, heads: Segment, head_dim: int, grid: int, relative_position: bool, both_sides: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.into, self.out, self.heads = (embed,), (embed,), heads
        self.head_dim, self.grid = head_dim, grid
        self.qkv = TokenLinear(embed, heads, 3, both_sides)
        self.proj = TokenLinear(heads, embed, 1, both_sides)
        self.keys, self.values = (
            nn.Parameter(torch.empty(2 * ROWS, head_dim)) if relative_position else None for _ in range(2)
        )
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """The tables; its linear layers are leaves of their own."""
        for table in (self.keys, self.values):
            if table is not None:
                draw(table, generator)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, N, e) -> (B, N, e)
        q, k, v = rearrange(self.qkv(x, arch), "b n (three h d) -> three b h n d", three=3, d=self.head_dim)
        if self.keys is None or self.values is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            m = reach(self.heads.size, arch, self.values)
            share = None if m is None else m[:: self.head_dim, None, None]
            y = attend(q, k, v, self.keys, self.values, self.head_dim, self.grid, share)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"), arch)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        heads = self.heads.size.at(arch) // self.head_dim
        made = PlainAttention(
            self.qkv.plain(arch, inherit=inherit), self.proj.plain(arch, inherit=inherit), heads, self.head_dim, self.grid,
            self.keys is not None,
        ).to(self.qkv.weight)  # fmt: skip
        with torch.no_grad():
            for own, table in ((self.keys, made.keys), (self.values, made.values)):
                if own is not None and table is not None and inherit:
                    table.copy_(own)
                elif table is not None:
                    draw(table)
        return made

    @torch.no_grad()
    def adopt(self, plain: Mapping[str, nn.Module]) -> None:
        """The tables; its linear layers are leaves of their own."""
        if self.keys is not None and self.values is not None:
            self.keys.copy_(plain[""].get_parameter("keys"))
            self.values.copy_(plain[""].get_parameter("values"))

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        """The linear layers and the tables. The products q k and (weights) v are no layers: 0 MACs, as everywhere here."""
        tables = [name for name, table in (("keys", self.keys), ("values", self.values)) if table is not None]
        shape = Shape(2 * ROWS, self.head_dim)
        return [
            *self.qkv.layers(hw, when), *self.proj.layers(hw, when),
            *(term(f"{self.name}.{name}", "table", (), when, lambda: shape) for name in tables),
        ]  # fmt: skip


class PlainAttention(nn.Module):
    """The plain form of ``Attention``; extraction inlines it."""

    def __init__(
        self, qkv: nn.Module, proj: nn.Module, heads: int, head_dim: int, grid: int, relative_position: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.qkv, self.proj, self.heads, self.head_dim, self.grid = qkv, proj, heads, head_dim, grid
        self.keys, self.values = (
            nn.Parameter(torch.empty(2 * ROWS, head_dim)) if relative_position else None for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if self.keys is None or self.values is None:
            y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        else:
            y = attend(qkv[0], qkv[1], qkv[2], self.keys, self.values, self.head_dim, self.grid)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(Leaf):
    """e -> int(e r) -> e channels of each token, with a GELU between. The mask of the first weight is joint: both its sides
    follow embed."""

    def __init__(self, embed: Segment, hidden: Segment, both_sides: bool) -> None:
        super().__init__()
        self.into, self.out = (embed,), (embed,)
        self.fc0 = TokenLinear(embed, hidden, 1, both_sides)
        self.fc1 = TokenLinear(hidden, embed, 1, both_sides)

    def forward(self, x: Tensor, arch: Arch) -> Tensor:  # (B, N, e) -> (B, N, e)
        return self.fc1(F.gelu(self.fc0(x, arch)), arch)

    def plain(self, arch: Arch, *c_in: int, inherit: bool = True) -> nn.Module:
        chain = nn.Sequential()
        chain.add_module("fc0", self.fc0.plain(arch, inherit=inherit))
        chain.add_module("gelu", nn.GELU())
        chain.add_module("fc1", self.fc1.plain(arch, inherit=inherit))
        return chain

    def layers(self, hw: tuple[int, int], when: When | None = None, into: Size | None = None) -> list[Layer]:
        return [*self.fc0.layers(hw, when), *self.fc1.layers(hw, when)]
