"""nas evaluate BUNDLE: accuracy of a plain network on a split, overall and per class."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from nas.build import data_of, device_of, rebuild
from nas.bundle import load_bundle
from nas.commands.retrain import recipe_in, same_task
from nas.data import Data
from nas.evaluate import score_plain
from nas.recipe import UsageError, parse


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="nas evaluate", exit_on_error=False, description="accuracy of a bundle")
    parser.add_class_arguments(Data, "data")
    parser.add_argument("--split", default="test", help="train, valid, select or test")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    args, parser = list(argv), _parser()
    if not args or args[0].startswith("-"):
        if any(word in args for word in ("-h", "--help")):
            parse(parser, {}, args)
        raise UsageError("which bundle? nas evaluate BUNDLE, with a folder that nas extract or nas retrain wrote.")
    bundle = load_bundle(Path(args.pop(0)), rebuild)
    config = parse(parser, {"data": recipe_in(bundle).get("data", {})}, args)
    data, device = data_of(config), device_of(config.device)
    same_task(bundle, data)
    scores = score_plain(bundle.module.to(device), data, config.split, device)
    per_class = {name: [right, n] for name, right, n in zip(data.classes, scores.right, scores.count)}
    if config.json:
        print(json.dumps({"top1": scores.top1, "loss": scores.loss, "n": scores.n, "split": data.reads(config.split),
                          "per_class": per_class}))  # fmt: skip
        return 0
    for name, (right, n) in per_class.items():
        print(f"{name:20} {right / n if n else float('nan'):7.4f}  {right} of {n}")
    print(f"top-1 {scores.top1:.4f}, cross-entropy {scores.loss:.4f} on {scores.n:,} {data.reads(config.split)} images")
    return 0
