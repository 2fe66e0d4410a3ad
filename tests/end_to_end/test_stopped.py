"""SIGINT and SIGTERM outside a run: one line and 130 or 143, never a traceback."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import nas

from nas.commands import spaces
from nas.recipe import UsageError

ROOT = Path(__file__).parents[2]
BOTH = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and children inherit that."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.mark.parametrize("number, code, word", BOTH)
def test_a_signal_while_torch_is_imported(tmp_path: Path, number: signal.Signals, code: int, word: str) -> None:
    """In the place of torch, a module that sends the signal and turns what it raises into something else."""
    (tmp_path / "torch.py").write_text(
        "import os, time\ntry:\n"
        f"    os.kill(os.getpid(), {int(number)})\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('torch is broken') from error\n")  # fmt: skip
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-m", "nas", "search", "tas-digits"], cwd=tmp_path, text=True, timeout=50,
                          capture_output=True, env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"nas search: {word}\n")


@pytest.mark.parametrize("number, code, word", BOTH)
def test_a_signal_before_a_run_begins(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals, code: int, word: str
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(spaces, "run", lambda rest: os.kill(os.getpid(), number))
    result = nas("spaces")
    assert result.code == code and f"nas spaces: {word}\n" in result.err + capfd.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell does for its background jobs."""
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(spaces, "run", lambda rest: signal.raise_signal(signal.SIGINT) or 0)  # type: ignore[func-returns-value]
        assert nas("spaces").code == 0
    finally:
        signal.signal(signal.SIGINT, was)


def test_debug_still_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rest: list[str]) -> int:
        raise UsageError("no")

    monkeypatch.setattr(spaces, "run", refuse)
    assert nas("spaces").code == 2
    with pytest.raises(UsageError):
        nas("spaces", "--debug")
