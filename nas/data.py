"""The images of a run: splits, evaluation batches and the feed that a strategy draws from.

Splits: train, valid (for alphas), select (for picks), test (for reports only). They are stratified per class, disjoint,
a pure function of the seed, and stated by ``describe``. Where ``select`` is empty, picks read ``valid``.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nas.augment import LIMIT, SELECT, TEST, VALID, VIEW, Augment, noise, normalise, permutation, resize, seeded
from nas.feed import SPLITS, Feed, View, pick_rows, view_transform
from nas.feed import from_loaders as from_loaders
from nas.order import fraction_of
from nas.protocols import Batch
from nas.sources import Images, Source, load

AUGMENT = ("crop", "flip", "colour")
TEST_FRACTION = 0.2  # of the training images, where there is no test split; the same whatever the seed
RESIDENT_BYTES = 4 << 30  # larger arrays stay on the host
SAMPLED = 512  # images that give mean and deviation where images are decoded on the fly
PUBLISHED = {
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "mnist": ([0.1307], [0.3081]),
    "fashion_mnist": ([0.2860], [0.3530]),
}


class Split(NamedTuple):
    """The images ``rows`` (n,) of ``images``; ``labels`` (n,). A batch's index is a position in ``rows``."""

    images: Images
    rows: Tensor
    labels: Tensor


def stratified(labels: Tensor, total: int, seed: int, purpose: int) -> Tensor:
    """Positions, ascending, of ``total`` of ``labels`` (n,): each class by its share, hashed within it."""
    sizes = torch.bincount(labels)
    quota = sizes * total // len(labels)
    left = (sizes * total % len(labels)).argsort(descending=True, stable=True)
    quota[left[: total - int(quota.sum())]] += 1
    order = noise(seed, 0, torch.arange(len(labels)), purpose).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # class by class, in hashed order
    place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    return order[place < quota[labels[order]]].sort().values


class Data:
    """The recipe's ``data:`` section.

    ``name``: digits, mnist, fashion_mnist, cifar10, cifar100 or folder (``root``: a folder or .tar[.gz] with
    ``train/<class>/`` and ``test/<class>/`` or ``val/<class>/``; cifar10 and cifar100 read such a place too).
    ``batch_size``: of all ranks together. ``augment``: crop (zero pad of ``pad`` pixels, default size // 8), flip; for
    images brought to ``size`` on the fly: crop (random resized), flip, colour. ``cutout``: side of the hole, 0 = none.
    ``valid_fraction`` and ``select_fraction``: of the training images, of which ``limit`` keeps a stratified subset.
    ``size``: resolution of the network (default: the images' own). ``workers``: loader processes for decoding.
    ``subset``: the fraction of train that an epoch reads, a fresh one every epoch (RS2, nas/order.py); null or 1: all. An epoch
    is shorter by it, and so is the schedule. ``subset_replacement``: each epoch draws for itself, instead of reading on where
    the last one stopped, until all images have been read.
    Feeds of train and valid give the training view (as DARTS and TAS do for alphas), all else the evaluation view.
    Raises ValueError or FileNotFoundError, in one line. With ranks, let one make the object first: it may decode.
    """

    classes: list[str]
    shape: tuple[int, int, int]
    preprocess: dict[str, Any]

    def __init__(
        self,
        name: str = "digits",
        root: str | None = None,
        batch_size: int = 128,
        augment: list[str] | None = None,
        pad: int | None = None,
        cutout: int = 0,
        valid_fraction: float = 0.0,
        select_fraction: float = 0.0,
        split_seed: int = 111,
        limit: int | None = None,
        size: int | None = None,
        download: bool = False,
        workers: int = 0,
        subset: float | None = None,
        subset_replacement: bool = False,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"data.size = {size} is no resolution. Allowed: 1 pixel and more.")
        source = load(name, root, download, size)
        self._fill(source, name, batch_size=batch_size, augment=augment, pad=pad, cutout=cutout, size=size,
                   valid_fraction=valid_fraction, select_fraction=select_fraction, split_seed=split_seed, limit=limit,
                   workers=workers, subset=subset, subset_replacement=subset_replacement)  # fmt: skip

    def _fill(self, source: Source, name: str, *, batch_size: int, workers: int, size: int | None,
              augment: Sequence[str] | None, pad: int | None, cutout: int, subset: float | None, subset_replacement: bool,
              **cuts: Any) -> None:  # fmt: skip
        if batch_size < 1 or workers < 0:
            raise ValueError(f"data.batch_size = {batch_size}, workers = {workers}. Allowed: from 1, from 0.")
        if subset is not None and not 0 < subset <= 1:
            raise ValueError(f"data.subset = {subset} is no fraction of an epoch. Allowed: above 0 to 1, or null for all.")
        self.subset, self.subset_replacement = None if subset == 1 else subset, subset_replacement
        self.classes, self.batch_size, self.workers = source.classes, batch_size, workers
        self._resident: dict[tuple[int, str], Tensor] = {}
        self._cut(source, **cuts)
        first = self._first(source.train, size)
        self.on_the_fly = source.train.pixels is None
        # Mixed sizes are resized by the workers; images of one size are augmented in batches and then interpolated.
        self.fitted = size if self.on_the_fly else None
        self.size = size
        self.augment = self._augmentation(augment or (), pad, cutout, first)
        names = tuple(augment or ())
        self.train_view = view_transform(size, names, training=True) if self.fitted else None
        self.plain_view = view_transform(size, names, training=False) if self.fitted else None
        self.shape = (first[0], size or first[1], size or first[2])
        self.pixel_shape = (first[0], self.fitted or first[1], self.fitted or first[2])
        if first[0] not in (1, 3):
            raise ValueError(f"The images have {first[0]} channels. Allowed: 1 (grey) or 3 (colour).")
        mean, std = PUBLISHED.get(name, ([], []))
        if len(mean) != first[0]:
            mean, std = self._statistics(source.train)
        self.preprocess = {"mean": list(mean), "std": list(std), "channels": "L" if first[0] == 1 else "RGB",
                           "size": list(self.shape[1:])}  # fmt: skip
        if self.fitted:
            self.preprocess["resize"] = round(self.fitted * 256 / 224)  # shorter side, before the centre crop

    def _first(self, images: Images, size: int | None) -> tuple[int, int, int]:
        """(C, H, W) of the first image; brought to ``size`` if that is done on the fly."""
        if images.pixels is not None:
            channels, height, width = images.pixels.shape[1:]
        else:
            view = view_transform(size, (), training=False) if size else None
            channels, height, width = View(images.dataset, view, None)[0, 0].shape
        return channels, height, width

    def _augmentation(self, names: Sequence[str], pad: int | None, cutout: int, shape: tuple[int, int, int]) -> Augment:
        unknown = [name for name in names if name not in AUGMENT]
        if unknown:
            hint = " Cutout is a number: --data.cutout 16." if unknown[0] == "cutout" else ""
            raise ValueError(f"data.augment: {unknown[0]!r} is unknown. Allowed: {', '.join(AUGMENT)}.{hint}")
        if "colour" in names and not self.fitted:
            raise ValueError("data.augment: colour is for images resized on the fly. Allowed here: crop, flip.")
        if pad is not None and (pad < 1 or self.fitted or "crop" not in names):
            raise ValueError(f"data.pad = {pad}: allowed from 1, with augment: [crop], for images of one size.")
        if not 0 <= cutout <= min(shape[1:]):
            raise ValueError(f"data.cutout = {cutout} pixels. Allowed: 0 (none) to {min(shape[1:])}.")
        crop = "crop" in names and not self.fitted
        return Augment((pad or max(1, min(shape[1:]) // 8)) if crop else 0, "flip" in names and not self.fitted, cutout)

    def _cut(self, source: Source, valid_fraction: float, select_fraction: float, split_seed: int,
             limit: int | None) -> None:  # fmt: skip
        """Cut the splits, and say how."""
        if min(valid_fraction, select_fraction) < 0 or valid_fraction + select_fraction >= 1:
            raise ValueError(f"data.valid_fraction = {valid_fraction} and select_fraction = {select_fraction}: "
                             "allowed from 0, together below 1, since train needs images.")  # fmt: skip
        labels, notes = source.train.labels, [source.note] if source.note else []

        def split(images: Images, rows: Tensor) -> Split:
            return Split(images, rows, images.labels[rows])

        def keep(rows: Tensor, chosen: Tensor) -> Tensor:
            mask = torch.ones(len(rows), dtype=torch.bool)
            mask[chosen] = False
            return rows[mask]

        rows, self.splits = torch.arange(len(labels)), {}
        if source.test is not None:
            self.splits["test"] = split(source.test, torch.arange(len(source.test)))
        else:
            chosen = stratified(labels, round(TEST_FRACTION * len(rows)), 0, TEST)
            self.splits["test"] = split(source.train, rows[chosen])
            rows = keep(rows, chosen)
            notes.append(f"test is {TEST_FRACTION:.0%} of the images, stratified, always the same")
        if limit is not None:
            if not len(self.classes) <= limit <= len(rows):
                raise ValueError(f"data.limit = {limit}. Allowed: {len(self.classes)} (one a class) to {len(rows)}.")
            notes.append(f"{limit:,} of {len(rows):,} training images, stratified, seed {split_seed}")
            rows = rows[stratified(labels[rows], limit, split_seed, LIMIT)]
        n, stated = len(rows), {}
        for name, fraction, purpose in (("valid", valid_fraction, VALID), ("select", select_fraction, SELECT)):
            total = round(fraction * n)
            if fraction and not total:
                raise ValueError(f"data.{name}_fraction = {fraction} of {n} images is none. Give at least {1 / n:.2g}.")
            chosen = stratified(labels[rows], total, split_seed, purpose)
            self.splits[name], rows = split(source.train, rows[chosen]), keep(rows, chosen)
            how = f" ({100 * fraction:g}% of train, stratified, seed {split_seed})" if fraction else ""
            stated[name] = f"{name} {total:,}{how}"
        if not len(rows):
            raise ValueError(f"No image is left to train on: all {n} are in valid and select. Lower their fractions.")
        self.splits["train"] = split(source.train, rows)
        figures = [f"train {len(rows):,}", *stated.values(), f"test {len(self.splits['test'].rows):,}"]
        if self.subset is not None:
            read = fraction_of(len(rows), self.subset) // self.batch_size * self.batch_size
            notes.append(f"an epoch reads {read:,} of train (the whole batches of {100 * self.subset:g}%, RS2 "
                         f"{'with' if self.subset_replacement else 'without'} replacement)")  # fmt: skip
        self._stated = "; ".join([", ".join(figures), *notes])

    def _statistics(self, images: Images) -> tuple[list[float], list[float]]:
        """Mean and deviation a channel over the training images, in [0, 1]; on the fly: of a fixed sample."""
        if images.pixels is not None:  # exact: a histogram of the 256 values
            channels = images.pixels.shape[1]
            counts = torch.zeros(channels, 256, dtype=torch.float64)
            for chunk in images.pixels.split(4096):
                for c in range(channels):
                    counts[c] += torch.bincount(chunk[:, c].flatten(), minlength=256)
            share, values = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
            mean, square = share @ values, share @ values**2
        else:
            rows = stratified(images.labels, min(len(images), SAMPLED), 0, TEST)
            view = View(images.dataset, self.plain_view, self.pixel_shape)
            mean = square = torch.zeros(self.shape[0], dtype=torch.float64)
            for row in rows.tolist():
                x = view[row, row]
                x = x.to(torch.float64) / (255 if x.dtype == torch.uint8 else 1)
                mean, square = mean + x.mean((1, 2)) / len(rows), square + (x**2).mean((1, 2)) / len(rows)
        std = (square - mean**2).clamp(min=0).sqrt()
        std[std < 1e-6] = 1.0  # a constant channel has no spread to divide by
        return [round(m, 6) for m in mean.tolist()], [round(s, 6) for s in std.tolist()]

    def describe(self) -> str:
        """The splits in one line: sizes, how they were cut, seeds."""
        return self._stated

    def reads(self, split: str) -> str:
        """The split that ``split`` stands for: ``select`` reads ``valid`` where nothing was set aside for it.

        Raises ValueError where there is no such split or it holds no image.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r}. Allowed: {', '.join(SPLITS)}.")
        name = "valid" if split == "select" and not len(self.splits["select"].rows) else split
        if not len(self.splits[name].rows):
            both = " or --data.select_fraction" if split == "select" else ""
            raise ValueError(f"The split {split!r} holds no image. Set some aside by --data.valid_fraction{both}.")
        return name

    def holds(self, split: str) -> bool:
        """Whether ``split`` (or the one it stands for) has images."""
        name = "valid" if split == "select" and not len(self.splits["select"].rows) else split
        return len(self.splits[name].rows) > 0

    def count(self, split: str) -> int:
        """The number of images of ``split``; raises like ``reads``."""
        return len(self.splits[self.reads(split)].rows)

    def feed(self, seed: int, device: torch.device | str, rank: int = 0, world: int = 1) -> Feed:
        """What a strategy draws from; ValueError where ``batch_size`` does not fit the ranks or the train split."""
        return Feed(self, seed, device, rank, world)

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
        """Every image once, in order, in the evaluation view; the last batch may be smaller.

        ``limit``: a stratified subset of that many images. ``augmented``: the training view, in the order of epoch 0 of
        ``seed`` (to recalibrate batch norms). ``size``: resolution instead of the data's own.
        """
        part = self.splits[self.reads(split)]
        n = len(part.rows)
        if limit is not None and limit < 1:
            raise ValueError(f"batches: limit = {limit} images. Allowed: from 1; None reads all.")
        index = torch.arange(n) if limit is None else stratified(part.labels, min(limit, n), 0, LIMIT)
        if augmented:
            index = index[permutation(seed, 0, len(index))]
        shares = index.split(batch_size or self.batch_size)
        loader: Iterator[Tensor] | None = None
        if self.on_the_fly:
            seeds = noise(seed, 0, index, VIEW).split(batch_size or self.batch_size)
            keys = [list(zip(part.rows[s].tolist(), k.tolist())) for s, k in zip(shares, seeds)]
            loader = iter(self.loader(part.images, keys, augmented))
        for share in shares:
            x = next(loader) if loader else pick_rows(self.pixels(part.images, device), part.rows[share])
            view = self.augment if augmented else None
            at = share.to(device)
            yield Batch(self.finish(x.to(device), view, seed, 0, at, size), part.labels[share].to(device), at)

    def loader(self, images: Images, keys: Any, augmented: bool) -> DataLoader:
        """Batches (B, C, H, W) of the (row, seed) pairs that ``keys`` yields, decoded in workers that stay alive."""
        view = View(images.dataset, self.train_view if augmented else self.plain_view, self.pixel_shape)
        own = torch.Generator()  # making an iterator draws from it, not from the global one
        return DataLoader(view, batch_sampler=keys, num_workers=self.workers, persistent_workers=self.workers > 0,
                          pin_memory=torch.cuda.is_available(), generator=own)  # fmt: skip

    def pixels(self, images: Images, device: torch.device | str) -> Tensor:
        """All pixels (N, C, H, W) uint8, on the device if they are not memory-mapped by size."""
        pixels = images.pixels
        assert pixels is not None
        if torch.device(device).type == "cpu" or pixels.numel() > RESIDENT_BYTES:
            return pixels
        key = (id(images), str(device))
        if key not in self._resident:
            self._resident[key] = pixels.to(device)
        return self._resident[key]

    def finish(self, x: Tensor, view: Augment | None, seed: int, epoch: int | Tensor, index: Tensor,
               size: int | None) -> Tensor:  # fmt: skip
        """(B, C, H, W) pixels -> what the network sees: augmented by ``view``, normalised, at ``size`` or its own."""
        if view is not None:
            x = view.pixels(x, seed, epoch, index)
        x = normalise(x, self.preprocess["mean"], self.preprocess["std"])
        if view is not None:
            x = view.holes(x, seed, epoch, index)
        return resize(x, size or self.size)


def from_dataset(train: Any, test: Any = None, classes: Sequence[str] | None = None, **data_args: Any) -> Data:
    """``Data`` over your own map-style datasets of (image, label).

    An image is a PIL image or a tensor (C, H, W), uint8 or float; float is normalised as it is. Give ``size=`` where
    sizes differ. Labels are ``train.targets`` where that exists (as in torchvision), otherwise every item is read once.
    Random transforms of the dataset are seeded per (seed, epoch, index). ``data_args``: those of ``Data``.

        class Squares(torch.utils.data.Dataset):
            def __len__(self):
                return 100
            def __getitem__(self, i):
                return torch.full((1, 8, 8), i, dtype=torch.uint8), i % 2

        data = from_dataset(Squares(), classes=["even", "odd"], batch_size=10, valid_fraction=0.5, augment=["crop"])
        draw = data.feed(seed=1, device="cpu")
        x, y, index = draw("train")                        # (10, 1, 8, 8) float32, (10,), (10,)
    """
    defaults = {name: p.default for name, p in inspect.signature(Data).parameters.items()}
    own = {name: defaults.pop(name) for name in ("name", "root", "download")}
    unknown = sorted(set(data_args) - set(defaults))
    if unknown:
        hint = " (that is for named data)" if unknown[0] in own else ""
        raise ValueError(f"from_dataset: {unknown[0]!r} is unknown{hint}. Allowed: {', '.join(defaults)}.")

    def images(dataset: Any) -> Images:
        targets = getattr(dataset, "targets", None)
        if targets is None:
            with seeded(0):
                targets = [int(dataset[i][1]) for i in range(len(dataset))]
        return Images(torch.as_tensor(targets, dtype=torch.int64), dataset=dataset)

    parts = [images(part) for part in (train, test) if part is not None]
    if not all(len(part) for part in parts):
        raise ValueError("from_dataset: a dataset holds no image. Give datasets of at least one image.")
    most = max(int(part.labels.max()) for part in parts) + 1
    names = list(classes) if classes is not None else [str(c) for c in range(most)]
    if most > len(names) or min(int(part.labels.min()) for part in parts) < 0:
        raise ValueError(f"from_dataset: a label is outside 0 .. {len(names) - 1}, the {len(names)} classes.")
    data = Data.__new__(Data)
    data._fill(Source(parts[0], parts[1] if test is not None else None, names), "", **{**defaults, **data_args})
    return data
