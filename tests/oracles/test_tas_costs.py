"""Every figure of section 6 of the method page of TAS (arXiv 1905.09717): lists, costs of unpruned, expected, shallow and
derived nets, to the last digit. Figures are facts; the configs are published widths and depths."""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nas.alpha import Alpha
from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces.resnet import CifarResNet, ImageNetResNet, width_options
from search_spaces.space import Arch, Mixture, Setting
from supernets.extract import extract
from supernets.resnet import ResNet

# -- 1: lists -----------------------------------------------------------------------------------------------------------

WIDTHS = {
    16: "4 6 8 9 11 12 14 16", 32: "9 12 16 19 22 25 28 32", 64: "19 25 32 38 44 51 57 64",
    128: "38 51 64 76 89 102 115 128", 256: "76 102 128 153 179 204 230 256", 512: "153 204 256 307 358 409 460 512",
    1024: "307 409 512 614 716 819 921 1024", 2048: "614 819 1024 1228 1433 1638 1843 2048",
}  # fmt: skip
CIFAR_DEPTHS = {
    14: (1, 2), 20: (1, 2, 3), 32: (1, 3, 5), 56: (1, 3, 5, 7, 9), 110: (1, 3, 5, 7, 9, 11, 13, 15, 17, 18),
    164: (1, 3, 5, 7, 9, 11, 13, 15, 17, 18),
}  # fmt: skip
IMAGENET_DEPTHS = {18: [(1, 2)] * 4, 50: [(1, 2, 3), (1, 2, 4), (2, 4, 6), (1, 2, 3)]}
LOGITS = {20: ((19, 8), (3, 3)), 32: ((31, 8), (3, 3)), 56: ((55, 8), (3, 5)), 110: ((109, 8), (3, 10))}


@pytest.mark.parametrize("full", WIDTHS)
def test_width_lists(full: int) -> None:
    assert " ".join(map(str, width_options(full))) == WIDTHS[full]


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_depth_lists(depth: int) -> None:
    space = CifarResNet(depth, "tas")
    assert [space[space.depth_name(s)].options for s in range(3)] == [CIFAR_DEPTHS[depth]] * 3


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_depth_lists_of_imagenet(depth: int) -> None:
    space = ImageNetResNet(depth, "tas")
    assert [space[space.depth_name(s)].options for s in range(4)] == IMAGENET_DEPTHS[depth]


@pytest.mark.parametrize("depth", LOGITS)
def test_shapes_of_the_logits(depth: int) -> None:
    alpha = Alpha(CifarResNet(depth, "tas"))
    assert sorted(tuple(p.shape) for p in alpha.parameters()) == sorted(LOGITS[depth])
    widths = alpha.logits["8"].detach()
    assert float(widths.std()) == pytest.approx(0.01, rel=0.2) and abs(float(widths.mean())) < 0.003


# -- 3: expected cost at alpha = beta = 0 -------------------------------------------------------------------------------


@lru_cache
def net(depth: int, classes: int = 10) -> ResNet:
    return ResNet(CifarResNet(depth, "tas"), classes=classes)


@lru_cache
def table(depth: int, classes: int = 10, view: str = "derived", price: str = "macs") -> CostTable:
    return CostTable(net(depth, classes), (32, 32), {"macs": macs, "params": params}[price], view)


EXPECTED = [  # net, uniform widths, uniform depths, MFLOPs
    (20, True, True, "10.8325"), (20, True, False, "16.5489"), (20, False, True, "26.6574"), (20, False, False, "40.8132"),
    (32, True, True, "16.5489"), (32, True, False, "27.9816"), (32, False, True, "40.8132"), (32, False, False, "69.1247"),
]  # fmt: skip


@pytest.mark.parametrize("depth, widths, depths, mflops", EXPECTED)
def test_expected_cost_of_uniform_alphas(depth: int, widths: bool, depths: bool, mflops: str) -> None:
    """The page rounds to four decimals; its estimator counts the classifier's products but no bias."""
    costs, soft = table(depth, view="searched"), {}
    for choice in costs.root.choices:
        K = len(choice.options)
        uniform = depths if choice.name.endswith("depth") else widths
        soft[choice.name] = Mixture(choice.options, torch.full((K,), 1 / K)) if uniform else choice.options[-1]
    assert f"{costs.expected(soft).item() / 1e6:.4f}" == mflops


def test_the_expected_cost_of_fresh_alphas_is_near_uniform() -> None:
    alpha = Alpha(table(20).root, std=0.0)
    assert f"{table(20, view='searched').expected(alpha.soft()).item() / 1e6:.4f}" == "10.8325"


# -- 4, 5: unpruned and shallow nets ------------------------------------------------------------------------------------

UNPRUNED = [  # net, classes, conv MACs, M with fc and its bias, parameters
    (20, 10, 40_812_544, "40.813194", 272_282), (32, 10, 69_124_096, "69.124746", 466_714),
    (56, 10, 125_747_200, "125.747850", 855_578), (110, 10, 253_149_184, "253.149834", 1_730_522),
    (32, 100, None, "69.130596", 472_564),
]  # fmt: skip


@pytest.mark.parametrize("depth, classes, conv, total, parameters", UNPRUNED)
def test_unpruned_nets(depth: int, classes: int, conv: int | None, total: str, parameters: int) -> None:
    """The page's total counts one more for each class, the bias of the classifier; ours does not."""
    arch = table(depth, classes).root.largest()
    found = table(depth, classes).of(arch)
    assert conv is None or found == conv + 64 * classes
    assert f"{(found + classes) / 1e6:.6f}" == total
    assert table(depth, classes, price="params").of(arch) == parameters
    assert table(depth, classes, "estimated").of(arch) == table(depth, classes, "searched").of(arch) == found


@pytest.mark.parametrize("depth, parameters", [(20, 279_089), (32, 477_305)])
def test_parameters_of_the_search_net(depth: int, parameters: int) -> None:
    trained = [*net(depth).parameters(), *Alpha(table(depth).root).parameters()]
    assert sum(p.numel() for p in trained) == parameters


@pytest.mark.parametrize("view", ["derived", "estimated", "searched"])
def test_depth_alone(view: str) -> None:
    """One block a stage costs 12,500,992 in convolutions, each further one 4,718,592."""
    costs = table(32, view=view)
    for blocks in ((1, 1, 1), (3, 1, 1), (1, 5, 1), (1, 1, 3), (3, 5, 1), (5, 5, 5)):
        arch = costs.root.largest() | {f"stage{s}.depth": d for s, d in enumerate(blocks)}
        assert costs.of(arch) == 12_500_992 + 4_718_592 * (sum(blocks) - 3) + 640


# -- 6: derived nets ----------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """A published config and its costs: ``est`` the file's field (M), ``conv`` and ``fc`` of the net that is built."""

    depth: int
    classes: int
    blocks: tuple[int, int, int]
    est: str
    conv: int
    fc: int
    parameters: int
    widths: str


CONFIGS = {
    "C010-ResNet20": Config(
        20, 10, (3, 3, 3), "22.444472", 22_444_032, 440, 228_130,
        "16 6 4 4 4 4 4 32 32 12 19 32 28 64 64 64 64 64 44"),
    "C010-ResNet32": Config(
        32, 10, (5, 5, 5), "34.945344", 34_945_024, 320, 320_539,
        "16 6 4 12 4 4 16 9 9 6 14 32 32 9 19 28 9 32 19 32 9 64 64 64 64 64 64 64 32 38 32"),
    "C100-ResNet32": Config(
        32, 100, (5, 5, 5), "42.468608", 42_462_208, 6_400, 427_330,
        "16 4 4 6 11 6 4 8 4 4 4 32 32 9 28 28 28 28 28 32 32 64 64 64 64 64 64 64 64 64 64"),
    "CIFAR010-TAS-R56": Config(
        56, 10, (5, 5, 5), "57.525950", 59_450_880, 510, 441_494,
        "16 16 16 14 14 14 16 12 16 6 16 4 4 4 14 4 4 6 4 32 32 32 32 32 32 22 25 16 32 19 9 9 16 25 12 16 9 64 64 64 64 64 "
        "64 64 64 64 51 19 19 32 51 25 32 19 19"),
    "C010-ResNet110": Config(
        110, 10, (11, 11, 9), "117.498238", 119_259_008, 250, 795_864,
        "16 14 16 14 16 16 16 16 16 14 16 16 16 12 16 16 16 9 16 8 16 4 16 4 4 4 16 4 4 4 4 6 6 4 6 11 4 32 32 32 32 32 32 "
        "32 32 28 32 32 28 22 22 22 32 32 25 28 9 9 28 12 9 12 32 9 9 22 12 16 9 12 9 9 9 64 64 64 64 64 64 64 64 64 64 64 "
        "64 64 64 64 38 64 25 19 19 19 19 19 25 32 19 19 25 25 19 19 38 38 19 19 51"),
}  # fmt: skip


def arch_of(config: Config) -> Arch:
    """A config without its leading 3: the stem, then two widths for each block of the full net."""
    widths = iter(map(int, config.widths.split()))
    arch: Arch = {"stem.width": next(widths)}
    for s in range(3):
        arch[f"stage{s}.depth"] = config.blocks[s]
        for b in range((config.depth - 2) // 6):
            arch |= {f"stage{s}.block{b}.conv{c}.width": next(widths) for c in range(2)}
    assert next(widths, None) is None
    return arch


@pytest.fixture(params=list(CONFIGS.values()), ids=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> Config:
    return request.param


def test_predicted_costs_of_published_nets(config: Config) -> None:
    arch, total = arch_of(config), config.conv + config.fc
    table(config.depth).root.check(arch)
    assert table(config.depth, config.classes).of(arch) == total
    assert table(config.depth, config.classes, price="params").of(arch) == config.parameters
    assert f"{table(config.depth, config.classes, 'estimated').of(arch) / 1e6:.6f}" == config.est
    codes = table(config.depth).root.encode([arch])
    assert table(config.depth, config.classes).batch(codes).tolist() == [total]
    assert f"{table(config.depth, config.classes, 'estimated').batch(codes)[0] / 1e6:.6f}" == config.est


def test_counted_costs_of_published_nets(config: Config) -> None:
    """Counted by torch on the network that is built; its parameters are what an optimizer would get."""
    example = torch.zeros(1, 3, 32, 32)
    graph = extract(net(config.depth, config.classes), arch_of(config), example, inherit=False)
    assert counted(graph, example) == (config.conv + config.fc, config.parameters)


def test_the_estimate_is_below_the_truth_where_depth_is_pruned() -> None:
    """The removed last block's width is read: C010-ResNet110 writes 4 for stage 0 and 9 for stage 1."""
    config = CONFIGS["C010-ResNet110"]
    arch, costs = arch_of(config), table(110, view="estimated")
    assert (arch["stage0.block17.conv1.width"], arch["stage1.block17.conv1.width"]) == (4, 9)
    kept = arch | {f"stage{s}.block17.conv1.width": arch[f"stage{s}.block{n - 1}.conv1.width"]
                   for s, n in enumerate(config.blocks)}
    assert costs.of(arch) < costs.of(kept) == table(110).of(arch) == table(110).of(kept)


def test_any_integer_width_and_depth_can_be_counted() -> None:
    """Some published files leave the lists of section 2."""
    arch = table(32).root.largest() | {"stage0.depth": 2, "stage1.depth": 4, "stage1.block0.conv0.width": 13, "stem.width": 21}
    example = torch.zeros(1, 3, 32, 32)
    graph = extract(net(32), arch, example, inherit=False)
    assert counted(graph, example) == (table(32).of(arch), table(32, price="params").of(arch))


# -- gradients of (10)-(13) ---------------------------------------------------------------------------------------------


def page_estimate(p: dict[str, Tensor], q: list[Tensor]) -> Tensor:
    """(10)-(13) word for word for the C10 ResNet-20: ``p`` widths' probabilities by name, ``q`` depths' by stage."""
    lists = {16: [4, 6, 8, 9, 11, 12, 14, 16], 32: [9, 12, 16, 19, 22, 25, 28, 32], 64: [19, 25, 32, 38, 44, 51, 57, 64]}

    def mean(name: str, full: int) -> Tensor:
        return (p[name] * torch.tensor(lists[full], dtype=torch.float64)).sum()

    c = mean("stem.width", 16)
    E = 9 * 32 * 32 * 3 * c
    for s, (full, hw) in enumerate(((16, 32), (32, 16), (64, 8))):
        for b in range(3):
            kept = q[s][b:].sum()  # (12)
            c0, c1 = (mean(f"stage{s}.block{b}.conv{i}.width", full) for i in range(2))
            block = 9 * hw * hw * (c * c0 + c0 * c1)
            if b == 0 and s > 0:
                block = block + hw * hw * c * c1  # the shortcut, after its pool
            E, c = E + kept * block, c1
    return E + c * 10


def test_the_estimator_is_the_pages() -> None:
    """Values and gradients at random probabilities, against (10)-(13)."""
    costs, generator = table(20, view="searched"), torch.Generator().manual_seed(3)
    soft: dict[str, Setting] = {}
    leaves: dict[str, Tensor] = {}
    for choice in costs.root.choices:
        logits = torch.randn(len(choice.options), generator=generator, dtype=torch.float64)
        leaves[choice.name] = torch.softmax(logits, 0).requires_grad_()
        soft[choice.name] = Mixture(choice.options, leaves[choice.name])
    found = costs.expected(soft)
    expected = page_estimate(leaves, [leaves[f"stage{s}.depth"] for s in range(3)])
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    names = list(leaves)

    def reduced(E: Tensor) -> list[float]:
        """Gradients in the simplex: less each choice's mean, since probabilities add to 1."""
        grads = torch.autograd.grad(E, [leaves[name] for name in names])
        return np.concatenate([(g - g.mean()).numpy() for g in grads]).tolist()

    assert reduced(found) == pytest.approx(reduced(expected), rel=1e-9, abs=1e-3)
