"""Prices by hand; cost tables: one architecture, many, the expectation, budgets. Letters as in nas.cost."""
from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from nas.budget import budget
from nas.cost import CostTable, activations, macs, params
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, Mixture, SearchSpace, Setting
from supernets.layers import VIEWS, Layer, Shape
from supernets.resnet import ResNet

KINDS = ("tied", "tas")


def table(kind: str, view: str = "derived", price: Any = macs) -> CostTable:
    return CostTable(ResNet(CifarResNet(14, kind, widths=(4, 4, 6)), classes=5), (8, 8), price, view)


# -- prices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, shape, products, numbers, outputs", [
    ("conv", Shape(3, 5, (3, 1), hw=(4, 6)), 3 * 5 * 3 * 4 * 6, 3 * 5 * 3, 5 * 4 * 6),
    ("conv", Shape(8, 8, (3, 3), 2, groups=8, hw=(2, 2), bias=True), 8 * 9 * 4, 8 * 9 + 8, 8 * 4),
    ("linear", Shape(7, 10, bias=True), 70, 80, 10),
    ("norm", Shape(6, 6, hw=(4, 4)), 0, 12, 0),
    ("table", Shape(5, 6), 0, 30, 0),
])
def test_prices_of_one_layer(op: str, shape: Shape, products: int, numbers: int, outputs: int) -> None:
    assert (macs(op, shape), params(op, shape), activations(op, shape)) == (products, numbers, outputs)


def test_activations_of_a_whole_net_by_hand() -> None:
    """8x8 images, one basic block a stage at widths 2, 2, 3: stem and two convolutions at 8x8; then two and the shortcut
    at 4x4 and at 2x2; five logits."""
    space = CifarResNet(8, "tied", widths=(2, 2, 3))
    costs = CostTable(ResNet(space, classes=5), (8, 8), activations)
    assert costs.of(space.largest()) == 3 * 2 * 64 + 3 * 2 * 16 + 3 * 3 * 4 + 5


# -- one and many -------------------------------------------------------------------------------------------------------


def random_archs(space: SearchSpace, n: int) -> list[Arch]:
    """Any option anywhere, inert choices too."""
    rng = random.Random(1)
    return [{choice.name: rng.choice(choice.options) for choice in space.choices} for _ in range(n)]


@pytest.mark.parametrize("price", [macs, params, activations], ids=lambda price: price.__name__)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_are_one_by_one(kind: str, view: str, price: Any) -> None:
    costs = table(kind, view, price)
    archs = random_archs(costs.root, 40)
    codes = costs.root.encode(archs)
    found = costs.batch(codes)
    assert found.tolist() == [costs.of(arch) for arch in archs] and found.dtype == np.int64
    canonical = costs.root.canonical_codes(codes)
    assert costs.batch(canonical).tolist() == [costs.of(costs.root.canonical(arch)) for arch in archs]
    if view == "derived":  # what an inert choice says has no price; the estimators read it
        assert costs.batch(canonical).tolist() == found.tolist()
    assert all(isinstance(costs.of(arch), int) for arch in archs[:3])


def test_many_chunks_and_a_price_that_is_no_integer() -> None:
    costs = table("tas", price=lambda op, shape: 0.5 * shape.c_out)
    codes = costs.root.random_codes(np.random.default_rng(1), 32768 + 5)
    found = costs.batch(codes)
    some = [0, 1, 32767, 32768, 32772]
    assert found.dtype == np.float64
    assert found[some].tolist() == [costs.of(arch) for arch in costs.root.decode(codes[some])]


def test_the_terms_add_up() -> None:
    """Dynamic programming walks these: a table a set of choices, at most four each."""
    for kind, view in itertools.product(KINDS, ("derived", "searched")):
        costs = table(kind, view)
        for arch in random_archs(costs.root, 5):
            at = {name: costs.root[name].options.index(value) for name, value in arch.items()}
            assert sum(int(t[tuple(at[name] for name in on)]) for on, t in costs.terms.items()) == costs.of(arch)
        assert max(map(len, costs.terms)) <= 4


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_tables(depth: int) -> None:
    costs = CostTable(ResNet(ImageNetResNet(depth, "tas", widths=(4, 4, 6, 6)), classes=5), (32, 32))
    archs = random_archs(costs.root, 5)
    assert costs.batch(costs.root.encode(archs)).tolist() == [costs.of(arch) for arch in archs]


def test_wrong_codes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes have shape \(3,\); this space needs \(N, 12\)"):
        table("tied").batch(np.zeros(3, dtype=int))


def test_views_and_prices_of_a_table() -> None:
    costs = table("tas")
    assert costs.seen("derived") is costs and costs.seen("searched") is costs.seen("searched")
    arch = random_archs(costs.root, 1)[0]
    assert costs.seen("estimated").of(arch) == table("tas", "estimated").of(arch)
    assert costs.priced(params).of(arch) == table("tas", price=params).of(arch)
    with pytest.raises(ValueError, match="view = 'paid' is not known"):
        costs.seen("paid")


# -- expectation --------------------------------------------------------------------------------------------------------


def mixed(space: SearchSpace, names: Sequence[str], count: int | None) -> dict[str, Setting]:
    """``names`` as mixtures of all root options, or of ``count`` of them; the others hard."""
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    soft: dict[str, Setting] = dict(random_archs(space.root, 1)[0])
    for name in names:
        options = space.root[name].options
        picked = options if count is None else tuple(sorted(rng.sample(options, count)))
        w = torch.rand(len(picked), generator=generator, dtype=torch.float64) + 0.1
        soft[name] = Mixture(picked, (w / w.sum()).requires_grad_())
    return soft


def enumerated(costs: CostTable, soft: Mapping[str, Setting], space: SearchSpace) -> float:
    """Sum over all combinations of the mixtures' options of probability times the exact cost."""
    leading = {name: s for name, s in soft.items() if isinstance(s, Mixture) and name not in space.ties}
    total = 0.0
    for positions in itertools.product(*(range(len(mixture.options)) for mixture in leading.values())):
        picked = dict(zip(leading, positions))
        arch: Any = {**soft, **{name: leading[name].options[j] for name, j in picked.items()}}
        arch |= {name: tie.values[arch[tie.leader]] for name, tie in space.ties.items()}
        odds = 1.0
        for name, j in picked.items():
            odds *= float(leading[name].weights[j].detach())
        total += odds * costs.of(arch)
    return total


NAMES = {
    "tied": ["stage0.depth", "stage1.depth", "stage2.depth", "stage0.width", "stage1.width", "stage2.width",
             "stage1.block0.conv0.width", "stage1.block1.conv0.width"],
    "tas": ["stage0.depth", "stage1.depth", "stem.width", "stage0.block0.conv1.width", "stage0.block1.conv1.width",
            "stage1.block0.conv0.width", "stage1.block0.conv1.width", "stage1.block1.conv1.width"],
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
def test_expectation_is_enumeration(kind: str, view: str) -> None:
    costs = table(kind, view)
    for names, count in ((NAMES[kind], 2), (NAMES[kind][:5], None)):
        soft = mixed(costs.root, names, count)
        found = costs.expected(soft)
        assert found.dtype == torch.float64 and found.shape == ()
        assert found.item() == pytest.approx(enumerated(costs, soft, costs.root), rel=1e-12)


def test_the_expectation_of_a_hard_architecture_is_its_cost() -> None:
    for kind, view in itertools.product(KINDS, VIEWS):
        costs = table(kind, view)
        arch = random_archs(costs.root, 1)[0]
        assert costs.expected(arch).item() == costs.of(arch)


COARSE = {1: 1, 2: 1, 3: 4, 4: 4}
TIES = {
    "tied": [("stage0.block1.conv0.width", "stage0.block0.conv0.width", COARSE), ("stage1.width", "stage0.width", COARSE),
             ("stage2.depth", "stage1.depth", {1: 2, 2: 1})],
    "tas": [("stage0.block0.conv1.width", "stage0.block0.conv0.width", COARSE),  # both in one term
            ("stage0.block1.conv1.width", "stage0.block0.conv0.width", {1: 4, 2: 3, 3: 2, 4: 1}),
            ("stage1.block0.conv0.width", "stem.width", COARSE), ("stage2.depth", "stage1.depth", {1: 2, 2: 1})],
}  # fmt: skip


@pytest.mark.parametrize("view", ["derived", "searched"])
@pytest.mark.parametrize("kind", KINDS)
def test_expectation_with_ties_is_enumeration(kind: str, view: str) -> None:
    costs = table(kind, view)
    space: SearchSpace = costs.root
    for follower, leader, values in TIES[kind]:
        space = space.tie(follower, leader, values)
    leaders = list(dict.fromkeys(tie.leader for tie in space.ties.values()))
    others = [name for name in NAMES[kind] if name not in space.ties and name not in leaders]
    for names, count in ((leaders + others, 2), (leaders + others[:1], None)):
        soft = mixed(space, names, count)
        found = costs.expected(soft, space).item()
        assert found == pytest.approx(enumerated(costs, soft, space), rel=1e-12)
        # drawn independently, the followers' hard settings cost something else
        assert found != pytest.approx(costs.expected(soft).item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    """The expectation is linear in each weight, so central differences are exact but for rounding."""
    costs = table(kind, "searched")
    soft = mixed(costs.root, NAMES[kind], 2)
    costs.expected(soft).backward()
    for name in NAMES[kind]:
        mixture = soft[name]
        assert isinstance(mixture, Mixture)
        for j in range(2):
            ends = []
            for h in (1e-3, -1e-3):
                w = mixture.weights.detach().clone()
                w[j] += h
                ends.append(costs.expected({**soft, name: mixture._replace(weights=w)}).item())
            assert mixture.weights.grad[j].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-7)


def test_expectation_works_on_the_mixtures_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard settings of a restricted space join the alphas' device ("meta" stands for a GPU)."""
    costs = table("tied")
    soft = mixed(costs.root, NAMES["tied"][1:], None)
    far = {n: s._replace(weights=s.weights.detach().to("meta")) if isinstance(s, Mixture) else s for n, s in soft.items()}
    stack = torch.stack
    met: set[str] = set()

    def strict(rows: Any, dim: int = 0) -> Any:
        met.update(row.device.type for row in rows)
        return stack(rows, dim)

    monkeypatch.setattr(torch, "stack", strict)
    assert costs.expected(far).device.type == "meta" and met == {"meta"}


def test_values_off_the_lists_have_a_cost_but_no_expectation() -> None:
    costs = table("tas")
    arch = random_archs(costs.root, 1)[0] | {"stem.width": 99}
    assert costs.of(arch) > costs.of(arch | {"stem.width": 4})
    with pytest.raises(ValueError, match=r"stem\.width = 99 is not an option, .* Allowed: \(1, 2, 3, 4\)"):
        costs.expected(arch)


# -- budgets ------------------------------------------------------------------------------------------------------------


def test_a_budget_is_a_share_of_the_largest_or_a_number() -> None:
    costs = table("tas")
    full = costs.of(costs.root.largest())
    for given, expected in (("55%", 0.55 * full), (" 55 % ", 0.55 * full), ("100%", full), (0.5 * full, 0.5 * full),
                            (str(full), full), (costs.of(costs.root.smallest()), costs.of(costs.root.smallest()))):
        assert budget(given, costs, costs.root) == pytest.approx(expected, rel=1e-15)


def test_a_share_is_of_the_root_even_where_the_space_is_restricted() -> None:
    costs = table("tas")
    space = costs.root.restrict({f"stage{s}.depth": [1] for s in range(3)})
    low, high = costs.of(space.smallest()), costs.of(space.largest())
    full = costs.of(costs.root.largest())
    share = 100 * high / full - 0.1
    assert low < budget(f"{share}%", costs, space) < high
    with pytest.raises(ValueError, match=rf"target = 90% .* cannot be reached .* Smallest cost: {low:,} .*: {high:,}"):
        budget("90%", costs, space)


@pytest.mark.parametrize("given, words", [
    ("half", "floor = 'half' is not a budget. Allowed: a share .55%., or a number"),
    ("%", "floor = '%' is not a budget"), ("", "floor = '' is not a budget"), ("1e", "is not a budget"),
    ("0%", "floor = 0% .* cannot be reached"), (-5, "floor = -5 .* cannot be reached"),
    ("nan", "floor = nan .* cannot be reached"),
    (1e15, "cannot be reached"), ("101%", "cannot be reached"),
])
def test_what_is_no_budget_is_refused(given: Any, words: str) -> None:
    costs = table("tied")
    with pytest.raises(ValueError, match=words) as error:
        budget(given, costs, costs.root, "floor")
    assert "\n" not in str(error.value)


def test_layers_with_one_set_of_choices_share_a_table() -> None:
    class Net:
        space = SearchSpace([], {})

        def layers(self, input_size: tuple[int, int], view: str) -> list[Layer]:
            return [Layer(name, "linear", (), lambda: Shape(2, 3)) for name in "ab"]

    costs = CostTable(Net(), (1, 1))
    assert {on: int(t) for on, t in costs.terms.items()} == {(): 12} and costs.of({}) == 12
    assert costs.batch(np.zeros((2, 0), dtype=int)).tolist() == [12, 12] and costs.expected({}).item() == 12
