"""Where images come from: a name (digits, mnist, ..., folder) -> ``Source``.

A folder holds ``train/<class>/*`` and ``test/<class>/*`` (or ``val``); a .tar or .tar.gz holds the same. Images of one
size are decoded once into a uint8 array cached beside the place (``<place>.cache/<key>/``, or in ~/.cache/supernas
where that cannot be written); mixed sizes and sets above ``ARRAY_BYTES`` are decoded on the fly. The key hashes file
names, sizes and times; a cache is .npy (never pickle) and JSON, and appears complete or not at all.
"""
from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "valid")
GREY = ("1", "L", "LA")
DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # more than 8 bits: PIL would clip them
ARRAY_BYTES = 4 << 30  # larger sets are decoded on the fly
MAP_BYTES = 256 << 20  # larger arrays are memory-mapped
CHUNK = 256  # images a decoding task
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass
class Images:
    """``labels`` (N,) int64, and ``pixels`` (N, C, H, W) uint8 or ``dataset[i]`` -> (PIL image or tensor, label)."""

    labels: Tensor
    pixels: Tensor | None = None
    dataset: Any = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Source:
    """``test`` None: there is none, it is cut from ``train``. ``note``: what a reader of results should know."""

    train: Images
    test: Images | None
    classes: list[str]
    note: str = ""


class Entry(NamedTuple):
    """One image file: its ``name`` inside the place, and where its bytes are (``length`` -1: the whole file)."""

    name: str
    label: int
    file: str
    offset: int = 0
    length: int = -1


class Listing(NamedTuple):
    """The files of a place in the order of their names: split -> entries."""

    classes: list[str]
    train: list[Entry]
    test: list[Entry]
    note: str


def load(name: str, root: str | None = None, download: bool = False, size: int | None = None) -> Source:
    """The images called ``name``. ``size``: what mixed sizes will be brought to.

    Raises ValueError (unknown name, bad place) or FileNotFoundError (nothing there), in one line.
    """
    if name not in NAMES:
        raise ValueError(f"data.name = {name!r} is unknown. Allowed: {', '.join(NAMES)}.")
    if name == "digits":
        return _digits()
    place = Path(root).expanduser() if root is not None else None
    own = place is not None and (place.is_file() or (place / "train").is_dir())
    if name == "folder" or (own and name.startswith("cifar")):
        if place is None:
            raise ValueError("data.name = folder needs --data.root: a folder or .tar[.gz] with train/<class>/ inside.")
        return read_place(place, size)
    return _torchvision(name, place or Path.home() / ".cache" / "supernas", download)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # stored as 0 .. 16
    return Source(Images(torch.from_numpy(digits.target.astype(np.int64)), pixels), None, [str(d) for d in range(10)])


def _torchvision(name: str, root: Path, download: bool) -> Source:
    from torchvision import datasets

    kinds = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST,
             "cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}  # fmt: skip
    try:
        train, test = (kinds[name](str(root), train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError) as error:
        if download:
            raise FileNotFoundError(f"{name} could not be fetched into {root}: {_line(error)}") from error
        raise FileNotFoundError(
            f"{name} is not in {root}. Name its folder by --data.root FOLDER, or fetch it by --data.download true."
        ) from error

    def images(part: Any) -> Images:
        pixels = torch.as_tensor(part.data)
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return Images(torch.as_tensor(part.targets, dtype=torch.int64), pixels)

    return Source(images(train), images(test), list(train.classes))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# -- folders and tar files ------------------------------------------------------------------------------------------


def read_place(root: Path, size: int | None = None) -> Source:
    """A folder or .tar[.gz], from its cache if there is one. ``size``: see ``load``. Raises like ``load``."""
    if not root.exists():
        raise FileNotFoundError(f"data.root = {root} does not exist. Give a folder or .tar[.gz] with train/<class>/.")
    listing = list_folder(root) if root.is_dir() else None  # a tar is listed only when there is no cache
    cache = _cache(root) / _key(root, listing)
    if not (cache / "index.json").exists():
        _build(root, listing, cache)
    try:
        source, sizes = _open(root, cache)
    except (*UNREADABLE, KeyError, TypeError) as error:
        raise ValueError(f"The cache {cache} is damaged ({_line(error)}). Delete it and start again.") from error
    if len(sizes) > 1 and size is None:
        raise ValueError(f"{root} holds images of different sizes ({' and '.join(sizes)}). Give --data.size PIXELS.")
    return source


def list_folder(root: Path) -> Listing:
    """The images under ``root``/train and ``root``/test; other files are left out."""
    names, folders = [], []
    for part in ("train", *TEST_FOLDERS):
        for path, inner, files in os.walk(root / part, followlinks=True):
            inside = Path(path).relative_to(root)
            folders += [(inside / folder).as_posix() for folder in inner]
            names += [(inside / file).as_posix() for file in files]
    return _arrange(root, {name: Entry(name, -1, str(root / name)) for name in names}, folders)


def list_tar(root: Path, staging: Path) -> Listing:
    """The images in a tar; a .gz is unpacked to ``staging``/images.tar first, so that any image can be read alone."""
    try:
        plain = root
        if root.name.endswith((".tar.gz", ".tgz")):
            plain = staging / "images.tar"
            with gzip.open(root) as packed, open(plain, "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        with tarfile.open(plain, "r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{root} cannot be read as .tar, .tar.gz or .tgz: {_line(error)}") from error
    paths = {member.name.removeprefix("./").strip("/"): member for member in members}
    tops = {name.split("/")[0] for name in paths} - {"", "."}
    top = f"{tops.pop()}/" if len(tops) == 1 and "train" not in tops else ""
    inside = {name.removeprefix(top): member for name, member in paths.items()}
    entries = {name: Entry(name, -1, str(plain), member.offset_data, member.size)
               for name, member in inside.items() if member.isfile()}  # fmt: skip
    return _arrange(root, entries, [name for name, member in inside.items() if member.isdir()])


def _arrange(root: Path, entries: dict[str, Entry], folders: Sequence[str]) -> Listing:
    """Classes from folder names, labels into entries. Raises where a class is empty or known to the test part only."""
    pairs = {tuple(name.split("/")[:2]) for name in (*folders, *(name for name in entries if name.count("/") >= 2))}

    def classes_of(part: str) -> list[str]:
        return sorted(pair[1] for pair in pairs if len(pair) == 2 and pair[0] == part and not pair[1].startswith("."))

    classes = classes_of("train")
    if not classes:
        raise FileNotFoundError(f"{root} has no train/<class>/ folder. Put images there, one folder a class.")
    found = [part for part in TEST_FOLDERS if classes_of(part)]
    parts: dict[str, list[Entry]] = {}
    for part in ("train", *found[:1]):
        known = classes_of(part)
        unknown = [c for c in known if c not in classes]
        if unknown:
            known_ones = ", ".join(classes)
            raise ValueError(f"{root}/{part} has the class {unknown[0]!r}, which train has not. Allowed: {known_ones}.")
        label = {name: classes.index(name) for name in known}
        inside = [name for name in sorted(entries) if name.startswith(f"{part}/") and name.split("/")[1] in label
                  and name.count("/") >= 2 and not name.split("/")[-1].startswith(".")]  # fmt: skip
        images = [name for name in inside if name.lower().endswith(SUFFIXES)]
        if len(images) < len(inside):
            logger.info("%s/%s: left out %d files without an image's suffix", root, part, len(inside) - len(images))
        parts[part] = [entries[name]._replace(label=label[name.split("/")[1]]) for name in images]
        empty = set(range(len(classes))).intersection(label.values()) - {entry.label for entry in parts[part]}
        if empty:
            name = f"{root}/{part}/{classes[min(empty)]}"
            raise ValueError(f"{name} holds no image. Put some there ({', '.join(SUFFIXES)}) or delete the folder.")
    note = f"{found[1]}/ is not read: {found[0]}/ is the test split" if len(found) > 1 else ""
    return Listing(classes, parts["train"], parts[found[0]] if found else [], note)


def _key(root: Path, listing: Listing | None) -> str:
    """A hash of file names, sizes and times: of the images, or of the one tar file."""
    digest = hashlib.sha256(b"nas-images 1")
    files = [(e.name, e.file) for e in (*listing.train, *listing.test)] if listing else [(root.name, str(root))]
    for name, file in files:
        stat = os.stat(file)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _cache(root: Path) -> Path:
    """``<root>.cache``, or a folder under ~/.cache/supernas. A folder marked read-only counts as such for root too."""
    place = root.absolute()
    beside = place.with_name(place.name + ".cache")
    folder = beside if beside.exists() else beside.parent
    if os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        return beside
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    fallback = Path.home() / ".cache" / "supernas" / f"{place.name}-{digest}"
    logger.info("%s cannot be written: the decoded images are cached in %s", folder, fallback)
    return fallback


def _build(root: Path, listing: Listing | None, cache: Path) -> None:
    """Write ``cache`` as a whole: into a folder of its own first, then renamed (another rank may have been faster)."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=cache.parent))
    try:
        listing = listing or list_tar(root, staging)
        index = _decode_all(root, listing, staging)
        if not index["lazy"]:
            (staging / "images.tar").unlink(missing_ok=True)
        (staging / "index.json").write_text(json.dumps(index))
        staging.chmod(0o755)  # mkdtemp made it for its owner alone
        try:
            os.rename(staging, cache)
        except OSError:
            if not (cache / "index.json").exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _decode_all(root: Path, listing: Listing, staging: Path) -> dict[str, Any]:
    """Read every header, then write arrays (one size, not too large) or lists of entries; returns the index."""
    entries = [*listing.train, *listing.test]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        heads = [head for heads in pool.map(_heads, _chunks(entries)) for head in heads]
        mode = "L" if all(head[2] in GREY for head in heads) else "RGB"
        sizes = sorted({f"{width}x{height}" for width, height, _ in heads})
        width, height, _ = heads[0]
        shape = (len(mode), height, width)
        lazy = len(sizes) > 1 or len(entries) * int(np.prod(shape)) > ARRAY_BYTES
        index = {"format": "nas-images", "version": 1, "place": str(root), "classes": listing.classes, "channels": mode,
                 "note": listing.note, "sizes": sizes[:2], "lazy": lazy, "test": bool(listing.test)}  # fmt: skip
        for part, rows in (("train", listing.train), ("test", listing.test)):
            if not rows:
                continue
            labels = np.array([entry.label for entry in rows], np.int64)
            np.save(staging / f"{part}.labels.npy", labels, allow_pickle=False)
            if lazy:
                relative = [(entry.name, entry.offset, entry.length) for entry in rows]
                (staging / f"{part}.json").write_text(json.dumps(relative))
                continue
            out = np.lib.format.open_memmap(staging / f"{part}.npy", "w+", np.uint8, (len(rows), *shape))
            list(pool.map(_writer(out, mode), _chunks(list(enumerate(rows)))))
            out.flush()
    logger.info("%s: %d images of %s, %s", root, len(entries), " and ".join(sizes[:2]),
                "decoded on the fly" if lazy else "decoded once")  # fmt: skip
    return index


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]


def read_bytes(entry: Entry) -> bytes:
    """The encoded image."""
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.length)


def _where(entry: Entry) -> str:
    return entry.file if entry.length < 0 else entry.name


def _corrupt(entry: Entry, error: BaseException) -> ValueError:
    reason = "no known format" if isinstance(error, UnidentifiedImageError) else _line(error)
    return ValueError(f"{_where(entry)} is corrupt or not an image: {reason}. Replace or delete it.")


def _heads(entries: Sequence[Entry]) -> list[tuple[int, int, str]]:
    """(width, height, PIL mode) of each, without decoding. Raises ValueError that names the file."""
    heads = []
    for entry in entries:
        try:
            with Image.open(io.BytesIO(read_bytes(entry))) as image:
                heads.append((*image.size, image.mode))
        except UNREADABLE as error:
            raise _corrupt(entry, error) from error
        if heads[-1][2] in DEEP:
            raise ValueError(f"{_where(entry)} has more than 8 bits a channel ({heads[-1][2]}). Save it as 8-bit.")
    return heads


def decode(entry: Entry, mode: str) -> Image.Image:
    """The image in PIL ``mode`` (L or RGB). Raises ValueError that names the file."""
    try:
        with Image.open(io.BytesIO(read_bytes(entry))) as image:
            return image.convert(mode)
    except UNREADABLE as error:
        raise _corrupt(entry, error) from error


def _writer(out: np.ndarray, mode: str) -> Callable[[Sequence[tuple[int, Entry]]], None]:
    def write(rows: Sequence[tuple[int, Entry]]) -> None:
        for row, entry in rows:
            pixels = np.asarray(decode(entry, mode))
            out[row] = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)

    return write


class Files(Dataset):
    """Image files decoded when asked for: ``[i]`` -> (PIL image in ``mode``, label)."""

    def __init__(self, entries: Sequence[Entry], mode: str) -> None:
        self.entries, self.mode = entries, mode

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(self.entries[i], self.mode), self.entries[i].label


def _open(root: Path, cache: Path) -> tuple[Source, list[str]]:
    """The source that a cache holds, and up to two of its image sizes."""
    index = json.loads((cache / "index.json").read_text())

    def images(part: str) -> Images:
        labels = torch.from_numpy(np.load(cache / f"{part}.labels.npy", allow_pickle=False))
        if index["lazy"]:
            tar = cache / "images.tar" if (cache / "images.tar").exists() else root
            rows = json.loads((cache / f"{part}.json").read_text())
            entries = [Entry(name, label, str(root / name if root.is_dir() else tar), offset, length)
                       for (name, offset, length), label in zip(rows, labels.tolist(), strict=True)]  # fmt: skip
            return Images(labels, dataset=Files(entries, index["channels"]))
        path = cache / f"{part}.npy"
        # "c": copy on write, since torch wants writable memory; nothing here writes to it
        pixels = np.load(path, mmap_mode="c" if path.stat().st_size > MAP_BYTES else None, allow_pickle=False)
        if len(pixels) != len(labels):
            raise ValueError(f"{path.name} holds {len(pixels)} images for {len(labels)} labels")
        return Images(labels, torch.from_numpy(pixels))

    test = images("test") if index["test"] else None
    return Source(images("train"), test, index["classes"], index["note"]), index["sizes"]
