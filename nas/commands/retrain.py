"""nas retrain BUNDLE [--from scratch|inherited] [--teacher BUNDLE]: train a plain network by the strategy ``plain``."""
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from nas import ranks
from nas.alone import base_of, network_for, prepared
from nas.build import data_of, device_of, rebuild, versions
from nas.bundle import Bundle, load_bundle, prove, write_bundle
from nas.data import Data
from nas.engine import Outcome
from nas.evaluate import score_plain
from nas.log import RunLogs
from nas.precision import in_precision
from nas.protocols import Moment, Strategy
from nas.recipe import UsageError, find, option, parse, plain_config, read, retrain_parser
from nas.run import Run, explicit
from nas.search import stopped
from supernets.extract import TrainingForm

_log = logging.getLogger("nas")


def run(argv: Sequence[str]) -> int:
    args, parser = list(argv), retrain_parser()
    if not args or args[0].startswith("-"):
        if any(word in args for word in ("-h", "--help", "--print_config")):
            parse(parser, {}, args)
        raise UsageError("which bundle? nas retrain BUNDLE, with a folder that nas extract wrote.")
    bundle = load_bundle(Path(args.pop(0)), rebuild)
    named = option(args, "--recipe")
    own = recipe_in(bundle)
    base = base_of(own if named is None else read(find(named)))
    size = (own.get("data") or {}).get("size")
    if size is not None and base["data"].get("size") is None:  # another recipe does not know the size of the search
        base["data"]["size"] = size
    config = parse(parser, base, args)
    if config.weights not in ("scratch", "inherited"):
        raise UsageError(f"--from {config.weights} is not known. Allowed: scratch, inherited.")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    group = ranks.start(device)
    data = data_of(config, group)
    same_task(bundle, data)
    if group.main:
        _log.info("%s", data.describe())
    net = network_of(bundle, config)
    if group.main and config.teacher is None:
        _log.info("no --teacher: the network learns from the labels alone (plain.lam and plain.T are not used)")
    teacher = teacher_of(config.teacher, device, config, data)
    strategy, setup, feed = prepared(net, config, data, device, group, teacher)
    plain = {**plain_config(parser, config), "bundle": str(bundle.path), "teacher": config.teacher}
    default = Path("runs") / f"retrain-{bundle.path.resolve().name}"
    out = explicit(config.out, config.resume, group) if config.out else default
    run = Run(out, plain, device=device, ranks=group, resume=config.resume, period=config.log_every)
    if group.main:
        _log.info("%s in %s", f"resuming at step {run.start}" if run.start else "starting", run.folder)
    try:
        every = [(config.evaluate_every * setup.epoch_steps, Reading(data, device, run.log))] if group.main else []
        outcome = run.fit(strategy, setup, feed, seed=config.seed, every=every, max_time=config.max_time)
        return conclude(bundle, strategy, data, device, config, run, outcome) if group.main else outcome.exit
    finally:
        run.close()


def network_of(bundle: Bundle, config: Namespace) -> nn.Module:
    """What is trained: the bundle's own network, or a fresh one; with drop path and a head where ``plain`` wants them."""
    if config.weights == "scratch":
        return network_for(bundle.arch, config)
    if not config.plain.auxiliary and not config.plain.drop_path:
        return bundle.module
    net = network_for(bundle.arch, config, bundle.form)
    assert isinstance(net, TrainingForm)
    net.network.load_state_dict(bundle.module.state_dict())
    return net


def recipe_in(bundle: Bundle) -> dict[str, Any]:
    """What report.json says of the recipe; UsageError where it is no recipe."""
    recipe = bundle.report.get("recipe", {})
    if not isinstance(recipe, dict) or not isinstance(recipe.get("data", {}), dict):
        raise UsageError(f"{bundle.path / 'report.json'}: recipe holds no keys and values. Extract the bundle again.")
    return recipe


def same_task(bundle: Bundle, data: Data) -> None:
    """ValueError where the data are not what the network was made for."""
    wants, classes = tuple(bundle.arch.input), list(bundle.arch.classes)
    hint = "Name its own data with --data.name and --data.root."
    only_size = wants[0] == data.shape[0] and len(classes) == len(data.classes) and wants != tuple(data.shape)
    if only_size and wants[1] == wants[2]:
        hint = f"Give --data.size {wants[1]}, or name its own data with --data.name and --data.root."
    if wants != tuple(data.shape) or len(classes) != len(data.classes):
        raise ValueError(f"{bundle.path} expects images {wants} of {len(classes)} classes; the data have {tuple(data.shape)} "
                         f"and {len(data.classes)}. {hint}")  # fmt: skip
    if classes != list(data.classes):
        mine, theirs = next(pair for pair in zip(classes, data.classes) if pair[0] != pair[1])
        raise ValueError(f"{bundle.path} has the class {mine!r} where the data have {theirs!r}. {hint}")


def teacher_of(path: str | None, device: torch.device, config: Namespace, data: Data) -> Any:
    """The teacher's network in eval mode without gradients, in the run's precision; None where none is named."""
    if path is None:
        return None
    bundle = load_bundle(Path(path), rebuild)
    same_task(bundle, data)
    net = bundle.module.to(device).requires_grad_(False)
    return in_precision(net, config.precision, config.channels_last).eval()


class Reading:
    """An act of the engine: accuracy on the select split (where there is one) as the training goes on."""

    def __init__(self, data: Data, device: torch.device, log: RunLogs) -> None:
        self.data, self.device, self.log = data, device, log

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        if self.data.holds("select"):
            scores = score_plain(strategy.network({}), self.data, "select", self.device)
            self.log.now(now.step, {"valid/top1": scores.top1, "valid/loss": scores.loss})


def conclude(
    bundle: Bundle, strategy: Strategy, data: Data, device: torch.device, config: Namespace, run: Run, outcome: Outcome
) -> int:  # fmt: skip
    """Reads the test split once, writes the trained bundle and prints where it is."""
    if outcome.reason != "done":
        _log.info("stopped (%s) after step %d; continue with --resume auto --out %s", outcome.reason, outcome.step, run.folder)
        print(json.dumps(stopped(run, outcome)) if config.json else run.folder)
        return outcome.exit
    net = strategy.network({})
    split = "test" if data.holds("test") else "select" if data.holds("select") else None
    metrics, weights = {}, "fine-tuned" if config.weights == "inherited" else "scratch"
    if split:
        scores = score_plain(net, data, split, device)
        metrics = {"top1": {"value": scores.top1, "split": split, "n": scores.n, "weights": weights, "bn": "running"}}
        _log.info("top-1 %.4f on %d %s images", scores.top1, scores.n, split)
    example = next(iter(data.batches("train", device, batch_size=8))).x.cpu()
    form = bundle.form if config.weights == "inherited" else "fresh"
    graph = rebuild(bundle.arch, form)
    plain = net.network if isinstance(net, TrainingForm) else net  # its head and drop path served the training alone
    graph.load_state_dict({key: value.cpu() for key, value in plain.state_dict().items()})
    graph.eval()
    predicted = {name: int(cost) for name, cost in bundle.arch.costs.items() if name in ("macs", "params")}
    with torch.no_grad():  # the network that was trained and read, in float32, against the one that is written
        reference = type(net).forward(net.eval().cpu().to(memory_format=torch.contiguous_format), example)
    report = {**prove(graph, example, predicted, reference), "weights": weights, "form": form}
    report["recipe"] = bundle.report.get("recipe", {})
    used = {name: config.plain[name] for name in ("auxiliary", "drop_path") if config.plain[name]}
    if config.plain.drop_path:  # a strength says nothing without its schedule
        used |= {name: config.plain[name] for name in ("drop_path_steps", "drop_path_version")}
    if config.head.dropout:
        used["head"] = config.head.as_dict()
    report["retrain"] = {
        "teacher": config.teacher, "epochs": config.epochs, "seed": config.seed, "steps": outcome.step, **used,
    }  # fmt: skip
    file = replace(bundle.arch, metrics=metrics, provenance={
        **bundle.arch.provenance, "retrained": "plain", "retrain_seed": config.seed, "versions": versions()})  # fmt: skip
    path = run.folder / "bundle"
    if not path.exists():
        write_bundle(path, graph, file, report, example)
    print(json.dumps({"bundle": str(path), "metrics": metrics}) if config.json else path)
    return outcome.exit
