"""Supernets of inverted residual blocks: kernels, shortcuts, channel sort, drop path, starts (pages of OFA and BigNAS)."""
from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.descent import Descent
from nas.recalibrate import install, recalibrate
from search_spaces import bignas as wide_spaces
from search_spaces import mobilenet as mobile_spaces
from search_spaces.sizes import Segment, fixed
from search_spaces.space import Mixture, SearchSpace
from supernets.bignas import AttentiveNAS, BigNAS
from supernets.extract import extract
from supernets.inverted import AveragePool, InvertedNet
from supernets.mobilenet import OFAMobileNetV3, OFAProxyless
from supernets.norms import Normalise
from supernets.resize import halved

DEPTHS = [(1, 2)] * 7


def images(side: int = 8, batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(net: Any, seed: int = 1, matrices: bool = True) -> Any:
    """float64; norms' scales, shifts and statistics are random, and so, unless told otherwise, are matrices."""
    net, generator = net.double(), torch.Generator().manual_seed(seed)
    net.reset(generator)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if "norm" in name:
                value.uniform_(0.5, 1.5, generator=generator)
            elif "matrices" in name and matrices:
                value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return net


def v3(width: float = 0.2, mode: str = "transform", **args: Any) -> Any:
    return OFAMobileNetV3(mobile_spaces.OFAMobileNetV3(width, small=True, **args), 3, 5, mode=mode)


def attentive(width: float = 0.25, **args: Any) -> Any:
    return AttentiveNAS(wide_spaces.AttentiveNAS(True, width, DEPTHS, **args), 3, 5)


def of(net: Any, ks: int = 7, e: int = 6, d: int = 4) -> Any:
    return net.space.arch_of(ks, e, d)


def farthest(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# -- kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 5, 7])
def test_identity_matrices_are_the_centre_crop(k: int) -> None:
    transform, crop = drawn(v3(), matrices=False).eval(), v3(mode="crop").double().eval()
    crop.load_state_dict({name: value for name, value in transform.state_dict().items() if "matrices" not in name})
    x = images()
    assert torch.equal(transform(x, of(transform, k)), crop(x, of(crop, k)))
    with torch.no_grad():
        for name, matrix in transform.named_parameters():
            if "matrices" in name:
                matrix.mul_(0.9).add_(0.01)
    assert (farthest(transform(x, of(transform, k)), crop(x, of(crop, k))) > 1e-6) is (k < 7)


@pytest.mark.parametrize("kind", ["v3", "proxyless"])
def test_what_the_smallest_network_does_not_read_gets_no_gradient(kind: str) -> None:
    """At k3 e3 d2, 134 of 283 parameter tensors (OFA page, section 6.5); a step leaves them as they are."""
    net = drawn(v3() if kind == "v3" else OFAProxyless(mobile_spaces.OFAProxyless(0.2, True), 3, 5))
    net(images(), of(net, 3, 3, 2)).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None]
    assert (len(idle), len(list(net.parameters()))) == ((134, 283) if kind == "v3" else (110, 245))
    assert {name.split(".")[2] for name in idle} == {"2", "3"}  # blocks beyond the depth
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    w = Descent(net.parameters(), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    w.down(net(images(), of(net, 3, 3, 2)).square().sum())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not moved & set(idle)


# -- channel sort (OFA page, section 6.3) ----------------------------------------------------------------------------------


def sorted_by(net: Any, *expands: int) -> dict[int, float]:
    """Expand -> how far its network's logits moved, when the channels of what was trained with ``expands`` stay."""
    x, space = images(16), net.space
    before = {e: net(x, of(net, e=e)) for e in (6, 4, 3)}
    names = [choice.name for choice in space.choices if choice.name.endswith(".expand")]
    trained = space.restrict({name: expands for name in names}) if expands else None
    assert net.sort_channels(trained)
    return {e: farthest(net(x, of(net, e=e)), before[e]) for e in before}


@pytest.mark.parametrize("make", [partial(v3, 0.35), lambda: OFAProxyless(mobile_spaces.OFAProxyless(0.3, True), 3, 5)],
                         ids=["v3", "proxyless"])
@pytest.mark.parametrize("expands", [(), (6,), (4, 6), (3, 4, 6)], ids=["none", "e6", "e46", "e346"])
def test_a_sort_keeps_what_was_trained(make: Any, expands: tuple[int, ...]) -> None:
    """Hidden units stay within the hidden widths of what was trained, so it keeps its output to rounding."""
    moved = sorted_by(drawn(make(), seed=3).eval(), *expands)
    for e, far in moved.items():
        assert far < 1e-12 if e in (6, *expands) else far > 1e-3, (e, far)


def test_a_sort_of_elastic_widths_keeps_them() -> None:
    """Middle widths follow the stream's widths too: every one that was trained is a band."""
    net = drawn(attentive(0.35)).eval()
    x, found = images(16), [net.space.sample(random.Random(seed)) for seed in range(4)]
    before = [net(x, arch) for arch in found]
    net.sort_channels(net.space)
    assert max(farthest(net(x, arch), z) for arch, z in zip(found, before)) < 1e-12
    net.sort_channels()
    assert max(farthest(net(x, arch), z) for arch, z in zip(found, before)) > 1e-3


def test_a_sort_puts_the_heaviest_channels_first_and_tells_what_moved() -> None:
    net = drawn(v3())
    before = {id(p): p.detach().clone() for p in net.parameters()}
    moved = net.sort_channels()
    for block in (block for s in range(5) for block in net.blocks(s)):
        weight = block.project.weight.detach().abs().sum((0, 2, 3))
        assert torch.equal(weight, weight.sort(descending=True).values)
    names = {id(p): name for name, p in net.named_parameters()}
    assert not {names[id(p)] for p, _, _ in moved} & {name for name in names.values() if "matrices" in name or "first" in name}
    for p, dim, order in moved:
        before[id(p)] = before[id(p)].index_select(dim, order)
    assert all(torch.equal(before[id(p)], p) for p in net.parameters())


# -- starts -------------------------------------------------------------------------------------------------------------


def each_block(net: InvertedNet) -> list[Any]:
    return [block for s in range(len(net.stages)) for block in net.blocks(s)]


def test_with_zero_gamma_identity_blocks_are_the_identity_after_reset() -> None:
    for net in (attentive(0.35).double(), BigNAS(wide_spaces.BigNAS(True, 0.35, DEPTHS), 3, 5).double()):
        net.reset(torch.Generator().manual_seed(0))
        arch, tested = net.space.largest(), 0
        for block in each_block(net):
            x = torch.randn(2, block.place.narrow.size.at(arch), 6, 6, dtype=torch.float64)
            y = block(x, arch)
            assert bool((block.project.norm.weight[0] == 0).all()) and bool((y == block_shortcut(block, x, arch)).all())
            if block.shortcut is None and block.pool is None:
                assert torch.equal(y, x)
                tested += 1
        assert tested >= 7


def block_shortcut(block: Any, x: Tensor, arch: Any) -> Tensor:
    x = x if block.pool is None else block.pool(x, arch)
    return x if block.shortcut is None or block.shortcut.weight.shape[0] == x.shape[1] else block.shortcut(x, arch)


def test_zero_gamma_of_mobile_nets_is_where_the_identity_runs() -> None:
    """OFA starts with 1 everywhere; asked for zeros, blocks without a shortcut keep 1, or nothing would pass."""
    space = mobile_spaces.OFAMobileNetV3(0.35, small=True)
    for zero in (False, True):
        net = OFAMobileNetV3(space, 3, 5, zero_gamma=zero)
        net.reset(torch.Generator().manual_seed(0))
        assert net.first is not None
        for b, block in [(1, net.first), *((b, block) for s in range(5) for b, block in enumerate(net.blocks(s)))]:
            same = block.place.narrow.full == block.place.wide.full and block.place.stride == 1
            assert block.residual is (b > 0 or same)
            assert block.project.norm is not None
            assert bool((block.project.norm.weight[0] == (0 if zero and block.residual else 1)).all())


def test_the_published_start() -> None:
    """Convolutions N(0, sqrt(2 / (k k Cout))), Cout and not Cout / groups; the classifier U(+-1 / sqrt(inputs))."""
    net = v3(1.0)
    net.reset(torch.Generator().manual_seed(0))
    for name, p in net.named_parameters():
        if p.ndim == 4 and p.numel() > 2000:
            assert float(p.detach().std()) == pytest.approx((2 / (p.shape[0] * p.shape[2] * p.shape[3])) ** 0.5, rel=0.1), name
    weight, edge = net.classifier.weight.detach(), 1280**-0.5
    assert 0.98 * edge < float(weight.abs().max()) <= edge
    assert float(weight.std()) == pytest.approx(edge / 3**0.5, rel=0.03)


def test_eps_is_the_papers() -> None:
    found = {}
    for name, net in (("v3", v3()), ("proxyless", OFAProxyless(mobile_spaces.OFAProxyless(0.2, True), 3, 5))):
        graph = extract(net, net.space.smallest(), images().float())
        plain = {module.eps for module in graph.modules() if isinstance(module, nn.BatchNorm2d)}
        found[name] = ({module.eps for module in net.modules() if isinstance(module, Normalise)}, plain)
    assert found == {"v3": ({1e-5}, {1e-5}), "proxyless": ({1e-3}, {1e-3})}


# -- forward ------------------------------------------------------------------------------------------------------------


def test_entries_beyond_the_depth_change_nothing() -> None:
    net, x = drawn(v3()).eval(), images()
    arch = of(net, 5, 4, 2)
    other = arch | {name: net.space[name].options[-1] for name in arch if ".block2." in name or ".block3." in name}
    assert other != arch and torch.equal(net(x, arch), net(x, other))


@pytest.mark.parametrize("make", [v3, attentive], ids=["v3", "attentive"])
def test_one_image_is_a_batch(make: Any) -> None:
    net = drawn(make())
    x, arch = images(32, 1), net.space.largest()
    assert net(x, arch).shape == (1, 5)
    install(net, recalibrate(net, [arch], [images(32)])[0])
    many = net.eval()(torch.cat([x, images(32, 2, 1)]), arch)
    assert farthest(net(x, arch), many[:1]) < 1e-12


def test_images_come_at_one_size_and_run_at_the_childs() -> None:
    net = drawn(attentive(resolution=[8, 12])).eval()
    x, arch = images(10), net.space.smallest()
    for side in (8, 12):
        same = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False)
        assert torch.equal(net(x, arch | {"resolution": side}), net(same, arch | {"resolution": side}))
    assert farthest(net(x, arch | {"resolution": 8}), net(x, arch | {"resolution": 12})) > 1e-3


@pytest.mark.parametrize(("height", "width"), [(6, 6), (7, 7), (5, 8), (1, 1)])
def test_odd_sides_are_pooled_with_padding(height: int, width: int) -> None:
    leaf, x = AveragePool(Segment(fixed(2), 2), 2), torch.randn(3, 2, height, width)
    padded = F.pad(x, (width % 2, 0, height % 2, 0))
    wanted = torch.stack([padded[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).sum(0) / 4
    out = leaf(x, {})
    assert torch.allclose(out, wanted, atol=1e-6)
    assert out.shape[2:] == halved((height, width), 1)
    plain = leaf.plain({}, 2)
    assert torch.equal(plain(x), out) and isinstance(plain, nn.AvgPool2d)
    assert plain.padding == (height % 2, width % 2) and not plain._forward_pre_hooks


def test_shortcuts_have_weights_only_where_widths_may_differ() -> None:
    net = attentive(1.0)
    for b, block in [(b, block) for s in range(7) for b, block in enumerate(net.blocks(s))]:
        assert (block.shortcut is not None) is (b == 0) and (block.pool is not None) is (b == 0 and block.place.stride == 2)
    narrow = attentive(0.35)  # stem and first stage have the one width 8
    assert narrow.blocks(0)[0].shortcut is None and narrow.blocks(1)[0].shortcut is not None
    assert net.blocks(0)[0].expand is None and net.blocks(1)[0].expand is not None


# -- drop path ----------------------------------------------------------------------------------------------------------


def test_drop_path_is_of_the_last_stages_and_grows_with_the_block() -> None:
    net = AttentiveNAS(wide_spaces.AttentiveNAS(), 3, 5)
    shares = [[block.place.share for block in net.blocks(s)] for s in range(7)]
    n = 2 + 5 + 6 + 6 + 8 + 8 + 2
    assert shares[:5] == [[0.0] * len(stage) for stage in shares[:5]]
    assert [*shares[5], *shares[6]] == [i / n for i in range(27, n)]
    plain = [block.place.share for block in each_block(BigNAS(wide_spaces.BigNAS(True, 0.2), 3, 5))]
    assert not any(plain)


def test_drop_path_drops_the_branch_of_some_images_of_identity_blocks() -> None:
    net = drawn(attentive(0.35))
    arch = net.space.largest()
    first, second = net.blocks(5)
    x = torch.randn(64, first.place.narrow.size.at(arch), 4, 4, dtype=torch.float64)
    assert torch.equal(first(x, arch, 0.9), first(x, arch))  # not the identity
    x = first(x, arch).detach()
    branch, rate = second(x, arch) - x, 0.9 * second.place.share
    torch.manual_seed(0)
    found = second(x, arch, 0.9) - x
    dropped = (found == 0).flatten(1).all(1)
    assert 0.4 * rate < float(dropped.double().mean()) < 1.6 * rate
    assert torch.allclose(found[~dropped], branch[~dropped] / (1 - rate))
    net.eval()
    assert torch.equal(second(x, arch, 0.9), second(x, arch))


# -- refusals and copies ------------------------------------------------------------------------------------------------


def test_what_is_mixed_and_what_is_not() -> None:
    crop, transform = drawn(v3(mode="crop")), drawn(v3())
    kernel, expand, depth = "stage1.block0.kernel", "stage1.block0.expand", "stage1.depth"
    assert kernel not in crop.hard and {expand, depth} <= crop.hard and transform.hard == {*transform.space.largest()}
    fixed_kernel = v3(mode="crop", kernels=(7,))
    assert fixed_kernel.hard == {*fixed_kernel.space.largest()}

    def mixed(net: Any, name: str) -> Any:
        options = net.space[name].options
        return of(net) | {name: Mixture(options, torch.full((len(options),), 1 / len(options), dtype=torch.float64))}

    assert crop(images(), mixed(crop, kernel)).shape == (4, 5)
    for net, name, words in (
        (crop, expand, f"^{expand} is a mixture, and this supernet mixes elastic kernels alone"),
        (crop, depth, f"^{depth} is a mixture"),
        (transform, kernel, f"{kernel} is a mixture"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            net(images(), mixed(net, name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("stages", [-1, 8])
def test_drop_path_stages_are_stages(stages: int) -> None:
    with pytest.raises(ValueError, match=rf"drop_path_stages = {stages}\. Allowed: 0 to 7"):
        AttentiveNAS(wide_spaces.AttentiveNAS(True, 0.2), 3, 5, drop_path_stages=stages)


def test_what_belongs_to_a_kernel_and_to_a_depth() -> None:
    net = v3()
    leaf = net.blocks(1)[3].depthwise
    assert [p.shape for p in net.owned("stage1.block3.kernel")] == [(25, 25), (9, 9)]
    assert net.owned("stage1.block3.kernel", 3)[0] is leaf.matrices[1] and not net.owned("stage1.block3.kernel", 5)
    mine = {id(p) for p in net.owned("stage1.depth", 4)}
    assert mine == {id(p) for p in net.blocks(1)[3].weights()} and id(leaf.matrices[0]) not in mine
    assert not net.owned("stage1.depth", 2) and len(net.owned("stage1.depth")) == 2 * len(mine)


def test_a_restricted_space_and_a_copy_have_the_same_net() -> None:
    space: SearchSpace = mobile_spaces.OFAMobileNetV3(0.2, small=True)
    net, x = drawn(v3()), images()
    small = drawn(OFAMobileNetV3(space.restrict({"stage0.depth": [2]}), 3, 5))  # type: ignore[arg-type]
    assert small.state_dict().keys() == net.state_dict().keys()
    twin, arch = copy.deepcopy(net), net.space.smallest()
    assert torch.equal(twin(x, arch), net(x, arch)) and torch.equal(small(x, arch), net(x, arch))
