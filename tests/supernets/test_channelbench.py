"""The supernets of Channel-Bench-Macro: costs against the published table and counts by hand, both networks against literal
forms of the page spaces-nb201-nats-macro, section 5, and what a channel sort moves."""
from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from search_spaces import channelbench
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.channelbench import ChannelMobileNet, ChannelResNet, build
from supernets.extract import extract
from supernets.mixing import active, idle_ones
from supernets.sorting import importance

TABLE = Path(__file__).parents[2].parent / "shared" / "tables" / "channel-bench-resnet.json"
RESIDUAL = channelbench.ChannelResNet((6, 9, 3, 6, 9, 12, 6), 3)
MOBILE = channelbench.ChannelMobileNet((6, 9, 3, 6, 9, 12, 6), 3)
Arch = Mapping[str, Setting]
residual_net = partial(ChannelResNet, RESIDUAL, 3, 5)
mobile_net = partial(ChannelMobileNet, MOBILE, 3, 5)


# -- costs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> ChannelResNet:
    return ChannelResNet(channelbench.ChannelResNet())


@pytest.mark.parametrize(("text", "numbers", "products"), [
    ("1111111", 963658, 90096896), ("4444444", 15356170, 1436226560), ("4344424", 12701322, 1209734144),
])
def test_the_rows_of_the_page(published: ChannelResNet, text: str, numbers: int, products: int) -> None:
    found = [CostTable(published, (32, 32), price).of(published.space.parse(text)) for price in (params, macs)]
    assert found == [numbers, products]


@pytest.mark.skipif(not TABLE.is_file(), reason="the published table ../shared/tables/channel-bench-resnet.json is not here")
def test_every_row_of_the_published_table(published: ChannelResNet) -> None:
    table, space = json.loads(TABLE.read_text(encoding="utf-8")), published.space
    codes = space.encode([space.parse(text) for text in table])
    assert len(table) == len(np.unique(codes, axis=0)) == 4**7
    for price, column in ((params, "params"), (macs, "flops")):
        expected = [row[column] for row in table.values()]
        assert np.array_equal(CostTable(published, (32, 32), price).batch(codes), expected)


def mobile_count(widths: tuple[int, ...]) -> tuple[int, int]:
    """(parameters, multiply-adds on 32x32) of the page's structure, convolution by convolution."""
    c0, c1, c2, c3, c4, c5, c6 = widths
    convs = [  # numbers of one kernel, pixels, channels of the norm
        (27 * c0, 256, c0),
        (c0 * c1, 256, c1), (9 * c1, 256, c1), (c1 * c0, 256, c0),
        (c0 * c2, 256, c2), (9 * c2, 256, c2), (c2 * c0, 256, c0),
        (c0 * c3, 256, c3), (9 * c3, 64, c3), (c3 * c4, 64, c4),
        (c4 * c5, 64, c5), (9 * c5, 64, c5), (c5 * c4, 64, c4),
        (c4 * c6, 64, c6),
    ]  # fmt: skip
    return sum(n + 2 * c for n, _, c in convs) + 10 * c6 + 10, sum(n * pixels for n, pixels, _ in convs) + 10 * c6


@pytest.mark.parametrize(("text", "figures"), [("1111111", (125418, 14285312)), ("4444444", (1804170, 211281920)),
                                               ("1234321", None)])  # fmt: skip
def test_the_mobile_network_counted_by_hand(text: str, figures: tuple[int, int] | None) -> None:
    net = ChannelMobileNet(channelbench.ChannelMobileNet())
    arch = net.space.parse(text)
    found = CostTable(net, (32, 32), params).of(arch), CostTable(net, (32, 32), macs).of(arch)
    assert found == mobile_count(tuple(int(width) for width in arch.values()))
    assert figures is None or found == figures
    graph = extract(net, arch, torch.zeros(2, 3, 32, 32))
    assert counted(graph, torch.zeros(1, 3, 32, 32)) == (found[1], found[0])


def test_the_largest_mobile_network_is_that_of_the_page() -> None:
    net = ChannelMobileNet(channelbench.ChannelMobileNet())
    graph = extract(net, net.space.largest(), torch.zeros(1, 3, 32, 32))
    running = [graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    convs = [m for m in running if isinstance(m, nn.Conv2d)]
    found = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.groups) for m in convs]
    blocks = [(128, 768, 128, 1), (128, 768, 128, 1), (128, 768, 256, 2), (256, 1536, 256, 1)]
    assert found == [(3, 128, 3, 2, 1), *itertools.chain.from_iterable(
        ((i, m, 1, 1, 1), (m, m, 3, s, m), (m, o, 1, 1, 1)) for i, m, o, s in blocks), (256, 1024, 1, 1, 1)]  # fmt: skip
    assert all(m.bias is None and m.padding[0] == m.kernel_size[0] // 2 for m in convs)
    assert [m.num_features for m in running if isinstance(m, nn.BatchNorm2d)] == [conv[1] for conv in found]
    assert [m.in_features for m in running if isinstance(m, nn.Linear)] == [1024]
    assert sum(node.op == "call_function" and node.target is F.relu for node in graph.graph.nodes) == 1 + 2 * 4 + 1


# -- literal forms ------------------------------------------------------------------------------------------------------


def wider(y: Tensor, C: int, mixing: str) -> Tensor:  # (B, c, H, W) -> (B, C, H, W)
    if mixing == "sum":
        return F.pad(y, (0, 0, 0, 0, 0, C - y.shape[1]))
    return F.adaptive_avg_pool1d(y.permute(0, 2, 3, 1).flatten(0, 2), C).view(len(y), *y.shape[2:], C).permute(0, 3, 1, 2)


def conv(net: Any, path: str, choice: str, x: Tensor, arch: Arch, stride: int = 1) -> Tensor:
    """Candidate by candidate, each with a convolution and a norm of its own (TAS (5)-(8))."""
    leaf, setting = net.get_submodule(path), arch[choice]
    kept = {int(setting): x.new_ones(())} if not isinstance(setting, Mixture) else {
        int(setting.options[j]): setting.weights[j] for j in active(setting)}  # fmt: skip
    out: Any = idle_ones(setting) if isinstance(setting, Mixture) else 0.0
    for c, w in kept.items():
        deep = leaf.weight.shape[1] == 1 and leaf.weight.shape[0] > 1
        weight = leaf.weight[:c] if deep else leaf.weight[:c, : x.shape[1]]
        y = F.conv2d(x[:, :c] if deep else x, weight, None, stride, weight.shape[-1] // 2, groups=c if deep else 1)
        k = leaf.norm.index[c]
        y = F.batch_norm(y, None, None, leaf.norm.weight[k][:c], leaf.norm.bias[k][:c], training=True)
        out = out + w * wider(y, max(kept), leaf.mixing)
    return out


def residual(net: ChannelResNet, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
    x = F.relu(conv(net, "stem", "c0", x, arch, 2))
    for path, stream, inner in (("stage0.0", "c0", "c1"), ("stage0.1", "c0", "c2"), ("", "", ""), ("stage1.0", "c4", "c5"),
                                ("stage1.1", "c4", "c6")):  # fmt: skip
        if not path:  # c0 -> c3 stride 2, c3 -> c4: ReLU(block)
            x = F.relu(conv(net, "reduction.1", "c4", F.relu(conv(net, "reduction.0", "c3", x, arch, 2)), arch))
            continue
        y = F.relu(conv(net, f"{path}.conv0", inner, x, arch))
        x = F.relu(x + conv(net, f"{path}.conv1", stream, y, arch))
    x = x.mean((2, 3))
    return x @ net.classifier.weight[:, : x.shape[1]].T + net.classifier.bias


def mobile(net: ChannelMobileNet, x: Tensor, arch: Arch, drop: float = 0.0) -> Tensor:
    x = F.relu(conv(net, "stem", "c0", x, arch, 2))
    for b, (hidden, out) in enumerate((("c1", "c0"), ("c2", "c0"), ("c3", "c4"), ("c5", "c4"))):
        y = F.relu(conv(net, f"blocks.{b}.expand", hidden, x, arch))
        y = F.relu(conv(net, f"blocks.{b}.depthwise", hidden, y, arch, 2 if b == 2 else 1))
        y = conv(net, f"blocks.{b}.project", out, y, arch)
        x = y if b == 2 else x + y
    x = F.relu(conv(net, "final", "c6", x, arch)).mean((2, 3))
    return x @ net.classifier.weight[:, : x.shape[1]].T + net.classifier.bias


def settings(space: SearchSpace, kind: str) -> dict[str, Setting]:
    """"hard"; mixtures of "all" options; of each a "pair" computed, with "idle" ones beside it; "one", as GDAS has it; "some"
    hard."""
    generator, found = torch.Generator().manual_seed(1), dict[str, Setting]()
    for i, choice in enumerate(space.choices):
        w = torch.rand(3, generator=generator, dtype=torch.float64)
        at = (i % 3,) if kind == "one" else ((0, 1), (0, 2), (1, 2))[i % 3] if kind in ("pair", "idle") else None
        w = F.one_hot(torch.tensor(i % 3), 3).double() if kind == "one" else w / w.sum()
        hard = kind == "hard" or (kind == "some" and i % 2 == 0)
        found[choice.name] = choice.options[(i + 1) % 3] if hard else Mixture(
            choice.options, w.requires_grad_(), at, "ones" if kind in ("one", "idle") else "absent")  # fmt: skip
    return found


def readings(net: nn.Module, forward: Any, x: Tensor, arch: Arch) -> dict[str, Tensor]:
    """Logits, and the gradients of every parameter and of every mixture's weights, of a sum in which every logit counts
    differently: behind a norm, the mean over a batch is constant."""
    mixed = {name: setting.weights for name, setting in arch.items() if isinstance(setting, Mixture)}
    named = dict(net.named_parameters()) | mixed
    z = forward(x, arch)
    factors = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    gradients = torch.autograd.grad((z * factors).sum(), list(named.values()), allow_unused=True)
    return {"logits": z.detach()} | {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients)}


def drawn(net: Any) -> Any:
    """In float64, every number drawn, statistics too."""
    net, generator = net.double(), torch.Generator().manual_seed(3)
    net.reset(generator)
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if "norm" in name:
            value.data.uniform_(0.5, 1.5, generator=generator)
    return net


def images(batch: int = 6, size: int = 10) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["hard", "all", "pair", "idle", "one", "some"])
@pytest.mark.parametrize(("make", "literal", "words"), [
    (residual_net, residual, {}), (residual_net, residual, {"mixing": "sum"}), (residual_net, residual, {"norm": "shared"}),
    (mobile_net, mobile, {}), (mobile_net, mobile, {"mixing": "sum"}),
])
def test_it_is_the_literal_form(make: Any, literal: Any, words: dict[str, str], kind: str) -> None:
    net, x = drawn(make(**words)), images()
    arch = settings(net.space, kind)
    mine, theirs = readings(net, net, x, arch), readings(net, lambda x, arch: literal(net, x, arch), x, arch)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-9, atol=1e-9), name
    assert kind in ("hard", "one") or mine["c5"].abs().sum() > 1e-3


# -- the rest -----------------------------------------------------------------------------------------------------------


def test_what_an_arch_file_is_served_by() -> None:
    assert type(build(RESIDUAL, 3, 5)) is ChannelResNet and type(build(MOBILE, 3, 5)) is ChannelMobileNet
    assert build(MOBILE.restrict({"c0": [6]}), 1, 7)(torch.zeros(2, 1, 8, 8), MOBILE.largest()).shape == (2, 7)


def test_gates_are_refused_for_widths() -> None:
    for net, leaf in ((ChannelResNet(RESIDUAL), r"stage0\.0\.conv0"), (ChannelMobileNet(MOBILE), r"blocks\.0\.expand")):
        gate = Mixture(net.space["c1"].options, torch.ones(3), (0,), "gate")
        with pytest.raises(ValueError, match=rf"^{leaf}: idle='gate' needs separate candidates"):
            net(torch.zeros(2, 3, 8, 8), net.space.largest() | {"c1": gate})


@pytest.mark.parametrize("make", [partial(residual_net, norm="shared"), mobile_net], ids=["residual", "mobile"])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
@torch.no_grad()
def test_trained_widths_keep_their_channels_and_others_change(make: Any, kept: int) -> None:
    """Inner widths: all but c0 and c4, which sums tie together."""
    net, x, inner = drawn(make()).eval(), images(), ["c1", "c2", "c3", "c5", "c6"]
    space = net.space
    archs = [space.largest() | {name: space[name].options[-n] for name in inner} for n in (1, 2, 3)]
    before = [net(x, arch) for arch in archs]
    moved = net.sort_channels(space.restrict({name: space[name].options[-kept:] for name in inner}) if kept else None)
    found = [((net(x, arch) - was).abs().max() / was.abs().max()).item() for arch, was in zip(archs, before)]
    assert max(found[: max(kept, 1)]) < 1e-11 and all(change > 1e-4 for change in found[max(kept, 1) :])
    orders = {id(order): [p for p, dim, own in moved if own is order and dim == 1] for _, _, order in moved}
    assert len(orders) == 5
    for readers in orders.values() if kept < 2 else ():
        assert (importance(readers[0]).diff() <= 0).all()
