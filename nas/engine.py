"""The one loop. It keeps time, randomness, stop requests and progress; it knows no strategy, searcher or supernet.

    train: for each step: now = moment(step); log(now, strategy.update(draw, now)); the acts whose period it is; stop?
"""
from __future__ import annotations

import hashlib
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from nas import ranks
from nas.protocols import Draw, Log, Moment, Strategy

Act = Callable[[Moment, Strategy], None]
"""Something done every so many steps: evaluate, save, draw a histogram. A function, not a named hook."""

_EXITS = {"done": 0, "time": 0, "terminated": 143, "interrupted": 130}
_SIGNALS: dict[int, str] = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
_AGREE_EVERY = 10  # steps between the ranks' votes on stopping: each vote waits for the device
_PLAIN_SECONDS = 10.0  # between progress lines where stderr is no terminal


class Outcome(NamedTuple):
    """How a run ended: ``reason`` is done, time, interrupted or terminated, after ``step`` steps."""

    reason: str
    step: int

    @property
    def exit(self) -> int:
        """The exit status of a command that ran this."""
        return _EXITS[self.reason]


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, for instance (seed, step, purpose): SHA-256, equal on all platforms."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def moment(step: int, steps: int, epoch_steps: int, seed: int) -> Moment:
    """Where the run is at ``step``. Seeds torch's global generators from (seed, step, rank) as well."""
    torch.manual_seed(seed_from(seed, step, "global", ranks.rank()))
    noise = torch.Generator().manual_seed(seed_from(seed, step, "noise"))
    return Moment(
        step=step,
        steps=steps,
        epoch=step // epoch_steps,
        epochs=-(-steps // epoch_steps),
        first=step % epoch_steps == 0,
        rng=random.Random(seed_from(seed, step, "rng")),
        noise=noise,
    )


def train(
    strategy: Strategy,
    draw: Draw,
    log: Log,
    *,
    steps: int,
    epoch_steps: int,
    seed: int,
    start: int = 0,
    until: int | None = None,
    every: Sequence[tuple[int, Act]] = (),
    stop: Callable[[], str | None] = lambda: None,
) -> Outcome:
    """Steps ``start`` to ``steps`` of a started ``strategy``, or to ``until``, where it is another's turn. ``every``: (period
    in steps, act), in this order.

    ``stop`` is asked after every step: a reason ends the run there. Passes on what the log raises (NonFiniteLoss);
    raises ValueError where a period is not positive.
    """
    if any(period < 1 for period, _ in every):
        raise ValueError(f"every: periods {[period for period, _ in every]}. Allowed: 1 step or more.")
    end = steps if until is None else until
    for step in range(start, end):
        now = moment(step, steps, epoch_steps, seed)
        log(now, strategy.update(draw, now))
        for period, act in every:
            if (step + 1) % period == 0:
                act(now, strategy)
        reason = stop()
        if reason and step + 1 < end:
            return Outcome(reason, step + 1)
    return Outcome("done", max(start, end))


class Stop:
    """Called after each step: the reason to stop, or None. Several ranks vote, so that all stop at the same step."""

    def __init__(self, max_time: float | None = None) -> None:
        if max_time is not None and not max_time > 0:
            raise ValueError(f"max_time = {max_time}. Allowed: seconds above 0, or none.")
        self.reason: str | None = None
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.calls = 0

    def __call__(self) -> str | None:
        self.calls += 1
        if self.reason is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = "time"
        if not ranks.active():
            return self.reason
        if self.calls % _AGREE_EVERY:
            return None
        reasons = [reason for reason in reversed(_EXITS) if reason != "done"]  # a signal outweighs the time
        votes = ranks.anywhere([reason == self.reason for reason in reasons], ranks.device())
        return next((reason for reason, vote in zip(reasons, votes) if vote), None)


@contextmanager
def signals(max_time: float | None = None) -> Iterator[Stop]:
    """A ``Stop`` that SIGINT and SIGTERM set while the context lasts (in the main thread); a second one acts at once.

    ``max_time``: seconds from now. Raises ValueError where it is not positive.
    """
    stop = Stop(max_time)
    before: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        stop.reason = _SIGNALS[number]
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            before[number] = signal.getsignal(number)
            signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Progress:
    """An act of period 1: one bar over the steps on stderr, or a plain line now and then where that is no terminal.

    ``latest``: tag -> mean of the last window, as the log keeps it (asked anew each time).
    """

    def __init__(self, steps: int, start: int, latest: Callable[[], dict[str, float]]) -> None:
        self.steps, self.start, self.latest = steps, start, latest
        self.bar = tqdm(total=steps, initial=start, mininterval=1.0, unit="step") if sys.stderr.isatty() else None
        self.began = self.shown = time.monotonic()

    def __call__(self, now: Moment, strategy: Strategy) -> None:
        loss = self.latest().get("train/loss")
        if self.bar is not None:
            if loss is not None:
                self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update()
            return
        clock = time.monotonic()
        if clock - self.shown >= _PLAIN_SECONDS or now.step + 1 == self.steps:
            self.shown = clock
            done = now.step + 1
            left = (clock - self.began) / (done - self.start) * (self.steps - done)
            shown = "" if loss is None else f"loss {loss:.4f}  "
            line = f"step {done}/{self.steps}  epoch {now.epoch + 1}/{now.epochs}  {shown}"
            print(f"{line}left {tqdm.format_interval(left)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
