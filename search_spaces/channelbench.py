"""Channel-Bench-Macro: two networks of fixed depth, seven of whose widths are chosen (Su, You, Xie, Wang, Qian, Zhang, Xu,
Searching for Network Width with Bilaterally Coupled Network, arXiv 2203.13714).

A network is written as seven digits 1 to 4: width c_i is digit_i quarters of its largest. All 4^7 = 16,384 networks of each
space were trained alone by its authors.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from search_spaces.choice import listed, positive
from search_spaces.sizes import Segment, Size
from search_spaces.space import Arch, Choice, SearchSpace, Value

PARTS = 4
NAMES = tuple(f"c{i}" for i in range(7))


class Channels(SearchSpace):
    """What both share.

    ``widths``: the largest of each of c0 .. c6; None: as published (``WIDTHS``). ``parts``: how many options each width has, 1
    to 9, in equal steps up to the largest, which ``parts`` divides. Raises ValueError for other values.
    """

    abstract = True  # what the two share: none itself
    WIDTHS: tuple[int, ...] = ()

    def __init__(self, widths: Sequence[int] | None = None, parts: int = PARTS) -> None:
        given = self.WIDTHS if widths is None else widths
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(NAMES):
            raise ValueError(f"widths = {given}: give a list of {len(NAMES)}, the largest of {listed(NAMES)}, such as "
                             f"{list(self.WIDTHS)}.")
        full = tuple(given)
        if positive("parts", parts) > 9:
            raise ValueError(f"parts = {parts}: a width is written as one digit. Allowed: 1 to 9.")
        odd = next((width for width in full if positive("widths", width) % parts), None)
        if odd is not None:
            raise ValueError(f"widths = {listed(full)}: {odd} is not made of {parts} equal parts. Give multiples of {parts}.")
        self.parts = parts
        args = ({} if full == self.WIDTHS else {"widths": full}) | ({} if parts == PARTS else {"parts": parts})
        options = [tuple(part * width // parts for part in range(1, parts + 1)) for width in full]
        super().__init__([Choice(name, own) for name, own in zip(NAMES, options)], args)

    def segment(self, i: int) -> Segment:
        """The channels that c``i`` counts, a prefix of its largest."""
        return Segment(Size((NAMES[i],), int), int(self.root[NAMES[i]].options[-1]))

    def text(self, arch: Mapping[str, Value]) -> str:
        """Seven digits, such as 4344424: the key of the published table. Raises ValueError for other widths."""
        return "".join(str(int(place) + 1) for place in self.encode([arch])[0])

    def parse(self, text: str) -> Arch:
        """The widths of 4344424. Raises ValueError for another form and other digits."""
        digits, allowed = text.strip(), "123456789"[: self.parts]
        if len(digits) != len(NAMES) or any(digit not in allowed for digit in digits):
            raise ValueError(f"{text!r} is not {len(NAMES)} digits. Widths are written {listed(NAMES)}, each as one digit of "
                             f"{allowed[0]} to {allowed[-1]}, such as {allowed[-1] * len(NAMES)}.")
        return {choice.name: choice.options[int(digit) - 1] for choice, digit in zip(self.root.choices, digits)}


class ChannelResNet(Channels):
    """The residual network. Stem 3 -> c0, stride 2; blocks c0 -> c1 -> c0 and c0 -> c2 -> c0; c0 -> c3, stride 2, and c3 -> c4
    without a shortcut; blocks c4 -> c5 -> c4 and c4 -> c6 -> c4; pooling, classifier. All convolutions are 3x3.

    So c0 and c4 are the residual widths of two stages, the others lie inside.
    """

    WIDTHS = (256, 256, 256, 512, 512, 512, 512)


class ChannelMobileNet(Channels):
    """The network of inverted residual blocks (in, hidden, out). Stem 3 -> c0, 3x3, stride 2; (c0, c1, c0), (c0, c2, c0),
    (c0, c3, c4) of stride 2, (c4, c5, c4), all depthwise 3x3; 1x1 convolution c4 -> c6; pooling, classifier. ReLU.

    Its published table is not at hand, so nothing but the structure has been held against a source.
    """

    WIDTHS = (128, 768, 768, 768, 256, 1536, 1024)
