"""The strategies that keep the contract of test_strategies, what they search, and how they are started, run and watched."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from strategy_entries_attentive import ENTRIES as ATTENTIVE
from strategy_entries_mixture import ENTRIES as MIXTURES
from strategy_entries_pada import ENTRIES as IMPORTANCE
from strategy_entries_paths import ENTRIES as PATHS
from strategy_entries_shrink import ENTRIES as SHRINK
from strategy_entry import ALONE, BOTH, EPOCH_STEPS, SEED, STEPS, THREE, Entry, Restriction, made
from torch import Tensor, nn

from nas.bilevel import Alphas
from nas.budget import Budget
from nas.data import Data
from nas.descent import Descent
from nas.engine import moment, seed_from
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.darts import DARTS
from nas.strategies.drnas import DrNAS
from nas.strategies.gdas import GDAS
from nas.strategies.mixture import Mixture as Balanced
from nas.strategies.plain import Plain
from nas.strategies.proxyless import Proxyless
from nas.strategies.random import Random
from nas.strategies.rarts import RARTS
from nas.strategies.rsps import RSPS
from nas.strategies.snas import SNAS
from nas.strategies.tangle import MIXINGS, Tangle
from nas.strategies.tas import TAS
from search_spaces.resnet import CifarResNet
from search_spaces.space import Mixture, Setting
from supernets.extract import extract
from supernets.resnet import ResNet


def gradient_based(kind: str, budget: Callable[[], Budget | None], slow: Sequence[str] = ()) -> Iterator[Entry]:
    """``slow``: their names without the kind."""
    for entry in _gradient_based(kind, budget):
        yield entry._replace(slow=entry.id.removesuffix(f"-{kind}") in slow)


def _gradient_based(kind: str, budget: Callable[[], Budget | None]) -> Iterator[Entry]:
    yield Entry(f"darts-1-{kind}", lambda: DARTS(order=1, budget=budget()), kind, BOTH, runs="mixture", first="a")
    yield Entry(f"darts-2-{kind}", lambda: DARTS(budget=budget()), kind, BOTH, runs="mixture", first="a")
    yield Entry(f"rarts-{kind}", lambda: RARTS(budget=budget()), kind, THREE, runs="mixture")
    yield Entry(f"rarts-jacobi-{kind}", lambda: RARTS(mode="jacobi", hold_coupling=True, budget=budget()), kind, THREE,
                runs="mixture", shared=True)  # fmt: skip
    yield Entry(f"snas-{kind}", lambda: SNAS(budget=budget()), kind, BOTH, first="a")
    yield Entry(f"gdas-{kind}", lambda: GDAS(budget=budget()), kind, BOTH, runs="path")


def random_paths(kind: str, trials: int, slow: bool) -> Iterator[Entry]:
    yield Entry(f"rsps-{kind}", lambda: RSPS(archs=3), kind, ALONE, runs="path", asks=("train",), slow=slow)
    yield Entry(f"random-{kind}", lambda: Random(trials=trials, judge=1), kind, ALONE, runs="path", asks=("train",), slow=slow)


VALID_FIRST = ("valid", "train")


def entangled(kind: str, budget: Callable[[], Budget | None], fast: Sequence[str] = ()) -> Iterator[Entry]:
    """Tangle by each of its mixings, which give mixtures, samples or paths; ``fast``: those that are not slow."""
    runs = {"softmax": "mixture", "sparsemax": "mixture", "dirichlet": "sample", "gumbel": "path"}
    for mixing in MIXINGS:
        yield Entry(f"tangle-{mixing}-{kind}", partial(lambda mixing: Tangle(mixing, budget=budget()), mixing), kind, BOTH,
                    runs=runs[mixing], first="a", asks=VALID_FIRST, slow=mixing not in fast)  # fmt: skip


STRATEGIES = [
    Entry("tas-tied", lambda: TAS(target="60%"), "tied", BOTH),
    Entry("tas-tas", lambda: TAS(target=40_000, rule="released", temperature=(5.0, 0.1), temperature_schedule="cosine"),
          "tas", BOTH),
    Entry("plain", lambda: Plain(), None, ALONE, asks=("train",)),
    Entry("plain-taught-ema", lambda: Plain(ema=0.9, accumulate=2, schedule="cosine"), None, ALONE, True,
          asks=("train", "train")),
    *gradient_based("tied", lambda: Budget("60%"), ("darts-2", "rarts", "rarts-jacobi", "snas", "gdas")),
    *gradient_based("cells", lambda: Budget("35%"), ("darts-1", "rarts-jacobi")),
    *gradient_based("darts", lambda: Budget("60%"), ("darts-1", "darts-2", "rarts", "rarts-jacobi", "snas")),
    *gradient_based("sizes", lambda: Budget("60%"), ("darts-1", "darts-2", "rarts", "rarts-jacobi", "snas", "gdas")),
    Entry("rarts-a-first-cells", lambda: RARTS(order=("a", "y", "w")), "cells", THREE, runs="mixture", first="a", slow=True),
    Entry("rarts-scales", lambda: RARTS(kind="scales"), "scales", THREE, runs="mixture"),
    Entry("drnas-cells", lambda: DrNAS(budget=Budget("35%")), "cells", BOTH, first="a"),
    Entry("drnas-kl-cells", lambda: DrNAS(kl=1e-3, alphas=Alphas(weight_decay=0.0)), "cells", BOTH, first="a", slow=True),
    *entangled("macro", lambda: Budget("60%"), ("dirichlet",)),
    *entangled("vit", lambda: None, ("sparsemax", "gumbel")),
    Entry("tangle-budget-vit", lambda: Tangle(budget=Budget("60%")), "vit", BOTH, first="a", asks=VALID_FIRST, slow=True),
    *entangled("tied", lambda: Budget("60%")), *entangled("cells", lambda: Budget("35%")),
    Entry("tangle-kl-macro", lambda: Tangle(kl=1e-3, alphas=Alphas(weight_decay=0.0)), "macro", BOTH, first="a",
          asks=VALID_FIRST, slow=True),
    Entry("proxyless-cells", lambda: Proxyless(every=1, budget=Budget("35%")), "cells", BOTH, runs="path"),
    Entry("proxyless-two-cells", lambda: Proxyless("two", every=1, cost_loss="add_linear", budget=Budget("35%")), "cells", BOTH,
          runs="path", slow=True),
    Entry("proxyless-darts", lambda: Proxyless(every=1), "darts", BOTH, runs="path", slow=True),
    Entry("proxyless-two-darts", lambda: Proxyless("two", every=1), "darts", BOTH, runs="path", slow=True),
    *random_paths("tied", trials=2, slow=True),  # saved in the middle of a trial
    *random_paths("cells", trials=4, slow=False),  # saved at the end of one
    *random_paths("nasnet", trials=2, slow=True), *random_paths("macro", trials=2, slow=True),
    *PATHS, *IMPORTANCE, *ATTENTIVE, *SHRINK, *MIXTURES,
]  # fmt: skip
SEARCHES = [entry for entry in STRATEGIES if entry.kind]
DATA = Data("digits", batch_size=16, valid_fraction=0.5)


def param(entry: Entry, *more: str) -> Any:
    """The entry as a parameter of a test, with what else is one."""
    return pytest.param(entry, *more, id="-".join((entry.id, *more)), marks=[pytest.mark.slow] if entry.slow else [])


class Draws:
    """The feed of the digits, in the net's precision, counting what was asked for."""

    def __init__(self) -> None:
        self.feed, self.asked = DATA.feed(SEED, "cpu"), []  # type: ignore[var-annotated]

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        self.asked.append(split)
        x, y, index = self.feed(split, size, odds)
        return Batch(x.double(), y, index)


def started(entry: Entry, restrict: Restriction | None = None) -> Any:
    """The strategy with a net of its own, in the state that a run of seed SEED begins with."""
    strategy, loss = entry.make(), CrossEntropy()
    if entry.kind:
        space, net, costs = made(entry.kind)
        if restrict:
            space = space.restrict(restrict)
        setup = Setup(copy.deepcopy(net), space, costs, loss, None, STEPS, EPOCH_STEPS, DATA.count("train"))
    else:
        setup = Setup(plain_net(1), None, None, loss, plain_net(2).eval() if entry.taught else None, STEPS, EPOCH_STEPS, 0)
    torch.manual_seed(seed_from(SEED, "start"))
    strategy.start(setup)
    return strategy


def plain_net(seed: int) -> nn.Module:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=10).double()
    return extract(net, space.largest(), torch.zeros(2, 1, 8, 8).double(), inherit=False, seed=seed)


def nets(strategy: Any) -> list[nn.Module]:
    """The net, and the copies that a strategy trains beside it."""
    if isinstance(strategy, Balanced):
        return strategy.nets
    return [strategy.setup.net, *([strategy.twin] if isinstance(strategy, RARTS) else [])]


def run(strategy: Any, draw: Any, start: int = 0, end: int = STEPS) -> list[dict[str, Any]]:
    return [dict(strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))) for step in range(start, end)]


def values(descent: Descent) -> list[Tensor]:
    return [p.detach().clone() for p in descent.params]


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, through lists and dicts."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(p, q) for p, q in zip(a, b))
    return a == b


def plainly(arch: Mapping[str, Setting]) -> dict[str, Any]:
    return {name: (s.options, s.weights.tolist(), s.active) if isinstance(s, Mixture) else s for name, s in arch.items()}


class Told(NamedTuple):
    """What was seen of one update. ``passes``: forwards with a graph, of nets that learn; ``backwards``; ``ran``: what the
    net ran, in order; ``stepped``: for each step of a Descent, its name, what the net ran last, and which Descents held
    gradients."""

    metrics: dict[str, Any]
    asked: list[str]
    passes: int
    backwards: int
    ran: list[dict[str, Any]]
    stepped: list[tuple[str, dict[str, Any], set[str]]]
    arch: dict[str, Any]


def watch(strategy: Any, entry: Entry, steps: int = STEPS) -> list[Told]:
    """``steps`` updates from the start, watched."""
    told: list[Told] = []
    draw = Draws()
    passes, ran, stepped, backwards = [0], list[dict[str, Any]](), list[Any](), [0]

    def noted(net: nn.Module, given: tuple[Any, ...]) -> None:
        passes[0] += torch.is_grad_enabled()
        if (net is strategy.setup.net or isinstance(strategy, Balanced)) and len(given) > 1:
            ran.append(plainly(given[1]))

    step, backward = Descent.step, torch.autograd.backward

    def watched(self: Descent, norm: bool = False, **more: Any) -> None:
        descents = {name: getattr(strategy, name) for name in entry.moves}
        name = next(name for name, descent in descents.items() if descent is self)
        holding = {name for name, descent in descents.items() if any(p.grad is not None for p in descent.params)}
        stepped.append((name, ran[-1] if ran else {}, holding))
        step(self, norm, **more)

    def counted(*args: Any, **kwargs: Any) -> None:
        backwards[0] += 1
        backward(*args, **kwargs)

    hooks = [net.register_forward_pre_hook(noted) for net in nets(strategy)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Descent, "step", watched)
        patch.setattr(torch.autograd, "backward", counted)
        for n in range(steps):
            del draw.asked[:], ran[:], stepped[:]
            passes[0] = backwards[0] = 0
            metrics = run(strategy, draw, n, n + 1)[0]
            arch = strategy.architecture()
            told.append(Told(metrics, list(draw.asked), passes[0], backwards[0], list(ran), list(stepped), arch))
    for hook in hooks:
        hook.remove()
    return told


@functools.cache
def whole(id: str) -> tuple[Any, list[Told]]:
    """A whole run, watched: for tests that only read it."""
    entry = next(entry for entry in STRATEGIES if entry.id == id)
    strategy = started(entry)
    return strategy, watch(strategy, entry)
