"""Elastic depthwise convolutions and the resize leaf: kernels, widths, plain forms, refusals."""
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.bundle import counted
from nas.cost import macs, params
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.extract import extract
from supernets.kernels import ElasticDepthwise
from supernets.resize import Resize

SPACE = SearchSpace([Choice("e", (2, 4, 6)), Choice("k", (3, 5, 7)), Choice("resolution", (6, 8))], {})
e, k, side = (Size((name,), int) for name in ("e", "k", "resolution"))
ARCHS: list[dict[str, Setting]] = [{"e": width, "k": kernel} for width, kernel in itertools.product((2, 4, 6), (3, 5, 7))]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(mode: str = "transform", random: bool = False, **kind: Any) -> ElasticDepthwise:
    """In float64, with statistics, scales and shifts that are not those of the start; ``random`` matrices too."""
    leaf = ElasticDepthwise(SPACE, Segment(e, 6), k, mode=mode, **kind).double()
    generator = torch.Generator().manual_seed(1)
    leaf.reset(generator)
    for name, value in (*leaf.named_parameters(), *leaf.named_buffers()):
        if "norm" in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
        if random and "matrices" in name:
            value.data.add_(torch.empty_like(value).normal_(0.0, 0.3, generator=generator))
    leaf.name = "block.depthwise"
    return leaf.eval()


def image(width: int, size: int = 7) -> Tensor:
    return numbers(2, width, size, size, seed=2)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("training", [False, True])
def test_identity_matrices_are_the_centre_crop(arch: dict[str, Any], training: bool) -> None:
    crop, transform = made("crop").train(training), made("transform").train(training)
    x = image(arch["e"])
    y = transform(x, arch)
    assert torch.equal(y, crop(x, arch))
    start = 3 - arch["k"] // 2
    kept = crop.weight[: arch["e"], :, start : 7 - start, start : 7 - start]
    z = F.conv2d(x, kept, padding=arch["k"] // 2, groups=arch["e"])
    assert crop.norm is not None
    assert torch.allclose(y, crop.norm(z, *crop.norm.affine(arch["e"])), rtol=0, atol=1e-12)


def test_small_kernels_pass_through_every_matrix() -> None:
    leaf = made(random=True)
    m75, m53 = leaf.matrices
    for c in range(6):
        five = (m75 @ leaf.weight[c, 0, 1:6, 1:6].flatten()).view(5, 5)
        three = (m53 @ five[1:4, 1:4].flatten()).view(3, 3)
        assert torch.allclose(leaf.kernels(6, 5)[c, 0], five, rtol=0, atol=1e-12)
        assert torch.allclose(leaf.kernels(6, 3)[c, 0], three, rtol=0, atol=1e-12)
    assert torch.equal(leaf.kernels(4, 7), leaf.weight[:4])


def test_a_block_has_706_numbers_of_matrices() -> None:
    count = {mode: sum(p.numel() for p in made(mode).parameters()) for mode in ("crop", "transform")}
    assert count["transform"] - count["crop"] == 706


@pytest.mark.parametrize("kernel, reached", [(7, [False, False]), (5, [True, False]), (3, [True, True])])
def test_gradients_reach_the_matrices_on_the_way_alone(kernel: int, reached: list[bool]) -> None:
    leaf = made(random=True).train()
    leaf(image(4), {"e": 4, "k": kernel}).square().mean().backward()
    assert [m.grad is not None for m in leaf.matrices] == reached
    assert leaf.weight.grad is not None and leaf.weight.grad[:4].any() and not leaf.weight.grad[4:].any()
    rim = torch.ones(7, 7, dtype=torch.bool)
    rim[1:6, 1:6] = False  # a 3x3 reads all of the 5x5 through its matrix, and no small kernel the rim of the 7x7
    assert leaf.weight.grad[:4, 0, rim].any().item() == (kernel == 7)
    assert leaf.weight.grad[:4, 0, ~rim].all()


def test_the_gradient_is_that_of_the_formula() -> None:
    leaf, x = made(random=True), image(2, 5)

    def run(weight: Tensor, m75: Tensor, m53: Tensor) -> Tensor:
        names = ("weight", "matrices.0", "matrices.1")
        given = dict(zip(names, (weight, m75, m53)))
        return torch.func.functional_call(leaf, given, (x, {"e": 2, "k": 3}))

    assert torch.autograd.gradcheck(run, (leaf.weight, *leaf.matrices), fast_mode=True)


class Net(nn.Module):
    """One leaf, as extraction sees it in a supernet."""

    def __init__(self, leaf: ElasticDepthwise) -> None:
        super().__init__()
        self.space, self.resize, self.leaf = SPACE, Resize(side, 4), leaf

    def forward(self, x: Tensor, arch: Any) -> Tensor:
        return self.leaf(self.resize(x, arch), arch)


@pytest.mark.parametrize("mode", ["crop", "transform"])
@pytest.mark.parametrize("kernel, pixels", [(3, 6), (5, 8), (7, 6)])
def test_the_extracted_net_is_the_supernet(mode: str, kernel: int, pixels: int) -> None:
    net = Net(made(mode, random=True, stride=2)).eval()
    arch: dict[str, Any] = {"e": 4, "k": kernel, "resolution": pixels}
    x = image(4, 8)
    with torch.no_grad():
        plain = extract(net, arch, x)
        assert torch.equal(plain(x), net(x, arch))
        assert torch.equal(plain(image(4, 11)), net(image(4, 11), arch))
    conv = plain.get_submodule("leaf.conv")
    assert conv.weight.shape == (4, 1, kernel, kernel) and conv.padding == (kernel // 2,) * 2
    assert not any("matri" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_costs_are_those_of_the_fresh_plain_form(arch: dict[str, Any]) -> None:
    leaf, x = made(stride=2), image(arch["e"])
    plain = leaf.plain(arch, arch["e"], inherit=False)
    shapes: list[Any] = [(r.op, r.shape(*(arch[name] for name in r.on))) for r in leaf.layers((4, 4))]
    assert counted(plain.double(), x) == tuple(sum([price(op, s) for op, s in shapes]) for price in (macs, params))


@pytest.mark.parametrize("arch", ARCHS)
def test_taking_over_is_the_inverse_of_the_plain_form(arch: dict[str, Any]) -> None:
    given, taker, x = made(random=True), made(random=True), image(arch["e"])
    taker.reset(torch.Generator().manual_seed(7))
    for matrix in taker.matrices:
        matrix.data.mul_(2.0)
    taker.adopt(dict(given.plain(arch, arch["e"]).named_modules()))
    assert torch.allclose(taker(x, arch), given(x, arch), rtol=0, atol=1e-12)


def test_the_norm_keeps_its_eps() -> None:
    norm = made(eps=1e-3).plain({"e": 4, "k": 5}, 4).get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.eps == 1e-3


def of(options: tuple[Any, ...], weights: list[float]) -> Mixture:
    return Mixture(options, torch.tensor(weights, dtype=torch.float64))


def test_a_mixture_of_kernels_is_superposed_when_cropped() -> None:
    leaf, x = made("crop"), image(4)
    y = leaf(x, {"e": 4, "k": of((3, 5, 7), [0.2, 0.3, 0.5])})
    z = sum(v * F.conv2d(x, leaf.kernels(4, kernel), padding=kernel // 2, groups=4)
            for kernel, v in ((3, 0.2), (5, 0.3), (7, 0.5)))  # fmt: skip
    assert isinstance(z, Tensor) and leaf.norm is not None
    assert torch.allclose(y, leaf.norm(z, *leaf.norm.affine(4)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, mixture", [("k", of((3, 5, 7), [0.2, 0.3, 0.5])), ("e", of((2, 4, 6), [0.2, 0.3, 0.5]))])
def test_mixtures_are_refused_in_one_line_with_matrices(name: str, mixture: Mixture) -> None:
    arch: dict[str, Setting] = {"e": 6, "k": 7, name: mixture}
    with pytest.raises(ValueError, match=rf"block\.depthwise: {name} is a mixture, .* mode 'crop'\.") as refused:
        made()(image(6), arch)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode = 'warp' is not known\. Allowed: crop, transform"):
        made("warp")
    with pytest.raises(ValueError, match=r"kernel 1 has no matrix in this supernet\. Allowed: 3, 5, 7"):
        made()(image(4), {"e": 4, "k": 1})
    with pytest.raises(ValueError, match=r"kernel 9 is not in this supernet\. Allowed: odd, 1 to 7"):
        made()(image(4), {"e": 4, "k": 9})
    with pytest.raises(ValueError, match="an input of 6 channels, where this architecture has 4"):
        made()(image(6), {"e": 4, "k": 3})


def test_a_start_is_the_published_one_and_matrices_are_identities() -> None:
    space = SearchSpace([Choice("k", (3, 5, 7))], {})
    leaf = ElasticDepthwise(space, Segment(fixed(400), 400), k, mode="transform")
    leaf.matrices[0].data.zero_()
    leaf.reset(torch.Generator().manual_seed(0))
    assert leaf.weight.std().item() == pytest.approx((2 / (49 * 400)) ** 0.5, rel=0.02)
    assert [torch.equal(m, torch.eye(n)) for m, n in zip(leaf.matrices, (25, 9))] == [True, True]
    fresh = leaf.plain({"k": 3}, 400, inherit=False).get_submodule("conv").weight
    assert isinstance(fresh, Tensor) and fresh.std().item() == pytest.approx((2 / (9 * 400)) ** 0.5, rel=0.06)


def test_matrices_are_owned_by_the_kernel() -> None:
    leaf = made()
    m75, m53 = leaf.matrices
    assert [id(p) for p in leaf.owned("k")] == [id(m75), id(m53)] and [id(p) for p in leaf.owned("k", 3)] == [id(m53)]
    assert leaf.owned("k", 5) == leaf.owned("k", 7) == leaf.owned("e") == made("crop").owned("k") == []


def test_images_are_resized_to_the_arch_resolution() -> None:
    leaf, x = Resize(side), numbers(2, 3, 8, 8)
    leaf.name = "resize"
    assert leaf(x, {"resolution": 8}) is x and leaf.layers((8, 8)) == []
    small = leaf(x, {"resolution": 6})
    assert small.shape == (2, 3, 6, 6)
    assert torch.equal(small, F.interpolate(x, size=(6, 6), mode="bicubic"))
    for pixels in (6, 8):
        assert torch.equal(leaf.plain({"resolution": pixels}, 3)(x), leaf(x, {"resolution": pixels}))
    with pytest.raises(ValueError, match="resize: resolution is a mixture, and images have one size"):
        leaf(x, {"resolution": of((6, 8), [0.5, 0.5])})
    with pytest.raises(ValueError, match="a side of 0 pixels"):
        leaf(x, {"resolution": 0})
