"""The supernet of search_spaces.nasbenchmacro (NAS-Bench-Macro: Su et al., CVPR 2021, arXiv 2103.11922): every operation of
every layer has weights of its own, and strings that stand for one network run the same weights.

Letters: ``B`` batch, ``C`` channels, ``H W`` height and width, ``w`` () the weight of an operation in a mixture.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import nasbenchmacro as spaces
from search_spaces.sizes import Segment, fixed
from search_spaces.space import Mixture, SearchSpace, Setting, Value, require
from supernets.elastic import ElasticConv, Leaf
from supernets.inverted import ACTIVATIONS, Block, Place, pointwise
from supernets.layers import Layer, When, known_view
from supernets.mixing import Scaled, active, blend
from supernets.resize import halved
from supernets.sorting import Moved
from supernets.superpose import SuperposedLinear

ACT, EPS = "relu", 1e-5
Arch = Mapping[str, Setting]


class Mixed(nn.Module):
    """The operations of one place; the identity has no weights where it keeps the shape, and is nothing there.

    A block with a shortcut is one operation, shortcut included: under a mixture a layer gives the sum of w_j o_j(x).
    """

    def __init__(self, space: SearchSpace, place: spaces.Place) -> None:
        super().__init__()
        self.place = place
        narrow, wide = _segment(place.c_in), _segment(place.c_out)
        self.operations = nn.ModuleDict()
        if place.stride > 1:
            self.operations[spaces.IDENTITY] = pointwise(space, narrow, wide, EPS, 1, place.stride)
        for option, (kernel, expand) in spaces.MBCONVS.items():
            at = Place(narrow, _segment(expand * place.c_in), wide, fixed(kernel), place.stride, ACT, squeeze=False,
                       expands=True, identity=True, projection=False)  # fmt: skip
            self.operations[option] = Block(space, at, "crop", EPS)

    def forward(self, x: Tensor, name: str, setting: Setting) -> Tensor:
        """The ``setting`` of the choice ``name``, by the weights of this place: (B, c_in, H, W) -> (B, c_out, H', W')."""
        for option in setting.options if isinstance(setting, Mixture) else (setting,):
            require(name, option, spaces.OPTIONS)
        if isinstance(setting, Mixture):
            return blend([partial(self._weighted, str(option)) for option in setting.options], x, setting)
        return self._run(str(setting), x)

    def _run(self, option: str, x: Tensor) -> Tensor:
        return self.operations[option](x, {}) if option in self.operations else x

    def _weighted(self, option: str, x: Tensor, w: Tensor | None) -> Scaled:
        return self._run(option, x), w


def _segment(n: int) -> Segment:
    return Segment(fixed(n), n)


def _option(setting: Setting) -> Value | None:
    """The one option that is computed; None where several are."""
    if not isinstance(setting, Mixture):
        return setting
    at = active(setting)
    return setting.options[at[0]] if len(at) == 1 else None


class NASBenchMacro(nn.Module):
    """Stem, the stages, a 1x1 convolution, pooling, classifier; ReLU. Norms have scale and shift, as in the networks that are
    trained alone, and use the batch's own statistics in training.

    ``channels``: of the input image. ``classes``: outputs. ``drop`` of ``forward``: the rate of dropout before the classifier.

    Compaction (``space.compact``): a stage whose layers behind the first each compute one option runs them in the order of
    ``space.normal``. The settings move, and the weights of a place run what comes there: an identity goes behind the others,
    whose option then is computed one place earlier. A mixture of which one option is computed moves as a whole, so that its
    weight (and those of its idle options, by what its new place makes of them) gets its gradient. Where one of these layers
    mixes several options, each stays at its own place: no order would be that of all paths.
    """

    def __init__(self, space: spaces.NASBenchMacro, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.space = space
        features, last = _segment(space.features), space.places[-1][-1].c_out
        self.stem = pointwise(space, _segment(channels), _segment(space.stem), EPS, 3)
        self.act = ACTIVATIONS[ACT]()
        self.stages = nn.ModuleList(nn.ModuleList(Mixed(space, place) for place in stage) for stage in space.places)
        self.final = pointwise(space, _segment(last), features, EPS)
        self.classifier = SuperposedLinear(space, (features,), _segment(classes))
        for name, module in self.named_modules():
            if isinstance(module, Leaf):
                module.name = name

    def places(self, s: int) -> list[Mixed]:
        """All places of stage ``s``."""
        return list(cast(Iterable[Mixed], self.stages[s]))

    def forward(self, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
        """(B, channels, H, W) -> logits (B, classes)."""
        x = self.act(self.stem(x, arch))
        for s in range(len(self.stages)):
            for place, name in zip(self.places(s), self._running(s, arch)):
                x = place(x, name, arch[name])
        x = torch.flatten(F.adaptive_avg_pool2d(self.act(self.final(x, arch)), 1), 1)
        if drop:
            x = F.dropout(x, drop, self.training)
        return self.classifier(x, arch)

    def _running(self, s: int, arch: Arch) -> list[str]:
        """The layers of stage ``s``, by name, in the order in which its places run them."""
        names = [place.name for place in self.space.places[s]]
        options = {name: _option(arch[name]) for name in names[1:]}
        hard = {name: option for name, option in options.items() if option is not None}
        return self.space.running(s, hard) if len(hard) == len(options) else names

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        """Every additive cost term; the same in every view. ``input_size``: of the images (H, W).

        An operation is counted at its own place: behind the first layer of a stage all places cost the same."""
        known_view(view)

        def at(leaf: Leaf, times: int, when: When | None = None) -> list[Layer]:
            return leaf.layers(halved(input_size, times), when)

        records = at(self.stem, 0)
        for s in range(len(self.stages)):
            for mixed in self.places(s):
                times = s + (mixed.place.stride == 1)  # halvings before it
                for option, operation in mixed.operations.items():
                    when = When((mixed.place.name,), lambda value, option=option: value == option)
                    if isinstance(operation, ElasticConv):
                        records += at(operation, times + 1, when)
                    else:
                        records += cast(Block, operation).layers(at, times, when)
        return records + at(self.final, len(self.stages)) + self.classifier.layers((1, 1))

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        """The parameters of the operation at the choice's own place; of all its operations without ``option``.

        By place: in a compact space, a hard architecture whose identities move runs an operation by the weights of an earlier
        place, and those that are owned here get no gradient from it. Exact for normal forms, and without ``compact``."""
        return [p for s in range(len(self.stages)) for mixed in self.places(s) if mixed.place.name == choice
                for name, operation in mixed.operations.items() if option in (None, name)
                for p in operation.parameters()]  # fmt: skip

    def sort_channels(self, trained: SearchSpace | None = None) -> Moved:
        """None: no width is a choice here."""
        return []

    def reset(self, generator: torch.Generator) -> None:
        """Fresh weights from ``generator`` (a CPU generator), in module order: convolutions N(0, 2 / (k k outputs)), the
        classifier U(+-1 / sqrt(inputs)), norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, Leaf):
                module.reset(generator)


def build(space: spaces.NASBenchMacro, channels: int, classes: int) -> NASBenchMacro:
    """The supernet that serves an arch.json of this module's space."""
    return NASBenchMacro(space, channels, classes)
