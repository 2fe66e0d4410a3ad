"""Pre-activation residual nets in which every batch norm may keep fewer channels: the width search of RARTS (Xue, Qi, Xin,
arXiv 2008.03901) on the ResNet-164 of Network Slimming (Liu et al., arXiv 1708.06519).

A block is norm0, 1x1, norm1, 3x3, norm2, 1x1, each norm with its ReLU; its output is added to the residual stream, which
always has all its channels. norm0 says how many channels of the stream the block reads (channel selection), norm1 and
norm2 how many the convolution before them has.
"""
from __future__ import annotations

from collections.abc import Sequence

from search_spaces.choice import positive
from search_spaces.resnet import Stage
from search_spaces.sizes import Size
from search_spaces.space import Choice, SearchSpace


class PreResNet(SearchSpace):
    """Bottleneck pre-activation ResNet for small images: three stages, strides 1, 2, 2.

    ``depth``: 9n + 2 layers, n blocks a stage. ``widths``: of the inner convolutions of each stage; the stream has
    ``expansion`` times as many, the stem as many as the first stage. Every width 1, 2, .. C is an option.
    Raises ValueError for other values.
    """

    WIDTHS = (16, 32, 64)
    expansion = 4
    norms = 3  # of a block

    def __init__(self, depth: int = 164, widths: Sequence[int] = WIDTHS) -> None:
        blocks, rest = divmod(positive("depth", depth) - 2, 9)
        if rest or blocks < 1:
            near = max(11, 2 + 9 * round((depth - 2) / 9))
            raise ValueError(f"depth = {depth} is not in this space. Allowed: 9n + 2, such as 11, 20, 29, 164. "
                             f"Nearest: {near}.")
        if len(widths) != len(self.WIDTHS):
            raise ValueError(f"widths = {list(widths)}: give {len(self.WIDTHS)} positive integers, one a stage, "
                             f"such as {list(self.WIDTHS)}.")
        self.stages = tuple(Stage(blocks, positive("widths", width), stride) for width, stride in zip(widths, (1, 2, 2)))
        self.stem = widths[0]
        full = {self.norm_size(s, b, c).on[0]: self.channels(s, b, c)
                for s in range(len(self.stages)) for b in range(blocks) for c in range(self.norms)}
        full[self.final_size().on[0]] = self.stream(len(self.stages) - 1)
        choices = [Choice(name, tuple(range(1, channels + 1))) for name, channels in full.items()]
        usual = tuple(widths) == self.WIDTHS
        super().__init__(choices, {"depth": depth} | ({} if usual else {"widths": list(widths)}))

    def stream(self, s: int) -> int:
        """Channels of the residual stream behind a block of stage ``s``; of the stem for s = -1."""
        return self.stem if s < 0 else self.stages[s].width * self.expansion

    def channels(self, s: int, b: int, c: int) -> int:
        """What norm ``c`` of block ``b`` of stage ``s`` can keep at most."""
        return self.stages[s].width if c else self.stream(s if b else s - 1)

    def norm_size(self, s: int, b: int, c: int) -> Size:
        """What norm ``c`` of block ``b`` of stage ``s`` keeps."""
        return Size((f"stage{s}.block{b}.norm{c}.width",), int)

    def final_size(self) -> Size:
        """What the norm before the classifier keeps (Network Slimming prunes it too)."""
        return Size(("final.width",), int)
