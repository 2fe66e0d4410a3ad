"""The whole program in this process: ``nas("search", ...)`` -> exit code, stdout and stderr; and tiny arguments for it."""
from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nas.__main__ import main

DATA = ("--data.limit", "200", "--data.batch_size", "16")
SPACE = ("--space.depth", "14", "--space.widths", "[4,6,8]")
TINY = ("--epochs", "2", *DATA, *SPACE, "--threads", "1")  # 12 steps of 16 images, ResNet-14 with 4, 6, 8 channels
SEARCH = ("search", "tas-digits", *TINY)
RETRAIN = ("--epochs", "2", *DATA, "--threads", "1")


class Result(NamedTuple):
    """What a shell would see of one command."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of stdout: the result."""
        return self.out.splitlines()[-1]

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are neither the log's nor the progress's."""
        lines = self.err.splitlines()
        return [line for line in lines if not line.startswith("nas: ") and not re.match(r"step \d+/\d+  epoch ", line)]


def nas(*words: str | Path) -> Result:
    """Runs ``nas WORDS`` here. An unexpected exception comes through, as a traceback would."""
    out, err = io.StringIO(), io.StringIO()
    log, lines = logging.getLogger(), logging.StreamHandler(err)
    lines.setFormatter(logging.Formatter("nas: %(message)s"))  # as nas.__main__ does where pytest has not set up a log
    level = log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([str(word) for word in words])
            except SystemExit as stop:  # --help
                code = int(stop.code or 0)
    finally:
        log.removeHandler(lines)
        log.setLevel(level)
    return Result(code, out.getvalue(), err.getvalue())


def ok(*words: str | Path) -> Result:
    """``nas``, which must succeed."""
    result = nas(*words)
    assert result.code == 0, result.err
    return result


def content(folder: Path) -> dict[str, str]:
    """Path inside ``folder`` -> hash: equal where nothing was added, changed or removed."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))}  # fmt: skip


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor, number and string of nested dicts, lists and tuples, by its path."""
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        yield f"{name}.len", len(value)
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}.{i}")
    else:
        yield name, value


def differences(a: Any, b: Any) -> list[str]:
    """The paths at which ``a`` and ``b`` differ, bit for bit."""
    mine, theirs = dict(leaves(a)), dict(leaves(b))
    odd = sorted(mine.keys() ^ theirs.keys())
    return odd + [name for name in mine.keys() & theirs.keys() if not _same(mine[name], theirs[name])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def draw_images(root: Path, mode: str) -> None:
    """Two classes of 8x8 PNG files, dark and bright, 20 and 5 of each to train and test."""
    noise = torch.Generator().manual_seed(1)
    for part, n in (("train", 20), ("test", 5)):
        for label, low in (("dark", 0), ("bright", 128)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                shape = (8, 8, 3) if mode == "RGB" else (8, 8)
                pixels = torch.randint(low, low + 128, shape, generator=noise, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
