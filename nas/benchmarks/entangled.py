"""Passes of superposed supernets against their largest networks: ``python -m nas.benchmarks.entangled`` (method:
nas/benchmarks/pairs.py).

``weights``: forward, backward into the weights and Adam's step of a TangleNAS mixture, over the same of the plain largest
network; ``alphas``: the step on the alphas, over the same; ``path``: of the largest architecture in the supernet.
"macro": the conv-macro space, which is for 32x32 images. "vit": AutoFormer-T's widths and depths with patches of 4, so that
an image of 32x32 has 64 tokens.
"""
from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nas.benchmarks.pairs import Bench, Case, moments, program
from nas.benchmarks.steps import Step, training
from nas.bilevel import Weights
from nas.strategies.tangle import Tangle
from search_spaces import macro, vit
from supernets.extract import extract
from supernets.macro import ConvMacro
from supernets.vit import ViT

CASES = {
    f"{kind}, {what}": Case(f"{kind}-{step}", f"{kind}-largest", goal)
    for kind in ("macro", "vit")
    for what, step, goal in (("softmax, weights", "softmax", 1.15), ("Dirichlet, weights", "dirichlet", 1.15),
                             ("softmax, alphas", "alphas", None), ("largest path in the supernet", "path", None))
}  # fmt: skip


class EntangledBench(Bench):
    """Steps of ``macro`` and ``vit``."""

    def make(self, name: str) -> Step:
        kind, what = name.split("-")
        torch.manual_seed(0)
        space = self._space(kind)
        net = ConvMacro(space) if isinstance(space, macro.ConvMacro) else ViT(space)
        adam = Weights(optimizer="adam", lr=3e-4, lr_min=1e-4, betas=(0.9, 0.995), weight_decay=5e-4, clip=None)
        if what == "largest":
            plain = extract(net, space.largest(), self.data.x[:2], inherit=False)
            fused: Any = partial(torch.optim.Adam, lr=3e-4, betas=(0.9, 0.995), weight_decay=5e-4, fused=True)
            return training(plain, fused, self.conditions, self.layout)
        strategy = self.started(Tangle("dirichlet" if what == "dirichlet" else "softmax", weights=adam), space, net)
        now = moments()
        if what == "alphas":
            return lambda: strategy.search(self.data, next(now))
        if what == "path":
            return lambda: self.weights(strategy, lambda _: space.largest(), next(now))
        return lambda: self.weights(strategy, strategy.fixed, next(now))

    def _space(self, kind: str) -> macro.ConvMacro | vit.ViT | vit.AutoFormer:
        size = self.conditions.size
        return macro.ConvMacro(image=size) if kind == "macro" else vit.AutoFormer("tiny", patch=4, image=size)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return program("nas.benchmarks.entangled", __doc__, EntangledBench, CASES, {}, argv)


if __name__ == "__main__":
    main()
