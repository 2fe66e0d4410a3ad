"""Every shipped recipe parses, its space, supernet and strategy can be built, and its budgets can be met."""
from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from cli import SEARCH, ok
from jsonargparse import Namespace

from nas.budget import budget
from nas.commands.retrain import base_of
from nas.cost import CostTable
from nas.recipe import SHIPPED, build, find, option, parse, plain_config, read, retrain_parser, search_parser
from nas.strategies.fairnas import FairNAS, options
from nas.strategies.ofa import OFA, PHASES, opened
from nas.strategies.plain import Plain
from nas.strategies.tas import TAS
from search_spaces.patterns import restricted, tied

RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
IMAGES = {"digits": ((1, 8, 8), 10), "cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100),
          "folder": ((3, 224, 224), 1000)}  # fmt: skip


@functools.cache
def parsed(name: str) -> Namespace:
    return parse(search_parser(), read(find(name)), [])


def test_all_recipes_are_found() -> None:
    assert {"tas-digits", "tas-resnet20-cifar10"} <= set(RECIPES)


MOSTLY_SLOW = [name if name.endswith("-digits") else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_a_shipped_recipe_can_be_built_and_its_budget_met(name: str) -> None:
    recipe, config = read(find(name)), parsed(name)
    shape, classes = IMAGES[config.data.name]
    space = tied(restricted(build(config.space), config.restrict), config.tie)
    with torch.device("meta"):  # no memory and no numbers: only costs are read
        net = build(config.supernet, space=space, channels=shape[0], classes=classes)
    strategy = build(config.strategy)
    side = (config.data.size, config.data.size) if config.data.size else shape[1:]
    costs, own = CostTable(net, side), getattr(strategy, "budget", None)
    target = strategy.target if isinstance(strategy, TAS) else own.target if own else None
    passes = options(space) if isinstance(strategy, FairNAS) else strategy.passes()  # as the space says
    if isinstance(strategy, OFA):  # refuses phases that leave a choice shut
        assert opened(space, strategy.phases or PHASES)[-1].size == space.size
    assert (isinstance(strategy, TAS) or not name.startswith("tas-")) and passes >= 1
    if target is not None:
        assert costs.of(space.smallest()) < budget(target, costs, space) < costs.of(space.largest())
    retraining = parse(retrain_parser(), base_of(recipe), [])
    assert 0 <= retraining.plain.warmup_epochs < retraining.epochs
    assert isinstance(Plain(**retraining.plain.as_dict()), Plain)


@pytest.mark.parametrize("name", RECIPES)
def test_images_that_train_weights_do_not_judge_them(name: str) -> None:
    """RARTS trains a copy of the weights on the validation images, so its picks read others. Retraining takes them all."""
    recipe, config = read(find(name)), parsed(name)
    held = config.data.select_fraction
    assert config.data.valid_fraction > 0 and (held >= 0.1 if name.startswith("rarts-") else held >= 0.0)
    retraining = parse(retrain_parser(), base_of(recipe), []).data
    assert (retraining.valid_fraction, retraining.select_fraction) == (0.0, 0.0)


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_a_runs_config_reads_back_as_itself(name: str) -> None:
    parser = search_parser()
    inner = "" if name.startswith("tas-") else "weights."  # of TAS, flat
    unclipped = [f"--strategy.{inner}clip", "null"]
    once = plain_config(parser, parse(parser, read(find(name)), ["--data.limit", "500", *unclipped]))
    text = yaml.safe_dump(once, sort_keys=False)
    assert plain_config(parser, parse(parser, yaml.safe_load(text), [])) == once
    assert once["data"]["limit"] == 500 and (
        (once["strategy"]["init_args"].get("weights") or once["strategy"]["init_args"])["clip"] is None
    )  # null is said, not left out
    assert not {"out", "resume", "device", "dry_run", "max_time", "json"} & set(once)


@pytest.mark.slow
def test_a_strategy_whose_passes_follow_from_the_space_can_be_searched(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ok("search", "fairnas-nb201-cifar10", "--data.name", "digits", "--data.batch_size", "256", "--space.C", "4",
       "--space.N", "1", "--epochs", "1", "--select.evaluations", "3", "--select.bn_images", "256", "--threads", "1",
       "--out", str(out))  # fmt: skip
    said = json.loads((out / "arch.json").read_text())
    assert said["provenance"]["strategy"] == "fairnas" and said["provenance"]["scored"] == 3


def test_overrides_win_whatever_their_spelling() -> None:
    for words in (["--log-every", "3"], ["--log_every=3"], ["--log_every", "3"]):
        assert parse(search_parser(), {"log_every": 7}, words).log_every == 3
    args = ["--a", "1", "--recipe=x", "--b"]
    assert option(args, "--recipe") == "x" and args == ["--a", "1", "--b"]
    assert option(args, "--a") == "1" and args == ["--b"] and option(args, "--c") is None


def test_a_recipe_may_be_named_by_config_too(tmp_path: Path) -> None:
    for words in (["--config", "tas-digits"], ["--config=tas-digits"]):
        assert ok("search", *words, *SEARCH[2:], "--print_config").out == ok(*SEARCH, "--print_config").out


def test_help_names_the_options() -> None:
    for verb in ("spaces", "search", "extract", "retrain", "evaluate", "predict", "monitor"):
        assert f"nas {verb}" in ok(verb, "--help").out
