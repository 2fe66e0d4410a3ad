"""The parts of ProxylessNAS: what runs, full_v2 against the full graph on cells, the rescaling of two, how gates are drawn, the
latency losses, and what is refused."""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_proxyless import (
    COSTS,
    EPOCH_STEPS,
    MOVING,
    OPTIONS,
    SEED,
    SETTLED,
    STEPS,
    Edges,
    Space,
    draws,
    listened,
    numbered,
    priced,
    started,
)  # fmt: skip
from torch import Tensor

from nas.alpha import Alpha
from nas.bilevel import Alphas
from nas.budget import Budget
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.proxyless import Proxyless
from search_spaces import nats
from search_spaces.resnet import CifarResNet
from search_spaces.space import Choice, Mixture, Setting
from supernets.layers import Layer
from supernets.nats import Topology
from supernets.resnet import ResNet


@pytest.mark.parametrize("mode", ["full_v2", "two"])
def test_one_operation_of_an_edge_runs_with_a_graph_and_the_others_once_without(mode: str) -> None:
    met = set()
    for seed in range(20):
        strategy, ran = started(mode=mode), list[Any]()
        _, gates = listened(strategy)
        add = strategy.a.add
        strategy.a.add = lambda loss, ran=ran, s=strategy, add=add: (ran.extend(s.net.ran), s.net.ran.clear(), add(loss))
        strategy.search(draws()("valid"), moment(0, STEPS, EPOCH_STEPS, seed))
        drawn = numbered(gates[0])
        assert ran == [(e, i, True) for e, (_, i) in enumerate(drawn) if i]  # "none" is never computed
        reached = [e for e in range(3) if e == 2 or drawn[2][1]]  # none behind them: no gradient comes to edges 0 and 1
        assert sorted(strategy.net.ran) == [(e, j, False) for e in reached for j in drawn[e][0] if j not in (0, drawn[e][1])]
        assert all(len(at) == (2 if mode == "two" else 4) and at == sorted(at) for at, _ in drawn)
        assert all(s.weights.tolist() == [float(k == s.active[0]) for k in range(len(s.options))] for s in gates[0].values())
        met.add(tuple(i for _, i in drawn))
    assert len(met) > 8


@pytest.mark.parametrize("restrict", [{}, {"node1.from0": nats.OPS[1:3], "node3.from2": nats.OPS[1:]}], ids=["free", "some"])
def test_on_cells_full_v2_is_the_full_graph(restrict: Any) -> None:
    """Gradients of the alphas of a NAS-Bench-201 net, as they are when Adam steps; of every choice they sum to 0."""
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = Batch(x, torch.arange(8), torch.arange(8))
    found = {}
    for mode in ("full_v2", "full"):
        space = nats.Topology(4, 1)
        net = Topology(space, 1, 10).double().train()
        net.reset(torch.Generator().manual_seed(1))
        strategy: Any = Proxyless(mode=mode, every=1)
        strategy.start(Setup(net, space.restrict(restrict), CostTable(net, (8, 8)), CrossEntropy(), None, 4, 4, 8))
        with torch.no_grad():
            strategy.alpha.double().logits["5"].copy_(torch.randn(6, 5, generator=torch.Generator().manual_seed(2)))
        grads, step = list[Tensor](), strategy.a.step

        def heard(norm: bool, s: Any = strategy, step: Any = step, grads: list[Tensor] = grads) -> None:
            grads.append(s.alpha.logits["5"].grad.clone())
            step(norm)

        strategy.a.step = heard
        for n in range(4):
            strategy.update(lambda split, size=None, odds=None: batch, moment(n, 4, 4, 5))
        found[mode] = torch.stack(grads)
        assert float(found[mode].sum(2).abs().max()) < 1e-15
        assert not bool(found[mode][:, ~strategy.alpha.allowed_5].any()) and bool(found[mode].any(0).any(1).all())
    assert torch.allclose(found["full_v2"], found["full"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("price", ["", "mul_log", "add_linear", "budget"])
@pytest.mark.parametrize("alphas", [SETTLED, MOVING], ids=["settled", "moving"])
def test_two_leaves_every_other_probability_alone(alphas: Alphas, price: str) -> None:
    given = priced(price) if price else {}
    given.pop("price", None)
    strategy, draw, moved = started(mode="two", alphas=alphas, **given), draws(), 0
    _, gates = listened(strategy)
    for step in range(30):
        before = strategy.alpha.probabilities()
        strategy.update(draw, moment(step, 30, 10, SEED))
        after = strategy.alpha.probabilities()
        for name, s in gates.pop().items():
            rests = s.options[s.active[0]] == "none"
            for option, p, q in zip(OPTIONS, before[name], after[name]):
                pair = option in s.options
                assert (pair and not rests) or q == pytest.approx(p, rel=0, abs=1e-12)
                moved += pair and not rests and abs(p - q) > 1e-4
    assert moved > 60


def test_the_draws_follow_the_probabilities() -> None:
    """Gates: active ~ p. Pairs: without replacement in proportion to p, then active by the softmax of the two, which together
    are exactly p_i p_k / (1 - p_i) and so on. 5 standard errors."""
    space = Space([Choice("edge", OPTIONS, ordered=False)], {})
    alpha, n = Alpha(space).double(), 4000
    with torch.no_grad():
        alpha.logits["4"].copy_(torch.tensor([[0.5, -0.7, 1.0, 0.0]]))
    (p,), noise = alpha.probabilities().values(), torch.Generator().manual_seed(0)
    one, two = [0.0] * 4, {(i, k): 0.0 for i in range(4) for k in range(4) if i != k}
    for _ in range(n):
        (gate,) = alpha.gates(alpha.soft(), noise).values()
        one[gate.active[0]] += 1 / n  # type: ignore[union-attr,index]
        (gate,) = alpha.gates(alpha.gumbel(0.0, noise, count=2), noise).values()
        i, k = (OPTIONS.index(o) for o in gate.options)  # type: ignore[union-attr,arg-type]
        two[(i, k) if gate.active == (0,) else (k, i)] += 1 / n  # type: ignore[union-attr]
    for share, expected in zip(one, p):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    for (i, k), share in two.items():
        drawn = p[i] * p[k] / (1 - p[i]) + p[k] * p[i] / (1 - p[k])
        expected = drawn * p[i] / (p[i] + p[k])
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


# -- cost ---------------------------------------------------------------------------------------------------------------


def mixed(rows: Tensor) -> dict[str, Setting]:
    return {f"edge{e}": Mixture(OPTIONS, row) for e, row in enumerate(rows)}


def test_the_expected_cost_is_the_tables_and_linear_in_each_block() -> None:
    budget = started(budget=Budget("35")).budget
    for on in ((0, 0, 0), (1, 2, 3), (3, 0, 2)):
        E = budget.table.expected(mixed(torch.eye(4).double()[list(on)]), budget.space).item()
        assert E == budget.table.of({f"edge{e}": OPTIONS[j] for e, j in enumerate(on)}) == 16 + COSTS[list(on)].sum().item()
    noise = torch.Generator().manual_seed(0)
    p, q = (torch.rand(3, 4, generator=noise).double().softmax(1) for _ in range(2))
    for e in range(3):
        other = p.clone()
        other[e] = q[e]
        ends = [budget.table.expected(mixed(rows), budget.space).item() for rows in (p, other, 0.3 * p + 0.7 * other)]
        assert ends[2] == pytest.approx(0.3 * ends[0] + 0.7 * ends[1], rel=1e-14)


@pytest.mark.parametrize("kind, expected", [("mul_log", 0.7 * 1.3), ("add_linear", 1.3), ("budget", 1.3)])
def test_at_the_target_the_loss_is_that_of_the_images(kind: str, expected: float) -> None:
    strategy = started(budget=Budget("35"), cost_loss=kind, cost_a=0.7)
    soft, CE = strategy.alpha.soft(), torch.tensor(1.3, dtype=torch.float64)
    E = strategy.budget.R = strategy.budget.table.expected(soft, strategy.space).item()
    assert strategy.priced(CE, soft).item() == pytest.approx(expected, rel=1e-14)
    strategy.budget.R = E / 1.1  # 10% above
    steep = expected * (math.log(E) / math.log(E / 1.1)) ** 0.6
    other = {"mul_log": steep, "add_linear": 1.3 + 0.2 * 0.1, "budget": 1.3 + math.log(1.1)}
    assert strategy.priced(CE, soft).item() == pytest.approx(other[kind], rel=1e-12)
    strategy.budget.weight = 0.0  # only watches
    assert strategy.priced(CE, soft) is CE


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, words", [
    ({"mode": "three"}, "mode = 'three' is not known. Allowed: full_v2, two, full"), ({"every": 0}, "Allowed: 1 or more"),
    ({"cost_loss": "mul#log"}, "is not known. Allowed: mul_log, add_linear, budget"), ({"cost_a": 0.0}, "Allowed: above 0"),
    ({"cost_b": -1.0}, "cost_b = -1.0. Allowed: 0 or more"), ({"cost_c": math.inf}, "cost_c = inf"),
    ({"budget": Budget("60%", weight=2.0)}, "budget.weight = 2.0 belongs to cost_loss = budget; mul_log has cost_a and cost_b"),
])  # fmt: skip
def test_unknown_hyper_parameters_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Proxyless(**wrong)


def test_sizes_are_refused_at_the_start() -> None:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=10)
    setup = Setup(net, space, CostTable(net, (8, 8)), CrossEntropy(), None, 4, 4, 8)
    with pytest.raises(ValueError, match=r"and stage0\.\S+ is a size, whose options share one\. Restrict sizes"):
        Proxyless().start(setup)


def test_mul_log_needs_costs_above_one() -> None:
    class Cheap(Edges):
        def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
            return super().layers(input_size, view)[1:]

    net = Cheap()
    setup = Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, 4, 4, 4)
    with pytest.raises(ValueError, match=r"costs go down to 0, the target is 20\. Allowed: costs above 1"):
        Proxyless(budget=Budget("20")).start(setup)
    Proxyless(budget=Budget("20"), cost_loss="add_linear").start(setup)
