"""A run of a scalar strategy: kills, time, signals, failures, its folder. Run as a script, it is one such run."""
from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim import SGD, Adam

from nas import checkpoint
from nas.descent import Descent
from nas.engine import Outcome
from nas.log import METRICS, SYSTEM, NonFiniteLoss
from nas.losses import CrossEntropy
from nas.protocols import Batch, Moment, Setup
from nas.run import Run
from nas.schedules import cosine

ROOT = Path(__file__).parents[2]
STEPS, EPOCH_STEPS = 24, 6


class Weight(nn.Module):
    """One scalar, as a net."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


@dataclass
class Scalar:
    """Fits w and alpha alternately, with every source of randomness that a strategy has."""

    lr: float = 0.1
    poison: int = -1  # the step at which alpha becomes NaN
    wait: float = 0.0  # seconds a step
    die: int = -1  # the step at which the process is gone

    def start(self, setup: Setup) -> None:
        self.setup, self.drawn, self.sampled = setup, 0, 0.0
        self.alpha = nn.Parameter(0.01 * torch.randn(2))
        self.w = Descent(setup.net.parameters(), partial(SGD, lr=self.lr, momentum=0.9), cosine(setup.steps), ema=0.9)
        self.a = Descent([self.alpha], partial(Adam, lr=0.05))

    def passes(self) -> float:
        return 2.0

    def update(self, draw: Any, now: Moment) -> dict[str, Any]:
        if now.step == self.die:
            os._exit(9)
        time.sleep(self.wait)
        x, y, _ = draw("train")
        noise = torch.randn((), generator=now.noise) + torch.rand(()) + now.rng.random()
        self.sampled += noise.item()
        loss = (self.setup.net(x) - y + self.alpha.sum() + 0.1 * noise).square().mean()
        self.w.down(loss)
        valid = (self.setup.net(x).detach() - self.alpha[0] * x).square().mean()
        self.a.down(valid * (math.nan if now.step == self.poison else 1.0))
        self.drawn += 1
        return {"train/loss": loss, "train/lr": self.w.rate, "valid/top1": noise}

    def arch(self, now: Moment) -> dict[str, Any]:
        return {}

    def architecture(self) -> dict[str, Any]:
        return {}

    def probabilities(self) -> dict[str, Any]:
        return {}

    def fits(self, arch: Any) -> bool:
        return True

    def network(self, arch: Any) -> Any:
        return self.setup.net


class Stream:
    """A draw with a position."""

    def __init__(self) -> None:
        self.at = 0

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        self.at += 1
        x = torch.arange(4.0) / 4 + 0.01 * self.at
        return Batch(x, 3.0 * x, torch.arange(4))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def a_teacher() -> nn.Module:
    teacher = nn.Linear(1, 1)
    nn.init.ones_(teacher.weight)
    nn.init.zeros_(teacher.bias)
    return teacher


def setup() -> Setup:
    return Setup(Weight(), None, None, CrossEntropy(), a_teacher(), STEPS, EPOCH_STEPS, 24)


def fit(
    folder: Path, seed: int = 1, max_time: float | None = None, config: Any = None, **settings: Any
) -> tuple[Run, Outcome]:
    """One session of the run in ``folder``; evaluates every 5 steps, saves every 4 (windows: 3)."""
    run = Run(folder, config or {"strategy": {"lr": 0.1}, "out": str(folder)}, period=3)

    def evaluate(now: Moment, strategy: Any) -> None:
        run.log.now(now.step, {"subnet/largest/top1": strategy.w.params[0].detach()})
        torch.rand(7)  # what an act draws must not reach the next step

    try:
        strategy, every = Scalar(**settings), [(5, evaluate)]
        outcome = run.fit(strategy, setup(), Stream(), seed=seed, every=every, save_every=4, max_time=max_time)
        run.save(outcome.step, "best")
    finally:
        run.close()
    return run, outcome


def script(folder: Path, **settings: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder), json.dumps(settings)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def assert_same(a: Any, b: Any, name: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{name}[{i}]")
    else:
        assert a == b, name


def assert_same_run(a: Path, b: Path) -> None:
    first, second = last(a), last(b)
    first["config"].pop("out")
    second["config"].pop("out")
    assert_same(first, second)
    assert (a / METRICS).read_bytes() == (b / METRICS).read_bytes() != b""


@pytest.mark.parametrize(
    "die", [pytest.param(3, marks=pytest.mark.slow), 13, pytest.param(23, marks=pytest.mark.slow)]
)  # before a checkpoint, between, at the end
def test_a_killed_and_resumed_run_is_bit_exact(tmp_path: Path, die: int) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    fit(straight)
    child = script(killed, die=die)
    child.communicate(timeout=100)
    assert child.returncode == 9
    run, outcome = fit(killed)
    assert outcome == ("done", STEPS) and run.folder == killed  # where nothing was saved yet it begins again there
    assert_same_run(straight, killed)
    assert [json.loads(line)["step"] for line in (killed / SYSTEM).read_text().splitlines()] == [*range(2, 24, 3)]


@pytest.mark.slow
def test_sessions_cut_by_time_add_up_to_the_same_run(tmp_path: Path) -> None:
    fit(tmp_path / "straight")
    reasons: list[str] = []
    while not reasons or reasons[-1] != "done":
        outcome = fit(tmp_path / "short", max_time=1e-9 if len(reasons) < 7 else None)[1]
        reasons.append(outcome.reason)
        assert outcome.exit == 0 and last(tmp_path / "short")["step"] == outcome.step
    assert reasons == ["time"] * 7 + ["done"]
    assert_same_run(tmp_path / "straight", tmp_path / "short")


def test_seeds_differ_and_a_finished_run_stays(tmp_path: Path) -> None:
    fit(tmp_path / "a")
    fit(tmp_path / "b", seed=2)
    assert (tmp_path / "a" / METRICS).read_bytes() != (tmp_path / "b" / METRICS).read_bytes()
    before = (tmp_path / "a" / "checkpoints" / "last.pt").read_bytes()
    assert fit(tmp_path / "a")[1] == ("done", STEPS)
    assert (tmp_path / "a" / "checkpoints" / "last.pt").read_bytes() == before
    with pytest.raises(ValueError, match="began with seed 1, not 2"):
        fit(tmp_path / "a", seed=2)


def test_a_truncated_checkpoint_goes_on_from_the_previous_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "straight")
    fit(tmp_path / "torn")
    path = tmp_path / "torn" / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:-50])
    run, _ = fit(tmp_path / "torn")
    assert run.start == 20 and "previous.pt (step 20)" in caplog.text
    assert_same_run(tmp_path / "straight", tmp_path / "torn")


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss) as error:
        fit(tmp_path / "run", poison=9)  # the loss of step 10 is the first that shows it; its window closes at 11
    good = tmp_path / "run" / "checkpoints" / "last.pt"
    assert str(error.value).startswith("step 10: train/loss = nan, not finite. Last good checkpoint: " + str(good))
    assert "\n" not in str(error.value) and last(tmp_path / "run")["step"] == 8
    failed = torch.load(good.with_name("failed.pt"), weights_only=True)
    assert failed["strategy"]["alpha"].isnan().any() and not last(tmp_path / "run")["strategy"]["alpha"].isnan().any()


@pytest.mark.parametrize(
    ("poison", "metric"),
    [(10, "train/loss"), (11, r"a \(a parameter\)")],  # at the save after step 11: in the open window; in no loss yet
)
def test_a_bad_state_is_never_saved(tmp_path: Path, poison: int, metric: str) -> None:
    run = Run(tmp_path / "run", {}, period=100)
    with pytest.raises(NonFiniteLoss, match=f"step 11: {metric} = nan") as error:
        run.fit(Scalar(poison=poison), setup(), Stream(), seed=1, save_every=4)
    run.close()
    assert last(tmp_path / "run")["step"] == 8
    assert error.value.checkpoint == tmp_path / "run" / "checkpoints" / "last.pt"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "reason", "code"), [
    (signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)])  # fmt: skip
def test_signals_save_and_say_so(tmp_path: Path, number: int, reason: str, code: int) -> None:
    fit(tmp_path / "straight")
    child = script(tmp_path / "run", wait=0.2)
    assert child.stdout is not None
    assert child.stdout.readline() == "under way\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=100)
    said, step, _ = out.splitlines()[-1].split(" ")
    assert (child.returncode, said) == (code, reason), err
    assert 5 <= int(step) < STEPS and last(tmp_path / "run")["step"] == int(step)
    fit(tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_another_config_is_refused_by_its_keys(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    with pytest.raises(ValueError, match=r"strategy\.lr \(was 0\.1, now 0\.2\)"):
        fit(tmp_path / "run", config={"strategy": {"lr": 0.2}})


def test_a_strategy_that_cannot_be_saved_stops_before_step_0(tmp_path: Path) -> None:
    class Bad(Scalar):
        def start(self, setup: Setup) -> None:
            super().start(setup)
            self.generator = random.Random(0)

    run = Run(tmp_path / "run", {})
    with pytest.raises(TypeError, match=r"Bad\.generator: a checkpoint cannot hold Random"):
        run.fit(Bad(), setup(), Stream(), seed=1)
    run.close()
    assert (tmp_path / "run" / METRICS).read_bytes() == b""


def test_the_run_folder(tmp_path: Path) -> None:
    config = {"strategy": {"lr": 0.1}}
    run, _ = fit(tmp_path / "run", config=config)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("events")}
    assert names == {"config.yaml", "env.json", METRICS, SYSTEM, "checkpoints"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == config
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__ and env["threads"] == torch.get_num_threads()
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert kept == {"last.pt", "previous.pt", "best.pt", f"teacher-{checkpoint.digest(a_teacher())}.pt"}
    assert last(tmp_path / "run")["config_hash"] == checkpoint.config_hash(config)


def test_folders_are_numbered_and_auto_takes_the_newest_with_a_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path / "run")
    for name in ("run-2", "run-3"):
        fresh = Run(tmp_path / "run", {}, resume="never")
        fresh.close()
        assert (fresh.folder, fresh.start) == (tmp_path / name, 0)
    assert fit(tmp_path / "run")[0].folder == tmp_path / "run"  # neither -2 nor -3 has a checkpoint
    (tmp_path / "empty").mkdir()
    empty = Run(tmp_path / "empty", {})
    empty.close()
    assert empty.folder == tmp_path / "empty"
    with pytest.raises(ValueError, match="resume = 'yes'"):
        Run(tmp_path / "run", {}, resume="yes")


def main(folder: str, settings: str) -> int:
    options = json.loads(settings)
    if "wait" in options:  # tell the test that the run is on its way
        watched = Scalar.update

        def update(self: Scalar, draw: Any, now: Moment) -> dict[str, Any]:
            if now.step == 5:
                print("under way", flush=True)
            return watched(self, draw, now)

        Scalar.update = update  # type: ignore[method-assign]
    run, outcome = fit(Path(folder), **options)
    print(outcome.reason, outcome.step, run.folder)
    return outcome.exit


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
