"""The supernets of search_spaces.bignas: BigNAS (Yu et al., ECCV 2020, arXiv 2003.11142) and AttentiveNAS (Wang et al., CVPR
2021, arXiv 2011.09011; AlphaNet, arXiv 2102.07954, trains the same)."""
from __future__ import annotations

from search_spaces import bignas as spaces
from supernets.inverted import InvertedNet


class BigNAS(InvertedNet):
    """BigNAS: the last norm of every block with a shortcut starts with the scale 0; ``drop``: published 0.2, without drop
    path. Arguments as ``supernets.inverted.InvertedNet`` has them."""

    def __init__(
        self, space: spaces.BigNAS, channels: int = 3, classes: int = 10, mode: str = "crop", zero_gamma: bool = True,
        drop_path_stages: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(space, channels, classes, mode, zero_gamma, 1e-5, drop_path_stages)


class AttentiveNAS(InvertedNet):
    """AttentiveNAS: as ``BigNAS`` (all of its blocks have a shortcut); drop path in the last two stages, published with the
    strength of dropout, 0.2."""

    def __init__(
        self, space: spaces.AttentiveNAS, channels: int = 3, classes: int = 10, mode: str = "crop", zero_gamma: bool = True,
        drop_path_stages: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(space, channels, classes, mode, zero_gamma, 1e-5, drop_path_stages)


def build(space: spaces.Stagewise, channels: int, classes: int) -> InvertedNet:
    """The supernet that serves an arch.json of this module's spaces; its plain networks depend on the space alone."""
    kind = AttentiveNAS if isinstance(space, spaces.AttentiveNAS) else BigNAS
    return kind(space, channels, classes)  # type: ignore[arg-type]
