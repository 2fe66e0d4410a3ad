"""nas spaces [NAME]: what can be searched: choices, size, smallest and largest cost; is a budget reachable?"""
from __future__ import annotations

import difflib
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import Namespace

import search_spaces
from nas.budget import budget
from nas.cost import PRICES, CostTable
from nas.recipe import Parser, UsageError, parse
from search_spaces.patterns import restricted, tied
from search_spaces.space import SearchSpace


def _parser() -> Parser:
    parser = Parser(prog="nas spaces", description="what can be searched")
    parser.add_argument("name", nargs="?", default=None, help="for instance resnet.CifarResNet; none: the list")
    parser.add_argument("--args", type=dict[str, Any], default={}, help="its arguments: {depth: 56, kind: tas}")
    parser.add_argument("--restrict", type=dict[str, Any], default={},
                        help="pattern -> options, largest, smallest, or how many of the largest")
    parser.add_argument("--tie", type=dict[str, Any], default={}, help="pattern -> {leader: NAME, values: {its option: own}}")
    parser.add_argument("--input", type=list[int], default=None,
                        help="channels, height, width of an image; else the size that the space is for, or [3,32,32]")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--macs", type=str | None, default=None, help="is this budget reachable? 55% or a number")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    config = parse(_parser(), {}, argv)
    known = dict(classes())
    if config.name is None:
        if config.json:
            print(json.dumps(sorted(known)))
            return 0
        for name, kind in known.items():
            print(f"{name:28} {inspect.signature(kind)}".replace("'", ""))
        print("nas spaces NAME --args '{depth: 20}' says more.")
        return 0
    if config.name not in known:
        near = difflib.get_close_matches(config.name, known, n=1, cutoff=0.0)[0]
        raise UsageError(f"space {config.name!r} is not known. Allowed: {', '.join(known)}. Nearest: {near}.")
    space = make(known[config.name], config.args)
    if config.input is None:
        side = getattr(space, "image", 32)
        config.input = [3, side, side]
    if len(config.input) != 3 or min(config.input) < 1:
        raise UsageError(f"--input {config.input} is no image. Allowed: [channels, height, width], for instance [3,32,32].")
    figures = describe(space, config)
    if config.json:
        print(json.dumps(figures))
    else:
        show(figures)
    return 0


def classes() -> Iterator[tuple[str, type[SearchSpace]]]:
    """Every space of the package, by the name that arch.json uses; not the ``abstract`` classes that several share."""
    for module in pkgutil.iter_modules(search_spaces.__path__):
        found = importlib.import_module(f"search_spaces.{module.name}")
        for name, kind in vars(found).items():
            own = inspect.isclass(kind) and kind.__module__ == found.__name__
            if own and issubclass(kind, SearchSpace) and kind is not SearchSpace and "abstract" not in vars(kind):
                yield f"{module.name}.{name}", kind


def make(kind: type[SearchSpace], args: dict[str, Any]) -> SearchSpace:
    """The space; UsageError names unknown and missing arguments."""
    known = list(inspect.signature(kind).parameters)
    for name in args:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UsageError(f"--args: {name} is no argument of {kind.__name__}. Allowed: {', '.join(known)}. Nearest: {near}.")
    missing = [n for n, p in inspect.signature(kind).parameters.items() if p.default is p.empty and n not in args]
    if missing:
        raise UsageError(f"{kind.__name__} needs {', '.join(missing)}: for instance --args '{{{missing[0]}: ...}}'.")
    return kind(**args)


def describe(whole: SearchSpace, config: Namespace) -> dict[str, Any]:
    """Choices, size and the costs of the smallest and largest architecture; the budget in MACs, if one is asked."""
    space = tied(restricted(whole, config.restrict), config.tie)
    supernets = importlib.import_module("supernets." + space.name.partition(".")[0])
    costs = CostTable(supernets.build(space, config.input[0], config.classes), tuple(config.input[1:]))
    ends = {"smallest": space.smallest(), "largest": space.largest()}
    figures: dict[str, Any] = {
        "space": {"name": space.name, "args": space.args},
        "choices": {choice.name: list(choice.options) for choice in space.choices},
        "size": space.size,
        "input": list(config.input),
        "costs": {e: {n: costs.priced(p).of(arch) for n, p in PRICES.items()} for e, arch in ends.items()},
    }
    if config.macs is not None:
        figures["budget_macs"] = round(budget(config.macs, costs, space, "--macs"))
    return figures


def show(figures: dict[str, Any]) -> None:
    for name, options in figures["choices"].items():
        print(f"{name:32} {' '.join(map(str, options))}")
    print(f"{figures['size']:,} architectures")
    full = figures["costs"]["largest"]
    for end, costs in figures["costs"].items():
        print(f"{end:9}" + "".join(f"  {n} {cost:,} ({cost / full[n]:.1%})" for n, cost in costs.items()))
    if "budget_macs" in figures:
        print(f"reachable: {figures['budget_macs']:,} MACs")
