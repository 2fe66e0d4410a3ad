"""Supernet + architecture -> plain torch.fx GraphModule, made of torch.nn modules alone (DESIGN.md section 5)."""
from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from search_spaces.space import Mixture, Value
from supernets.elastic import Leaf


class _LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Leaf) or super().is_leaf_module(m, module_qualified_name)


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
    kind = type(type(net).__name__, (type(net),), {"forward": lambda self, x: original(self, x, dict(arch))})
    alone = copy.copy(net)
    alone.__class__ = kind
    return alone


def extract(
    net: nn.Module, arch: Mapping[str, Value], x: Tensor, inherit: bool = True, seed: int = 0
) -> fx.GraphModule:
    """The plain network of ``arch``: copies of the supernet's slices, or fresh weights drawn from ``seed``.

    ``x``: one example (B, C, H, W); it runs once, to learn input widths. ``arch`` must be hard. Module paths, and so
    state-dict keys, are the supernet's own. Raises ValueError for mixtures, where weights cannot be inherited
    (``Leaf.plain``), and, since there are no weights to inherit, for options that the root space does not have.
    """
    for name, setting in arch.items():
        if isinstance(setting, Mixture):
            raise ValueError(f"{name} is a mixture, and a plain network has one option of each choice: give a hard arch.")
    if inherit:
        net.space.root.check(arch)  # type: ignore[union-attr, operator]
    else:
        net.space.root.counting(arch)  # type: ignore[union-attr, operator]  # values off the lists, but complete
    alone = bound(net, arch)
    tracer = _LeafTracer()
    traced = fx.GraphModule(alone, tracer.trace(alone))
    plains = _Plains(traced, arch, inherit)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plains.run(x)
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
    return fx.GraphModule(modules, graph, class_name=type(net).__name__).train(net.training)


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
            if node.op == "call_module":
                copied.target = f"{leaf.target}.{node.target}"
                modules[copied.target] = plain.get_submodule(node.target)  # type: ignore[arg-type]
            made[node] = copied
    raise AssertionError("a traced graph ends in an output")
