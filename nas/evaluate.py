"""Accuracy of networks: overall and per class, and of many subnets of one supernet with recalibrated batch norms."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.augment import permutation
from nas.bilevel import undropped
from nas.data import Data, Split
from nas.protocols import Batch
from nas.recalibrate import Statistics, install, recalibrate
from search_spaces.space import Setting

BN_MODES = ("recalibrated", "batch")


class Scores(NamedTuple):
    """``top1`` and mean cross-entropy ``loss`` over ``n`` images; of each class, how many are right and how many there are."""

    top1: float
    loss: float
    n: int
    right: tuple[int, ...]
    count: tuple[int, ...]  # type: ignore[assignment]  # hides tuple.count


def score(forward: Callable[[Tensor], Tensor], batches: Iterable[Batch], classes: int) -> Scores:
    """Reads every batch once. Sums are kept in float64, so the result depends on no batch size. ValueError without images.

    Soft labels cost their own cross-entropy and count as their most probable class.
    """
    right = torch.zeros(classes, dtype=torch.int64)
    count = torch.zeros(classes, dtype=torch.int64)
    loss = 0.0
    with torch.no_grad():
        for x, y, _ in batches:
            z = forward(x)
            loss += float(F.cross_entropy(z.double(), y.double() if y.ndim == 2 else y, reduction="sum"))
            y = y.argmax(1) if y.ndim == 2 else y
            hit = z.argmax(1) == y
            right += torch.bincount(y[hit], minlength=classes).cpu()
            count += torch.bincount(y, minlength=classes).cpu()
    n = int(count.sum())
    if n == 0:
        raise ValueError("there are no images to evaluate: name a split that holds some.")
    return Scores(float(right.sum()) / n, loss / n, n, tuple(right.tolist()), tuple(count.tolist()))


def score_plain(net: nn.Module, data: Data, split: str, device: torch.device, limit: int | None = None) -> Scores:
    """Scores of a plain network in eval mode; its mode is left as it was."""
    was = net.training
    net.eval()
    try:
        return score(net, data.batches(split, device, limit=limit), len(data.classes))
    finally:
        net.train(was)


def recalibrating(data: Data, images: int) -> int:
    """How many training images recalibrate where ``images`` are asked: whole batches, at least one, of what there is."""
    return min(max(1, images // data.batch_size) * data.batch_size, data.count("train"))


def statistics_of(
    net: nn.Module, archs: Sequence[Mapping[str, Setting]], data: Data, device: torch.device, images: int
) -> list[Statistics]:
    """Recalibration of many architectures on the same ``images`` training images, in the training view, read once."""
    batches = max(1, images // data.batch_size)
    return recalibrate(net, archs, (b.x for b in islice(data.batches("train", device, augmented=True), batches)))


def score_archs(
    net: Any, archs: Sequence[Mapping[str, Setting]], data: Data, split: str, device: torch.device,
    bn_images: int = 2000, limit: int | None = None, bn: str = "recalibrated",
) -> list[Scores]:  # fmt: skip
    """Scores of subnets. ``bn``: "recalibrated", each with its own statistics of ``bn_images`` training images (the last
    one's are left in the net's buffers); or "batch", the statistics of each batch of ``split`` (``mixed_batches``).

    ValueError for another ``bn``, and where ``split`` holds no image.
    """
    if bn not in BN_MODES:
        raise ValueError(f"bn = {bn!r} is not known. Allowed: {', '.join(BN_MODES)}.")
    if bn == "batch":
        return _score_by_batch(net, archs, data, split, device, limit)
    found = []
    was = net.training
    for arch, statistics in zip(archs, statistics_of(net, archs, data, device, bn_images)):
        install(net, statistics)
        net.eval()
        try:
            found.append(score(partial(net, arch=arch), data.batches(split, device, limit=limit), len(data.classes)))
        finally:
            net.train(was)
    return found


def score_served(
    network: Callable[[Any], Any], archs: Sequence[Mapping[str, Setting]], *given: Any, **named: Any
) -> list[Scores]:
    """``score_archs`` of ``archs``, each in the weights that serve it (``nas.protocols.Served.network``): of those that one net
    serves, all at once."""
    nets = [network(arch) for arch in archs]
    found: dict[int, Scores] = {}
    for net in {id(net): net for net in nets}.values():
        mine = [i for i, other in enumerate(nets) if other is net]
        found.update(zip(mine, score_archs(net, [archs[i] for i in mine], *given, **named)))
    return [found[i] for i in range(len(archs))]


def _score_by_batch(
    net: Any, archs: Sequence[Mapping[str, Setting]], data: Data, split: str, device: torch.device, limit: int | None
) -> list[Scores]:
    """Scores of subnets in training mode, without gradient and without dropout. No buffer is written (law 7)."""
    was = net.training
    net.train()
    try:
        with undropped(net):
            return [score(partial(net, arch=arch), mixed_batches(data, split, device, limit), len(data.classes))
                    for arch in archs]  # fmt: skip
    finally:
        net.train(was)


def mixed_batches(data: Data, split: str, device: torch.device, limit: int | None = None) -> Iterator[Batch]:
    """Batches whose own statistics may normalise them: equally large, each a mixture of the classes, in the evaluation view.

    The images of ``split`` come in a fixed random order, for a folder lists them class by class. What is left over and fills
    no batch of ``data.batch_size`` is left out; fewer images than one batch are one. Loaders keep their own order.
    """
    if isinstance(data, Data):
        name = data.reads(split)
        images, rows, labels = data.splits[name]
        order = permutation(0, 0, len(rows))
        data = copy.copy(data)
        data.splits = {**data.splits, name: Split(images, rows[order], labels[order])}
    size = None
    for batch in data.batches(split, device, limit=limit):
        size = size or len(batch.x)
        if len(batch.x) == size:
            yield batch
