"""Prices and cost tables: exact, vectorised and expected costs, all read from the one list of layers of a supernet.
(What a search may cost: nas/budget.py.)

MACs are multiply-adds of convolutions and linear layers; bias, norm and pooling cost 0. They are Python ints.
"""
from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search_spaces.space import Choice, Mixture, SearchSpace, Setting, Value
from supernets.layers import Layer, Shape

Price = Callable[[str, Shape], "int | float"]
Terms = dict[tuple[str, ...], np.ndarray]


def macs(op: str, s: Shape) -> int:
    """Multiply-adds of one layer for one image."""
    if op in ("norm", "table"):
        return 0
    return s.c_in // s.groups * s.c_out * s.kernel[0] * s.kernel[1] * s.hw[0] * s.hw[1]


def params(op: str, s: Shape) -> int:
    """Trainable numbers of one layer; a norm has a scale and a shift for each channel, a table c_in rows of c_out numbers."""
    if op == "norm":
        return 2 * s.c_out
    return s.c_in // s.groups * s.c_out * s.kernel[0] * s.kernel[1] + (s.c_out if s.bias else 0)


def activations(op: str, s: Shape) -> int:
    """Output numbers of convolutions and linear layers for one image: a sum over the network, not the peak."""
    return 0 if op in ("norm", "more", "table") else s.c_out * s.hw[0] * s.hw[1]


PRICES: dict[str, Price] = {"macs": macs, "params": params, "activations": activations}


class CostTable:
    """The cost of every architecture of a supernet at one price.

    ``net.layers(input_size, view)`` is read once; every term becomes a table over the root space's options, so one table
    serves all restricted spaces. Letters: ``N`` architectures, ``M`` choices, ``K`` options.
    """

    def __init__(self, net: Any, input_size: tuple[int, int], price: Price = macs, view: str = "derived") -> None:
        self._net, self._input_size, self._price = net, input_size, price
        self.root: SearchSpace = net.space.root
        self._layers: list[Layer] = net.layers(input_size, view)
        self._choices: dict[str, Choice] = {choice.name: choice for choice in self.root.choices}
        self._position = {name: i for i, name in enumerate(self._choices)}
        self.terms: Terms = self._tabulate()
        self._joint = self._merge(4096)
        self._whole = all(np.issubdtype(table.dtype, np.integer) for _, _, table in self._joint)
        self._views: dict[str, CostTable] = {view: self}
        self._prepared: dict[tuple, list[tuple[Tensor, list[list[str]]]]] = {}

    def seen(self, view: str) -> CostTable:
        """The same supernet, input and price in another view (``Supernet.layers``), built once."""
        if view not in self._views:
            self._views[view] = CostTable(self._net, self._input_size, self._price, view)
        return self._views[view]

    def priced(self, price: Price) -> CostTable:
        """The same supernet and input at another price (the derived view)."""
        return self.seen("derived") if price is self._price else CostTable(self._net, self._input_size, price)

    def of(self, arch: Mapping[str, Value]) -> int | float:
        """The exact cost of one hard architecture; values off the lists are allowed."""
        shapes = ((layer.op, layer.shape(*(arch[name] for name in layer.on))) for layer in self._layers)
        return sum(self._price(op, shape) for op, shape in shapes if shape is not None)

    def batch(self, codes: np.ndarray) -> np.ndarray:
        """(N, M) positions in the root space's options -> (N,) costs."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != len(self._choices):
            raise ValueError(f"codes have shape {codes.shape}; this space needs (N, {len(self._choices)})")
        total = np.zeros(len(codes), dtype=np.int64 if self._whole else np.float64)
        for start in range(0, len(codes), 32768):  # a chunk's columns stay in the cache
            columns = np.ascontiguousarray(codes[start : start + 32768].T, dtype=np.intp)
            part = total[start : start + 32768]
            for at, strides, table in self._joint:
                index = np.zeros(columns.shape[1], dtype=np.intp)
                for column, stride in zip(at, strides):
                    index += columns[column] * stride
                part += table.take(index)
        return total

    def expected(self, soft: Mapping[str, Setting], space: SearchSpace | None = None) -> Tensor:
        """The expectation of this view's ``of`` when every mixture of ``soft`` is drawn independently; float64 scalar.

        Exact and differentiable in the mixtures' weights. ``space``: its tied followers are drawn with their leaders.
        """
        ties = space.ties if space is not None else {}
        mixtures = (setting for setting in soft.values() if isinstance(setting, Mixture))
        device = next((mixture.weights.device for mixture in mixtures), torch.device("cpu"))
        key = (device, *((name, tie.leader, tuple(tie.values.items())) for name, tie in ties.items()))
        if key not in self._prepared:  # copied to a GPU once, not at every step
            self._prepared[key] = [(tables.to(device), axes) for tables, axes in self._stack(self._tied(ties))]
        weights = {name: self._weights(name, soft[name]).to(device) for name in self._choices if name not in ties}
        total = torch.zeros((), dtype=torch.float64, device=device)
        for tables, axes in self._prepared[key]:
            letters = "abcdefgh"[: len(axes)]
            equation = "n" + letters + "".join(f",n{letter}" for letter in letters) + "->"
            rows = [torch.stack([weights[name] for name in axis]) for axis in axes]
            total = total + torch.einsum(equation, tables, *rows)
        return total

    # -- building ---------------------------------------------------------------------------------------------------

    def _tabulate(self) -> Terms:
        """Layers -> tables over their choices' options; terms with equal ``on`` are one table."""
        terms: Terms = {}
        price = lru_cache(maxsize=None)(self._price)
        for layer in self._layers:
            on = tuple(sorted(layer.on, key=self._position.__getitem__))
            order = [on.index(name) for name in layer.on]
            options = [self._choices[name].options for name in on]
            costs = []
            for values in itertools.product(*options):
                shape = layer.shape(*(values[i] for i in order))
                costs.append(0 if shape is None else price(layer.op, shape))
            if not any(costs):  # a norm's products, a depth off the list
                continue
            table = np.array(costs).reshape([len(values) for values in options])
            terms[on] = terms[on] + table if on in terms else table
        return terms

    def _merge(self, limit: int) -> list[tuple[list[int], list[int], np.ndarray]]:
        """Joint tables of at most ``limit`` entries: (columns of the codes, their strides, flat table)."""
        groups: list[tuple[list[str], np.ndarray]] = []
        for on, table in sorted(self.terms.items(), key=lambda item: [self._position[name] for name in item[0]]):
            best = None
            for g, (names, _) in enumerate(groups):
                union = sorted({*names, *on}, key=self._position.__getitem__)
                entries = int(np.prod([len(self._choices[name].options) for name in union], dtype=np.int64))
                if entries <= max(limit, table.size) and (best is None or len(union) < len(best[1])):
                    best = (g, union)
            if best is None:
                groups.append((list(on), table))
                continue
            g, union = best
            groups[g] = (union, self._spread(*groups[g], union) + self._spread(list(on), table, union))
        joint = []
        for names, table in groups:
            strides = [int(np.prod(table.shape[i + 1 :], dtype=np.int64)) for i in range(table.ndim)]
            joint.append(([self._position[name] for name in names], strides, np.ascontiguousarray(table).ravel()))
        return joint

    def _spread(self, names: list[str], table: np.ndarray, union: list[str]) -> np.ndarray:
        """``table`` over ``names`` with axes of length 1 for the rest of ``union``."""
        return table.reshape([len(self._choices[name].options) if name in names else 1 for name in union])

    def _tied(self, ties: Mapping[str, Any]) -> Terms:
        """The terms with every follower's axis replaced by its leader's."""
        out: Terms = {}
        for on, table in self.terms.items():
            names = list(on)
            for follower in [name for name in on if name in ties]:
                axis, tie = names.index(follower), ties[follower]
                options = self._choices[follower].options
                at = [options.index(tie.values[v]) if v in tie.values else 0 for v in self._choices[tie.leader].options]
                table = table.take(at, axis=axis)
                if tie.leader in names:
                    other = names.index(tie.leader)
                    table = np.diagonal(table, axis1=axis, axis2=other)  # the joint axis comes last
                    names = [name for name in names if name not in (follower, tie.leader)] + [tie.leader]
                else:
                    names[axis] = tie.leader
            key = tuple(names)
            out[key] = out[key] + table if key in out else table
        return out

    def _stack(self, terms: Terms) -> list[tuple[Tensor, list[list[str]]]]:
        """Tables of one shape in one tensor (n, K, ...), with the names along each axis: one contraction each."""
        by_shape: dict[tuple[int, ...], list[tuple[str, ...]]] = defaultdict(list)
        for on, table in terms.items():
            by_shape[table.shape].append(on)
        return [
            (
                torch.from_numpy(np.stack([terms[on] for on in names]).astype(np.float64)),
                [[on[axis] for on in names] for axis in range(len(shape))],
            )
            for shape, names in by_shape.items()
        ]

    def _weights(self, name: str, setting: Setting) -> Tensor:
        """A setting as weights over the root's options (K,), float64."""
        options = self._choices[name].options
        if not isinstance(setting, Mixture):
            if setting not in options:
                raise ValueError(f"{name} = {setting} is not an option, so no expectation knows it. Allowed: {options}.")
            out = torch.zeros(len(options), dtype=torch.float64)
            out[options.index(setting)] = 1.0
            return out
        w = setting.weights.to(torch.float64)
        if setting.options == options:
            return w
        at = torch.tensor([options.index(value) for value in setting.options], device=w.device)
        return torch.zeros(len(options), dtype=torch.float64, device=w.device).index_add(0, at, w)
