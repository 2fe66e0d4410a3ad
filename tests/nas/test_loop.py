"""The loop itself, with nothing to train: what a moment is, in which order acts come, signals, progress."""
from __future__ import annotations

import signal
import threading
import time
from typing import Any, cast

import pytest
import torch

from nas.engine import Outcome, Progress, Stop, moment, seed_from, signals, train
from nas.protocols import Moment


def test_a_moment_depends_on_seed_and_step_alone() -> None:
    def draws(step: int, seed: int) -> tuple[float, float, float]:
        now = moment(step, 20, 6, seed)
        return now.rng.random(), torch.rand((), generator=now.noise).item(), torch.rand(()).item()

    assert draws(3, 1) == draws(3, 1)
    values = {value for at in ((3, 1), (4, 1), (3, 2)) for value in draws(*at)}
    assert len(values) == 9
    now = moment(12, 20, 6, 0)
    assert (now.step, now.steps, now.epoch, now.epochs, now.first) == (12, 20, 2, 4, True)
    assert not moment(13, 20, 6, 0).first and moment(18, 18 + 1, 6, 0).epochs == 4


def test_seed_from_is_stable_and_tells_parts_apart() -> None:
    assert seed_from(1, 2, "noise") == 2478870440130644945  # by sha256sum
    assert len({seed_from(1, 23), seed_from(12, 3), seed_from(1, 2, 3)}) == 3


def test_the_loop_acts_in_order_and_stops_after_a_step() -> None:
    seen: list[Any] = []

    class Counter:
        def update(self, draw: Any, now: Moment) -> dict[str, float]:
            seen.append(now.step)
            return {"train/loss": 1.0}

    def run(**options: Any) -> Outcome:
        seen.clear()
        acts = [(2, lambda now, strategy: seen.append("a")), (4, lambda now, strategy: seen.append("b"))]
        counter: Any = Counter()
        options = {"every": acts, **options}
        return train(counter, cast(Any, None), lambda now, metrics: None, epoch_steps=2, seed=0, **options)

    assert run(steps=5) == ("done", 5) and seen == [0, 1, "a", 2, 3, "a", "b", 4]
    assert run(steps=5, start=3) == ("done", 5) and seen == [3, "a", "b", 4]
    assert run(steps=5, start=5) == ("done", 5) and seen == []
    assert run(steps=5, stop=lambda: "time" if 1 in seen else None) == ("time", 2) and seen == [0, 1, "a"]
    assert run(steps=1, stop=lambda: "time") == ("done", 1)
    with pytest.raises(ValueError, match="Allowed: 1 step"):
        run(steps=5, every=[(0, print)])


def test_signals_are_put_back_and_a_second_one_acts_at_once() -> None:
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored
    try:
        with signals() as stop:
            assert stop() is None
            signal.raise_signal(signal.SIGINT)
            assert stop() == "interrupted"
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, was)
    with pytest.raises(ValueError, match="max_time = 0"):
        Stop(0)
    found: list[Any] = []

    def elsewhere() -> None:
        with signals(1e-9) as stop:
            found.append(stop())

    thread = threading.Thread(target=elsewhere)  # where no signal can be caught
    thread.start()
    thread.join()
    assert found == ["time"]


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress, strategy = Progress(20, 10, lambda: {"train/loss": 0.5}), cast(Any, None)
    for step in range(10, 20):
        clock[0] += 4.0
        progress(moment(step, 20, 5, 0), strategy)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 13/20  epoch 3/4  loss 0.5000  left 00:28"
    assert [line.split()[1] for line in lines] == ["13/20", "16/20", "19/20", "20/20"]
