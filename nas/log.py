"""Where a run's metrics go: metrics.jsonl, system.jsonl and TensorBoard events in one folder.

A window is ``period`` steps, aligned to step numbers. What a strategy reports stays on its device until the window
closes; then one transfer, one line with the means, one check that every loss is finite. ``step`` in every file is
``Moment.step`` (from 0), so that a checkpoint of ``n`` steps owns exactly the lines below ``n``. ``metrics.jsonl``
holds no clock: a killed and resumed run writes the same bytes as an uninterrupted one.
"""
from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from nas.protocols import Metrics, Moment

METRICS, SYSTEM = "metrics.jsonl", "system.jsonl"
_MIB = 2**20


class NonFiniteLoss(ArithmeticError):
    """A loss, or a trained parameter, is no longer finite. The run that catches it fills in ``checkpoint``."""

    def __init__(self, step: int, metric: str, value: float, checkpoint: Path | None = None) -> None:
        super().__init__(step, metric, value, checkpoint)
        self.step, self.metric, self.value, self.checkpoint = step, metric, value, checkpoint

    def __str__(self) -> str:
        good = self.checkpoint or "none was written"
        return (
            f"step {self.step}: {self.metric} = {self.value}, not finite. Last good checkpoint: {good}. "
            "Lower the learning rate, or clip gradients."
        )


class RunLogs(Protocol):
    """What a run asks of its log, beyond ``nas.protocols.Log``: ``RunLog`` on the main rank, ``Silent`` elsewhere."""

    latest: dict[str, float]
    until: int | None  # the step at which the run ends, where that is before the last of its schedules

    def __call__(self, now: Moment, metrics: Metrics) -> None: ...
    def now(self, step: int, tags: Metrics) -> None: ...
    def histogram(self, tag: str, values: Tensor, step: int) -> None: ...
    def figure(self, tag: str, fig: Any, step: int) -> None: ...
    def drew(self, images: int, seconds: float) -> None: ...
    def check(self) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunLog:
    """The log of the main rank in ``folder``. ``start``: the first step of this session; later lines are cut away.

    ``world``: processes that draw as many images as this one. Raises ValueError where an existing file is not JSON
    lines, and ``NonFiniteLoss`` where a metric whose tag ends in "/loss" is not finite when it is read.
    """

    def __init__(self, folder: Path, *, period: int = 10, start: int = 0, world: int = 1) -> None:
        if period < 1:
            raise ValueError(f"log: period = {period}. Allowed: 1 or more steps.")
        self.folder, self.period, self.world = folder, period, world
        self.latest: dict[str, float] = {}  # means of the last window, for progress
        self.until: int | None = None
        self.pending: dict[str, list[tuple[int, float | Tensor]]] = {}  # tag -> (step, value) of the open window
        cut(folder, start)
        self.metrics = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (open for the run; see close)
        self.system = open(folder / SYSTEM, "a", encoding="utf-8")  # noqa: SIM115
        again = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
        while again and int(time.time()) <= max(again):  # TensorBoard reads event files by the second in their names
            time.sleep(0.05)
        self.writer = SummaryWriter(str(folder), purge_step=start if again else None)
        self.clock, self.images, self.waited = time.perf_counter(), 0, 0.0

    def __call__(self, now: Moment, metrics: Metrics) -> None:
        """Take one step's metrics; close the window where ``now`` ends one, or ends the run."""
        for tag, value in metrics.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"metric {tag}: shape {tuple(value.shape)}. Allowed: one number; see histogram.")
                value = value.detach().clone()  # not the strategy's own memory, which the next step may overwrite
            self.pending.setdefault(tag, []).append((now.step, value))
        if (now.step + 1) % self.period == 0 or now.step + 1 in (now.steps, self.until):
            self._close_window(now)

    def now(self, step: int, tags: Metrics) -> None:
        """Write values that are no means of a window (evaluations), at once, as a line of their own."""
        values = {tag: float(value) for tag, value in tags.items()}
        for tag, value in values.items():
            _check(step, tag, value)
        self._write({"step": step}, values)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """A distribution of ``values`` (any shape), TensorBoard only."""
        self.writer.add_histogram(tag, values.detach().float().cpu(), step)

    def figure(self, tag: str, fig: Any, step: int) -> None:
        """A matplotlib figure, TensorBoard only; it is closed."""
        self.writer.add_figure(tag, fig, step)

    def drew(self, images: int, seconds: float) -> None:
        """Count ``images`` drawn by this rank, and the ``seconds`` that it waited for them."""
        self.images += images
        self.waited += seconds

    def check(self) -> None:
        """Raise NonFiniteLoss where the open window already holds one: before a checkpoint replaces a good one."""
        self._read()

    def flush(self) -> None:
        """Make everything written so far durable; nothing is closed."""
        for file in (self.metrics, self.system):
            file.flush()
            os.fsync(file.fileno())
        self.writer.flush()

    def close(self) -> None:
        """Flush and close the files. An open window is not written: it is part of ``state_dict``."""
        self.flush()
        self.metrics.close()
        self.system.close()
        self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The open window, as numbers."""
        return {"pending": {tag: [(step, float(value)) for step, value in rows] for tag, rows in self.pending.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.pending = {tag: [(step, value) for step, value in rows] for tag, rows in state["pending"].items()}

    def _read(self) -> None:
        """Fetch the window's tensors in one transfer a device, and check its losses step by step."""
        waiting: dict[torch.device, list[tuple[str, int, Tensor]]] = {}
        for tag, rows in self.pending.items():
            for i, (_, value) in enumerate(rows):
                if isinstance(value, Tensor):
                    waiting.setdefault(value.device, []).append((tag, i, value))
        for places in waiting.values():
            for (tag, i, _), number in zip(places, _numbers([value for _, _, value in places])):
                self.pending[tag][i] = (self.pending[tag][i][0], number)
        for tag, rows in self.pending.items():
            for step, value in rows:
                _check(step, tag, float(value))

    def _close_window(self, now: Moment) -> None:
        self._read()
        self.latest = {tag: mean(float(v) for _, v in rows) for tag, rows in self.pending.items()}
        self.pending = {}
        self._write({"step": now.step, "epoch": now.epoch}, self.latest)
        clock = time.perf_counter()
        seconds = clock - self.clock
        row = {
            "system/images_per_s": self.images * self.world / seconds,
            "system/memory": memory(),
            "system/data_wait": self.waited / seconds,  # share of the time
        }
        self.clock, self.images, self.waited = clock, 0, 0.0
        _write_line(self.system, {"step": now.step, **row})
        self._draw(now.step, row)

    def _write(self, head: dict[str, int], values: Mapping[str, float]) -> None:
        _write_line(self.metrics, {**head, **{t: v if math.isfinite(v) else None for t, v in values.items()}})
        self._draw(head["step"], values)

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)


class Silent:
    """The log of every other rank: the same calls, nothing written, nothing read."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.until: int | None = None

    def __call__(self, now: Moment, metrics: Metrics) -> None: ...
    def now(self, step: int, tags: Metrics) -> None: ...
    def histogram(self, tag: str, values: Tensor, step: int) -> None: ...
    def figure(self, tag: str, fig: Any, step: int) -> None: ...
    def drew(self, images: int, seconds: float) -> None: ...
    def check(self) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def cut(folder: Path, step: int) -> None:
    """Drop the lines of ``step`` and later from both JSON-lines files, each rewritten atomically; absent ones pass.

    A last line torn by a kill is dropped. Raises ValueError where any other line is not JSON with a step.
    """
    for path in (folder / METRICS, folder / SYSTEM):
        if path.exists():
            kept = "".join(f"{line}\n" for line in _lines_before(path, step))
            fresh = path.with_suffix(".cut")
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)


def memory() -> float:
    """The peak memory of this process so far in MiB: of the GPU where one is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024  # bytes on macOS, KiB on Linux


def _lines_before(path: Path, step: int) -> Iterable[str]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty, or torn
        try:
            at = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                return
            raise ValueError(f"{path}, line {number}: not a JSON object with a step. Delete the line.") from error
        if at < step:
            yield line


def _numbers(values: list[Tensor]) -> list[float]:
    """Scalars of one device -> floats: one transfer."""
    dtypes = {value.dtype for value in values}
    common = torch.float32 if dtypes <= {torch.float32, torch.bfloat16, torch.float16} else torch.float64
    return torch.stack([value.reshape(()).to(common) for value in values]).tolist()


def _check(step: int, tag: str, value: float) -> None:
    if tag.endswith("/loss") and not math.isfinite(value):
        raise NonFiniteLoss(step, tag, value)


def _write_line(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()  # to the system: a killed process loses no line, only a torn last one
