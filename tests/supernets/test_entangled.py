"""Entangled operations against the padded loop of the page tanglenas, 2.2: kernels, edges of both kinds of cells, what runs."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nas.cost import CostTable, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces import darts, nats
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.chains import Conv
from supernets.darts import Cell, Cells, families
from supernets.entangled import Window, entangle, superposed
from supernets.extract import DropPath, extract
from supernets.mixing import active, idle_ones
from supernets.nats import Cell as Nats
from supernets.nats import Topology
from supernets.operations import Chained, Operation

SUMS = ("none", "max_pool_3x3", "sep_conv_3x3", "sep_conv_5x5+max_pool_3x3", "dil_conv_3x3", "sep_conv_7x7", "skip_connect")
SPACES: dict[str, Callable[[], darts.Cells]] = {
    "usual": lambda: darts.Cells(C=4, layers=3, nodes=2),
    "sums": lambda: darts.Cells(C=4, layers=3, nodes=2, ops=SUMS),
}


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(y: Tensor) -> Tensor:
    """Batch statistics, no scale and shift."""
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
    return (y - mean) / torch.sqrt(var + 1e-5)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


# -- kernels ------------------------------------------------------------------------------------------------------------

Forms = Callable[[int], list[list[Conv]]]
FORMS: dict[str, tuple[Forms, tuple[int, ...]]] = {
    "dense": (lambda k: [[Conv(k)]], (1, 3)),
    "dense, stride 2": (lambda k: [[Conv(k, 2)]], (3, 5)),
    "dilated": (lambda k: [[Conv(k, 1, 2, True), Conv(1)]], (3, 5)),
    "dilated, stride 2": (lambda k: [[Conv(k, 2, 2, True), Conv(1)]], (5, 3)),
    "separable": (lambda k: [[Conv(k, 1, 1, True), Conv(1)]] * 2, (3, 5, 7)),
    "separable, stride 2": (lambda k: [[Conv(k, 2, 1, True), Conv(1)], [Conv(k, 1, 1, True), Conv(1)]], (3, 5)),
}


def family(name: str) -> dict[str, Any]:
    form, sizes = FORMS[name]
    made = entangle({f"k{k}": Operation(4, 4, form(k), affine=False) for k in sizes}, [f"k{k}" for k in sizes])
    for leaf in made.values():
        leaf.double().reset(torch.Generator().manual_seed(1))
    return made


def padded(W: Tensor, k: int) -> Tensor:
    """The centred window of W, in its place among zeros."""
    out, s = torch.zeros_like(W), (W.shape[-1] - k) // 2
    out[..., s : s + k, s : s + k] = W[..., s : s + k, s : s + k]
    return out


def loop(leaf: Any, sizes: Sequence[int], w: Sequence[Tensor], x: Tensor) -> Tensor:
    """The family with its weights in ``leaf``: padded copies are added, then convolutions, then each unit's norm."""
    k, last = 0, len(leaf.units) - 1
    for u, unit in enumerate(leaf.units):
        for conv in unit:
            W = leaf.weight[k]
            if W.shape[-1] > 1:
                W = torch.stack([v * padded(W, size) for v, size in zip(w, sizes)]).sum(0)
            groups = len(W) if conv.depthwise else 1
            x = F.conv2d(x, W, None, conv.stride, conv.dilation * (W.shape[-1] // 2), conv.dilation, groups)
            k += 1
        x = norm(x) if u == last else torch.relu(norm(x))
    return x


@pytest.mark.parametrize("name", FORMS)
def test_a_superposition_is_the_padded_loop(name: str) -> None:
    """Values, and gradients to x, every weight and every w."""
    leaves, sizes = family(name), FORMS[name][1]
    whole = leaves[f"k{max(sizes)}"]
    x, w = doubles(3, 4, 8, 8).requires_grad_(), [doubles(1, seed=k)[0].requires_grad_() for k in sizes]
    found, expected = superposed(list(leaves.values()), w).run(x), loop(whole, sizes, w, x)
    sources, factors = [x, *w, *whole.parameters()], doubles(*expected.shape, seed=9)
    grads = [torch.autograd.grad((out * factors).sum(), sources) for out in (found, expected)]
    assert same(found, expected) and all(same(a, b, 1e-9) and bool(b.any()) for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["dense", "dense, stride 2", "dilated", "dilated, stride 2"])
def test_in_front_of_the_norm_it_is_the_sum_of_what_each_gives(name: str) -> None:
    """A bare convolution is linear in its kernel: superposing equals mixing outputs."""
    leaves, x = family(name), doubles(3, 4, 8, 8)
    chains, w = [leaf.chain() for leaf in leaves.values()], [torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.6)]
    joint = superposed(list(leaves.values()), w)

    def first(chain: Any) -> Tensor:
        conv = chain.units[0][0]
        return F.conv2d(x, chain.weights[0], None, conv.stride, conv.padding(), conv.dilation, 4 if conv.depthwise else 1)

    assert same(first(joint), w[0] * first(chains[0]) + w[1] * first(chains[1]), 1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_alone_each_runs_its_window(name: str) -> None:
    """A value, a weight of 1 beside zeros, and a mixture of one: all the same, and no more than a window is multiplied."""
    leaves, sizes, x = family(name), FORMS[name][1], doubles(3, 4, 8, 8)
    whole, one, zero = leaves[f"k{max(sizes)}"], torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for size, leaf in zip(sizes, leaves.values()):
        assert leaf.whole is whole and isinstance(leaf, Window) is (size < max(sizes))
        expected = loop(whole, [size], [one], x)
        alone = superposed([leaf], [one])
        assert same(leaf(x, {}), expected) and same(alone.run(x), expected)
        assert same(superposed(list(leaves.values()), [one if k == size else zero for k in sizes]).run(x), expected)
        for chain in (alone, leaf.chain()):
            assert {weight.shape[-1] for weight in chain.weights} <= {1, size}
        assert all(a is b for a, b in zip(leaf.chain().norms, whole.norm))


def test_a_norm_without_scale_keeps_the_ratio_alone() -> None:
    leaves, x = family("separable"), doubles(3, 4, 8, 8)
    w = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    once, twice, other = (superposed(list(leaves.values()), list(v)).run(x) for v in (w, 2 * w, w.flip(0)))
    assert same(once, twice, 1e-2) and not same(once, other, 1e-1)


def test_a_window_has_no_weights_and_keeps_to_odd_kernels() -> None:
    leaves = family("dense, stride 2")
    assert not list(leaves["k3"].parameters()) and not list(leaves["k3"].buffers()) and not list(leaves["k3"].children())
    with pytest.raises(ValueError, match=r"kernel = 7 is no window of a kernel of 5\. Allowed: odd kernels up to that"):
        Window(leaves["k5"], 7)
    with pytest.raises(ValueError, match="kernel = 2 has no centre"):
        Window(leaves["k5"], 2)


# -- cells --------------------------------------------------------------------------------------------------------------


def topology(bias: bool = False, entangled: bool = True) -> Any:
    net = Topology(nats.Topology(4, 1), classes=5, bias=bias, entangled=entangled).double()
    net.reset(torch.Generator().manual_seed(0))
    return net


def cells(name: str = "usual", entangled: bool = True) -> Any:
    net = Cells(SPACES[name](), classes=5, entangled=entangled).double()
    net.reset(torch.Generator().manual_seed(0))
    return net


NETS: dict[str, Callable[[bool], Any]] = {
    "topology": lambda entangled: topology(entangled=entangled), "darts": lambda entangled: cells(entangled=entangled)
}  # fmt: skip


def settings(space: SearchSpace, kind: str) -> dict[str, Setting]:
    """"all" options; "some": the same computed everywhere; "pairs": two, others on each edge; "mixed": every third edge is
    hard; "ones": one, with weight 1."""
    found: dict[str, Setting] = {}
    for i, choice in enumerate(space.choices):
        K = len(choice.options)
        w, one = doubles(K, seed=i).abs() + 0.1, (3 * i + 2) % K
        some, pair = (1, 2, 3) if K == 5 else (3, 4, 5), tuple(sorted({i % K, (i + 2) % K}))
        at = {"some": some, "pairs": pair, "ones": (one,)}.get(kind)
        w = F.one_hot(torch.tensor(one), K).double() if kind == "ones" else w
        mixture = Mixture(choice.options, w.requires_grad_(), at, "ones" if kind == "ones" else "absent")
        found[choice.name] = choice.options[i // 3 % K] if kind == "mixed" and i % 3 == 0 else mixture
    return found


def literal_edge(leaves: Mapping[str, Any], x: Tensor, setting: Setting, plain: Mapping[str, Any], kept: float = 1.0) -> Tensor:
    """out = w_skip x + w_pool pool(x) + entangled(x); an operation that is the only one of its kind has no family.
    ``plain``: operations without convolutions. ``kept``: what drop path leaves of all but the identity."""
    weights, out = dict[str, Any](), plain["none"](x)
    if isinstance(setting, Mixture):
        for j in active(setting):
            for op in darts.parts(str(setting.options[j])):
                weights[op] = weights.get(op, 0.0) + setting.weights[j]
    else:
        weights = {op: torch.ones((), dtype=x.dtype) for op in darts.parts(str(setting))}
    for kind in ("sep", "dil", "nor"):
        known = [op for op in leaves if op.startswith(f"{kind}_conv")]
        members = {op: w for op, w in weights.items() if op in known}
        if members and len(known) > 1:
            sizes = [int(op[-1]) for op in members]
            out = out + kept * loop(leaves[known[0]].whole, sizes, list(members.values()), torch.relu(x))
        elif members:
            out = out + kept * members[known[0]] * loop(leaves[known[0]], [int(known[0][-1])], [1.0], torch.relu(x))  # type: ignore
    for op, w in weights.items():
        if "_conv_" not in op:
            out = out + (1.0 if op == "skip_connect" else kept) * w * plain[op](x)
    return out + (idle_ones(setting) if isinstance(setting, Mixture) else 0.0)


def literal_nats(cell: Any, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
    plain = {
        "none": lambda x: x * 0.0, "skip_connect": lambda x: x,
        "avg_pool_3x3": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    }  # fmt: skip
    states = [x]
    for node in (1, 2, 3):
        names = [(nats.edge(node, i), states[i]) for i in range(node)]
        states.append(sum(literal_edge(cell.operations(name), s, arch[name], plain) for name, s in names))  # type: ignore
    return states[3]


def literal_darts(cell: Any, s0: Tensor, s1: Tensor, arch: Mapping[str, Setting], drop: Any = None) -> Tensor:
    states = [cell.pre0(s0, {}), cell.pre1(s1, {})]
    for node in cell.nodes:
        out: Any = 0.0
        for i in range(node):
            name, stride = darts.edge(cell.kind, node, i), cell.stride(i)
            leaves = cell.leaves(name)
            plain = {
                "none": lambda x, s=stride: x[:, :, ::s, ::s] * 0.0,
                "max_pool_3x3": lambda x, s=stride: norm(F.max_pool2d(x, 3, s, 1)),
                "avg_pool_3x3": lambda x, s=stride: norm(F.avg_pool2d(x, 3, s, 1, count_include_pad=False)),
                "skip_connect": lambda x, of=leaves: of["skip_connect"](torch.relu(x), {}) if "skip_connect" in of else x,
            }
            out = out + literal_edge(leaves, states[i], arch[name], plain, drop or 1.0)
        states.append(out)
    return torch.cat([states[i] for i in cell.concat], dim=1)


def readings(net: nn.Module, arch: Mapping[str, Setting]) -> dict[str, Tensor]:
    """Logits, and the gradients of every parameter and of every mixture's weights (zeros where there is none)."""
    leaves = dict(net.named_parameters()) | {n: s.weights for n, s in arch.items() if isinstance(s, Mixture)}
    for leaf in leaves.values():
        leaf.grad = None
    z = net(doubles(4, 3, 8, 8, seed=3), arch)
    (z * torch.arange(1.0, z.numel() + 1).view_as(z)).sum().backward()
    return {"": z.detach()} | {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in leaves.items()}


@pytest.mark.parametrize("kind", ["all", "some", "pairs", "mixed", "ones"])
@pytest.mark.parametrize("name", ["topology", "biased", "usual", "sums"])
def test_a_mixture_is_the_literal_one(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole nets, values and every gradient, where operations stand side by side and where they do not."""
    net = cells(name) if name in SPACES else topology(bias=name == "biased")
    arch = settings(net.space, kind)
    found = readings(net, arch)
    with torch.no_grad():
        assert same(net(doubles(4, 3, 8, 8, seed=3), arch), found[""])  # as recalibration runs it, one by one
    monkeypatch.setattr(Nats, "forward", literal_nats)
    monkeypatch.setattr(Cell, "forward", literal_darts)
    expected = readings(net, arch)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert same(found[path], value, 1e-8), path
    assert max(float(value.abs().max()) for path, value in expected.items() if "_conv_" in path) > 1e-3


def test_drop_path_drops_a_family_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once on each of two families and two pools of an edge, never on the identity; here it halves."""
    net, dropped, x = cells(), list[float](), doubles(4, 3, 8, 8)

    def half(_: nn.Module, y: Tensor, drop: float) -> Tensor:
        dropped.append(drop)
        return 0.5 * y

    monkeypatch.setattr(DropPath, "forward", half)
    arch, cell, s0 = settings(net.space, "all"), net.every_cell()[0], torch.relu(net.stem[0](x, {}))
    found = cell(s0, s0, arch, 0.1)
    assert dropped == [0.1] * 5 * 4 and same(found, literal_darts(cell, s0, s0, arch, 0.5))


class Convolutions(TorchDispatchMode):
    """The kernel sizes of all convolutions, and how many groups of channels each has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "convolution":
            self.found[tuple(args[1].shape[-2:])] += math.prod(args[1].shape[:2])
        return func(*args, **(kwargs or {}))


def convolutions(net: Any, arch: Mapping[str, Setting]) -> Counter[tuple[int, int]]:
    """Size of kernel -> how many kernels of one channel."""
    with Convolutions() as mode:
        net(doubles(4, 3, 8, 8), arch)
    return mode.found


@pytest.mark.parametrize("name", NETS)
def test_a_family_runs_once_at_its_largest_active_size(name: str) -> None:
    net, apart = NETS[name](True), NETS[name](False)
    large, small = {"topology": (["nor_conv_3x3"], ["nor_conv_1x1"]),
                    "darts": (["sep_conv_5x5", "dil_conv_5x5"], ["sep_conv_3x3", "dil_conv_3x3"])}[name]  # fmt: skip

    def only(ops: list[str]) -> dict[str, Setting]:
        w = torch.rand(len(net.space.ops if name == "darts" else nats.OPS), dtype=torch.float64)
        return {c.name: Mixture(c.options, w, tuple(map(c.options.index, ops))) for c in net.space.choices}

    assert convolutions(net, only([*small, *large])) == convolutions(apart, only(large))
    for ops in (large, small):
        assert convolutions(net, only(ops)) == convolutions(apart, only(ops))
        hard = {c.name: ops[-1] for c in net.space.choices}
        assert convolutions(net, hard) == convolutions(apart, hard)


# -- nets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_plain_networks_have_the_same_names_and_the_windows(name: str) -> None:
    """So that arch.json, which does not say how weights were searched, rebuilds them."""
    net, apart, x = NETS[name](True), NETS[name](False), doubles(4, 3, 8, 8)
    small = {"topology": "nor_conv_1x1", "darts": "sep_conv_3x3"}[name]
    arch = dict.fromkeys(net.space.largest(), small)
    install(net, recalibrate(net, [arch], [x, x.flip(0) * 0.5])[0])
    graph, other = extract(net.eval(), arch, x), extract(apart.eval(), arch, x)
    shapes = [{key: value.shape for key, value in g.state_dict().items()} for g in (graph, other)]
    assert shapes[0] == shapes[1] and same(graph(x), net(x, arch))
    path = {"topology": "stages.0.0.node2.from1", "darts": "cells.0.node3.from1"}[name]
    leaf = net.get_submodule(f"{path}.{small}")
    plain = next(m for key, m in graph.named_modules() if key.startswith(f"{path}.{small}.") and isinstance(m, nn.Conv2d))
    k = plain.kernel_size[0]
    assert torch.equal(plain.weight, leaf.whole.weight[0][..., 1 : 1 + k, 1 : 1 + k])


@pytest.mark.parametrize("name", NETS)
def test_costs_are_of_the_options_and_weights_are_fewer(name: str) -> None:
    net, apart = NETS[name](True), NETS[name](False)
    assert [(r.name, r.op, r.on) for r in net.layers((8, 8))] == [(r.name, r.op, r.on) for r in apart.layers((8, 8))]
    for option in net.space.choices[0].options:
        arch = dict.fromkeys(net.space.largest(), option)
        for price in (macs, params):
            assert CostTable(net, (8, 8), price).of(arch) == CostTable(apart, (8, 8), price).of(arch)
    mine, theirs = dict(net.named_parameters()), dict(apart.named_parameters())
    gone = {"topology": ("nor_conv_1x1",), "darts": ("sep_conv_3x3", "dil_conv_3x3")}[name]
    assert mine.keys() == {path for path in theirs if not any(op in path for op in gone)}
    assert set(net.state_dict()) == {path for path in apart.state_dict() if not any(op in path for op in gone)}


def test_shared_weights_are_of_the_choice_and_of_no_option() -> None:
    net, edge = cells("sums"), "normal.node3.from1"
    (cell,) = (cell for cell in net.every_cell() if cell.kind == "normal")
    leaves = cell.leaves(edge)
    assert net.owned(edge, "sep_conv_3x3") == net.owned(edge, "sep_conv_7x7") == net.owned(edge, SUMS[3]) == []
    alone = [id(p) for p in leaves["dil_conv_3x3"].parameters()]  # this space has dil_conv of one size
    assert [id(p) for p in net.owned(edge, "dil_conv_3x3")] == alone
    assert [id(p) for p in net.owned(edge)] == [*alone, *(id(p) for p in leaves["sep_conv_7x7"].parameters())]
    whole = topology().owned("node2.from1")
    assert [tuple(p.shape) for p in whole] == [(c, c, 3, 3) for c in (4, 8, 16)]


def test_two_of_a_family_in_one_option_are_refused() -> None:
    assert families(darts.OPS) == (("sep_conv_3x3", "sep_conv_5x5"), ("dil_conv_3x3", "dil_conv_5x5"))
    assert families(SUMS) == (("sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"),)
    space = darts.Cells(C=4, layers=3, nodes=2, ops=("none", "sep_conv_5x5+sep_conv_3x3", "sep_conv_3x3"))
    with pytest.raises(ValueError, match=r"^sep_conv_5x5\+sep_conv_3x3 adds two operations that entangled cells give one norm"):
        Cells(space, entangled=True)
    assert not any(isinstance(m, Window) for m in Cells(space).modules())
    assert any(isinstance(m, Chained) and m.whole is not m for m in Cells(SPACES["sums"](), entangled=True).modules())
