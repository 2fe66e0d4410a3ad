"""Runs that many tests read: made once, never written to."""
from __future__ import annotations

from pathlib import Path

import pytest
from cli import RETRAIN, SEARCH, Result, ok


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all shared runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def searched(place: Path) -> Result:
    """What ``nas search --json`` said of the run ``tied``."""
    return ok(*SEARCH, "--out", place / "tied", "--json")


@pytest.fixture(scope="session")
def tied(place: Path, searched: Result) -> Path:
    """A finished search of kind tied."""
    assert searched.code == 0
    return place / "tied"


@pytest.fixture(scope="session")
def tas(place: Path) -> Path:
    """A finished search of the paper's kind."""
    ok(*SEARCH, "--space.kind", "tas", "--epochs", "1", "--out", place / "tas")
    return place / "tas"


@pytest.fixture(scope="session")
def bundle(place: Path, tied: Path) -> Path:
    """The derived network of ``tied`` with inherited weights."""
    return Path(ok("extract", tied, "--out", place / "derived").last)


@pytest.fixture(scope="session")
def retrained(place: Path, bundle: Path) -> Path:
    """The run folder of ``bundle`` trained from scratch; its network is in ``bundle`` inside."""
    return Path(ok("retrain", bundle, *RETRAIN, "--out", place / "scratch").last).parent
