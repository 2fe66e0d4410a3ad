"""The two supernets of NATS-Bench against literal forms of the page spaces-nb201-nats-macro, sections 1 and 2: mixtures
edge by edge, what is computed how often, biases that norms subtract, skips between widths."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nas.bundle import counted
from nas.cost import CostTable, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces import nats
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.extract import extract
from supernets.mixing import active, averaging, idle_ones
from supernets.nats import KERNELS, Cell, Sizes, Skip, Topology, build
from supernets.operations import joined

SPACE = nats.Topology(4, 1)
ALL_CONV, NOTHING = SPACE.largest(), dict.fromkeys(nats.NAMES, "none")


def topology(bias: bool = False, seed: int = 0) -> Topology:
    net = Topology(SPACE, classes=5, bias=bias).double()
    net.reset(torch.Generator().manual_seed(seed))
    return net


def images(batch: int = 6, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mixtures(kind: str, space: SearchSpace = SPACE) -> dict[str, Setting]:
    """"all" options; "pair": two computed; "ones": one, as GDAS has it (value 1, the others 0); "gate": one."""
    generator, found = torch.Generator().manual_seed(1), dict[str, Setting]()
    for i, choice in enumerate(space.choices):
        K = len(choice.options)
        w = torch.rand(K, generator=generator, dtype=torch.float64)
        one = (3 * i + 1) % K
        at = {"all": None, "pair": tuple(sorted((i % K, (i + 2) % K)))}.get(kind, (one,))
        if kind in ("ones", "gate"):
            w = F.one_hot(torch.tensor(one), K).double()
        found[choice.name] = Mixture(choice.options, w.requires_grad_(), at, kind if kind in ("ones", "gate") else "absent")
    return found


# -- Topology: the literal form -----------------------------------------------------------------------------------------


def literal_edge(cell: Cell, edge: str, x: Tensor, setting: Setting) -> Tensor:
    """Every operation from the start, each with its own ReLU and norm; none is x * 0."""

    def op(name: str) -> Tensor:
        if name == "none":
            return x * 0.0
        if name == "skip_connect":
            return x
        if name == "avg_pool_3x3":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        leaf = cell.operations(edge)[name]
        bias = leaf.bias[0] if len(leaf.bias) else None
        y = F.conv2d(torch.relu(x), leaf.weight[0], bias, padding=leaf.weight[0].shape[-1] // 2)
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
        return (y - mean) / torch.sqrt(var + 1e-5)

    if not isinstance(setting, Mixture):
        return op(str(setting))
    out = sum((setting.weights[j] * op(str(setting.options[j])) for j in active(setting)), start=torch.zeros_like(x))
    return out + idle_ones(setting)


def literal_cell(cell: Cell, x: Tensor, arch: Mapping[str, Setting]) -> Tensor:
    states = [x]
    for node in (1, 2, 3):
        edges = [literal_edge(cell, f"node{node}.from{i}", states[i], arch[f"node{node}.from{i}"]) for i in range(node)]
        states.append(torch.stack(edges).sum(0))
    return states[3]


def readings(net: nn.Module, arch: Mapping[str, Setting], x: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of every parameter and of every mixture's weights."""
    for p in net.parameters():
        p.grad = None
    for setting in arch.values():
        if isinstance(setting, Mixture):
            setting.weights.grad = None
    z = net(x, arch)
    (z * torch.arange(1.0, 6.0, dtype=z.dtype)).sum().backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
    found |= {name: s.weights.grad.clone() for name, s in arch.items() if isinstance(s, Mixture) and s.weights.grad is not None}
    return {"logits": z.detach(), **found}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("kind", ["hard", "all", "pair", "ones", "some hard", "fewer options"])
def test_it_is_the_literal_form(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = topology(), images()
    arch: dict[str, Setting] = dict(ALL_CONV | {"node2.from0": "avg_pool_3x3", "node3.from1": "skip_connect"})
    if kind == "some hard":
        arch |= {name: mixtures("all")[name] for name in ("node1.from0", "node3.from0", "node3.from2")}
    elif kind == "fewer options":
        w = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
        arch |= {name: Mixture(("nor_conv_3x3", "none"), w) for name in nats.NAMES}
    elif kind != "hard":
        arch |= mixtures(kind)
    mine = readings(net, arch, x)
    monkeypatch.setattr(Cell, "forward", literal_cell)
    equal(mine, readings(net, arch, x))
    assert kind == "hard" or mine["node3.from0" if kind != "ones" else "node1.from0"].abs().sum() > 1e-3


def test_groups_are_left_alone_without_gradients_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recalibration runs without gradients and sees every norm; there each operation stands alone."""
    net, x, soft = topology(), images(), mixtures("all")
    together = net(x, soft)
    with torch.no_grad():
        assert torch.allclose(net(x, soft), together, rtol=1e-12, atol=1e-12)
    (statistics,) = recalibrate(net, [soft], [x])
    assert {f"stages.2.0.{edge}.{op}.norm.0" for edge in nats.NAMES for op in KERNELS} <= set(statistics)


def test_a_gates_gradient_is_every_operations_answer() -> None:
    """The value is that of the active operations; dL/dw_j = <f_j(x), dL/dout>, also for those that were not computed."""
    net, arch = topology(), mixtures("gate")
    cell = net.cells(2)[0]
    x, g = torch.randn(2, 6, 16, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hard = {name: s.options[s.active[0]] for name, s in arch.items() if isinstance(s, Mixture) and s.active}
    out, gate = cell(x, arch), arch["node3.from0"]
    assert isinstance(gate, Mixture) and torch.allclose(out, cell(x, hard), rtol=0, atol=1e-12)
    (found,) = torch.autograd.grad((out * g).sum(), gate.weights)
    expected = [(literal_edge(cell, "node3.from0", x, option) * g).sum().item() for option in nats.OPS]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# -- Topology: what is computed -----------------------------------------------------------------------------------------


def test_every_needed_thing_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell of mixtures: three states are activated and pooled; two convolutions a state, whatever the number of edges."""
    net, x, seen = topology(), images(), Counter[str]()
    relu, conv, pool = F.relu, F.conv2d, F.avg_pool2d
    monkeypatch.setattr(F, "relu", lambda *a, **k: (seen.update(["relu"]), relu(*a, **k))[1])
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: (seen.update(["conv"]), conv(*a, **k))[1])
    monkeypatch.setattr(F, "avg_pool2d", lambda *a, **k: (seen.update(["pool"]), pool(*a, **k))[1])
    cell, state = net.cells(0)[0], images()[:, :1].expand(-1, 4, -1, -1)
    cell(state, mixtures("all"))
    assert seen == {"relu": 3, "conv": 6, "pool": 3}
    seen.clear()
    cell(state, ALL_CONV | {"node3.from0": "avg_pool_3x3", "node2.from0": "avg_pool_3x3"})
    assert seen == {"relu": 3, "conv": 4, "pool": 1}
    seen.clear()
    cell(state, dict.fromkeys(nats.NAMES, "skip_connect"))
    assert not seen
    net(x, NOTHING)
    assert seen == {"conv": 1 + 2 * 3, "pool": 2, "relu": 2 * 2 + 1}  # the skeleton


def test_nothing_is_zeros() -> None:
    net, x = topology(), images()
    assert not net.cells(0)[0](images()[:, :1].expand(-1, 4, -1, -1), NOTHING).any()
    z = net(x, NOTHING)
    assert torch.allclose(z, net.classifier.bias.expand_as(z))
    z.sum().backward()  # a step on such a network is legal
    idle = {name: Mixture(nats.OPS, torch.tensor([1.0, 0, 0, 0, 0], requires_grad=True), (0,), "ones") for name in nats.NAMES}
    assert torch.allclose(net(x, idle), z)


class Copies(TorchDispatchMode):
    """Names of the operations that write feature maps (4 dimensions, more than one pixel) anew without computing them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").split(".")[0]
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[-1] > 3:
            if name in ("clone", "copy_", "_to_copy", "contiguous"):
                self.found.append(f"copy: {name}")
            elif out.shape[1] > 1 and name not in ("slice_backward", "view") and not _last(out):
                self.found.append(f"layout: {name}")
        return out


def _last(x: Tensor) -> bool:
    """Whether channels lie innermost, also in a slice of channels."""
    return x.stride(1) == 1


@pytest.mark.parametrize("kind", ["hard", "all", "pair", "ones"])
def test_channels_last_survives(kind: str) -> None:
    net = topology().float().to(memory_format=torch.channels_last)
    x = images().float().contiguous(memory_format=torch.channels_last)
    arch = ALL_CONV if kind == "hard" else mixtures(kind)
    with Copies() as copies:
        net(x, arch).logsumexp(1).sum().backward()
    assert not copies.found


# -- Topology: biases ---------------------------------------------------------------------------------------------------


def test_a_bias_changes_nothing() -> None:
    """Norms subtract it: equal logits, no gradient beyond rounding."""
    net, with_bias, x = topology(), topology(bias=True), images()
    missing = with_bias.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert len(missing) == 3 * 12 and all(".bias." in name for name in missing)
    assert all(with_bias.get_parameter(name).abs().min() > 0 for name in missing)
    for arch in (ALL_CONV, mixtures("all")):
        found = readings(with_bias, arch, x)
        assert max(found.pop(name).abs().max() for name in missing) < 1e-10
        equal(found, readings(net, arch, x))


def test_a_bias_is_folded_into_the_running_mean() -> None:
    net, x = topology(bias=True), images()
    install(net, recalibrate(net, [ALL_CONV], [x, x.flip(0) * 0.5])[0])
    net.eval()
    graph = extract(net, ALL_CONV, x)
    assert torch.allclose(graph(x), net(x, ALL_CONV), rtol=0, atol=1e-10)
    path = "stages.1.0.node3.from2.nor_conv_3x3"
    leaf: Any = net.get_submodule(path)
    plain: Any = graph.get_submodule(path)
    assert plain.conv.bias is None
    assert torch.equal(plain.norm.running_mean, leaf.norm[0].running_mean - leaf.bias[0])
    assert bool((plain.norm.weight == 1).all()) and bool((plain.norm.bias == 0).all())


# -- Topology: the rest -------------------------------------------------------------------------------------------------


def test_owned_are_the_operations_of_all_cells() -> None:
    net = Topology(nats.Topology(4, 2))
    mine = net.owned("node2.from1", "nor_conv_3x3")
    assert [tuple(p.shape) for p in mine] == [(c, c, 3, 3) for c in (4, 4, 8, 8, 16, 16)]
    assert len(net.owned("node2.from1")) == 12
    assert net.owned("node2.from1", "none") == net.owned("node2.from1", "skip_connect") == net.owned("c1") == []
    every = [p for name in nats.NAMES for p in net.owned(name)]
    rest = {id(p) for p in net.parameters()} - {id(p) for p in every}
    assert len({id(p) for p in every}) == len(every) == 6 * 6 * 2 and len(rest) == 3 + 2 * 7 + 2 + 2


def test_cells_have_weights_of_their_own_and_one_architecture() -> None:
    net = Topology(nats.Topology(4, 3))
    assert [len(net.cells(s)) for s in range(3)] == [3, 3, 3]
    weights = [cell.operations("node1.from0")["nor_conv_1x1"].weight[0] for cell in net.cells(0)]
    assert len({weight.data_ptr() for weight in weights}) == 3 and not torch.equal(weights[0], weights[1])


def test_an_unknown_operation_is_refused() -> None:
    net, x = topology(), images()
    for setting in ("dreamt", Mixture(("none", "dreamt"), torch.ones(2))):
        with pytest.raises(ValueError, match=r"node3\.from1 = dreamt is not in this space\. Allowed: none, skip_connect"):
            net(x, {**ALL_CONV, "node3.from1": setting})


def test_mixtures_of_one_sum() -> None:
    first, second = mixtures("pair")["node1.from0"], mixtures("all")["node2.from0"]
    assert isinstance(first, Mixture) and isinstance(second, Mixture)
    both = joined([first, second])
    assert both.options == first.options + second.options and both.active == (0, 2, 5, 6, 7, 8, 9)
    assert torch.equal(both.weights, torch.cat([first.weights, second.weights])) and both.idle == "absent"
    assert joined([first]) is first
    with pytest.raises(ValueError, match="mixtures of one sum have idle = absent, ones: give all of them one kind"):
        joined([first, second._replace(idle="ones")])
    with pytest.raises(ValueError, match="has no active option"):
        joined([first, second._replace(active=())])


# -- Sizes --------------------------------------------------------------------------------------------------------------


class Small(nats.Sizes):
    """The size space with fewer and narrower options."""

    def __init__(self) -> None:
        self.cell = nats.cell_arch(self.CELL)
        SearchSpace.__init__(self, [Choice(name, (2, 3, 5)) for name in self.NAMES], {})


def test_a_network_of_five_widths_is_the_page() -> None:
    """Sections 1 and 2, layer by layer, with the slices of the supernet's weights."""
    space, x = Small(), images()
    net = Sizes(space, classes=5).double()
    net.reset(torch.Generator().manual_seed(0))
    arch = {"c1": 3, "c2": 2, "c3": 5, "c4": 3, "c5": 3}

    def conv(path: str, x: Tensor, c: int, stride: int = 1, norm: bool = True) -> Tensor:
        weight = net.get_parameter(f"{path}.weight")[:c, : x.shape[1]]
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(y, None, None, training=True) if norm else y

    def cell(path: str, x: Tensor, c: int) -> Tensor:
        one = conv(f"{path}.node1.from0", x.relu(), c)
        two = conv(f"{path}.node2.from0", x.relu(), c) + conv(f"{path}.node2.from1", one.relu(), c)
        skip = x if x.shape[1] == c else conv(f"{path}.node3.from0", x, c)
        return skip + conv(f"{path}.node3.from1", one.relu(), c) + conv(f"{path}.node3.from2", two.relu(), c)

    def reduction(path: str, x: Tensor, c: int) -> Tensor:
        y = conv(f"{path}.conv1", conv(f"{path}.conv0", x.relu(), c, 2).relu(), c)
        return y + conv(f"{path}.shortcut", F.avg_pool2d(x, 2), c, norm=False)

    y = cell("stages.0.0", conv("stem", x, 3), 3)
    y = cell("stages.1.0", reduction("reductions.0", y, 2), 5)
    y = cell("stages.2.0", reduction("reductions.1", y, 3), 3)
    y = F.batch_norm(y, None, None, training=True).relu().mean((2, 3))
    expected = F.linear(y, net.classifier.weight[:, :3], net.classifier.bias)
    assert torch.allclose(net(x, arch), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixing", ["interpolate", "sum"])
@pytest.mark.parametrize("case", ["both", "input", "output", "one of each"])
def test_a_skip_is_the_mixture_over_pairs_of_widths(mixing: str, case: str) -> None:
    """sum over (a, c) of u_a v_c: a projection where a and c differ, the first channels where they agree."""
    space = Small()
    net = Sizes(space, mixing=mixing).double()
    leaf = net.get_submodule("stages.1.0.node3.from0")
    assert isinstance(leaf, Skip) and leaf.norm is not None
    with torch.no_grad():
        for p in leaf.norm.parameters():
            p.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(p)))
    found = mixtures("pair" if case == "one of each" else "all", space)
    u, v = found["c2"], found["c3"]
    assert isinstance(u, Mixture) and isinstance(v, Mixture)
    if case == "one of each":
        u, v = u._replace(active=(1,)), v._replace(active=(1,))
    arch: dict[str, Setting] = {"c2": 3 if case == "output" else u, "c3": 3 if case == "input" else v}
    sources = {3: 1.0} if case == "output" else {int(u.options[j]): u.weights[j] for j in active(u)}
    targets = {3: 1.0} if case == "input" else {int(v.options[j]): v.weights[j] for j in active(v)}
    x = torch.randn(4, max(sources), 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    C, expected = max(targets), torch.zeros(4, max(targets), 6, 6, dtype=torch.float64)
    for a, u_a in sources.items():
        for c, v_c in targets.items():
            k = leaf.widths.index(c)
            z = F.conv2d(x, leaf.weight[:c, : x.shape[1]])
            y = x[:, :c] if a == c else F.batch_norm(z, None, None, leaf.norm.weight[k], leaf.norm.bias[k], training=True)
            expected = expected + u_a * v_c * torch.einsum("oc,bchw->bohw", averaging(c, C, mixing), y)
    out = leaf(x, arch)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    wanted = [s.weights for s in arch.values() if isinstance(s, Mixture)]
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ours = torch.autograd.grad((out * g).sum(), [*wanted, leaf.weight], allow_unused=True)
    theirs = torch.autograd.grad((expected * g).sum(), [*wanted, leaf.weight], allow_unused=True)
    for mine, other in zip(ours, theirs):
        assert (mine is None) == (other is None)
        assert mine is None or torch.allclose(mine, other, rtol=1e-9, atol=1e-10)


def test_a_skip_adds_what_idle_widths_say() -> None:
    net = Sizes(Small()).double()
    leaf, found = net.get_submodule("stages.1.0.node3.from0"), mixtures("ones", Small())
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    setting = found["c3"]
    assert isinstance(setting, Mixture) and setting.active is not None
    out = leaf(x, {"c2": 3, "c3": setting})
    assert torch.allclose(out, leaf(x, {"c2": 3, "c3": setting.options[setting.active[0]]}), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), setting.weights)
    idle = [j for j in range(3) if j not in setting.active]
    assert grad[idle].tolist() == pytest.approx([float(out.numel())] * 2)


@pytest.mark.parametrize("space", [SPACE, Small()], ids=["topology", "sizes"])
@pytest.mark.parametrize("size", [9, 10])
def test_odd_sizes_are_counted_as_they_are(space: Any, size: int) -> None:
    net = build(space, 3, 5)
    x, arch = torch.zeros(2, 3, size, size), net.space.largest()
    graph = extract(net, arch, x, inherit=False)
    assert counted(graph, x) == tuple(CostTable(net, (size, size), price).of(arch) for price in (macs, params))


def test_another_cell_is_refused() -> None:
    space = Small()
    space.cell = {**space.cell, "node3.from2": "avg_pool_3x3"}
    with pytest.raises(ValueError, match=r"avg_pool_3x3 is not in the cell of the NATS size space\. Allowed: nor_conv_1x1"):
        Sizes(space)


def test_build_tells_the_spaces_apart() -> None:
    cells, widths = build(nats.Topology(4, 2), 1, 7), build(nats.Sizes(), 1, 7)
    assert isinstance(cells, Topology) and isinstance(widths, Sizes)
    assert cells(torch.zeros(2, 1, 8, 8), cells.space.smallest()).shape == (2, 7)
    assert widths(torch.zeros(2, 1, 8, 8), widths.space.smallest()).shape == (2, 7)
    views = [len(cells.layers((8, 8), view)) for view in ("derived", "searched", "estimated")]
    assert views == [views[0]] * 3
