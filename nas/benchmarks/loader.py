"""Images a second of the batched feed against per-image PIL: ``python -m nas.benchmarks.loader --root PATH``.

Both sides read the same training images with crop, flip and normalisation on the CPU, ``processes`` loader processes on
the PIL side (JPEG bytes in memory, torchvision transforms v2), as many torch threads on ours. Rounds alternate; an
epoch is warmed up first, so that neither start-up nor the one decoding of our cache is counted. Wall-clock time. The PIL
side begins each of its rounds with full queues (to its favour); ours begins when its workers are idle.
"""
from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import bootstrap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from nas.data import Data
from nas.sources import Entry, list_folder, list_tar, read_bytes


class Encoded(Dataset):
    """JPEG bytes in memory: ``[i]`` -> (normalised image (C, H, W) float32, label)."""

    def __init__(self, images: list[bytes], labels: list[int], transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(io.BytesIO(self.images[i])) as image:
            return self.transform(image.convert("RGB")), self.labels[i]


def _encoded(root: Path, data: Data) -> Encoded:
    size, pad = data.shape[1:], data.augment.pad
    transform = v2.Compose([
        v2.RandomCrop(list(size), padding=pad), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.preprocess["mean"], data.preprocess["std"]),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as staging:
        listing = list_folder(root) if root.is_dir() else list_tar(root, Path(staging))
        entries: list[Entry] = listing.train
        return Encoded([read_bytes(e) for e in entries], [e.label for e in entries], transform)


def _forever(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def _rate(step: Callable[[], Any], steps: int, batch_size: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * batch_size / (time.perf_counter() - start)


def measure(root: str, processes: int = 1, batch_size: int = 128, rounds: int = 15, steps: int = 40,
            limit: int | None = None) -> dict[str, Any]:  # fmt: skip
    """Median images/s of both sides over ``rounds`` of ``steps`` batches, and the median ratio (batched over PIL) with
    its bootstrap 90% interval. ``limit``: training images to use. Raises ValueError, like ``Data``."""
    if processes < 1 or rounds < 2 or steps < 1:
        raise ValueError(f"processes = {processes}, rounds = {rounds}, steps = {steps}. Allowed: from 1, 2 and 1.")
    data = Data("folder", root, batch_size, ["crop", "flip"], limit=limit)
    if data.on_the_fly or data.shape[0] != 3:
        raise ValueError(f"{root}: this benchmark is for colour images of one size that fit an array.")
    encoded = _encoded(Path(root), data)
    if limit is not None:  # the very images that the feed reads
        rows = data.splits["train"].rows.tolist()
        encoded.images, encoded.labels = [encoded.images[r] for r in rows], [encoded.labels[r] for r in rows]
    before = torch.get_num_threads()
    torch.set_num_threads(processes)
    try:
        loader = _forever(DataLoader(encoded, batch_size, shuffle=True, drop_last=True, num_workers=processes,
                                     persistent_workers=True))  # fmt: skip
        draw = data.feed(0, "cpu")
        sides: dict[str, Callable[[], Any]] = {"batched": lambda: draw("train"), "pil": lambda: next(loader)}
        rates: dict[str, list[float]] = {name: [] for name in sides}
        warm = {name: _rate(step, min(steps, data.count("train") // batch_size), batch_size) for name, step in sides.items()}
        # The workers read two batches each ahead: let them finish, or they would compete with our side's round.
        ahead = 2.0 * (2 * processes * batch_size) / warm["pil"]
        for turn in range(rounds):
            for name in sorted(sides, reverse=bool(turn % 2)):
                if name == "batched":
                    time.sleep(ahead)
                rates[name].append(_rate(sides[name], steps, batch_size))
    finally:
        torch.set_num_threads(before)
    ratios = np.array(rates["batched"]) / np.array(rates["pil"])
    interval = bootstrap((ratios,), np.median, confidence_level=0.9, method="percentile", random_state=0)
    return {
        "batched_images_per_s": float(np.median(rates["batched"])), "pil_images_per_s": float(np.median(rates["pil"])),
        "ratio": float(np.median(ratios)),
        "interval90": [float(interval.confidence_interval.low), float(interval.confidence_interval.high)],
        "processes": processes, "batch_size": batch_size, "rounds": rounds, "steps": steps,
        "images": data.count("train"), "shape": list(data.shape), "pad": data.augment.pad, "torch": torch.__version__,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m nas.benchmarks.loader", description=__doc__)
    parser.add_argument("--root", required=True, help="folder or .tar[.gz] with train/<class>/ of equally large images")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="batches a round")
    parser.add_argument("--limit", type=int, help="use that many training images")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args(argv)
    figures = measure(args.root, args.processes, args.batch_size, args.rounds, args.steps, args.limit)
    low, high = figures["interval90"]
    print(f"batched {figures['batched_images_per_s']:,.0f} images/s, per-image PIL {figures['pil_images_per_s']:,.0f}, "
          f"ratio {figures['ratio']:.2f} (90%: {low:.2f} to {high:.2f})")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    main()
