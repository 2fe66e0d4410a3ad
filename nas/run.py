"""A run: a folder that a strategy is trained in, and continued in after a kill.

    run = Run("runs/tas", config, device="cpu", ranks=ranks.start("cpu"), resume="auto")
    outcome = run.fit(strategy, setup, draw, seed=1, every=[(setup.epoch_steps, evaluate)])
    run.close()
"""
from __future__ import annotations

import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import yaml

from nas import checkpoint
from nas.checkpoint import Stateful
from nas.engine import Act, Outcome, Progress, seed_from, signals, train
from nas.log import METRICS, NonFiniteLoss, RunLog, RunLogs, Silent
from nas.protocols import Batch, Draw, Moment, Setup, Strategy
from nas.ranks import Ranks, broadcast_, share

_logger = logging.getLogger("nas")
_ALONE = Ranks(rank=0, world=1, local_rank=0, main=True)


class Source(Draw, Stateful, Protocol):
    """A draw whose position can be saved; the same on every rank."""


class _Fitted(NamedTuple):
    strategy: Strategy
    draw: Source
    seed: int
    keep: Mapping[str, Stateful]


def explicit(out: str, resume: str, ranks: Ranks) -> Path:
    """``--out`` as given: ValueError where it is in use and the run is not to be resumed.

    Only the main rank looks: another may come when the main one has already begun to write there.
    """
    folder = Path(out)
    if ranks.main and resume == "never" and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{out} is not empty: choose another --out, empty it, or go on in it with --resume auto.")
    return folder


class Run:
    """The folder of one run. ``resume``: "auto" continues the newest of ``out``, ``out``-2, ... that has a checkpoint;
    "never", or nothing to continue: ``out``, or the first ``out``-2, ``out``-3, ... that is free. ``exact``: ``out`` itself,
    which is this run's and no other's, whatever is in it: continued, or begun (again).

    Attributes: ``folder``; ``start``, the first step to do; ``log``. Only the main rank writes.
    Raises ValueError where the checkpoint to continue from is damaged or of another ``config`` (plain data).
    """

    def __init__(
        self,
        out: str | Path,
        config: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        ranks: Ranks = _ALONE,
        resume: str = "auto",
        period: int = 10,
        exact: bool = False,
    ) -> None:
        if resume not in ("auto", "never"):
            raise ValueError(f"resume = {resume!r}. Allowed: 'auto', 'never'.")
        self.config = json.loads(json.dumps(config))  # plain data only, as it will be read back
        self.device, self.ranks = torch.device(device), ranks
        found = Path(out) if exact or not ranks.main else _choose(Path(out), resume, self.config)
        self.folder = Path(share(str(found)))
        self.period = period
        self.made = not self.folder.exists()
        self.checkpoints = self.folder / "checkpoints"
        self.loaded: dict[str, Any] | None = None
        path: Path | None = None
        if _has_checkpoint(self.folder):
            self.loaded, path = checkpoint.load(self.checkpoints, self.device)
            checkpoint.check_config(self.loaded["config"], self.config, path)
        self.start: int = self.loaded["step"] if self.loaded else 0
        self.good: Path | None = path if self.loaded else None
        self.saved = self.start if self.loaded else None  # the step of last.pt
        self.fitted: _Fitted | None = None
        if ranks.main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for torn in self.checkpoints.glob("*.pt.*.tmp"):  # what a kill left half-written
                torn.unlink()
            _describe(self.folder, self.config, self.device)
        self.log: RunLogs = (
            RunLog(self.folder, period=period, start=self.start, world=ranks.world) if ranks.main else Silent()
        )

    def fit(
        self,
        strategy: Strategy,
        setup: Setup,
        draw: Source,
        *,
        seed: int,
        until: int | None = None,
        every: Sequence[tuple[int, Act]] = (),
        save_every: int | None = None,
        max_time: float | None = None,
        stop: Callable[[], str | None] | None = None,
        keep: Mapping[str, Stateful] | None = None,
    ) -> Outcome:
        """Start ``strategy``, or restore it, and train it to ``setup.steps``, or to ``until``; the end is saved, whatever ended
        it.

        ``every``: (period in steps, act). ``save_every``: steps between checkpoints, an epoch by default.
        ``max_time``: seconds. ``stop``: asked after every step in the place of signals and a time of its own, by who has them.
        ``keep``: what else is part of a checkpoint, by name (an act with a memory).
        Raises TypeError where the strategy holds what a checkpoint cannot, NonFiniteLoss (with the state in
        checkpoints/failed.pt) where a loss or a trained parameter is not finite.
        """
        torch.manual_seed(seed_from(seed, "start"))  # the same on every rank
        broadcast_(setup.net.state_dict().values())
        strategy.start(setup)
        checkpoint.check(strategy)
        self.fitted = _Fitted(strategy, draw, seed, keep or {})
        if self.loaded:
            if self.loaded["seed"] != seed:
                raise ValueError(f"{self.folder} began with seed {self.loaded['seed']}, not {seed}. Resume with it.")
            checkpoint.restore(strategy, self.loaded["strategy"], self.checkpoints)
            draw.load_state_dict(self.loaded["draw"])
            self.log.load_state_dict(self.loaded["log"])
            for name, part in self.fitted.keep.items():
                part.load_state_dict(self.loaded["keep"][name])
            self.loaded = None  # its memory
        if self.ranks.main:
            checkpoint.keep_teacher(self.checkpoints, strategy)
        acts = [*every, (setup.epoch_steps if save_every is None else save_every, self._save_act)]
        end = setup.steps if until is None else until
        progress = Progress(end, self.start, lambda: self.log.latest) if self.ranks.main else None
        self.log.until = until
        if progress:
            acts.append((1, progress))
        try:
            with signals(max_time) if stop is None else nullcontext(stop) as asked:
                outcome = train(
                    strategy, _Timed(draw, self.log), self.log, steps=setup.steps, epoch_steps=setup.epoch_steps,
                    seed=seed, start=self.start, until=until, every=acts, stop=asked,
                )  # fmt: skip
                self.save(outcome.step)
        except NonFiniteLoss as failure:
            failure.checkpoint = self.good
            if self.ranks.main:
                checkpoint.write(self.checkpoints / "failed.pt", self._payload(failure.step + 1))
            raise
        finally:
            if progress:
                progress.close()
            self.log.flush()
        return outcome

    def save(self, step: int, name: str = "last") -> None:
        """Write the state after ``step`` steps: checkpoints/last.pt (the former becomes previous.pt), or ``name``.pt.

        Raises NonFiniteLoss, and leaves the good checkpoints, where a loss or a trained parameter is not finite.
        """
        if not self.ranks.main or self.fitted is None or (name == "last" and self.saved == step):
            return
        self.log.check()
        wrong = checkpoint.not_finite(self.fitted.strategy)
        if wrong is not None:
            raise NonFiniteLoss(step - 1, *wrong)
        self.log.flush()  # what the checkpoint counts as written must be
        if name != "last":
            checkpoint.write(self.checkpoints / f"{name}.pt", self._payload(step))
            return
        if self.good is not None and self.good.name != "last.pt":
            (self.checkpoints / "last.pt").unlink(missing_ok=True)  # torn: it must not take the place of the good one
        self.good = checkpoint.save(self.checkpoints, self._payload(step))
        self.saved = step

    def close(self) -> None:
        """Close the log's files. A folder that this run made, and that fitting left without anything to keep, is removed."""
        self.log.close()
        if self.ranks.main and self.made and self.fitted is not None and self.saved is None and self._empty():
            shutil.rmtree(self.folder)

    def _empty(self) -> bool:
        """Whether there is neither a checkpoint (a failed one counts) nor a line of metrics."""
        kept = [path for path in self.checkpoints.iterdir() if not path.name.startswith("teacher-")]
        return not kept and not (self.folder / METRICS).read_bytes()

    def _save_act(self, now: Moment, strategy: Strategy) -> None:
        self.save(now.step + 1)

    def _payload(self, step: int) -> dict[str, Any]:
        assert self.fitted is not None
        return {
            "format": checkpoint.FORMAT,
            "version": checkpoint.VERSION,
            "step": step,
            "seed": self.fitted.seed,
            "config": self.config,
            "config_hash": checkpoint.config_hash(self.config),
            "strategy": checkpoint.state_of(self.fitted.strategy),
            "draw": self.fitted.draw.state_dict(),
            "log": self.log.state_dict(),
            "keep": {name: part.state_dict() for name, part in self.fitted.keep.items()},
        }


class _Timed:
    """A draw that tells the log how many images it gave and how long that took."""

    def __init__(self, draw: Draw, log: RunLogs) -> None:
        self.draw, self.log = draw, log

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        began = time.perf_counter()
        batch = self.draw(split, size, odds)
        self.log.drew(len(batch.x), time.perf_counter() - began)
        return batch


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints" / name).exists() for name in ("last.pt", "previous.pt"))


def _choose(out: Path, resume: str, config: Mapping[str, Any]) -> Path:
    """The folder to continue in (or to begin again, where the same run died before its first checkpoint), or the first
    that is absent or empty."""
    taken: list[Path] = []
    folder = out
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        taken.append(folder)
        folder = out.with_name(f"{out.name}-{len(taken) + 1}")
    if resume == "auto":
        return next((old for old in reversed(taken) if _has_checkpoint(old) or _barely_begun(old, config)), folder)
    return folder


def _barely_begun(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run of the same ``config`` was killed here before it saved anything."""
    if (folder / "checkpoints" / "failed.pt").exists() or not (folder / "config.yaml").is_file():
        return False
    try:
        stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):  # torn by the kill
        return False
    return isinstance(stored, dict) and checkpoint.config_hash(stored) == checkpoint.config_hash(config)


def _describe(folder: Path, config: Mapping[str, Any], device: torch.device) -> None:
    """Write config.yaml and env.json; where they are there (a resumption), say what of the environment changed."""
    path = folder / "env.json"
    env = _environment(device)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in ("versions", "device", "threads") if before.get(key) != env[key]]
        if changed:
            _logger.warning("%s: %s changed since the run began: not bit-exact from here", folder, ", ".join(changed))
        return
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    path.write_text(json.dumps(env, indent=2) + "\n", encoding="utf-8")


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": sys.argv,
        "git": _commit(),
    }


def _commit() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
