"""What the tests of OFA and DepS share: a small once-for-all net in float64, numbered batches, SGD by hand."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nas.bilevel import Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Moment, Setup
from search_spaces.mobilenet import OFAMobileNetV3
from search_spaces.space import Arch, SearchSpace
from supernets import mobilenet

SEED, B, CLASSES = 5, 6, 4
LOSS = CrossEntropy(label_smoothing=0.1)
Gradients = list[Tensor | None]


def mobile(kernels: Sequence[int] = (7,), resolution: Sequence[int] = ()) -> tuple[SearchSpace, Any]:
    """Ten blocks of 8 to 16 channels, expands 3, 4, 6 (24, 32, 48 channels inside), depths 1 and 2."""
    space = OFAMobileNetV3(0.1, True, kernels, (3, 4, 6), (1, 2), resolution)
    net = mobilenet.build(space, 1, CLASSES).double()
    net.reset(torch.Generator().manual_seed(2))
    return space, net


def sgd(**more: Any) -> Weights:
    """The published descent at a rate for small nets."""
    return Weights(**{"lr": 0.05, "lr_min": 0.0, "nesterov": True, "weight_decay": 3e-3, "norm_decay": False, "clip": None,
                      "per_epoch": False, "idle": "skip", **more})  # fmt: skip


class Feed:
    """Batch n of a run, the same whoever draws it. ``sizes``: what was asked for."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.sizes = step, list[int | None]()

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        assert split == "train" and odds is None
        noise = torch.Generator().manual_seed(self.step)
        x = torch.randn(B, 1, 8, 8, generator=noise, dtype=torch.float64)
        y = torch.randint(CLASSES, (B,), generator=noise)
        self.step += 1
        self.sizes.append(size)
        return Batch(x if size is None else interpolate(x, (size, size)), y, torch.arange(B))


def started(strategy: Any, space: SearchSpace, net: nn.Module, steps: int, epoch_steps: int = 3) -> Any:
    strategy.start(Setup(net, space, CostTable(net, (8, 8)), LOSS, None, steps, epoch_steps, 0))  # type: ignore[arg-type]
    return strategy


def run(strategy: Any, start: int, end: int, feed: Feed | None = None) -> list[dict[str, Any]]:
    """Steps ``start`` to ``end`` of the run that ``started`` set up."""
    draw = feed or Feed(start)
    return [dict(strategy.update(draw, now(strategy, step))) for step in range(start, end)]


def now(strategy: Any, step: int) -> Moment:
    """Seeds torch's generator as the engine does."""
    return moment(step, strategy.setup.steps, strategy.setup.epoch_steps, SEED)


def parameters(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def gradients(loss: Tensor, net: nn.Module) -> Gradients:
    """Of one network alone; None where it does not reach."""
    return list(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))


def summed(parts: Iterable[tuple[float, Gradients]]) -> Gradients:
    """sum of factor * gradient over the networks of a step."""
    total: Gradients = []
    for factor, found in parts:
        scaled = [None if g is None else factor * g for g in found]
        total = [b if a is None else a if b is None else a + b for a, b in zip(total, scaled)] if total else scaled
    return total


def used(net: nn.Module, arch: Arch) -> list[Tensor]:
    """The released masks: 1 where a parameter's entry takes part in the network of ``arch``, 0 elsewhere. By probing: the
    gradient of random weights, small ones, as gates saturate: no unit is dead in all of a dozen."""
    names = [name for name, _ in net.named_parameters()]
    masks = [torch.zeros_like(p) for p in net.parameters()]
    for probe in range(12):
        noise = torch.Generator().manual_seed(probe)
        weights = [(0.3 * torch.randn(p.shape, generator=noise).double()).requires_grad_() for p in net.parameters()]
        x = torch.randn(4, 1, 8, 8, generator=noise, dtype=torch.float64)
        z = torch.func.functional_call(net, dict(zip(names, weights)), (x, arch))
        found = torch.autograd.grad((z**2).sum(), weights, allow_unused=True)
        masks = [mask if g is None else torch.maximum(mask, (g != 0).to(mask)) for mask, g in zip(masks, found)]
    return masks


class ByHand:
    """torch's SGD, Nesterov 0.9, on gradients that are given; norms and biases do not decay."""

    def __init__(self, net: nn.Module, weights: Weights) -> None:
        self.net, self.weights = net, weights
        self.forget()

    def forget(self) -> None:
        split = [[p for p in self.net.parameters() if (p.ndim > 1) is decays] for decays in (True, False)]
        groups = [{"params": params, "weight_decay": decay} for params, decay in zip(split, (self.weights.weight_decay, 0.0))]
        self.sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)

    def step(self, found: Gradients, lr: float) -> None:
        for p, g in zip(self.net.parameters(), found):
            p.grad = g
        for group in self.sgd.param_groups:
            group["lr"] = lr
        self.sgd.step()
        self.sgd.zero_grad()


def noise(net: nn.Module) -> list[bool]:
    """A list that fills, at every forward, with whether dropout modules inside ``net`` would drop. It gets one, unused."""
    net.noise = nn.Dropout(0.5)
    seen: list[bool] = []
    net.register_forward_pre_hook(lambda module, given: seen.append(module.noise.training))
    return seen


def drops(net: nn.Module) -> tuple[list[tuple[Mapping[str, Any], float, bool]], Any]:
    """A list that fills with (arch, drop, with a graph) of every forward, and the hook that fills it."""
    seen: list[tuple[Mapping[str, Any], float, bool]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        drop = kwargs.get("drop", args[2] if len(args) > 2 else 0.0)
        seen.append((dict(args[1]), drop, torch.is_grad_enabled()))

    return seen, net.register_forward_pre_hook(note, with_kwargs=True)
