"""Every published or derived figure of TAS (arXiv 1905.09717; configurations of the released code), to the last digit."""
from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nas.alpha import Alpha
from nas.cost import CostTable, activations, budget, params
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, Choice, Mixture, SearchSpace
from supernets.extract import extract
from supernets.layers import Layer, Shape
from supernets.resnet import ResNet

WIDTHS = {
    16: "4 6 8 9 11 12 14 16", 32: "9 12 16 19 22 25 28 32", 64: "19 25 32 38 44 51 57 64",
    128: "38 51 64 76 89 102 115 128", 256: "76 102 128 153 179 204 230 256", 512: "153 204 256 307 358 409 460 512",
    1024: "307 409 512 614 716 819 921 1024", 2048: "614 819 1024 1228 1433 1638 1843 2048",
}  # fmt: skip
DEPTHS = {20: (1, 2, 3), 32: (1, 3, 5), 56: (1, 3, 5, 7, 9), 110: (1, 3, 5, 7, 9, 11, 13, 15, 17, 18)}
# net, classes -> conv MACs of the unpruned net, parameters, trainable parameters of the search net with its logits
UNPRUNED = {
    (20, 10): (40_812_544, 272_282, 279_089), (32, 10): (69_124_096, 466_714, 477_305), (56, 10): (125_747_200, 855_578, None),
    (110, 10): (253_149_184, 1_730_522, None), (32, 100): (69_124_096, 472_564, None),
}  # fmt: skip
# all uniform, uniform width at max depth, max width at uniform depth, all at max: MFLOPs of the estimator
EXPECTED = {20: (10.8325, 16.5489, 26.6574, 40.8132), 32: (16.5489, 27.9816, 40.8132, 69.1247)}
# depth, classes, blocks kept, est (M), true MACs, parameters, channels
CONFIGS = {
    "C010-ResNet20": (20, 10, (3, 3, 3), 22.444472, 22_444_472, 228_130,
        "16 6 4 4 4 4 4 32 32 12 19 32 28 64 64 64 64 64 44"),
    "C010-ResNet32": (32, 10, (5, 5, 5), 34.945344, 34_945_344, 320_539,
        "16 6 4 12 4 4 16 9 9 6 14 32 32 9 19 28 9 32 19 32 9 64 64 64 64 64 64 64 32 38 32"),
    "C100-ResNet32": (32, 100, (5, 5, 5), 42.468608, 42_468_608, 427_330,
        "16 4 4 6 11 6 4 8 4 4 4 32 32 9 28 28 28 28 28 32 32 64 64 64 64 64 64 64 64 64 64"),
    "CIFAR010-TAS-R56": (56, 10, (5, 5, 5), 57.525950, 59_451_390, 441_494,
        "16 16 16 14 14 14 16 12 16 6 16 4 4 4 14 4 4 6 4 32 32 32 32 32 32 22 25 16 32 19 9 9 16 25 12 16 9 "
        "64 64 64 64 64 64 64 64 64 51 19 19 32 51 25 32 19 19"),
    "C010-ResNet110": (110, 10, (11, 11, 9), 117.498238, 119_259_258, 795_864,
        "16 14 16 14 16 16 16 16 16 14 16 16 16 12 16 16 16 9 16 8 16 4 16 4 4 4 16 4 4 4 4 6 6 4 6 11 4 "
        "32 32 32 32 32 32 32 32 28 32 32 28 22 22 22 32 32 25 28 9 9 28 12 9 12 32 9 9 22 12 16 9 12 9 9 9 "
        "64 64 64 64 64 64 64 64 64 64 64 64 64 64 64 38 64 25 19 19 19 19 19 25 32 19 19 25 25 19 19 38 38 19 19 51"),
}  # fmt: skip


@cache
def supernet(depth: int, classes: int) -> ResNet:
    return ResNet(CifarResNet(depth, kind="tas"), classes=classes)


@cache
def table(depth: int, classes: int) -> CostTable:
    return CostTable(supernet(depth, classes), (32, 32))


def arch_of(space: CifarResNet, channels: str, kept: tuple[int, ...]) -> Arch:
    """A released configuration: the stem, then two widths for every block of the full net, and the blocks kept."""
    widths = iter(map(int, channels.split()))
    arch: Arch = {"stem.width": next(widths)}
    for s, (stage, depth) in enumerate(zip(space.stages, kept)):
        arch[f"stage{s}.depth"] = depth
        for b in range(stage.blocks):
            for c in range(2):
                arch[f"stage{s}.block{b}.conv{c}.width"] = next(widths)
    assert next(widths, None) is None
    return arch


def test_width_and_depth_lists() -> None:
    space = ImageNetResNet(50, kind="tas")
    found = {max(choice.options): choice.options for choice in space.choices if choice.name.endswith("width")}
    found |= {max(c.options): c.options for c in CifarResNet(20, kind="tas").choices if c.name.endswith("width")}
    assert found == {full: tuple(map(int, listed.split())) for full, listed in WIDTHS.items()}
    assert {d: CifarResNet(d, kind="tas")["stage0.depth"].options for d in DEPTHS} == DEPTHS
    assert [space[f"stage{s}.depth"].options for s in range(4)] == [(1, 2, 3), (1, 2, 4), (2, 4, 6), (1, 2, 3)]
    assert [ImageNetResNet(18, kind="tas")[f"stage{s}.depth"].options for s in range(4)] == [(1, 2)] * 4


@pytest.mark.parametrize("net", UNPRUNED)
def test_unpruned_networks(net: tuple[int, int]) -> None:
    conv, parameters, searched = UNPRUNED[net]
    full = supernet(*net).space.largest()
    features = 64
    assert table(*net).of(full) == conv + features * net[1]  # the page's own total adds the bias: + classes
    assert table(*net).priced(params).of(full) == parameters
    if searched:
        alpha = Alpha(supernet(*net).space)
        count = sum(p.numel() for module in (supernet(*net), alpha) for p in module.parameters())
        assert count == searched


@pytest.mark.parametrize(("depth", "shapes"), [(20, [(19, 8), (3, 3)]), (32, [(31, 8), (3, 3)]), (56, [(55, 8), (3, 5)]),
                                               (110, [(109, 8), (3, 10)])])  # fmt: skip
def test_logit_shapes(depth: int, shapes: list[tuple[int, int]]) -> None:
    alpha = Alpha(CifarResNet(depth, kind="tas"))
    assert sorted(tuple(p.shape) for p in alpha.parameters()) == sorted(shapes)


@pytest.mark.parametrize("depth", EXPECTED)
def test_expected_cost_at_uniform_alpha(depth: int) -> None:
    costs, space = table(depth, 10).seen("searched"), supernet(depth, 10).space
    full = space.largest()
    uniform = {c.name: Mixture(c.options, torch.full((len(c.options),), 1 / len(c.options))) for c in space.choices}
    found = []
    for widths, depths in ((True, True), (True, False), (False, True), (False, False)):
        soft = {n: uniform[n] if (depths if n.endswith("depth") else widths) else full[n] for n in full}
        found.append(round(float(costs.expected(soft)) / 1e6, 4))
    assert tuple(found) == EXPECTED[depth]


def test_depth_only() -> None:
    space = supernet(20, 10).space
    for kept in ((1, 1, 1), (2, 1, 1), (1, 3, 2), (3, 3, 3)):
        arch = space.largest() | {f"stage{s}.depth": d for s, d in enumerate(kept)}
        assert table(20, 10).of(arch) - 640 == 12_500_992 + 4_718_592 * (sum(kept) - 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_released_configurations(name: str) -> None:
    depth, classes, kept, estimate, true, parameters, channels = CONFIGS[name]
    net, costs = supernet(depth, classes), table(depth, classes)
    arch = arch_of(net.space, channels, kept)
    assert costs.of(arch) == true
    assert costs.of(net.space.canonical(arch)) == true  # what a removed block says is inert
    assert costs.priced(params).of(arch) == parameters
    assert round(costs.seen("estimated").of(arch) / 1e6, 6) == estimate
    plain = extract(net, arch, torch.zeros(1, 3, 32, 32), inherit=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain.eval()(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * true
    assert sum(p.numel() for p in plain.parameters()) == parameters


class Small(SearchSpace):
    """Two widths and a depth; the second layer is there at depth 2 only."""

    def __init__(self) -> None:
        super().__init__([Choice("a", (2, 3, 5)), Choice("b", (1, 4)), Choice("d", (1, 2))], {})


class SmallNet:
    def __init__(self) -> None:
        self.space = Small()

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return [
            Layer("one", "conv", ("a",), lambda a: Shape(3, a, (3, 3), hw=input_size)),
            Layer("two", "conv", ("b", "a", "d"), lambda b, a, d: Shape(a, b, hw=input_size) if d > 1 else None),
            Layer("head", "linear", ("a",), lambda a: Shape(a, 10, bias=True)),
        ]


def enumerated(costs: CostTable, soft: dict) -> float:
    """sum over all architectures of probability times cost, by brute force."""
    total = 0.0
    names = [c.name for c in costs.root.choices]
    rows = [[(setting, 1.0)] if not isinstance(setting, Mixture) else list(zip(setting.options, setting.weights.tolist()))
            for setting in (soft[name] for name in names)]  # fmt: skip
    for index in np.ndindex(*(len(row) for row in rows)):
        picked = [row[i] for row, i in zip(rows, index)]
        total += float(np.prod([p for _, p in picked])) * costs.of(dict(zip(names, (v for v, _ in picked))))
    return total


def small_supernet(kind: str) -> ResNet:
    """One block a stage, each choice cut to few options, so that everything can be enumerated."""
    return ResNet(CifarResNet(8, kind=kind, widths=(8, 12, 16)), classes=4)


@pytest.mark.parametrize("kind", ["tied", "tas"])
@pytest.mark.parametrize("view", ["derived", "searched", "estimated"])
@pytest.mark.parametrize("options", ["two", "all"])
def test_expected_equals_enumeration(kind: str, view: str, options: str) -> None:
    costs = CostTable(small_supernet(kind), (8, 8), view=view)
    rng = random.Random(0)
    g = torch.Generator().manual_seed(0)
    soft: dict = {}
    open_choices = set(rng.sample([c.name for c in costs.root.choices if len(c.options) > 1], 4 if options == "all" else 6))
    for choice in costs.root.choices:
        if choice.name not in open_choices:
            soft[choice.name] = rng.choice(choice.options)
            continue
        picked = choice.options if options == "all" else tuple(sorted(rng.sample(choice.options, 2)))
        soft[choice.name] = Mixture(picked, torch.softmax(torch.randn(len(picked), generator=g).double(), 0))
    assert float(costs.expected(soft)) == pytest.approx(enumerated(costs, soft), rel=1e-12)


def test_expected_of_tied_choices_draws_them_together() -> None:
    costs = CostTable(SmallNet(), (4, 4))
    space = costs.root.tie("b", "a", {2: 1, 3: 4, 5: 4})
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    soft = {"a": Mixture((2, 3, 5), p), "d": Mixture((1, 2), torch.tensor([0.25, 0.75], dtype=torch.float64))}
    by_hand = sum(
        float(pa) * pd * costs.of({"a": a, "b": space.ties["b"].values[a], "d": d})
        for a, pa in zip((2, 3, 5), p) for d, pd in ((1, 0.25), (2, 0.75))
    )  # fmt: skip
    assert float(costs.expected(soft, space)) == pytest.approx(by_hand, rel=1e-12)


def test_expected_is_differentiable() -> None:
    costs = CostTable(SmallNet(), (4, 4))
    logits = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2, 2)]
    names = [("a", (2, 3, 5)), ("b", (1, 4)), ("d", (1, 2))]
    assert torch.autograd.gradcheck(
        lambda *z: costs.expected({n: Mixture(o, torch.softmax(x, 0)) for (n, o), x in zip(names, z)}), logits
    )


@pytest.mark.parametrize("kind", ["tied", "tas"])
@pytest.mark.parametrize("view", ["derived", "estimated"])
def test_batch_equals_one_by_one(kind: str, view: str) -> None:
    net = ResNet(CifarResNet(20, kind=kind), classes=10)
    for price in (None, params):
        costs = CostTable(net, (32, 32), view=view) if price is None else CostTable(net, (32, 32), price, view)
        codes = net.space.random_codes(np.random.default_rng(0), 300)
        assert costs.batch(codes).tolist() == [costs.of(arch) for arch in net.space.decode(codes)]
        raw = np.random.default_rng(1).integers(0, [len(c.options) for c in net.space.choices], size=(50, codes.shape[1]))
        assert costs.batch(raw).tolist() == [costs.of(arch) for arch in net.space.decode(raw)]
    with pytest.raises(ValueError, match="this space needs"):
        costs.batch(codes[:, :-1])


def test_values_off_the_lists_are_counted() -> None:
    costs = CostTable(SmallNet(), (4, 4))
    assert costs.of({"a": 7, "b": 6, "d": 2}) == 3 * 7 * 9 * 16 + 7 * 6 * 16 + 70
    assert costs.priced(activations).of({"a": 7, "b": 6, "d": 1}) == 7 * 16 + 10
    assert costs.priced(params).of({"a": 7, "b": 6, "d": 2}) == 3 * 7 * 9 + 42 + 80


def test_budgets() -> None:
    costs, space = table(20, 10), supernet(20, 10).space
    assert budget("55%", costs, space) == pytest.approx(0.55 * 40_813_184)
    assert budget(2e7, costs, space) == 2e7
    with pytest.raises(ValueError, match=r"target = 1% .* Smallest cost: 1,001,854 .*largest: 40,813,184"):
        budget("1%", costs, space)
    with pytest.raises(ValueError, match=r"'much' is not a budget\. Allowed: a share such as 55%"):
        budget("much", costs, space)
