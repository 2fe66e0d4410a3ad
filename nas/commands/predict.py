"""nas predict BUNDLE IMAGE...: class names for images; the bundle knows its preprocessing."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from nas.augment import normalise
from nas.build import device_of, rebuild
from nas.bundle import load_bundle
from nas.recipe import Parser, UsageError, parse
from nas.sources import DEEP, UNREADABLE


def _parser() -> Parser:
    parser = Parser(prog="nas predict", description="class names for images")
    parser.add_argument("bundle", help="folder that nas extract or nas retrain wrote")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=1, help="how many classes to name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    config = parse(_parser(), {}, argv)
    bundle = load_bundle(Path(config.bundle), rebuild)
    if not 1 <= config.top <= len(bundle.arch.classes):
        raise UsageError(f"--top {config.top}: allowed are 1 to {len(bundle.arch.classes)}.")
    device = device_of(config.device)
    net = bundle.module.to(device)
    for name in config.images:
        x = prepare(Path(name), bundle.arch.input, bundle.arch.preprocess).to(device)
        with torch.no_grad():
            p, at = net(x).softmax(1)[0].topk(config.top)
        found = [(bundle.arch.classes[i], round(float(q), 6)) for q, i in zip(p.tolist(), at.tolist())]
        if config.json:
            print(json.dumps({"image": name, "classes": found}))
        else:
            print(f"{name}: " + ", ".join(f"{label} {q:.4f}" for label, q in found))
    return 0


def prepare(path: Path, shape: tuple[int, ...], preprocess: Mapping[str, Any]) -> Tensor:
    """One image file as the network's input (1, C, H, W): its colours, size and normalisation are the bundle's.

    Images of another size are resized: the shorter side to ``resize`` and centre-cropped where the network was trained so,
    else straight to (H, W). UsageError for a missing or unreadable file.
    """
    try:
        with Image.open(path) as opened:
            mode = opened.mode
            image = F.pil_to_tensor(opened.convert(preprocess["channels"]))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file. Give image files.") from None
    except UNREADABLE as error:
        raise UsageError(f"{path} cannot be read as an image: {error}") from None
    if mode in DEEP:
        raise UsageError(f"{path} has more than 8 bits a channel ({mode}). Save it as 8-bit.")
    height, width = shape[1:]
    if "resize" in preprocess:
        image = F.center_crop(F.resize(image, [preprocess["resize"]], antialias=True), [height, width])
    elif tuple(image.shape[1:]) != (height, width):
        image = F.resize(image, [height, width], antialias=True)
    return normalise(image[None], preprocess["mean"], preprocess["std"])
