"""What a strategy draws its batches from: the order of every epoch, the share of every rank, exact resume.

The order of a split is a pure function of (seed, split, step), see nas/order.py, so the state of a feed is one counter a split.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from nas.augment import SPLIT, VIEW, fold, noise, resize, seeded
from nas.order import Odds, Order
from nas.protocols import Batch
from nas.sources import GREY

if TYPE_CHECKING:
    from nas.data import Data

SPLITS = ("train", "valid", "select", "test")
DRAWN = SPLITS[:3]
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}


def view_transform(size: int | None, augment: tuple[str, ...], training: bool) -> v2.Transform:
    """What a worker does to one image. Evaluation: the shorter side to size * 256 / 224, then the centre."""
    assert size is not None
    plain = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    steps = [v2.RandomResizedCrop(size, antialias=True)] if training and "crop" in augment else plain
    if training and "flip" in augment:
        steps.append(v2.RandomHorizontalFlip())
    if training and "colour" in augment:
        steps.append(v2.ColorJitter(**JITTER))
    return v2.Compose(steps)


class View(Dataset):
    """``[row, seed]`` -> one image (C, H, W), uint8 or float32, whose randomness is that seed's.

    Raises ValueError for what is neither a PIL image nor a (C, H, W) tensor, or has not the ``shape`` of the others.
    """

    def __init__(self, dataset: Any, transform: v2.Transform | None, shape: tuple[int, int, int] | None) -> None:
        self.dataset, self.transform, self.shape = dataset, transform, shape

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        row, seed = key
        with seeded(seed):
            image = self.dataset[row][0]
            if isinstance(image, Image.Image):
                image = image.convert("L" if image.mode in GREY else "RGB")
            elif not (isinstance(image, Tensor) and image.ndim == 3):
                raise ValueError(f"Image {row} is a {type(image).__name__}. Allowed: PIL images, tensors (C, H, W).")
            if self.transform is not None:
                image = self.transform(image)
        x = vision.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        x = x if x.dtype == torch.uint8 else x.to(torch.float32)
        if self.shape is not None and tuple(x.shape) != self.shape:
            raise ValueError(f"Image {row} is {tuple(x.shape)}, others {self.shape}. Give --data.size, or one mode.")
        return x


def pick_rows(pixels: Tensor, rows: Tensor) -> Tensor:
    """(N, C, H, W), (B,) -> (B, C, H, W) where the pixels are."""
    return pixels.index_select(0, rows.to(pixels.device))


class Keys:
    """The batch sampler of images decoded on the fly: (row, seed) pairs from step ``start`` on, this rank's share."""

    def __init__(self, order: Order, rows: Tensor, share: slice) -> None:
        self.order, self.rows, self.share = order, rows, share
        self.start = 0
        self.odds: Odds = None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, odds = self.start, self.odds
        while True:
            index, epoch = self.order(step, odds)
            index, epoch = index[self.share], epoch[self.share] if isinstance(epoch, Tensor) else epoch
            yield list(zip(self.rows[index].tolist(), noise(self.order.seed, epoch, index, VIEW).tolist()))
            step += 1


class Track:
    """One split of a feed: its order, rows and labels, and for images decoded on the fly the loader that runs ahead.

    Of ``select`` (no training view, and no statistics that would want whole batches) fewer images than a batch will do.
    """

    def __init__(self, data: Data, split: str, seed: int, device: torch.device | str, rank: int, world: int) -> None:
        self.part = data.splits[data.reads(split)]
        n = len(self.part.rows)
        size = min(data.batch_size, n // world * world) if split == "select" else data.batch_size
        if not 0 < size <= n:
            raise ValueError(f"batch_size = {data.batch_size} is above the {n} images of {split}. Give {n} or less.")
        self.seed = fold(seed, SPLIT, DRAWN.index(split))
        self.augmented = split != "select"
        drawn = (data.subset, data.subset_replacement) if split == "train" else (None, False)
        self.order = Order(n, size, self.seed, device, *drawn)
        if not self.order.epoch_steps:
            raise ValueError(f"data.subset = {data.subset} of the {n} images of {split} fills no batch of {size}. Give "
                             f"{math.ceil(1000 * size / n) / 1000:g} or more, or a smaller batch_size.")  # fmt: skip
        self.labels, self.rows = self.part.labels.to(device), self.part.rows.to(device)
        self.share = slice(rank * size // world, (rank + 1) * size // world)
        self._data, self._next = data, -1
        self._ahead: Iterator[Tensor] | None = None
        self._odds: Odds = None
        self._version = 0
        if data.on_the_fly:
            self._keys = Keys(Order(n, size, self.seed, "cpu", *drawn), self.part.rows, self.share)
            self._loader = data.loader(self.part.images, self._keys, self.augmented)

    def pixels(self, step: int, odds: Odds, index: Tensor) -> Tensor:
        """(B, C, H, W) of ``index``, the share of ``step``."""
        if not self._data.on_the_fly:
            return pick_rows(self._data.pixels(self.part.images, self.rows.device), self.rows[index])
        version = odds._version if isinstance(odds, Tensor) else 0
        known = odds is self._odds and version == self._version  # an epoch's odds are compared once
        if self._ahead is None or step != self._next or not (known or _same(odds, self._keys.odds)):
            # A jump or new odds: what was decoded ahead is dropped, the workers stay.
            self._keys.start, self._keys.odds = step, odds.detach().cpu().clone() if isinstance(odds, Tensor) else odds
            self._ahead = iter(self._loader)
        self._next, self._odds, self._version = step + 1, odds, version
        return next(self._ahead)


def _same(a: Odds, b: Odds) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a.detach().cpu(), b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and (a is None) == (b is None)


def counts(state: Mapping[str, int]) -> dict[str, int]:
    """A copy of a feed's state; ValueError for what is not one."""
    for name, steps in state.items():
        if name not in DRAWN or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"The feed's state has {name!r}: {steps!r}. Allowed: batches drawn of {', '.join(DRAWN)}.")
    return dict(state)


class Feed:
    """``nas.protocols.Draw`` over ``Data``: rank r gets the r-th contiguous share of every batch.

    An epoch has floor(n / batch_size) steps, of train with ``data.subset`` r floor(r n / batch_size) (nas/order.py). Draws with
    odds count as steps too; a repeated image is augmented anew.
    The test split is for reports: read it by ``Data.batches``.
    """

    def __init__(self, data: Data, seed: int, device: torch.device | str, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank = {rank} of world = {world}. Allowed: 0 to {world - 1}.")
        if data.batch_size % world:
            raise ValueError(f"batch_size = {data.batch_size} does not divide by {world} ranks. Give a multiple.")
        self._data, self._seed, self._device = data, seed, torch.device(device)
        self._rank, self._world = rank, world
        self._tracks: dict[str, Track] = {}
        self._steps: dict[str, int] = {}
        self._track("train")

    def _track(self, split: str) -> Track:
        if split not in DRAWN:
            raise ValueError(f"No draws from {split!r}. Allowed: {', '.join(DRAWN)}; test is read by reports.")
        if split not in self._tracks:
            self._tracks[split] = Track(self._data, split, self._seed, self._device, self._rank, self._world)
        return self._tracks[split]

    def __call__(self, split: str, size: int | None = None, odds: Odds = None) -> Batch:
        """The next batch of ``split``; see ``nas.protocols.Draw``. Raises ValueError where it cannot be."""
        track, step = self._track(split), self._steps.get(split, 0)
        index, epoch = track.order(step, odds)
        index, epoch = index[track.share], epoch[track.share] if isinstance(epoch, Tensor) else epoch
        x = track.pixels(step, odds, index).to(self._device, non_blocking=True)
        view = self._data.augment if track.augmented else None
        self._steps[split] = step + 1
        return Batch(self._data.finish(x, view, track.seed, epoch, index, size), track.labels[index], index)

    def epoch_steps(self, split: str = "train") -> int:
        """Steps of one epoch of ``split``: whole batches only."""
        return self._track(split).order.epoch_steps

    def state_dict(self) -> dict[str, int]:
        """Batches drawn so far, by split."""
        return dict(self._steps)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken; ValueError for what is not one."""
        self._steps = counts(state)


# -- your own loaders ---------------------------------------------------------------------------------------------

Pairs = Iterator[tuple[Tensor, Tensor]]


def from_loaders(
    train: DataLoader,
    valid: DataLoader | None = None,
    select: DataLoader | None = None,
    test: DataLoader | None = None,
    classes: Sequence[str] | None = None,
    preprocess: dict[str, Any] | None = None,
    **unknown: Any,
) -> Loaders:
    """A run's data from loaders of (x (B, C, H, W) float as the network wants it, y (B,) int64 or (B, N) float).

    ``classes``: their names; without, the train loader is read once and they are "0", "1", ... ``preprocess``: mean,
    std, channels and size that a bundle should note, by default what leaves x as it is. Raises ValueError.

        images, labels = torch.rand(100, 3, 8, 8), torch.arange(100) % 4
        half = torch.utils.data.TensorDataset(images[:50], labels[:50])
        rest = torch.utils.data.TensorDataset(images[50:], labels[50:])
        data = from_loaders(
            train=torch.utils.data.DataLoader(half, batch_size=10, shuffle=True, drop_last=True),
            valid=torch.utils.data.DataLoader(rest, batch_size=10, shuffle=True, drop_last=True),
            classes=["a", "b", "c", "d"],
        )
        x, y, index = data.feed(seed=1, device="cpu")("valid")      # (10, 3, 8, 8), (10,), 0 .. 9
    """
    for name in unknown:
        own = " Your loaders draw what they will: give train a sampler that draws fewer." if name.startswith("subset") else ""
        raise ValueError(f"from_loaders: {name!r} is unknown. Allowed: train, valid, select, test, classes, preprocess.{own}")
    given = {"train": train, "valid": valid, "select": select, "test": test}
    return Loaders({name: loader for name, loader in given.items() if loader is not None}, classes, preprocess)


class Loaders:
    """What ``from_loaders`` returns; see ``Data`` for the methods.

    Order and augmentation are the loaders': they are seeded (torch, NumPy, Python, ``loader.generator``) per epoch and
    batch, so that a run repeats. A resumed epoch is read again from its start and what was used is skipped. With
    ``persistent_workers`` the order repeats, but not the workers' random transforms: torch seeds those only once.
    """

    def __init__(self, loaders: dict[str, DataLoader], classes: Sequence[str] | None,
                 preprocess: dict[str, Any] | None) -> None:  # fmt: skip
        for name, loader in loaders.items():
            if not isinstance(loader, DataLoader) or not _steps(loader):
                raise ValueError(f"from_loaders: {name} must be a DataLoader with a length above 0.")
        self.loaders = loaders
        self.opened: dict[int, int] = {}
        x, y = next(self.walk("train", 0, 0))
        if not (isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() and isinstance(y, Tensor)):
            raise ValueError("from_loaders: a batch must be x (B, C, H, W) float, y (B,) int64 or (B, N) float.")
        self.batch_size = len(x)
        self.shape: tuple[int, int, int] = (x.shape[1], x.shape[2], x.shape[3])
        if classes is None:
            top = y.shape[1] if y.ndim == 2 else 1 + max(int(y.max()) for _, y in self.walk("train", 0, 0))
            classes = [str(c) for c in range(top)]
        self.classes = list(classes)
        plain = {"mean": [0.0] * x.shape[1], "std": [1.0] * x.shape[1], "channels": "L" if x.shape[1] == 1 else "RGB",
                 "size": list(x.shape[2:])}  # fmt: skip
        self.preprocess = plain if preprocess is None else dict(preprocess)

    def reads(self, split: str) -> str:
        """The loader that ``split`` stands for; ValueError where there is none."""
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r}. Allowed: {', '.join(SPLITS)}.")
        name = "valid" if split == "select" and "select" not in self.loaders else split
        if name not in self.loaders:
            raise ValueError(f"The split {split!r} has no loader. Give one: from_loaders(..., {name}=DataLoader(...)).")
        return name

    def holds(self, split: str) -> bool:
        """Whether ``split`` (or the one it stands for) has a loader."""
        return split in self.loaders or (split == "select" and "valid" in self.loaders)

    def count(self, split: str) -> int:
        """The number of images of ``split``."""
        return len(self.loaders[self.reads(split)].dataset)  # type: ignore[arg-type]

    def describe(self) -> str:
        """The splits in one line."""
        return ", ".join(f"{name} {self.count(name):,}" for name in self.loaders) + " (your own loaders)"

    def feed(self, seed: int, device: torch.device | str, rank: int = 0, world: int = 1) -> LoaderFeed:
        """What a strategy draws from; with ranks, each draws from its own loaders, which need a DistributedSampler."""
        return LoaderFeed(self, seed, device, rank, world)

    def walk(self, split: str, seed: int, epoch: int) -> Pairs:
        """The batches of one epoch."""
        loader = self.loaders[self.reads(split)]
        key = fold(seed, SPLIT, SPLITS.index(split), epoch)
        self.opened[id(loader)] = self.opened.get(id(loader), 0) + 1
        if loader.generator is not None:
            loader.generator.manual_seed(key)
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        with seeded(key):
            iterator = iter(loader)
        for position in range(_steps(loader)):
            with seeded(fold(key, position)):
                x, y = next(iterator)
            yield x, y

    def batches(
        self,
        split: str,
        device: torch.device | str,
        batch_size: int | None = None,
        limit: int | None = None,
        augmented: bool = False,
        seed: int = 0,
        size: int | None = None,
    ) -> Iterator[Batch]:
        """Epoch 0 of ``split`` for ``seed``, at most ``limit`` images; view, order and batch size are the loader's."""
        start = 0
        for x, y in self.walk(split, seed, 0):
            end = start + len(x) if limit is None else min(limit, start + len(x))
            yield _batch(x[: end - start], y[: end - start], start, device, size)
            start = end
            if start == limit:
                return


class LoaderFeed:
    """``nas.protocols.Draw`` over ``Loaders``; ``index`` counts up through each epoch."""

    def __init__(self, data: Loaders, seed: int, device: torch.device | str, rank: int = 0, world: int = 1) -> None:
        loader = data.loaders["train"]
        if not 0 <= rank < world:
            raise ValueError(f"rank = {rank} of world = {world}. Allowed: 0 to {world - 1}.")
        if world > 1 and not isinstance(loader.sampler, DistributedSampler):
            raise ValueError(f"{world} ranks would read the same images: give your loaders a DistributedSampler.")
        self._data, self._seed, self._device = data, seed, device
        self._steps: dict[str, int] = {}
        self._open: dict[str, tuple[Pairs, int, int]] = {}  # batches, next step, times the loader was opened

    def __call__(self, split: str, size: int | None = None, odds: Tensor | float | None = None) -> Batch:
        """The next batch of ``split``; see ``nas.protocols.Draw``. Uniform odds (a number) are the loader's own order.

        Raises ValueError for other odds and missing loaders.
        """
        if isinstance(odds, Tensor):
            raise ValueError("odds do not apply to your own loaders. Use from_dataset, or a WeightedRandomSampler.")
        if split not in DRAWN:
            raise ValueError(f"No draws from {split!r}. Allowed: {', '.join(DRAWN)}; test is read by reports.")
        loader, step = self._data.loaders[self._data.reads(split)], self._steps.get(split, 0)
        epoch, position = divmod(step, _steps(loader))
        pairs, expected, opened = self._open.get(split, (iter(()), -1, 0))
        # Persistent workers serve one iterator: who opened the loader in between took them.
        taken = loader.persistent_workers and opened != self._data.opened.get(id(loader))
        if expected != step or position == 0 or taken:
            pairs = self._data.walk(split, self._seed, epoch)
            for _ in range(position):
                next(pairs)
        x, y = next(pairs)
        self._steps[split] = step + 1
        self._open[split] = (pairs, step + 1, self._data.opened[id(loader)])
        return _batch(x, y, position * (loader.batch_size or len(x)), self._device, size)

    def epoch_steps(self, split: str = "train") -> int:
        """Batches of one epoch of ``split``."""
        return _steps(self._data.loaders[self._data.reads(split)])

    def state_dict(self) -> dict[str, int]:
        """Batches drawn so far, by split."""
        return dict(self._steps)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was taken; ValueError for what is not one."""
        self._steps = counts(state)


def _steps(loader: DataLoader) -> int:
    """Batches an epoch; 0 where the loader cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return 0


def _batch(x: Tensor, y: Tensor, start: int, device: torch.device | str, size: int | None) -> Batch:
    index = torch.arange(start, start + len(x), device=device)
    return Batch(resize(x.to(device), size), y.to(device), index)
