"""Channel sort of whole supernets: what stays, what changes, in which order, and what momentum does (OFA page, section 3)."""
from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from nas.descent import Descent
from search_spaces.macro import ConvMacro as MacroSpace
from search_spaces.nats import Sizes as SizesSpace
from search_spaces.resnet import CifarResNet
from search_spaces.resnet50d import OFAResNet50D as OFASpace
from search_spaces.space import Arch, SearchSpace
from supernets.macro import ConvMacro
from supernets.nats import Sizes
from supernets.resnet import ResNet
from supernets.resnet50d import OFAResNet50D
from supernets.sorting import importance, sort_channels, trained_widths

Trained = Callable[[SearchSpace, list[str]], SearchSpace | None]
"""What was trained, of a space and its inner widths."""


class Case(NamedTuple):
    """``sorted``: how many orders change; ``inner``: the choices of the widths that are sorted."""

    make: Callable[[], Any]
    inner: Callable[[SearchSpace], list[str]]
    sorted: int
    size: int = 8


class Bottleneck(CifarResNet):
    BLOCKS = {164: 1}  # noqa: RUF012  a constant table


def inside(space: SearchSpace) -> list[str]:
    return [choice.name for choice in space.choices if ".conv" in choice.name]


CASES = {
    "tied": Case(lambda: ResNet(CifarResNet(14, "tied", (4, 6, 8)), norm="shared", classes=5), inside, 6),
    "tas": Case(lambda: ResNet(CifarResNet(8, "tas", (4, 6, 8)), norm="shared", classes=5),
                lambda space: [name for name in inside(space) if "conv0" in name], 3),
    "bottleneck": Case(lambda: ResNet(Bottleneck(164, "tied", (4, 6, 8)), norm="shared", classes=5), inside, 6),
    "macro": Case(lambda: ConvMacro(MacroSpace(((2, 3, 5),) * 4, (3, 5), 5, (7,), 12), classes=5),
                  lambda space: ["c1", "c2", "c3", "c4"], 4, 12),
    "resnet50d": Case(lambda: OFAResNet50D(OFASpace(0.125, (1, 1, 1, 1)), classes=5),
                      lambda space: [choice.name for choice in space.choices if ".expand" in choice.name], 24, 32),
    "sizes": Case(lambda: Sizes(SizesSpace(), norm="shared", classes=5), lambda space: ["c1", "c2", "c3", "c4", "c5"], 8),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def made(case: Case) -> Any:
    """In float64, every number drawn, statistics too: so that a norm left behind would show. Signals keep their size."""
    net, generator = case.make().double(), torch.Generator().manual_seed(3)
    net.reset(generator)
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if "norm" in name or value.ndim < 2:
            value.data.uniform_(0.5, 1.5, generator=generator)
        elif not any(".norm" in other for other, _ in net.named_parameters()):
            value.data.mul_(2.5)
    return net.eval()


def images(case: Case, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, case.size, case.size, generator=generator, dtype=torch.float64)


def narrowed(net: Any, names: list[str], position: int) -> Arch:
    """The largest, but ``names`` at their option of ``position`` from the largest."""
    space = net.space
    return {**space.largest(), **{name: space[name].options[max(-len(space[name].options), -1 - position)] for name in names}}


@torch.no_grad()
def changes(case: Case, trained: Trained) -> list[float]:
    """How much the logits of the networks whose inner widths are the largest, the second, the third change, relative to
    the largest logit."""
    net, x = made(case), images(case)
    names = case.inner(net.space)
    archs = [narrowed(net, names, position) for position in (0, 1, 2)]
    before = [net(x, arch) for arch in archs]
    net.sort_channels(trained(net.space, names))
    return [((net(x, arch) - was).abs().max() / was.abs().max()).item() for arch, was in zip(archs, before)]


def first(space: SearchSpace, names: list[str], n: int) -> SearchSpace:
    """``space`` with the ``n`` largest options of each of ``names``."""
    return space.restrict({name: space[name].options[-n:] for name in names})


def test_trained_widths_keep_their_channels_and_others_change(case: Case) -> None:
    restrictions: list[Trained] = [lambda space, names: None, *(partial(first, n=n) for n in (1, 2, 3))]
    for n, trained in enumerate(restrictions):
        kept = max(n, 1)
        found = changes(case, trained)
        assert max(found[:kept]) < 1e-11, n
        assert all(change > 1e-4 for change in found[kept:]), (n, found)


def orders(moved: list[Any]) -> dict[int, list[Any]]:
    """The parameters of each order that changed."""
    found: dict[int, list[Any]] = {}
    for p, dim, order in moved:
        found.setdefault(id(order), []).append((p, dim))
    return found


def test_the_most_important_channels_come_first(case: Case) -> None:
    """By the L1 norm of all that reads them; nothing moves when sorted again."""
    net = made(case)
    moved = net.sort_channels()
    found = orders(moved)
    assert len(found) == case.sorted
    for places in found.values():
        read = torch.stack([importance(p) for p, dim in places if dim == 1]).sum(0)
        assert (read.diff() <= 0).all() and {dim for _, dim in places} == {0, 1}
    assert all(torch.equal(order, torch.arange(len(order))) for _, _, order in net.sort_channels())


def descent(net: Any) -> Descent:
    return Descent(net.parameters(), partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-3))


def down(case: Case, net: Any, w: Descent, seed: int) -> None:
    z = net(images(case, seed), net.space.largest())
    w.down((z - torch.arange(5.0, dtype=z.dtype)).square().mean())


@pytest.mark.parametrize("permuted", [True, False])
def test_the_next_update_is_the_unsorted_one_permuted(case: Case, permuted: bool) -> None:
    plain = made(case).train()
    w = descent(plain)
    for seed in (1, 2):
        down(case, plain, w, seed)
    other = copy.deepcopy(plain)
    v = descent(other)
    v.load_state_dict(copy.deepcopy(w.state_dict()))
    moved = other.sort_channels()
    if permuted:
        v.permute(moved)
    for net, d in ((plain, w), (other, v)):
        down(case, net, d, 3)
    names = {id(p): name for name, p in other.named_parameters()}
    expected = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for p, dim, order in moved:
        expected[names[id(p)]] = expected[names[id(p)]].index_select(dim, order)
    wrong = max((p - expected[name]).abs().max().item() for name, p in other.named_parameters())
    assert wrong < 1e-10 if permuted else wrong > 1e-5


@pytest.mark.parametrize("net", [ResNet(CifarResNet(8, widths=(4, 6, 8))), Sizes(SizesSpace())], ids=["tied", "sizes"])
def test_norms_with_a_scale_per_width_refuse_in_one_line(net: Any) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^stages.*: its norm has a scale per width, .*Use norm 'shared'") as error:
        net.sort_channels()
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_sums_keep_their_order() -> None:
    """What a stage's blocks add to each other is no block's own: stem, last convolutions and shortcuts stay."""
    net = made(CASES["tied"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.sort_channels()
    still = [name for name in before if name.startswith(("stem", "classifier")) or "shortcut" in name or "conv1.norm" in name]
    assert len(still) > 20 and all(torch.equal(net.state_dict()[name], before[name]) for name in still)


def test_readers_of_other_channels_are_refused() -> None:
    net = made(CASES["tied"])
    block, before = net.blocks(0)[0], copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^classifier: reads .* other channels than stages\.0\.0\.conv1; they cannot"):
        sort_channels([block.conv0], [block.conv1, net.classifier])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_widths_that_were_trained() -> None:
    """Of a size on two choices: every product; the full width needs no protection."""
    net = CASES["resnet50d"].make()
    out = net.blocks(3)[0].conv0.out[0]  # 256 or what is left of it, times the expand ratio
    assert trained_widths(out, None) == trained_widths(out, net.space.restrict({"stage3.width": [256],
                                                                              "stage3.block0.expand": [0.35]})) == []
    some = net.space.restrict({"stage3.width": [208, 256], "stage3.block0.expand": [0.25, 0.35]})
    assert out.full == 88 and trained_widths(out, some) == [56, 64, 72]
