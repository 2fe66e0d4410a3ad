"""Macro spaces: plain chains of layers whose sizes are chosen, all of whose networks were trained alone by their authors.

conv-macro: the toy space of TangleNAS (Sukthanker, Krishnakumar, Safari, Hutter, AutoML 2024, arXiv 2312.10440).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from search_spaces.choice import listed, positive
from search_spaces.sizes import Size
from search_spaces.space import Arch, Choice, SearchSpace, Value


class ConvMacro(SearchSpace):
    """Four convolutions c1..c4 channels wide with kernels k1..k4; 3^8 = 6561 networks as published.

    ``widths``: what each convolution can choose from, in the order of the chain. ``kernels``: what each kernel can be, odd.
    ``features``: of the fixed fifth convolution. ``hidden``: of the linear layers before the classifier. ``image``: height
    and width of the images, at least 12; the first linear layer follows it. ``drop``: the rate of the two Dropout2d of every
    network; the published ones were trained with 0.5. Raises ValueError for other values.
    """

    WIDTHS = ((8, 16, 32), (16, 32, 64), (32, 64, 128), (64, 128, 256))
    KERNELS = (3, 5, 7)
    HIDDEN = (256, 128, 64)

    def __init__(
        self, widths: Sequence[Sequence[int]] = WIDTHS, kernels: Sequence[int] = KERNELS, features: int = 256,
        hidden: Sequence[int] = HIDDEN, image: int = 32, drop: float = 0.0,
    ) -> None:  # fmt: skip
        if len(widths) != len(self.WIDTHS):
            raise ValueError(f"widths = {[list(row) for row in widths]}: give four lists, one a convolution, such as "
                             f"{[list(row) for row in self.WIDTHS]}.")
        if any(positive("kernels", kernel) % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels = {listed(kernels)}: an even one has no centre to share. Give odd ones, as 3, 5, 7.")
        if positive("image", image) < 12:
            raise ValueError(f"image = {image} leaves nothing behind two poolings and a 7x7 convolution. Give 12 or more.")
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"drop = {drop} is not a rate. Allowed: 0 up to 1, published 0.5.")
        self.features, self.image, self.drop = positive("features", features), image, drop
        self.hidden = tuple(positive("hidden", width) for width in hidden)
        rows = [tuple(positive("widths", width) for width in row) for row in widths]
        choices = [Choice(f"c{i}", row) for i, row in enumerate(rows, 1)]
        choices += [Choice(f"k{i}", tuple(kernels)) for i in range(1, len(rows) + 1)]
        args = {"widths": rows, "kernels": tuple(kernels), "features": features, "hidden": self.hidden, "image": image,
                "drop": drop}
        usual = {"widths": list(self.WIDTHS), "kernels": self.KERNELS, "features": 256, "hidden": self.HIDDEN, "image": 32,
                 "drop": 0.0}
        super().__init__(choices, {name: value for name, value in args.items() if value != usual[name]})

    def width_size(self, i: int) -> Size:
        """The out channels of convolution ``i``, 1 to 4."""
        return Size((f"c{i}",), int)

    def kernel_size(self, i: int) -> Size:
        """The kernel of convolution ``i``, 1 to 4."""
        return Size((f"k{i}",), int)

    def text(self, arch: Mapping[str, Value]) -> str:
        """c1:c2:c3:c4/k1:k2:k3:k4, such as 32:64:128:128/3:7:5:7."""
        values = [str(value) for value in self.canonical(arch).values()]
        return ":".join(values[:4]) + "/" + ":".join(values[4:])

    def parse(self, text: str) -> Arch:
        """The architecture of 32:64:128:128/3:7:5:7. Raises ValueError for another form, other widths and kernels."""
        sides = [side.split(":") for side in text.strip().split("/")]
        if [len(side) for side in sides] != [4, 4] or not all(word.isdecimal() for side in sides for word in side):
            raise ValueError(f"{text!r} is not four widths and four kernels. They are written c1:c2:c3:c4/k1:k2:k3:k4, such as "
                             "32:64:128:128/3:7:5:7.")
        arch: Arch = {choice.name: int(word) for choice, word in zip(self.root.choices, (*sides[0], *sides[1]))}
        self.root.check(arch)
        return arch
