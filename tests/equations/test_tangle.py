"""TangleNAS through ``update``: six steps of each mixing by hand in float64, the order of an iteration, what is derived and by
which reading, and mutants that must fail.

Letters: t the weights of the options, e their expectation; d_k = dL/dt_k (test_dirichlet.Hand.backward).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_dirichlet import Hand
from test_single_path import EPOCH_STEPS, EPOCHS, SEED, STEPS, WRONG, Edges, draws
from torch import Tensor, nn

from nas import simplex
from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.tangle import MIXINGS, Tangle
from search_spaces import darts
from search_spaces.macro import ConvMacro as Space
from supernets.macro import ConvMacro

WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=0.05)
COSTS = torch.tensor([0.0, 4.0, 9.0], dtype=torch.float64)
A = [[0.9, -0.2, 0.1], [-0.5, 0.2, 0.0]]  # of sparsemax, one option of each edge has no weight
Mutation = Callable[[Any, Any], Any]


def started(mixing: str, **given: Any) -> Tangle:
    net = Edges()
    strategy = Tangle(mixing, **{"weights": WEIGHTS, "alphas": Alphas(lr=0.1, weight_decay=0.02), **given})
    strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 4))
    with torch.no_grad():
        strategy.alpha.double().logits["3"].copy_(torch.tensor(A, dtype=torch.float64))
    return strategy


class ByHand(Hand):
    """The iteration again; of a mixing only t and its Jacobian differ."""

    def __init__(self, s: Tangle, R: float | None) -> None:
        super().__init__(s, R)
        self.mixing, self.taus = s.mixing, s.tau

    def step(self, step: int, train: Any, valid: Any) -> dict[str, float]:
        self.tau = self.taus[0] + (self.taus[1] - self.taus[0]) * (step // EPOCH_STEPS) / (EPOCHS - 1)
        return super().step(step, train, valid) | ({"alpha/temperature": self.tau} if self.mixing == "gumbel" else {})

    def support(self) -> Tensor:
        """(2, 3): by sorting, as the paper of sparsemax has it: 1 + k z_(k) > sum of the k largest."""
        z = self.a.sort(descending=True).values
        k = torch.arange(1, 4)
        n = (1 + k * z > z.cumsum(1)).sum(1, keepdim=True)
        return (self.a >= z.gather(1, n - 1)).double()

    def sparse(self) -> Tensor:
        s = self.support()
        return s * (self.a - ((s * self.a).sum(1, keepdim=True) - 1) / s.sum(1, keepdim=True))

    def sample(self, rng: torch.Generator) -> Tensor:
        if self.mixing == "dirichlet":
            return super().sample(rng)
        if self.mixing == "sparsemax":
            return self.sparse()
        if self.mixing == "softmax":
            return self.a.exp() / self.a.exp().sum(1, keepdim=True)
        g = -torch.empty(2, 3, dtype=torch.float64).exponential_(generator=rng).log()
        self.p = ((self.a + g) / self.tau).softmax(1)
        return nn.functional.one_hot(self.p.argmax(1), 3).double()

    def gradient(self, t: Tensor, d: Tensor) -> Tensor:
        if self.mixing == "dirichlet":
            return super().gradient(t, d)
        s = self.support()
        soft = self.a.softmax(1)
        if self.mixing == "sparsemax":
            G, e, slope = s * (d - (s * d).sum(1, keepdim=True) / s.sum(1, keepdim=True)), self.sparse(), None
            slope = s[0] * (COSTS - (s[0] * COSTS).sum() / s[0].sum())
        else:
            p, d, tau = (t, d, 1.0) if self.mixing == "softmax" else (self.p, t * d, self.tau)  # only the chosen one runs
            G, e = p * (d - (p * d).sum(1, keepdim=True)) / tau, soft
            slope = soft[0] * (COSTS - (soft[0] * COSTS).sum())
        if self.R is not None:
            E = float(e[0] @ COSTS)
            G[0] += 0.7 * math.copysign(1.0, E - self.R) * slope / E
        return G


def check(mixing: str, mutate: Mutation = lambda strategy, draw: draw, R: float | None = None, **given: Any) -> None:
    """Six steps. AssertionError, saying WRONG, where anything differs."""
    strategy = started(mixing, **given)
    hand, twin = ByHand(strategy, R), draws()
    draw = mutate(strategy, draws())
    for step in range(STEPS):
        metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
        expected = hand.step(step, twin("train"), twin("valid"))
        found = {tag: float(metrics.get(tag, math.nan)) for tag in expected}
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-12), WRONG
        w, a = torch.cat([*strategy.net.parameters()]), strategy.alpha.logits["3"]
        assert w.tolist() == pytest.approx(hand.w.tolist(), rel=1e-8, abs=1e-11), WRONG
        assert a.flatten().tolist() == pytest.approx(hand.a.flatten().tolist(), rel=1e-8, abs=1e-11), WRONG


@pytest.mark.parametrize("mixing", MIXINGS)
def test_six_steps_by_hand(mixing: str) -> None:
    check(mixing)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_six_steps_with_a_budget(mixing: str) -> None:
    """The term is at the expectation of t: its gradient has no noise, and of gumbel it is that of P(k) = softmax(a)."""
    check(mixing, R=2.0, budget=Budget("2", weight=0.7))


def test_the_divergence_and_the_temperatures() -> None:
    check("dirichlet", kl=0.3, anchor=2.0, alphas=Alphas(lr=0.1, weight_decay=0.0))
    check("gumbel", tau=(2.0, 0.5))
    assert Tangle().tau == (10.0, 0.1) and Tangle().mixing == "dirichlet" and Tangle().weights.clip == 5.0


@pytest.mark.parametrize("mixing", MIXINGS)
def test_an_iteration_in_its_order(mixing: str) -> None:
    """Validation batch, step on a; training batch, t of the NEW a (of a sample its own), step on w."""
    strategy, seen = started(mixing), list[Any]()
    draw, a = draws(), strategy.alpha.logits["3"]

    def asked(split: str, size: int | None = None, odds: Any = None) -> Any:
        seen.append(split)
        return draw(split)

    for name in ("w", "a"):
        descent = getattr(strategy, name)
        step = descent.step

        def stepped(norm: bool = False, step: Any = step, name: str = name) -> None:
            seen.append(name)
            step(norm)

        descent.step = stepped
    kept, ran = a.detach().clone(), list[Any]()
    strategy.net.register_forward_pre_hook(lambda net, given: ran.append((given[1], a.detach().clone())))
    strategy.update(asked, moment(0, STEPS, EPOCH_STEPS, SEED))
    assert seen == ["valid", "a", "train", "w"]
    (first, before), (second, after) = ran
    assert torch.equal(before, kept) and torch.equal(after, a) and not torch.equal(before, after)
    t = first["edge0"].weights
    assert t.requires_grad
    if mixing == "gumbel":
        assert second["edge0"] in Edges.options and first["edge0"].active is not None and first["edge0"].idle == "absent"
        return
    assert not second["edge0"].weights.requires_grad and not torch.equal(t.detach(), second["edge0"].weights)
    if mixing != "dirichlet":
        assert torch.equal(second["edge0"].weights, simplex.READINGS[mixing](after)[0])


def test_only_the_chosen_slice_of_gumbel_runs() -> None:
    """On conv-macro: gradients of one step on w lie in the slices of one network, of the step on a nowhere in w."""
    space = Space(widths=((2, 3, 5),) * 4, kernels=(3, 5), features=4, hidden=(4,), image=12)
    net = ConvMacro(space, channels=1, classes=3).double()
    strategy = Tangle("gumbel", weights=Weights(lr=0.1, idle="skip", momentum=0.0, weight_decay=0.0))
    strategy.start(Setup(net, space, CostTable(net, (12, 12)), CrossEntropy(), None, 4, 2, 4))
    strategy.alpha.double()
    x, y = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    before, path = net.conv2.weight.detach().clone(), list[Any]()
    net.register_forward_pre_hook(lambda net, given: path.append(given[1]))
    strategy.update(lambda split, size=None, odds=None: Batch(x, y, y), moment(0, 4, 2, SEED))
    moved = (net.conv2.weight.detach() != before).nonzero().T
    arch, k = path[1], int(path[1]["k2"])
    edge = (5 - k) // 2
    assert moved[0].max() < arch["c2"] and moved[1].max() < arch["c1"]
    assert moved[2:].min() >= edge and moved[2:].max() < 5 - edge


# -- what is derived ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_derived_architecture_is_the_argmax_of_alpha(mixing: str) -> None:
    strategy = started(mixing)
    for seed in range(20):
        a = 2 * torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            strategy.alpha.logits["3"].copy_(a)
        assert list(strategy.architecture().values()) == [Edges.options[k] for k in a.argmax(1).tolist()]
        for row, logits in zip(strategy.probabilities().values(), a):
            assert torch.tensor(row).argsort().tolist() == logits.argsort().tolist() and sum(row) == pytest.approx(1)


def edges_kept(mixing: str) -> set[str]:
    """Of node 4 of a DARTS cell, whose first edge is the sharper one by sparsemax and the flatter one by softmax."""
    space = darts.Cells(4, 3, nodes=3)
    strategy = Tangle(mixing)
    strategy.setup, strategy.space = None, space  # type: ignore[assignment]
    strategy.alpha = strategy.alphas.alpha(Setup(nn.Linear(1, 1), space, None, CrossEntropy(), None, 1, 1, 1)).double()
    rows, K = strategy.alpha.logits["8"], len(space.ops)
    assert K == 8

    def say(edge: str, *numbers: float) -> None:
        rows[strategy.alpha.groups[K].index(f"normal.node4.{edge}")] = torch.tensor(numbers, dtype=torch.float64)

    with torch.no_grad():
        say("from0", -9.0, 1.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # sparsemax (.., 1, 0, ..); softmax 0.33
        say("from1", -9.0, 3.0, 3.0, -3.0, -3.0, -3.0, -3.0, -3.0)  # 0.5 and 0.5 by both
        say("from2", -9.0, -9.0, 9.0, -9.0, -9.0, -9.0, -9.0, -9.0)  # kept by all
        say("from3", *[0.0] * 8)
    return {name for name, op in strategy.architecture().items() if name.startswith("normal.node4") and op != "none"}


def test_edges_are_compared_by_the_reading_of_the_training() -> None:
    """Softmax in derivation after sparsemax in training, as released, keeps other edges."""
    assert edges_kept("softmax") == edges_kept("gumbel") == {"normal.node4.from1", "normal.node4.from2"}
    assert edges_kept("sparsemax") == {"normal.node4.from0", "normal.node4.from2"}


def test_an_edge_whose_other_operations_have_no_weight_keeps_its_best_one() -> None:
    """None far ahead: of operations at 0 by sparsemax, the order of alpha decides, not that of the options."""
    space = darts.Cells(4, 3, nodes=1)
    strategy = Tangle("sparsemax")
    strategy.alpha = strategy.alphas.alpha(Setup(nn.Linear(1, 1), space, None, CrossEntropy(), None, 1, 1, 1)).double()
    with torch.no_grad():
        strategy.alpha.logits["8"].copy_(torch.tensor([9.0, 0.1, 0.3, 0.2, -1.0, 0.8, 0.0, 0.4]))
    assert set(strategy.architecture().values()) == {space.ops[5]}


def test_a_decided_sparsemax_can_be_brought_to_its_budget() -> None:
    strategy = started("sparsemax", budget=Budget("4", tolerance=0.01))
    with torch.no_grad():
        strategy.alpha.logits["3"].copy_(torch.tensor([[-3.0, 2.0, 9.0], [5.0, 0.0, 1.0]]))
    assert strategy.alpha.architecture()["edge0"] == "large"
    assert strategy.architecture() == {"edge0": "small", "edge1": "none"} and strategy.fits(strategy.architecture())


@pytest.mark.parametrize("wrong, words", [
    ({"mixing": "argmax"}, "mixing = 'argmax' is not known. Allowed: softmax, sparsemax, dirichlet, gumbel"),
    ({"tau": (1.0, 0.0)}, "is not a pair of temperatures. Allowed: above 0"), ({"anchor": -1.0}, "anchor above 0"),
    ({"kl": 1e-3}, "Allowed: kl with dirichlet alone, in place of the decay"),
    ({"kl": 1e-3, "mixing": "softmax", "alphas": Alphas(weight_decay=0.0)}, "kl with dirichlet alone"),
])  # fmt: skip
def test_unknown_hyper_parameters_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tangle(**wrong)


# -- mutants ------------------------------------------------------------------------------------------------------------


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def other_order(strategy: Any, draw: Any) -> Any:
    search, down, waiting = strategy.search, strategy.w.down, list[Any]()

    def later(*given: Any) -> dict[str, Any]:
        waiting.append(given)
        return {}

    def both(loss: Tensor, norm: bool = False) -> None:
        down(loss, norm=norm)
        search(*waiting.pop())

    strategy.search, strategy.w.down = later, both
    return draw


def old_alphas(strategy: Any, draw: Any) -> Any:
    """The step on w runs the t of the step on a."""
    mixed, known = strategy.mixed, dict[int, Any]()
    strategy.mixed = lambda now: known.setdefault(now.step, mixed(now))
    return draw


def one_noise(strategy: Any, draw: Any) -> Any:
    mixed = strategy.mixed
    strategy.mixed = lambda now: mixed(now._replace(noise=torch.Generator().manual_seed(now.noise.initial_seed())))
    return draw


def reweighted(strategy: Any, change: Callable[[Tensor], Tensor]) -> None:
    mixed = strategy.mixed
    strategy.mixed = lambda now: {name: s._replace(weights=change(s.weights)) for name, s in mixed(now).items()}


def no_gradient(strategy: Any, draw: Any) -> Any:
    reweighted(strategy, lambda weights: 0.0 * weights + weights.detach())
    return draw


def weight_step_reaches_alphas(strategy: Any, draw: Any) -> Any:
    mixed, step = strategy.mixed, strategy.w.down

    def leaking(loss: Tensor, norm: bool = False) -> None:
        step(loss, strategy.a, norm=norm)

    strategy.fixed, strategy.w.down = mixed, leaking
    return draw


def another_reading(strategy: Any, draw: Any) -> Any:
    """Softmax for the others, and sparsemax for it."""
    strategy.mixing = "sparsemax" if strategy.mixing == "softmax" else "softmax"
    return draw


def twice(strategy: Any, draw: Any) -> Any:
    """Weights read as logits again. (Of sparsemax that changes nothing: a projection.)"""
    reweighted(strategy, simplex.softmax)
    return draw


def idle_gradients(strategy: Any, draw: Any) -> Any:
    """The other options' weights added, as GDAS does."""
    mixed = strategy.mixed
    strategy.mixed = lambda now: {name: s._replace(idle="ones") for name, s in mixed(now).items()}
    return draw


def frozen_temperature(strategy: Any, draw: Any) -> Any:
    mixed = strategy.mixed
    strategy.mixed = lambda now: mixed(now._replace(epoch=0))
    return draw


ALL: list[Mutation] = [swapped_splits, other_order, old_alphas, no_gradient, weight_step_reaches_alphas, another_reading]
MUTANTS = [*((mixing, mutant) for mixing in MIXINGS for mutant in ALL), ("dirichlet", one_noise), ("gumbel", one_noise),
           ("softmax", twice), ("sparsemax", twice), ("gumbel", idle_gradients), ("gumbel", frozen_temperature)]  # fmt: skip


@pytest.mark.parametrize("mixing, mutant", MUTANTS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_mutant_fails(mixing: str, mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mixing, mutant)


def softmax_budget(strategy: Any, draw: Any) -> Any:
    strategy.expected = strategy.alpha.soft
    return draw


def sampled_budget(strategy: Any, draw: Any) -> Any:
    mixed = strategy.mixed

    def kept(now: Any) -> Any:
        t = mixed(now)
        strategy.expected = lambda: t
        return t

    strategy.mixed = kept
    return draw


@pytest.mark.parametrize("mixing, mutant", [("dirichlet", softmax_budget), ("dirichlet", sampled_budget)],
                         ids=lambda value: value if isinstance(value, str) else value.__name__)  # fmt: skip
def test_a_budget_at_other_weights_fails(mixing: str, mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mixing, mutant, R=2.0, budget=Budget("2", weight=0.7))
