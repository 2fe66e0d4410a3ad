"""nas evaluate BUNDLE: accuracy of a plain network on a split, overall and per class.

nas evaluate RUN --arch largest --arch random:1 ...: of subnets in a run's weights, each with recalibrated batch norms.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from nas.build import data_of, device_of, rebuild
from nas.bundle import load_bundle
from nas.commands.extract import arch_of, divided, load_source, served_by
from nas.commands.retrain import recipe_in, same_task
from nas.data import Data
from nas.evaluate import score_plain, score_served
from nas.recipe import Parser, UsageError, option, parse, read


def _parser() -> Parser:
    parser = Parser(prog="nas evaluate",
                            description="accuracy of a bundle; of subnets of a run: see nas evaluate RUN --help")  # fmt: skip
    parser.add_class_arguments(Data, "data")
    parser.add_argument("--split", default="test", help="train, valid, select or test")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def _run_parser() -> Parser:
    parser = Parser(prog="nas evaluate RUN", description="accuracy of subnets of a run")
    parser.add_argument("--arch", default="derived",
                        help="arch.json file, derived, largest, smallest, random:SEED, random:SEED@55%, or an arch as text; "
                             "several may follow")  # fmt: skip
    parser.add_argument("--split", default="test", help="train, valid, select or test")
    parser.add_argument("--images", type=int | None, default=None, help="of the split; default all")
    parser.add_argument("--bn_images", "--bn-images", type=int | None, default=None,
                        help="training images that recalibrate batch norms; default: as the run's picks were read")  # fmt: skip
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch; default: the recipe's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    args, parser = list(argv), _parser()
    if not args or args[0].startswith("-"):
        if any(word in args for word in ("-h", "--help")):
            parse(parser, {}, args)
        raise UsageError("which bundle? nas evaluate BUNDLE, with a folder that nas extract or nas retrain wrote.")
    place = Path(args.pop(0))
    if _searched(place):
        return subnets(place, args)
    if any(word.partition("=")[0] == "--arch" for word in args):
        raise UsageError(f"--arch is for run folders of nas search, and {place} is none. A bundle is one network: no --arch.")
    bundle = load_bundle(place, rebuild)
    config = parse(parser, {"data": recipe_in(bundle).get("data", {})}, args)
    if config.threads:
        torch.set_num_threads(config.threads)
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


def subnets(folder: Path, args: Sequence[str]) -> int:
    """Scores of the architectures that the words name, in the weights of the run that serve them."""
    own, overrides = divided(args)
    names: list[str] = []
    while (name := option(own, "--arch")) is not None:
        names.append(name)
    while names and own and not own[0].startswith("-"):
        names.append(own.pop(0))
    config = parse(_run_parser(), {}, own)
    for key in ("images", "bn_images"):
        if config[key] is not None and config[key] < 1:
            raise UsageError(f"--{key.replace('_', '-')} {config[key]} is too few. Allowed: 1 or more.")
    source, built, _ = load_source(str(folder), [*overrides, f"--device={config.device}"])
    if config.threads:
        torch.set_num_threads(config.threads)
    split = built.data.reads(config.split)
    names = names or [config.arch]
    archs = [arch_of(name, source, built, "evaluate", overrides)[0] for name in names]
    bn_images = config.bn_images or built.select.bn_images
    scores = score_served(built.trained.network, archs, built.data, config.split, built.device, bn_images, config.images)
    rows = [{"arch": name, "top1": score.top1, "loss": score.loss, **built.prices(arch), **served_by(built, arch)}
            for name, arch, score in zip(names, archs, scores)]  # fmt: skip
    if config.json:
        print(json.dumps({"split": split, "n": scores[0].n, "subnets": rows}))
        return 0
    for row in rows:
        print(f"{row['arch']:24} top-1 {row['top1']:.4f}  {row['macs']:>15,} MACs  {row['params']:>12,} parameters"
              + (f"  {row['supernet']}" if "supernet" in row else ""))  # fmt: skip
    print(f"{len(rows)} subnet{'s' if len(rows) > 1 else ''} on {scores[0].n:,} {split} images, batch norm recalibrated on "
          f"{bn_images:,}")  # fmt: skip
    return 0


def _searched(place: Path) -> bool:
    """Whether ``place`` is a run folder of nas search."""
    path = place / "config.yaml"
    return path.is_file() and not (place / "model.safetensors").exists() and bool({"space", "python"} & read(path).keys())
