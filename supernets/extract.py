"""Supernet + architecture -> plain torch.fx GraphModule, made of torch.nn modules alone (DESIGN.md section 5), and the form in
which networks with an auxiliary head or drop path are trained."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn

from search_spaces.space import Mixture, Value
from supernets.elastic import Leaf


class DropPath(nn.Module):
    """Each sample is kept with probability 1 - ``share`` * ``drop`` and then divided by it, in training (DARTS, released code).

    ``share``: how much of the strength a place in the network has; of cell l of L (l + 1) / L in ScheduledDropPath (NASNet).
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, y: Tensor, drop: float) -> Tensor:  # (B, ...) -> the same
        if not self.training or not drop:
            return y
        keep = 1.0 - drop * self.share
        return y * (y.new_empty(len(y), *[1] * (y.ndim - 1)).bernoulli_(keep) / keep)


@runtime_checkable
class Tapped(Protocol):
    """A supernet whose networks can be trained with drop path and an auxiliary head."""

    def tapped(self, x: Tensor, arch: Mapping[str, Any], drop: float) -> tuple[Tensor, Tensor]:
        """Logits, and the features that the head reads. ``drop`` goes to ``DropPath`` modules and nowhere else: in a trace it
        has no value."""
        ...

    def head(self, features: tuple[int, int, int]) -> nn.Module:
        """A fresh auxiliary head for features (C, H, W)."""
        ...


class TrainingForm(nn.Module):
    """``network``, the plain network, whose graph takes the strength of drop path beside x, and its auxiliary head.

    ``forward(x, drop)``: in training with a head the logits of both, (2, B, N); else those of the network, (B, N). Where the
    network answers M samples of the batch, (M B, N), the head's logits are repeated, (2, M B, N). The keys and weights of
    ``network`` are those of the plain network without either.
    """

    def __init__(self, network: fx.GraphModule, head: nn.Module | None) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Tensor, drop: float = 0.0) -> Tensor:
        logits, features = self.network(x, drop)
        if self.head is None or not self.training:
            return logits
        beside = self.head(features)
        return torch.stack([logits, beside.repeat(len(logits) // len(beside), 1)])


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Leaf, DropPath)) or super().is_leaf_module(m, module_qualified_name)


class _Plains(fx.Interpreter):
    """Runs a traced net with every leaf replaced by its plain layer, made when its inputs' widths are known.

    The widths are those of the plain network: a TAS search net keeps wider features than the network it derives.
    """

    def __init__(self, graph: fx.GraphModule, arch: Mapping[str, Value], inherit: bool) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # a refusal stays one line
        self.arch, self.inherit = arch, inherit
        self.like = next(graph.parameters())  # fresh layers take the net's dtype and device
        self.made: dict[str, nn.Module] = {}

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, Leaf):
            return super().call_module(target, args, kwargs)
        inputs = [value for value in args if isinstance(value, Tensor)]
        plain = module.plain(self.arch, *(value.shape[1] for value in inputs), inherit=self.inherit).to(self.like)
        self.made[target] = plain
        return plain.eval()(*inputs)


def bound(net: nn.Module, arch: Mapping[str, Value]) -> nn.Module:
    """``net`` (its own modules, not copies) with a forward that takes ``x`` alone."""
    original = type(net).forward
    return _with_forward(net, lambda self, x: original(self, x, dict(arch)))


def _with_forward(net: nn.Module, forward: Any) -> nn.Module:
    alone = copy.copy(net)
    alone.__class__ = type(type(net).__name__, (type(net),), {"forward": forward})
    return alone


def extract(
    net: nn.Module, arch: Mapping[str, Value], x: Tensor, inherit: bool = True, seed: int = 0
) -> fx.GraphModule:
    """The plain network of ``arch``: copies of the supernet's slices, or fresh weights drawn from ``seed``.

    ``x``: one example (B, C, H, W); it runs once, to learn input widths. ``arch`` must be hard. Module paths, and so
    state-dict keys, are the supernet's own. Raises ValueError for mixtures, where weights cannot be inherited
    (``Leaf.plain``), and, since there are no weights to inherit, for options that the root space does not have.
    """
    _check(net, arch, inherit)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _made(net, bound(net, arch), arch, x, inherit)[0]


def training_form(
    net: nn.Module, arch: Mapping[str, Value], x: Tensor, inherit: bool = False, seed: int = 0, head: bool = True,
    by_depth: bool = True,
) -> TrainingForm:
    """The network that ``extract`` makes of the same arguments, in its training form. ``head``: with an auxiliary head, whose
    weights are always fresh. ``by_depth``: whether drop path keeps the shares of its places; else all have the whole strength.
    ValueError where the networks of ``net`` have neither head nor drop path."""
    _check(net, arch, inherit)
    if not isinstance(net, Tapped):
        raise ValueError(
            f"the networks of {type(net).__module__}.{type(net).__name__} have neither an auxiliary head nor drop path: train "
            "them without (auxiliary 0, drop_path 0)."
        )
    original = type(net).tapped
    alone = _with_forward(net, lambda self, x, drop=0.0: original(self, x, dict(arch), drop))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        graph, (_, features) = _made(net, alone, arch, x, inherit)
        own = net.head(tuple(features.shape[1:])).to(features) if head else None
    for module in graph.modules():
        if isinstance(module, DropPath) and not by_depth:
            module.share = 1.0
    return TrainingForm(graph, own).train(net.training)


def _check(net: nn.Module, arch: Mapping[str, Value], inherit: bool) -> None:
    for name, setting in arch.items():
        if isinstance(setting, Mixture):
            raise ValueError(f"{name} is a mixture, and a plain network has one option of each choice: give a hard arch.")
    if inherit:
        net.space.root.check(arch)  # type: ignore[union-attr, operator]
    else:
        net.space.root.counting(arch)  # type: ignore[union-attr, operator]  # values off the lists, but complete


def _made(
    net: nn.Module, alone: nn.Module, arch: Mapping[str, Value], x: Tensor, inherit: bool
) -> tuple[fx.GraphModule, Any]:
    """The plain graph of ``alone``, and what it makes of ``x``."""
    tracer = _LeafTracer()
    traced = fx.GraphModule(alone, tracer.trace(alone))
    plains = _Plains(traced, arch, inherit)
    out = plains.run(x)
    modules: dict[str, nn.Module] = {}
    graph = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.target in plains.made:
            inputs = [made[argument] for argument in node.args if isinstance(argument, fx.Node)]
            made[node] = _inline(graph, node, plains.made[node.target], inputs, modules)
            continue
        made[node] = graph.node_copy(node, lambda n: made[n])
        if node.op == "call_module":
            modules[node.target] = copy.deepcopy(traced.get_submodule(node.target))
    return fx.GraphModule(modules, graph, class_name=type(net).__name__).train(net.training), out


def _inline(graph: fx.Graph, leaf: fx.Node, plain: nn.Module, inputs: list[Any], modules: dict[str, nn.Module]) -> Any:
    """Puts the nodes of ``plain`` where ``leaf`` was called; its modules live under the leaf's path."""
    if type(plain).__module__.startswith("torch.nn.") and not isinstance(plain, nn.Sequential):
        modules[leaf.target] = plain  # type: ignore[index]
        node = graph.call_module(leaf.target, tuple(inputs))  # type: ignore[arg-type]
        node.meta = dict(leaf.meta)
        return node
    inner, made, given = fx.Tracer().trace(plain), {}, iter(inputs)
    for node in inner.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "output":
            return made[node.args[0]]  # type: ignore[index]
        else:
            copied = graph.node_copy(node, lambda n: made[n])
            copied.meta = dict(leaf.meta)
            if node.op == "get_attr":  # a parameter of its own
                copied.target = f"{leaf.target}.{node.target}"
                modules[copied.target] = plain.get_parameter(node.target)  # type: ignore[arg-type, assignment]
            if node.op == "call_module":
                copied.target = f"{leaf.target}.{node.target}"
                modules[copied.target] = plain.get_submodule(node.target)  # type: ignore[arg-type]
            made[node] = copied
    raise AssertionError("a traced graph ends in an output")
