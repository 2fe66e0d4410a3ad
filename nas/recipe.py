"""Recipes: typed YAML by jsonargparse, dotted overrides, and one clear line for what is wrong.

A recipe is data that names classes by import path; nothing else in the project names them together. Recipes are code and
trusted like code. A name without a path is a shipped one (nas/recipes/NAME.yaml).
"""
from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace
from torch import nn

from nas.bilevel import Weights
from nas.data import Data
from nas.explain import explain, keys_of, section_of
from nas.heads import Head
from nas.limits import Select
from nas.losses import CrossEntropy
from nas.protocols import Searcher, Strategy
from nas.ranking.section import Rank
from nas.splits.split import Split
from nas.strategies.plain import Plain
from search_spaces.space import SearchSpace

SHIPPED = Path(__file__).parent / "recipes"
RUN_KEYS = ("out", "resume", "dry_run", "max_time", "init", "json", "debug", "device", "teacher", "config")
"""How a run is executed, not what it computes: left out of what a resumed run must share with the run it continues."""
COUNTS = ("epochs", "evaluate.every", "evaluate.images", "evaluate.bn_images", "evaluate_every", "log_every", "threads",
          "bn_images", "select.evaluations", "select.images", "select.bn_images", "rank.every", "rank.images",
          "rank.bn_images")  # fmt: skip


class UsageError(ValueError):
    """Bad usage or bad input: one line for the user, exit code 2."""


class Parser(ArgumentParser):
    """Options by their whole names, within classes too (jsonargparse makes their parsers of this class). Part of a name is
    none: what it stood for would change with the next option."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **{"allow_abbrev": False, "exit_on_error": False, **named})


def add_run_options(parser: ArgumentParser, resume: bool = True) -> None:
    """The options that every verb which trains understands."""
    parser.add_argument("--seed", type=int, default=1, help="everything random follows from it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch")
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16 (autocast)")
    parser.add_argument("--channels_last", "--channels-last", type=bool, default=False, help="memory layout")
    parser.add_argument("--out", type=str | None, default=None, help="run folder; default runs/<recipe>, then -2, -3")
    if resume:
        parser.add_argument("--resume", default="never", help="auto: continue the newest run of this name; never")
        parser.add_argument("--max_time", "--max-time", type=float | None, default=None, help="seconds; saves and stops there")
        parser.add_argument("--dry_run", "--dry-run", action="store_true", help="time and memory of three steps, no run")
        parser.add_argument("--log_every", "--log-every", type=int, default=10, help="steps a line of metrics.jsonl averages")
    parser.add_argument("--json", action="store_true", help="the result as JSON on the last line of stdout")
    parser.add_argument("--debug", action="store_true", help="tracebacks")


def search_parser() -> ArgumentParser:
    """What a search recipe may say."""
    parser = Parser(prog="nas search", description="train a supernet, pick an architecture")
    parser.add_subclass_arguments(SearchSpace, "space", required=False)
    parser.add_subclass_arguments(nn.Module, "supernet", required=False, skip={"space", "channels", "classes"})
    parser.add_argument("--strategy", type=Strategy | None, default=None)
    parser.add_argument("--searcher", type=Searcher | None, default=None,
                        help="picks an architecture when the supernet is trained; default: what the strategy derives")
    parser.add_class_arguments(Select, "select")
    parser.add_class_arguments(Split, "split")
    parser.add_argument("--restrict", type=dict[str, Any], default={},
                        help="pattern -> options, largest, smallest, or how many of the largest")
    parser.add_argument("--part", type=dict[str, Any], default={},
                        help="as restrict: the part that is searched, by the supernet of the whole space (what a split leaves)")
    parser.add_argument("--tie", type=dict[str, Any], default={}, help="pattern -> {leader: NAME, values: {its option: own}}")
    parser.add_class_arguments(Data, "data")
    parser.add_class_arguments(CrossEntropy, "loss")
    parser.add_class_arguments(Head, "head")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--evaluate.every", type=int, default=1, help="epochs between readings of the derived architecture")
    parser.add_argument("--evaluate.images", type=int | None, default=None, help="images of the select split; default all")
    parser.add_argument("--evaluate.bn_images", type=int, default=2000, help="training images that recalibrate batch norms")
    parser.add_argument("--evaluate.gap", type=bool, default=True, help="read the accuracy of the mixture as well")
    parser.add_argument("--beside.random", type=int, default=0,
                        help="random networks, trained alone at equal cost and compared with the found one; 0: none")
    parser.add_argument("--beside.weights", type=Weights | None, default=None,
                        help="how each of them is trained; default: as the strategy trains its own weights")
    parser.add_class_arguments(Rank, "rank")
    parser.add_argument("--retrain", type=dict[str, Any], default={}, help="what nas retrain does with the result")
    parser.add_argument("--init", type=str | None, default=None, help="weights.safetensors into the largest network")
    add_run_options(parser)
    return parser


def retrain_parser() -> ArgumentParser:
    """What retraining may say; ``nas retrain`` fills it from the bundle's own recipe first."""
    parser = Parser(prog="nas retrain", description="train a bundle's plain network")
    parser.add_argument("--from", dest="weights", default="scratch", help="scratch or inherited")
    parser.add_argument("--teacher", type=str | None, default=None, help="bundle of the teacher (knowledge distillation)")
    parser.add_class_arguments(Plain, "plain")
    parser.add_class_arguments(Data, "data")
    parser.add_class_arguments(CrossEntropy, "loss")
    parser.add_class_arguments(Head, "head")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--evaluate_every", "--evaluate-every", type=int, default=1, help="epochs between readings")
    add_run_options(parser)
    return parser


def data_parser(prog: str) -> ArgumentParser:
    """The data options alone, for verbs that only read."""
    parser = Parser(prog=prog)
    parser.add_class_arguments(Data, "data")
    return parser


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one. UsageError names the nearest."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"recipe {name}: there is no such file. Give a .yaml file, or the name of a shipped recipe.")
        return path
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.0)
        raise UsageError(f"recipe {name!r} is not known. Nearest: {near[0]}. Allowed: {', '.join(shipped)}, or a .yaml file.")
    return shipped[name]


def read(path: Path) -> dict[str, Any]:
    """A YAML file as a dict."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no recipe: its top level must be keys and values.")
    return content


def parse(parser: ArgumentParser, base: Mapping[str, Any], overrides: Sequence[str]) -> Namespace:
    """``base`` (a recipe's content), then dotted ``overrides`` of the command line. UsageError in one line.

    ``--print_config`` among them prints the whole recipe and leaves.
    """
    words = [word for word in overrides if word != "--print_config"]
    _check_form(parser, base)
    base, words = _nulls(base, words)
    with _one_line(parser):
        # The base goes in as an argument: of an optional dataclass (a budget) in a namespace, jsonargparse does not know
        # the type any more, and could not override its keys.
        if base and "base" not in keys_of(parser):
            parser.add_argument("--base", action="config", help=SUPPRESS)
        parsed = parser.parse_args([*(["--base", json.dumps(base)] if base else []), *words])
    parsed.pop("base", None)
    _check_values(parser, parsed)
    if "--print_config" in overrides:
        print(yaml.safe_dump(plain_config(parser, parsed), sort_keys=False), end="")
        sys.exit(0)
    return parsed


def option(args: list[str], name: str) -> str | None:
    """Takes ``--name VALUE`` or ``--name=VALUE`` out of ``args``; None where it is not there."""
    for i, word in enumerate(args):
        if word.startswith(f"{name}="):
            return args.pop(i).partition("=")[2]
        if word == name:
            if i + 1 == len(args):
                raise UsageError(f"{name} needs a value.")
            value = args[i + 1]
            del args[i : i + 2]
            return value
    return None


def plain_config(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """What a run computes, as plain data: everything but ``RUN_KEYS``."""
    content = yaml.safe_load(parser.dump(config, skip_validation=True, skip_unset=False))
    return {key: value for key, value in content.items() if key not in RUN_KEYS}


def _check_form(parser: ArgumentParser, base: Mapping[str, Any]) -> None:
    """UsageError where a recipe's section is no section: jsonargparse would take a number for it."""
    sections: dict[str, list[str]] = {}
    for key in keys_of(parser):
        top, dot, rest = key.partition(".")
        if dot and rest != "help":
            sections.setdefault(top, []).append(rest)
    for key, value in base.items():
        if key in sections and not isinstance(value, Mapping):
            raise UsageError(f"{key} = {value} is not a section. Give keys and values: {', '.join(sections[key])}.")
        if isinstance(value, Mapping) and not isinstance(value.get("init_args", {}), Mapping):
            raise UsageError(f"{key}.init_args = {value['init_args']} is not a section. Give keys and values, or delete it.")


def _check_values(parser: ArgumentParser, config: Namespace) -> None:
    """UsageError for null where a value is needed, and for counts and times that are not positive."""
    for action in parser._actions:
        if action.default not in (None, SUPPRESS) and config.get(action.dest) is None and action.dest in config:
            raise UsageError(f"{action.dest} is empty. Give a value, or leave it out: {action.default} is the default.")
    for key in COUNTS:
        value = config.get(key)
        if value is not None and value < 1:
            raise UsageError(f"{key} = {value} is too few. Allowed: 1 or more.")
    if config.get("max_time") is not None and not config.max_time > 0:
        raise UsageError(f"max_time = {config.max_time} seconds. Allowed: above 0, or none.")


def _nulls(base: Mapping[str, Any], words: Sequence[str]) -> tuple[Mapping[str, Any], list[str]]:
    """``null`` for a key of a section of the strategy (--strategy.weights.clip null) said in the recipe itself: as an
    argument, jsonargparse 4.53 refuses it."""
    kept: list[str] = []
    given = list(words)
    while given:
        word = given.pop(0)
        key, equals, value = word.partition("=")
        path = [part for part in key.removeprefix("--").split(".") if part != "init_args"]
        value = value if equals else given[0] if given else ""
        if len(path) != 3 or path[0] != "strategy" or value != "null" or not isinstance(base.get("strategy"), Mapping):
            kept.append(word)
            continue
        if not equals:
            given.pop(0)
        strategy = copy.deepcopy(dict(base["strategy"]))
        section = (strategy.setdefault("init_args", None) or {}).setdefault(path[1], None) or {}
        strategy["init_args"] = {**(strategy["init_args"] or {}), path[1]: {**section, path[2]: None}}
        base = {**base, "strategy": strategy}
    return base, kept


def build(spec: Namespace, **more: Any) -> Any:
    """The object of a ``class_path`` / ``init_args`` pair. Classes outside this project are imported, as a recipe may name
    them. ValueError of the class itself passes through; a missing argument is a UsageError."""
    module, _, name = spec.class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    given = spec.init_args.as_dict() if spec.get("init_args") else {}
    hints = get_type_hints(kind.__init__)
    given = {key: _section(hints.get(key), value) for key, value in given.items()}
    try:
        return kind(**given, **more)
    except TypeError as error:
        raise UsageError(f"{spec.class_path}: {error}. Check init_args in the recipe.") from None


def _section(hint: Any, value: Any) -> Any:
    """Keys and values as the dataclass that an argument is declared to be (alone, or one or None); anything else as it is."""
    kind = section_of(hint)
    return kind(**value) if kind and isinstance(value, dict) else value


@contextlib.contextmanager
def _one_line(parser: ArgumentParser) -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser)) from None
    except SystemExit as stop:  # --help prints and leaves with 0, SIGTERM with 143
        if stop.code == 2:
            raise UsageError(f"{parser.prog}: bad usage; see {parser.prog} --help") from None
        raise
