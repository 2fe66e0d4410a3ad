"""Entangled operations: candidates of one family, such as sep_conv_3x3 and sep_conv_5x5, on ONE set of weights (TangleNAS,
Sukthanker et al., arXiv 2312.10440, page 2.2 and 2.3).

The leaf with the largest kernels has the weights and the norms; the others run the centres of its kernels. Under a mixture
the kernels are superposed and the family runs once, as large as its largest active operation.

Letters: ``k`` kernel size, ``w`` () the weight of an operation in a mixture.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, stack

from search_spaces.sizes import Size
from search_spaces.space import Mixture
from supernets.chains import Chain, Conv
from supernets.operations import CandidateLeaf, Chained, Operation
from supernets.superpose import centre, odd, window

KERNEL = Size(("kernel",), int)


def side(leaf: Chained) -> int:
    """The largest kernel of a leaf."""
    return max(max(conv.sides()) for unit in leaf.units for conv in unit)


class Window(Chained):
    """An operation whose kernels are the centres of those of ``whole``, k x k; all else of it, norms included, is shared.

    It has no parameters of its own. ValueError for kernels that have no centre there.
    """

    def __init__(self, whole: Operation, k: int) -> None:
        super().__init__()
        if odd(k) > side(whole):
            raise ValueError(f"kernel = {k} is no window of a kernel of {side(whole)}. Allowed: odd kernels up to that.")
        self._whole = (whole,)  # in a tuple, as the module that holds both has it already
        self.into, self.out = whole.into, whole.out
        self.units = tuple(
            tuple(conv if conv.sides() == (1, 1) else conv._replace(kernel=k) for conv in unit) for unit in whole.units
        )

    @property
    def whole(self) -> Chained:
        return self._whole[0]

    def chain(self) -> Chain:
        chain = self.whole.chain()
        weights = [centre(weight, conv.sides()[0]) for weight, conv in zip(chain.weights, _convs(self), strict=True)]
        return chain._replace(units=self.units, weights=weights)


def _convs(leaf: Chained) -> list[Conv]:
    return [conv for unit in leaf.units for conv in unit]


def entangle(leaves: Mapping[str, CandidateLeaf], family: Sequence[str]) -> dict[str, CandidateLeaf]:
    """``leaves`` with those of ``family`` on the weights of its largest kernel; the others become windows of it.

    They are operations of square kernels, alike but for their size.
    """
    operations = {name: cast(Operation, leaves[name]) for name in family}
    whole = max(operations.values(), key=side)
    windows = {name: Window(whole, side(leaf)) for name, leaf in operations.items() if leaf is not whole}
    return {name: windows.get(name, leaf) for name, leaf in leaves.items()}


def superposed(leaves: Sequence[Chained], weights: Sequence[Tensor]) -> Chain:
    """The mixture of ``leaves`` of one family as one operation: kernels are the sum of w pad(kernel), the norm comes after.

    Exact for one convolution; a chain of several is not linear in its kernels. The released code superposes the kernels and
    shares the norm, too (page 2.2). Ours: what all members use whole (1x1 convolutions beside larger ones, biases) takes no
    weight, where the page weighs biases likewise; the norm that follows would divide or subtract it out.
    """
    top, sizes = max(leaves, key=side), tuple(side(leaf) for leaf in leaves)
    chain, own = top.chain(), stack(list(weights))
    mask = window(KERNEL, {"kernel": Mixture(sizes, own)}, chain.weights[0])
    assert mask is not None
    kernels = [
        weight * mask if conv.sides() != (1, 1) else weight for weight, conv in zip(chain.weights, _convs(top.whole))
    ]
    return chain._replace(weights=kernels)
