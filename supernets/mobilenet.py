"""The supernets of search_spaces.mobilenet: once-for-all (Cai et al., ICLR 2020, arXiv 1908.09791), also in the 32 x 32 form
of DepS (arXiv 2407.06167)."""
from __future__ import annotations

from search_spaces import mobilenet as spaces
from supernets.inverted import InvertedNet


class OFAMobileNetV3(InvertedNet):
    """OFA-MobileNetV3. ``mode``: "transform" as in OFA; "crop" as in CompOFA and for mixtures of kernels. Kernels fixed at 7
    (DepS) have no matrices in either. ``drop``: published 0.1. Arguments as ``supernets.inverted.InvertedNet`` has them."""

    def __init__(
        self, space: spaces.OFAMobileNetV3, channels: int = 3, classes: int = 10, mode: str = "transform",
        zero_gamma: bool = False, drop_path_stages: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(space, channels, classes, mode, zero_gamma, 1e-5, drop_path_stages)


class OFAProxyless(InvertedNet):
    """OFA-ProxylessNAS: as ``OFAMobileNetV3``, but the norms' eps is 1e-3."""

    def __init__(
        self, space: spaces.OFAProxyless, channels: int = 3, classes: int = 10, mode: str = "transform",
        zero_gamma: bool = False, drop_path_stages: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(space, channels, classes, mode, zero_gamma, 1e-3, drop_path_stages)


def build(space: spaces.Mobile, channels: int, classes: int) -> InvertedNet:
    """The supernet that serves an arch.json of this module's spaces; its plain networks depend on the space alone."""
    kind = OFAProxyless if isinstance(space, spaces.OFAProxyless) else OFAMobileNetV3
    return kind(space, channels, classes)  # type: ignore[arg-type]
