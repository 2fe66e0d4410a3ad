"""Scales of channels: what they are as mixtures, and which widths one threshold leaves."""
from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.cost import CostTable, macs
from nas.descent import Descent
from nas.scales import Scales
from search_spaces.preresnet import PreResNet as Space
from search_spaces.space import Choice, Mixture, SearchSpace
from supernets.preresnet import build
from supernets.superpose import tail_sums

CHOICES = [Choice("a.width", (1, 2, 3, 4)), Choice("b.width", (1, 2)), Choice("c.width", (1, 2, 3))]
S = [0.9, -0.5, 0.1, 0.3, 0.2, -0.8, 0.6, 0.4, 0.7]  # |s| ranks: a 1 5 9 7, b 8 2, c 4 6 3


def space() -> SearchSpace:
    return SearchSpace(CHOICES, {})


def scales(of: SearchSpace, values: list[float] | None = None) -> Scales:
    found = Scales(of).double()
    with torch.no_grad():
        found.scales.copy_(torch.tensor(S if values is None else values, dtype=torch.float64))
    return found


def sums(setting: Any) -> Tensor:
    assert isinstance(setting, Mixture)
    return tail_sums(setting.weights, setting.options)


def widths(found: Any) -> list[Any]:
    return list(found.values())


def test_the_start() -> None:
    found = Scales(space())
    assert [(name, tuple(p.shape)) for name, p in found.named_parameters()] == [("scales", (9,))]
    assert bool((found.scales == 0.5).all()) and list(found.state_dict()) == ["scales"]
    assert found.l1().item() == 4.5 and found.entropy().item() == pytest.approx(1.0)
    assert bool((Scales(space(), 1.0).scales == 1).all()) and found.double().l1().dtype == torch.float64


def test_tail_sums_are_the_scales() -> None:
    found = scales(space())
    soft = found.soft()
    assert list(soft) == ["a.width", "b.width", "c.width"]
    for name, expected in (("a.width", S[:4]), ("b.width", S[4:6]), ("c.width", S[6:])):
        setting = soft[name]
        assert isinstance(setting, Mixture) and setting.options == space()[name].options and setting.active is None
        assert sums(setting).tolist() == pytest.approx(expected, abs=1e-15)
    assert soft["a.width"].weights.tolist() == pytest.approx([1.4, -0.6, -0.2, 0.3])  # type: ignore[union-attr]
    (sums(soft["b.width"]) * torch.tensor([3.0, 5.0])).sum().backward()
    assert found.scales.grad is not None and found.scales.grad.tolist() == [0, 0, 0, 0, 3, 5, 0, 0, 0]
    assert found.soft(["c.width"]).keys() == {"c.width"}


def test_the_penalty_and_its_slope() -> None:
    found = scales(space(), [0.9, -0.5, 0.0, *S[3:]])
    penalty = found.l1()
    assert penalty.item() == pytest.approx(4.4)
    penalty.backward()
    assert found.scales.grad is not None and found.scales.grad.tolist() == [1, -1, 0, 1, 1, -1, 1, 1, 1]


def test_widths_count_what_reaches_the_threshold() -> None:
    found = scales(space())
    assert widths(found.architecture(threshold=0.5)) == [2, 1, 2]  # 0.5 itself stays
    assert widths(found.architecture(threshold=0.51)) == [1, 1, 2]
    assert widths(found.architecture(threshold=0.0)) == [4, 2, 3]
    assert widths(found.architecture(threshold=math.inf)) == [1, 1, 1]
    assert widths(found.architecture(threshold=0.25)) == [3, 1, 3]
    assert list(found.architecture(threshold=0.5)) == ["a.width", "b.width", "c.width"]


def test_a_share_of_all_channels_stays() -> None:
    found = scales(space())
    ranked = sorted(map(abs, S), reverse=True)
    for n in range(1, 10):
        assert found.cut(n / 9) == pytest.approx(ranked[n - 1], abs=1e-12)
    assert found.cut(0.001) == pytest.approx(0.9) and found.cut(0.6) == pytest.approx(0.5)  # round(5.4) = 5 channels
    assert found.architecture() == found.architecture(keep=0.6) == found.architecture(threshold=found.cut(0.6))
    assert widths(found.architecture(keep=4 / 9)) == [1, 1, 2] and widths(found.architecture(keep=1.0)) == [4, 2, 3]
    even = Scales(space())  # equal scales stay together
    assert widths(even.architecture(keep=0.1)) == [4, 2, 3]


def test_probabilities_are_the_shares_of_thresholds() -> None:
    found = scales(space())
    p = found.probabilities()
    for name in p:
        derived = [found.architecture(keep=n / 9)[name] for n in range(1, 10)]
        assert p[name] == pytest.approx([derived.count(option) / 9 for option in space()[name].options], abs=1e-12)
        assert sum(p[name]) == pytest.approx(1.0)
    equal = Scales(space()).probabilities()
    assert equal == {"a.width": [0, 0, 0, 1], "b.width": [0, 1], "c.width": [0, 0, 1]}


def test_entropy_falls_as_channels_die() -> None:
    found = scales(space(), [1.0, 1.0, 1.0, 0, 0, 0, 0, 0, 0])
    assert found.entropy().item() == pytest.approx(math.log(3) / math.log(9))
    assert scales(space(), [0.0] * 8 + [2.0]).entropy().item() == pytest.approx(0.0, abs=1e-12)
    assert scales(space(), [0.0] * 9).entropy().item() == 0.0
    shares = [abs(s) / 4.5 for s in S]
    assert scales(space()).entropy().item() == pytest.approx(-sum(x * math.log(x) for x in shares) / math.log(9))


# -- restricted and tied spaces ---------------------------------------------------------------------------------------


def restricted() -> SearchSpace:
    return space().restrict({"a.width": [1, 4], "b.width": [2]})


def test_a_restriction_keeps_its_roots_scales() -> None:
    child = Scales(restricted()).double()
    child.load_state_dict(scales(space()).state_dict())
    soft = child.soft()
    a = soft["a.width"]
    assert isinstance(a, Mixture) and a.options == (1, 4) and soft["b.width"] == 2
    assert sums(a).tolist() == pytest.approx([0.9, 0.3, 0.3, 0.3]) and sums(soft["c.width"]).tolist() == pytest.approx(S[6:])
    assert child.l1().item() == pytest.approx(0.9 + 3 * 0.3 + 0.6 + 0.4 + 0.7)
    child.l1().backward()
    assert child.scales.grad is not None and child.scales.grad.tolist() == [1, 0, 0, 3, 0, 0, 1, 1, 1]
    assert widths(child.architecture(threshold=0.3)) == [4, 2, 3] and widths(child.architecture(threshold=0.4)) == [1, 2, 3]
    p = child.probabilities()
    for name in p:
        derived = [child.architecture(keep=n / 7)[name] for n in range(1, 8)]
        assert p[name] == pytest.approx([derived.count(option) / 7 for option in space()[name].options], abs=1e-12)
    assert p["b.width"] == [0.0, 1.0]
    share = torch.tensor([0.9, 0.3, 0.3, 0.3, 0.6, 0.4, 0.7]) / 3.5
    assert child.entropy().item() == pytest.approx(float(-(share * share.log()).sum() / math.log(7)), abs=1e-6)


def test_what_stays_is_rounded_down_to_an_option() -> None:
    """Channels that reach the threshold are counted, wherever they are."""
    coarse = SearchSpace([Choice("a.width", (2, 4, 8))], {})
    found = scales(coarse, [0.1, 0.5, 0.9])  # channels 1-2, 3-4, 5-8
    assert found.covers.tolist() == [2, 2, 4]
    assert [found.architecture(threshold=t)["a.width"] for t in (0.05, 0.5, 0.6, 1.0)] == [8, 4, 4, 2]
    assert found.probabilities()["a.width"] == pytest.approx([0.0, 0.75, 0.25])


def test_a_follower_copies_its_leader() -> None:
    tied = space().tie("c.width", "b.width", {1: 3, 2: 1})
    found = scales(tied)
    soft = found.soft()
    b, c = soft["b.width"], soft["c.width"]
    assert isinstance(b, Mixture) and isinstance(c, Mixture) and c.options == (3, 1) and c.weights is b.weights
    assert sums(c).tolist() == pytest.approx([0.2, 1.0, 1.0])  # weights 1.0 and -0.8
    assert found.l1().item() == pytest.approx(0.9 + 0.5 + 0.1 + 0.3 + 0.2 + 0.8)
    assert widths(found.architecture(threshold=0.1)) == [4, 2, 1] and widths(found.architecture(threshold=0.5)) == [2, 1, 3]
    assert sum(found.probabilities()["c.width"]) == 1.0


def test_an_operation_that_is_decided_needs_no_scale() -> None:
    ops = SearchSpace([*CHOICES, Choice("d.op", ("x", "y"), ordered=False)], {})
    with pytest.raises(ValueError, match=r"d\.op is no width.*Restrict it to one option"):
        Scales(ops)
    found = Scales(ops.restrict({"d.op": ["y"]}))
    assert found.soft()["d.op"] == "y" == found.architecture()["d.op"] and found.probabilities()["d.op"] == [0.0, 1.0]
    assert found.l1().item() == 4.5


# -- budgets, resuming, refusals --------------------------------------------------------------------------------------


class Sum:
    """A table at the price of 1 a channel."""

    def of(self, arch: dict[str, Any]) -> int:
        return sum(arch.values())


@pytest.mark.parametrize("price", ["channels", "macs"])
def test_the_dearest_architecture_within_a_budget(price: str) -> None:
    """Against every threshold, one after another."""
    of: SearchSpace = Space(11, (2, 3, 5)) if price == "macs" else space()
    table: Any = CostTable(build(Space(11, (2, 3, 5)), 3, 5), (8, 8), macs) if price == "macs" else Sum()
    values = torch.randn(62, generator=torch.Generator().manual_seed(4)).tolist() if price == "macs" else S
    found = scales(of, values)
    all_of_them = [table.of(found.architecture(threshold=abs(v))) for v in values] + [table.of(of.smallest())]
    assert len(set(all_of_them)) > 6
    for R in (min(all_of_them), max(all_of_them), *((a + b) / 2 for a, b in itertools.pairwise(sorted(all_of_them)))):
        assert table.of(found.for_budget(table, R)) == max(cost for cost in all_of_them if cost <= R)
    assert found.for_budget(table, math.inf) == of.largest()
    with pytest.raises(ValueError, match=r"A budget of \S+ cannot be reached: the narrowest network .* costs") as error:
        found.for_budget(table, min(all_of_them) - 1)
    assert "\n" not in str(error.value)


def test_a_step_and_its_resumption() -> None:
    """SGD on loss + L1 (Network Slimming): s - lr (ds + rho sign s)."""
    found = scales(space())
    descent = Descent(found.parameters(), lambda params: torch.optim.SGD(params, lr=0.1))
    descent.down(sums(found.soft()["a.width"])[1] + 0.01 * found.l1())
    expected = [s - 0.1 * (0.01 * math.copysign(1, s) + float(i == 1)) for i, s in enumerate(S)]
    assert found.scales.tolist() == pytest.approx(expected, abs=1e-15)
    again = Scales(space()).double()
    again.load_state_dict(found.state_dict())
    assert torch.equal(again.scales, found.scales) and again.architecture() == found.architecture()


def test_what_is_refused() -> None:
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"value = \S+: scales start above 0"):
            Scales(space(), value)
    for keep in (0.0, 1.1, -0.2, math.nan):
        with pytest.raises(ValueError, match=r"keep = \S+ is not a share of the channels\. Allowed: above 0, up to 1"):
            scales(space()).cut(keep)
    with pytest.raises(ValueError, match="no choice left"):
        Scales(space().restrict({choice.name: [1] for choice in CHOICES}))
    with pytest.raises(ValueError, match="not finite"):
        scales(space(), [math.nan] * 9).architecture()
    with pytest.raises(ValueError, match=r"w is no width"):
        Scales(SearchSpace([Choice("w", (0.5, 1.0))], {}))


@pytest.mark.slow
def test_resnet_164() -> None:
    found = Scales(Space())
    with torch.no_grad():
        found.scales.normal_(generator=torch.Generator().manual_seed(0))
    arch = found.architecture(keep=0.4)
    assert found.scales.numel() == 12112 and sum(arch.values()) == round(0.4 * 12112)  # type: ignore[arg-type]
    table = CostTable(build(Space(), 3, 10), (32, 32), macs)
    R = 0.3 * table.of(Space().largest())
    assert 0.299 * R / 0.3 < table.of(found.for_budget(table, R)) <= R
    assert all(sum(row) == pytest.approx(1.0) for row in found.probabilities().values())
