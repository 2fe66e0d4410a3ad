"""Binary gates (ProxylessNAS) in both cell supernets against the full graph, in float64: what runs in the forward is the active
path, what the weights get is <f_j(x), dL/dout> of every option that is named, edge by edge."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from search_spaces import darts, nats
from search_spaces.space import Mixture, SearchSpace, Setting
from supernets.darts import Cells
from supernets.nats import Topology
from supernets.operations import Chained

SUMS = ("none", "max_pool_3x3", "sep_conv_3x3", "sep_conv_5x5+max_pool_3x3", "skip_connect")
NETS: dict[str, Callable[[bool], Any]] = {
    "topology": lambda entangled: Topology(nats.Topology(4, 1), classes=5, entangled=entangled),
    "darts": lambda entangled: Cells(darts.Cells(C=4, layers=3, nodes=2), classes=5, entangled=entangled),
    "sums": lambda entangled: Cells(darts.Cells(C=4, layers=3, nodes=2, ops=SUMS), classes=5, entangled=entangled),
}


def made(name: str, entangled: bool = False) -> Any:
    net = NETS[name](entangled).double()
    net.reset(torch.Generator().manual_seed(0))
    return net


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def gates(space: SearchSpace, kind: str) -> dict[str, Setting]:
    """A weight of 1 on what is active, 0 on the others. "one" of all options; "none": on the first node, which then computes
    nothing, none is active; "pair": one of two; "two": two of all; "some hard": every third edge has a value."""
    found: dict[str, Setting] = {}
    for i, choice in enumerate(space.choices):
        K, options = len(choice.options), choice.options
        at: tuple[int, ...] = ((3 * i + 1) % K,)
        if kind == "none" and ("node1." in choice.name or ".node2." in choice.name):
            at = (options.index("none"),)
        elif kind == "pair":
            options, at = (options[at[0]], options[(at[0] + 2) % K]), (i % 2,)
        elif kind == "two":
            at = tuple(sorted({i % K, (i + 2) % K}))
        w = torch.zeros(len(options), dtype=torch.float64)
        w[list(at)] = 1.0
        hard = kind == "some hard" and i % 3 == 0
        found[choice.name] = options[at[0]] if hard else Mixture(options, w.requires_grad_(), at, "gate")
    return found


def full(arch: Mapping[str, Setting]) -> dict[str, Setting]:
    """Every option computed and multiplied by its weight."""
    return {n: Mixture(s.options, s.weights) if isinstance(s, Mixture) else s for n, s in arch.items()}


def path(arch: Mapping[str, Setting]) -> dict[str, Setting]:
    """The first active option of each choice, as a value."""
    return {n: s.options[s.active[0]] if isinstance(s, Mixture) and s.active else s for n, s in arch.items()}


def readings(net: nn.Module, arch: Mapping[str, Setting]) -> dict[str, Tensor]:
    """Logits, and the gradients of every parameter and of every mixture's weights (zeros where there is none)."""
    leaves = dict(net.named_parameters()) | {n: s.weights for n, s in arch.items() if isinstance(s, Mixture)}
    for leaf in leaves.values():
        leaf.grad = None
    z = net(images(), arch)
    (z * torch.arange(1.0, z.numel() + 1).view_as(z)).sum().backward()
    return {"": z.detach()} | {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in leaves.items()}


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-9 * value.abs().max().clamp(min=1.0), name


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["one", "none", "pair", "two", "some hard"])
def test_a_gate_has_the_gradients_of_the_full_graph(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each edge by itself, though all mixtures of a node are one sum; of weights and of what the active path runs, too."""
    if kind == "none":  # a ReLU of zeros has no slope, so that nothing would depend on that node
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    net = made(name)
    arch = gates(net.space, kind)
    found = readings(net, arch)
    check_same(found, readings(net, full(arch)))
    edges = {n: found[n] for n, s in arch.items() if isinstance(s, Mixture)}
    assert sum(int(grad.count_nonzero()) for grad in edges.values()) > len(edges)  # also of options that are not active
    node = [grad for n, grad in edges.items() if "node3." in n]
    assert len(node) > 1 and not torch.equal(node[0], node[1])  # of one node, each its own
    assert kind != "none" or bool(edges[next(iter(arch))].any())
    for n, s in arch.items():
        if isinstance(s, Mixture) and "none" in s.options:
            assert found[n][s.options.index("none")] == 0.0


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("entangled", [False, True], ids=["apart", "entangled"])
def test_a_gate_runs_its_path_and_answers_for_the_rest_in_the_backward(name: str, entangled: bool) -> None:
    """Neither side where weights want no gradient: a step of the network's weights costs one path."""
    net = made(name, entangled)
    arch = gates(net.space, "one")
    with counted() as expected:
        z = net(images(), path(arch))
    with counted() as forward:
        out = net(images(), arch)
    assert torch.allclose(out, z, rtol=0, atol=1e-12) and forward == expected
    with counted() as backward:
        out.sum().backward()
    assert backward["convolution"] > 0  # what was not active
    still = {n: s._replace(weights=s.weights.detach()) if isinstance(s, Mixture) else s for n, s in arch.items()}
    graphs = [net(images(), setting).sum() for setting in (still, path(arch))]
    with counted() as mine:
        graphs[0].backward()
    with counted() as theirs:
        graphs[1].backward()
    assert mine["convolution"] == theirs["convolution"]


@pytest.mark.parametrize("name", NETS)
def test_gates_do_without_the_weights_gradients(name: str) -> None:
    """A pass for alphas alone."""
    net = made(name)
    arch = gates(net.space, "one")
    expected = readings(net, arch)
    net.requires_grad_(False)
    found = readings(net, arch)
    check_same({n: found[n] for n in ("", *arch)}, {n: expected[n] for n in ("", *arch)})
    assert not any(bool(found[n].any()) for n, _ in net.named_parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["one", "pair", "two"])
def test_gates_keep_entangled_options_apart(name: str, kind: str) -> None:
    """As if each option had its slice for itself: a gate never superposes. Slices add up their gradients where they overlap."""
    net, twin = made(name, True), made(name)
    for mine, own in pairs(net, twin):
        with torch.no_grad():
            for weight, slice_ in zip(own.chain().weights, mine.chain().weights, strict=True):
                weight.copy_(slice_)
    others = dict(net.named_parameters())
    with torch.no_grad():
        for key, p in twin.named_parameters():
            if key in others and others[key].shape == p.shape:
                p.copy_(others[key])
    arch = gates(net.space, kind)
    found, expected = readings(net, arch), readings(twin, arch)
    totals = {key: expected[key].clone() for key in found}
    for mine, own in pairs(net, twin):
        if mine.whole is not mine:
            for k, weight in enumerate(own.weight):
                total, size = totals[f"{mine.whole.name}.weight.{k}"], weight.shape[-1]
                start = (total.shape[-1] - size) // 2
                total[..., start : start + size, start : start + size] += expected[f"{own.name}.weight.{k}"]
    check_same(found, totals)


def pairs(net: nn.Module, twin: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Each operation of ``net`` and the one of ``twin`` in its place."""
    for key, leaf in net.named_modules():
        if isinstance(leaf, Chained):
            yield leaf, twin.get_submodule(key)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each operator is called."""
    with _Calls() as calls:
        yield calls.count


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("convolution", "max_pool2d_with_indices", "avg_pool2d", "native_batch_norm"):
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
