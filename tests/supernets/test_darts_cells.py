"""The DARTS supernet against literal forms of the page darts, section 2: mixed edges, what is computed how often, layouts,
published cells of other forms, drop path, and the training form with its auxiliary head."""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces import darts
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, Mixture, Setting
from supernets.darts import Cell, Cells
from supernets.extract import DropPath, TrainingForm, extract, training_form
from supernets.mixing import active, idle_ones
from supernets.printer import check, source
from supernets.resnet import ResNet

SUMS = (*darts.OPS[:6], "sep_conv_5x5+max_pool_3x3", "conv_7x1_1x7")
SPACES: dict[str, Callable[[], darts.Cells]] = {
    "cifar": lambda: darts.Cells(C=4, layers=3, nodes=2),
    "imagenet": lambda: darts.Cells(C=4, layers=3, nodes=2, stem="imagenet"),
    "sums": lambda: darts.Cells(C=4, layers=3, nodes=2, ops=SUMS, normal_concat=[3]),
}


def made(name: str = "cifar", seed: int = 0) -> Any:
    net = Cells(SPACES[name](), classes=5).double()
    net.reset(torch.Generator().manual_seed(seed))
    return net


def images(net: Cells | None = None, batch: int = 4) -> Tensor:
    size = 32 if net is not None and net.imagenet else 8
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mixtures(space: darts.Cells, kind: str = "all") -> dict[str, Setting]:
    """"all" options; "some": the same three computed everywhere; "pairs": another two on each edge; "mixed": every third
    edge is hard; "ones", "gate": one, with weight 1."""
    generator, found = torch.Generator().manual_seed(1), dict[str, Setting]()
    for i, choice in enumerate(space.choices):
        K = len(choice.options)
        w, one = torch.rand(K, generator=generator, dtype=torch.float64) + 0.1, 3 * i % (K - 1) + 1
        at = {"some": (0, 3, 4), "pairs": tuple(sorted({i % K, (i + 3) % K})), "ones": (one,), "gate": (one,)}.get(kind)
        if kind in ("ones", "gate"):
            w = F.one_hot(torch.tensor(one), K).double()
        mixture = Mixture(choice.options, w.requires_grad_(), at, kind if kind in ("ones", "gate") else "absent")
        found[choice.name] = choice.options[4] if kind == "mixed" and i % 3 == 0 else mixture
    return found


# -- the literal form ---------------------------------------------------------------------------------------------------


def norm(y: Tensor) -> Tensor:
    """Batch statistics, no scale and shift."""
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
    return (y - mean) / torch.sqrt(var + 1e-5)


def halved(x: Tensor, weights: Any) -> Tensor:
    return norm(torch.cat([F.conv2d(x, weights[0], stride=2), F.conv2d(x[:, :, 1:, 1:], weights[1], stride=2)], 1))


def literal_op(cell: Cell, name: str, op: str, x: Tensor, stride: int) -> Tensor:
    """One operation of the page's table, from the start."""
    if op == "max_pool_3x3":
        return norm(F.max_pool2d(x, 3, stride, 1))
    if op == "avg_pool_3x3":
        return norm(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
    if op == "skip_connect" and stride == 1:
        return x
    w: Any = cell.leaves(name)[op].weight
    C, x = x.shape[1], torch.relu(x)
    if op == "skip_connect":
        return halved(x, w)
    if op == "conv_7x1_1x7":
        return norm(F.conv2d(F.conv2d(x, w[0], stride=(1, stride), padding=(0, 3)), w[1], stride=(stride, 1), padding=(3, 0)))
    k = int(op[-1])
    if op.startswith("dil"):
        return norm(F.conv2d(F.conv2d(x, w[0], None, stride, k - 1, 2, C), w[1]))
    y = norm(F.conv2d(F.conv2d(x, w[0], None, stride, k // 2, 1, C), w[1]))
    return norm(F.conv2d(F.conv2d(torch.relu(y), w[2], None, 1, k // 2, 1, C), w[3]))


def literal_edge(cell: Cell, name: str, x: Tensor, setting: Setting, stride: int) -> Tensor:
    def option(value: Any) -> Tensor:
        ops = [literal_op(cell, name, op, x, stride) for op in darts.parts(str(value))]
        return torch.stack(ops).sum(0) if ops else x[:, :, ::stride, ::stride] * 0.0

    if not isinstance(setting, Mixture):
        return option(setting)
    return sum(setting.weights[j] * option(setting.options[j]) for j in active(setting)) + idle_ones(setting)  # type: ignore[return-value]


def literal(net: Cells, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
    """The search net of the page, one operation after another, in training."""
    outs: list[Tensor] = []
    for conv in net.stem:
        z = F.conv2d(torch.relu(x) if outs else x, conv.weight[0], stride=2 if net.imagenet else 1, padding=1)  # type: ignore
        x = F.batch_norm(z, None, None, *(p[0] for p in (conv.norm[0].weight, conv.norm[0].bias)), training=True)  # type: ignore
        outs.append(x)
    s0, s1 = (outs[1], outs[2]) if net.imagenet else (outs[0], outs[0])
    for cell in net.every_cell():
        first = cell.pre0.weight
        two = halved(torch.relu(s0), first) if len(first) == 2 else norm(F.conv2d(torch.relu(s0), first[0]))
        states = [two, norm(F.conv2d(torch.relu(s1), cell.pre1.weight[0]))]
        for node in cell.nodes:
            edges = [(darts.edge(cell.kind, node, j), states[j], cell.stride(j)) for j in range(node)]
            states.append(torch.stack([literal_edge(cell, name, s, arch[name], stride) for name, s, stride in edges]).sum(0))
        s0, s1 = s1, torch.cat([states[i] for i in cell.concat], 1)
    return F.linear(s1.mean((2, 3)), net.classifier.weight, net.classifier.bias)


def readings(run: Callable[[], Tensor], net: nn.Module, arch: Mapping[str, Setting]) -> dict[str, Tensor]:
    """Logits, and the gradients of every parameter and of every mixture's weights (zeros where there is none)."""
    leaves = dict(net.named_parameters()) | {n: s.weights for n, s in arch.items() if isinstance(s, Mixture)}
    for leaf in leaves.values():
        leaf.grad = None
    z = run()
    (z * torch.arange(1.0, z.numel() + 1).view_as(z)).sum().backward()
    return {"": z.detach()} | {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max().clamp(min=1.0), name


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["all", "some", "pairs", "mixed", "ones"])
def test_a_mixture_is_the_literal_one(name: str, kind: str) -> None:
    """Values and every gradient, where operations stand side by side and where they do not."""
    net = made(name)
    x, arch = images(net), mixtures(net.space, kind)
    check_same(readings(lambda: net(x, arch), net, arch), readings(lambda: literal(net, x, arch), net, arch))


@pytest.mark.parametrize("name", SPACES)
def test_a_path_is_the_literal_one(name: str) -> None:
    net, rng = made(name), random.Random(4)
    x = images(net)
    for arch in [net.space.sample(rng) for _ in range(3)] + [dict.fromkeys(net.space.largest(), "none")]:
        check_same(readings(lambda: net(x, arch), net, arch), readings(lambda: literal(net, x, arch), net, arch))  # noqa: B023


@pytest.mark.parametrize("kind", ["all", "mixed"])
def test_side_by_side_is_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = made()
    x, arch = images(net), mixtures(net.space, kind)
    together = readings(lambda: net(x, arch), net, arch)
    fans: list[int] = []

    def none(*_: Any) -> dict[int, Tensor]:
        fans.append(1)
        return {}

    monkeypatch.setattr(Cell, "_fan", none)
    check_same(together, readings(lambda: net(x, arch), net, arch))
    assert len(fans) == 3 * 3  # three cells, three states that are read


def test_gates_add_the_gradient_of_what_is_not_run() -> None:
    """<f_j(x), dL/dout> for every option; the value and the weights' own gradients are the active path's."""
    net = made()
    x, arch = images(net), mixtures(net.space, "gate")
    hard = {name: s.options[s.active[0]] for name, s in arch.items() if isinstance(s, Mixture) and s.active}
    found, path = readings(lambda: net(x, arch), net, arch), readings(lambda: net(x, hard), net, hard)
    check_same({name: found[name] for name in path}, path)
    full = {name: Mixture(s.options, s.weights) for name, s in arch.items() if isinstance(s, Mixture)}
    expected = readings(lambda: net(x, full), net, full)  # the other weights are 0, so this is the same point
    check_same({name: found[name] for name in full}, {name: expected[name] for name in full})


# -- what is computed, and in what layout ---------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls(net: Cells, arch: Mapping[str, Setting]) -> Counter[str]:
    with Calls() as found:
        net(images(net), arch)
    return found.count


def test_what_edges_share_is_computed_once() -> None:
    net = made()
    found = calls(net, mixtures(net.space))
    assert found["max_pool2d_with_indices"] == found["avg_pool2d"] == 3 * 3  # a cell has three states that are read
    # a ReLU of each read state and between the units of two kinds of sep_conv; of the stem and of what cells read
    assert found["relu"] == 3 * 3 and found["relu_"] == 3 * 3 * 2 + 1 + 2
    with torch.no_grad():
        found = calls(net, net.space.largest())  # sep_conv_5x5 on all five edges
    assert found["max_pool2d_with_indices"] == found["avg_pool2d"] == 0 and found["relu"] == 3 * 3


def test_options_without_weight_are_not_computed() -> None:
    net = made()
    arch = {name: Mixture(s.options, s.weights, (0, 1, 4)) for name, s in mixtures(net.space).items()
            if isinstance(s, Mixture)}  # fmt: skip
    found = calls(net, arch)
    assert found["avg_pool2d"] == 0 and found["max_pool2d_with_indices"] == 9
    net.zero_grad()
    net(images(net), arch).sum().backward()
    used = {name.split(".")[4] for name, p in net.named_parameters() if ".node" in name and p.grad is not None}
    assert used == {"sep_conv_3x3"}


@pytest.mark.parametrize("kind", ["all", "hard"])
def test_channels_last_survives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = made().to(memory_format=torch.channels_last), []  # type: ignore[call-overload]
    arch = mixtures(net.space) if kind == "all" else net.space.sample(random.Random(1))
    forward = Cell.forward

    def watched(*args: Any) -> Tensor:
        seen.append(forward(*args))
        return seen[-1]

    monkeypatch.setattr(Cell, "forward", watched)
    net(images().contiguous(memory_format=torch.channels_last), arch)
    assert len(seen) == 3 and all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)
    assert not any(out.is_contiguous() for out in seen)


def test_bfloat16_is_near_float32() -> None:
    net = made().float()
    x, arch = images().float(), {n: s._replace(weights=s.weights.detach().float()) for n, s in mixtures(net.space).items()}  # type: ignore
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        z = net(x, arch)
    z.float().sum().backward()
    assert (z - net(x, arch)).abs().max() < 0.2
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


# -- readings -----------------------------------------------------------------------------------------------------------


def test_a_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images of 6x8 reach a reduction cell at 3x4, .* Allowed: multiples of 4"):
        made().layers((6, 8))
    with pytest.raises(ValueError, match=r"images of 48x48 reach a reduction cell at 3x3, .* Allowed: multiples of 32"):
        made("imagenet").layers((48, 48))
    with pytest.raises(ValueError, match="C = 3 is odd"):
        Cells(darts.Cells(C=3, layers=3, stem="imagenet"))


def test_an_option_owns_what_no_other_option_runs() -> None:
    net, edge = made("sums"), "normal.node2.from1"
    (cell,) = (cell for cell in net.every_cell() if cell.kind == "normal")
    leaves = cell.leaves(edge)
    assert [id(p) for p in net.owned(edge, "sep_conv_3x3")] == [id(p) for p in leaves["sep_conv_3x3"].parameters()]
    assert net.owned(edge, "sep_conv_5x5") == net.owned(edge, "sep_conv_5x5+max_pool_3x3") == net.owned(edge, "none") == []
    assert {id(p) for p in net.owned(edge)} == {id(p) for leaf in leaves.values() for p in leaf.parameters()}
    halves = [p for cell in net.every_cell() if cell.kind == "reduce"
              for p in cell.leaves("reduce.node3.from0")["skip_connect"].parameters()]  # fmt: skip
    assert [id(p) for p in net.owned("reduce.node3.from0", "skip_connect")] == [id(p) for p in halves] and len(halves) == 4


# -- plain networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NASNET", "AMOEBANET", "DARTS_V1"])
def test_published_cells_of_other_forms(name: str) -> None:
    """Five nodes, a part of them as output, further operations, one state read twice."""
    space = darts.Cells.of(getattr(darts, name), C=4, layers=3)
    net, arch, x = Cells(space, classes=5).double(), space.arch_of(getattr(darts, name)), images(batch=3)
    install(net, recalibrate(net, [arch], [images(batch=6)])[0])
    graph = extract(net.eval(), arch, x)
    assert (graph(x) - net(x, arch)).abs().max() < 1e-12
    check(graph, source(graph), x)
    fresh = extract(net, arch, x, inherit=False)
    assert counted(fresh, x) == tuple(CostTable(net, (8, 8), price).of(arch) for price in (macs, params))


def test_inherited_pools_keep_their_norms_and_fresh_ones_have_none() -> None:
    net = made()
    arch = dict.fromkeys(net.space.largest(), "max_pool_3x3")
    kept, fresh = (extract(net, arch, images(), inherit=inherit) for inherit in (True, False))
    norms = [m for m in kept.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(not m.affine for m in norms) == 3 * 3
    assert all(m.affine for m in fresh.modules() if isinstance(m, nn.BatchNorm2d))
    assert counted(kept, images()) == counted(fresh, images())


def test_branches_that_reach_nothing_are_part_of_the_network_and_its_cost() -> None:
    """As in the published networks: preprocessing that nothing reads, nodes that only lead to none."""
    space = darts.Cells(C=4, layers=3, nodes=3, normal_concat=[4])
    net, rng, x = Cells(space, classes=5), random.Random(2), images(batch=2).float()
    for _ in range(6):
        arch: Arch = {choice.name: rng.choice((*choice.options, *["none"] * 6)) for choice in space.choices}
        graph = extract(net, arch, x, inherit=False)
        assert counted(graph, x) == tuple(CostTable(net, (8, 8), price).of(arch) for price in (macs, params))
        check(graph, source(graph), x)


# -- drop path and the auxiliary head -----------------------------------------------------------------------------------


def test_drop_path_keeps_samples_whole_and_their_mean() -> None:
    drop, y = DropPath().train(), torch.full((4000, 2, 3, 3), 2.0)
    torch.manual_seed(0)
    out = drop(y, 0.25)
    kept = out[:, 0, 0, 0] != 0
    assert out.mean().item() == pytest.approx(2.0, abs=0.06)
    assert torch.equal(out, torch.where(kept[:, None, None, None], y / 0.75, torch.zeros_like(y)))
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.manual_seed(0)
    assert torch.equal(drop(y, 0.25), out)
    assert drop(y, 0.0) is y and drop.eval()(y, 0.25) is y


def test_every_operation_but_the_identity_is_dropped_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = DropPath.forward

    def watched(self: DropPath, y: Tensor, drop: float) -> Tensor:
        seen.append(tuple(y.shape))
        return forward(self, y, drop)

    monkeypatch.setattr(DropPath, "forward", watched)
    net = made()
    arch = net.space.largest() | {"normal.node2.from0": "skip_connect", "reduce.node2.from0": "skip_connect",
                                  "normal.node3.from0": "none", "normal.node3.from1": "max_pool_3x3"}  # fmt: skip
    z = net(images(), arch, drop=0.3)
    # the identity of the normal cell is not dropped, the strided skip of the two reductions is
    assert Counter(seen) == {(4, 4, 8, 8): 3, (4, 8, 4, 4): 5, (4, 16, 2, 2): 5}
    seen.clear()
    assert not torch.equal(net(images(), arch), z) and net.eval()(images(), arch, drop=0.3) is not None and seen == []
    net.train()(images(), mixtures(net.space), drop=0.3)
    assert len(seen) == 5 * 6 + 2 * (5 * 7 - 1)  # of seven operations that are not none, identities are never dropped


@pytest.mark.parametrize("inherit", [False, True])
@pytest.mark.parametrize("name", ["cifar", "imagenet"])
def test_the_training_form_is_the_plain_network_with_a_head(name: str, inherit: bool) -> None:
    net = made(name)
    x, arch = images(net), net.space.sample(random.Random(3))
    plain = extract(net, arch, x, inherit, seed=5)
    form = training_form(net, arch, x, inherit, seed=5)
    weights = plain.state_dict()
    assert {key: True for key in weights} == {k: torch.equal(v, weights[k]) for k, v in form.network.state_dict().items()}
    assert isinstance(form, TrainingForm) and form.training and form.head is not None
    logits, auxiliary = form(x)
    assert torch.equal(logits, plain(x)) and auxiliary.shape == logits.shape == (4, 5)
    assert not torch.equal(form(x, 0.3)[0], logits)
    _, features = form.network(x)
    assert torch.allclose(form.head(features), auxiliary)
    assert features.shape[1:] == {"cifar": (32, 2, 2), "imagenet": (32, 1, 1)}[name]
    form.eval(), plain.eval()
    form.network.load_state_dict(plain.state_dict())
    assert torch.equal(form(x, 0.3), plain(x))
    alone = training_form(net, arch, x, inherit, head=False)
    assert alone.head is None and alone(x, 0.3).shape == (4, 5)


def test_heads_are_the_published_ones() -> None:
    for name, (size, stride, norms) in {"cifar": (8, 3, 2), "imagenet": (7, 2, 1)}.items():
        head: Any = made(name).head((12, size, size))
        assert isinstance(head[1], nn.AvgPool2d) and (head[1].kernel_size, head[1].stride) == (5, stride)
        assert head[1].count_include_pad is False
        assert sum(isinstance(m, nn.BatchNorm2d) for m in head) == norms
        assert head(torch.zeros(2, 12, size, size)).shape == (2, 5)
    small: Any = made().head((12, 4, 4))  # images that the paper did not train on
    assert isinstance(small[1], nn.AdaptiveAvgPool2d) and small(torch.zeros(2, 12, 4, 4)).shape == (2, 5)


def test_networks_without_a_training_form_are_refused() -> None:
    space = CifarResNet(8, "tied", widths=(4, 6, 8))
    with pytest.raises(ValueError, match="ResNet have neither an auxiliary head nor drop path") as error:
        training_form(ResNet(space), space.largest(), torch.zeros(2, 3, 8, 8))
    assert "\n" not in str(error.value)
